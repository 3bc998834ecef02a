"""Mixture-of-Depths (arXiv 2404.02258, eq. 1) against a loop over rows, layers and tokens."""

import copy

import pytest
import torch

from plugins.mixture_of_depths import MixtureOfDepths
from routing import Constant, ExpertChoice, Layers, LinearRouter, ModalityRouter, Threshold, TokenKind, WarmUp, attach
from tests.oracles import best, branches
from tests.tiny import IMAGE, PATCHES, padded, row, tiny_llava

ROWS = [row(1, 9), row(0, 6, seed=1), row(2, 4, seed=2)]
TEXT = (TokenKind.SYSTEM, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.VISION)
WILD = LinearRouter(std=0.5)


def oracle(model, scores, ids, embeds, routes_all: bool, threshold: float | None) -> torch.Tensor:
    """Logits of one unpadded row; ``scores(layer, x, is_vision)`` is the router."""
    decoder, x = model.get_decoder(), embeds
    cos, sin = decoder.rotary_emb(x[None], position_ids=torch.arange(len(ids))[None])
    for number, layer in enumerate(decoder.layers):
        if number % 2 == 0:
            r, m = branches(layer, x[None], cos, sin)
            x = (r + m)[0]
            continue
        pool = [i for i in range(len(ids)) if routes_all or ids[i] == IMAGE]
        z = {i: scores(number, x[i], ids[i] == IMAGE) for i in pool}
        if threshold is None:
            taken = {pool[j] for j in best([z[i].item() for i in pool], pool, len(pool) // 2)}
        else:
            taken = {i for i in pool if torch.sigmoid(z[i]) > threshold}
        keep = [i for i in range(len(ids)) if i not in pool or i in taken]
        y = {}
        if keep:  # a threshold may take nobody
            r, m = branches(layer, x[keep][None], cos[:, keep], sin[:, keep])
            y = dict(zip(keep, (r + m)[0], strict=True))
        rows = [
            x[i] if i not in y else x[i] + (torch.sigmoid(z[i]) if i in z else 1) * (y[i] - x[i])
            for i in range(len(ids))
        ]
        x = torch.stack(rows)
    return model.lm_head(decoder.norm(x))


@pytest.mark.parametrize("routes_all", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("sharing", ["separate", "shared"])
@pytest.mark.parametrize("apart", [False, True])
def test_values_equal_the_loop_oracle(routes_all, threshold, sharing, apart):
    routes = TEXT if routes_all else (TokenKind.VISION,)
    selector = ExpertChoice(routes) if threshold is None else Threshold(routes, p=threshold)
    model = tiny_llava().eval()
    dense = copy.deepcopy(model)
    spec = ModalityRouter(WILD, WILD) if apart else WILD
    attach(model, {"depth": MixtureOfDepths(router=spec, sharing=sharing, selector=selector)})
    routers = model.routers["depth"]

    def scores(number: int, x: torch.Tensor, vision: bool) -> torch.Tensor:
        router = routers["shared" if sharing == "shared" else str(number)]
        head = (router.vision if vision else router.text) if apart else router
        return head.network(x).squeeze()

    batch = padded(ROWS)
    got = model(**batch, use_cache=False).logits
    features = iter(torch.cat(list(dense.get_image_features(batch["pixel_values"], return_dict=True).pooler_output)))
    for b, ids in enumerate(ROWS):
        embeds = torch.stack([next(features) if t == IMAGE else dense.get_input_embeddings().weight[t] for t in ids])
        want = oracle(dense, scores, ids, embeds, routes_all, threshold)
        torch.testing.assert_close(got[b, : len(ids)], want, atol=2e-5, rtol=2e-4)


def test_the_capacity_warms_up_from_dense_and_every_router_gets_a_gradient():
    model = tiny_llava()
    plugin = MixtureOfDepths(capacity=WarmUp(Constant(0.25), until=0.5), placement=Layers((1, 3)))
    tape = attach(model, {"depth": plugin})
    kept = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        tape.progress = progress
        with tape.recording() as records:
            loss = model(**padded([row(1, 9)]), use_cache=False).loss
        kept.append([record.decision.keep_BT().sum().item() - 10 for record in records])
    assert kept == [[PATCHES] * 2, [10] * 2, [4] * 2, [4] * 2]
    loss.backward()
    assert all(router.network.weight.grad.any() for router in model.routers["depth"].values())
