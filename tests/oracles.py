"""Slow, obvious references: one row, one layer, one token set at a time; no gather, no mask, no batch."""

import math

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tests.tiny import IMAGE


def tie_rank(place: int) -> int:
    """Equal scores are taken in ascending order of this."""
    return (place * 2654435761) % 2**32


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
) -> Tensor:
    """Logits (N, vocabulary) of one unpadded row, layer by layer as the paper writes it."""
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
        winners = best([z[i].item() for i in vision], vision, count)
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
    images = None
    if "pixel_values" in batch:
        features = model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True).pooler_output
        images = iter(torch.cat(list(features)))
    losses, logits = [], []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = mask.bool()
        ids, labels = ids[real].tolist(), labels[real].tolist()
        embed = model.get_input_embeddings()
        embeds = torch.stack([next(images) if t == IMAGE else embed.weight[t] for t in ids])
        row = p_mod_row(model, routers, embeds, ids)
        logits.append(row)
        for i, label in enumerate(labels[1:]):
            if label != -100:
                losses.append(-row[i].log_softmax(-1)[label])
    return torch.stack(losses).mean(), logits
