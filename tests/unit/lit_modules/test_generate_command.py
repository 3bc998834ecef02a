"""What a question becomes for a model, what is refused before one is loaded, and what is said afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, DynamicCache

from datamodules import DigitsVQA
from datamodules.images import open_image
from lit_modules.answering import Answer, Stream
from lit_modules.entered import dense_bytes, entered
from lit_modules.generate_arguments import asked
from lit_modules.generation_report import HEADER, layers_table, totals
from lit_modules.generation_settings import generation_of
from lit_modules.given_pictures import opened
from lit_modules.pictures import Tile, natural, sheet
from lit_modules.prompt import Prompter
from plugins.progressive_depths import ProgressiveDepths
from plugins.threshold_depths import ThresholdDepths
from routing import Every, LinearRouter, StoredLayer, TokenKind, attach, stored
from tests.conftest import TINY
from tests.tiny import PATCHES, facts, padded, row, tiny_llava

ASKED = ["--model=m", "--prompt=What ?"]


@pytest.fixture(scope="module")
def data(digits):
    given = yaml.safe_load(TINY.read_text())["data"]["init_args"]
    data = DigitsVQA(**{**given, "root": str(digits), "eval_batch_size": 8})
    data.setup("validate")
    return data


@pytest.fixture
def prompter(digits):
    processor = AutoProcessor.from_pretrained(digits / "processor")
    return Prompter(processor, processor.image_token_id, like_llava=True)


def test_a_question_is_read_as_in_training(data, digits, prompter):
    batch = next(iter(data.val_dataloader()))
    for number, name in enumerate(batch["ids"]):
        picture = opened(digits / "images" / "val" / f"{name.partition('/')[0].removeprefix('val-')}.png")
        prompt = prompter(batch["questions"][number], [picture], None)
        real = batch["attention_mask"][number].bool()
        assert torch.equal(prompt.inputs["input_ids"][0], batch["input_ids"][number, real])
        assert torch.equal(prompt.inputs["pixel_values"][0], batch["pixel_values"][number]) and prompt.located
        for fact in ("kind_BT", "image_BT", "tile_BT", "row_BT", "column_BT"):
            assert torch.equal(getattr(prompt.tokens, fact)[0], getattr(batch["tokens"], fact)[number, real]), fact
    assert {TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.VISION} == set(prompt.tokens.kinds)


def test_pictures_stand_where_the_marks_are_and_each_is_a_grid(prompter):
    pictures = [Image.new("RGB", (96, 96), shade) for shade in ("black", "white")]
    before = prompter("What ?", pictures, None).tokens
    marked = prompter("What <image> or <image> ?", pictures, "Be brief .").tokens
    for tokens in (before, marked):
        vision = tokens.kind_BT == TokenKind.VISION
        assert tokens.image_BT[vision].tolist() == [0] * 144 + [1] * 144
        assert tokens.row_BT[vision].tolist() == [n // 12 for n in range(144)] * 2
        assert tokens.column_BT[vision].tolist() == [n % 12 for n in range(144)] * 2
    kinds = marked.kind_BT[0].unique_consecutive().tolist()
    assert kinds == [TokenKind.SYSTEM, *[TokenKind.QUESTION, TokenKind.VISION] * 2, TokenKind.QUESTION]


def test_places_are_unknown_where_pictures_are_cut_into_tiles(prompter, monkeypatch):
    processor, read = prompter.processor, type(prompter.processor).__call__

    def tiled(*args, **kwargs):
        out = read(*args, **kwargs)
        out["pixel_values"] = out["pixel_values"][None]
        return out

    monkeypatch.setattr(type(processor), "__call__", tiled)
    prompt = prompter("What ?", [Image.new("RGB", (96, 96))], None)
    assert not prompt.located and prompt.tokens.count([TokenKind.VISION]) == (144,)


def test_what_cannot_be_a_prompt_is_refused(prompter):
    with pytest.raises(ValueError, match=r"'<image>' 1 times.*0 --image are given(.|\n)*Allowed(.|\n)*Take it out"):
        prompter("Is <image> a word ?", [], None)
    prompter.processor.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template(.|\n)*Allowed(.|\n)*Export"):
        prompter("What ?", [], None)


def test_pictures_are_read_as_those_of_a_dataset(tmp_path):
    gradient = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = Image.fromarray((gradient % 255).astype(np.uint8)).convert("P")
    Image.fromarray(gradient * 270).save(tmp_path / "deep.png")
    Image.fromarray((gradient % 255).astype(np.uint8)).convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    palette.save(tmp_path / "palette.gif")
    palette.convert("RGBA").save(tmp_path / "alpha.png")
    for name in ("deep.png", "turned.jpg", "palette.gif", "alpha.png"):
        ours, theirs = np.asarray(opened(tmp_path / name)), np.asarray(open_image(tmp_path, name, ""))
        assert (ours == theirs).all() and len(np.unique(ours)) > 100, name
    assert opened(tmp_path / "turned.jpg").size == (12, 20)


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (1, 500)).save(tmp_path / "slim.png")
    for name, said in {"none.png": "no such file", "text.png": "cannot be read", "slim.png": "1 x 500 pixels"}.items():
        with pytest.raises(ValueError, match=rf"--image .*{name}: .*{said}(.|\n)*Allowed: (.|\n)*\n"):
            opened(tmp_path / name)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt= "], "--prompt is empty"),
        (["--max_new_tokens=0"], "Allowed: at least 1"),
        (["--temperature=-1"], "--temperature -1"),
        (["--temperature=nan"], "--temperature nan"),
        (["--prompt=<image> ?"], "1 <image> marks, and 0 --image"),
        (["--image=a.png", "--image=b.png", "--prompt=<image> ?"], "1 <image> marks, and 2 --image"),
        (["--overlay=out.png"], "without a picture"),
        (["--image=a.png", "--overlay=out.jpg"], r"the path of a \.png file"),
        (["--image=a.png", "--overlay=nowhere/out.png"], "the folder nowhere is not there"),
        (["--image=a.png", "--image=o_1.png", "--overlay=o.png"], r"would overwrite the picture o_1\.png"),
    ],
)
def test_options_are_refused_in_three_parts(args, said):
    with pytest.raises(ValueError, match=said) as error:
        asked([*ASKED, *args])
    assert len(str(error.value).splitlines()) == 3 or "would overwrite" in said


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"--device teapot: (.|\n)*Allowed: auto, cpu"):
        _ = asked([*ASKED, "--device=teapot"]).place


def test_settings_of_the_folder_hold_unless_something_else_is_asked():
    own, tokenizer = tiny_llava().generation_config, type("T", (), {"eos_token_id": 2, "pad_token_id": None})()
    own.update(max_new_tokens=7, do_sample=True, temperature=0.3, top_p=0.5, num_beams=4, suppress_tokens=[9])
    greedy = generation_of(own, tokenizer, vision_token=5, longest=None, temperature=0.0)
    assert (greedy.max_new_tokens, greedy.do_sample, greedy.num_beams) == (7, False, 1)
    assert greedy.top_p is None and greedy.suppress_tokens == [9, 5] and own.suppress_tokens == [9]
    drawn = generation_of(own, tokenizer, vision_token=None, longest=3, temperature=0.8)
    assert (drawn.max_new_tokens, drawn.temperature, drawn.top_p, drawn.do_sample) == (3, 0.8, 0.5, True)
    own.max_new_tokens = None
    assert generation_of(own, tokenizer, vision_token=None, longest=None, temperature=0.0).max_new_tokens == 256


def test_words_are_written_at_once_without_leading_space(capsys, prompter):
    stream = Stream(prompter.tokenizer)
    stream.put(torch.tensor([[1, 2, 3]]))
    stream.on_finalized_text("  a ")
    assert capsys.readouterr().out == "a "
    stream.on_finalized_text(" b", stream_end=True)
    assert capsys.readouterr().out == " b\n" and stream.said == "a  b" and len(stream.times) == 1


@pytest.mark.parametrize(
    "plugin",
    [
        ProgressiveDepths(router=LinearRouter()),
        ThresholdDepths(placement=Every(3), routes=tuple(TokenKind)[1:], router=LinearRouter()),
    ],
    ids=["p-MoD", "thresholds"],
)
@torch.no_grad()
def test_the_table_says_what_a_loop_counts(plugin):
    model = tiny_llava().eval()
    tape = attach(model, {"depth": plugin})
    batch = padded([row(1, 6)])
    tokens, cache = facts(batch), DynamicCache()
    tokens.kind_BT[batch["labels"] != -100] = int(TokenKind.QUESTION)
    given = {name: value for name, value in batch.items() if name != "labels"}
    with tape.about(tokens), tape.recording() as records:
        model(**given, past_key_values=cache, use_cache=True)
        for token in (11, 12, 13):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    answer = Answer("", (0.5, 0.6, 0.7, 0.8), records, stored(cache))
    for layer, each in enumerate(entered(tokens, answer)):
        prompt, vision, said, own = 23, PATCHES, 3, [r for r in records if r.site.layer == layer]
        for record in own:
            for place, kept in enumerate(record.decision.keep_BT()[0].tolist()):
                prompt -= not kept and record.tokens.phase == "prefill"
                vision -= not kept and record.tokens.phase == "prefill" and 1 <= place <= PATCHES
                said -= not kept and record.tokens.phase == "decode"
        assert (each.place, each.prompt, each.vision, each.answer) == (str(layer), prompt, vision, said)
        assert answer.cache[layer].filled == prompt + said
    assert len(layers_table(tokens, answer).splitlines()) == 2 + 8
    assert all(name in layers_table(tokens, answer) for name in HEADER)
    told, whole = totals(tokens, answer, 1.0), 8 * 26 * 2 * 2 * 8 * 4
    held = sum(layer.bytes for layer in answer.cache)
    assert f"{held / 1024:.1f} KiB; dense it would be {whole / 1024:.1f} KiB ({held / whole:.0%})" in told
    assert "first token after 500.0 ms" in told and "then 100.0 ms each, 10.0 tokens a second" in told


def test_dense_bytes_are_those_of_the_layer_itself_or_of_another():
    cache = (StoredLayer(0, 10, 10, 1000, 1000), StoredLayer(1, 4, 4, 800, 800), StoredLayer(2, 0, 0, 0, 0))
    assert dense_bytes(cache, 20, routed=[1, 2]) == [1000, 4000, 2000]


def test_a_title_is_cut_to_the_sheet_and_colours_are_the_pictures_own():
    shade = torch.tensor([10, 120, 250]).view(3, 1, 1) / 255
    pixels = natural(((shade - 0.4) / 0.2).expand(3, 8, 8), [0.4] * 3, [0.2] * 3, scale=4)
    assert pixels.shape == (32, 32, 3) and (pixels == [10, 120, 250]).all()
    long, short = (sheet(title, [Tile("", pixels)] * 2, columns=2) for title in ("word " * 99, "w"))
    two = sheet("w\nw", [Tile("", pixels)] * 2, columns=2)
    assert long.shape == short.shape and two.shape[0] > short.shape[0]
    assert (long[:24, -6:] == 255).all() and (long[:24, -60:] < 128).any()
