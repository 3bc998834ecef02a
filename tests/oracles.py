"""Slow, obvious references: one row, one layer, one token set at a time; no gather, no mask, no batch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.tiny import IMAGE


def tie_rank(place: int) -> int:
    """Equal scores are taken in ascending order of this."""
    return (place * 2654435761) % 2**32


def drawn(place: int, number_of_row: int | None, *numbers: int, progress: float = 1.0) -> float:
    """The random number of the ``place``-th real token of a row, from 0."""

    def mix(x: int) -> int:
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    x = place + 1
    if number_of_row is not None:
        x = mix(x + mix(number_of_row))
    for number in (*numbers, round(progress * 2**30)):
        constant = (number * 2654435761 + 0x9E3779B9) % 2**32
        x = mix(x + (constant ^ (constant >> 15)))
    return (x >> 8) / 2**24


def best(scores: list[float], places: list[int], count: int) -> set[int]:
    """Indices of the ``count`` largest scores; ``places`` are the tokens' places among the real tokens of the row."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], tie_rank(places[i])))
    return set(order[:count])


def p_mod_share(layer: int, num_layers: int, mean: float = 0.5, high: float = 0.85, low: float = 0.15) -> float | None:
    """Share of the vision tokens a layer keeps; None where it is dense."""
    f = 0.5 * math.cos(math.pi * layer / (num_layers - 1)) + mean
    return None if f > high else max(f, low)


def p_mod_count(vision: int, share: float) -> int:
    return int((torch.tensor(float(vision)) * torch.tensor(share, dtype=torch.float32)).trunc())


def branches(layer: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A plain Llama block on (1, N, D): after attention, and the feed-forward branch alone."""
    attended = layer.self_attn(
        hidden_states=layer.input_layernorm(x), attention_mask=None, position_embeddings=(cos, sin)
    )[0]
    r = x + attended
    return r, layer.mlp(layer.post_attention_layernorm(r))


def p_mod_row(
    model: LlavaForConditionalGeneration,
    routers: dict[int, torch.nn.Module],
    embeds: Tensor,
    ids: list[int],
    kept: dict[int, list[int]] | None = None,
    ranked_by: Callable[[int, list[float]], list[float]] | None = None,
) -> Tensor:
    """Logits (N, vocabulary) of one unpadded row, layer by layer as the paper writes it.

    ``ranked_by`` gives a layer's vision tokens other scores to be ranked by; they keep the weights of their own.
    """
    decoder = model.get_decoder()
    x = embeds
    N, num_layers = len(ids), len(decoder.layers)
    cos, sin = decoder.rotary_emb(x[None], position_ids=torch.arange(N)[None])
    vision = [i for i in range(N) if ids[i] == IMAGE]
    for number, layer in enumerate(decoder.layers):
        share = p_mod_share(number, num_layers)
        if share is None or number not in routers:
            r, m = branches(layer, x[None], cos, sin)
            x = (r + m)[0]
            continue
        z = {i: routers[number](x[i].float()).squeeze() for i in vision}
        s = {i: (1 + 0.2 * torch.tanh(z[i])).to(x.dtype) for i in vision}
        count = p_mod_count(len(vision), share)
        scores = [z[i].item() for i in vision]
        winners = best(scores if ranked_by is None else ranked_by(number, scores), vision, count)
        keep = [i for i in range(N) if i not in vision or vision.index(i) in winners]
        if kept is not None:
            kept[number] = keep
        r, m = branches(layer, x[keep][None], cos[:, keep], sin[:, keep])
        out = []
        for i in range(N):
            if i in keep:
                j = keep.index(i)
                out.append(r[0, j] + (m[0, j] * s[i] if i in s else m[0, j]))
            else:
                out.append(x[i] * s[i])
        x = torch.stack(out)
    return model.lm_head(decoder.norm(x))


def p_mod_loss(model: LlavaForConditionalGeneration, routers: dict[int, torch.nn.Module], batch: dict[str, Tensor]):
    """Mean cross-entropy over all supervised tokens of the batch, and the logits of each row."""
    return mean_loss(model, batch, lambda row: p_mod_row(model, routers, row.x, row.ids))


@dataclass
class Row:
    """One row of a batch without its padding: its number in the batch, ids, labels, and what enters the decoder."""

    number: int
    ids: list[int]
    labels: list[int]
    x: Tensor

    @property
    def vision(self) -> list[int]:
        return [i for i, token in enumerate(self.ids) if token == IMAGE]

    @property
    def text(self) -> list[int]:
        return [i for i, token in enumerate(self.ids) if token != IMAGE]

    @property
    def prompt(self) -> list[int]:
        """Everything before the first answer."""
        answers = [i for i, label in enumerate(self.labels) if label != -100]
        return list(range(min(answers, default=len(self.ids))))


def rows_of(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Iterator[Row]:
    images = None
    if "pixel_values" in batch:
        features = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
        images = iter(torch.cat(list(features)))
    embed = model.get_input_embeddings()
    labelled = batch.get("labels", torch.full_like(batch["input_ids"], -100))
    for b, (ids, mask, labels) in enumerate(zip(batch["input_ids"], batch["attention_mask"], labelled, strict=True)):
        real = mask.bool()
        ids, labels = ids[real].tolist(), labels[real].tolist()
        yield Row(b, ids, labels, torch.stack([next(images) if t == IMAGE else embed.weight[t] for t in ids]))


def mean_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor], logits_of: Callable[[Row], Tensor]):
    """Mean cross-entropy over all supervised tokens of the batch, and the logits of each row."""
    losses, logits = [], []
    for row in rows_of(model, batch):
        logits.append(logits_of(row))
        for i, label in enumerate(row.labels[1:]):
            if label != -100:
                losses.append(-logits[-1][i].log_softmax(-1)[label])
    return torch.stack(losses).mean(), logits


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (N, head width) at their places: each pair (i, i + half) turned by the i-th angle."""
    half = x.shape[-1] // 2
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        [first * cos[:, :half] - second * sin[:, :half], second * cos[:, half:] + first * sin[:, half:]], 1
    )


def attend(
    layer: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor, asking: list[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Eager attention of a plain Llama block on (N, D), query by query and head by head.

    Returns, of each asking place, what it gets (D), and what it pays each place averaged over heads (N).
    """
    module, h = layer.self_attn, layer.input_layernorm(x)
    d, heads, groups = module.head_dim, module.config.num_attention_heads, module.config.num_key_value_heads
    queries = [turned(q, cos, sin) for q in module.q_proj(h).split(d, dim=1)]
    keys = [turned(k, cos, sin) for k in module.k_proj(h).split(d, dim=1)]
    values = module.v_proj(h).split(d, dim=1)
    gets, pays = {}, {}
    for i in asking:
        answers, paid = [], torch.zeros(len(x))
        for head in range(heads):
            group = head // (heads // groups)
            weights = (keys[group][: i + 1] @ queries[head][i] / d**0.5).softmax(0)
            answers.append(weights @ values[group][: i + 1])
            paid[: i + 1] += weights.detach() / heads
        gets[i], pays[i] = module.o_proj(torch.cat(answers)), paid
    return gets, pays


@dataclass
class Seen:
    """The layer before, as it saw its tokens: ``places`` entered it."""

    layer: torch.nn.Module
    x: Tensor
    cos: Tensor
    sin: Tensor
    places: list[int]

    def paid(self, queries: list[int]) -> dict[int, float]:
        """What the tokens at ``queries`` paid each token that entered, averaged over heads and queries."""
        asked = [self.places.index(query) for query in queries]
        with torch.no_grad():
            _, pays = attend(self.layer, self.x, self.cos, self.sin, asked)
        return {place: sum(pays[i][j].item() for i in asked) / len(asked) for j, place in enumerate(self.places)}


Kept = Callable[[int, Tensor, Seen | None], list[int]]


def dropped_row(
    model: LlavaForConditionalGeneration, x: Tensor, kept: Kept, positions: list[int] | None = None
) -> Tensor:
    """Logits (N, vocabulary) of one unpadded row: ``kept`` tells which places enter a layer; all others stay."""
    decoder, seen = model.get_decoder(), None
    places = torch.arange(len(x)) if positions is None else torch.tensor(positions)
    cos, sin = decoder.rotary_emb(x[None], position_ids=places[None])
    for number, layer in enumerate(decoder.layers):
        keep = kept(number, x, seen)
        if keep:
            r, m = branches(layer, x[keep][None], cos[:, keep], sin[:, keep])
            after = dict(zip(keep, (r + m)[0], strict=True))
            seen = Seen(layer, x[keep], cos[0, keep], sin[0, keep], keep)
            x = torch.stack([after.get(i, x[i]) for i in range(len(x))])
    return model.lm_head(decoder.norm(x))


def frozen_row(
    model: LlavaForConditionalGeneration,
    x: Tensor,
    updated: Callable[[int, Tensor], dict[int, Tensor | float] | None],
) -> Tensor:
    """Logits (N, vocabulary) of one unpadded row: who is not updated by a layer is still attended to.

    ``updated`` gives the places that a layer updates and how much of its answer they take; None: all of them.
    """
    decoder = model.get_decoder()
    cos, sin = decoder.rotary_emb(x[None], position_ids=torch.arange(len(x))[None])
    for number, layer in enumerate(decoder.layers):
        weights = updated(number, x)
        if weights is None:
            r, m = branches(layer, x[None], cos, sin)
            x = (r + m)[0]
            continue
        keep = list(weights)
        gets, _ = attend(layer, x, cos[0], sin[0], keep)
        r = torch.stack([x[i] + gets[i] for i in keep])
        y = dict(zip(keep, r + layer.mlp(layer.post_attention_layernorm(r)), strict=True))
        x = torch.stack([x[i] + weights[i] * (y[i] - x[i]) if i in y else x[i] for i in range(len(x))])
    return model.lm_head(decoder.norm(x))
