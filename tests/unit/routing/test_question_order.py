"""What a router may know of the question: nothing where the picture stands first, something where it stands last."""

import pytest
import torch

from plugins.fast_v import FastV
from plugins.progressive_depths import ProgressiveDepths
from routing import LinearRouter, attach
from tests.tiny import IMAGE, PATCHES, padded, tiny_llava

PICTURE = [IMAGE] * PATCHES
ASKED, OTHER = [7, 8, 9, 10], [70, 80, 90, 100]


def kept(plugin, before: list[int], after: list[int]) -> list[torch.Tensor]:
    """The decisions of each layer about the vision tokens of one row."""
    model = tiny_llava()
    tape = attach(model, {"depth": plugin})
    batch = padded([[1, *before, *PICTURE, *after]], answers=1)
    with tape.recording() as records, torch.no_grad():
        model.eval()(**batch, use_cache=False)
    vision = batch["input_ids"][0] == IMAGE
    return [record.decision.keep_BT()[0, vision] for record in records]


def differing(plugin, question_first: bool) -> int:
    """How many layers decide otherwise when another question is asked about the same picture."""
    orders = [(question, [6]) if question_first else ([], [*question, 6]) for question in (ASKED, OTHER)]
    first, second = (kept(plugin, *order) for order in orders)
    return sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_with_the_picture_first_no_selection_depends_on_the_question(seed):
    torch.manual_seed(seed)
    assert differing(ProgressiveDepths(router=LinearRouter(std=0.5)), question_first=False) == 0


def test_with_the_question_first_it_can():
    assert differing(ProgressiveDepths(router=LinearRouter(std=0.5)), question_first=True) > 0


def test_rules_that_look_at_the_questions_attention_know_it_in_either_order():
    assert differing(FastV(), question_first=False) > 0
    assert differing(FastV(), question_first=True) > 0
