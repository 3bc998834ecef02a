"""Contrasts of arms against loops, textbook values, real bootstraps and simulated studies whose truth is known."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import special, stats

from study.statistics import Contrast, contrast, equivalence, holm, is_equivalent, mean_of

SHARED = 0.3  # standard deviation of what seeds, and scans, do to all arms alike
KINDS = np.array([-0.4, 0.0, 0.4])  # how much easier each kind of question is


@dataclass(frozen=True)
class Exam:
    """Questions about pictures: the scans of each, its kind, and weights that make every kind count the same."""

    units: list[list[int]]
    kind_Q: np.ndarray
    weights_Q: np.ndarray
    share_QU: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, questions: int, scans: int = 350) -> Exam:
        """Pictures of 2 to 8 scans with 1 to 4 questions each."""
        units: list[list[int]] = []
        while len(units) < questions:
            picture = rng.choice(scans, rng.integers(2, 9), replace=False).tolist()
            units += [picture] * int(rng.integers(1, 5))
        units = units[:questions]
        kind_Q = rng.choice(3, questions, p=[0.5, 0.3, 0.2])
        share_QU = np.zeros((questions, scans))
        for row, picture in zip(share_QU, units, strict=True):
            row[picture] = len(picture) ** -0.5
        return cls(units, kind_Q, 1 / np.bincount(kind_Q, minlength=3)[kind_Q], share_QU)


@dataclass(frozen=True)
class World:
    """How arms differ: standard deviations, per arm, of effects on whether a question is answered right (probit)."""

    seed: float = 0.0
    scan: float = 0.0
    question: float = 0.0
    seed_x_scan: float = 0.0
    seeds: int = 5

    def study(self, rng: np.random.Generator, exam: Exam, levels: list[float]) -> tuple[list[np.ndarray], np.ndarray]:
        """Answers of one arm per level, and the true means: over all seeds, scans and questions there could be."""
        questions, scans = exam.share_QU.shape
        effects_UA = rng.normal(0, 1, (scans, len(levels))) * self.scan
        common = rng.normal(0, SHARED, (self.seeds, 1)) + exam.share_QU @ rng.normal(0, SHARED, scans)
        answers = []
        for level, effect_Q in zip(levels, (exam.share_QU @ effects_UA).T, strict=True):
            own = effect_Q + rng.normal(0, 1, (self.seeds, 1)) * self.seed + rng.normal(0, 1, questions) * self.question
            if self.seed_x_scan:
                own = own + rng.normal(0, self.seed_x_scan, (self.seeds, scans)) @ exam.share_QU.T
            latent = level + KINDS[exam.kind_Q] + common + own + rng.normal(size=(self.seeds, questions))
            answers.append(latent > 0)
        spread = math.sqrt(1 + 2 * SHARED**2 + self.seed**2 + self.scan**2 + self.question**2 + self.seed_x_scan**2)
        return answers, stats.norm.cdf((np.array(levels)[:, None] + KINDS) / spread).mean(1)


WORLDS = {
    "seeds": World(seed=0.3),
    "scans": World(scan=0.8),
    "seeds and scans": World(seed=0.15, scan=0.6),
    "questions": World(question=0.8),
    "noise, 5 seeds": World(),
    "noise, 8 seeds": World(seeds=8),
}
MORE_WORLDS = {
    "mostly seeds": World(seed=0.1, scan=0.2, question=0.2),
    "seeds x scans": World(seed_x_scan=0.8),
    "all": World(seed=0.06, scan=0.5, question=0.3, seed_x_scan=0.3),
    "all, 8 seeds": World(seed=0.15, scan=0.6, question=0.3, seed_x_scan=0.3, seeds=8),
}
ALL = WORLDS | MORE_WORLDS


def naive(difference_SQ: np.ndarray, weights_Q: np.ndarray) -> tuple[float, float]:
    """What must not be done: questions as if independent, seeds as if all there were."""
    weights_Q = weights_Q / weights_Q.sum()
    mean_Q = difference_SQ.mean(0)
    estimate = float(weights_Q @ mean_Q)
    reach = 1.96 * float(np.linalg.norm(weights_Q * (mean_Q - estimate)))
    return estimate - reach, estimate + reach


def only_seeds(difference_SQ: np.ndarray, weights_Q: np.ndarray) -> tuple[float, float]:
    """What must not be done either: the t interval of the seeds' means, as if no other questions could be asked."""
    mean_S = difference_SQ @ weights_Q / weights_Q.sum()
    reach = float(special.stdtrit(len(mean_S) - 1, 0.975) * mean_S.std(ddof=1)) / math.sqrt(len(mean_S))
    return float(mean_S.mean()) - reach, float(mean_S.mean()) + reach


def coverage(world: World, studies: int, questions: int, gap: float) -> dict[str, float]:
    """Shares of simulated studies whose 95 % interval holds the truth, by what computed the interval."""
    rng = np.random.default_rng(0)
    hits: dict[str, list[bool]] = {"contrast": [], "naive": [], "only seeds": []}
    for _ in range(studies // 100):
        exam = Exam.draw(rng, questions)
        for _ in range(100):
            (first, second), (level, other) = world.study(rng, exam, [0.8, 0.8 - gap])
            intervals = {
                "contrast": contrast(first, second, exam.units, exam.weights_Q).interval(),
                "naive": naive(first.astype(float) - second, exam.weights_Q),
                "only seeds": only_seeds(first.astype(float) - second, exam.weights_Q),
            }
            for name, (low, high) in intervals.items():
                hits[name].append(low <= level - other <= high)
    return {name: float(np.mean(hit)) for name, hit in hits.items()}


def false_tables(world: World, studies: int, questions: int, arms: int = 12) -> float:
    """The share of tables, of arms that are all alike, in which Holm's test finds any different from the control."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(studies // 50):
        exam = Exam.draw(rng, questions)
        for _ in range(50):
            (control, *others), _ = world.study(rng, exam, [0.8] * (arms + 1))
            p = {str(i): contrast(arm, control, exam.units, exam.weights_Q).p for i, arm in enumerate(others)}
            found += min(holm(p).values()) <= 0.05
    return found / studies


def monte_carlo(studies: int) -> float:
    """Two standard errors of a share of 5 % that is counted in so many studies."""
    return 2 * math.sqrt(0.05 * 0.95 / studies)


@pytest.fixture
def small() -> tuple[np.ndarray, np.ndarray, list[list[int]], np.ndarray]:
    rng = np.random.default_rng(0)
    units = [rng.choice(12, rng.integers(1, 4), replace=False).tolist() for _ in range(30)]
    first, second = (rng.random((4, 60)) < share for share in (0.8, 0.6))
    return first, second, units * 2, rng.random(60)


def test_the_estimate_is_that_of_plain_loops(small):
    first, second, units, weights = small
    total = 0.0
    for a, b in zip(first, second, strict=True):
        for x, y, weight in zip(a, b, weights, strict=True):
            total += (float(x) - float(y)) * weight
    assert contrast(first, second, units, weights).estimate == pytest.approx(total / len(first) / weights.sum())
    assert contrast(first, second, units).estimate == pytest.approx(first.mean() - second.mean())
    assert mean_of(first, units).estimate == pytest.approx(first.mean())


def test_swapping_arms_flips_the_sign_and_nothing_else(small):
    first, second, units, weights = small
    one, other = contrast(first, second, units, weights), contrast(second, first, units, weights)
    assert other.estimate == -one.estimate
    assert (other.standard_error, other.df, other.p) == pytest.approx((one.standard_error, one.df, one.p))


def test_neither_order_nor_names_nor_the_sum_of_the_weights_matter(small):
    first, second, units, weights = small
    order = np.random.default_rng(1).permutation(60)
    renamed = [tuple(f"scan {u}" for u in reversed(units[q])) for q in order]
    moved = contrast(first[::-1, order], second[::-1, order], renamed, 7 * weights[order])
    fields = lambda c: (c.estimate, c.standard_error, c.df)  # noqa: E731
    assert fields(moved) == pytest.approx(fields(contrast(first, second, units, weights)))


def test_questions_of_zero_weight_change_nothing(small):
    first, second, units, weights = small
    weights[::3] = 0
    kept = weights > 0
    alone = contrast(first[:, kept], second[:, kept], [u for u, k in zip(units, kept, strict=True) if k], weights[kept])
    whole = contrast(first, second, units, weights)
    assert (whole.standard_error, whole.df) == pytest.approx((alone.standard_error, alone.df))


def test_seeds_that_agree_leave_the_textbook_interval_of_disjoint_clusters():
    rng = np.random.default_rng(0)
    cluster_means = rng.random(9)
    answers = np.tile(np.repeat(cluster_means, 4), (5, 1))
    got = mean_of(answers, [[f"scan {q // 4}"] for q in range(36)])
    assert (got.standard_error, got.df) == pytest.approx((stats.sem(cluster_means), 8))


def test_questions_that_agree_leave_the_textbook_paired_t_test_over_seeds(small):
    _, _, units, weights = small
    first, second = np.random.default_rng(0).random((2, 5))
    got = contrast(np.tile(first[:, None], 60), np.tile(second[:, None], 60), units, weights)
    assert (got.p, got.df) == pytest.approx((stats.ttest_rel(first, second).pvalue, 4))


def test_the_noise_of_a_scene_counts_once_however_many_scans_it_owns():
    answers = np.random.default_rng(0).random((5, 40)) < np.linspace(0.1, 0.9, 40)
    one, many = (mean_of(answers, [[f"{q} {i}" for i in range(scans)] for q in range(40)]) for scans in (1, 6))
    assert (many.standard_error, many.df) == pytest.approx((one.standard_error, one.df))


def test_it_is_the_limit_of_a_real_two_way_bootstrap_less_what_that_counts_too_often():
    rng = np.random.default_rng(0)
    seeds, scans, draws = 5, 20, 50_000
    scan_Q = np.arange(100) % scans
    answers = 3 * rng.normal(size=(seeds, 100)) + rng.normal(size=(seeds, 1)) + rng.normal(size=scans)[scan_Q]
    centred_SU = np.stack([answers[:, scan_Q == scan].mean(1) for scan in range(scans)], 1) - answers.mean()
    times_S = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    times_U = rng.multinomial(scans, np.full(scans, 1 / scans), draws) / scans
    both = np.einsum("ns,su,nu->n", times_S, centred_SU, times_U).var()
    only_seeds = (times_S @ centred_SU.mean(1)).var()
    only_scans = (times_U @ centred_SU.mean(0)).var()
    interaction = both - only_seeds - only_scans
    corrected = seeds / (seeds - 1)
    limit = only_seeds * corrected + (only_scans - interaction * corrected) * scans / (scans - 1)
    assert mean_of(answers, [[u] for u in scan_Q]).standard_error ** 2 == pytest.approx(limit, rel=0.04)


def test_overlapping_scans_are_the_limit_of_cluster_bootstraps_by_inclusion_and_exclusion():
    """Every set of scans that pictures share is resampled; single scans add, pairs subtract, triples add."""
    rng = np.random.default_rng(0)
    pictures = [rng.choice(9, rng.integers(1, 4), replace=False).tolist() for _ in range(40)]
    answers = np.tile((np.array([sum(p) for p in pictures]) > 8) + rng.normal(0, 0.3, 40), (3, 1))  # seeds agree
    centred_Q = (answers[0] - answers[0].mean()) / 40
    limit = 0.0
    for size in (1, 2, 3):
        for shared in itertools.combinations(range(9), size):
            cluster = sum(c for c, p in zip(centred_Q, pictures, strict=True) if set(shared) <= set(p))
            limit -= (-1) ** size * (cluster * (rng.poisson(1, 30_000) - 1)).var()
    apart = np.mean([not set(p) & set(q) for p in pictures for q in pictures])
    assert mean_of(answers, pictures).standard_error ** 2 == pytest.approx(limit / apart, rel=0.04)


def test_p_value_and_interval_are_those_of_the_t_table():
    got = Contrast(0.004, 0.002, 10)
    assert got.p == pytest.approx(0.07339, abs=1e-5)
    assert got.interval() == pytest.approx((0.004 - 2.228139 * 0.002, 0.004 + 2.228139 * 0.002))


@pytest.mark.parametrize(
    ("estimate", "p", "inside"),
    [(0.004, 0.006672, True), (-0.004, 0.006672, True), (0.007, 0.082254, False), (0.01, 0.5, False)],
)
def test_equivalence_is_the_larger_of_two_one_sided_p_values_and_agrees_with_the_90_percent_interval(
    estimate, p, inside
):
    got = Contrast(estimate, 0.002, 10)
    assert equivalence(got, 0.01) == pytest.approx(p, abs=1e-6)
    assert is_equivalent(got, 0.01) is inside


def test_holm_by_hand_keeps_the_order_and_stays_monotone_and_at_most_1():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert list(holm({"b": 0.9, "a": 0.6}).items()) == [("b", 1.0), ("a", 1.0)]
    assert holm({}) == {}


def test_arms_that_never_differ_are_equal_beyond_doubt(small):
    first, _, units, weights = small
    got = contrast(first, first, units, weights)
    assert (got.estimate, got.p, got.interval(), equivalence(got)) == (0.0, 1.0, (0.0, 0.0), 0.0)
    assert Contrast(0.1, 0.0, 4).p == 0.0 and equivalence(Contrast(0.1, 0.0, 4)) == 1.0


def test_questions_that_all_share_a_scan_say_nothing_about_other_scans(small):
    first, second, units, weights = small
    got = contrast(first, second, [[*named, "everywhere"] for named in units], weights)
    assert (got.p, got.interval(), is_equivalent(got)) == (1.0, (-math.inf, math.inf), False)


ONE = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrast(ONE, np.ones((3, 3)), "abc"), r"shapes \(2, 3\) and \(3, 3\).*same seeds and questions"),
        (lambda: contrast(ONE[:1], ONE[:1], [[1]] * 3), r"shape \(1, 3\).*at least 2 seeds.*more seeds"),
        (lambda: mean_of(ONE[0], [[1]] * 3), r"shape \(3,\).*\(seeds, questions\)"),
        (lambda: mean_of(ONE, [[1]] * 2), "answers to 3 questions, units of 2 and weights of shape"),
        (lambda: mean_of(ONE, [[1]] * 3, [1, 1]), r"units of 3 and weights of shape \(2,\)"),
        (lambda: mean_of(np.ones((2, 0)), []), "answers to 0 questions"),
        (lambda: mean_of(ONE, [[1], [], [2]]), r"Question 1 has the units \[\]; each question needs"),
        (lambda: mean_of(ONE, [[1], [2], "scan"]), "Question 2 has the units 'scan'"),
        (lambda: mean_of(ONE, [[1]] * 3, [1, -1, 1]), "weights go from -1.0 to 1.0.*positive weights"),
        (lambda: mean_of(ONE, [[1]] * 3, [0, 0, 0]), "weights go from 0.0 to 0.0"),
        (lambda: mean_of(ONE * np.nan, [[1]] * 3), "not a finite number.*score every question"),
        (lambda: equivalence(Contrast(0, 1, 4), 0), "margin of equivalence is 0; it must be above 0"),
        (lambda: is_equivalent(Contrast(0, 1, 4), -0.1), "margin of equivalence is -0.1"),
        (lambda: holm({"a": 0.1, "b": math.nan}), "no p-values: {'b': nan}.*from 0 to 1"),
    ],
)
def test_errors_say_what_was_given_what_is_allowed_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("name", WORLDS)
def test_intervals_cover_the_truth_in_95_percent_of_simulated_studies(name):
    studies = 1000
    got = coverage(WORLDS[name], studies, questions=200, gap=0.2)
    assert 0.93 - monte_carlo(studies) <= got["contrast"] <= 0.97 + monte_carlo(studies), got
    if "scans" in name:  # questions that share scans, under few seeds: what the plain intervals get wrong
        assert got["naive"] < 0.85 and got["only seeds"] < 0.9, got


def test_tables_of_twelve_arms_that_are_all_alike_rarely_show_a_difference():
    studies = 100
    assert false_tables(MORE_WORLDS["mostly seeds"], studies, questions=200) <= 0.05 + monte_carlo(studies)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 0.2])
@pytest.mark.parametrize("name", ALL)
def test_intervals_cover_the_truth_in_95_percent_of_many_larger_studies(name, gap):
    studies = 4000
    got = coverage(ALL[name], studies, questions=1000, gap=gap)
    print(f"{name}, gap {gap}: {got}")
    assert 0.93 - monte_carlo(studies) <= got["contrast"] <= 0.97 + monte_carlo(studies), got


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_intervals_of_a_single_arm_cover_its_mean_too(name):
    studies, rng, hits = 4000, np.random.default_rng(0), 0
    for _ in range(studies // 100):
        exam = Exam.draw(rng, 500)
        for _ in range(100):
            (answers,), (level,) = ALL[name].study(rng, exam, [0.5])
            low, high = mean_of(answers, exam.units, exam.weights_Q).interval()
            hits += low <= level <= high
    print(f"{name}, one arm: {hits / studies}")
    assert 0.93 - monte_carlo(studies) <= hits / studies <= 0.97 + monte_carlo(studies)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_many_larger_tables_of_twelve_arms_that_are_all_alike_rarely_show_a_difference(name):
    studies = 2000
    found = false_tables(ALL[name], studies, questions=600)
    print(f"{name}: {found}")
    assert found <= 0.05 + monte_carlo(studies)


@pytest.mark.slow
def test_sixty_contrasts_over_ten_thousand_questions_take_well_under_a_minute():
    rng = np.random.default_rng(0)
    units = [rng.choice(350, rng.integers(2, 9), replace=False).tolist() for _ in range(10_000)]
    control, *arms = rng.random((61, 5, 10_000)) < 0.8
    start = time.perf_counter()
    for arm in arms:
        contrast(arm, control, units)
    assert time.perf_counter() - start < 30
