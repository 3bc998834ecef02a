"""What one answer took: which layers its tokens entered, what the cache held, how long it lasted."""

from __future__ import annotations

from pathlib import Path

from lit_modules.answering import Answer
from lit_modules.entered import dense_bytes, entered
from lit_modules.report import table
from routing import TokenKind, Tokens

HEADER = ("layer", "prompt", "share", "vision", "answer", "share", "cache KiB", "dense KiB")


def told(tokens: Tokens, answer: Answer, loading: float, model: Path) -> str:
    """The table of a routed model, or that there is none, and the totals."""
    dense = f"{model} is dense: every token enters every layer."
    return f"{layers_table(tokens, answer) if answer.records else dense}\n\n{totals(tokens, answer, loading)}"


def layers_table(tokens: Tokens, answer: Answer) -> str:
    """One line a layer."""
    length, vision = int(tokens.valid_BT.sum()), tokens.count([TokenKind.VISION])[0]
    dense, rows, told = _dense(tokens, answer), [], set()
    for each in entered(tokens, answer):
        memory = [""] * 2 if each.layer in told else [_kib(answer.cache[each.layer].bytes), _kib(dense[each.layer])]
        told.add(each.layer)
        shares = _share(each.prompt, length), _share(each.answer, answer.read)
        seen, said = f"{each.vision} of {vision}", f"{each.answer} of {answer.read}"
        rows.append((each.place, f"{each.prompt} of {length}", shares[0], seen, said, shares[1], *memory))
    return table(HEADER, rows)


def totals(tokens: Tokens, answer: Answer, loading: float) -> str:
    """Length, memory and time, in sentences."""
    length, vision = int(tokens.valid_BT.sum()), tokens.count([TokenKind.VISION])[0]
    held, dense = sum(layer.bytes for layer in answer.cache), sum(_dense(tokens, answer))
    used = sum(layer.used_bytes for layer in answer.cache)
    filled = "" if used == held else f" ({_kib(used)} KiB of it filled)"
    beside = f"; dense it would be {_kib(dense)} KiB ({_share(held, dense)})" if answer.records else ""
    first, count = answer.seconds[0], len(answer.seconds)
    lines = [
        f"{length} tokens in the prompt, {vision} of them patches; {count} in the answer.",
        f"Key-value cache at the end: {_kib(held)} KiB{filled}{beside}.",
        f"Loaded in {loading:.1f} s; first token after {_ms(first)} (pictures and prompt, cold)"
        + (f", then {_ms(_pace(answer))} each, {1 / _pace(answer):.1f} tokens a second." if count > 1 else "."),
    ]
    return "\n".join(lines)


def _dense(tokens: Tokens, answer: Answer) -> list[int]:
    routed = {record.site.layer for record in answer.records}
    return dense_bytes(answer.cache, int(tokens.valid_BT.sum()) + answer.read, routed)


def _pace(answer: Answer) -> float:
    """Seconds a token, the first one apart."""
    return max((answer.seconds[-1] - answer.seconds[0]) / answer.read, 1e-9)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _kib(size: int) -> str:
    return f"{size / 1024:,.1f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
