"""Trains the digits configs on one GPU, then times each alone, and writes docs/results.md.

    python benchmarks/digits.py configs/digits/dense.yaml configs/digits/p_mod.yaml --out docs/results.md

The trainings share the GPU; only the timings that follow are reported as speed. The first config is the reference.
Scores are kept in scores.json in the folder of the runs; while it is there, only the timings are made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_time import time_configs
from lit_modules.configured import load, read
from lit_modules.speed import Timing

Scores = dict[str, dict[str, float]]  # kind -> exact_match, majority, blank


def lit(log: Path, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lit", *args], stdout=log.open("ab"), stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )


def wait(running: dict[str, subprocess.Popen[bytes]], runs: Path) -> None:
    for name, process in running.items():
        if process.wait():
            raise SystemExit(f"{name} failed:\n{(runs / f'{name}.log').read_text()[-3000:]}")


def train_and_test(configs: list[Path], runs: Path, extra: list[str]) -> dict[str, tuple[Scores, float]]:
    """Exact match of each config on the test split, and the minutes its training took beside the others."""
    began = time.monotonic()
    minutes = {}
    fits = {}
    for config in configs:
        logs = [f"--trainer.logger.init_args.save_dir={runs}", f"--trainer.logger.init_args.name={config.stem}"]
        fits[config.stem] = lit(runs / f"{config.stem}.log", "fit", "--config", str(config), *logs, *extra)
    for name, process in fits.items():
        wait({name: process}, runs)
        minutes[name] = (time.monotonic() - began) / 60
    tests = {}
    for config in configs:
        checkpoint = newest(runs / config.stem, "version_*/checkpoints/last*.ckpt")
        logger = [
            "--trainer.logger=CSVLogger",
            f"--trainer.logger.save_dir={runs}",
            f"--trainer.logger.name={config.stem}_test",
        ]
        args = ["test", "--config", str(config), "--ckpt_path", str(checkpoint), *logger, *extra]
        tests[config.stem] = lit(runs / f"{config.stem}.log", *args)
    wait(tests, runs)
    return {config.stem: (read_scores(runs / f"{config.stem}_test"), minutes[config.stem]) for config in configs}


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def read_scores(folder: Path) -> Scores:
    table = newest(folder, "version_*/metrics.csv")
    scores: Scores = defaultdict(dict)
    for row in csv.DictReader(table.open()):
        for tag, value in row.items():
            if value and tag.startswith("test/"):
                _, what, kind = tag.split("/")
                scores[kind][what] = float(value)
    return scores


def facts(root: Path) -> tuple[dict[str, int], dict[str, float]]:
    """Test questions of each kind, and the chance of guessing one of the answers that training shows for it."""
    answers, asked = defaultdict(set), defaultdict(int)
    for split in ("train", "test"):
        for record in json.loads((root / f"{split}.json").read_text()):
            for turn in record["conversations"][1::2]:
                if split == "train":
                    answers[turn["kind"]].add(turn["value"])
                else:
                    asked[turn["kind"]] += 1
    return dict(asked), {kind: 1 / len(seen) for kind, seen in answers.items()}


def named_right(root: Path) -> float:
    return float(json.loads((root / "vision_tower/training.json").read_text())["digits_named_right"])


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def accuracy_table(
    results: dict[str, tuple[Scores, float]], asked: dict[str, int], chance: dict[str, float]
) -> list[str]:
    names = list(results)
    lines = [
        row("kind", "questions", *names, "majority", *(f"{n}, blank image" for n in names), "chance"),
        row("---", *["---:"] * (3 + 2 * len(names))),
    ]
    for kind in [*sorted(asked), "macro"]:
        by = [results[name][0][kind] for name in names]
        guess = chance[kind] if kind in chance else statistics.mean(chance[k] for k in asked)
        cells = [f"{s['exact_match']:.3f}" for s in by] + [f"{by[0]['majority']:.3f}"]
        cells += [f"{s['blank']:.3f}" for s in by] + [f"{guess:.3f}"]
        lines.append(row(kind, str(asked.get(kind, sum(asked.values()))), *cells))
    total = sum(asked.values())
    overall = [sum(results[name][0][kind]["exact_match"] * n for kind, n in asked.items()) / total for name in names]
    lines.append(row("all questions", str(total), *(f"{v:.3f}" for v in overall), *[""] * (len(names) + 2)))
    return lines


def speed_table(timings: dict[str, Timing]) -> list[str]:
    names, base = list(timings), next(iter(timings.values()))
    ratio = lambda value, reference: f"{value / reference:.2f} x"  # noqa: E731
    spread = lambda values: f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"  # noqa: E731
    lines = [row("", *names, "ratio"), row("---", *["---:"] * (len(names) + 1))]
    for what, values, number in (
        ("training step, ms", [t.step_ms for t in timings.values()], base.step_ms),
        ("prefill, ms", [t.prefill_ms for t in timings.values()], base.prefill_ms),
    ):
        ratios = ", ".join(ratio(statistics.median(v), statistics.median(number)) for v in values[1:])
        lines.append(row(what, *(spread(v) for v in values), ratios))
    for what, values in (
        ("peak memory of a training step, MiB", [t.peak_mib for t in timings.values()]),
        ("key-value bytes of a prefill, MiB", [t.kv_mib for t in timings.values()]),
        ("FLOPs of a prefill, language model, G", [t.gflops for t in timings.values()]),
    ):
        lines.append(row(what, *(f"{v:.2f}" for v in values), ", ".join(ratio(v, values[0]) for v in values[1:])))
    return lines


def report(args: argparse.Namespace, results: dict[str, tuple[Scores, float]], timings: dict[str, Timing]) -> str:
    root = Path(yaml.safe_load(args.configs[0].read_text())["data"]["init_args"]["root"])
    first = next(iter(timings.values()))
    took = ", ".join(f"{name} {minutes:.1f} min" for name, (_, minutes) in results.items())
    command = f"python benchmarks/digits.py {' '.join(map(str, args.configs))} --out {args.out}"
    return "\n".join([
        "# Results on the embedded digits",
        "",
        f"Made by `{command}` on one {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16-mixed, one seed.",
        f"Training, side by side on that GPU: {took}.",
        "",
        "## Exact match on the test split",
        "",
        "Majority: always the most frequent training answer of the kind. Blank image: the same model, mean colour.",
        "Chance: one of the kind's training answers, drawn evenly. No scan of a digit stands in two splits.",
        "",
        *accuracy_table(results, *facts(root)),
        "",
        "## Time, memory and what they follow from",
        "",
        f"Each model alone on the GPU, median (smallest to largest) of {len(first.step_ms)} rounds that take turns;"
        f" training step: {first.train_shape} tokens, forward, backward, AdamW; prefill: {first.prefill_shape} tokens."
        f" Ratios are to {next(iter(timings))}. Decoding with a cache is not measured here.",
        "",
        *speed_table(timings),
        "",
        f"The vision tower named {named_right(root):.1%} of unseen digits right before it was trained on.",
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help="reference first")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="page to write")
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="folder of the runs")
    parser.add_argument("--set", nargs="*", default=[], dest="extra", help="arguments for every lit command")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    scores = args.runs / "scores.json"
    if not scores.exists():
        load(read(args.configs[0]))[1].prepare_data()  # once, before the trainings ask for it together
        scores.write_text(json.dumps(train_and_test(args.configs, args.runs, args.extra)))
    results = {name: (by_kind, minutes) for name, (by_kind, minutes) in json.loads(scores.read_text()).items()}
    timings = time_configs(args.configs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report(args, results, timings))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
