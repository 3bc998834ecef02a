"""The algebra of routing: which tokens does this piece of computation get, and how much of its answer do they keep?"""

from routing.attended import AttendedLayer
from routing.attention import ReceivedAttention
from routing.cache import RoutedKV
from routing.capacity import CapacitySchedule, Constant, Linear, Nothing, PerLayer, ShiftedCosine, WarmUp
from routing.chance import uniform_BT
from routing.choose import Exceeding, ExpertsChoose, ExpertSelector, TokenChoice
from routing.decision import Decision, ExpertChoices, KeptTokens, MixedChoices, TokenChoices
from routing.decoder import Decoder, Modalities, Positions
from routing.exported import load_routed
from routing.follow import Balanced, Cuts
from routing.forecast import Calibrated, Forecast, ForecastCrossEntropy, Predicted
from routing.gate import FollowingGate, Gate
from routing.intervene import Intervention
from routing.layer import RoutedLayer, route_layer
from routing.loads import load_E
from routing.loss import AuxLoss, BatchLoss, LoadBalance, RouterCrossEntropy, ZLoss
from routing.merge import BothBranches, FeedForwardBranch, Merge, ScaledPassing, WholeBlock
from routing.placement import All, Between, Every, Layers, Placement
from routing.plugin import RoutingPlugin, attach, discover, register, registered
from routing.routed_mlp import RoutedMLP
from routing.router import (
    FixedScores,
    LinearRouter,
    MLPRouter,
    ModalityRouter,
    Router,
    RouterInputs,
    RouterSpec,
    TwoHeads,
    Unscored,
    in_float32,
)
from routing.routers import Sharing
from routing.select import (
    AllOrNothing,
    DepthSelector,
    ExpertChoice,
    MaskedThreshold,
    SelectBy,
    Selector,
    Threshold,
    count_of,
    top_mask,
)
from routing.stored import StoredLayer, stored
from routing.tape import RoutingRecord, RoutingTape, Site
from routing.tokens import TokenKind, Tokens
from routing.upcycling import Copies, Split, Upcycling
from routing.weighting import Sigmoid, Softmax, TanhNorm, Unbounded, Unweighted, Weighting

__all__ = [
    "All",
    "AllOrNothing",
    "AttendedLayer",
    "AuxLoss",
    "Balanced",
    "BatchLoss",
    "Between",
    "BothBranches",
    "Calibrated",
    "CapacitySchedule",
    "Constant",
    "Copies",
    "Cuts",
    "Decision",
    "Decoder",
    "DepthSelector",
    "Every",
    "Exceeding",
    "ExpertChoice",
    "ExpertChoices",
    "ExpertSelector",
    "ExpertsChoose",
    "FeedForwardBranch",
    "FixedScores",
    "FollowingGate",
    "Forecast",
    "ForecastCrossEntropy",
    "Gate",
    "Intervention",
    "KeptTokens",
    "Layers",
    "Linear",
    "LinearRouter",
    "LoadBalance",
    "MLPRouter",
    "MaskedThreshold",
    "Merge",
    "MixedChoices",
    "Modalities",
    "ModalityRouter",
    "Nothing",
    "PerLayer",
    "Placement",
    "Positions",
    "Predicted",
    "ReceivedAttention",
    "RoutedKV",
    "RoutedLayer",
    "RoutedMLP",
    "Router",
    "RouterCrossEntropy",
    "RouterInputs",
    "RouterSpec",
    "RoutingPlugin",
    "RoutingRecord",
    "RoutingTape",
    "ScaledPassing",
    "SelectBy",
    "Selector",
    "Sharing",
    "ShiftedCosine",
    "Sigmoid",
    "Site",
    "Softmax",
    "Split",
    "StoredLayer",
    "TanhNorm",
    "Threshold",
    "TokenChoice",
    "TokenChoices",
    "TokenKind",
    "Tokens",
    "TwoHeads",
    "Unbounded",
    "Unscored",
    "Unweighted",
    "Upcycling",
    "WarmUp",
    "Weighting",
    "WholeBlock",
    "ZLoss",
    "attach",
    "count_of",
    "discover",
    "in_float32",
    "load_E",
    "load_routed",
    "register",
    "registered",
    "route_layer",
    "stored",
    "top_mask",
    "uniform_BT",
]
