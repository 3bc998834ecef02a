"""Good LLaVA records, and what can be wrong with them."""

from __future__ import annotations

import copy
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

Entry = dict[str, Any]
Damage = Callable[[Random, Entry], str | None]
NESTED = {"from": "human", "value": [{"from": "gpt", "value": "x"}]}
JUNK = [None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", " ", "\0", "\ud800", "yes " * 900, [], {}]
JUNK += [[[]], [None], {"a": {"b": []}}, "<image>", ["a.png", 3], NESTED, [NESTED], "../a.png", "no.png", "</s>", "\n"]

# name -> the reason it is refused for, None where it is a picture like others
PICTURES = {
    **dict.fromkeys(("a.png", "b.jpg", "wrong_suffix.jpg", "one_pixel.png", "slim.png", "inside_link.png", "a.png/")),
    **dict.fromkeys(
        ("cmyk.jpg", "palette.png", "deep.png", "grey.png", "rgba.png", "moving.gif", "turned.jpg", "deep.tif")
    ),
    **dict.fromkeys(
        ("text.png", "cut.jpg", "cut.png", "empty.png", "bomb.png", "floats.tif", "program.eps"), "image unreadable"
    ),
    **dict.fromkeys(("no.png", "folder", ".", "dangling.png"), "image missing"),
    **dict.fromkeys(("../secret.png", "outside_link.png", "/etc/hostname", "folder/../../secret.png"), "image outside"),
    **dict.fromkeys(("nul\0.png", "half\ud800.png", "loop.png"), "image path"),
    "too_slim.png": "image too slim",
    "long" * 100: "image path",
}


def draw(folder: Path) -> None:
    """Writes the pictures into ``folder``, and one beside it."""
    (folder / "folder").mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    for name in ("a.png", "b.jpg", "wrong_suffix.jpg", "../secret.png"):
        noise.save(folder / name, format="JPEG" if name == "b.jpg" else "PNG")
    for name, mode in (("cmyk.jpg", "CMYK"), ("palette.png", "P"), ("grey.png", "L"), ("rgba.png", "RGBA")):
        noise.convert(mode).save(folder / name)
    Image.fromarray(np.linspace(0, 65535, 768).reshape(24, 32).astype(np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.linspace(0, 65535, 768).reshape(24, 32).astype(np.int32)).save(folder / "deep.tif")
    noise.convert("F").save(folder / "floats.tif")
    noise.save(folder / "program.eps")
    noise.save(folder / "moving.gif", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise.save(folder / "turned.jpg", exif=exif)
    for name, size in (("one_pixel.png", (1, 1)), ("slim.png", (3, 200)), ("too_slim.png", (1, 5000))):
        Image.new("RGB", size).save(folder / name)
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").touch()
    for name in ("cut.jpg", "cut.png"):
        whole = io.BytesIO()
        noise.save(whole, format="JPEG" if name == "cut.jpg" else "PNG")
        (folder / name).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (folder / "bomb.png").write_bytes(bomb())
    for name, target in (("outside_link.png", "../secret.png"), ("inside_link.png", "a.png"), ("loop.png", "loop.png")):
        (folder / name).symlink_to(target)
    (folder / "dangling.png").symlink_to("nowhere.png")


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it has 60000 x 60000 pixels."""
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0)) + _chunk(b"IDAT", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def good(rng: Random, number: int) -> Entry:
    """One or two questions about none to two pictures."""
    images = rng.choice([[], ["a.png"], ["a.png"], ["b.jpg", "a.png"]])
    said = []
    for turn in range(rng.choice([1, 1, 2])):
        pictures = "<image>\n" * len(images) * (turn == 0)
        said.append({"from": rng.choice(["human", "user"]), "value": f"{pictures}Is there a {turn} ?"})
        answer = {"from": rng.choice(["gpt", "assistant"]), "value": rng.choice(["yes", "no", "4 7"])}
        said.append(answer | rng.choice([{}, {"kind": "exists", "evidence": [3, 4]}]))
    entry: Entry = {"id": f"r{number}", "conversations": said}
    return entry | ({"image": images[0] if len(images) == 1 else images} if images else {})


def _one_picture(rng: Random, entry: Entry) -> str | None:
    entry["conversations"] = [{"from": "human", "value": "<image>\nIs there a 4 ?"}, {"from": "gpt", "value": "no"}]
    entry["image"] = rng.choice(list(PICTURES))
    return PICTURES[entry["image"]]


def _setting(reason: str | None, key: str, *values: Any, turn: int | None = None) -> Damage:
    def damage(rng: Random, entry: Entry) -> str | None:
        place = entry if turn is None else entry["conversations"][turn]
        place[key] = copy.deepcopy(rng.choice(values))
        return reason

    return damage


def _changing(reason: str | None, change: Callable[[Entry], object]) -> Damage:
    def damage(rng: Random, entry: Entry) -> str | None:
        change(entry)
        return reason

    return damage


SYSTEM = {"from": "system", "value": "Be brief ."}
# Each damages a good record, and says for what reason it is to be refused; None: it is to be used all the same.
DAMAGES = [
    _one_picture,
    _setting("no conversation", "conversations", None, 3, "x", {}, {"from": "human"}),
    _setting("roles do not alternate", "conversations", [], [SYSTEM], [SYSTEM, SYSTEM]),
    _setting("unknown role", "conversations", ["x"], [None], [[NESTED]], [{}], [3.5]),
    _setting("unknown role", "from", "robot", "", None, 3, [], {"a": 1}, "Human", "\ud800", turn=0),
    _setting("roles do not alternate", "from", "gpt", "assistant", turn=-2),
    _setting("no text", "value", None, 3, 1.5, True, [], {}, ["<image>"], NESTED, turn=-1),
    _setting("empty answer", "value", "", " ", "\n\t", turn=-1),
    _setting("image in answer", "value", "<image>", "see <image> there", turn=-1),
    _setting("not Unicode", "value", "half \ud800", "\udfff yes", turn=-1),
    _setting(None, "value", "nul \0 in it", "</s> 4", "<pad> <unk>", "{{ 1 / 0 }} {% raw %}", "é\u200b", turn=-1),
    _setting("too long", "value", "yes " * 900, turn=-1),
    _setting("image count", "image", ["a.png"] * 7),
    _setting("image path", "image", 3, 1.5, True, {}, {"path": "a.png"}, [None], [["a.png"]], ["a.png", ""], ""),
    _setting("image order", "image_order", "last", 3, [], {}, ["first"], ""),
    _setting(None, "image_order", None, "first", "as_written"),
    _setting("id", "id", [], {}, ["r1"], {"a": 1}),
    _setting("not Unicode", "id", "\ud800"),
    _setting(None, "id", None, float("nan"), 3, 1.5, "", "\0", "twice", "x" * 5000),
    _setting("evidence", "evidence", 3, "3", {}, [1.5], ["3"], [-1], [None], [True], [[1]], turn=-1),
    _setting("kind", "kind", 3, "", " ", [], {}, turn=-1),
    _setting(None, "kind", None, turn=-1),
    _setting(None, "other", *JUNK),
    _changing(None, lambda e: e["conversations"].insert(0, dict(SYSTEM))),
    _changing(None, lambda e: e["conversations"].insert(0, SYSTEM | {"value": ""})),
    _changing(None, lambda e: e["conversations"].insert(0, SYSTEM | {"value": "nul \0"})),
    _changing("image in system", lambda e: e["conversations"].insert(0, SYSTEM | {"value": "<image>"})),
    _changing("roles do not alternate", lambda e: e["conversations"].insert(2, dict(SYSTEM))),
    _changing("roles do not alternate", lambda e: e["conversations"].pop()),
    _changing("roles do not alternate", lambda e: e["conversations"].insert(1, dict(e["conversations"][0]))),
    _changing(None, lambda e: e["conversations"].insert(0, {"from": "gpt", "value": "Hi"})),
    _changing(None, lambda e: e.pop("id")),
    _changing("no conversation", lambda e: e.pop("conversations")),
    _changing("unknown role", lambda e: e["conversations"][-1].pop("from")),
    _changing("no text", lambda e: e["conversations"][-1].pop("value")),
    _changing("image count", lambda e: e["conversations"][0].update(value="<image>" * 9)),
]


def fuzz(rng: Random, entry: Entry) -> Any:
    """Replaces, deletes or doubles something anywhere in a record, or gives another value instead of it."""
    if rng.random() < 0.02:
        return rng.choice(JUNK)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(list(_places(entry)))
        match rng.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 2 if isinstance(holder, dict):
                holder[rng.choice(["from", "value", "image", "kind", "evidence", "id"])] = copy.deepcopy(
                    rng.choice(JUNK)
                )
            case _:
                holder[key] = copy.deepcopy(rng.choice([*JUNK, *PICTURES]))
    return entry


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, below in inside:
        yield value, key
        yield from _places(below)
    if not inside and isinstance(value, dict):
        value["from"] = "human"
        yield value, "from"
