"""Objects as plain data."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_modules import TinyLlava, to_spec
from plugins.progressive_depths import ProgressiveDepths
from routing import Layers, TokenKind, ZLoss


class Parent:
    def __init__(self, kinds: tuple[TokenKind, ...] = (TokenKind.VISION,), where: Path = Path("here")) -> None:
        self.kinds, self.where = kinds, where


class Child(Parent):
    def __init__(self, own: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.own = own


class Forgetful:
    def __init__(self, size: int) -> None:
        self.length = size


def test_plain_values_stay():
    assert to_spec({"a": [1, 2.5, None, True, "x"], 3: (TokenKind.PAD,)}) == {
        "a": [1, 2.5, None, True, "x"],
        3: ["PAD"],
    }


def test_objects_name_their_class_and_every_argument():
    spec = to_spec(ProgressiveDepths(Layers((1, -1)), losses=(ZLoss(0.5),)))
    assert spec["class_path"] == "plugins.progressive_depths.ProgressiveDepths"
    assert spec["init_args"]["placement"] == {"class_path": "routing.Layers", "init_args": {"layers": [1, -1]}}
    assert spec["init_args"]["losses"] == [
        {"class_path": "routing.ZLoss", "init_args": {"weight": 0.5, "over": "batch"}}
    ]
    assert to_spec(TinyLlava) == "lit_modules.TinyLlava"


def test_arguments_that_go_to_a_parent_are_kept_too():
    assert to_spec(Child(1, where=Path("there")))["init_args"] == {"own": 1, "kinds": ["VISION"], "where": "there"}


def test_an_argument_that_is_not_kept_is_an_error():
    with pytest.raises(ValueError, match=r"Forgetful.*'size'.*\nKeep it"):
        to_spec(Forgetful(3))
