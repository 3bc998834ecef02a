"""Times prefill and decoding of depth routing against dense, and weighs the caches, on one idle GPU.

    python benchmarks/inference.py configs/models/llava_1_5_7b.json --out docs/inference.md

All methods share one set of random bf16 weights and take turns in one process, so that a drift of the machine meets
all of them; what a second instance of dense is slower than the first is seen, not taken for an effect of routing. The
vision tower does not run. Nothing in dense waits for the GPU, so it matters how Python's objects lie in memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# A cache that grows by a token a step outgrows its blocks every few steps, and would wait for the driver's next ones.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "roundup_power2_divisions:16")

import torch
from torch.nn.attention import sdpa_kernel
from transformers import CompileConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compiled import BOUNDED, CONFIG, compiled
from benchmarks.inference_page import Conditions, Result, page
from benchmarks.settings import SETTINGS, Plan, Setting
from benchmarks.shares import scale, shift
from benchmarks.subject import DEVICE, Prompt, Subject, bytes_per_ms, dense_model
from lit_modules.routed_vlm import KERNELS
from plugins.gamma_depths import GammaDepths
from plugins.progressive_depths import ProgressiveDepths
from plugins.threshold_depths import ThresholdDepths
from routing import RoutingPlugin, TokenKind

EVERY_KIND = tuple(kind for kind in TokenKind if kind is not TokenKind.PAD)
GAMMA_SHARE, THRESHOLD_SHARE = 0.62, 0.5
PLAN = Plan()
STARTED = time.monotonic()


@dataclass(frozen=True)
class Method:
    """What a row of the tables is.

    Args:
        plugin: What routes it; None leaves it dense.
        says: What the page says about it.
        fit: Makes its random routers let in a stated share of a prompt.
    """

    plugin: RoutingPlugin | None
    says: str
    fit: Callable[[Subject, Prompt], None] = lambda subject, prompt: None


METHODS = {
    "dense": Method(None, "no routing"),
    "p-MoD": Method(ProgressiveDepths(), "`ProgressiveDepths()`, whose capacity says how many enter"),
    "gamma-MoD": Method(
        GammaDepths(),
        f"`GammaDepths()`, its router scaled until {GAMMA_SHARE} of a prompt's tokens have p > 0.005, averaged over the"
        " layers (arXiv 2410.13859 skips 37.9 % at inference); answers enter where p >= 0.5, whatever then comes out",
        partial(scale, share=GAMMA_SHARE, p=0.005),
    ),
    "MoDification": Method(
        ThresholdDepths(),
        f"`ThresholdDepths()`, each layer's bias set so that {THRESHOLD_SHARE} of the vision tokens enter",
        partial(shift, share=THRESHOLD_SHARE, p=0.5, routes=(TokenKind.VISION,)),
    ),
    "MoDification, every kind": Method(
        ThresholdDepths(routes=EVERY_KIND),
        f"the same with `routes` of every kind, {THRESHOLD_SHARE} of the prompt: answers are decided on too",
        partial(shift, share=THRESHOLD_SHARE, p=0.5, routes=EVERY_KIND),
    ),
    "dense, again": Method(None, "a second instance of dense"),
}


@torch.no_grad()
def measure(own: Mapping[str, Subject], setting: Setting, prompt: Prompt, plan: Plan, until: float) -> Result:
    """First what does not vary, then the times, in rounds until another would end too late."""
    timings = {}
    for name, subject in own.items():
        METHODS[name].fit(subject, prompt)
        timings[name] = subject.observe(prompt)
        say(f"{setting.title}: {name} observed")
    prefill, decode = partial(Subject.prefill, prompt=prompt), partial(Subject.decode, prompt=prompt, steps=plan.turn)
    for act in (prefill, decode):  # nobody times these
        in_turns(list(own.values()), act, 1)
    rounds, took = 0, 0.0
    while not rounds or time.monotonic() + took <= until:
        gc.collect()
        began = time.monotonic()
        prefill_ms = in_turns(list(own.values()), prefill, plan.prefills)
        token_ms = in_turns(list(own.values()), decode, plan.steps // plan.turn)
        for timing, prefills, tokens in zip(timings.values(), prefill_ms, token_ms, strict=True):
            timing.prefill_ms += prefills
            timing.token_ms += tokens
        rounds, took = rounds + 1, time.monotonic() - began
        say(f"{setting.title}: round {rounds} in {took:.0f} s")
    for subject in own.values():
        subject.forget()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return Result(setting, rounds, timings)


def in_turns(subjects: Sequence[Subject], act: Callable[[Subject], float], times: int) -> list[list[float]]:
    """What each does several times; everyone begins as often."""
    values: list[list[float]] = [[] for _ in subjects]
    for turn in range(times):
        for place in range(len(subjects)):
            which = (place + turn) % len(subjects)
            values[which].append(act(subjects[which]))
    return values


def say(line: str) -> None:
    print(f"{time.monotonic() - STARTED:6.1f} s  {line}", flush=True)


def compare(
    shape: str, settings: Sequence[Setting], plan: Plan, out: Path, command: str, config: CompileConfig
) -> list[Result]:
    """Measures one setting after the other; the page is written after each."""
    base = dense_model(shape)
    named = {name: Subject(base, {"routed": m.plugin} if m.plugin else {}) for name, m in METHODS.items()}
    gc.collect()
    gc.freeze()  # a deployed model would not share the collector's rounds with five others
    say(f"{len(named)} models on one set of weights")
    conditions = Conditions(command, bytes_per_ms(), {name: m.says for name, m in METHODS.items()}, plan)
    results: list[Result] = []
    vocabulary = base.config.image_token_id  # all ids below are words
    began = time.monotonic()
    with sdpa_kernel(KERNELS):
        for number, setting in enumerate(settings, start=1):
            own = {name: named[name] for name in setting.methods or named}
            prompt = Prompt.of(setting.rows, setting.vision, setting.text, plan.steps, vocabulary)
            now = time.monotonic()
            until = now + (began + plan.budget - now) / (len(settings) - number + 1)
            result = measure(own, setting, prompt, plan, until)
            now = time.monotonic()
            steps = compiled({name: own[name] for name in BOUNDED}, prompt, plan, config)
            began += time.monotonic() - now  # what the compiler takes is not planned
            say(f"{setting.title}: compiled, {', '.join(f'{name} in {s.ready_s:.0f} s' for name, s in steps.items())}")
            results.append(replace(result, compiled=steps))
            out.write_text(page(conditions, results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="Hugging Face config.json of the model")
    parser.add_argument("--budget", type=float, default=PLAN.budget, help="seconds for all settings together")
    numbers = range(1, len(SETTINGS) + 1)
    parser.add_argument("--settings", type=int, nargs="+", default=numbers, choices=numbers, help="which of them")
    parser.add_argument("--out", type=Path, default=Path("docs/inference.md"), help="page to write")
    args = parser.parse_args()
    settings, command = [SETTINGS[n - 1] for n in args.settings], f"python {shlex.join(sys.argv)}"
    results = compare(args.shape, settings, replace(PLAN, budget=args.budget), args.out, command, CONFIG)
    print(args.out.read_text())
    if wrong := [line for result in results for line in result.miscounted()]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
