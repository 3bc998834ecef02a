"""Where prompts of a batch have to be read together.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from routing.gate import Gate
from routing.group import empty
from routing.tape import RoutingTape


def plain_because(
    model: PreTrainedModel, tape: RoutingTape, inputs: Mapping[str, object], pictures_B: Sequence[int] | None
) -> str | None:
    """Why these prompts have to be read in one piece; None if they need not.

    Args:
        model: Routed or not.
        tape: Its tape, with the tokens announced.
        inputs: Keyword arguments of ``generate``.
        pictures_B: Entries of ``pixel_values`` that belong to each row, known on the host; None if nobody said.
    """
    tokens, ids_BT = tape.announced, inputs.get("input_ids")
    if tokens is None or not isinstance(ids_BT, Tensor) or tokens.shape != ids_BT.shape:
        return "nobody announced the tokens of these input_ids, whose lengths the host has to know"
    others = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.shape != ids_BT.shape}
    if others and pictures_B is None:
        return f"nobody said how many entries of {', '.join(others)} belong to each row"
    if odd := [name for name, x in others.items() if x.ndim == 0 or len(x) != sum(pictures_B or ())]:
        return f"{', '.join(odd)}: not one entry for each of the {sum(pictures_B or ())} pictures"
    if "forward" in vars(model) or getattr(model, "_compiled_call_impl", None) is not None:
        return "the model's forward is replaced or compiled already"
    if hasattr(model.base_model, "get_rope_index"):
        return f"{type(model).__name__} keeps an offset of positions between prompt and answer (M-RoPE)"
    if kinds := {type(layer).__name__ for layer in empty(model).layers if type(layer) is not DynamicLayer}:
        return f"its cache has layers that are more than keys and values of all tokens: {', '.join(sorted(kinds))}"
    if tape.wants_whole_batches:
        return "records are kept of one forward with all rows"
    if tape.intervention is not None and not tape.intervention.batch_independent:
        return f"{type(tape.intervention).__name__} looks at other rows"
    gates = [gate for module in model.modules() if isinstance(gate := getattr(module, "gate", None), Gate)]
    if mixing := [rule for gate in gates if not (rule := gate.selector.rule("prefill")).batch_independent]:
        return f"{type(mixing[0]).__name__} looks at the whole batch"
    return None
