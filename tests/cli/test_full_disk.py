"""A disk that fills while a checkpoint is written leaves the checkpoint before it, and says so."""

import ctypes
import errno
import os
from pathlib import Path

import pytest
import torch

import lit
from lit_modules.checkpoint_files import WholeCheckpoints, found, unsharded

QUICKSTART = f"--config={Path(__file__).parent.parent.parent / 'configs/quickstart.yaml'}"
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of three MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if LIBC.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=3m"):
        pytest.skip(f"only root may mount a disk here ({errno.errorcode[ctypes.get_errno()]})")
    yield disk
    LIBC.umount2(str(disk).encode(), 2)


def test_the_checkpoint_before_stays_and_loads(small_disk, tiny, capsys):
    every = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    every += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.save_last=link"]
    args = [
        "fit",
        QUICKSTART,
        *tiny,
        *every,
        f"--trainer.logger.init_args.save_dir={small_disk}",
        "--trainer.max_steps=9",
    ]
    with pytest.raises(SystemExit) as stopped:
        lit.main([*args, "--trainer.limit_val_batches=0", "--monitor.detail=nothing"])
    error = capsys.readouterr().err
    error = error[error.rindex("error: ") :]
    assert stopped.value.code == 2 and len(error.splitlines()) <= 10
    assert "could not be written" in error and "MiB free" in error and "Make room" in error and "--ckpt_path" in error
    written = sorted(small_disk.rglob("epoch*.ckpt"))
    assert written and not list(small_disk.rglob("*.partial"))
    for checkpoint in written:  # every one that has its name is whole
        assert torch.load(checkpoint, weights_only=True)["state_dict"]
    (last,) = small_disk.rglob("last.ckpt")
    capsys.readouterr()
    lit.main(["test", QUICKSTART, *tiny, f"--ckpt_path={last}"])
    assert "exact match" in capsys.readouterr().out


def test_what_was_there_is_replaced_by_a_whole_checkpoint_or_not_at_all(tmp_path, monkeypatch):
    files, path = WholeCheckpoints(), tmp_path / "a.ckpt"
    files.save_checkpoint({"step": 1}, path)

    def fails(what, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fails)
        with pytest.raises(OSError, match=r"(?s)could not be written: .*No space left.*Earlier checkpoints are whole"):
            files.save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1} and [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_sharded_checkpoint_without_its_end_is_refused(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"half")
    for read in (unsharded, lambda folder: found(str(folder))):
        with pytest.raises(ValueError, match=r"no whole checkpoint: \.metadata and meta\.pt"):
            read(tmp_path)


def test_a_last_checkpoint_that_points_to_nothing_is_the_newest_one(tmp_path):
    for age, name in enumerate(("epoch=1-step=2.ckpt", "epoch=0-step=1.ckpt")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (100 - age, 100 - age))
    (tmp_path / "last.ckpt").symlink_to("epoch=2-step=3.ckpt")  # removed before the link was renewed
    with pytest.warns(UserWarning, match=r"Going on from .*epoch=1-step=2\.ckpt"):
        assert found(str(tmp_path / "last.ckpt")) == str(tmp_path / "epoch=1-step=2.ckpt")
    with pytest.raises(ValueError, match=r"(?s)does not exist.*such as .*epoch=0-step=1\.ckpt"):
        found(str(tmp_path / "other.ckpt"))
