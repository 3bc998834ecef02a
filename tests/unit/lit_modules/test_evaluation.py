"""Exact match by kind, beside the majority's answer and the blank image."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer

from lit_modules import Generation, RoutedVLM, TinyLlava
from lit_modules.batches import model_inputs
from lit_modules.evaluation import Evaluation, Score, tags
from lit_modules.exact_match import ExactMatch
from lit_modules.report import evaluation_table
from plugins.progressive_depths import ProgressiveDepths
from stub_data import StubData, prompt_batch


def test_exact_match_ignores_case_and_white_space_only():
    metric = ExactMatch(["read", "count"])
    metric.update(["read", "read", "count"], ["A  b ", "a", "7"], ["a B", "a b", "7"])
    metric.update(["surprise"], ["x"], ["y"])
    assert metric.compute() == {"read": (2, 0.5), "count": (1, 1.0), "other": (1, 0.0)}


def test_scores_stand_beside_what_needs_no_eyes():
    evaluation = Evaluation({"read": "8", "count": "2"}, {"seen": ("read", "cell"), "nothing": ("cell",)})
    evaluation.update(
        ["read", "read", "count", "count"], ["8", "9", "2", "3"], ["8", "9", "2", "2"], ["8", "8", "2", "3"]
    )
    evaluation.update(["read"], ["1"], ["1"], None)  # a batch that was not asked without its image
    read, count, seen, mean = evaluation.scores()
    assert seen == Score("seen", 3, 1.0, pytest.approx(1 / 3), 0.5)
    assert read == Score("read", 3, 1.0, pytest.approx(1 / 3), 0.5)
    assert count == Score("count", 2, 0.5, 0.5, 1.0)
    assert mean == Score("macro", 5, 0.75, pytest.approx(5 / 12), 0.75)
    assert tags([read], "val") == {
        "val/exact_match/read": 1.0,
        "val/majority/read": read.majority,
        "val/blank/read": 0.5,
    }
    assert len(evaluation_table([read, count, mean]).splitlines()) == 5


def evaluated(**generation: int | None) -> tuple[RoutedVLM, Trainer]:
    torch.manual_seed(0)
    tiny = TinyLlava(layers=3, width=16, heads=2, hidden=32)
    module = RoutedVLM(tiny, {"depth": ProgressiveDepths()}, generation=Generation(**generation))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(module, StubData(batch_size=3), verbose=False)
    return module, trainer


def test_validation_logs_and_prints(capsys):
    module, trainer = evaluated(max_new_tokens=2)
    logged = trainer.callback_metrics
    assert {"val/exact_match/count", "val/exact_match/macro", "val/majority/read", "val/blank/other"} <= logged.keys()
    assert logged["val/majority/count"] == 1.0 and logged["val/majority/read"] == 0.0
    out = capsys.readouterr().out
    assert "majority" in out and "scenes" in out
    assert [score.questions for score in module.scores] == [2, 2, 2, 6]


def test_blank_questions_can_be_left_out():
    _, trainer = evaluated(max_new_tokens=1, blank_batches=0)
    assert not [name for name in trainer.callback_metrics if "blank" in name]
    with pytest.raises(ValueError, match="blank_batches"):
        Generation(blank_batches=-1)


def test_a_blank_image_is_its_mean_colour():
    inputs = model_inputs(prompt_batch(0, 2), mask=True, blank=True)
    assert not inputs["pixel_values"].any() and "attention_mask" in inputs


def test_answers_of_a_batch_are_those_of_its_rows():
    module, trainer = evaluated(max_new_tokens=3)
    module.trainer = trainer
    trainer.fit_loop, batch = None, prompt_batch(0, 3)
    rows = [{k: v[i : i + 1] for k, v in batch.items() if k != "tokens"} for i in range(3)]
    for row, kind_T in zip(rows, batch["tokens"].kind_BT, strict=True):
        row["tokens"] = type(batch["tokens"]).of(kind_T[None])
    module.eval()
    with torch.no_grad():
        assert module.answers(batch) == [answer for row in rows for answer in module.answers(row)]


def test_data_loaders_alone_are_refused():
    module = RoutedVLM(TinyLlava(layers=2, width=16, heads=2))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="datamodule"):
        trainer.validate(module, StubData().val_dataloader())
