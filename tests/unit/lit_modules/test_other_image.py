"""Pictures of other scenes in place of a question's own."""

from __future__ import annotations

import random

import torch

from lit_modules.other_image import next_other, with_other_images


def test_the_next_that_differs_round_the_end():
    assert next_other("aabca") == [2, 2, 3, 4, 2]
    assert next_other("aaa") is None and next_other("a") is None and next_other("") is None
    chance = random.Random(0)
    for _ in range(50):
        things = [chance.randrange(3) for _ in range(chance.randrange(2, 9))]
        if (order := next_other(things)) is None:
            assert len(set(things)) == 1
            continue
        for place, other in enumerate(order):
            n = (other - place) % len(things)
            assert things[other] != things[place]
            assert all(things[(place + step) % len(things)] == things[place] for step in range(n))


def test_questions_about_one_scene_get_the_picture_of_another():
    pixels = torch.stack([torch.full((3, 2, 2), float(scene)) for scene in (0, 0, 1, 2, 2)])
    batch = {"pixel_values": pixels, "ids": list("abcde")}
    other = with_other_images(batch)
    assert other["pixel_values"][:, 0, 0, 0].tolist() == [1, 1, 2, 0, 0]
    assert other["ids"] == batch["ids"] and batch["pixel_values"] is pixels
    assert with_other_images({"pixel_values": pixels[:2]}) is None
    assert with_other_images({"ids": ["a"]}) == {"ids": ["a"]}
