"""What an evaluation says of experts: every number again by loops over questions, tokens and experts."""

import json
from collections import Counter
from math import log2

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_modules import RoutedVLM, TinyLlava
from lit_modules.routing_experts import RoutingExperts, experts_table
from plugins.mixture_of_experts import MixtureOfExperts
from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter
from stub_data import StubData

TINY = TinyLlava(layers=4, width=16, heads=2, hidden=32)
SPREAD = MixtureOfExperts(router=LinearRouter(bias=False, std=0.5), nulls=1)


def bits(pairs: Counter) -> float:
    """Mutual information of the two sides of some pairs."""
    total = pairs.total()
    left, right = Counter(), Counter()
    for (one, other), n in pairs.items():
        left[one] += n
        right[other] += n
    return sum(n / total * log2(n * total / (left[one] * right[other])) for (one, other), n in pairs.items())


def asked(tmp_path, plugins):
    torch.manual_seed(0)
    module = RoutedVLM(TINY, plugins)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(logger=CSVLogger(tmp_path), callbacks=[RoutingExperts()], **quiet)
    trainer.validate(module, StubData(3), verbose=False)
    return module


@pytest.mark.parametrize(
    "plugins", [{"moe": SPREAD}, {"depth": ProgressiveDepths(), "moe": SPREAD}], ids=["width", "both"]
)
def test_every_number_by_loops(tmp_path, plugins, capsys):
    module = asked(tmp_path, {**plugins, "moe": SPREAD})
    written = json.loads((tmp_path / "lightning_logs/version_0/experts.json").read_text())
    assert written["command"] == "validate" and list(written["layers"]) == ["layer_00_mlp", "layer_02_mlp"]
    assert experts_table(written["layers"]) in capsys.readouterr().out
    by_kind, by_question, tokens, entropy = Counter(), Counter(), 0, 0.0
    for batch in StubData(3).val_dataloader():
        with module.tape.recording() as records:
            module.answers(batch)
        record = next(each for each in records if each.site.layer == 2 and each.site.part == "mlp")
        for b in range(3):
            for t in range(record.tokens.shape[1]):
                kind = int(record.tokens.kind_BT[b, t])
                if not kind:
                    continue
                tokens += 1
                chances = record.scores_BTE[b, t].softmax(-1).tolist()
                entropy -= sum(p * log2(p) for p in chances)
                for expert in sorted(range(5), key=lambda e: -chances[e])[:2]:
                    by_kind[kind, expert] += 1
                    by_question[batch["kinds"][b], expert] += 1
    loads = [sum(n for (_, e), n in by_kind.items() if e == expert) for expert in range(5)]
    want = {
        "load_max": max(loads[:4]) / (sum(loads[:4]) / 4),
        "entropy": entropy / tokens,
        "null": loads[4] / sum(loads),
    }
    want |= {"token_bits": bits(by_kind), "question_bits": bits(by_question)}
    want |= {f"load_{e}": loads[e] / sum(loads) for e in range(4)}
    assert written["layers"]["layer_02_mlp"] == pytest.approx(want, abs=1e-5)


def test_a_model_without_experts_has_nothing_to_say(tmp_path):
    asked(tmp_path, {"depth": ProgressiveDepths()})
    assert not list(tmp_path.rglob("experts.json"))
