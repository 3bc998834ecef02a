"""``lit generate``: a picture and a question to a model folder, and the answer as it is made."""

from __future__ import annotations

import os
import sys
from time import perf_counter

import torch
from transformers.utils import logging

from lit_modules import generation_report, overlay
from lit_modules.answering import answer
from lit_modules.exported_model import ModelFolder
from lit_modules.generate_arguments import asked
from lit_modules.generate_options import Asked
from lit_modules.generation_settings import generation_of
from lit_modules.given_pictures import opened
from lit_modules.prompt import Prompter


def generate(args: list[str]) -> None:
    """Answers on stdout; everything else goes to stderr.

    Raises:
        ValueError: an option is wrong; found before weights are loaded, wherever it can be.
    """
    given = asked(args)
    try:
        respond(given)
    except BrokenPipeError:  # `| head` has read enough; what is left must not be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def respond(given: Asked) -> None:
    """One question, one answer, a table, pictures."""
    images = [opened(path) for path in given.images]
    folder, place = ModelFolder.opened(given.model), given.place
    if given.overlay is not None and not folder.routed:
        raise ValueError(
            f"--overlay {given.overlay}: {given.model} is dense, every layer keeps every patch.\nAllowed: with a routed"
            " model.\nLeave --overlay out, or give a folder whose config.json says how it is routed."
        )
    if images and not folder.sees:
        raise ValueError(
            f"--image {given.images[0]}: {given.model} ({folder.config.model_type}) reads text alone.\nAllowed:"
            " pictures for a vision-language model.\nLeave --image out, or give another --model."
        )
    if given.quiet:
        logging.disable_progress_bar()
    processor = folder.processor()
    prompt = Prompter(processor, folder.vision_token, folder.like_llava)(given.prompt, images, given.system)
    if given.overlay is not None and not prompt.located:
        raise ValueError(
            f"--overlay {given.overlay}: where the patches of {type(processor).__name__} stand is not known.\nAllowed:"
            " pictures that are one grid of patches, not tiles.\nLeave --overlay out."
        )
    start = perf_counter()
    model = folder.model(dtype=given.dtype, attention=given.attention, device=place)
    loading = perf_counter() - start
    tokenizer = getattr(processor, "tokenizer", processor)
    generation = generation_of(
        model.generation_config,
        tokenizer,
        vision_token=folder.vision_token,
        longest=given.max_new_tokens,
        temperature=given.temperature,
    )
    torch.manual_seed(given.seed)
    said = answer(model, tokenizer, prompt, generation)
    if not given.quiet:
        print(f"\n{generation_report.told(prompt.tokens, said, loading, given.model)}", file=sys.stderr)
    if given.overlay is not None:
        overlay.draw(given, prompt, said, processor.image_processor)
