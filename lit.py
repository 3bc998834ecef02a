"""The command line: ``python -m lit fit --config configs/quickstart.yaml``."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OURS = ("routing", "plugins", "lit_modules", "datamodules")


def main(args: list[str] | None = None) -> None:
    """Runs one command; ``args`` are the shell's unless given (as by Ray or Submitit).

    Raises:
        SystemExit: with code 2 after a mistake that the user can mend, printed without a traceback.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["plugins"]:
        show_plugins(args[1:])
    else:
        train(args)


def train(args: list[str]) -> None:
    """fit, validate, test, predict."""
    import datamodules  # noqa: F401  (importing gives its classes short names)
    from lit_modules.command_line import run
    from routing import discover

    packages = {plugin.__module__.partition(".")[0] for plugin in discover().values()}
    run(args, default_config=ROOT / "configs/default.yaml", ours={*OURS, *packages})


def show_plugins(args: list[str]) -> None:
    """What can stand under ``model.init_args.plugins``: name, paper, file, parameters with their defaults."""
    if args:
        print("usage: python -m lit plugins\n\n" + str(show_plugins.__doc__))
        raise SystemExit(0 if args[0] in ("-h", "--help") else 2)
    from routing import discover

    for name, plugin in discover().items():
        doc = inspect.getdoc(plugin) or ""
        paper = re.search(r"arXiv[: ]\d{4}\.\d{4,5}", doc)
        print(f"{name:24} {paper[0] if paper else 'no paper':18} {_file(plugin)}")
        print(f"    {doc.partition(chr(10))[0]}")
        for parameter in inspect.signature(plugin).parameters.values():
            print(f"    {str(parameter).replace(repr(parameter.annotation), str(parameter.annotation))}")
        print()


def _file(plugin: type) -> str:
    path = Path(inspect.getfile(plugin))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    main()
