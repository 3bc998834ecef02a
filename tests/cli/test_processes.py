"""Whole commands in processes of their own: two ranks with text-only batches and validation, and written answers."""

import json
from pathlib import Path

import pytest

import lit
from forked import ranks

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = f"--config={ROOT / 'configs/quickstart.yaml'}"


def test_two_processes_train_on_text_only_batches_and_validate(tiny, tmp_path, capfd):
    # Batches of one row, half of the rows without a picture: sooner or later one rank has none.
    extra = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1", "--trainer.max_steps=-1"]
    extra += ["--data.init_args.batch_size=1", "--data.init_args.text_share=1", f"--data.init_args.root={tmp_path}/d"]
    extra += [f"--model.init_args.backbone.init_args.folder={tmp_path}/d"]
    assert ranks(["fit", QUICKSTART, *tiny, *extra], timeout=100) == [0, 0]
    said = capfd.readouterr().out
    assert said.count("majority") == 1 and said.count("Logs of this run") == 1


def test_answers_are_written_one_json_object_a_line(tiny, tmp_path):
    lit.main(["predict", QUICKSTART, *tiny, "--trainer.limit_predict_batches=1"])
    (file,) = tmp_path.rglob("predictions.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert answers and all(set(a) == {"id", "question", "kind", "truth", "prediction"} for a in answers)
    assert not list(tmp_path.rglob("*.partial"))


def test_two_runs_never_share_a_folder(tiny, tmp_path, capsys):
    args = ["validate", QUICKSTART, *tiny[:4], *tiny[5:], "--trainer.logger.init_args.version=0"]
    lit.main(args)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        lit.main(args)
    said = capsys.readouterr().err
    said = said[said.rindex("error: ") :]
    assert stopped.value.code == 2 and "version_0 holds another run" in said and len(said.splitlines()) <= 10
    assert all(path.read_bytes() == was for path, was in written.items())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_precision_that_halves_the_routers_is_refused(precision, tiny, capsys):
    with pytest.raises(SystemExit) as stopped:
        lit.main(["validate", QUICKSTART, *tiny, f"--trainer.precision={precision}"])
    assert stopped.value.code == 2 and "bf16-mixed" in capsys.readouterr().err
