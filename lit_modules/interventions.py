"""The same questions asked while something else ranks the tokens: what is the routers' choice worth?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Literal, get_args

import torch
from torch import nn

from lit_modules.exact_match import ExactMatch
from lit_modules.other_image import next_other
from routing import Intervention, RoutedLayer, RoutingTape, TokenKind, Tokens
from routing.intervene import Dense, Oracle, Random, Shuffled, Swapped

InterventionName = Literal["dense", "random", "shuffled", "swapped", "oracle"]
Answers = list[str | None]  # None where a question cannot be asked that way

SEED = 0x5EED  # none that a plugin's own draw is likely to have: a draw replaced by itself would change nothing
LEFT_OUT = {
    "swapped": "their batch has no other picture to swap with",
    "oracle": "nobody said which patches they are about",
}


@dataclass(frozen=True)
class Replaced:
    """Exact match under an intervention, beside the plain one of the same questions.

    Args:
        questions: How many were asked that way; the others are left out of both shares.
        exact_match: Share right under the intervention, in [0, 1]; NaN of none.
        plain: Share of the same questions that is right without, in [0, 1]; NaN of none.
    """

    questions: int
    exact_match: float
    plain: float

    @property
    def change(self) -> float:
        """In points: 100 times the difference to the plain share."""
        return 100 * (self.exact_match - self.plain)

    @classmethod
    def mean(cls, parts: Sequence[Replaced]) -> Replaced:
        """The unweighted mean of the kinds that were asked that way."""
        asked = [part for part in parts if part.questions]
        if not asked:
            return NONE
        shares = (sum(p.exact_match for p in asked) / len(asked), sum(p.plain for p in asked) / len(asked))
        return cls(sum(p.questions for p in asked), *shares)


NONE = Replaced(0, nan, nan)


def check(names: Sequence[str], model: nn.Module) -> None:
    """Raises ValueError if there are interventions and nothing to intervene in."""
    if names and not any(isinstance(layer, RoutedLayer) for layer in model.modules()):
        routed = "routes its experts alone" if hasattr(model, "routing") else "is not routed"
        raise ValueError(
            f"generation.interventions={list(names)} replaces what lets tokens into layers, and this model {routed}.\n"
            "Allowed: a model with a plugin that tokens pass layers by under; experts choose as ever.\nGive one under"
            " model.init_args.plugins, or leave the interventions out."
        )


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for unknown or repeated names."""
    known = get_args(InterventionName)
    if len(set(names)) != len(names) or not set(names) <= set(known):
        raise ValueError(f"interventions={list(names)}: give each of {', '.join(known)} at most once, or none.")


class Interventions(nn.Module):
    """Asks every batch again under each intervention, and counts exact matches by kind over batches and ranks.

    Args:
        names: Of the interventions, in the order of asking.
        kinds: Kinds of questions that are counted apart.
    """

    def __init__(self, names: Sequence[str], kinds: Sequence[str]) -> None:
        super().__init__()
        self.replaced = nn.ModuleDict({name: ExactMatch(kinds) for name in names})
        self.plain = nn.ModuleDict({name: ExactMatch(kinds) for name in names})
        self.told = False  # whether any question about a picture came with its evidence

    def ask(self, batch: Mapping[str, Any], tape: RoutingTape, answer: Callable[[], list[str]]) -> dict[str, Answers]:
        """What ``answer`` says of a batch under each intervention.

        Raises:
            ValueError: the oracle is asked for, and the data carry no evidence.
        """
        found: dict[str, Answers] = {}
        for name in self.replaced:
            if name == "oracle":
                self._check_evidence(batch["tokens"])
            intervention, possible = made(name, batch)
            with tape.intervening(intervention):
                said = answer()
            found[name] = [words if can else None for words, can in zip(said, possible, strict=True)]
        return found

    def _check_evidence(self, tokens: Tokens) -> None:
        pictured, told = _pictured(tokens), _told(tokens)
        self.told |= any(p and t for p, t in zip(pictured, told, strict=True))
        if any(pictured) and not self.told:
            raise ValueError(
                f"The intervention 'oracle' needs evidence, and none of the {sum(pictured)} questions about pictures"
                " in a batch says which patches it is about.\nAllowed: data such as DigitsVQA, or records whose"
                " answers have `evidence`, a list of patch numbers.\nLeave the oracle out of generation.interventions,"
                " or add evidence to the data."
            )

    def update(
        self, kinds: Sequence[str], truths: Sequence[str], plain: Sequence[str], replaced: Mapping[str, Answers]
    ) -> None:
        """Counts one batch: the plain answers, and those that ``ask`` gave."""
        for name, answers in replaced.items():
            asked = [place for place, answer in enumerate(answers) if answer is not None]
            facts = [kinds[i] for i in asked], [truths[i] for i in asked]
            for metric, said in ((self.replaced[name], answers), (self.plain[name], plain)):
                metric.update(facts[0], [str(said[i]) for i in asked], facts[1])

    def compute(self, kinds: Iterable[str]) -> dict[str, dict[str, Replaced]]:
        """For each of ``kinds``, every intervention; a collective call."""
        found: dict[str, dict[str, Replaced]] = {kind: dict.fromkeys(self.replaced, NONE) for kind in kinds}
        for name in self.replaced:
            plain = self.plain[name].compute()
            for kind, (questions, share) in self.replaced[name].compute().items():
                found[kind][name] = Replaced(questions, share, plain[kind][1])
        return found

    def reset(self) -> None:
        """Forgets all counts."""
        self.told = False
        for metric in (*self.replaced.values(), *self.plain.values()):
            metric.reset()


def made(name: str, batch: Mapping[str, Any]) -> tuple[Intervention, list[bool]]:
    """An intervention for a batch, and which of its rows can be asked under it; rows without a picture always can."""
    tokens: Tokens = batch["tokens"]
    everyone = [True] * len(tokens.counts_B)
    match name:
        case "dense":
            return Dense(), everyone
        case "random":
            return Random(SEED), everyone
        case "shuffled":
            return Shuffled(SEED), everyone
        case "swapped":
            donor = donors(batch)
            able = [donor[row] != row or not pictured for row, pictured in enumerate(_pictured(tokens))]
            return Swapped(torch.tensor(donor, device=tokens.kind_BT.device)), able
        case _:
            return Oracle(), [t or not p for p, t in zip(_pictured(tokens), _told(tokens), strict=True)]


def donors(batch: Mapping[str, Any]) -> list[int]:
    """For each row the next one, round the end, that shows another picture: itself where there is none.

    Rows show the same picture if they name the same ``units``, or without those if they have one id.
    """
    shown = batch.get("units") or batch["ids"]
    pictured = [row for row, seen in enumerate(_pictured(batch["tokens"])) if seen]
    order = next_other([str(shown[row]) for row in pictured]) or range(len(pictured))
    donor = list(range(len(shown)))
    for row, other in zip(pictured, order, strict=True):
        donor[row] = pictured[other]
    return donor


def _pictured(tokens: Tokens) -> list[bool]:
    return [n > 0 for n in tokens.count((TokenKind.VISION,))]


def _told(tokens: Tokens) -> list[bool]:
    """Whether somebody said which tokens matter, for each row."""
    if tokens.evidence_BT is None:
        return [False] * len(tokens.counts_B)
    return (tokens.evidence_BT >= 0).all(1).tolist()


def beside(rows: Sequence[dict[str, object]], replaced: Mapping[str, Answers]) -> list[dict[str, object]]:
    """The rows of a batch with what was answered under each intervention, where it was asked."""
    more = ({name: said[i] for name, said in replaced.items() if said[i] is not None} for i in range(len(rows)))
    return [{**row, **answers} for row, answers in zip(rows, more, strict=True)]


def left_out(replaced: Mapping[str, Replaced], questions: int) -> list[str]:
    """A line for each intervention that some of the questions could not be asked under."""
    return [
        f"{name}: {questions - each.questions} of {questions} questions left out: {LEFT_OUT[name]}."
        for name, each in replaced.items()
        if each.questions < questions
    ]
