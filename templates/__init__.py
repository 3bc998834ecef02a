"""What ``plugins --new NAME`` writes: a strategy that works, a YAML that trains it, a test that holds it to a loop."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from routing import discover

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def write(name: str, folder: Path | None = None) -> str:
    """Writes the three files of a new plugin.

    Args:
        name: Class name.
        folder: Where they stand alone; by default the repository's own folders, or outside of it the working directory.

    Returns:
        What was written, and the commands to run next.

    Raises:
        ValueError: that name will not do, or a file is there already; nothing is written.
    """
    stem = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    cwd = Path.cwd().resolve()
    within = (ROOT / "tests/laws").is_dir() and (cwd.is_relative_to(ROOT) if folder is None else _is_root(folder))
    if within:
        files = [ROOT / f"plugins/{stem}.py", ROOT / f"configs/{stem}.yaml", ROOT / f"tests/test_{stem}.py"]
    else:
        files = [
            (folder or cwd).resolve() / f"{head}{stem}{end}"
            for head, end in (("", ".py"), ("", ".yaml"), ("test_", ".py"))
        ]
    _check(name, stem, files)
    for file, text in zip(files, (_plugin(), _config(within), _test(within)), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("NewPlugin", name).replace("new_plugin", stem))
    shown = [str(file.relative_to(cwd) if file.is_relative_to(cwd) else file) for file in files]
    return "\n".join(["Written:", *(f"  {path}" for path in shown), "Next:", *_next(stem, shown, within)])


def _is_root(folder: Path) -> bool:
    return folder.resolve() == ROOT


def _check(name: str, stem: str, files: list[Path]) -> None:
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name) or name in ("None", "True", "False"):
        raise ValueError(f"--new {name!r} is no class name.\nAllowed: CamelCase, letters and digits.\nTry: MyDepths")
    if known := discover().get(name):
        raise ValueError(
            f"--new {name}: there is a plugin of that name in {inspect.getfile(known)}.\nAllowed: any other name.\n"
            "`python -m lit plugins` lists those that are taken."
        )
    if there := [str(file) for file in files if file.exists()]:
        raise ValueError(f"--new {name}: {', '.join(there)} is there already.\nRemove it, or take another name.")
    if importlib.util.find_spec(stem) is not None:
        raise ValueError(f"--new {name}: {stem}.py would hide the module {stem!r}.\nTake another name.")


def _plugin() -> str:
    return (HERE / "new_plugin.py").read_text()


def _config(within: bool) -> str:
    path = "NewPlugin" if within else "new_plugin.py:NewPlugin"
    text = (ROOT / "configs/quickstart.yaml").read_text()
    for old, new in (
        (r"\A#.*", "# NewPlugin on the demo's task: two CPU cores, about five minutes."),
        (r"name: quickstart", "name: new_plugin"),
        (r"(?<=depth: ).*", f'{{class_path: "{path}", init_args: {{share: 0.5}}}}'),
    ):
        text, found = re.subn(old, new, text, count=1)
        assert found, old
    return text


def _test(within: bool) -> str:
    text = (HERE / "test_new_plugin.py").read_text()
    if within:
        for line in ("from pathlib import Path\n", "from routing.plugin_files import load\n"):
            text = text.replace(line, "")
        text = text.replace("from routing import", "from plugins.new_plugin import NewPlugin\nfrom routing import")
        text = re.sub(r"NewPlugin = load.*\n\n", "", text)
    return text


def _next(stem: str, shown: list[str], within: bool) -> Iterator[str]:
    at_root = Path.cwd().resolve() == ROOT
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    if not at_root and not _installed():
        python = f"PYTHONPATH={ROOT} {python}"
    lit = f"{python} -m {'lit' if at_root else 'lit_routing'}"  # elsewhere `lit` may be LLVM's
    overrides = "configs/overrides/tiny.yaml" if at_root else str(ROOT / "configs/overrides/tiny.yaml")
    if importlib.util.find_spec("pytest") is None:
        yield f"  {python} -m pip install pytest"
    yield f"  {python} -m pytest {shown[2]}"
    if within:
        yield f"  {python} -m pytest {'tests/laws' if at_root else ROOT / 'tests/laws'} -k {stem}"
    yield f"  {lit} fit --config {shown[1]} --config {overrides}  # a dry run"
    yield f"  {lit} fit --config {shown[1]}"
    if within:
        yield (
            "Before a pull request: a row in README.md's table of plugins, a line in CHANGELOG.md, and\n"
            f"  {python} -m pytest tests/laws --report docs/laws.md"
        )


def _installed() -> bool:
    try:
        return distribution("lit-routing") is not None
    except PackageNotFoundError:
        return False
