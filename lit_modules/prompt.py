"""A question as a model reads it, and what is known about its tokens.

Shape suffixes: B batch (one row), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lit_modules.generate_options import MARKER
from lit_modules.prompt_facts import Written, kinds, places
from routing import TokenKind, Tokens

Message = Mapping[str, object]
NO_TOKEN = -1
MARK = "\0"  # stands where the user's words begin; no prompt holds it


@dataclass(frozen=True)
class Prompt:
    """What goes into ``generate``.

    Args:
        inputs: Keyword arguments of the forward.
        tokens: Facts about them.
        pictures: How many there are.
    """

    inputs: Mapping[str, Tensor]
    tokens: Tokens
    pictures: int

    @property
    def located(self) -> bool:
        """Whether the place of each patch in its picture is known."""
        vision_BT = self.tokens.kind_BT == TokenKind.VISION
        return bool(vision_BT.any()) and bool((self.tokens.row_BT[vision_BT] >= 0).all())


@dataclass(frozen=True)
class Prompter:
    """Makes prompts for one model.

    Args:
        processor: Processor of the model, or the tokenizer of one that reads text alone.
        vision_token: Number of the token that stands for a patch; None for a model that reads text alone.
        like_llava: Whether a line break follows a picture where the chat template puts nothing, as LLaVA is trained.
    """

    processor: ProcessorMixin | PreTrainedTokenizerBase
    vision_token: int | None
    like_llava: bool

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processor, "tokenizer", self.processor)

    def __call__(self, words: str, images: Sequence[Image], system: str | None) -> Prompt:
        """Renders the chat template, and reads the pictures as the model's processor does.

        Raises:
            ValueError: there is no chat template, or the words hold the token that stands for a picture.
        """
        told = [] if system is None else [self._message("system", [_text(system)])]
        text = self._rendered([*told, self._message("user", self._content(words, len(images)))])
        self._check_pictures(text, len(images))
        bos = self.tokenizer.bos_token
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        if isinstance(self.processor, ProcessorMixin):
            out = self.processor(text=[text], images=list(images) or None, return_tensors="pt", **special)
        else:
            out = self.processor([text], return_tensors="pt", **special)
        inputs = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        vision_BT = inputs["input_ids"] == (NO_TOKEN if self.vision_token is None else self.vision_token)
        kind_BT = kinds(inputs["input_ids"], vision_BT, self._written(text, self._head(text, told), special))
        patch = getattr(self.processor, "patch_size", None)
        image, tile, row, column = places(vision_BT, inputs.get("pixel_values"), len(images), patch)
        id_B = torch.tensor([crc32(text.encode())])
        tokens = Tokens.of(kind_BT, image_BT=image, tile_BT=tile, row_BT=row, column_BT=column, id_B=id_B)
        return Prompt(inputs, tokens.during("prefill", 1.0), len(images))

    def _message(self, role: str, content: list[Message]) -> Message:
        """Text models' templates want plain words."""
        if isinstance(self.processor, ProcessorMixin):
            return {"role": role, "content": content}
        return {"role": role, "content": "".join(str(part["text"]) for part in content)}

    def _content(self, words: str, pictures: int) -> list[Message]:
        if MARKER in words and pictures:
            first, *others = words.split(MARKER)
            content = [] if not first else [_text(first)]
            for other in others:
                content += [{"type": "image"}, *([_text(other)] if other else [])]
            return content
        gap = self._gap() if pictures else ""
        content = [part for _ in range(pictures) for part in ({"type": "image"}, _text(gap))]
        merged = [part for part in content[:-1] if part.get("text") != ""]
        return [*merged, _text(gap + words.strip())]

    def _gap(self) -> str:
        """What stands between a picture and the words, unless the chat template puts something there."""
        if not self.like_llava:
            return ""
        before = self._rendered([self._message("user", [{"type": "image"}, _text(MARK)])]).partition(MARK)[0]
        return "\n" if before.endswith(self._image_token()) else ""

    def _image_token(self) -> str:
        return str(getattr(self.processor, "image_token", MARKER))

    def _rendered(self, messages: Sequence[Message]) -> str:
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{type(self.processor).__name__} of this model has no chat template.\nAllowed: a folder with"
                " chat_template.jinja.\nExport the model with its data, or put the template of its training there."
            )
        return str(self.processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))

    def _check_pictures(self, text: str, pictures: int) -> None:
        if self.vision_token is None or not hasattr(self.processor, "image_token"):
            return
        token = self.tokenizer.convert_ids_to_tokens(self.vision_token)
        if token == self._image_token() and text.count(token) != pictures:
            raise ValueError(
                f"The prompt holds {token!r} {text.count(token)} times, which stands for a picture to this model, and"
                f" {pictures} --image are given.\nAllowed: one for each picture.\nTake it out of the words, or give"
                " the pictures."
            )

    def _head(self, text: str, told: list[Message]) -> int:
        """Characters before the user's words and pictures; 0 where that is not known."""
        marked = self._rendered([*told, self._message("user", [_text(MARK)])])
        head = marked.rfind(MARK)
        return head if head > 0 and text[:head] == marked[:head] else 0

    def _written(self, text: str, head: int, special: Mapping[str, bool]) -> Written | None:
        """The text's tokens before pictures are unfolded; None where it cannot be told which part is whose."""
        if not head or not self.tokenizer.is_fast:
            return None
        written = self.tokenizer(text, return_offsets_mapping=True, verbose=False, **special)
        ids_T, ends_T = (
            torch.tensor(values) for values in (written["input_ids"], [e for _, e in written["offset_mapping"]])
        )
        vision_T = ids_T == (NO_TOKEN if self.vision_token is None else self.vision_token)
        return Written(ids_T[~vision_T], (ends_T <= head)[~vision_T])


def _text(words: str) -> Message:
    return {"type": "text", "text": words}
