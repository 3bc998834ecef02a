"""The command line: ``python -m lit fit --config configs/quickstart.yaml``."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OURS = ("routing", "plugins", "lit_modules", "datamodules", "plugin_files")
# What the processes of a study need not import each for itself.
SHARED = ("lit_modules.command_line", "lit_modules.speed", "datamodules", "study.run", "pyarrow.parquet")


def main(args: list[str] | None = None) -> None:
    """Runs one command; ``args`` are the shell's unless given (as by Ray or Submitit).

    Raises:
        SystemExit: with code 2 after a mistake that the user can mend, printed without a traceback.
    """
    args = sys.argv[1:] if args is None else args
    own = {
        "plugins": plugins,
        "study": study,
        "arank": partial(layers, "arank"),
        "plan": partial(layers, "plan"),
        "export": export,
        "generate": generate,
    }
    if args and args[0] in own:
        own[args[0]](args[1:])
    else:
        train(args)


def train(args: list[str]) -> None:
    """fit, validate, test, predict."""
    import datamodules  # noqa: F401  (importing gives its classes short names)
    from lit_modules import class_files
    from lit_modules.command_line import run
    from routing import discover

    discover()
    class_files.accept()
    run(class_files.arguments(args), default_config=ROOT / "configs/default.yaml", ours=_ours())


def _ours() -> Iterator[str]:
    """Packages whose complaints are for the user; read when there is one, after configs have named more plugins."""
    from routing import registered

    yield from OURS
    yield from (plugin.__module__.partition(".")[0] for plugin in registered().values())


def study(args: list[str]) -> None:
    """Arms x levels x seeds, their tables and plots."""
    with answering("What is finished stays; the same command goes on with the rest."):
        need("A study", "pyarrow", "matplotlib", "scipy")
        from lit_modules.complaints import explain
        from study.command import Workshop, run

        if code := run(args, Workshop(main, load, prepare, stopwatch, gpus, explain, SHARED)):
            raise SystemExit(code)


@contextmanager
def answering(interrupted: str) -> Iterator[None]:
    """Inside, a mistake that the user can mend is printed without a traceback, and so is what Ctrl-C leaves."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LIT_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted. {interrupted}\n")
        raise SystemExit(130) from None


def need(who: str, *packages: str) -> None:
    """Raises ValueError unless all these can be imported."""
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"{who} needs {', '.join(missing)}.\nInstall it: pip install 'lit-routing[study]'")


def layers(command: str, args: list[str]) -> None:
    """Which layers a depth plugin should route: by attention rank, or by a score and a budget of FLOPs."""
    with answering("Numbers are written when all rows are measured; the same command starts anew."):
        need(f"`lit {command}`", "matplotlib", "scipy")
        import datamodules  # noqa: F401  (importing gives its classes short names)
        from lit_modules import class_files, layer_commands
        from routing import discover

        discover()
        class_files.accept()
        run = {"arank": layer_commands.arank, "plan": layer_commands.plan}[command]
        run(args, ROOT / "configs/default.yaml")


def export(args: list[str]) -> None:
    """A model with its routing, processor and chat template as a Hugging Face folder."""
    with answering("Nothing was written; the same command starts anew."):
        import datamodules  # noqa: F401  (importing gives its classes short names)
        from lit_modules import class_files, export_command
        from routing import discover

        discover()
        class_files.accept()
        export_command.export(args, ROOT / "configs/default.yaml")


def generate(args: list[str]) -> None:
    """A model folder's answer to a question about pictures."""
    with answering("The same command starts anew."):
        from lit_modules import generate_command

        generate_command.generate(args)


def gpus() -> int:
    """How many there are, for a study."""
    import torch

    return torch.cuda.device_count()


def load(config: Path) -> object:
    """A config's model and data as objects, for a study."""
    import datamodules  # noqa: F401  (importing gives its classes short names)
    from lit_modules import class_files, configured

    class_files.accept()
    return configured.load(configured.read(config))


def prepare(config: Path) -> None:
    """A config's data on disk, for a study."""
    load(config)
    from lit_modules import configured

    configured.prepare(config)


def stopwatch(reference: Path, rounds: int) -> Callable[[Path], Mapping[str, object]]:
    """What measures configs beside a reference, for a study."""
    load(reference)
    from lit_modules.speed import Rounds, Stopwatch

    return Stopwatch(reference, Rounds.fitting(rounds))


def plugins(args: list[str]) -> None:
    """What can stand under ``model.init_args.plugins``, or a new one."""
    parser = argparse.ArgumentParser(prog="python -m lit plugins", description=plugins.__doc__)
    parser.add_argument("--new", metavar="NAME", help="write a plugin of that class name, a YAML and a test")
    parser.add_argument("--in", dest="folder", type=Path, metavar="FOLDER", help="where; by default the repository")
    given = parser.parse_args(args)
    if given.folder and not given.new:
        parser.error("--in FOLDER says where --new NAME is written; give both.")
    try:
        if given.new:
            from templates import write

            print(write(given.new, given.folder))
        else:
            show_plugins()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left must not be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error


def show_plugins() -> None:
    """Name, paper, file, parameters with their defaults."""
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
