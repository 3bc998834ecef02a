"""A LLaVA JSON file, read whole: its usable records, and what was wrong with the others."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.records import BadSampleError, Record, SkipPolicy, describe, parse


@dataclass(frozen=True)
class Reading:
    """What a file gave.

    Args:
        records: Those that can be used.
        skipped: How many others there were, by reason.
        changed: How many are used otherwise than written, by what was changed.
    """

    records: list[Record]
    skipped: Counter[str]
    changed: Counter[str]

    def __str__(self) -> str:
        """What the user should hear of; empty if nothing."""
        told = {"skipped": self.skipped, "changed": self.changed}
        return "; ".join(f"records {what}: {describe(counts)}" for what, counts in told.items() if counts)


def read_records(path: Path, policy: SkipPolicy) -> Reading:
    """The records of a LLaVA JSON file.

    Raises:
        ValueError: it is no such file, or too many of its records cannot be used.
    """
    entries = _entries(path)
    records, skipped = [], Counter[str]()
    for place, entry in enumerate(entries):
        try:
            records.append(parse(entry, f"{path}[{place}]"))
        except BadSampleError as error:
            if policy.on_bad_sample == "raise":
                raise
            skipped[error.reason] += 1
    policy.check(skipped, len(entries), f"records of {path}")
    if not records:
        raise ValueError(
            f"{path} holds no record that can be used ({describe(skipped) or 'the list is empty'}).\nAllowed: at least"
            " one.\nRepair the file, or give another."
        )
    return Reading(records, skipped, Counter(record.changed for record in records if record.changed))


def _entries(path: Path) -> list[Any]:
    text = ""
    try:
        raw = json.loads(text := path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        remedy = "Give the path of the JSON file" + " in it" * path.is_dir()
        raise _unread(path, f"cannot be read, it is not a file ({error.strerror})", remedy) from error
    except UnicodeDecodeError as error:
        raise _unread(path, f"is not UTF-8 ({error.reason} at byte {error.start})", "Write it as UTF-8") from error
    except RecursionError as error:
        raise _unread(path, "is nested too deeply", "Give another file") from error
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg} at line {error.lineno}, column {error.colno})"
        raise _unread(path, problem, _remedy(error, text)) from error
    except ValueError as error:
        raise _unread(path, f"holds a number that Python does not read ({error})", "Repair the file") from error
    if not isinstance(raw, list):
        raise _unread(path, f"holds one {type(raw).__name__}", "Put its records into a list")
    return raw


def _remedy(error: json.JSONDecodeError, text: str) -> str:
    if error.msg == "Extra data" and error.lineno > 1:
        return "If it is JSON Lines, put its lines into a list: jq -s . FILE"
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return "It seems to be cut short: write or fetch it again" if cut else "Repair the file"


def _unread(path: Path, problem: str, remedy: str) -> ValueError:
    return ValueError(f"{path} {problem}.\nAllowed: one JSON list of LLaVA records, in UTF-8.\n{remedy}.")
