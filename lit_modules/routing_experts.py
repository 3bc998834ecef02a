"""What experts got in an evaluation: loads, how sure their routers are, and what they know of tokens and of questions.

Shape suffixes: B batch, T tokens, E experts with the null ones last, Q kinds of questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_modules.exact_match import OTHER
from lit_modules.expert_tally import ExpertCounts, ExpertTally, information
from lit_modules.monitor import over_ranks
from lit_modules.report import table
from lit_modules.retention_map import label
from lit_modules.routing_truth import plain
from routing import RoutedMLP, RoutingRecord, Site
from routing.loads import wanted_BTE

if TYPE_CHECKING:
    from lit_modules.routed_vlm import RoutedVLM

Numbers = dict[str, float]


class RoutingExperts(Callback):
    """Counts who goes to which expert in ``validate``, ``test`` and the validations of ``fit``, over all ranks.

    ==================== ========================================================================================
    of each layer        what
    ==================== ========================================================================================
    ``load_max``         largest load of an expert over the mean one; 1: balanced, as many as there are: collapsed
    ``entropy``          bits per token of the router's softmax; 0: sure
    ``token_bits``       bits that the kind of a token (vision, question, …) tells of its expert; 0: nothing
    ``question_bits``    bits that the kind of the question tells of the experts of its row's tokens
    ``dropped``          share of the choices that full experts turn away
    ``untaken``          share of the tokens that no expert takes
    ``null``             share of the choices that go to null experts
    ``load_<e>``         share of the choices that each expert gets
    ==================== ========================================================================================

    Prompts count, as they are asked plainly, neither blank nor under an intervention. A table is printed, and written
    to ``experts.json`` in the run's folder.
    """

    def __init__(self) -> None:
        self._open = ExitStack()
        self._records: list[RoutingRecord] = []
        self._sites: list[Site] = []
        self._tally = ExpertTally()
        self._asked: dict[Site, Tensor] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        assert pl_module.model is not None
        parts = [part for part in pl_module.model.modules() if isinstance(part, RoutedMLP)]
        self._sites, self._tally, self._asked = [part.gate.site for part in parts], ExpertTally(), {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: RoutedVLM, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open.close()
        self._records = self._open.enter_context(pl_module.tape.recording()) if self._sites else []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: RoutedVLM,
        outputs: object,
        batch: Mapping[str, Sequence[str]],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._open.close()
        assert pl_module.evaluation is not None
        records, self._records = plain(self._records, self._sites), []
        self._tally.add(records)
        known = pl_module.evaluation.model.kinds
        rows_B = torch.tensor([known.index(kind if kind in known else OTHER) for kind in batch["kinds"]])
        for record in records:
            chosen_QE = by_question(record, rows_B.to(record.scores_BTE.device), len(known))
            self._asked[record.site] = chosen_QE + self._asked.get(record.site, torch.zeros_like(chosen_QE))

    def on_validation_end(self, trainer: Trainer, pl_module: RoutedVLM) -> None:
        if trainer.sanity_checking or not self._tally.sites:
            return
        reduce = over_ranks(trainer)
        nulls = {name: getattr(plugin, "nulls", 0) for name, plugin in pl_module.plugins.items()}
        counts, folder = self._tally.counts(reduce, nulls), trainer.log_dir
        asked = {site: reduce(chosen_QE.cpu().double(), "sum").numpy() for site, chosen_QE in self._asked.items()}
        layers = {label(site): numbers(each, asked[site]) for site, each in counts.items()}
        self._tally, self._asked = ExpertTally(), {}
        if not trainer.is_global_zero:
            return
        if folder is not None:
            write(Path(folder), {"command": trainer.state.fn, "layers": layers})
        if trainer.state.fn != "fit":
            print(f"\n{experts_table(layers)}")

    on_test_start, on_test_batch_start = on_validation_start, on_validation_batch_start
    on_test_batch_end, on_test_end = on_validation_batch_end, on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()


def by_question(record: RoutingRecord, rows_B: Tensor, kinds: int) -> Tensor:
    """Choices of each expert by the tokens of rows of each kind of question, (Q, E); asks nothing of the device."""
    chosen_BE = (wanted_BTE(record) & record.tokens.valid_BT[..., None]).sum(1)
    return torch.zeros(kinds, chosen_BE.shape[1], device=chosen_BE.device).index_add(0, rows_B, chosen_BE.float())


def numbers(counts: ExpertCounts, asked_QE: np.ndarray) -> Numbers:
    """What is reported of a layer; only what is known."""
    choices, total = counts.choices, counts.total
    found = {
        "load_max": counts.load_max,
        "entropy": counts.entropy / total if total else float("nan"),
        "token_bits": counts.information,
        "question_bits": information(asked_QE),
        "dropped": counts.refused / choices if choices else float("nan"),
        "untaken": counts.untaken / total if total else float("nan"),
        "null": counts.to_null / choices if choices else float("nan"),
    }
    found |= {f"load_{expert}": share for expert, share in enumerate(counts.share_E()[: counts.experts].tolist())}
    return {name: value for name, value in found.items() if not isnan(value)}


def experts_table(layers: Mapping[str, Numbers]) -> str:
    """One line per layer; loads as shares."""
    names = list(dict.fromkeys(name for each in layers.values() for name in each))
    rows = [(layer, *(f"{each[n]:.3f}" if n in each else "" for n in names)) for layer, each in layers.items()]
    return table(("experts of", *(name.replace("_", " ") for name in names)), rows)


def write(folder: Path, facts: Mapping[str, object]) -> None:
    """``experts.json``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "experts.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(folder / "experts.json")
