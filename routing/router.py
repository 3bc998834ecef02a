"""Routers score every token for every expert, and decide nothing.

Shape suffixes: B batch, T tokens, E experts (1 when a layer is routed in depth), D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, cast

import torch
from torch import Tensor, nn

from routing.step_graph import is_pure
from routing.tokens import TokenKind, Tokens

if TYPE_CHECKING:
    from routing.tape import RoutingRecord, Site


Attends = Literal["last", "all"] | None


@dataclass(frozen=True)
class RouterInputs:
    """Everything a router may look at.

    Args:
        x_BTD: Hidden states that enter the routed part: the residual stream, or what the layer's input norm makes of
            it for routers that are ``normed``.
        tokens: Facts about the tokens.
        records: What earlier sites of this forward decided, first layer first.
        site: The place that is decided on.
        attention_BT: The attention that each token received in the layer before, for routers that declare the need.
        words_BT: The tokens' numbers in the vocabulary; None where the model was not asked by them.
    """

    x_BTD: Tensor
    tokens: Tokens
    records: Sequence[RoutingRecord]
    site: Site
    attention_BT: Tensor | None = None
    words_BT: Tensor | None = None


class Router(nn.Module, ABC):
    """The module that scores; its parameters live on the model's root, in ``model.routers``.

    ``attends`` declares that it needs the attention of the layer before, and which tokens' attention that is;
    ``normed`` that it reads its layer's input norm; ``forecasts`` that it has a ``forecast``. ``pure`` declares, of the
    very class and no subclass, that it makes everything of hidden states, facts about the tokens and tensors of its
    own, on their device and without chance: then a step of decoding replays it, as a CUDA graph.
    """

    attends: Attends = None
    normed: bool = False
    forecasts: bool = False
    pure: bool = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model, and stays float32 when it is cast: rounded scores tie."""

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            is_cast = tensor.dtype is torch.float32 and made.dtype in (torch.float16, torch.bfloat16, torch.float64)
            return tensor.to(made.device) if is_cast else made

        return cast(Self, super()._apply(moved, recurse))  # type: ignore[no-untyped-call]

    @abstractmethod
    def forward(self, inputs: RouterInputs) -> Tensor:
        """Scores, float32 (B, T, E), whatever autocast says."""

    def ranks(self, site: Site, scores_BTE: Tensor, weights_BTE: Tensor) -> Tensor:
        """What a rule ranks by, (B, T, E): the scores, unless the router corrects them without changing the weights."""
        return scores_BTE

    def forecast(self, inputs: RouterInputs, scores_BTE: Tensor) -> Tensor | None:
        """Logits (B, T, 1), positive where a token that is seen alone would be taken from among all of them."""
        return None


class RouterSpec(ABC):
    """What a config says about a router; the plugin builds one module from it per layer, or one for all layers."""

    @abstractmethod
    def build(self, dim: int, experts: int) -> Router:
        """A router from ``dim`` features to ``experts`` scores."""

    def for_each_modality(self) -> RouterSpec:
        """One like this for vision tokens, and one for all others."""
        return ModalityRouter(self, self)


class FewScores(nn.Linear):
    """A linear map to a few scores."""

    def forward(self, input: Tensor) -> Tensor:
        """As products and sums where a compiler fuses them: it reads the hidden states once, as they are stored."""
        if not torch.compiler.is_compiling() or self.out_features > 8:
            return super().forward(input)
        scores = torch.stack([(input * row).sum(-1) for row in self.weight], -1)
        return scores if self.bias is None else scores + self.bias


def _linear(dim: int, out: int, *, bias: bool, std: float, start: float = 0.0) -> nn.Linear:
    linear = FewScores(dim, out, bias=bias, dtype=torch.float32)
    nn.init.normal_(linear.weight, std=std)
    if bias:
        nn.init.constant_(linear.bias, start)
    return linear


class Float32Router(Router):
    """Runs ``network`` on float32 hidden states outside autocast: bf16 scores tie, and ties route at random.

    Args:
        network: From hidden states to scores.
        pure: Whether that is so of the network, too.
    """

    def __init__(self, network: nn.Module, pure: bool = False) -> None:
        super().__init__()
        self.network, self.pure = network, pure and type(self) is Float32Router

    def forward(self, inputs: RouterInputs) -> Tensor:
        return in_float32(self.network, inputs.x_BTD)


def in_float32(network: nn.Module, x: Tensor) -> Tensor:
    """What a network makes of float32 inputs, whatever autocast says."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):  # entering it costs more than a small network, in each layer of a step
        plain: Tensor = network(x.float())
        return plain
    with torch.autocast(device, enabled=False):
        y: Tensor = network(x.float())
        return y


def _checked_std(spec: object, std: float) -> None:
    if not 0 <= std < float("inf"):
        raise ValueError(f"{spec}: std must be a finite number >= 0 (0 starts the router at zero scores).")


@dataclass(frozen=True)
class LinearRouter(RouterSpec):
    """One linear map.

    Args:
        bias: Whether it has a bias.
        std: Standard deviation of the initial weights; 0 starts at equal scores, so that every token ties.
        start: Where the bias starts: the first scores lie about it.
    """

    bias: bool = True
    std: float = 0.02
    start: float = 0.0

    def __post_init__(self) -> None:
        _checked_std(self, self.std)
        if self.start and not self.bias:
            raise ValueError(f"{self}: start is the bias's, and there is none. Give bias: true, or start: 0.")

    def build(self, dim: int, experts: int) -> Router:
        return Float32Router(_linear(dim, experts, bias=self.bias, std=self.std, start=self.start), pure=True)


@dataclass(frozen=True)
class MLPRouter(RouterSpec):
    """Linear, GELU, linear.

    Args:
        hidden: Width between the two maps.
        std: Standard deviation of the last map's initial weights; 0 starts at zero scores. The first starts at 0.02.
    """

    hidden: int = 256
    std: float = 0.02

    def __post_init__(self) -> None:
        _checked_std(self, self.std)
        if self.hidden < 1:
            raise ValueError(f"{self}: hidden must be at least 1.")

    def build(self, dim: int, experts: int) -> Router:
        first = _linear(dim, self.hidden, bias=True, std=0.02)
        last = _linear(self.hidden, experts, bias=True, std=self.std)
        return Float32Router(nn.Sequential(first, nn.GELU(), last), pure=True)


class FixedScores(RouterSpec):
    """Scores that nothing is learned for; subclasses are frozen dataclasses that say what a token scores.

    ``attends`` is their router's: whose attention in the layer before they need, of ``last`` or ``all``.
    """

    attends: str | None = None  # no Literal: the parser reads a base class with the names of the subclass's file

    @abstractmethod
    def scores_BT(self, inputs: RouterInputs) -> Tensor:
        """The score of each token, the same for all experts; float32 (B, T)."""

    def build(self, dim: int, experts: int) -> Router:
        return FixedRouter(self, experts)


class FixedRouter(Router):
    """Has no parameters."""

    def __init__(self, scores: FixedScores, experts: int) -> None:
        super().__init__()
        self.scores, self.experts = scores, experts
        self.attends = cast(Attends, scores.attends)

    def forward(self, inputs: RouterInputs) -> Tensor:
        return self.scores.scores_BT(inputs)[..., None].expand(-1, -1, self.experts)


@dataclass(frozen=True)
class Unscored(FixedScores):
    """No router: every token scores 0, so that a rule takes them in the fixed order of ties."""

    def scores_BT(self, inputs: RouterInputs) -> Tensor:
        return inputs.x_BTD.new_zeros(inputs.tokens.shape, dtype=torch.float32)


class TwoHeads(Router):
    """Vision tokens are scored by one router, all others by another."""

    def __init__(self, vision: Router, text: Router) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.normed, self.attends = vision.normed, vision.attends or text.attends
        self.pure = type(self) is TwoHeads and is_pure(vision) and is_pure(text)
        if vision.normed != text.normed or {vision.attends, text.attends} == {"last", "all"}:
            raise ValueError(
                "ModalityRouter: its heads read unlike things, a layer's input or its norm, or the attention of the"
                " last token or of all.\nAllowed: heads that read the same.\nGive both alike."
            )

    def forward(self, inputs: RouterInputs) -> Tensor:
        vision_BT1 = inputs.tokens.kind_BT.eq(TokenKind.VISION)[..., None]
        return torch.where(vision_BT1, self.vision(inputs), self.text(inputs))


@dataclass(frozen=True)
class ModalityRouter(RouterSpec):
    """Separate routers for vision tokens and for text.

    Args:
        vision: Scores the vision tokens.
        text: Scores all other tokens.
    """

    vision: RouterSpec = LinearRouter()
    text: RouterSpec = LinearRouter()

    def build(self, dim: int, experts: int) -> Router:
        return TwoHeads(self.vision.build(dim, experts), self.text.build(dim, experts))

    def for_each_modality(self) -> RouterSpec:
        raise ValueError(
            "router: ModalityRouter has a head for vision and one for text already, and modalities: separate would give"
            " it two of each.\nAllowed: one of the two.\nLeave modalities out, or give its head as the router."
        )
