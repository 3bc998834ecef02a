"""A folder that takes its place whole, and gives way to nothing that was changed by hand."""

import os
from pathlib import Path

import pytest

from lit_modules.export_folder import ExportFolder


def write(path: Path, text: str) -> None:
    with ExportFolder(path).writing({"command": "a test"}) as folder:
        (folder / "config.json").write_text(text)


def test_an_export_makes_way_for_the_next_unless_a_person_changed_it(tmp_path):
    place = tmp_path / "demo"
    write(place, "0.5")
    write(place, "0.6")
    assert (place / "config.json").read_text() == "0.6"
    assert place.stat().st_mode & 0o777 == 0o777 & ~umask()
    (place / "config.json").write_text("0.7")  # as long as before
    with pytest.raises(ValueError, match=r"was changed since: config\.json"):
        ExportFolder(place).check()


def test_where_the_new_one_cannot_take_its_place_the_old_one_keeps_it(tmp_path, monkeypatch):
    place, rename = tmp_path / "demo", Path.rename
    write(place, "0.5")

    def fails(self, target):
        if str(self).endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="What was there before is untouched"):
        write(place, "0.6")
    assert [each.name for each in tmp_path.iterdir()] == ["demo"]
    assert (place / "config.json").read_text() == "0.5"


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
