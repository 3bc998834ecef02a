"""``python -m lit export``: a run leaves the project as a folder, and its answers stay the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoProcessor

import lit
from answers import QUICKSTART, answered, check
from conftest import TINY
from datamodules import DigitsVQA
from lit_modules import RoutedVLM
from lit_modules.export_folder import ExportFolder, sizes
from routing import load_routed

ROOT = Path(__file__).parent.parent.parent
DEPTH = "--model.init_args.plugins.depth"
STD = f"{DEPTH}.init_args.router.init_args.std=0.5"


@pytest.fixture
def run(tiny, tmp_path) -> Path:
    """The folder of a short run of the quickstart."""
    lit.main(["fit", f"--config={QUICKSTART}", *tiny, STD, "--trainer.limit_val_batches=0"])
    return tmp_path / "quickstart/version_0"


@pytest.fixture
def answers(monkeypatch) -> list[list[str]]:
    """What `lit validate` answers to each batch."""
    spoken, answer = [], RoutedVLM.answers
    monkeypatch.setattr(RoutedVLM, "answers", lambda *a, **k: spoken.append(answer(*a, **k)) or spoken[-1])
    return spoken


def asked(model, folder: Path, digits: Path) -> list[str]:
    """What the folder's model answers to the folder's prompts, made as anyone would make them."""
    processor, said = AutoProcessor.from_pretrained(folder), []
    data = DigitsVQA(**{**yaml.safe_load(TINY.read_text())["data"]["init_args"], "root": str(digits)})
    data.setup()
    records = {record.id: record for record in data.records["val"]}
    for name in next(iter(data.val_dataloader()))["ids"]:
        record, turn = name.rsplit("/", 1)
        words = records[record].turns[int(turn)].question.replace("<image>", "").strip()
        pictures = [{"type": "image", "path": str(data.image_folder / each)} for each in records[record].images]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*pictures, {"type": "text", "text": words}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        new = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return said


def test_a_run_leaves_and_answers_the_same(run, tiny, digits, tmp_path, capsys, answers):
    out, data = tmp_path / "out", [f"--config={QUICKSTART}", *tiny[:2]]
    lit.main(["export", f"--config={run}/config.yaml", f"--ckpt_path={run}", f"--out={out}"])
    said = capsys.readouterr().out
    assert "routers.depth  ProgressiveDepths       12" in said and f"model = load_routed('{out}')" in said
    assert {file.name for file in out.iterdir()} >= {"config.json", "chat_template.jinja", "export.json"}
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.old"))

    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    model = load_routed(out)
    mine = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert mine.keys() == stored.keys() and all(torch.equal(mine[name], stored[name]) for name in stored)

    silent = [tiny[3], "--trainer.callbacks=null", "--trainer.enable_progress_bar=false"]
    lit.main(["validate", *data, tiny[2], *silent, f"--ckpt_path={run}/checkpoints/last.ckpt"])
    asked_once = list(answers)
    assert any(answers[0]) and asked(model, out, digits) == answers[0]
    capsys.readouterr()
    backbone = {"class_path": "Pretrained", "init_args": {"name": str(out)}}
    (tmp_path / "routed.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"backbone": backbone}}}))
    lit.main(["validate", *data[1:], *silent, f"--config={tmp_path / 'routed.yaml'}"])  # no plugin in any config
    assert f"backbone {out}: taken routers.depth 12 tensors" in capsys.readouterr().out
    assert answers == asked_once * 2


@pytest.mark.slow
def test_it_is_loaded_without_lightning(run, tiny, tmp_path):
    out = tmp_path / "out"
    lit.main(["export", f"--config={QUICKSTART}", *tiny[:3], f"--ckpt_path={run}", f"--out={out}"])
    code = (
        f"import sys\nfrom routing import load_routed\nmodel = load_routed({str(out)!r})\n"
        "assert not any(m.startswith(('lightning', 'pytorch_lightning', 'lit_modules')) for m in sys.modules)\n"
        "print(sum(p.sum().item() for p in model.routers.parameters()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == sum(p.sum().item() for p in load_routed(out).routers.parameters())
    assert "UNEXPECTED" not in done.stderr


def test_what_a_config_starts_from_leaves_in_any_type_and_needs_its_config(tiny, tmp_path, capsys):
    out, args, off = (
        f"--out={tmp_path / 'out'}",
        [f"--config={QUICKSTART}", *tiny[:3]],
        f"{DEPTH}.init_args.enabled=false",
    )
    lit.main(["export", *args, STD, "--dtype=bfloat16", out])
    first = load_routed(tmp_path / "out")
    assert first.dtype == torch.bfloat16 and {p.dtype for p in first.routers.parameters()} == {torch.float32}
    assert " new\n" in capsys.readouterr().out
    lit.main(["export", *args, off, out])  # an earlier export makes way
    assert "AutoModelForImageTextToText.from_pretrained(" in capsys.readouterr().out
    assert {name.partition("/")[0] for name in sizes(tmp_path)} == {"out"}
    with pytest.raises(ValueError, match="no block 'routing' that would say how the model is routed"):
        load_routed(tmp_path / "out")
    error = answered([*tiny[:3], f"--ckpt_path={tmp_path / 'out'}", f"{out}2"], capsys, "export")
    check(error, ("ckpt_path=", "12 only in the model: routers.depth", "Allowed: ", "Use the config.yaml"))
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out={here}"], ("--out {here} holds what no export wrote", ": mine.txt.\n", "Give another")),
        (
            ["--out={here}/out", "--ckpt_path={here}/nowhere"],
            ("ckpt_path={here}/nowhere does not", "Allowed: ", "Give"),
        ),
        (
            ["--out={here}/out", "--data=tests.stub_data.StubData"],
            ("StubData has no exported_processor()", "Give other"),
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(more, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(RoutedVLM, "configure_model", lambda self: pytest.fail("built"))
    (tmp_path / "mine.txt").write_text("not to be lost")
    error = answered([each.format(here=tmp_path) for each in more], capsys, "export")
    check(error, [each.format(here=tmp_path) for each in said])
    assert sizes(tmp_path) == {"mine.txt": 14}


def test_a_place_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    for place, said in (
        ("/dev/null/out", "(Not a directory|File exists)"),
        (tmp_path / "mine.txt", "holds what no export wrote"),
    ):
        with pytest.raises(ValueError, match=rf"--out {place}:? {said}(.|\n)*Allowed: (.|\n)*Give another"):
            ExportFolder(Path(place)).check()


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = ExportFolder(tmp_path / "out")
    for words in ("first", "second"):
        with folder.writing({"words": words}) as place:
            assert not (tmp_path / "out/new.txt").exists() or words == "second"
            (place / "new.txt").write_text(words)
    with (
        pytest.raises(OSError, match=r"could not be written(.|\n)*untouched(.|\n)*Make room"),
        folder.writing({}) as place,
    ):
        (place / "new.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "out/new.txt").read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["out"]
    for change in ("added.txt", "new.txt"):
        (tmp_path / "out" / change).write_text("mine")
        with pytest.raises(ValueError, match=f"holds what no export wrote, or what was changed since: {change}"):
            folder.check()
        (tmp_path / "out/added.txt").unlink(missing_ok=True)
