"""Questions asked again while something else than the router ranks the tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lightning import Callback, Trainer
from scipy.stats import binomtest
from torch.utils.data import DataLoader

from lit_modules import Generation, RoutedVLM, TinyLlava
from lit_modules.evaluation import Evaluation, Score, tags
from lit_modules.interventions import NONE, Interventions, Replaced, beside, donors, made
from lit_modules.report import evaluation_table
from plugins.progressive_depths import ProgressiveDepths
from plugins.random_depths import RandomDepths
from plugins.strided_depths import StridedDepths
from routing import Constant, LinearRouter, TokenKind, Tokens, attach
from stub_data import PATCHES, StubData, prompt_batch
from tests.tiny import IMAGE, padded, row, tiny_llava

V, Q = TokenKind.VISION, TokenKind.QUESTION


def asked_about(*scenes: str | None) -> dict[str, object]:
    """One row per scene; None is a row without a picture."""
    tokens = Tokens.of(torch.tensor([[Q, Q, Q] if scene is None else [V, V, Q] for scene in scenes]))
    return {"tokens": tokens, "ids": [str(n) for n in range(len(scenes))], "units": [[str(s)] for s in scenes]}


def test_donors_show_another_picture_and_rows_without_one_are_left_alone():
    assert donors(asked_about("a", "a", None, "b", "a")) == [3, 3, 2, 4, 3]
    assert donors(asked_about("a", None, "a")) == [0, 1, 2]
    assert donors(asked_about(None)) == [0]
    assert donors({**asked_about("a", "a"), "units": None}) == [1, 0]  # all that is known is that the ids differ


def test_questions_that_cannot_be_asked_are_not():
    assert made("swapped", asked_about("a", "a", None))[1] == [False, False, True]
    batch = asked_about("a", "b", None)
    evidence = torch.tensor([[0, 1, 0], [-1, -1, 0], [0, 0, 0]])
    batch["tokens"] = replace(batch["tokens"], evidence_BT=evidence.to(torch.int8))
    assert made("oracle", batch)[1] == [True, False, True]
    batch["tokens"] = replace(batch["tokens"], evidence_BT=None)
    assert made("oracle", batch)[1] == [False, False, True]
    assert all(made("shuffled", batch)[1])


def test_changes_are_taken_over_the_questions_that_were_asked():
    evaluation = Evaluation({"read": "8", "count": "2"}, kinds=["read", "count"], interventions=["random", "swapped"])
    kinds, truths, plain = ["read"] * 3 + ["count"] * 2, ["1", "2", "3", "4", "5"], ["1", "2", "x", "4", "5"]
    under = {"random": ["1", "x", "x", "x", "5"], "swapped": [None, "2", "3", None, None]}
    evaluation.update(kinds, truths, plain, None, under)
    read, count, macro = evaluation.scores()
    assert read.replaced == {"random": Replaced(3, 1 / 3, 2 / 3), "swapped": Replaced(2, 1.0, 0.5)}
    assert count.replaced == {"random": Replaced(2, 0.5, 1.0), "swapped": NONE}
    assert macro.replaced["random"].change == pytest.approx(100 * ((1 / 3 + 0.5) / 2 - (2 / 3 + 1) / 2))
    assert macro.replaced["swapped"] == Replaced(2, 1.0, 0.5)  # of the kinds that were asked
    logged = tags([read, count, macro], "test")
    assert logged["test/swapped_change/read"] == 50 and logged["test/random/count"] == 0.5
    assert "test/swapped/count" not in logged
    table = evaluation_table([read, count, macro])
    assert "1.000 (+50.0)" in table and "0.417 (-41.7)" in table
    assert "swapped: 3 of 5 questions left out" in table and "random:" not in table
    evaluation.reset()
    evaluation.update(["read"], ["1"], ["1"], None, {"random": ["1"], "swapped": ["1"]})
    assert evaluation.scores()[0].replaced["random"] == Replaced(1, 1.0, 1.0)


def test_without_interventions_nothing_is_added():
    assert evaluation_table([Score("read", 1, 1.0, None, None)]).splitlines()[-1].startswith("read")
    assert beside([{"id": "1"}, {"id": "2"}], {"oracle": ["7", None]}) == [{"id": "1", "oracle": "7"}, {"id": "2"}]


class Told(StubData):
    """Every second question about a picture knows its evidence, and both show one scene."""

    def val_dataloader(self):
        return DataLoader([self.told(prompt_batch(seed, self.batch_size)) for seed in range(2)], batch_size=None)

    def told(self, batch):
        kind_BT = batch["tokens"].kind_BT
        evidence_BT = torch.where(kind_BT == V, -1, 0)
        evidence_BT[::2] = 0
        tokens = Tokens.of(kind_BT, evidence_BT=evidence_BT, id_B=torch.arange(len(kind_BT)))
        return {**batch, "tokens": tokens, "units": [[f"scene {n // 2}"] for n in range(len(kind_BT))]}


class Outcomes(Callback):
    """Keeps the rows of every batch."""

    def __init__(self):
        self.rows = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *_):
        self.rows += outputs


def validated(data, plugin, names):
    torch.manual_seed(0)
    plugins, outcomes = {} if plugin is None else {"depth": plugin}, Outcomes()
    tiny = TinyLlava(layers=3, width=16, heads=2, hidden=32)
    module = RoutedVLM(tiny, plugins, generation=Generation(2, 0, interventions=names))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", callbacks=[outcomes], **quiet)
    trainer.validate(module, data, verbose=False)
    return trainer, outcomes.rows


def test_validation_asks_logs_and_prints(capsys):
    trainer, rows = validated(Told(3), ProgressiveDepths(), ("swapped", "oracle"))
    assert {"val/swapped/macro", "val/oracle_change/macro", "val/oracle/count"} <= trainer.callback_metrics.keys()
    out = capsys.readouterr().out
    assert "In brackets: change in points" in out and "oracle: 2 of 6 questions left out: nobody said" in out
    assert ["oracle" in row for row in rows] == [True, False, True] * 2
    assert all({"id", "units", "prediction", "swapped"} <= row.keys() for row in rows)


def test_an_oracle_without_evidence_is_refused_with_the_first_batch():
    with pytest.raises(ValueError, match=r"needs evidence, and none of the 3 questions(.|\n)*Allowed"):
        validated(StubData(3), ProgressiveDepths(), ("oracle",))


@pytest.mark.parametrize("plugin", [None, ProgressiveDepths(enabled=False)])
def test_an_unrouted_model_is_refused(plugin):
    with pytest.raises(ValueError, match="this model is not routed"):
        validated(Told(), plugin, ("random",))


def test_unknown_names_and_repeated_ones_are_refused():
    for names in (("chance",), ("random", "random")):
        with pytest.raises(ValueError, match="at most once"):
            Generation(interventions=names)


QUESTIONS, KEPT = 400, 5


def answering(plugin):
    """A model of random weights whose answers hang on what it sees, and questions with evidence that fills it."""
    model = tiny_llava(layers=4).eval()
    tape = attach(model, {"depth": plugin})
    batch = padded([row(1, 4, seed=n) for n in range(QUESTIONS)], "left")
    del batch["labels"]
    kind_BT = torch.where(batch["input_ids"] == IMAGE, V, Q)
    evidence_BT = torch.zeros_like(kind_BT)
    needed = torch.rand(QUESTIONS, PATCHES, generator=torch.Generator().manual_seed(3)).topk(KEPT).indices
    evidence_BT.scatter_(1, needed + 1, 1)  # behind the first word
    batch["tokens"] = Tokens.of(kind_BT, evidence_BT=evidence_BT, id_B=torch.arange(QUESTIONS))
    batch["ids"] = list(range(QUESTIONS))
    inputs = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}

    @torch.no_grad()
    def answer() -> list[str]:
        with tape.about(batch["tokens"]):
            return [str(n) for n in model(**inputs, use_cache=False).logits[:, -1].argmax(-1).tolist()]

    return tape, batch, answer


def test_a_shuffled_random_router_is_as_good_as_it_was_and_an_oracle_better():
    tape, batch, answer = answering(RandomDepths(capacity=Constant(KEPT / PATCHES)))
    plain = answer()
    ways = Interventions(["shuffled", "random", "swapped", "oracle"], ["read"])
    under = ways.ask(batch, tape, answer)
    truths = under["oracle"]  # right is what is answered by who looks at the evidence
    kinds = ["read"] * QUESTIONS
    ways.update(kinds, truths, plain, under)
    for name, found in ways.compute(["read"])["read"].items():
        gained = sum(p != t == u for p, u, t in zip(plain, under[name], truths, strict=True))
        lost = sum(p == t != u for p, u, t in zip(plain, under[name], truths, strict=True))
        assert found.change == pytest.approx(100 * (gained - lost) / QUESTIONS)
        p = binomtest(gained, gained + lost).pvalue  # the exact test of McNemar
        assert gained + lost > 40 and (p < 1e-6 if name == "oracle" else p > 0.001), (name, gained, lost, p)


def test_a_shuffled_random_router_keeps_every_place_as_often():
    tape, batch, answer = answering(RandomDepths(capacity=Constant(KEPT / PATCHES)))
    with tape.recording() as records, tape.intervening(made("shuffled", batch)[0]):
        answer()
    kept_NT = torch.cat([record.decision.keep_BT()[:, 1 : 1 + PATCHES] for record in records]).double()
    expected, deviation = KEPT / PATCHES, (KEPT / PATCHES * (1 - KEPT / PATCHES) / len(kept_NT)) ** 0.5
    assert (kept_NT.mean(0) - expected).abs().max() < 5 * deviation


def test_dense_undoes_routing_and_rules_without_scores_stay_as_they_are():
    unrouted = answering(ProgressiveDepths(capacity=Constant(1.0), enabled=False))[2]()
    tape, batch, answer = answering(ProgressiveDepths(capacity=Constant(0.3)))
    assert Interventions(["dense"], []).ask(batch, tape, answer)["dense"] == unrouted != answer()
    tape, batch, answer = answering(StridedDepths(capacity=Constant(0.3)))
    under = Interventions(["random", "shuffled", "swapped", "oracle"], []).ask(batch, tape, answer)
    assert all(answers == answer() for answers in under.values())


def test_scores_of_a_router_change_places():
    tape, batch, answer = answering(ProgressiveDepths(capacity=Constant(0.3), router=LinearRouter(std=0.5)))
    under = Interventions(["shuffled", "swapped"], []).ask(batch, tape, answer)
    plain = answer()
    assert under["shuffled"] != plain and under["swapped"] != plain
    assert answer() == plain
