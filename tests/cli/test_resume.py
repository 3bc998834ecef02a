"""A run that is killed and resumed is the run that was not: every loss, to the last bit."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback

from forked import start

QUICKSTART = f"--config={Path(__file__).parent.parent.parent / 'configs/quickstart.yaml'}"
STEPS, EVERY = 14, 3  # two epochs of eight batches


class Losses(Callback):
    """Appends each step's loss, and random numbers as a random router would draw them, to a file, as hex floats.

    Args:
        file: Where they go.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with self.file.open("a") as file:
            drawn = torch.rand(()).item()
            file.write(f"{trainer.global_step} {outputs['loss'].item().hex()} {drawn.hex()} {random.random().hex()}\n")


def fit(tiny, folder, file, *, kill_at=None, delay=0.0, checkpoint=None, workers=0):
    """One training in a process of its own, killed some seconds after a step if asked; its exit code."""
    args = [
        "fit",
        QUICKSTART,
        *tiny,
        f"--trainer.max_steps={STEPS}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.limit_val_batches=0",
        "--monitor.detail=detailed",
        f"--data.init_args.num_workers={workers}",
        "--data.init_args.batch_size=1",
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.save_last=link",
        f"--trainer.callbacks.every_n_train_steps={EVERY}",
        f"--trainer.callbacks+={__name__}.Losses",
        f"--trainer.callbacks.file={file}",
    ]
    child = start([*args, f"--ckpt_path={checkpoint}"] if checkpoint else args)
    while kill_at and child.is_alive() and (not file.exists() or len(file.read_text().splitlines()) < kill_at):
        time.sleep(0.002)
    if kill_at:
        time.sleep(delay)
        child.kill()
    child.join(120)
    return child.exitcode


def losses(file):
    """By step; a step that ran twice counts as it ran last."""
    return {line.split()[0]: line for line in file.read_text().splitlines()}


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    """A run without workers, which show in no number."""
    folder = tmp_path_factory.mktemp("whole")
    tiny = [f"--config={Path(QUICKSTART[9:]).parent / 'overrides/tiny.yaml'}", f"--data.init_args.root={digits}"]
    tiny += [f"--model.init_args.backbone.init_args.folder={digits}", "--trainer.enable_progress_bar=false"]
    assert fit(tiny, folder, folder / "losses") == 0
    return tiny, losses(folder / "losses")


def interrupted(uninterrupted, tmp_path, workers, at, delay=0.0):
    """Whether the run was killed in time; asserts that its losses are those of the uninterrupted one."""
    tiny, whole = uninterrupted
    file, folder = tmp_path / "losses", tmp_path / "run"
    code = fit(tiny, folder, file, kill_at=at, delay=delay, workers=workers)
    if code == 0:
        return False
    assert code == -signal.SIGKILL
    last = folder / "quickstart/version_0/checkpoints/last.ckpt"
    assert fit(tiny, folder, file, checkpoint=last, workers=workers) == 0
    assert len(whole) == STEPS and losses(file) == whole
    return True


@pytest.mark.parametrize(("workers", "at"), [(0, 11), (2, 4)])  # in the second epoch, in the first
def test_a_killed_run_goes_on_as_if_it_had_not_been(uninterrupted, tmp_path, workers, at):
    assert interrupted(uninterrupted, tmp_path, workers, at)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_at_random_moments(uninterrupted, tmp_path, workers):
    chance, killed = random.Random(0), 0
    for number in range(40):
        (tmp_path / str(number)).mkdir()
        at, delay = chance.randrange(EVERY + 1, STEPS - 1), chance.uniform(0, 0.1)
        killed += interrupted(uninterrupted, tmp_path / str(number), workers, at, delay)
        if killed == 20:
            return
    raise AssertionError(f"only {killed} of 40 runs were killed in time")
