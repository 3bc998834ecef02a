"""What ``generate`` may be asked of a routed model, and what it tells the gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig, PreTrainedConfig

from routing.applied import Routing
from routing.compiled_step import CompiledStep, Forward
from routing.gate import Gate
from routing.layer import RoutedLayer
from routing.observer import observed
from routing.routed_mlp import RoutedMLP
from routing.select import Selector
from routing.tokens import TokenKind

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class Generating(nn.Module):
    """Mixin over a model's class: ``generate`` as transformers has it, refused where it could not be right.

    Gates are told where the prompt ends, so that chunks of it, and further turns, meet the rule of ``prefill``, and all
    that was generated, candidates of an assistant included, the rule of ``decode``.
    """

    routing: Routing
    config: PreTrainedConfig
    generation_config: GenerationConfig
    _compiled: CompiledStep | None = None

    def generate(self, inputs: Tensor | None = None, *args: object, **kwargs: object) -> object:
        """See ``transformers.GenerationMixin.generate``.

        Raises:
            ValueError: an assistant, under rules that differ between prompts and answers; paged caches; early exit.
        """
        config = cast(GenerationConfig | None, args[0] if args else kwargs.get("generation_config"))
        asked = Asked(kwargs, config or self.generation_config)
        refuse(asked, [part.gate for part in self.modules() if isinstance(part, RoutedLayer | RoutedMLP)])
        ids, mask = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("attention_mask")
        generate: Callable[..., object] = super().generate  # type: ignore[misc, explicit-any]
        if not isinstance(ids, Tensor):
            return generate(inputs, *args, **kwargs)
        tape, mask = self.routing.tape, mask if isinstance(mask, Tensor) else None
        whole = ids if mask is None else mask
        if mask is not None and bool((mask[:, -1] == 0).any()):
            raise ValueError(RIGHT)
        if asked("prefill_chunk_size") and kwargs.get("pixel_values") is not None and not self._reads_encoded():
            raise ValueError(CHUNKED)
        facts = tape.announced
        if facts is None and whole.shape == ids.shape:
            # A static cache's masks no longer tell what is padding.
            facts = observed(ids, mask, cast(int, self.config.image_token_id))
        with tape.answering(whole.shape[1]), tape.about(facts):
            return generate(inputs, *args, **kwargs)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Forward:
        """What ``generate`` decodes with after a static cache, on an accelerator or where it is told to.

        Steps in which a whole layer decides run eagerly.
        """
        config = compile_config or cast(CompileConfig, self._default_compile_config())  # type: ignore[operator]
        if self._compiled is None or not self._compiled.fits(config):
            force = partial(getattr, self.config.get_text_config(), "_attn_implementation")
            self._compiled = CompiledStep(self, self.routing.tape, force, config)
        return self._compiled

    def _reads_encoded(self) -> bool:
        """Whether pictures may come encoded, as generate() then passes them on chunk by chunk."""
        forward = cast(object, self.forward)
        return "mm_encoder_outputs" in inspect.signature(cast(Callable[[], object], forward)).parameters

    def generate_batch(self, *args: object, **kwargs: object) -> object:
        """Not supported.

        Raises:
            ValueError: always; its caches are paged.
        """
        raise ValueError(PAGED)


PAGED = (
    "Continuous batching keeps keys and values in pages, where a routed layer cannot keep fewer than others.\nAllowed:"
    " generate() with a dynamic or a static cache.\nCall generate() batch by batch."
)


RIGHT = (
    "A row of the prompt ends in padding on the right, after which generate() would take its first new token.\nAllowed:"
    " padding on the left.\nSet processor.tokenizer.padding_side = 'left'."
)


CHUNKED = (
    "prefill_chunk_size and pictures: this version of transformers would read the chunks without the pictures.\n"
    "Allowed: prompts without pictures, or transformers 5.23, which encodes them first.\nLeave prefill_chunk_size out."
)


class Asked:
    """What one call asks for: its own arguments before those of its generation config."""

    def __init__(self, given: dict[str, object], config: GenerationConfig) -> None:
        self.given, self.config = given, config

    def __call__(self, name: str) -> object:
        return self.given[name] if self.given.get(name) is not None else getattr(self.config, name, None)


def refuse(asked: Asked, gates: Sequence[Gate]) -> None:
    """Raises ValueError for what would not be what the same tokens give in one forward."""
    if str(asked("cache_implementation")).startswith("paged"):
        raise ValueError(PAGED)
    if asked("guidance_scale") not in (None, 1, 1.0):
        raise ValueError(
            "guidance_scale reads a second, shorter prompt beside this one, and gates are told of one.\nAllowed: 1.\n"
            "Leave it out."
        )
    given = [name for name in ASSISTED if asked(name) is not None]
    if not given:
        return
    if "assistant_early_exit" in given:
        raise ValueError(
            "assistant_early_exit lets a part of this model's own layers guess, with the cache of the whole.\nAllowed:"
            " another model (assistant_model), or words of the prompt (prompt_lookup_num_tokens).\nGive one of these."
        )
    for gate in gates:
        first, then = (gate.selector.rule(phase) for phase in ("prefill", "decode"))
        if first != then and (answers(first) or answers(then)):
            raise ValueError(
                f"{given[0]}: candidates are read together with the prompt, and layer {gate.site.layer} decides"
                f" by {type(first).__name__} there and by {type(then).__name__} in answers.\nAllowed: one rule for both"
                " phases, or rules that leave answers alone.\nGenerate without an assistant."
            )


def answers(rule: Selector) -> bool:
    """Whether a rule decides about answers; one that does not say of which kinds may decide about all."""
    return TokenKind.ANSWER in getattr(rule, "routes", tuple(TokenKind))
