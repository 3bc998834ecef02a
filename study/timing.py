"""Each arm and level alone on the device, in turns with the reference."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from study.grid import Run, write
from study.processes import first_to_end, none_left_behind, start
from study.progress import Progress
from study.run import enter, use_threads

Timings = dict[str, dict[str, Any]]
Stopwatch = Callable[[Path], Mapping[str, Any]]


def key(run: Run, reference: Run, rounds: int) -> str:
    """Names a measurement by all that it depends on but the device."""
    return f"{run.hash}-{reference.hash}-{rounds}"


def kept(file: Path) -> Timings:
    """What was measured before."""
    return json.loads(file.read_text()) if file.is_file() else {}


def time_all(
    runs: Sequence[Run],
    reference: Run,
    rounds: int,
    folder: Path,
    stopwatch: Callable[[Path, int], Stopwatch],
    threads: int,
    device: str | None,
) -> bool:
    """Measures what was not measured yet, in one process, and writes it to ``timings.json``; whether all of it went.

    Args:
        runs: One run of each arm and level.
        reference: A run of the reference.
        rounds: In how many rounds.
        folder: The study's.
        stopwatch: Makes what measures a config against the reference's.
        threads: On the CPU.
        device: The GPU, as CUDA_VISIBLE_DEVICES has it.
    """
    file = folder / "timings.json"
    wanted = {key(run, reference, rounds): run for run in runs}
    missing = {name: run for name, run in wanted.items() if name not in kept(file)}
    if not missing:
        return True
    bar = Progress(len(wanted), len(wanted) - len(missing), "timing")
    with none_left_behind() as processes, bar:
        configs = {name: run.config_file for name, run in missing.items()}
        args = (reference.config_file, configs, rounds, file, stopwatch, threads, device)
        processes.append(start(measure, *args))
        left, ended = dict(missing), False
        while not ended:
            bar.now(next((run.cell for run in left.values()), ""))
            ended = bool(first_to_end(processes, 0.5))
            for name in left.keys() & kept(file).keys():
                bar.one_more(left.pop(name).cell)
        if failed := [run.cell for run in left.values()]:
            bar.write(f"Not timed: {', '.join(failed)}. Why stands in {folder / 'timing.txt'}.")
    return not failed


def measure(
    reference: Path,
    configs: Mapping[str, Path],
    rounds: int,
    file: Path,
    stopwatch: Callable[[Path, int], Stopwatch],
    threads: int,
    device: str | None,
) -> None:
    """Measures one after the other, and keeps each at once."""
    enter(file.with_name("timing.txt"), device)
    use_threads(threads)
    watch, failed = stopwatch(reference, rounds), False
    for name, config in configs.items():
        try:
            timed = {which: asdict(timing) for which, timing in watch(config).items()}
        except Exception:  # one that does not fit into memory, say: the others can still be measured
            traceback.print_exc()
            failed = True
        else:
            write(file, json.dumps({**kept(file), name: timed}, indent=1) + "\n")
    sys.exit(int(failed))
