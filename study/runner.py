"""Several runs side by side, those that others start from first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from study.grid import Run
from study.processes import first_to_end, none_left_behind, start
from study.progress import Progress
from study.run import Lit, execute

TAIL = 12  # lines


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """What is left to do.

    Raises:
        ValueError: a finished run was made from another config.
    """
    return [run for run in runs if run.finished() is None]


def run_all(runs: Sequence[Run], jobs: int, devices: Sequence[str], lit: Lit) -> list[Run]:
    """Runs what is not finished.

    Args:
        runs: All runs of the study.
        jobs: How many side by side.
        devices: GPUs that take turns, as CUDA_VISIBLE_DEVICES has them; none leaves each run what there is.
        lit: Runs one command of the command line.

    Returns:
        The runs that failed, or could not start because their parent failed.
    """
    waiting, failed = unfinished(runs), []
    places = list(range(jobs))
    running: dict[ForkServerProcess, tuple[Run, int]] = {}
    bar = Progress(len(runs), len(runs) - len(waiting), "run")
    with none_left_behind() as processes, bar:
        while waiting or running:
            for run in [run for run in waiting if run.parent in failed]:
                bar.write(f"{run.name} does not run: {run.parent.name if run.parent else ''} failed.")
                waiting.remove(run)
                failed.append(run)
            while places and (run := next(filter(ready, waiting), None)):
                waiting.remove(run)
                place = places.pop(0)
                device = devices[place % len(devices)] if devices else None
                process = start(execute, run, lit, device)
                processes.append(process)
                running[process] = run, place
            bar.now(", ".join(run.name for run, _ in running.values()))
            for process in first_to_end(processes) if processes else ():
                processes.remove(process)
                run, place = running.pop(process)
                places.append(place)
                bar.one_more(run.name)
                if process.exitcode or run.finished() is None:
                    failed.append(run)
                    bar.write(complaint(run.name, run.folder / "log.txt", process.exitcode))
    return failed


def ready(run: Run) -> bool:
    """Whether what it starts from is there."""
    return run.parent is None or run.parent.finished() is not None


def complaint(what: str, log: Path, code: int | None) -> str:
    """Why something failed, as far as it said."""
    said = log.read_text(errors="replace").splitlines()[-TAIL:] if log.is_file() else []
    return "\n".join([f"{what} failed (exit code {code}). The end of {log}:", *(f"    {line}" for line in said)])


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one study at a time works in a folder.

    Raises:
        ValueError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{folder}: another study is running there.\nAllowed: one at a time.\nWait for it, end it, or give"
                " another `folder`."
            ) from error
        yield


def devices_of(gpus: int) -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(gpus)]
