"""What enters the routed layers while answers are generated, by phase, and what is left of the key-value cache.

Shape suffixes: B batch, T tokens, S sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_modules.retention_map import label
from routing import AttendedLayer, KeptTokens, RoutedLayer, RoutingRecord, RoutingTape, Site
from routing.names import decoder_layers
from routing.tokens import Phase, Tokens

PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Entered:
    """What one site, or several together, let in.

    Args:
        candidates: Tokens that were to be decided on.
        kept: Those of them that entered.
        passed: Tokens of any kind, without padding, that did not enter.
    """

    candidates: int = 0
    kept: int = 0
    passed: int = 0

    @property
    def retention(self) -> float:
        """Share of the candidates that entered; NaN of none."""
        return self.kept / self.candidates if self.candidates else float("nan")

    @classmethod
    def sum(cls, parts: Iterable[Entered]) -> Entered:
        """Several of them together."""
        return cls(*map(sum, zip(*map(astuple, [cls(), *parts]), strict=True)))


@dataclass(frozen=True)
class PhaseCounts:
    """What all sites let in while answers were generated.

    Args:
        entered: By phase and site.
        prompt: Tokens of all prompts, without padding.
        short: Layers that store no keys and values of the tokens that pass.
    """

    entered: Mapping[tuple[Phase, Site], Entered]
    prompt: int
    short: frozenset[int]

    @classmethod
    def sum(cls, ranks: Sequence[PhaseCounts]) -> PhaseCounts:
        """All ranks together, some of which may have seen nothing."""
        keys = sorted({key for rank in ranks for key in rank.entered}, key=lambda key: key[1].layer)
        entered = {key: Entered.sum(rank.entered.get(key, Entered()) for rank in ranks) for key in keys}
        return cls(entered, sum(rank.prompt for rank in ranks), frozenset().union(*(rank.short for rank in ranks)))

    def scalars(self, each: bool) -> dict[str, float]:
        """What is drawn, by tag; NaN of what did not occur. ``each``: of every layer too."""
        values: dict[str, float] = {}
        for phase in PHASES:
            here = {site: found for (when, site), found in self.entered.items() if when == phase}
            values[f"depth/retention/{phase}"] = Entered.sum(here.values()).retention
            if phase == "prefill":
                values["depth/kv_share"] = self._stored(here)
            for site, found in here.items() if each else ():
                values[f"depth/retention/{phase}/{label(site)}"] = found.retention
                if phase == "prefill":
                    values[f"depth/kv_share/{label(site)}"] = self._stored({site: found}, layers=1)
        return values

    def _stored(self, prefill: Mapping[Site, Entered], layers: int | None = None) -> float:
        """Keys and values of so many layers (None: of all), as a share of the dense model's; NaN of none."""
        layers = layers or next((site.num_layers for site in prefill), 0)
        passed = sum(found.passed for site, found in prefill.items() if site.layer in self.short)
        return 1 - passed / (self.prompt * layers) if self.prompt * layers else float("nan")


class PhaseTally:
    """Counts the forwards of plain answers, each as soon as it is over, so that no record is kept.

    Rows that have ended are fed on until their batch's longest answer ends too; what they are fed does not count.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Phase, tuple[Site, ...]], Tensor] = {}
        self._prompt = 0
        self._short: frozenset[int] = frozenset()

    @contextmanager
    def counting(self, model: PreTrainedModel, tape: RoutingTape, ends: int | Sequence[int]) -> Iterator[None]:
        """Counts the first answering inside, until another prefill: a batch may be asked again in other ways.

        Args:
            model: What generates.
            tape: Its tape.
            ends: Tokens that end an answer.
        """
        self._short = frozenset(n for n, layer in enumerate(decoder_layers(model)) if cuts_cache(layer))
        answering = Answering(tape, torch.tensor(ends, device=model.device))
        with tape.recording(in_groups=True) as records:

            def after(*_: object) -> None:
                if answering.number == 1:
                    self._add(records, answering.live_B)
                answering.depth = max(0, answering.depth - 1)
                records.clear()

            hooks = [model.register_forward_pre_hook(answering.before, with_kwargs=True)]
            hooks.append(model.register_forward_hook(after))
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
        self._prompt += answering.prompt

    def _add(self, records: Iterable[RoutingRecord], live_B: Tensor) -> None:
        depth = [record for record in records if isinstance(record.decision, KeptTokens)]
        if depth:
            phase = depth[0].tokens.phase
            key = phase, tuple(record.site for record in depth)
            found_S3 = counted(depth, live_B if phase == "decode" else None)
            self._sums[key] = self._sums[key] + found_S3 if key in self._sums else found_S3

    def counts(self) -> PhaseCounts:
        """What this rank has seen; asks the device."""
        entered: dict[tuple[Phase, Site], Entered] = {}
        for (phase, sites), found_S3 in self._sums.items():
            for site, found in zip(sites, found_S3.tolist(), strict=True):
                entered[phase, site] = Entered.sum([entered.get((phase, site), Entered()), Entered(*found)])
        return PhaseCounts(entered, self._prompt, self._short)


class Answering:
    """Follows one batch after another through ``generate``.

    Args:
        tape: Says in which phase a forward is.
        ends: Tokens that end an answer.
    """

    def __init__(self, tape: RoutingTape, ends: Tensor) -> None:
        self.tape, self.ends = tape, ends
        self.number = 0  # of the answering that runs, from 1
        self.prompt = 0  # tokens of the first
        self.unread = 0  # of the prompts of the one that runs
        self.depth = 0  # of forwards: one of a whole batch may read groups of its rows
        self.live_B = torch.empty(0, dtype=torch.bool)

    def before(self, _: object, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook, behind the one that opens the tape."""
        tokens = self.tape.tokens
        if tokens is None:  # nothing is routed
            return
        self.depth += 1
        if self.depth > 1:
            return
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if tokens.phase == "prefill":
            if not self.unread:
                self.number += 1
                self.unread = real(self.tape.announced or tokens)
                self.prompt = self.prompt or self.unread
            self.unread -= real(tokens)
            self.live_B = torch.ones_like(ids_BT[:, -1], dtype=torch.bool)
        else:
            self.live_B = self.live_B & ~torch.isin(ids_BT[:, -1], self.ends)


def real(tokens: Tokens) -> int:
    """How many are no padding; known on the host."""
    return sum(sum(row[1:]) for row in tokens.counts_B)


def cuts_cache(layer: object) -> bool:
    """Whether a decoder layer stores no keys and values of the tokens that pass it by."""
    return isinstance(layer, RoutedLayer) and not isinstance(layer, AttendedLayer)


def counted(records: Sequence[RoutingRecord], live_B: Tensor | None) -> Tensor:
    """Candidates, those of them that entered, and tokens that did not, of one forward's sites; (S, 3), on the device.

    In few operations, whatever the number of layers: a step of decoding waits for Python. ``live_B``: rows that count.
    """
    valid_BT = records[0].tokens.valid_BT
    valid_BT = valid_BT if live_B is None else valid_BT & live_B[:, None]
    keep_SBT = torch.stack([entered_BT(record) for record in records]) & valid_BT
    candidate_SBT = torch.stack([record.candidate_BT for record in records]) & valid_BT
    counted_SBT3 = torch.stack([candidate_SBT, candidate_SBT & keep_SBT, valid_BT & ~keep_SBT], dim=-1)
    return counted_SBT3.sum((1, 2))


def entered_BT(record: RoutingRecord) -> Tensor:
    """True where the token entered; of single tokens their only slot says so, if there is one."""
    assert isinstance(record.decision, KeptTokens)
    valid_BK = record.decision.valid_BK
    return valid_BK if valid_BK.shape[1] == record.tokens.shape[1] == 1 else record.decision.keep_BT()
