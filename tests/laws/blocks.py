"""The distinct plugin blocks of ``configs/**`` and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from routing import RoutingPlugin, discover

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def _files_by_block() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        plugins = ((yaml.safe_load(path.read_text()).get("model") or {}).get("init_args") or {}).get("plugins")
        if plugins:
            found.setdefault(yaml.safe_dump(plugins), []).append(str(path.relative_to(CONFIGS)))
    return found


BLOCKS = {files[0]: block for block, files in _files_by_block().items()}
FILES = {file: files[0] for files in _files_by_block().values() for file in files}


def parser() -> ArgumentParser:
    """Reads ``plugins`` as the command line does."""
    discover()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--plugins", type=dict[str, RoutingPlugin])
    return parser


@cache  # plugins are frozen, and every law asks for those of every block
def plugins_of(file: str) -> Mapping[str, RoutingPlugin]:
    reader = parser()
    return reader.instantiate(reader.parse_object({"plugins": yaml.safe_load(BLOCKS[file])})).plugins
