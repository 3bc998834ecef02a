"""Everything that is made from finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from study.cost import Cost, cost
from study.grid import Run, write
from study.outcomes import Answers, write_outcomes, write_questions, write_runs
from study.page import page
from study.plots import draw
from study.spec import PLOTS, Study
from study.tables import sheet
from study.timing import kept, key


def write_report(study: Study, runs: Sequence[Run], command: str) -> Path:
    """Tables on disk, plots, and ``report.md``, from the runs that are finished.

    Args:
        study: What was stated.
        runs: All of its runs.
        command: What makes all of this.

    Raises:
        ValueError: no run is finished yet.
    """
    folder, done = Path(study.folder), [run for run in runs if run.finished()]
    if not done:
        raise ValueError(f"{folder} has no finished run of this study.\nAllowed: at least one.\nRun the study first.")
    write_outcomes(done, folder / "outcomes.parquet")
    write_runs(done, folder / "runs.parquet")
    answers = Answers(done)
    write_questions(answers.questions, folder / "questions.parquet")
    found = sheet(study, answers, costs(study, done))
    plots = draw(found, study, folder / PLOTS)
    text = "\n".join(page(study, runs, done, answers, found, plots, command))
    write(folder / "report.md", text + "\n")
    return folder / "report.md"


def costs(study: Study, done: Sequence[Run]) -> dict[str, Cost]:
    """What was measured, by arm and level."""
    timings = kept(Path(study.folder) / "timings.json")
    # Any seed's reference: they are one architecture, and the one that was there first was timed.
    references = [run for run in done if run.cell == study.reference]
    pairs = ((run, key(run, reference, study.rounds)) for reference in references for run in done)
    return {run.cell: cost(timings[name]) for run, name in pairs if name in timings}
