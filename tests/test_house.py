"""Files and functions stay small, and at most one file of the training code knows about process groups."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
PACKAGES = ("routing", "plugins", "lit_modules", "datamodules", "templates", "study")
FILES = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]


def test_files_are_small():
    lengths = {file: sum(bool(line.strip()) for line in file.read_text().splitlines()) for file in FILES}
    assert max(lengths.values()) <= 250, max(lengths, key=lengths.get)
    assert median(lengths.values()) <= 80


def test_functions_are_small():
    functions = [(f, n) for f in FILES for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.FunctionDef)]
    lengths = {f"{file.name}:{node.name}": node.end_lineno - node.lineno + 1 for file, node in functions}
    assert max(lengths.values()) <= 50, max(lengths, key=lengths.get)
    assert median(lengths.values()) <= 10


def test_at_most_one_training_file_knows_process_groups():
    knowing = [file.name for file in (ROOT / "lit_modules").glob("*.py") if "torch.distributed" in file.read_text()]
    assert len(knowing) <= 1, knowing
