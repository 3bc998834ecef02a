"""``python -m lit generate``: words on stdout, what routing did on stderr, pictures of it where they are asked for."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

import lit
from lit_modules import TinyLlava, overlay
from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter, ShiftedCosine, attach
from routing.capacity import kept_count

QUESTION = "How many digits are there ?"


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """The same tiny model, routed and dense, and another that reads text alone; each with its processor."""
    root, processor = tmp_path_factory.mktemp("models"), AutoProcessor.from_pretrained(digits / "processor")
    shape = {"layers": 4, "width": 16, "heads": 2, "hidden": 32, "folder": str(digits)}
    for name in ("routed", "dense"):
        torch.manual_seed(0)
        model = TinyLlava(**shape).build()
        if name == "routed":
            attach(model, {"depth": ProgressiveDepths(router=LinearRouter())})
        model.generation_config.max_new_tokens = 5
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    words = {"vocab_size": len(processor.tokenizer), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **words)
    LlamaForCausalLM(config).save_pretrained(root / "text")
    processor.tokenizer.chat_template = "{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %} ASSISTANT:"
    processor.tokenizer.save_pretrained(root / "text")
    return root


@pytest.fixture
def picture(digits):
    return str(next((digits / "images" / "val").glob("*.png")))


@pytest.fixture
def ask(capsys):
    """Asks a folder, and gives what was written."""

    def ask(folder, *args, prompt=QUESTION):
        capsys.readouterr()
        lit.main(["generate", f"--model={folder}", f"--prompt={prompt}", "--device=cpu", *args])
        return capsys.readouterr()

    return ask


def test_the_answer_stands_alone_and_the_layers_beside_it(folders, picture, ask, tmp_path):
    said = ask(folders / "routed", f"--image={picture}", f"--overlay={tmp_path / 'out.png'}")
    assert len(said.out.splitlines()) == 1 and 0 < len(said.out.split()) <= 5
    lines = said.err.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    assert [line.split()[0] for line in lines[head + 2 : head + 6]] == ["0", "1", "2", "3"]
    assert "144 of 144" in lines[head + 2] and "21 of 144" in lines[head + 5]
    assert "144 of them patches" in said.err and "dense it would be" in said.err and "tokens a second" in said.err
    assert Image.open(tmp_path / "out.png").size[0] > 300 and "out.png" in said.err


def test_greedy_answers_repeat_and_drawn_ones_follow_the_seed(folders, picture, ask):
    def words(*args):
        said = ask(folders / "routed", f"--image={picture}", "--quiet", "--max_new_tokens=6", *args)
        assert not said.err
        return said.out

    assert words() == words("--seed=1")
    drawn = [words("--temperature=2", f"--seed={seed}") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_each_picture_has_its_sheet_with_its_own_kept_patches(folders, picture, ask, tmp_path, monkeypatch):
    Image.new("RGB", (50, 70), "red").save(tmp_path / "red.png")
    drawn = []
    monkeypatch.setattr(
        overlay, "sheet", lambda title, tiles, columns: drawn.append((title, tiles)) or np.zeros((2, 2, 3), np.uint8)
    )
    ask(folders / "routed", f"--image={picture}", f"--image={tmp_path / 'red.png'}", f"--overlay={tmp_path / 'o.png'}")
    assert {path.name for path in tmp_path.glob("o*.png")} == {"o.png", "o_1.png"}
    assert all(title.startswith(f"{QUESTION}\n") for title, _ in drawn)
    counts = [[int(tile.caption.split()[2]) for tile in tiles[1:]] for _, tiles in drawn]
    assert [sum(both) for both in zip(*counts, strict=True)] == [
        kept_count(2 * 144, ShiftedCosine()(layer / 3, 1.0)) for layer in (1, 2, 3)
    ]
    for _, tiles in drawn:
        shown = np.asarray(tiles[0].pixels_HW3)
        for tile in tiles[1:]:
            patches = (tile.pixels_HW3 == shown).all(2).reshape(12, 16, 12, 16).all((1, 3))
            assert patches.sum() == int(tile.caption.split()[2])
    assert (drawn[1][1][0].pixels_HW3 == [255, 0, 0]).all()


def test_text_alone_from_stdin(folders, ask, monkeypatch):
    for name in ("routed", "dense", "text"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
        said = ask(folders / name, "--max_new_tokens=3", prompt="-")
        assert said.out.endswith("\n") and "0 of them patches; " in said.err
        assert ("is dense: every token enters every layer" in said.err) == (name != "routed")


def test_a_dense_model_says_so_and_answers(folders, picture, ask):
    said = ask(folders / "dense", f"--image={picture}", "--max_new_tokens=1")
    assert "dense is dense" in said.err and "1 in the answer" in said.err and "dense it would" not in said.err


@pytest.mark.parametrize(
    ("name", "args", "parts"),
    [
        ("nowhere", [], ("there is no such folder", "lit export")),
        ("", [], ("has no config.json", "lit export")),
        ("dense", ["--overlay=out.png"], ("dense is dense, every layer keeps every patch", "Leave --overlay out")),
        ("text", [], ("reads text alone", "Leave --image out")),
        ("bare", [], ("The processor of", "Save the processor")),
        ("odd", [], ("config.json cannot be read", "Export it anew")),
        ("routed", ["--device=teapot"], ("--device teapot", "Allowed: auto, cpu")),
    ],
)
def test_mistakes_are_told_before_weights_are_read(
    folders, picture, ask, tmp_path, capsys, monkeypatch, name, args, parts
):
    monkeypatch.chdir(tmp_path)
    if name in ("bare", "odd"):
        (folders / name).mkdir()
        shutil.copy(folders / "dense/config.json", folders / name)
    if name == "odd":
        config = json.loads((folders / "dense/config.json").read_text())
        (folders / "odd/config.json").write_text(json.dumps({**config, "model_type": "teapot"}))
    monkeypatch.setattr("lit_modules.exported_model.ModelFolder.model", None)
    with pytest.raises(SystemExit):
        ask(folders / name, f"--image={picture}", *args)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\nAllowed: " in said and all(part in said for part in parts), said


def test_a_missing_attention_is_told(folders, ask, capsys):
    with pytest.raises(SystemExit):
        ask(folders / "dense", "--attention=flash_attention_2")
    assert "--attention flash_attention_2" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_mistake(folders, monkeypatch):
    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("lit_modules.generate_command.respond", closed)
    monkeypatch.setattr("os.dup2", lambda *args: None)
    monkeypatch.setattr("sys.stdout", open("/dev/null", "w"))
    lit.main(["generate", f"--model={folders / 'routed'}", "--prompt=What ?"])


def test_every_option_is_on_the_page(capsys):
    with pytest.raises(SystemExit):
        lit.main(["generate", "--help"])
    options = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE))
    page = (lit.ROOT / "docs/generate.md").read_text()
    assert len(options) == 12 and not {option for option in options if f"`{option}`" not in page}
