"""What experts start as."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma3nTextConfig, LlamaConfig, Phi3Config, PhiConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from routing import Copies, Site, Split
from routing.experts import stacked
from routing.feed_forward import FeedForward
from routing.upcycling import sliced

SITE = Site(3, 8, "mlp", "moe")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
MADE = {
    "llama": lambda: LlamaMLP(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
    "phi": lambda: PhiMLP(PhiConfig(**SIZES)),
    "phi 3, fused": lambda: Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)),
}


@pytest.fixture(params=MADE)
def network(request) -> nn.Module:
    torch.manual_seed(0)
    made = MADE[request.param]()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made


def answered(dense: FeedForward, x_ND: torch.Tensor) -> torch.Tensor:
    h_NF = F.linear(x_ND, dense.up, dense.up_bias)
    if dense.gated:
        gate_NF, up_NF = h_NF.chunk(2, dim=-1)
        return F.linear(dense.act(gate_NF) * up_NF, dense.down, dense.down_bias)
    return F.linear(dense.act(h_NF), dense.down, dense.down_bias)


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def test_a_live_network_is_read_as_matrices(network):
    dense = FeedForward.of(network, SITE)
    torch.testing.assert_close(answered(dense, X), network(X), atol=1e-6, rtol=1e-6)
    assert dense.hidden == 24
    experts = stacked(PhiConfig(experts_implementation="eager"), [dense] * 3)
    assert experts.act_fn(torch.ones(1)) == dense.act(torch.ones(1))
    with torch.no_grad():
        experts.down_proj.zero_()  # a copy: the network stays as it is
    torch.testing.assert_close(answered(dense, X), network(X), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("broken", ["no linear maps", "one more", "unlike biases"])
def test_what_cannot_be_copied_is_refused_by_name(broken):
    network = LlamaMLP(LlamaConfig(**SIZES))
    if broken == "no linear maps":
        network = nn.Sequential(nn.Identity())
    elif broken == "one more":
        network.extra = nn.Linear(16, 16)
    else:
        network.up_proj = nn.Linear(16, 24, bias=True)
    with pytest.raises(ValueError, match=r"(?s)Plugin 'moe': in layer 3.*Allowed.*all with biases or none"):
        FeedForward.of(network, SITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_that_does_more_than_its_maps_say_is_refused(network, dtype):
    network.to(dtype).train()
    FeedForward.of(network, SITE).check_like(network, SITE)
    assert network.training
    sparse = {"hidden_size": 16, "intermediate_size": [24] * 2, "num_hidden_layers": 2}
    unlike = Gemma3nTextMLP(Gemma3nTextConfig(**sparse, activation_sparsity_pattern=[0.95, 0.0]), 0).to(dtype)
    with pytest.raises(ValueError, match=r"Gemma3nTextMLP .* answers otherwise than"):
        FeedForward.of(unlike, SITE).check_like(unlike, SITE)


def test_packed_weights_are_refused(network):
    packed = next(child for child in network.children() if isinstance(child, nn.Linear))
    packed.weight = nn.Parameter(torch.zeros(packed.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        FeedForward.of(network, SITE)


def test_copies_are_the_network_itself_and_noise_is_a_share_of_its_spread(network):
    dense = FeedForward.of(network, SITE)
    assert Copies().exact and not Copies(0.1).exact and not Split().exact
    grown = Copies()(dense, 3)
    assert len(grown.experts) == 3 and grown.always is None and grown.scale == 1
    assert all(torch.equal(each.up, dense.up) and torch.equal(each.down, dense.down) for each in grown.experts)
    torch.manual_seed(0)
    noisy = Copies(0.1)(dense, 64).experts
    for name in ("up", "down"):
        apart = torch.stack([getattr(each, name) - getattr(dense, name) for each in noisy])
        assert apart.std() == pytest.approx(0.1 * getattr(dense, name).std().item(), rel=0.05)
    torch.manual_seed(0)
    assert torch.equal(Copies(0.1)(dense, 64).experts[5].up, noisy[5].up)
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="noise must be"):
            Copies(wrong)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_slices_of_a_network_add_up_to_it(network, parts):
    dense = FeedForward.of(network, SITE)
    size = 24 // parts
    slices = [sliced(dense, part * size, (part + 1) * size) for part in range(parts)]
    assert {each.hidden for each in slices} == {size}
    torch.testing.assert_close(sum(answered(each, X) for each in slices), network(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("parts", "always", "experts"), [(4, 0, 4), (4, 1, 6), (3, 2, 5), (2, 1, 3)])
def test_equal_weights_on_one_of_each_slice_beside_those_always_on_are_the_network(network, parts, always, experts):
    dense = FeedForward.of(network, SITE)
    grown = Split(parts, always)(dense, experts)
    routed = parts - always
    assert len(grown.experts) == experts and grown.scale == routed
    got = sum(answered(each, X) for each in grown.experts[:routed]) / routed * grown.scale
    if always:
        assert grown.always.hidden == always * 24 // parts
        got = got + answered(grown.always, X)
    torch.testing.assert_close(got, network(X), atol=1e-5, rtol=1e-5)
    for e in range(experts):  # in turns
        assert torch.equal(grown.experts[e].down, grown.experts[e % routed].down)


def test_splits_that_cannot_be_are_refused(network):
    dense = FeedForward.of(network, SITE)
    for wrong in ({"parts": 1}, {"parts": 4, "always": 4}, {"always": -1}):
        with pytest.raises(ValueError, match="parts must be at least 2"):
            Split(**wrong)
    with pytest.raises(ValueError, match="parts that divide"):
        Split(5)(dense, 5)
    with pytest.raises(ValueError, match="experts a multiple of the 3"):
        Split(4, 1)(dense, 4)
