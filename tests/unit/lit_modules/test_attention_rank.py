"""ARank: the rank of a layer's attention maps, against maps that the model gives itself."""

from __future__ import annotations

import pytest
import torch

from lit_modules import attention_rank
from lit_modules.attention_rank import RankObserver, attention_modules, attention_ranks, map_ranks, watched
from lit_modules.batches import model_inputs
from lit_modules.dense_subject import DenseSubject, Sample
from lit_modules.estimate import Estimate
from tiny import facts, padded, row, tiny_llava

ROWS = [row(1, 9), row(1, 4, seed=1), row(2, 3, seed=2)]


def subject(model, precision="32-true"):
    return DenseSubject(model.eval(), {}, None, torch.device("cpu"), precision)


def sample(rows, side="right", which=None):
    batch = padded(rows, side)
    tokens = facts(batch)
    if side == "left":
        del batch["labels"]
    return Sample({**batch, "tokens": tokens}, tuple(range(len(rows)) if which is None else which))


def means(ranks):
    return [rank.rank.mean for rank in ranks]


def test_the_four_heads_of_the_paper():
    S = 64
    first = torch.zeros(S, S).index_fill(1, torch.tensor([0]), 1.0)
    before = torch.eye(S).roll(1, 0).tril()
    uniform = torch.ones(S, S).tril() / torch.arange(1, S + 1)[:, None]
    assert map_ranks(torch.stack([first, torch.eye(S), before, uniform])).tolist() == [1, 0, 63, 63]


@pytest.mark.parametrize("side", ["right", "left"])
def test_it_is_the_rank_of_the_maps_that_an_eager_model_gives(side):
    asked = sample(ROWS, side)
    eager = tiny_llava(layers=3, attention="eager").eval()
    maps = eager(**model_inputs(asked.batch, mask=True), output_attentions=True).attentions
    expected = []
    for layer_BHTT in maps:
        rows = []
        for number, valid_T in enumerate(asked.batch["tokens"].valid_BT):
            ranks = []
            for map_TT in layer_BHTT[number].detach().float():
                map_SS = map_TT[valid_T][:, valid_T].clone()
                for i in range(len(map_SS)):
                    for j in range(len(map_SS)):
                        if j >= i:
                            map_SS[i, j] = 0
                ranks.append(int(torch.linalg.matrix_rank(map_SS)))
            rows.append(sum(ranks) / len(ranks))
        expected.append(rows)
    with watched(model := tiny_llava(layers=3).eval(), asked) as found, torch.no_grad():
        model(**model_inputs(asked.batch, mask=side == "left"), use_cache=False)
    assert found == expected
    ranks = attention_ranks(subject(model), [asked])
    lengths = asked.batch["tokens"].valid_BT.sum(1).tolist()
    for mine, rows in zip(ranks, expected, strict=True):
        assert mine.rank == Estimate.of(rows)
        assert mine.relative == Estimate.of([r / (n - 1) for r, n in zip(rows, lengths, strict=True)])
    assert len({value for rows in expected for value in rows}) > 3  # a constant would pass otherwise


def test_neither_padding_nor_other_rows_matter():
    dense = subject(tiny_llava(layers=3))
    both, one = sample(ROWS, which=(1,)), sample(ROWS[1:2])
    one.batch["pixel_values"] = both.batch["pixel_values"][1:2]
    together, alone = attention_ranks(dense, [both]), attention_ranks(dense, [one])
    assert means(together) == means(alone) and together[0].rank.error is None
    assert len(ROWS[1]) - 1 >= max(means(alone)) > 1


def test_fast_attention_is_left_as_it_was():
    model, asked = tiny_llava(layers=3).eval(), sample(ROWS)
    inputs = model_inputs(asked.batch)
    configs = [module.config for module in attention_modules(model)]
    with torch.no_grad():
        before = model(**inputs).logits
        with watched(model, asked):
            during = model(**inputs).logits
        with pytest.raises(KeyError), watched(model, asked):
            raise KeyError
        after = model(**inputs).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    for module, config in zip(attention_modules(model), configs, strict=True):
        assert module.config is config and not hasattr(module, "observer")


def test_a_few_maps_of_one_row_are_in_memory_together(monkeypatch):
    shapes = []
    ranks = attention_rank.map_ranks
    monkeypatch.setattr(attention_rank, "HEADS", 3)
    monkeypatch.setattr(attention_rank, "map_ranks", lambda maps: (shapes.append(maps.shape), ranks(maps))[1])
    attention_ranks(subject(tiny_llava(layers=2)), [sample(ROWS[:2])])
    lengths = [len(tokens) for tokens in ROWS[:2]]
    assert shapes == [(heads, n, n) for _ in range(2) for n in lengths for heads in (3, 1)]


def test_maps_are_float32_under_autocast(monkeypatch):
    maps = []
    monkeypatch.setattr(attention_rank, "map_ranks", lambda map_HSS: (maps.append(map_HSS), map_ranks(map_HSS))[1])
    query, key = torch.randn(2, 1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    observer = RankObserver(lambda: "sdpa", {0: torch.arange(12)}, [])
    for mixed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            observer.see(query, key, None, None)
    assert maps[1].dtype is torch.float32 and torch.equal(*maps)
    assert len(attention_ranks(subject(tiny_llava(layers=2), "bf16-mixed"), [sample(ROWS)])) == 2


def test_what_cannot_be_watched_is_refused():
    model = tiny_llava(layers=2)
    model.config.get_text_config().attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match=r"caps the logits[\s\S]*Allowed: [\s\S]*Give another"):
        attention_ranks(subject(model), [sample(ROWS)])
    del model.config.get_text_config().attn_logit_softcapping
    del model.get_decoder().layers[1].self_attn
    with pytest.raises(ValueError, match=r"layer 1 \(LlamaDecoderLayer\) has no attention"):
        attention_ranks(subject(model), [sample(ROWS)])


def test_an_error_bar_is_students():
    assert Estimate.of([1.0, 2.0, 3.0]).error == pytest.approx(4.302653 / 3**0.5)
    assert Estimate.of([2.0]) == Estimate(2.0, None, 1) and Estimate.of([1.0, 2.0]).samples == 2
    assert str(Estimate.of([1.0, 1.0])) == "1 ± 0"
