"""Published signs, routing against truth, counts without a clock, and what the authors say."""

import json

import pytest

from study.cost import cost
from study.grid import runs_of
from study.page import taken
from study.report import write_report
from study.signs import lines, verdict
from study.spec import Sign
from study.statistics import Contrast
from study.tables import Sheet
from study.truth import expert_lines
from study.truth import lines as truth_lines
from tests.unit.study.fake import fake_study

ARMS = {"dense": ("dense", 1.0), "p_mod": ("learned", 0.9), "random": ("control", 0.5), "reversed": ("control", 0.99)}
MEASURED = {"evidence_recall": 0.6, "evidence_recall_by_chance": 0.4, "evidence_auc": 0.7, "position_share": 0.3}


def sign(better: str, worse: str, level: str = "0.2") -> dict[str, str]:
    return {"claim": f"{better} beats {worse}", "better": better, "worse": worse, "level": level}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    signs = [sign("p_mod", "random"), sign("p_mod", "reversed")]
    folder = tmp_path_factory.mktemp("study")
    return fake_study(folder, ARMS, scenes=60, seeds=4, signs=signs, conclusion="So it is.", rounds=0), folder


def test_verdicts_say_what_the_interval_says():
    assert verdict(Contrast(0.1, 0.01, 20)) == "yes"
    assert verdict(Contrast(0.1, 0.2, 20)) == "yes, but open"
    assert verdict(Contrast(-0.1, 0.2, 20)) == "no, but open"
    assert verdict(Contrast(-0.1, 0.01, 20)) == "no, the opposite"


def test_the_scoreboard_counts_signs():
    board = [
        (Sign("a", "x", "y", "0.5"), Contrast(0.1, 0.01, 20)),
        (Sign("b", "x", "z"), Contrast(0.1, 0.2, 20)),
        (Sign("c", "z", "x"), Contrast(-0.1, 0.01, 20)),
    ]
    text = "\n".join(lines(board))
    assert "**2 of 3**" in text and "1 of them with an interval" in text and "1 come out reversed" in text
    assert "`x/0.5` - `y/0.5`" in text and "`x` - `z`" in text


def test_the_page_has_the_signs_and_what_the_authors_say(study):
    made, folder = study
    page = write_report(made, runs_of(made, folder), "command").read_text()
    board = page.partition("## Published signs")[2].partition("\n## ")[0]
    assert "**1 of 2** published signs" in board
    assert "p_mod beats reversed" in board and "no, the opposite" in board
    assert "## What the authors make of it\n\nSo it is.\n" in page


@pytest.mark.parametrize(
    "wrong", [sign("p_mod", "nobody"), sign("p_mod", "random", "0.3"), sign("p_mod", "random", "")]
)
def test_a_sign_names_arms_and_a_level_of_both(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"signs: .* is not a"):
        fake_study(tmp_path, ARMS, scenes=2, seeds=2, signs=[wrong])


def test_truth_is_averaged_over_layers_and_shown_with_the_range_of_seeds(study):
    made, folder = study
    runs = [run for run in runs_of(made, folder) if run.cell in ("p_mod/0.5", "random/0.5")]
    for run in runs:
        recall = 0.5 + 0.1 * run.seed if run.arm == "p_mod" else 0.4
        layers = {"layer_01": {**MEASURED, "evidence_recall": recall}, "layer_02": {**MEASURED, "evidence_recall": 0.4}}
        written = run.folder / "logs/version_1/truth.json"
        written.parent.mkdir(parents=True)
        written.write_text(json.dumps({"layers": {name: {**one, "overlap": None} for name, one in layers.items()}}))
    text = list(truth_lines(runs, "p_mod"))
    (line,) = [line for line in text if line.startswith("| p_mod/0.5 | 0.525")]
    assert (
        "0.525 [0.450, 0.600]" in line and "0.700 [0.700, 0.700]" in line
    )  # means of (0.5 + 0.1 s, 0.4) over s = 0..3
    assert "| p_mod/0.5 | 0.650 | 0.400 |" in text
    assert any(line.startswith("| random/0.5 | 0.400 [0.400, 0.400]") for line in text)


def test_experts_are_averaged_over_layers_and_what_nobody_has_is_no_column(study):
    made, folder = study
    runs = [run for run in runs_of(made, folder) if run.cell == "p_mod/0.5"]
    for run in runs:
        written = run.folder / "logs/version_1/experts.json"
        written.parent.mkdir(parents=True, exist_ok=True)
        one = {"load_max": 1.0 + 0.1 * run.seed, "entropy": 2.0, "token_bits": 0.25, "question_bits": 0.0}
        written.write_text(json.dumps({"layers": {"layer_00_mlp": one, "layer_02_mlp": {**one, "load_max": 1.0}}}))
    text = list(expert_lines(runs))
    assert "| arm | load max | entropy | token bits | question bits |" in text
    assert any("| p_mod/0.5 | 1.075 [1.000, 1.150] | 2.000 [2.000, 2.000] | 0.250" in line for line in text)


def test_without_rounds_flops_are_counted_and_nothing_is_timed(study):
    known = {"gflops": 2.0, "kv_mib": 4.0, "peak_mib": None, "retention": 0.5, "prefill_ms": [], "step_ms": []}
    spent = cost({"config": known, "reference": {**known, "gflops": 4.0}})
    assert (spent.flops, spent.kv, spent.memory, spent.prefill, spent.step_ms) == (0.5, 1.0, None, None, None)
    assert "nothing was timed" in "\n".join(taken(study[0], Sheet([], {}, {}, {}, {})))
