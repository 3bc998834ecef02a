"""Times the prefill of a routed language model against the same model dense, in one process on one idle GPU.

    python benchmarks/prefill.py configs/models/llava_1_5_7b.json --out docs/prefill.md

The weights are random and bf16; the vision tower does not run. Dense is timed before the plugin is attached.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lit_modules import FromConfig
from routing import RoutingTape, TokenKind, Tokens, attach, discover
from routing.cost import Cost, count

SHAPES = ((1, 576, 64), (8, 576, 64), (1, 2880, 64), (4, 2880, 64))  # rows, vision tokens, text tokens
ROUNDS, CALLS, WARM_UP = 7, 5, 2


def prompt(rows: int, vision: int, text: int) -> Tokens:
    kinds = [TokenKind.SYSTEM] * (text // 2) + [TokenKind.VISION] * vision + [TokenKind.QUESTION] * (text - text // 2)
    return Tokens.of(torch.tensor([kinds] * rows), phase="prefill").to("cuda")


@torch.no_grad()
def prefill_ms(model: PreTrainedModel, tape: RoutingTape, tokens: Tokens) -> list[float]:
    """Milliseconds of one prefill, by round."""
    image = model.config.image_token_id
    ids_BT = torch.where(tokens.kind_BT == TokenKind.VISION, image, 7).long()
    rounds = []
    with tape.about(tokens):
        for number in range(WARM_UP + ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(CALLS):
                model(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
            end.record()
            torch.cuda.synchronize()
            if number >= WARM_UP:
                rounds.append(begin.elapsed_time(end) / CALLS)
    return rounds


def measure(model: PreTrainedModel, tape: RoutingTape) -> list[tuple[list[float], Cost]]:
    model.eval()
    return [(prefill_ms(model, tape, prompt(*shape)), count(model, prompt(*shape))) for shape in SHAPES]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(dense: list[tuple[list[float], Cost]], routed: list[tuple[list[float], Cost]]) -> list[str]:
    lines = [
        "| rows | vision + text tokens | dense, ms | routed, ms | time | FLOPs (the limit) | key-value bytes |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (rows, vision, text), (was, before), (now, after) in zip(SHAPES, dense, routed, strict=True):
        ratios = (statistics.median(now) / statistics.median(was), after.flops / before.flops)
        cells = [str(rows), f"{vision} + {text}", spread(was), spread(now), *(f"{ratio:.3f}" for ratio in ratios)]
        lines.append(f"| {' | '.join(cells)} | {after.kv_bytes / before.kv_bytes:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="Hugging Face config.json of the model")
    parser.add_argument("--plugin", default="ProgressiveDepths", choices=sorted(discover()), help="with its defaults")
    parser.add_argument("--out", type=Path, default=Path("docs/prefill.md"), help="page to write")
    args = parser.parse_args()
    with torch.device("cuda"):
        model = FromConfig(args.shape, dtype="bfloat16").build()
    dense = measure(model, RoutingTape())
    routed = measure(model, attach(model, {"routed": discover()[args.plugin]()}))
    command = f"python benchmarks/prefill.py {args.shape} --plugin {args.plugin} --out {args.out}"
    lines = [
        f"# Prefill of {args.plugin} against dense",
        "",
        f"Made by `{command}` on one {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, eager, default"
        f" sdpa: medians (smallest to largest) of {ROUNDS} rounds of {CALLS}. Ratios are routed over dense; language"
        " model alone, random weights. Decoding with a cache is not measured here.",
        "",
        *table(dense, routed),
        "",
    ]
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
