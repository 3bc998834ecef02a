"""A conversation as tokens: which of them are supervised, what each of them is, where in its picture it stands.

Shape suffixes: T tokens, N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor
from transformers import ProcessorMixin

from datamodules.images import open_image
from datamodules.records import MARKER, Record, Turn, refusal
from datamodules.templates import Message, Rendered, Template, render
from routing.tokens import NOWHERE, TokenKind

READ = {"input_ids", "attention_mask", "pixel_values", "token_type_ids", "mm_token_type_ids"}  # of a processor's output
IGNORED = -100  # label of a token that is not supervised
UNKNOWN = -1  # evidence of a vision token about which nobody said anything


@dataclass(frozen=True)
class Encoded:
    """One row of a batch.

    Args:
        ids_T: Token numbers, int64.
        kind_T: ``TokenKind`` of each token, int8.
        place_4T: Picture, tile, row and column of vision tokens, -1 elsewhere, int16 (4, T).
        evidence_T: 1 on vision tokens that one has to look at, 0 elsewhere; -1 on vision tokens if nobody knows. int8.
        pixels: Pictures as the vision tower takes them (N, …); None for none.
        number: Belongs to the record and the question, everywhere and always.
    """

    ids_T: Tensor
    kind_T: Tensor
    place_4T: Tensor
    evidence_T: Tensor
    pixels: Tensor | None
    number: int

    @property
    def labels_T(self) -> Tensor:
        """The token numbers where supervised, -100 elsewhere."""
        return labels(self.ids_T, self.kind_T)


def labels(ids: Tensor, kind: Tensor) -> Tensor:
    """The token numbers of the answers, -100 elsewhere."""
    return torch.where(kind == TokenKind.ANSWER, ids, IGNORED)


@dataclass(frozen=True)
class Encoder:
    """Turns records into rows.

    Args:
        processor: Hugging Face processor with a tokenizer and an image processor.
        template: How a conversation becomes text.
        image_folder: Where the records' image paths begin.
        max_length: Tokens of a row at most, pictures included.
    """

    processor: ProcessorMixin
    template: Template
    image_folder: Path
    max_length: int

    def conversation(self, record: Record) -> Encoded:
        """The whole conversation, to learn from: at least one token is supervised."""
        encoded = self._encode(record, self.template.conversation(record), record.turns, record.id)
        if not bool((encoded.labels_T[1:] != IGNORED).any()):
            raise refusal(record.where, "no token of it is supervised", "answers with words", "nothing supervised")
        return encoded

    def question(self, record: Record, turn: int) -> Encoded:
        """One question, to be answered."""
        messages = self.template.question(record, turn)
        return self._encode(record, messages, record.turns[turn : turn + 1], f"{record.id}/{turn}")

    def _encode(self, record: Record, messages: list[Message], turns: Sequence[Turn], name: str) -> Encoded:
        tokenizer = self.processor.tokenizer
        image_token = self.processor.image_token
        rendered = render(self.template, messages, {"eos_token": tokenizer.eos_token, "image_token": image_token})
        wanted = sum(part["type"] == "image" for message in messages for part in message["content"])
        if wanted != rendered.text.count(image_token):
            given = f"its text holds {image_token!r}, which stands for a picture to this model"
            raise refusal(record.where, given, f"pictures given as {MARKER}", "image in text")
        images = [open_image(self.image_folder, path, record.where) for path in record.images[:wanted]]
        written = tokenizer(rendered.text, return_offsets_mapping=True, verbose=False)
        text_ids, kinds = torch.tensor(written["input_ids"]), _kinds(rendered, written["offset_mapping"])
        ids, pixels = text_ids, None
        if images:
            out = self.processor(text=[rendered.text], images=images, return_tensors="pt")
            ids, pixels = out["input_ids"][0], out["pixel_values"]
            if unread := set(out) - READ:
                raise ValueError(
                    f"{type(self.processor).__name__} also gives {', '.join(sorted(unread))}, which batches do not"
                    " carry: use a model that takes pictures of one size, as LLaVA-1.5 does."
                )
        if len(ids) > self.max_length:
            given, allowed = f"it has {len(ids)} tokens", f"at most {self.max_length} tokens, which is max_length"
            raise refusal(record.where, given, allowed, "too long", "Raise max_length, shorten the record")
        vision, vision_before = ids == self.processor.image_token_id, text_ids == self.processor.image_token_id
        if int((~vision).sum()) != int((~vision_before).sum()):
            raise ValueError(
                f"{type(self.processor).__name__} adds tokens of its own around pictures, so answers cannot be told"
                " from the rest: use a processor that repeats its image token only, such as LlavaProcessor."
            )
        kind = torch.full_like(ids, TokenKind.VISION, dtype=torch.int8)
        kind[~vision] = kinds[~vision_before]
        place = _places(vision, pixels, self.processor)
        return Encoded(ids, kind, place, _evidence(turns, vision, place), pixels, crc32(name.encode()))


def _kinds(rendered: Rendered, offsets: list[tuple[int, int]]) -> Tensor:
    """The part that each token of the unexpanded text plays; a token belongs to an answer if any of it does."""
    begin, end = torch.tensor(offsets).unbind(1)
    kind = torch.where(end <= rendered.head, int(TokenKind.SYSTEM), int(TokenKind.QUESTION)).to(torch.int8)
    for start, stop in rendered.answers:
        kind[(end > start) & (begin < stop)] = TokenKind.ANSWER
    return kind


def _places(vision: Tensor, pixels: Tensor | None, processor: ProcessorMixin) -> Tensor:
    """Picture, tile, row and column, where every picture is one grid of patches; unknown rows and columns otherwise."""
    place = torch.full((4, len(vision)), NOWHERE, dtype=torch.int16)
    place[:2, vision] = 0
    patch = getattr(processor, "patch_size", None)
    if pixels is None or patch is None or pixels.ndim != 4:
        return place
    rows, columns = (side // patch for side in pixels.shape[-2:])
    if int(vision.sum()) == len(pixels) * rows * columns:
        number = torch.arange(int(vision.sum()))
        image, patch_number = number // (rows * columns), number % (rows * columns)
        tile = torch.zeros_like(image)
        place[:, vision] = torch.stack([image, tile, patch_number // columns, patch_number % columns]).to(torch.int16)
    return place


def _evidence(turns: Sequence[Turn], vision: Tensor, place_4T: Tensor) -> Tensor:
    """1 on the vision tokens that any of the questions needs, 0 elsewhere.

    -1 on all vision tokens where that is not known: if a question names no patch, if one names a patch that the row
    does not have, or if tokens are not patches.
    """
    evidence = torch.zeros(len(vision), dtype=torch.int8)
    patches = vision.nonzero().flatten()
    needed = sorted({number for turn in turns for number in turn.evidence})
    named = all(turn.evidence for turn in turns) and needed[-1] < len(patches)
    if named and bool((place_4T[2, patches] != NOWHERE).all()):
        evidence[patches[needed]] = 1
    else:
        evidence[patches] = UNKNOWN
    return evidence
