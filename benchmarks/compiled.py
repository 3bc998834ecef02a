"""Decoding after a static cache, compiled: what ``generate(cache_implementation="static")`` does on a GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from benchmarks.settings import Plan
from benchmarks.subject import Prompt, Subject, milliseconds, wait
from routing.cost import count
from routing.stored import stored

CONFIG = CompileConfig(fullgraph=True, dynamic=False)  # transformers' default otherwise: CUDA graphs over inductor's
BOUNDED = ("dense", "p-MoD")  # the others' rules have no bound on a prompt, and refuse static caches


@dataclass(frozen=True)
class Compiled:
    """One method: milliseconds by turn, and what does not vary.

    Args:
        ready_s: Seconds until steps run as they do from then on: the compiler, and the first runs.
        bytes: Those of the keys and values of all slots.
        counted: As many as the rule says beforehand for the prompt and all steps.
    """

    ready_s: float
    bytes: int
    counted: int
    token_ms: list[float] = field(default_factory=list)


@torch.no_grad()
def compiled(subjects: Mapping[str, Subject], prompt: Prompt, plan: Plan, config: CompileConfig) -> dict[str, Compiled]:
    """The same steps, each method in a graph of its own; they take turns after two that nobody times."""
    torch._dynamo.reset()
    runs = {name: Steps(subject, prompt, config) for name, subject in subjects.items()}
    results = {name: run.begin(2 * plan.turn) for name, run in runs.items()}
    for _ in range(plan.steps // plan.turn - 2):
        for name, run in runs.items():
            results[name].token_ms.append(run.turn(plan.turn))
    for subject in subjects.values():
        subject.forget()
    return results


class Steps:
    """A method that goes on after a static cache."""

    def __init__(self, subject: Subject, prompt: Prompt, config: CompileConfig) -> None:
        self.subject, self.prompt = subject, prompt
        self.call = subject.model.get_compiled_call(config)
        rows, length = prompt.tokens.shape
        self.positions = [torch.full((rows, 1), length + at, device=prompt.ids_BT.device) for at in range(self.steps)]

    @property
    def steps(self) -> int:
        return len(self.prompt.answers)

    def begin(self, warm: int) -> Compiled:
        """Reads the prompt, and goes on for some steps."""
        model, length = self.subject.model, self.prompt.tokens.shape[1] + self.steps
        self.subject.read(self.prompt, StaticCache(config=model.config.get_text_config(), max_cache_len=length))
        wait()
        began = time.perf_counter()
        self.turn(warm)
        ready = time.perf_counter() - began
        bytes = sum(layer.bytes for layer in stored(self.subject.cache))
        return Compiled(ready, bytes, count(model, self.prompt.tokens.extended(self.steps)).kv_bytes)

    def turn(self, steps: int) -> float:
        """Goes on; milliseconds per token."""
        return milliseconds(lambda: [self._step() for _ in range(steps)]) / steps

    def _step(self) -> None:
        at = self.subject.at
        output = self.call(
            input_ids=self.prompt.answers[at],
            position_ids=self.positions[at],
            past_key_values=self.subject.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        logits.argmax(-1)
        self.subject.at += 1
