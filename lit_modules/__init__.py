"""Training: a routed vision-language model, where it comes from, what trains in it, and how it is judged."""

from lit_modules.answer_writer import AnswerWriter
from lit_modules.backbones import Backbone, FromConfig, Pretrained
from lit_modules.evaluation import Generation
from lit_modules.monitor import RoutingMonitor
from lit_modules.objectives import LanguageModelling, Objective, Step
from lit_modules.optimization import Optimization
from lit_modules.outcome_writer import OutcomeWriter
from lit_modules.routed_vlm import RoutedVLM
from lit_modules.routing_experts import RoutingExperts
from lit_modules.routing_truth import RoutingTruth
from lit_modules.tiny_llava import TinyLlava
from routing.specs import to_spec

__all__ = [
    "AnswerWriter",
    "Backbone",
    "FromConfig",
    "Generation",
    "LanguageModelling",
    "Objective",
    "Optimization",
    "OutcomeWriter",
    "Pretrained",
    "RoutedVLM",
    "RoutingExperts",
    "RoutingMonitor",
    "RoutingTruth",
    "Step",
    "TinyLlava",
    "to_spec",
]
