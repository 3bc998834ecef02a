"""How long the training step and the prefill of configs take, in turns on one otherwise idle device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer

from lit_modules.batches import model_inputs
from lit_modules.configured import load, read
from routing import TokenKind, Tokens
from routing.cost import Cost, count

FIRST = 3  # calls that nobody times: kernels are chosen, memory is taken
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
Batch = dict[str, Any]


@dataclass(frozen=True)
class Rounds:
    """How often is measured.

    Args:
        rounds: Rounds in which all configs take turns, so that a drift of the clock meets each alike; with 0, only
            what needs no clock is told.
        calls: Calls in a row that are timed together.
        warm_up: Calls before them, each time.
    """

    rounds: int = 7
    calls: int = 10
    warm_up: int = 2

    @classmethod
    def fitting(cls, rounds: int) -> Rounds:
        """So many, of few calls on the CPU, where each takes long and none is queued."""
        return cls(rounds) if torch.cuda.is_available() else cls(rounds, calls=2, warm_up=1)


@dataclass
class Timing:
    """Milliseconds by round, and what does not vary; None where it is not known.

    Args:
        step_ms: One training step: forward, backward, AdamW.
        prefill_ms: One prefill of a batch of questions.
        peak_mib: Memory of a training step beside weights and optimizer.
        kv_mib: Keys and values of the prefill.
        gflops: Of the language model in the prefill.
        retention: Share of the vision tokens that enter a layer, mean over layers.
        train_shape: Rows and tokens of the training batch.
        prefill_shape: Rows and tokens of the questions.
        device: What it was measured on.
    """

    step_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    kv_mib: float | None = None
    gflops: float | None = None
    retention: float | None = None
    train_shape: str = ""
    prefill_shape: str = ""
    device: str = ""


class Stopwatch:
    """Measures configs against a reference.

    Args:
        reference: Its config.
        rounds: How often.
    """

    def __init__(self, reference: Path, rounds: Rounds = Rounds()) -> None:
        self.rounds, self.batches = rounds, Batches()
        self.reference = Subject(read(reference), self.batches)

    def __call__(self, config: Path) -> dict[str, Timing]:
        """Timings of the ``config`` and, in the same rounds, of the ``reference``."""
        return in_turns({"reference": self.reference, "config": Subject(read(config), self.batches)}, self.rounds)


class Batches:
    """One training batch and one of questions for each kind of data; the last kind is kept."""

    def __init__(self) -> None:
        self.key, self.kept = "", ({}, {})

    def __call__(self, given: Mapping[str, Any], data: LightningDataModule) -> tuple[Batch, Batch]:
        if (key := json.dumps([given["data"], data.trainer.accumulate_grad_batches])) != self.key:
            data.prepare_data()
            data.setup("fit")
            self.key = key
            self.kept = next(iter(data.train_dataloader())), next(iter(data.test_dataloader()))
        return self.kept


class Subject:
    """A config's model with one training batch and one batch of questions on the device."""

    def __init__(self, given: Mapping[str, Any], batches: Callable[..., tuple[Batch, Batch]]) -> None:
        trainer = given.get("trainer") or {}
        self.precision = str(trainer.get("precision", "32-true"))
        cpu = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
        self.device = torch.device("cpu" if cpu else "cuda")
        self.module, data = load(given)
        self.module.trainer = data.trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            max_steps=1,
            precision=self.precision,
            accumulate_grad_batches=trainer.get("accumulate_grad_batches", 1),
        )
        self.train, self.questions = (moved(batch, self.device) for batch in batches(given, data))
        self.module.configure_model()
        self.module.to(self.device)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, fused=True)

    def _autocast(self) -> Any:
        dtype = MIXED.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def step(self) -> None:
        with self._autocast():
            step = self.module.forward_step(self.train)
            loss = torch.stack(list(self.module.objective(step).values())).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self) -> None:
        batch = self.questions
        with self._autocast(), self.module.tape.about(batch["tokens"]):
            self.module.model(**model_inputs(batch, mask=True), use_cache=False, logits_to_keep=1)

    def peak_mib(self) -> float | None:
        """Memory that a training step takes and gives back; None on the CPU."""
        if self.device.type == "cpu":
            return None
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20


def moved(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def clock(call: Callable[[], None], device: torch.device, rounds: Rounds) -> float:
    """Milliseconds per call, on the device's clock if it has one."""
    for _ in range(rounds.warm_up):
        call()
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(rounds.calls):
            call()
        return 1000 * (time.perf_counter() - began) / rounds.calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds.calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / rounds.calls


def in_turns(subjects: Mapping[str, Subject], rounds: Rounds = Rounds()) -> dict[str, Timing]:
    """All subjects, round by round."""
    timings = {name: described(subject) for name, subject in subjects.items()}
    if not rounds.rounds:
        return timings
    for subject in subjects.values():
        for _ in range(FIRST):
            subject.step()
            subject.prefill()
    for _ in range(rounds.rounds):
        for name, subject in subjects.items():
            subject.module.model.train()
            timings[name].step_ms.append(clock(subject.step, subject.device, rounds))
            subject.module.model.eval()
            timings[name].prefill_ms.append(clock(subject.prefill, subject.device, rounds))
    for name, subject in subjects.items():
        subject.module.model.train()
        timings[name].peak_mib = subject.peak_mib()
    return timings


def described(subject: Subject) -> Timing:
    """A timing without times."""
    tokens = subject.questions["tokens"]
    timing = Timing(
        train_shape=" x ".join(map(str, subject.train["tokens"].shape)),
        prefill_shape=" x ".join(map(str, tokens.shape)),
        device="CPU" if subject.device.type == "cpu" else torch.cuda.get_device_name(),
    )
    try:
        cost = count(subject.module.model, tokens)
    except ValueError:  # how many tokens enter depends on the data
        return timing
    timing.kv_mib, timing.gflops = cost.kv_bytes / 2**20, cost.flops / 1e9
    timing.retention = vision_retention(cost, tokens)
    return timing


def vision_retention(cost: Cost, tokens: Tokens) -> float:
    """Share of the vision tokens that enter a layer, mean over layers, where all text enters; 1 without any vision."""
    vision = sum(tokens.count((TokenKind.VISION,)))
    text = sum(map(sum, tokens.counts_B)) - sum(tokens.count((TokenKind.PAD,))) - vision
    shares = [max(0, layer.tokens - text) / vision for layer in cost.layers] if vision else [1.0]
    return sum(shares) / len(shares)
