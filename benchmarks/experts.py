"""Times a layer of experts against a dense one of equal executed FLOPs and against other ways to run it, on one GPU.

    python benchmarks/experts.py --out docs/experts.md

All methods share one set of random bf16 weights and one decision, and take turns in one process, so that a drift of the
machine meets all of them; what a second instance of dense is slower than the first is seen, not taken for an effect.
``--smoke`` runs everything but the compiler on tiny layers, in seconds on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import expert_products
from benchmarks.expert_cases import Gap, gap, hard_cases
from benchmarks.expert_layers import METHODS, OURS, SHAPES, Shape, layers
from benchmarks.experts_page import Result, Row, Setting, page, wrong
from benchmarks.inference import say
from benchmarks.subject import DEVICE, memory, milliseconds, wait

SIZES = (5120, 10240, 16384)  # of training; peak memory has to be known at three to be seen growing
STEPS = (8, 1)  # tokens of a step of decoding
SMOKE = Shape("tiny, gated", 32, 64, gated=True), Shape("tiny, plain", 32, 64, gated=False)

ORDER = random.Random(0)
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Args:
        settings: In this order.
        modes: Of ``eager`` and ``compiled``.
        seconds: For the rounds of each setting that is timed; each has at least one.
        turns: Of each method in a round.
        tokens: Of a turn of training, in as many calls as that takes: where the first finds an idle device should not
            count for much.
        steps: Of a turn of decoding.
    """

    settings: tuple[Setting, ...]
    modes: tuple[str, ...] = ("eager", "compiled")
    seconds: float = 12.0
    turns: int = 8
    tokens: int = 80_000
    steps: int = 50

    @classmethod
    def of(cls, shapes: Sequence[Shape], sizes: Sequence[int] = SIZES) -> Plan:
        trained = [Setting(shape, n, "train", timed=n != sizes[1]) for shape in shapes for n in sizes]
        return cls((*trained, *(Setting(shape, n, "decode") for shape in shapes for n in STEPS)))


@dataclass(eq=False)
class Job:
    """One method in one mode, and its tokens.

    Args:
        plain: The method.
        module: What is called: it, or what the compiler made of it.
        x_1ND: Its input; with a gradient in training.
        grad_1ND: The gradient of its answer; None where nothing is trained.
    """

    plain: nn.Module
    module: Callable[[Tensor], Tensor]
    x_1ND: Tensor
    grad_1ND: Tensor | None
    row: Row = field(default_factory=Row)

    def call(self) -> Tensor:
        if self.grad_1ND is None:
            with torch.no_grad():
                return self.module(self.x_1ND)
        answer = self.module(self.x_1ND)
        answer.backward(self.grad_1ND)
        return answer

    def forget(self) -> None:
        for each in (self.x_1ND, *self.plain.parameters()):
            each.grad = None

    def turn(self, calls: int) -> float:
        """Milliseconds of a call, gradients made anew each time."""
        return milliseconds(lambda: [(self.call(), self.forget()) for _ in range(calls)]) / calls

    def gradients(self) -> list[Tensor]:
        """Of the input and, sorted by shape, of the parameters."""
        assert self.x_1ND.grad is not None
        grads = [p.grad for p in self.plain.parameters() if p.grad is not None]
        return [self.x_1ND.grad, *sorted(grads, key=lambda grad: tuple(grad.shape))]

    def try_out(self, exact: Job | None) -> None:
        """Observes it; what fails as one graph is tried in pieces, and what fails then does not cost the page."""
        for _ in range(2):
            try:
                return self.observe(exact)
            except Exception as error:
                self.row.failed = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.forget()
            if self.module is self.plain or self.row.in_pieces:
                return None
            self.row.in_pieces, self.row.failed = self.row.failed, ""
            self.module = torch.compile(self.plain, dynamic=False)

    def observe(self, exact: Job | None) -> None:
        """Runs it twice: how far it is from the exact answer, then its peak of memory."""
        answer = self.call()
        if exact is not None:
            self.row.gap = Gap(gap([answer], [exact.call()]), None)
            if self.grad_1ND is not None:
                self.row.gap = Gap(self.row.gap.values, gap(self.gradients(), exact.gradients()))
            exact.forget()
        del answer
        self.forget()
        wait()
        before = memory("current")
        if before is None:
            return
        torch.cuda.reset_peak_memory_stats()
        self.call()
        peak = memory("peak")
        assert peak is not None
        self.row.peak = peak - before
        self.forget()


def jobs(setting: Setting, modes: Sequence[str]) -> tuple[dict[tuple[str, str], Job], Job]:
    """All methods of a setting in all modes, by name and mode, and the exact one."""
    made, exact = layers(setting.shape, setting.tokens, setting.phase, DEVICE)
    g = torch.Generator().manual_seed(1)
    x_1ND, grad_1ND = (
        torch.randn(1, setting.tokens, setting.shape.width, generator=g).to(DEVICE, torch.bfloat16) for _ in range(2)
    )
    trained = setting.phase == "train"
    own = {}
    for mode in modes:
        for name, module in made.items():
            if mode == "compiled" and not (METHODS[name].compiles and (setting.timed or name == OURS)):
                continue
            run = torch.compile(module, fullgraph=True, dynamic=False) if mode == "compiled" else module
            given = x_1ND.clone().requires_grad_(trained)
            own[name, mode] = Job(module, run, given, grad_1ND if trained else None)
    given = x_1ND.float().requires_grad_(trained)
    return own, Job(exact, exact, given, grad_1ND.float() if trained else None)


def measure(setting: Setting, plan: Plan) -> Result:
    """First what does not vary, then the times, in rounds until another would end too late."""
    torch._dynamo.reset()
    own, exact = jobs(setting, plan.modes)
    for (name, mode), job in own.items():
        job.try_out(None if METHODS[name].experts is None else exact)
        exact.forget()
        say(f"{setting.title}: {name}, {mode} {job.row.failed or 'observed'}")
    del exact
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    result = Result(setting, {key: job.row for key, job in own.items()})
    if setting.timed:
        times(setting, plan, [job for job in own.values() if not job.row.failed])
    if setting.timed and setting.phase == "train":
        result.products.update(products(setting, plan))
    return result


def in_shuffled_turns(those: Sequence[T], act: Callable[[T], float], times: int) -> list[list[float]]:
    """What each does several times; a device that the one before has heated is met by another one each time."""
    values: list[list[float]] = [[] for _ in those]
    for _ in range(times):
        for which in ORDER.sample(range(len(those)), len(those)):
            values[which].append(act(those[which]))
    return values


def calls(setting: Setting, plan: Plan) -> int:
    """Of each method in a turn."""
    return plan.steps if setting.phase == "decode" else max(1, plan.tokens // setting.tokens)


def products(setting: Setting, plan: Plan) -> dict[str, list[float]]:
    """Milliseconds, by turn, of the products of a layer alone."""
    made = {way: getattr(expert_products, way)(setting.shape, setting.tokens) for way in ("dense", "grouped")}
    n = calls(setting, plan)

    def act(run: expert_products.Products) -> float:
        return milliseconds(lambda: [run() for _ in range(n)]) / n

    in_shuffled_turns(list(made.values()), act, 1)  # nobody times these
    return dict(zip(made, in_shuffled_turns(list(made.values()), act, 2 * plan.turns), strict=True))


def times(setting: Setting, plan: Plan, running: list[Job]) -> None:
    """Into their rows."""
    gc.collect()
    act = partial(Job.turn, calls=calls(setting, plan))
    in_shuffled_turns(running, act, 1)  # nobody times these
    began, rounds, took = time.monotonic(), 0, 0.0
    while not rounds or time.monotonic() + took <= began + plan.seconds:
        start = time.monotonic()
        for job, values in zip(running, in_shuffled_turns(running, act, plan.turns), strict=True):
            job.row.ms += values
        rounds, took = rounds + 1, time.monotonic() - start
    say(f"{setting.title}: {rounds} rounds of {took:.1f} s")


def compare(plan: Plan, out: Path, command: str) -> list[str]:
    """Measures one setting after the other, the page being written after each; what must hold and does not."""
    torch._dynamo.config.recompile_limit = 64  # all methods enter through one function
    cases = hard_cases({setting.shape.name: setting.shape for setting in plan.settings}.values(), DEVICE)
    say("hard cases compared")
    gc.collect()
    gc.freeze()
    results: list[Result] = []
    for setting in plan.settings:
        results.append(measure(setting, plan))
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        out.write_text(page(command, cases, results))
    return wrong(cases, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/experts.md"), help="page to write")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="for the rounds of each setting")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", default=names, choices=names, help="which networks")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, without the compiler")
    args = parser.parse_args()
    plan = replace(Plan.of([shape for shape in SHAPES if shape.name in args.shapes]), seconds=args.seconds)
    if args.smoke:
        plan = replace(Plan.of(SMOKE, (64, 96, 128)), modes=("eager",), seconds=0, turns=3, tokens=1, steps=1)
    failures = compare(plan, args.out, f"python {shlex.join(sys.argv)}")
    print(args.out.read_text())
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
