"""How an answer is generated: by the folder's own settings, under those of a command line."""

from __future__ import annotations

from copy import deepcopy

from transformers import GenerationConfig, PreTrainedTokenizerBase

LONGEST = 256  # tokens of an answer, where nobody says


def generation_of(
    own: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vision_token: int | None,
    longest: int | None,
    temperature: float,
) -> GenerationConfig:
    """The folder's ``own`` settings, with the options of the command line over them; one answer, token by token."""
    generation = deepcopy(own)
    generation.max_new_tokens = longest or generation.max_new_tokens or LONGEST
    generation.num_beams = generation.num_return_sequences = 1
    generation.return_dict_in_generate = generation.use_cache = True
    generation.do_sample = temperature > 0
    generation.temperature = temperature or None
    if not temperature:
        generation.top_p = generation.top_k = None
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if vision_token is not None:
        # A model that answers with an image token would be asked for that image in the next step.
        generation.suppress_tokens = list(dict.fromkeys([*(generation.suppress_tokens or []), vision_token]))
    return generation
