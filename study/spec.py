"""What a study file says: arms, levels, seeds, and the comparison that is stated beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, get_loader
from yaml import YAMLError

PARENT, PLOTS = "parent", "plots"
RESERVED = (PARENT, PLOTS)  # folders beside the arms'
Overrides = dict[str, Any]
Explain = Callable[[str], str]


@dataclass(frozen=True)
class Arm:
    """One way to train, compared with the others.

    Args:
        config: YAML files that are read after the base, in this order.
        set: Values over those of the configs, nested as in a config.
        levels: Names of levels at which the arm is run; or a mapping from such names to more values of this arm.
        fit: Whether it trains; else it is tested as it starts.
        group: Arms of one group are drawn with one kind of line.
    """

    config: str | list[str] = field(default_factory=list)
    set: Overrides = field(default_factory=dict)
    levels: list[str] | dict[str, Overrides] = field(default_factory=list)
    fit: bool = True
    group: str = ""


@dataclass(frozen=True)
class Parent:
    """A run per seed whose weights all arms of that seed start from; it is only trained and tested.

    Args:
        config: YAML files that are read after the base, in this order.
        set: Values over those of the configs, nested as in a config.
    """

    config: str | list[str] = field(default_factory=list)
    set: Overrides = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """The comparison that the study was made for.

    Args:
        contrast: Two arms, the second the control; they are compared at each level that they share.
        metric: ``macro`` (every kind of question weighs the same), ``all`` (every question does), or one kind.
    """

    contrast: tuple[str, str]
    metric: str = "macro"


@dataclass(frozen=True)
class Sign:
    """A published comparison, of which only the sign is expected to come out.

    Args:
        claim: What was published, and where.
        better: The arm that is said to be better.
        worse: The other arm.
        level: The level of both; none where they have none.
    """

    claim: str
    better: str
    worse: str
    level: str = ""

    def cell(self, arm: str) -> str:
        """An arm at the level."""
        return f"{arm}/{self.level}" if self.level else arm


@dataclass(frozen=True)
class Study:
    """A grid of arms x levels x seeds.

    Args:
        folder: Where everything goes.
        base: YAML files that every run reads first.
        arms: What is compared, by name.
        reference: The arm, without levels, that accuracy, time and FLOPs are relative to.
        endpoint: The comparison that is stated beforehand.
        set: Values over those of the base for every run, nested as in a config.
        seeds: Seeds of the trainings; the data are the same for all.
        levels: Values of each level, by name, for all arms that are run at it.
        parent: What all arms start from; none by default.
        contrasts: Further pairs of arms, compared at each level that they share.
        signs: Published comparisons, for the scoreboard.
        conclusion: What the authors make of the finished page, printed on it as it is.
        margin: Difference to the reference that does not matter, as a share, in (0, 1).
        jobs: Runs side by side, at least 1.
        keep_checkpoints: Whether the arms' final weights stay; the parent's always do.
        timing: Whether each arm is timed alone when all runs are over.
        rounds: Rounds of the timing; with 0, FLOPs and bytes are counted and nothing is timed.
    """

    folder: str
    base: str | list[str]
    arms: dict[str, Arm]
    reference: str
    endpoint: Endpoint
    set: Overrides = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    levels: dict[str, Overrides] = field(default_factory=dict)
    parent: Parent | None = None
    contrasts: list[tuple[str, str]] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)
    conclusion: str = ""
    margin: float = 0.01
    jobs: int = 1
    keep_checkpoints: bool = False
    timing: bool = True
    rounds: int = 7

    def __post_init__(self) -> None:
        known = [*self.arms, *([PARENT] if self.parent else [])]
        for where, name in self._named():
            _member(where, name, known, "an arm")
        for sign in self.signs:
            for arm in (sign.better, sign.worse):
                if sign.level or self.arms[arm].levels:
                    _member("signs", sign.level, self.arms[arm].levels, f"a level of {arm}")
        for arm, level in ((name, level) for name, one in self.arms.items() for level in one.levels):
            if isinstance(self.arms[arm].levels, list):
                _member(f"arms.{arm}.levels", level, self.levels, "a level")
        for name in [*self.arms, *self.levels, *(level for arm in self.arms.values() for level in arm.levels)]:
            if not re.fullmatch(r"\w[\w.+-]*", name) or name in RESERVED:
                raise ValueError(
                    f"{name!r} is to name a folder.\nAllowed: letters, digits and . _ + -, but not"
                    f" {' or '.join(RESERVED)}.\nGive the arm or level another name."
                )
        if self.reference in self.arms and (levels := self.arms[self.reference].levels):
            raise ValueError(
                f"reference: {self.reference} has levels {', '.join(levels)}.\nAllowed: an arm that is run once per"
                " seed.\nGive such an arm."
            )
        for where, given in self._sets():
            if "seed_everything" in given or "logger" in (given.get("trainer") or {}):
                raise ValueError(
                    f"{where} has seed_everything or trainer.logger.\nAllowed: everything else; the study gives each"
                    " run its seed and folder.\nLeave it out, and give `seeds` and `folder`."
                )
        self._check_numbers()

    def _named(self) -> Iterable[tuple[str, str]]:
        yield "reference", self.reference
        for where, pair in [("endpoint.contrast", self.endpoint.contrast), *(("contrasts", p) for p in self.contrasts)]:
            yield from ((where, name) for name in pair)
        for sign in self.signs:
            yield from (("signs", name) for name in (sign.better, sign.worse))

    def _sets(self) -> Iterable[tuple[str, Overrides]]:
        yield "set", self.set
        yield from ((f"levels.{name}", given) for name, given in self.levels.items())
        for name, arm in ((PARENT, self.parent), *((f"arms.{name}", arm) for name, arm in self.arms.items())):
            yield f"{name}.set", arm.set if arm else {}
            if isinstance(arm, Arm) and isinstance(arm.levels, dict):
                yield from ((f"{name}.levels.{level}", given) for level, given in arm.levels.items())

    def _check_numbers(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds: {self.seeds}.\nAllowed: different whole numbers from 0, at least one.\nGive those."
            )
        if not 0 < self.margin < 1:
            raise ValueError(f"margin: {self.margin}.\nAllowed: a share between 0 and 1.\nGive 0.01 for one point.")
        for name, least in (("jobs", 1), ("rounds", 0)):
            if (given := getattr(self, name)) < least:
                raise ValueError(f"{name}: {given}.\nAllowed: whole numbers from {least}.\nGive one of these.")


def _member(where: str, name: str, known: Iterable[str], what: str) -> None:
    if name not in (known := list(known)):
        near = get_close_matches(name, known, n=1)
        advice = f"Did you mean {near[0]!r}?" if near else "Give one of these."
        raise ValueError(f"{where}: {name!r} is not {what}.\nAllowed: {', '.join(known) or 'none is there'}.\n{advice}")


def read(path: Path, explain: Explain = str) -> Study:
    """A study file.

    Args:
        path: The file.
        explain: Says one of jsonargparse's complaints in a few lines.

    Raises:
        ValueError: a key or a value that a study cannot have.
    """
    given = mapping(path)
    _keys(Study, given, "")
    arms = {str(name): _arm(f"arms.{name}", arm, explain) for name, arm in _mapping("arms", given.pop("arms")).items()}
    own, levels = _mapping("set", given.pop("set", None) or {}), _by_name("levels", given.pop("levels", None))
    parent = given.pop("parent", None)
    _keys(Endpoint, given["endpoint"], "endpoint.")
    values = _values(Study, given, "", explain)
    return Study(
        **values, arms=arms, set=own, levels=levels, parent=None if parent is None else _parent(parent, explain)
    )


def mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    if not path.is_file():
        raise ValueError(
            f"There is no file {path}.\nAllowed: YAML; the repository's lies in configs/.\nCheck the path."
        )
    try:
        return _mapping(str(path), get_loader("yaml")(path.read_text()))
    except YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def _mapping(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} is not allowed.\nAllowed: keys with values.\nGive these.")
    return given


def _arm(where: str, given: Any, explain: Explain) -> Arm:
    given = dict(_mapping(where, {} if given is None else given))
    _keys(Arm, given, f"{where}.")
    own, levels = _mapping(f"{where}.set", given.pop("set", None) or {}), given.pop("levels", None) or []
    levels = list(map(str, levels)) if isinstance(levels, list) else _by_name(f"{where}.levels", levels)
    return Arm(**_values(Arm, given, f"{where}.", explain), set=own, levels=levels)


def _parent(given: Any, explain: Explain) -> Parent:
    _keys(Parent, given, "parent.")
    own = _mapping("parent.set", given.pop("set", None) or {})
    return Parent(**_values(Parent, given, "parent.", explain), set=own)


def _by_name(where: str, levels: Any) -> dict[str, Any]:
    """YAML reads 0.75 as a number, and nothing as null."""
    return {str(name): values or {} for name, values in _mapping(where, levels or {}).items()}


def _keys(cls: type, given: Any, where: str) -> None:
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    for key in _mapping(where.rstrip(".") or "the study", given):
        _member(where.rstrip(".") or "the study", str(key), known, "a key")
    if missing := [f"{where}{name}" for name, needed in known.items() if needed and given.get(name) is None]:
        raise ValueError(f"{', '.join(missing)}: missing.\nGive what the study needs; configs/studies has examples.")


def _values(cls: type, given: Mapping[str, Any], where: str, explain: Explain) -> dict[str, Any]:
    """What jsonargparse makes of all but the overrides, in which it would make objects of classes."""
    hints, parser = get_type_hints(cls), ArgumentParser(exit_on_error=False)
    for name in given:
        parser.add_argument(f"--{name}", type=hints[name])
    try:
        return vars(parser.instantiate(parser.parse_object(dict(given))))
    except ArgumentError as error:
        raise ValueError(where + explain(str(error))) from error
