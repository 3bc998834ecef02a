"""The console script ``lit-routing``: runs ``lit``, unless that name leads to another package, such as LLVM's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OURS = Path(__file__).resolve().with_name("lit.py")


def main() -> None:
    """Runs the command line of ``lit``.

    Raises:
        SystemExit: with code 2 if ``import lit`` would find another package.
    """
    if said := complaint():
        sys.stderr.write(f"error: {said}\n")
        raise SystemExit(2)
    import lit

    lit.main()


def preflight() -> None:
    """Says what is in the way of ``lit-routing``, which ``python -m lit`` in the repository's root is not."""
    if said := complaint():
        sys.stderr.write(f"note: the command lit-routing will not run here.\n{said}\n")


def complaint() -> str:
    """What ``import lit`` finds instead of ours and what to do, or ""; imports nothing."""
    spec = importlib.util.find_spec("lit")
    found = spec and (spec.origin or str(spec.submodule_search_locations))
    if found and Path(found).resolve() == OURS:
        return ""
    return (
        f"`import lit` finds {found or 'nothing'}, not {OURS}.\n"
        "PyPI's package `lit` is LLVM's test runner; only one of the two can have the name in an environment.\n"
        f"Remove it (`{sys.executable} -m pip uninstall lit`; look at PYTHONPATH too), or install lit-routing into a"
        " virtual environment of its own,\nor run `python -m lit` in the root of lit-routing's repository, where ours"
        " comes first."
    )


if __name__ == "__main__":
    main()
