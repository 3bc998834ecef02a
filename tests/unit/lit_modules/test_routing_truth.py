"""What was chosen against what matters: every number again by loops over questions and tokens."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lit_modules import Generation, RoutedVLM, TinyLlava
from lit_modules.probe import Overlap, Probe, churn, overlap
from lit_modules.routing_truth import RoutingTruth, by_layer, tags, truth_table
from lit_modules.truth_counts import TruthCounts, known
from lit_modules.truth_measures import Choices, auc, margin, position_share, shared_by_chance
from plugins.mixture_of_depths import MixtureOfDepths
from plugins.random_depths import RandomDepths
from plugins.short_v import ShortV
from routing import All, Constant, ExpertChoice, LinearRouter, RoutingRecord, Site, Threshold, TokenKind, Tokens
from stub_data import StubData, prompt_batch

V, Q, PAD = TokenKind.VISION, TokenKind.QUESTION, TokenKind.PAD
SITES = [Site(layer, 6, "layer", "depth") for layer in (1, 3, 4)]
SHARES = (0.7, 0.4, 0.4)
RULES = (ExpertChoice(), ExpertChoice((V, Q)), Threshold(p=0.0))
HIGH, WIDE, ROWS = 3, 4, 6
PICTURE = HIGH * WIDE


def tokens_of(seed: int) -> Tokens:
    """Left-padded questions: about one picture, about two, about none, and one whose evidence nobody knows."""
    random = torch.Generator().manual_seed(seed)
    pictures = [1, 0, 2, 1, 1, 1]
    length = 2 * PICTURE + 3
    kind, image, down, across = (torch.full((ROWS, length), fill) for fill in (int(PAD), -1, -1, -1))
    evidence = torch.zeros(ROWS, length, dtype=torch.int8)
    for row, number in enumerate(pictures):
        patches, start = number * PICTURE, length - number * PICTURE - 3
        seen = slice(start, start + patches)
        kind[row, start:], kind[row, seen] = Q, V
        place = torch.arange(patches)
        image[row, seen], down[row, seen], across[row, seen] = place // PICTURE, place % PICTURE // WIDE, place % WIDE
        evidence[row, seen] = (torch.rand(patches, generator=random) < 0.3).to(torch.int8)
    evidence[3] = torch.where(kind[3] == V, -1, 0)
    evidence[4] = 0  # a question that needs no patch has no recall
    return Tokens.of(kind, image_BT=image, row_BT=down, column_BT=across, evidence_BT=evidence)


def forward(seed: int, tokens: Tokens | None = None, rules=RULES):
    """One record of each site, by scores of which many are equal; each site has its own rule."""
    tokens, random, records = tokens or tokens_of(seed), torch.Generator().manual_seed(1000 + seed), []
    for site, share, rule in zip(SITES, SHARES, rules, strict=True):
        scores_BTE = torch.randint(-3, 4, (*tokens.shape, 1), generator=random).float() / 2
        decision = rule(scores_BTE, scores_BTE, tokens, share)
        records.append(RoutingRecord(site, scores_BTE, decision, share, tokens, rule.candidate_BT(tokens)))
    return records


def cells(record: RoutingRecord):
    """For each row: place, score, kept, evidence and kind of its candidates."""
    tokens, keep_BT = record.tokens, record.decision.keep_BT()
    for b in range(tokens.shape[0]):
        found = []
        for t in range(tokens.shape[1]):
            if bool(record.candidate_BT[b, t]):
                place = (int(tokens.image_BT[b, t]), int(tokens.row_BT[b, t]), int(tokens.column_BT[b, t]))
                facts = (float(record.scores_BTE[b, t, 0]), bool(keep_BT[b, t]), int(tokens.evidence_BT[b, t]))
                found.append((place, *facts, int(tokens.kind_BT[b, t]) == V))
        yield found


def by_loops(records: list[RoutingRecord]) -> dict[str, float]:
    """One site's numbers over several forwards, without overlap."""
    needed = got = chance = cuts = ties = 0.0
    aucs, margins, kept_at = [], [], {}
    for row in (row for record in records for row in cells(record)):
        vision = [(place, score, kept, evidence) for place, score, kept, evidence, seen in row if seen]
        for place, _, kept, _ in vision:
            kept_at.setdefault(place, []).append(kept)
        if vision and all(evidence >= 0 for *_, evidence in vision):
            right = [evidence == 1 for *_, evidence in vision]
            needed += sum(right)
            got += sum(kept and r for (_, _, kept, _), r in zip(vision, right, strict=True))
            chance += sum(right) * sum(kept for _, _, kept, _ in vision) / len(vision)
            if 0 < sum(right) < len(right):
                aucs.append(roc_auc_score(right, [score for _, score, _, _ in vision]))
        inside, outside = [s for _, s, kept, *_ in row if kept], [s for _, s, kept, *_ in row if not kept]
        if inside and outside:
            cuts += 1
            ties += min(inside) == max(outside)
            spread = np.std(inside + outside)
            margins.append((min(inside) - max(outside)) / spread if spread else 0.0)
    return {
        "evidence_recall": got / needed,
        "evidence_recall_by_chance": chance / needed,
        "evidence_auc": np.mean(aucs),
        "position_share": adjusted(kept_at),
        "margin": np.mean(margins),
        "ties": ties / cuts,
    }


def adjusted(kept_at: dict[object, list[bool]]) -> float:
    """Adjusted R^2 of kept on its place."""
    everything = [kept for found in kept_at.values() for kept in found]
    n, groups = len(everything), len(kept_at)
    within = sum((kept - np.mean(found)) ** 2 for found in kept_at.values() for kept in found)
    total = sum((kept - np.mean(everything)) ** 2 for kept in everything)
    return 1 - (within / (n - groups)) / (total / (n - 1))


def kept_vision(record: RoutingRecord) -> list[set[int]]:
    keep_BT = record.decision.keep_BT() & record.tokens.mask((V,))
    return [set(row.nonzero().flatten().tolist()) for row in keep_BT]


def test_every_measure_is_what_loops_count():
    counts, forwards = TruthCounts(SITES), [forward(seed) for seed in range(4)]
    for records in forwards:
        counts.update(records)
    found = {name: values_L.tolist() for name, values_L in counts.compute().items()}
    for layer in range(len(SITES)):
        for name, value in by_loops([records[layer] for records in forwards]).items():
            assert found[name][layer] == pytest.approx(value, abs=1e-9), (name, layer)
    assert 0 < found["ties"][0] < 1
    for layer in (1, 2):
        both = either = chance = twice = 0.0
        for records in forwards:
            vision = records[0].tokens.count((V,))
            for now, before, n in zip(*(kept_vision(records[at]) for at in (layer, layer - 1)), vision, strict=True):
                both, either = both + len(now & before), either + len(now | before)
                chance, twice = chance + len(now) * len(before) / max(n, 1), twice + len(now) + len(before)
        assert found["overlap"][layer] == pytest.approx(both / either)
        assert found["overlap_by_chance"][layer] == pytest.approx(chance / (twice - chance))
    assert np.isnan(found["overlap"][0]) and np.isnan(found["churn"]).all()


def test_ranks_are_summed_even_if_one_saw_no_picture():
    whole, first, second, idle = (TruthCounts(SITES) for _ in range(4))
    for seed in range(4):
        whole.update(forward(seed))
        (first if seed % 2 else second).update(forward(seed))
    first.merge_state(second)
    first.merge_state(idle)
    for name, values_L in whole.compute().items():
        torch.testing.assert_close(first.compute()[name], values_L, equal_nan=True)
    first.reset()
    first.update(forward(0))
    alone = TruthCounts(SITES)
    alone.update(forward(0))
    assert torch.equal(first.compute()["position_share"], alone.compute()["position_share"])


def test_auc_counts_ties_by_half_and_is_unknown_without_pairs():
    random = np.random.default_rng(0)
    scores, positive = random.integers(0, 4, (50, 12)) / 2, random.random((50, 12)) < 0.3
    scores[:, 0] = -np.inf  # tokens that an earlier layer dropped for good
    negative = ~positive & (random.random((50, 12)) < 0.8)
    got = auc(*(torch.from_numpy(x) for x in (scores, positive, negative)))
    for row in range(50):
        ups, downs = scores[row, positive[row]], scores[row, negative[row]]
        pairs = [(u > d) + (u == d) / 2 for u in ups for d in downs]
        assert float(got[row]) == pytest.approx(np.mean(pairs)) if pairs else bool(got[row].isnan())


def test_a_margin_needs_both_sides_and_no_spread_is_a_tie():
    scores = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]]).double()
    kept = torch.tensor([[True, False, False], [True, False, False], [True, False, False], [True, True, True]])
    found = margin(scores, kept, ~kept)
    assert found[:3].tolist() == pytest.approx([0, (3 / 2) ** 0.5, -2 * (3 / 2) ** 0.5]) and bool(found[3].isnan())


def test_chance_overlap_is_the_mean_over_all_choices():
    choices = [set(c) for c in combinations(range(5), 3)], [set(c) for c in combinations(range(5), 2)]
    mean = np.mean([len(a & b) for a in choices[0] for b in choices[1]])
    assert float(shared_by_chance(torch.tensor(3), torch.tensor(2), torch.tensor(5))) == pytest.approx(mean)


def test_position_explains_all_of_a_fixed_choice_and_nothing_of_a_random_one():
    random, shares = np.random.default_rng(0), []
    for _ in range(300):
        kept_NP = random.random((8, PICTURE)).argsort(1) < 4  # eight questions, four patches of each
        lines = [[place, 8, kept_NP[:, place].sum(), 8 * (place < 4)] for place in range(PICTURE)]
        shares.append(position_share(torch.tensor(lines, dtype=torch.float64)))
    by_chance, fixed = torch.stack(shares).T
    assert bool((fixed == 1).all()) and abs(float(by_chance.mean())) < 0.02 < float(by_chance.std())
    nothing = torch.tensor([[0, 8, 8, 0], [1, 8, 8, 0]], dtype=torch.float64)
    once = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.float64)
    assert bool(position_share(nothing).isnan().all()) and bool(position_share(once).isnan().all())


class Ops(TorchDispatchMode):
    """Counts what torch is asked."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += 1
        return func(*args, **(kwargs or {}))


def test_many_questions_take_no_more_calls_than_few():
    few, many, calls = tokens_of(0), tokens_of(0).repeated(20), []
    for tokens in (few, many):
        records = forward(0, tokens, (ExpertChoice(),) * 3)
        with Ops() as ops:
            TruthCounts(SITES).update(records)
        calls.append(ops.asked)
    assert calls[0] == calls[1] < 400


def probe_of(seeds, most=99):
    probe = Probe.empty(SITES)
    for seed in seeds:
        probe = probe.with_batch(Choices.of(forward(seed)), [f"{seed}-{row}" for row in range(ROWS)], most)
    return probe


def test_a_probe_holds_the_first_questions_about_pictures(tmp_path):
    probe = probe_of(range(3), most=7)
    assert probe.ids == ("0-0", "0-2", "0-3", "0-4", "0-5", "1-0", "1-2") and probe.layers[0] == "layer_01"
    for layer in range(3):
        for id, kept_T, count in zip(probe.ids, probe.kept_LRT[layer], probe.vision_R, strict=True):
            seed, row = map(int, id.split("-"))
            record = forward(seed)[layer]
            kept = record.decision.keep_BT()[row][record.tokens.mask((V,))[row]]
            assert kept_T[:count].tolist() == kept.tolist() and not kept_T[count:].any()
    probe.save(tmp_path / "probe.npz")
    again = Probe.load(tmp_path / "probe.npz")
    assert (again.layers, again.ids) == (probe.layers, probe.ids)
    assert np.array_equal(again.kept_LRT, probe.kept_LRT) and np.array_equal(again.vision_R, probe.vision_R)
    assert [path.name for path in tmp_path.iterdir()] == ["probe.npz"]
    assert probe.joined(probe_of([2])).ids == (*probe.ids, "2-0", "2-2", "2-3", "2-4", "2-5")


def test_overlap_and_churn_are_counted_over_the_questions_of_both(tmp_path):
    one, other = probe_of([0, 1]), probe_of([1, 2])
    other.kept_LRT[:, :5] = probe_of([5]).kept_LRT[:, :, : other.kept_LRT.shape[2]]  # the same questions, other choices
    one.save(tmp_path / "a.npz")
    other.save(tmp_path / "b.npz")
    found, (left_L, kept_L) = overlap(tmp_path / "a.npz", tmp_path / "b.npz"), churn(one, other)
    ids = [id for id in one.ids if id in other.ids]
    assert len(ids) == 5
    for number, layer in enumerate(one.layers):
        both = either = chance = left = kept = 0.0
        for id in ids:
            a, b = ({*p.kept_LRT[number][p.ids.index(id)].nonzero()[0].tolist()} for p in (one, other))
            both, either, left, kept = both + len(a & b), either + len(a | b), left + len(b - a), kept + len(b)
            chance += len(a) * len(b) / one.vision_R[one.ids.index(id)]
        drawn = sum(p.kept_LRT[number][[p.ids.index(id) for id in ids]].sum() for p in (one, other)) - chance
        assert found[layer] == Overlap(pytest.approx(both / either), pytest.approx(chance / drawn))
        assert (left_L[number], kept_L[number]) == (left, kept)
    assert overlap(tmp_path / "a.npz", tmp_path / "a.npz")["layer_01"].shared == 1
    probe_of([3]).save(tmp_path / "c.npz")
    with pytest.raises(ValueError, match="3 routed layers and 0 questions in common"):
        overlap(tmp_path / "a.npz", tmp_path / "c.npz")
    (tmp_path / "d.npz").write_text("half")
    with pytest.raises(ValueError, match="RoutingTruth wrote"):
        Probe.load(tmp_path / "d.npz")


class Told(StubData):
    """Questions about pictures of 4 x 4 patches, of which the first row matters."""

    def val_dataloader(self):
        return DataLoader([self.told(prompt_batch(seed, self.batch_size)) for seed in range(2)], batch_size=None)

    test_dataloader = val_dataloader

    def told(self, batch):
        kind_BT = batch["tokens"].kind_BT
        number_BT = (kind_BT == V).cumsum(1) - 1
        places = {"row_BT": number_BT // 4, "column_BT": number_BT % 4}
        places = {name: place_BT.masked_fill(kind_BT != V, -1) for name, place_BT in places.items()}
        evidence_BT = ((kind_BT == V) & (number_BT < 4)).to(torch.int8)
        tokens = Tokens.of(kind_BT, evidence_BT=evidence_BT, id_B=torch.arange(len(kind_BT)), **places)
        return {**batch, "tokens": tokens}


def answered(folder: Path, plugins, data=None, **generation):
    """What a test writes: its numbers, and which tokens it kept."""
    torch.manual_seed(0)
    module = RoutedVLM(
        TinyLlava(layers=3, width=16, heads=2, hidden=32), plugins, generation=Generation(2, **generation)
    )
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
    logger = TensorBoardLogger(folder, name="", version="run", default_hp_metric=False)
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=[RoutingTruth(4)], **quiet)
    trainer.test(module, data or Told(3), verbose=False)
    file = folder / "run/truth.json"
    return (json.loads(file.read_text()) if file.exists() else None), folder / "run", trainer


def test_only_plain_questions_count_and_decoding_does_not(tmp_path, capsys):
    routed = {"depth": MixtureOfDepths(All(), Constant(0.5), LinearRouter(std=1.0), selector=ExpertChoice((V, Q)))}
    alone, plain_run, trainer = answered(tmp_path / "a", routed, blank_batches=0)
    ways = {"blank_batches": None, "interventions": ("random", "oracle", "swapped")}
    among, run, _ = answered(tmp_path / "b", routed, **ways)
    assert (
        alone == among and alone["command"] == "test" and list(alone["layers"]) == ["layer_00", "layer_01", "layer_02"]
    )
    assert overlap(plain_run / "probe.npz", run / "probe.npz")["layer_02"].shared == 1
    first = alone["layers"]["layer_01"]
    assert {"evidence_recall", "evidence_auc", "position_share", "overlap", "margin", "ties"} <= first.keys()
    assert "churn" not in first and "evidence_recall_by_chance" in first
    assert float(trainer.callback_metrics["truth/evidence_auc/layer_01"]) == pytest.approx(first["evidence_auc"])
    assert Probe.load(run / "probe.npz").ids == ("0-0", "0-1", "0-2", "1-0")
    assert "routed layer  evidence recall  evidence auc" in capsys.readouterr().out


def test_without_evidence_the_rest_is_still_measured(tmp_path, capsys):
    found, _, trainer = answered(tmp_path, {"depth": RandomDepths(All(), Constant(0.5))}, StubData(3))
    assert found["layers"]["layer_01"].keys() == {"overlap", "overlap_by_chance", "margin", "ties"}
    assert not [tag for tag in trainer.callback_metrics if "evidence" in tag or "position" in tag]


def test_a_layer_that_keeps_nothing_and_an_unrouted_model_have_little_to_say(tmp_path):
    found, _, _ = answered(tmp_path / "short", {"depth": ShortV(All())})
    assert found["layers"]["layer_01"]["evidence_recall"] == 0 and "margin" not in found["layers"]["layer_01"]
    found, run, trainer = answered(tmp_path / "dense", {})
    assert found is None and not list(run.glob("probe*"))
    assert not [tag for tag in trainer.callback_metrics if tag.startswith("truth")]


def test_numbers_that_mean_nothing_are_neither_logged_nor_shown():
    found = known({"overlap": torch.tensor([torch.nan, 0.5]), "churn": torch.full((2,), torch.nan)})
    assert tags(found, SITES[:2]) == {"truth/overlap/layer_03": 0.5}
    assert by_layer(found, ["a", "b"]) == {"a": {"overlap": None}, "b": {"overlap": 0.5}}
    table = truth_table({**found, "overlap_by_chance": [float("nan"), 0.25]}, ["a", "b"])
    assert "b             0.500 (0.250)" in table and "nan" not in table and "churn" not in table
    with pytest.raises(ValueError, match="at least 0"):
        RoutingTruth(probe=-1)
