"""What a token that is seen alone can know of the top-k among all tokens: a predictor, and a calibrated threshold.

Shape suffixes: B batch, T tokens, E scores of a token (1, as layers are routed in depth), L decoder layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from routing.gate import Gate
from routing.loss import AuxLoss
from routing.router import LinearRouter, MLPRouter, Router, RouterInputs, RouterSpec
from routing.select import DepthSelector
from routing.step_graph import is_pure
from routing.tape import RoutingRecord
from routing.tokens import Phase, Tokens

MOST_LAYERS = 256  # one router may serve all layers, and is built before anybody tells how many there are


class ForecastingRouter(Router):
    """Scores as another router does, and has a forecast beside."""

    forecasts = True

    def __init__(self, scorer: Router) -> None:
        super().__init__()
        self.scorer, self.attends, self.normed = scorer, scorer.attends, scorer.normed

    def forward(self, inputs: RouterInputs) -> Tensor:
        scores_BTE: Tensor = self.scorer(inputs)
        return scores_BTE


class PredictedRouter(ForecastingRouter):
    """Forecasts by a network of its own, which the hidden states learn nothing from."""

    def __init__(self, scorer: Router, predictor: Router) -> None:
        super().__init__(scorer)
        self.predictor = predictor
        self.pure = type(self) is PredictedRouter and is_pure(scorer) and is_pure(predictor)

    def forecast(self, inputs: RouterInputs, scores_BTE: Tensor) -> Tensor:
        forecast_BT1: Tensor = self.predictor(replace(inputs, x_BTD=inputs.x_BTD.detach()))
        return forecast_BT1


@dataclass(frozen=True)
class Predicted(RouterSpec):
    """A second, small network tells from the token alone whether the top-k takes it (arXiv 2404.02258, section 3.5).

    It sees the hidden state behind a stop-gradient and learns from ``ForecastCrossEntropy`` alone; ``Forecast`` decides
    by it where tokens cannot be ranked.

    Args:
        router: How tokens are scored.
        hidden: Width of the network: linear, GELU, linear.
    """

    router: RouterSpec = LinearRouter()
    hidden: int = 64

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"{self}: hidden must be at least 1.")

    def build(self, dim: int, experts: int) -> Router:
        return PredictedRouter(self.router.build(dim, experts), MLPRouter(self.hidden).build(dim, 1))

    def for_each_modality(self) -> RouterSpec:
        return replace(self, router=self.router.for_each_modality())


class CalibratedRouter(ForecastingRouter):
    """Forecasts by how far a score exceeds its layer's cut, which is measured, not learned.

    Attributes:
        cut_L: Score above which a token of that layer enters; 0 until it is measured.
        measured_L: Whether it was.
    """

    cut_L: Tensor
    measured_L: Tensor

    def __init__(self, scorer: Router) -> None:
        super().__init__(scorer)
        self.pure = type(self) is CalibratedRouter and is_pure(scorer)
        self.register_buffer("cut_L", torch.zeros(MOST_LAYERS, dtype=torch.float32))
        self.register_buffer("measured_L", torch.zeros(MOST_LAYERS, dtype=torch.bool))
        self._unasked: set[int] | None = None

    def forecast(self, inputs: RouterInputs, scores_BTE: Tensor) -> Tensor:
        if inputs.tokens.phase != "train":
            self._warn_unless_measured(inputs)
        return scores_BTE.detach() - self.cut_L[checked_layer(inputs.site.layer)]

    def calibrate(self, layer: int, cut: float) -> None:
        """From now on tokens of this layer enter whose score exceeds ``cut``."""
        self.cut_L[checked_layer(layer)] = cut
        self.measured_L[layer] = True
        self._unasked = self._unmeasured()  # a step that is replayed later may not ask

    def _unmeasured(self) -> set[int]:
        return {layer for layer, measured in enumerate(self.measured_L.tolist()) if not measured}

    def _warn_unless_measured(self, inputs: RouterInputs) -> None:
        if self._unasked is None:  # the host asks the device once, not in every forward
            self._unasked = self._unmeasured()
        if inputs.site.layer in self._unasked:
            self._unasked.remove(inputs.site.layer)
            warnings.warn(  # names no layer, so that Python says it once for all of them
                f"Plugin {inputs.site.by!r} decides by thresholds that nobody calibrated: tokens enter whose score is"
                " above 0.\nAdd the callback CalibrateThresholds to the training, or call"
                " lit_modules.calibration.calibrate on the trained model.",
                stacklevel=2,
            )

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._unasked = None if self.measured_L.is_meta else self._unmeasured()


def checked_layer(layer: int) -> int:
    if layer >= MOST_LAYERS:
        raise ValueError(
            f"Calibrated: layer {layer} is routed.\nAllowed: layers 0 to {MOST_LAYERS - 1}.\nRoute earlier layers, or"
            " raise MOST_LAYERS in routing/forecast.py."
        )
    return layer


@dataclass(frozen=True)
class Calibrated(RouterSpec):
    """A token is expected to be taken if its score exceeds its layer's cut, which held-out data set once.

    The callback ``CalibrateThresholds`` chooses each cut so that as many tokens exceed it as the capacity asks for, and
    checkpoints keep it; before, it is 0. ``Forecast`` decides by it where tokens cannot be ranked.

    Args:
        router: How tokens are scored.
    """

    router: RouterSpec = LinearRouter()

    def build(self, dim: int, experts: int) -> Router:
        return CalibratedRouter(self.router.build(dim, experts))

    def for_each_modality(self) -> RouterSpec:
        return replace(self, router=self.router.for_each_modality())


@dataclass(frozen=True)
class Forecast(DepthSelector):
    """Each token decides alone, by its router's forecast (``Predicted``, ``Calibrated``); its weight is the router's.

    How many enter depends on the data, so each layer asks the device once for its longest row.

    Args:
        routes: Kinds of tokens that are routed.
        p: Probability above which a token enters, the sigmoid of the forecast, in (0, 1).
    """

    p: float = 0.5
    causal = True
    pure = True
    reads = "forecast"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p < 1:
            raise ValueError(f"Forecast(p={self.p}): a probability in (0, 1); 0.5 takes whom the forecast favours.")

    def chosen_BT(
        self, scores_BT: Tensor, weights_BT: Tensor, candidate_BT: Tensor, tokens: Tokens, capacity: float
    ) -> Tensor:
        return (scores_BT.sigmoid() > self.p) & candidate_BT

    def most(self, candidates: int, capacity: float) -> None:
        return None


@dataclass(frozen=True)
class ForecastCrossEntropy(AuxLoss):
    """Binary cross-entropy between a router's forecast and its own selection, over the tokens that it decided on.

    Teaches the predictor, and nothing else, to tell the top-k from the token alone (arXiv 2404.02258, section 3.5).

    Args:
        weight: Factor in the objective.
    """

    weight: float = 0.01

    def __call__(self, record: RoutingRecord) -> Tensor:
        forecast_BT1 = record.forecast_BTE
        if forecast_BT1 is None:
            raise ValueError(
                f"ForecastCrossEntropy: the router of layer {record.site.layer} (plugin {record.site.by!r}) makes no"
                " forecast.\nAllowed: a router that learns one.\nGive `router: Predicted`, or leave this loss out."
            )
        if torch.is_grad_enabled() and not forecast_BT1.requires_grad:
            raise ValueError(
                f"ForecastCrossEntropy: the forecast of layer {record.site.layer} (plugin {record.site.by!r}) is"
                " measured, not learned.\nAllowed: a router that learns one.\nGive `router: Predicted`, or leave this"
                " loss out."
            )
        target_BT1 = record.decision.routed_BTE(forecast_BT1.shape[1], 1).to(forecast_BT1.dtype)
        loss_BT = F.binary_cross_entropy_with_logits(forecast_BT1, target_BT1, reduction="none")[..., 0]
        return loss_BT.masked_fill(~record.candidate_BT, 0).sum() / record.candidate_BT.sum().clamp_min(1)


def check_taught(by: str, losses: Iterable[AuxLoss], gates: Iterable[Gate]) -> None:
    """Raises ValueError if a rule reads the forecast of a predictor that no loss teaches."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    read = any(
        isinstance(gate.router, PredictedRouter) and gate.selector.rule(phase).reads == "forecast"
        for gate in gates
        for phase in phases
    )
    if read and not any(isinstance(loss, ForecastCrossEntropy) for loss in losses):
        raise ValueError(
            f"Plugin {by!r}: its rules of inference read a predictor (router: Predicted) that no loss teaches.\n"
            "Allowed: with ForecastCrossEntropy among its losses.\nGive losses: [{class_path: ForecastCrossEntropy}]."
        )
