"""One answer: streamed while it is made, with what routing did and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lit_modules.exported_model import tape_of
from lit_modules.prompt import Prompt
from lit_modules.routed_vlm import KERNELS
from routing import RoutingRecord, StoredLayer, stored


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    Args:
        text: The words.
        seconds: When each token was there, the first one counted from the start of the prefill.
        records: What the gates decided, first forward first.
        cache: What the key-value cache held at the end.
    """

    text: str
    seconds: tuple[float, ...]
    records: Sequence[RoutingRecord]
    cache: tuple[StoredLayer, ...]

    @property
    def read(self) -> int:
        """Tokens of the answer that the model read again: all but the last."""
        return len(self.seconds) - 1


class Stream(TextStreamer):
    """Writes words to stdout as they are ready, and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self.said = ""

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        self.times.append(perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Words that will not change any more."""
        text = text if self.said else text.lstrip()
        self.said += text
        super().on_finalized_text(text, stream_end)


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, generation: GenerationConfig
) -> Answer:
    """Generates, streaming to stdout."""
    stream, tape, device = Stream(tokenizer), tape_of(model), model.device
    inputs = {k: v.to(device, model.dtype if v.is_floating_point() else v.dtype) for k, v in prompt.inputs.items()}
    with tape.about(prompt.tokens.to(device)), tape.recording() as records, sdpa_kernel(KERNELS), torch.no_grad():
        out = model.generate(**inputs, generation_config=generation, streamer=stream)
    start, *times = stream.times
    held = stored(out.past_key_values)
    return Answer(stream.said.strip(), tuple(time - start for time in times), records, held)
