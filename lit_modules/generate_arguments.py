"""The command line of ``lit generate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_modules.generate_options import DTYPES, MARKER, Asked


def asked(args: list[str]) -> Asked:
    """Reads the command line, and stdin where the prompt is ``-``."""
    parser = argparse.ArgumentParser(
        prog="python -m lit generate",
        description="Asks a model that `lit export` or save_pretrained wrote; the answer streams to stdout.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="an exported model, routed or dense")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="picture; repeat it for several")
    words = f"the question, or - for stdin; {MARKER} in it says where a picture stands, else pictures come first"
    add("--prompt", required=True, metavar="TEXT", help=words)
    add("--system", metavar="TEXT", help="what the system says; by default what the model's chat template says")
    tokens = "longest answer, in tokens; by default what generation_config.json says, else 256"
    add("--max_new_tokens", type=int, metavar="N", help=tokens)
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy; above, tokens are drawn")
    add("--seed", type=int, default=0, metavar="N", help="of the drawing (default 0)")
    drawn = "draw which patches each routed layer kept; more pictures go to OUT_1.png, …"
    add("--overlay", type=Path, metavar="OUT.png", help=drawn)
    add("--device", default="auto", help="auto (default: CUDA where there is one), cpu, cuda:1, …")
    add("--dtype", choices=DTYPES, default="auto", help="auto (default) is that of the folder")
    add("--attention", default="sdpa", metavar="NAME", help="sdpa (default), eager, or one that transformers knows")
    add("--quiet", action="store_true", help="the answer only, without the table on stderr")
    given = vars(parser.parse_args(args))
    if given["prompt"] == "-":
        given["prompt"] = sys.stdin.read().strip()
    return Asked(images=tuple(given.pop("image")), **given)
