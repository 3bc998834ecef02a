"""A datamodule of random batches in the shape that the real ones have, for a TinyLlava without a folder."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from routing import TokenKind, Tokens

IMAGE_TOKEN, PATCHES, PROMPT, ANSWER = 255, 16, 4, 3


class StubTokenizer:
    """Writes token ids as numbers."""

    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(i) for i in row if i > 2) for row in ids.tolist()]


class StubData(LightningDataModule):
    """Random pictures, questions and answers.

    Args:
        batch_size: Rows of a batch.
        accumulate: Batches of an optimizer step.
        batches: Batches of a training epoch.
    """

    def __init__(self, batch_size: int = 2, accumulate: int = 1, batches: int = 4) -> None:
        super().__init__()
        self.batch_size, self.accumulate, self.batches = batch_size, accumulate, batches
        self.processor = SimpleNamespace(tokenizer=StubTokenizer())
        self.majority = {"count": "7", "read": "8"}
        self.groups: dict[str, tuple[str, ...]] = {}

    def summary(self) -> dict[str, object]:
        return {"train": SimpleNamespace(scenes=8, questions=8, kinds={"count": 8})}

    def train_dataloader(self) -> DataLoader[object]:
        batches = [training_batch(seed, self.batch_size) for seed in range(self.batches)]
        for first in range(0, len(batches), self.accumulate):
            window = batches[first : first + self.accumulate]
            for batch in window:
                batch["supervised_in_window"] = sum(len(b["positions_N"]) for b in window)
                batch["batches_in_window"] = len(window)
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[object]:
        return DataLoader([prompt_batch(seed, self.batch_size) for seed in range(2)], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


def training_batch(seed: int, rows: int, *, text_only: tuple[int, ...] = ()) -> dict[str, object]:
    """Right-padded rows; those listed in ``text_only`` have no image and are shorter."""
    random = torch.Generator().manual_seed(seed)
    length = PATCHES + PROMPT + ANSWER
    ids_BT = torch.randint(3, IMAGE_TOKEN, (rows, length), generator=random)
    kind_BT = torch.full_like(ids_BT, TokenKind.QUESTION)
    for row in range(rows):
        images = 0 if row in text_only else PATCHES
        supervised = ANSWER - row % ANSWER  # rows differ, or a mean of means would go unnoticed
        end = images + PROMPT + supervised
        ids_BT[row, :images], kind_BT[row, :images] = IMAGE_TOKEN, TokenKind.VISION
        kind_BT[row, end - supervised : end] = TokenKind.ANSWER
        ids_BT[row, end:], kind_BT[row, end:] = 0, TokenKind.PAD
    labels_BT = ids_BT.masked_fill(kind_BT != TokenKind.ANSWER, -100)
    positions_N = (labels_BT[:, 1:] != -100).nonzero() @ torch.tensor([length, 1])
    batch: dict[str, object] = {
        "input_ids": ids_BT,
        "attention_mask": (kind_BT != TokenKind.PAD).long(),
        "labels": labels_BT,
        "tokens": Tokens.of(kind_BT),
        "positions_N": positions_N,
        "targets_N": labels_BT.flatten()[positions_N + 1],
        "supervised_in_window": len(positions_N),
        "batches_in_window": 1,
    }
    if len(text_only) < rows:
        batch["pixel_values"] = torch.randn(rows - len(text_only), 3, 32, 32, generator=random)
    return batch


def prompt_batch(seed: int, rows: int) -> dict[str, object]:
    """Left-padded prompts of unlike length."""
    random = torch.Generator().manual_seed(1000 + seed)
    ids_BT = torch.randint(3, IMAGE_TOKEN, (rows, PATCHES + PROMPT), generator=random)
    kind_BT = torch.full_like(ids_BT, TokenKind.QUESTION)
    for row in range(rows):
        start = row % PROMPT
        ids_BT[row, :start], kind_BT[row, :start] = 0, TokenKind.PAD
        ids_BT[row, start : start + PATCHES], kind_BT[row, start : start + PATCHES] = IMAGE_TOKEN, TokenKind.VISION
    return {
        "input_ids": ids_BT,
        "attention_mask": (kind_BT != TokenKind.PAD).long(),
        "tokens": Tokens.of(kind_BT),
        "pixel_values": torch.randn(rows, 3, 32, 32, generator=random),
        "ids": [f"{seed}-{row}" for row in range(rows)],
        "questions": ["what?"] * rows,
        "kinds": ["count", "read", "unheard of"][:rows],
        "truths": ["7", "9", "1"][:rows],
    }
