"""``python -m lit study FILE``: everything from the file to the page."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

from jsonargparse import ArgumentError

from study.grid import Run, runs_of
from study.processes import first_to_end, none_left_behind, preload, start, threads
from study.report import write_report
from study.run import Lit, end_with_starter, enter
from study.runner import alone, complaint, devices_of, run_all, unfinished
from study.spec import PLOTS, Explain, Study, read
from study.timing import Stopwatch, time_all


@dataclass(frozen=True)
class Workshop:
    """What a study needs of the rest: functions that a fresh process can import by their names.

    Args:
        lit: Runs one command of the command line.
        load: Reads a config and makes its objects, without weights or data.
        prepare: Makes a config's data.
        stopwatch: From the reference's config and the rounds, what measures a config beside it.
        gpus: Counts the GPUs.
        explain: Says a complaint about a YAML in a few lines.
        modules: What every process imports.
    """

    lit: Lit
    load: Callable[[Path], object]
    prepare: Callable[[Path], None]
    stopwatch: Callable[[Path, int], Stopwatch]
    gpus: Callable[[], int]
    explain: Explain
    modules: Sequence[str]


def run(args: Sequence[str], workshop: Workshop) -> int:
    """Runs a study, or what its options ask for; the exit code.

    Raises:
        ValueError: a mistake that the user can mend, found before anything is run.
    """
    given = parser().parse_args(args)
    study = read(given.file, workshop.explain)
    if given.jobs is not None:
        study = replace(study, jobs=given.jobs)
    runs = runs_of(study, given.file.parent)
    if given.plan:
        check(runs, workshop, study.jobs)
        print(plan(runs))
        return 0
    failed = False
    if not given.report:
        failed = not do(study, runs, workshop)
    page = write_report(study, runs, f"python -m lit study {given.file}")
    if given.out:
        copy(page, given.out)
    print(f"\n{page.read_text().partition('## Every arm')[0]}All tables, with plots: {given.out or page}")
    return 2 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Of what stands behind ``study``."""
    made = argparse.ArgumentParser(
        prog="python -m lit study",
        description="Runs a grid of arms x levels x seeds, several side by side; writes outcomes.parquet, runs.parquet,"
        " report.md and plots. Started again, it repeats no finished run.",
    )
    made.add_argument("file", type=Path, help="the study's YAML; configs/studies has examples")
    made.add_argument("--jobs", type=int, help="runs side by side, instead of the file's number")
    made.add_argument("--plan", action="store_true", help="check all configs, print runs and commands, run nothing")
    made.add_argument("--report", action="store_true", help="only write the report again, from the finished runs")
    made.add_argument("--out", type=Path, metavar="PAGE.md", help="copy the page and its plots there")
    return made


def do(study: Study, runs: Sequence[Run], workshop: Workshop) -> bool:
    """Data, runs, timings; whether all of it went."""
    folder = Path(study.folder)
    with alone(folder):
        if left := unfinished(runs):
            check(left, workshop, study.jobs)
            prepare(left, folder, workshop)
        devices = devices_of(workshop.gpus())
        failed = run_all(runs, study.jobs, devices, workshop.lit)
        done = [run for run in firsts(runs) if run not in failed and run.arm in study.arms]
        reference = next((run for run in done if run.arm == study.reference), None)
        timed = True
        if study.timing and reference is not None:
            preload(workshop.modules, study.jobs)
            device = devices[0] if devices else None
            timed = time_all(done, reference, study.rounds, folder, workshop.stopwatch, threads(1), device)
    return timed and not failed


def firsts(runs: Sequence[Run]) -> list[Run]:
    """One run of each arm and level."""
    return list({run.cell: run for run in reversed(runs)}.values())[::-1]


def check(runs: Sequence[Run], workshop: Workshop, jobs: int) -> None:
    """Makes the model and data of every arm and level, and lets the command line read what else is in their configs.

    Args:
        runs: What is checked; of each arm and level the first.
        workshop: What reads configs.
        jobs: How many processes share the work.

    Raises:
        ValueError: something is refused.
    """
    preload(workshop.modules, jobs)
    pool = ProcessPoolExecutor(jobs, get_context("forkserver"), initializer=end_with_starter)
    with tempfile.TemporaryDirectory() as folder, pool:
        read_before: set[str] = set()
        answers: dict[str, Future[str]] = {}
        for number, run in enumerate(firsts(runs)):
            elsewhere = replace(run, folder=Path(folder) / str(number))
            elsewhere.write_config()
            # The command line takes half a second for a config.
            rest = str({key: values for key, values in run.config.items() if key not in ("model", "seed_everything")})
            rest = rest.replace(str(run.folder), "")
            answers[run.cell] = pool.submit(refused, elsewhere.config_file, workshop, all_of_it=rest not in read_before)
            read_before.add(rest)
        for cell, answer in answers.items():
            if said := answer.result():
                pool.shutdown(cancel_futures=True)
                raise ValueError(f"{cell}: {said}")


def refused(config: Path, workshop: Workshop, all_of_it: bool) -> str:
    """Why a config cannot be used, or ""."""
    said = StringIO()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(said):
            try:
                workshop.load(config)
            except ArgumentError:
                all_of_it = True  # the command line says it better
            if all_of_it:
                workshop.lit(["fit", "--config", str(config), "--print_config"])
    except ValueError as error:
        return workshop.explain(str(error))
    except SystemExit as end:
        return said.getvalue().removeprefix("error: ").strip() if end.code else ""
    return ""


def prepare(runs: Sequence[Run], folder: Path, workshop: Workshop) -> None:
    """Makes the data of all runs, once, before several ask for them at the same time.

    Raises:
        ValueError: that failed.
    """
    distinct = {repr(run.config.get("data")): run for run in reversed(runs)}
    with none_left_behind() as processes:
        for run in distinct.values():
            run.write_config()
            processes[:] = [start(prepared, run.config_file, folder / "data.txt", workshop.prepare)]
            (process,) = first_to_end(processes)
            if process.exitcode:
                raise ValueError(complaint(f"The data of {run.name}", folder / "data.txt", process.exitcode))


def prepared(config: Path, log: Path, make: Callable[[Path], None]) -> None:
    """Makes the data of one config, in a process of its own."""
    enter(log, None)
    make(config)


def plan(runs: Sequence[Run]) -> str:
    """What would be run, and by which commands each can be run alone."""
    lines: list[str] = []
    for run in runs:
        state = "finished" if run.finished() else "to do"
        lines += [f"{run.name}  ({state})", *(f"    {command}" for command in run.commands)]
    left = len(unfinished(runs))
    return "\n".join([*lines, f"{len(runs)} runs, {left} to do. Each reads the config that the study writes for it."])


def copy(page: Path, out: Path) -> None:
    """The page under another name, and its plots beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plots = out.parent / f"{out.stem}_plots"
    if (page.parent / PLOTS).is_dir():
        shutil.copytree(page.parent / PLOTS, plots, dirs_exist_ok=True)
    out.write_text(page.read_text().replace(f"]({PLOTS}/", f"]({plots.name}/"))
