"""Short answers to mistakes in configs: what was given, what is allowed, what to do."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pydoc import locate
from typing import get_args, get_type_hints

from routing.plugin import broken

LONGEST = 10  # lines
SECTIONS = ("model", "data", "trainer", "seed_everything", "ckpt_path")

# Lines of jsonargparse's nested report that say nothing to the person who made the mistake.
NOISE = re.compile(
    r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but|$"
    r"|Subclass types expect|a class path \(|a dict with)"
)
STEP = re.compile(r"^(?:- )?(?:Parser key \"(?P<key>[^\"]+)\"|Problem with given class_path '(?P<cls>[^']+)'):\s*")


@dataclass(frozen=True)
class Leaf:
    """One thing that jsonargparse complains about.

    Args:
        keys: Keys that lead to it.
        owner: Path of the innermost class, or "".
        text: The complaint.
    """

    keys: tuple[str, ...]
    owner: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A mistake in three parts.

    Args:
        problem: What was given, and where.
        allowed: What could stand there, or "".
        remedy: What to do, or "".
    """

    problem: str
    allowed: str = ""
    remedy: str = ""


def explain(message: str, options: Iterable[str] = (), bases: Mapping[str, type] | None = None) -> str:
    """At most ten lines for one of jsonargparse's messages.

    Args:
        message: What jsonargparse says.
        options: Options of the parser, for those that it does not know.
        bases: The class that a top-level key holds.
    """
    if not re.search(r"Parser key|Does not validate|^(Subcommand|unrecognized|Expected|Option|Key)", message):
        return "\n".join(line[:500] for line in message.splitlines()[:LONGEST])
    known = [option for option in options if not option.endswith(".help")]
    complaints = list(leaves(message))
    # Of a union's alternatives, the one that came furthest into the value is the one that was meant.
    meant = [leaf for leaf in complaints if not any(deeper(other, leaf) for other in complaints)]
    found = [_answer(leaf, known, bases or {}) for leaf in meant]
    # Of a union's complaints, the one about a class says most.
    found = [answer for answer in found if "there is no" in answer.problem] or found
    lines = []
    for problem in dict.fromkeys(answer.problem for answer in found):
        same = [answer for answer in found if answer.problem == problem]
        allowed = ", ".join(dict.fromkeys(answer.allowed for answer in same if answer.allowed))
        lines += [problem, f"Allowed: {allowed}." if allowed else "", same[0].remedy]
    text = _once("\n".join(line for line in lines if line)) or message
    return "\n".join(line[:500] for line in text.splitlines()[:LONGEST])


def _once(text: str) -> str:
    """``text`` with a key that heads several lines in a row only at the first."""
    head, lines = "", []
    for line in text.splitlines():
        lines.append(line.removeprefix(head) if head else line)
        key = re.match(r"[a-z]\w*(\.\w+)*: ", line)
        head = key[0] if key else ""
    return "\n".join(lines)


def deeper(one: Leaf, other: Leaf) -> bool:
    """Whether ``one`` lies inside what ``other`` is about."""
    return len(one.keys) > len(other.keys) and one.keys[: len(other.keys)] == other.keys


def leaves(message: str) -> Iterator[Leaf]:
    """The complaints in jsonargparse's indented report, without the alternatives that nobody meant."""
    trail: list[tuple[int, str, str]] = []
    value = re.search(r"Given value: (?!Namespace|NestedArg|\{)(.+)", message)
    for line in filter(str.strip, message.splitlines()):
        indent, text = len(line) - len(line.lstrip()), line.strip()
        trail = [step for step in trail if step[0] < indent]
        while match := STEP.match(text):
            trail.append((indent, match["key"] or "", match["cls"] or ""))
            text = text[match.end() :]
        text = text.removeprefix("- ")
        if value and re.match(r"Expected an? (?!dot import)", text) and "Got value" not in text:
            text = f"{text}. Got value: {value[1]}"
        if not NOISE.match(text):
            classes = [cls for _, _, cls in trail if cls]
            yield Leaf(tuple(key for _, key, _ in trail if key), classes[-1] if classes else "", text)


def _answer(leaf: Leaf, options: Sequence[str], bases: Mapping[str, type]) -> Answer:
    where = f"{'.'.join(leaf.keys)}: " if leaf.keys else ""
    if match := re.match(r"Expected a dot import path string: (.+)", leaf.text):
        base = _base(leaf, bases)
        if match[1] in broken():
            return Answer(f"{where}there is no {_name(base)} {match[1]!r}.", "", broken()[match[1]])
        return Answer(f"{where}there is no {_name(base)} {match[1]!r}.", *_offer(match[1], concrete(base)))
    if match := re.match(r"(?:Option|Key|Nested key) '([^']+)' is not (?:accepted|expected)", leaf.text):
        return _no_option(where, match[1], leaf.owner, options)
    if match := re.match(r"Group '([^']+)' does not accept option '([^']+)'", leaf.text):
        group = _class_at(leaf.owner, match[1])
        return _no_option(f"{where}{match[1]}: ", match[2], f"{group.__module__}.{group.__name__}", ())
    if match := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", leaf.text):
        section, _, rest = match[1].partition(".")
        if section in bases:
            return _no_option(f"{section}: ", rest, f"{bases[section].__module__}.{bases[section].__name__}", ())
        return Answer(f"there is no section {section!r}.", *_offer(section, SECTIONS))
    if match := re.match(r"unrecognized arguments: (\S+)", leaf.text):
        return Answer(f"there is no option {match[1]!r}.", *_offer(match[1].partition("=")[0], options))
    if match := re.match(r"Unexpected import path format: (.+)", leaf.text):
        base = _base(leaf, bases)
        listed = _offer("", concrete(base))[0]
        return Answer(f"{where}{match[1]!r} names no {_name(base)}.", listed, "Give {class_path: …, init_args: {…}}.")
    if match := re.match(r"Expected a member of <enum '\w+'>: \{(.+)\}\. Got value: (.+)", leaf.text):
        return Answer(f"{where}there is no {match[2]!r}.", *_offer(match[2], match[1].split(",")))
    if match := re.match(
        r"Expected an? (?:typing\.Literal\[|<class ')?([^>]+?)(?:'>|\])?\. Got value: (.+)", leaf.text
    ):
        allowed = {"tuple": "a list, as [a, b]"}.get(match[1], match[1])
        return Answer(f"{where}{match[2]!r} is not allowed.", allowed, "Give one of these.")
    if match := re.match(r"Not a valid subclass of (\w+)\. Got value: (.+)", leaf.text):
        given = "what is given" if match[2].startswith(("Namespace", "{")) else repr(match[2])
        return Answer(
            f"{where}{given} does not say which {match[1]}.",
            _offer("", concrete(_base(leaf, bases)))[0],
            "Give {class_path: …, init_args: {…}}; behind a config that has one, init_args alone.",
        )
    if match := re.match(r"the following arguments are required: (.+)", leaf.text):
        return Answer(
            f"{where}{match[1]} is missing.", "", "Give it, or a --config that does: configs/quickstart.yaml."
        )
    if leaf.text.startswith("File does not exist"):
        return Answer(where + leaf.text, "", "Give the path of a YAML file; those of the repository lie in configs/.")
    return Answer(where + leaf.text)


def _no_option(where: str, path: str, owner: str, options: Sequence[str]) -> Answer:
    name = owner.rpartition(".")[2] or "the config"
    allowed = _arguments(owner) if owner else options
    first, last = path.partition(".")[0], path.rpartition(".")[2]
    given = last if first in allowed else first
    return Answer(f"{where}{name} has no option {given!r}.", *_offer(given, allowed))


def _base(leaf: Leaf, bases: Mapping[str, type]) -> type:
    if leaf.owner:
        return _class_at(leaf.owner, leaf.keys[-1])
    return bases.get(leaf.keys[-1] if leaf.keys else "", object)


def _class_at(owner: str, argument: str) -> type:
    hints: dict[str, object] = {}
    # A dataclass's own hints know the module of each inherited field; those of its __init__ do not.
    for source in (_class(owner).__init__, _class(owner)):
        with suppress(NameError):
            hints |= get_type_hints(source)
    return next(_classes(hints.get(argument)), object)


def _classes(hint: object) -> Iterator[type]:
    for part in get_args(hint) or (hint,):
        if isinstance(part, type) and not get_args(part) and part not in (str, int, float, bool, type(None)):
            yield part
        elif get_args(part):
            yield from _classes(part)


def concrete(base: type) -> list[str]:
    """Short names of the classes that can stand where ``base`` is asked for."""
    if base is object:
        return []
    known = {base, *base.__subclasses__()}
    while grown := {sub for cls in known for sub in cls.__subclasses__()} - known:
        known |= grown
    ours = [
        cls for cls in known if not inspect.isabstract(cls) and cls is not base and not cls.__name__.startswith("_")
    ]
    return sorted({cls.__name__ for cls in ours})


def _class(path: str) -> type:
    found = locate(path)
    assert isinstance(found, type), path
    return found


def _arguments(path: str) -> list[str]:
    return [name for name in inspect.signature(_class(path)).parameters]


def _offer(given: str, allowed: Sequence[str]) -> tuple[str, str]:
    if not allowed:
        return "", "Give the name of an imported class, or the path of one, as in package.module.Class."
    near = get_close_matches(given, allowed, n=3, cutoff=0.5)
    names = [*near, *(name for name in allowed if name not in near)]
    listed = ", ".join(names[:12]) + ", …" * (len(names) > 12)
    return listed, f"Did you mean {near[0]!r}?" if near else "Choose one of these."


def _name(base: type) -> str:
    return "class" if base is object else base.__name__
