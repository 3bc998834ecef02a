"""The algebra of routing: which tokens does this piece of computation get, and how much of its answer do they keep?"""

from routing.cache import RoutedKV
from routing.capacity import CapacitySchedule, Constant, Linear, PerLayer, ShiftedCosine, WarmUp
from routing.decision import Decision, ExpertChoices, KeptTokens, TokenChoices
from routing.decoder import Decoder, Sharing
from routing.gate import Gate
from routing.layer import RoutedLayer, route_layer
from routing.loss import AuxLoss, LoadBalance, RouterCrossEntropy, ZLoss
from routing.merge import FeedForwardBranch, Merge, ScaledPassing, WholeBlock
from routing.placement import All, Between, Every, Layers, Placement
from routing.plugin import RoutingPlugin, attach, discover, register, registered
from routing.router import LinearRouter, MLPRouter, ModalityRouter, Router, RouterInputs, RouterSpec
from routing.select import DepthSelector, ExpertChoice, SelectBy, Selector, Threshold, TokenChoice, count_of
from routing.tape import RoutingRecord, RoutingTape, Site
from routing.tokens import TokenKind, Tokens
from routing.weighting import Sigmoid, Softmax, TanhNorm, Weighting

__all__ = [
    "All",
    "AuxLoss",
    "Between",
    "CapacitySchedule",
    "Constant",
    "Decision",
    "Decoder",
    "DepthSelector",
    "Every",
    "ExpertChoice",
    "ExpertChoices",
    "FeedForwardBranch",
    "Gate",
    "KeptTokens",
    "Layers",
    "Linear",
    "LinearRouter",
    "LoadBalance",
    "MLPRouter",
    "Merge",
    "ModalityRouter",
    "PerLayer",
    "Placement",
    "RoutedKV",
    "RoutedLayer",
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
    "TanhNorm",
    "Threshold",
    "TokenChoice",
    "TokenChoices",
    "TokenKind",
    "Tokens",
    "WarmUp",
    "Weighting",
    "WholeBlock",
    "ZLoss",
    "attach",
    "count_of",
    "discover",
    "register",
    "registered",
    "route_layer",
]
