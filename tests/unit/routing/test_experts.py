"""Stacked experts in every way of running them, against all experts on all tokens under a mask."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers.activations import ACT2FN

from routing.experts import GatedExperts, PlainExpertsWithBias, StackedExperts, stacked
from routing.feed_forward import FeedForward
from tests.laws.models import questions

D, H, E = 16, 24, 4
WAYS = ("grouped_mm", "batched_mm", "eager")
SHAPES = {"gated": (True, False), "plain": (False, False), "gated_bias": (True, True), "plain_bias": (False, True)}
CASES = {
    "ordinary": lambda g: torch.randint(0, E, (11, 2), generator=g),
    "empty experts": lambda g: torch.randint(0, 2, (11, 2), generator=g) * 2,
    "one expert": lambda g: torch.full((11, 1), 3),
    "nobody's": lambda g: torch.randint(0, E + 3, (11, 3), generator=g),
    "nobody at all": lambda g: torch.full((5, 2), E),
    "one token": lambda g: torch.tensor([[2, 0]]),
    "one token, nobody's": lambda g: torch.tensor([[E + 1, 1]]),
}


def networks(shape: str = "gated", dtype: torch.dtype = torch.float32, number: int = E) -> list[FeedForward]:
    gated, biased = SHAPES[shape]
    g, made = torch.Generator().manual_seed(0), []
    for _ in range(number):
        wide = 2 * H if gated else H
        up, down = torch.randn(wide, D, generator=g) / D**0.5, torch.randn(D, H, generator=g) / H**0.5
        biases = (torch.randn(wide, generator=g), torch.randn(D, generator=g)) if biased else (None, None)
        cast = [None if each is None else each.to(dtype) for each in (up, down, *biases)]
        made.append(FeedForward(*cast, gated, F.silu))
    return made


def experts_of(way: str, shape: str = "gated", dtype: torch.dtype = torch.float32) -> StackedExperts:
    return stacked(SimpleNamespace(_experts_implementation=way), networks(shape, dtype))


def masked(experts: StackedExperts, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Every expert answers every token; a mask of weights picks."""
    gives = {name: parameter for name, parameter in experts.named_parameters()}
    up, down = gives[experts.up_name], gives["down_proj"]
    h_ENF = torch.einsum("nd,efd->enf", x_ND, up)
    if experts.biased:
        h_ENF = h_ENF + gives[f"{experts.up_name}_bias"][:, None]
    h_ENF = F.silu(h_ENF[..., :H]) * h_ENF[..., H:] if experts.gated else F.silu(h_ENF)
    y_END = torch.einsum("enf,edf->end", h_ENF, down)
    if experts.biased:
        y_END = y_END + gives["down_proj_bias"][:, None]
    share_NE = torch.stack([(weight_NK * (expert_NK == e)).sum(1) for e in range(experts.num_experts)], 1)
    return torch.einsum("ne,end->nd", share_NE, y_END)


def rows(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    expert_NK = CASES[case](g)
    x_ND = torch.randn(len(expert_NK), D, generator=g).to(dtype)
    return x_ND.requires_grad_(), expert_NK, torch.rand(expert_NK.shape, generator=g).requires_grad_()


def gap(got: Tensor | None, want: Tensor) -> float:
    """Length of the difference, of the length of what is wanted."""
    assert got is not None and got.isfinite().all() and got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-6)).item()


def backward(experts: StackedExperts, run, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The answer to a case, and the gradient of everything that has one."""
    experts.zero_grad()
    x_ND, expert_NK, weight_NK = rows(case, dtype)
    answer_ND = run(x_ND, expert_NK, weight_NK)
    (answer_ND.float() * torch.linspace(-1, 1, answer_ND.numel()).view_as(answer_ND)).sum().backward()
    gradients = {name: p.grad for name, p in experts.named_parameters()}
    return {"answer": answer_ND.detach(), "x": x_ND.grad, "weight": weight_NK.grad, **gradients}


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_the_masked_reference_forward_and_backward(way, shape, case, dtype, within):
    experts = experts_of(way, shape, dtype)
    got = backward(experts, experts, case, dtype)
    exact = experts_of("eager", shape, dtype).to(torch.float32)
    want = backward(exact, lambda *given: masked(exact, *given), case, torch.float32)
    if dtype is torch.bfloat16:  # what the inputs were rounded to, in float32
        exact_rows = lambda x, e, w: masked(exact, x.bfloat16().float(), e, w)  # noqa: E731
        want = backward(exact, exact_rows, case, torch.float32)
    assert got["answer"].dtype == dtype and got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            value = torch.zeros_like(got[name]) if got[name] is not None else None
        if value is not None:  # gradients of a single token are sums of few numbers, each rounded
            assert gap(got[name], value) <= (within if name == "answer" else 2 * within), name


class Poisoned(torch.autograd.Function):
    """Rows that belong to nobody come back as NaN from a product and from its gradient."""

    @staticmethod
    def forward(ctx, x_SD, ends_E):
        ctx.end = int(ends_E[-1])
        return torch.cat([x_SD[: ctx.end], torch.full_like(x_SD[ctx.end :], torch.nan)])

    backward = staticmethod(lambda ctx, grad_SD: (Poisoned.forward(ctx, grad_SD, torch.tensor([ctx.end])), None))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["nobody's", "nobody at all", "one token, nobody's"])
def test_what_a_grouped_product_leaves_unwritten_reaches_nothing(shape, case, monkeypatch):
    experts = experts_of("grouped_mm", shape)
    want = backward(experts, experts, case, torch.float32)

    def product(x_SD, weight_EDF, ends_E):
        y_SF = F.grouped_mm(Poisoned.apply(x_SD, ends_E), weight_EDF, offs=ends_E)
        return Poisoned.apply(y_SF, ends_E)

    monkeypatch.setattr("routing.experts._product", product)
    for name, value in backward(experts, experts, case, torch.float32).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [1, 3, 128, 129, 400])
@torch.no_grad()
def test_few_tokens_and_many_get_the_same_answers_at_inference(number, shape):
    experts, g = experts_of("grouped_mm", shape), torch.Generator().manual_seed(number)
    x_ND, weight_NK = torch.randn(number, D, generator=g), torch.rand(number, 2, generator=g)
    expert_NK = torch.randint(0, E + 2, (number, 2), generator=g)
    assert gap(experts(x_ND, expert_NK, weight_NK), masked(experts, x_ND, expert_NK, weight_NK)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_nobody_is_looked_for_only_where_somebody_may_be(way, shape):
    experts = experts_of(way, shape)
    given = [each.detach() for each in rows("ordinary", torch.float32)]
    with torch.no_grad():
        torch.testing.assert_close(experts(*given, False), experts(*given, True), atol=0, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_computes_in_bf16_from_float32_weights(way):
    experts = experts_of(way, "plain_bias")
    exact = backward(experts, lambda *given: masked(experts, *given), "nobody's", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = backward(experts, experts, "nobody's", torch.float32)
    for name, value in exact.items():
        assert 1e-5 < gap(got[name], value) < 2e-2, name
    assert all(p.grad.dtype == torch.float32 for p in experts.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_each_expert_answers_rows_of_its_own(shape):
    experts = experts_of("grouped_mm", shape)
    x_ECD = torch.randn(E, 5, D)
    for e, y_CD in enumerate(experts.each(x_ECD)):
        want = masked(experts, x_ECD[e], torch.full((5, 1), e), torch.ones(5, 1))
        torch.testing.assert_close(y_CD, want, atol=1e-5, rtol=1e-5)


def test_the_kind_follows_the_network_and_an_unknown_way_is_refused():
    assert isinstance(experts_of("eager", "gated"), GatedExperts)
    assert isinstance(experts_of("eager", "plain_bias"), PlainExpertsWithBias)
    with pytest.raises(KeyError, match="not a valid experts implementation"):
        experts_of("fastest")(*rows("ordinary", torch.float32))


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
def test_the_device_is_asked_nothing(way, skips):
    dtype = torch.bfloat16  # of which alone PyTorch knows the shape of a grouped product
    experts, given = experts_of(way, "gated_bias", dtype), rows("nobody's" if skips else "ordinary", dtype)
    assert questions(lambda: experts(*given, skips).sum().backward()) == 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert experts(*(mode.from_tensor(each.detach()) for each in given), skips).shape == given[0].shape


@pytest.fixture
def one_graph():
    torch._dynamo.reset()
    return lambda experts: torch.compile(experts, fullgraph=True, backend="aot_eager")


def test_compiled_it_is_one_graph_with_the_same_answers_and_gradients(one_graph):
    experts = experts_of("grouped_mm", "plain_bias", torch.bfloat16)
    plain = backward(experts, experts, "nobody's", torch.bfloat16)
    got = backward(experts, one_graph(experts), "nobody's", torch.bfloat16)
    for name, value in plain.items():
        assert gap(got[name], value) <= 1e-2, name


@torch.no_grad()
def test_compiled_in_float32_it_is_one_graph_too(one_graph):  # transformers 5.17 cannot compile that loop's gradient
    experts, given = experts_of("grouped_mm", "gated"), rows("nobody's", torch.float32)
    assert gap(one_graph(experts)(*given), experts(*given)) <= 1e-6


@pytest.mark.parametrize(("width", "dtype"), [(16, torch.float64), (10, torch.float32), (12, torch.bfloat16)])
def test_types_and_widths_without_a_grouped_product_are_looped_over(width, dtype):
    g = torch.Generator().manual_seed(2)
    ups, downs = (torch.randn(E, *size, generator=g).to(dtype) for size in ((6, width), (width, 6)))
    made = [FeedForward(up, down, None, None, False, F.silu) for up, down in zip(ups, downs, strict=True)]
    answers = []
    for way in ("grouped_mm", "eager"):
        experts = stacked(SimpleNamespace(_experts_implementation=way), made)
        x_ND = torch.randn(9, width, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        answer_ND = experts(x_ND, CASES["nobody's"](torch.Generator())[:9], torch.ones(9, 3))
        answer_ND.float().square().sum().backward()
        answers.append((answer_ND.detach(), x_ND.grad, *(p.grad for p in experts.parameters())))
    for got, want in zip(*answers, strict=True):
        assert gap(got, want) <= (1e-2 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu", "silu", "relu2", "quick_gelu"])
def test_an_activation_in_one_kernel_is_the_models_own(name):
    act, g = ACT2FN[name], torch.Generator().manual_seed(0)
    network = FeedForward(torch.randn(H, D, generator=g), torch.randn(D, H, generator=g), None, None, False, act)
    own = stacked(SimpleNamespace(_experts_implementation="eager"), [network]).act_fn
    assert (own is act) == (name not in ("gelu_new", "gelu_fast"))
    results = []
    for each in (act, own):
        x = torch.linspace(-6, 6, 500, dtype=torch.float64, requires_grad=True)
        (each(x) * torch.arange(500.0)).sum().backward()
        results.append((each(x), x.grad))
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("case", ["ordinary", "nobody's"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_gradients_are_the_loops_over_memory_full_of_nan(shape, case):
    results = []
    torch.use_deterministic_algorithms(True)  # which fill with NaN what ``empty`` makes
    try:
        for way in ("eager", "grouped_mm"):
            experts = experts_of(way, shape, torch.float32)
            x_ND, expert_NK, weight_NK = rows(case, torch.float32)
            x_ND, weight_NK = x_ND.detach().requires_grad_(), weight_NK.detach().requires_grad_()
            answer_ND = experts(x_ND, expert_NK, weight_NK)
            given = x_ND, weight_NK, experts.down_proj
            first = torch.autograd.grad(answer_ND.square().sum(), given, create_graph=True)
            sum(each.square().sum() for each in first).backward()
            results.append([each.grad for each in given])
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-4)
