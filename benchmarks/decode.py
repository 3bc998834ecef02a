"""Times decoding with a cache, routed against dense, taking turns in one process on one idle GPU.

    python benchmarks/decode.py configs/models/llava_1_5_7b.json --out docs/decode.md

Random bf16 weights; the vision tower does not run. Two dense and two routed models take turns every TURN tokens: a
drift of the machine meets all of them, and what one instance is slower than its like is seen, not taken for an effect
of routing. Nothing here waits for the GPU, so that it matters how Python's objects lie in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.prefill import prompt
from lit_modules import FromConfig
from lit_modules.routed_vlm import KERNELS
from routing import RoutingPlugin, RoutingTape, TokenKind, Tokens, attach, discover
from routing.cost import Convention, count

VISION, TEXT, STEPS, TURN = 576, 64, 64, 4
ROUNDS, WARM_UP = 9, 2
ALL_STEPS = Convention(head="all", routers=False)  # each step reads the head, and no step asks a router


@dataclass
class Timing:
    """One model at one batch size: milliseconds by turn, and what does not vary."""

    prefill_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    stored: tuple[int, int] = (0, 0)  # bytes of the cache's keys and values, after the prompt and after all steps
    counted: tuple[int, int] = (0, 0)
    token_flops: float = 0.0
    token_bytes: int = 0
    peak: int = 0


class Subject:
    """A model on the GPU, dense or routed, and the answer that it is at."""

    def __init__(self, shape: str, plugins: dict[str, RoutingPlugin]) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model: PreTrainedModel = FromConfig(shape, dtype="bfloat16").build().eval()
        self.tape: RoutingTape = attach(self.model, plugins)

    def prefill(self, tokens: Tokens) -> float:
        """Reads a prompt into a new cache; milliseconds."""
        ids_BT = torch.where(tokens.kind_BT == TokenKind.VISION, self.model.config.image_token_id, 7).long()
        self.cache = DynamicCache(config=self.model.config)
        with Clock() as clock, self.tape.about(tokens):
            self._read(ids_BT)
        return clock.ms

    def decode(self, steps: int) -> float:
        """Answers greedily for some steps; milliseconds per token."""
        with Clock() as clock:
            for _ in range(steps):
                self._read(self.next_B1)
        return clock.ms / steps

    def _read(self, ids_BT: torch.Tensor) -> None:
        output = self.model(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.next_B1 = output.logits.argmax(-1)

    def kv_bytes(self) -> int:
        """Bytes that the keys and values in the cache really take."""
        return sum(states.nbytes for layer in self.cache.layers for states in (layer.keys, layer.values))

    def observe(self, tokens: Tokens, timing: Timing) -> None:
        """What does not vary: bytes and memory as they are, and as they are counted beforehand."""
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        self.prefill(tokens)
        before = self.kv_bytes()
        self.decode(STEPS)
        timing.stored, timing.peak = (before, self.kv_bytes()), torch.cuda.max_memory_allocated() - held
        del self.cache
        first, last = (count(self.model, t, ALL_STEPS) for t in (tokens, tokens.extended(STEPS)))
        timing.counted = (first.kv_bytes, last.kv_bytes)
        timing.token_flops = (last.flops - first.flops) / STEPS
        layers, head = self.model.get_decoder().layers, self.model.get_output_embeddings()
        weights = sum(p.nbytes for part in (layers, head) for p in part.parameters())
        timing.token_bytes = weights + (first.kv_bytes + last.kv_bytes) // 2


class Clock:
    """Milliseconds on the device of what happens inside, which begins when the device is idle."""

    def __enter__(self) -> Clock:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.begin.record()
        return self

    def __exit__(self, *raised: object) -> None:
        self.end.record()
        torch.cuda.synchronize()
        self.ms: float = self.begin.elapsed_time(self.end)


def bytes_per_ms() -> float:
    """Memory bandwidth of a large copy, bytes read and written."""
    source = torch.randn(2**30, device="cuda")
    target, rates = torch.empty_like(source), []
    for _ in range(10):
        with Clock() as copy:
            target.copy_(source)
        rates.append(2 * source.nbytes / copy.ms)
    return statistics.median(rates)


@torch.no_grad()
def measure(subjects: list[Subject], rows: int) -> list[Timing]:
    """First what does not vary, then the time."""
    tokens, timings = prompt(rows, VISION, TEXT), [Timing() for _ in subjects]
    for subject, timing in zip(subjects, timings, strict=True):
        subject.observe(tokens, timing)
    for number in range(WARM_UP + ROUNDS):
        prefill = in_turns(subjects, lambda subject: subject.prefill(tokens), 2)
        token = in_turns(subjects, lambda subject: subject.decode(TURN), STEPS // TURN)
        if number >= WARM_UP:
            for timing, prefill_ms, token_ms in zip(timings, prefill, token, strict=True):
                timing.prefill_ms += prefill_ms
                timing.token_ms += token_ms
    return timings


def in_turns(subjects: list[Subject], act: Callable[[Subject], float], times: int) -> list[list[float]]:
    """What each does several times; everyone begins as often."""
    values: list[list[float]] = [[] for _ in subjects]
    for turn in range(times):
        for place in range(len(subjects)):
            which = (place + turn) % len(subjects)
            values[which].append(act(subjects[which]))
    return values


def both(first: list[float], second: list[float]) -> list[float]:
    """The mean of two instances, by turn."""
    return [(a + b) / 2 for a, b in zip(first, second, strict=True)]


def middle(values: list[float], digits: int = 2) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(dense: list[float], routed: list[float]) -> str:
    """Of neighbouring turns, which met the same machine."""
    return middle([now / was for was, now in zip(dense, routed, strict=True)], digits=3)


def lines_of(rows: int, timings: list[Timing], rate: float) -> list[str]:
    """The part of the page about one batch size."""
    dense, routed, routed_again, dense_again = timings
    tokens = both(dense.token_ms, dense_again.token_ms), both(routed.token_ms, routed_again.token_ms)
    prefills = both(dense.prefill_ms, dense_again.prefill_ms), both(routed.prefill_ms, routed_again.prefill_ms)
    names = ("after the prompt", f"after {STEPS} tokens")
    stored = [
        f"| key-value bytes {name}, measured | {was:,} | {now:,} | {now / was:.3f} |\n"
        f"| the same, counted | {counted:,} | {expected:,} | {expected / counted:.3f} |"
        for name, was, now, counted, expected in zip(
            names, dense.stored, routed.stored, dense.counted, routed.counted, strict=True
        )
    ]
    limits = [timing.token_bytes / rate for timing in (dense, routed)]
    peaks = [timing.peak / 2**30 for timing in (dense, routed)]
    return [
        f"## {rows} row{'s' * (rows > 1)}",
        "",
        "| | dense | routed | routed / dense |",
        "| --- | ---: | ---: | ---: |",
        f"| **decode, ms per token** | {middle(tokens[0])} | {middle(tokens[1])} | **{ratios(*tokens)}** |",
        f"| second instance over first | {ratios(dense.token_ms, dense_again.token_ms)}"
        f" | {ratios(routed.token_ms, routed_again.token_ms)} | |",
        f"| limit: weights and cache read once, ms | {limits[0]:.2f} | {limits[1]:.2f} | {limits[1] / limits[0]:.3f} |",
        f"| GFLOPs per token, counted | {dense.token_flops / 1e9:.1f} | {routed.token_flops / 1e9:.1f}"
        f" | {routed.token_flops / dense.token_flops:.3f} |",
        f"| prefill with a cache, ms | {middle(prefills[0])} | {middle(prefills[1])} | {ratios(*prefills)} |",
        *stored,
        f"| peak memory above the weights, GiB | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[1] / peaks[0]:.3f} |",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="Hugging Face config.json of the model")
    parser.add_argument("--plugin", default="ProgressiveDepths", choices=sorted(discover()), help="with its defaults")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--out", type=Path, default=Path("docs/decode.md"), help="page to write")
    args = parser.parse_args()
    rate = bytes_per_ms()
    plugins: dict[str, RoutingPlugin] = {"routed": discover()[args.plugin]()}
    subjects = [Subject(args.shape, which) for which in ({}, plugins, plugins, {})]
    with sdpa_kernel(KERNELS):
        timings = [(rows, measure(subjects, rows)) for rows in args.rows]
    lines = [
        f"# Decoding with {args.plugin} against dense",
        "",
        f"Made by `python benchmarks/decode.py {args.shape} --plugin {args.plugin} --out docs/decode.md` on one"
        f" {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, eager, DynamicCache, sdpa pinned to"
        f" {', '.join(kernel.name.lower() for kernel in KERNELS)} for both. Prompts of {VISION} vision and {TEXT} text"
        f" tokens, then {STEPS} single tokens, by two dense and two routed language models of random weights in one"
        f" process that take turns every {TURN} tokens. Shown are medians (quartiles) over the turns of {ROUNDS} rounds"
        " of the mean of both instances, and of the ratios within a turn; and what a second instance of the very same"
        f" model differs by, which bounds what such a ratio can tell. The limit is at {rate / 1e9:.2f} TB/s, which a"
        " copy reaches here.",
        "",
        *(line for timing in timings for line in lines_of(*timing, rate)),
    ]
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
