"""One run in a process of its own: fit, test, and what is left of them."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from study.grid import Run, write

Lit = Callable[[list[str]], None]
VERSIONS = ("torch", "lightning", "transformers")


def enter(log: Path, device: str | None) -> None:
    """Makes a fresh process one of a study's.

    Args:
        log: Where it says what it has to say.
        device: The GPU that it sees, as CUDA_VISIBLE_DEVICES has it; None leaves it what there is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the study ends them
    end_with_starter()
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    # What cuBLAS needs where a config asks for `trainer.deterministic`.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def end_with_starter() -> None:
    """A study that was killed leaves no process that goes on writing into its folder."""

    def wait() -> None:
        if (study := parent_process()) is not None:
            study.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def execute(run: Run, lit: Lit, device: str | None) -> None:
    """Trains and tests.

    Args:
        run: What to do.
        lit: Runs one command of the command line.
        device: The GPU that it sees.
    """
    enter(run.folder / "log.txt", device)
    # What an interrupted run left.
    for leftover in ("logs", "weights"):
        shutil.rmtree(run.folder / leftover, ignore_errors=True)
    run.write_config()
    seconds: dict[str, float] = {}
    config = ["--config", str(run.config_file)]
    if run.fit:
        with clocked(seconds, "fit"):
            lit(["fit", *config])
    with clocked(seconds, "test"):
        lit(["test", *config, *(["--ckpt_path", str(run.checkpoint)] if run.fit else [])])
    fitted, tested = (run.folder / "logs" / f"version_{n}" for n in (0, int(run.fit)))
    (tested / run.outcomes.name).replace(run.outcomes)
    if not run.keep:
        shutil.rmtree(run.folder / "weights", ignore_errors=True)
    result = {
        "hash": run.hash,
        "arm": run.arm,
        "level": run.level,
        "seed": run.seed,
        "seconds": seconds,
        "losses": losses(fitted / "metrics.csv") if run.fit else {},
        "test": last(tested / "metrics.csv", ("test/", "truth/")),
        "device": device_name(),
        "threads": threads(),
        "versions": versions(),
    }
    write(run.result, json.dumps(result, indent=1) + "\n")


@contextmanager
def clocked(seconds: dict[str, float], what: str):  # type: ignore[no-untyped-def]
    """Notes how long something took, beside whatever else ran."""
    began = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - began, 3)


def columns(table: Path, prefix: str | tuple[str, ...]) -> dict[str, list[float]]:
    """The numbers that were logged, by tag."""
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(table.open()) if table.is_file() else ():
        for tag, value in row.items():
            if tag.startswith(prefix) and value and math.isfinite(float(value)):
                found.setdefault(tag, []).append(float(value))
    return found


def last(table: Path, prefix: str | tuple[str, ...]) -> dict[str, float]:
    """Of each tag the last number."""
    return {tag: values[-1] for tag, values in columns(table, prefix).items()}


def losses(table: Path) -> dict[str, dict[str, float]]:
    """Both ends of each loss curve."""
    ends = {tag: {"first": v[0], "last": v[-1]} for tag, v in columns(table, "loss/").items()}
    return {tag.removeprefix("loss/"): both for tag, both in ends.items()}


def device_name() -> str:
    """The GPU that was used, or the processor."""
    torch = sys.modules.get("torch")  # what was not imported was not used
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return f"CPU ({line.partition(':')[2].strip()})"
    return "CPU"


def threads() -> int:
    """Threads of one operation on the CPU, which its last bits depend on."""
    torch = sys.modules.get("torch")
    return 1 if torch is None else int(torch.get_num_threads())


def use_threads(number: int) -> None:
    """So many, though torch was imported long ago."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(number)


def versions() -> dict[str, Any]:
    """Of what decides about the numbers."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
