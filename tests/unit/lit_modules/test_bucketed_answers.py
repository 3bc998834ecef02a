"""An uneven batch of questions is read in groups of like length, and answered as if it were not."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer

from lit_modules import Generation, RoutedVLM, TinyLlava, routed_vlm
from lit_modules.phases import PhaseTally
from plugins.progressive_depths import ProgressiveDepths
from routing import TokenKind, Tokens
from stub_data import IMAGE_TOKEN, PATCHES, StubData, prompt_batch


@pytest.fixture(scope="module")
def module() -> RoutedVLM:
    torch.manual_seed(0)
    tiny = TinyLlava(layers=3, width=16, heads=2, hidden=32)
    module = RoutedVLM(tiny, {"depth": ProgressiveDepths()}, generation=Generation(max_new_tokens=3, blank_batches=0))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(module, StubData(batch_size=3), verbose=False)
    module.trainer = trainer
    trainer.fit_loop = None
    return module.eval()


def uneven() -> dict[str, object]:
    """Questions of which the second and the fourth show nothing."""
    batch = prompt_batch(0, 4)
    ids_BT, kind_BT = batch["input_ids"], batch["tokens"].kind_BT.clone()
    for row in (1, 3):
        seen_T = ids_BT[row] == IMAGE_TOKEN
        text = ids_BT[row][kind_BT[row] == TokenKind.QUESTION]
        assert int(seen_T.sum()) == PATCHES
        ids_BT[row], kind_BT[row] = 0, TokenKind.PAD
        ids_BT[row, -len(text) :], kind_BT[row, -len(text) :] = text, TokenKind.QUESTION
    mask_BT = (kind_BT != TokenKind.PAD).long()
    pixels = {"pixel_values": batch["pixel_values"][[0, 2]], "pictures": [1, 0, 1, 0]}
    return {**batch, **pixels, "attention_mask": mask_BT, "tokens": Tokens.of(kind_BT, phase="prefill")}


@torch.no_grad()
def test_answers_of_groups_are_those_of_the_batch(module):
    read, batch = [], uneven()
    hook = (
        module.model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[:2]))
    )
    grouped, shapes = module.answers(batch), [tuple(shape) for shape in read if shape[1] > 1]
    read.clear()
    plain = module.answers({name: value for name, value in batch.items() if name != "pictures"})
    hook.remove()
    assert [rows for rows, _ in shapes] == [2, 2] and shapes[0][1] < shapes[1][1] == PATCHES + 4
    assert tuple(read[0]) == (4, PATCHES + 4)
    assert grouped == plain and len(set(grouped)) > 1


@torch.no_grad()
def test_a_monitor_that_counts_them_does_not_keep_rows_together(module):
    counts, read, batch = [], [], uneven()
    hook = module.model.get_decoder().layers[0].register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    for pictures in (True, False):
        tally = PhaseTally()
        with tally.counting(module.model, module.tape, 2):
            module.answers(batch if pictures else {name: x for name, x in batch.items() if name != "pictures"})
        counts.append(tally.counts())
    hook.remove()
    assert read[:2] == [2, 2] and 4 in read
    assert counts[0] == counts[1] and counts[0].prompt


def test_ranks_that_share_layers_read_in_one_piece(module, monkeypatch):
    asked = []

    def stop(*_: object, most: int) -> None:
        asked.append(most)
        raise InterruptedError

    monkeypatch.setattr(routed_vlm, "in_buckets", stop)
    for mesh in (None, object()):
        monkeypatch.setattr(module, "_device_mesh", mesh)
        with pytest.raises(InterruptedError):
            module.answers(uneven())
    assert asked == [4, 1]
