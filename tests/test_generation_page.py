"""``docs/generation.md`` says of every YAML with plugins, and of every cache, what becomes of prompts on both sides."""

import re
from pathlib import Path

from tests.combinations.cell import CACHES, SIDES
from tests.combinations.page import TEXT, WORDS, written
from tests.laws.blocks import FILES

PAGE = (Path(__file__).parent.parent / "docs/generation.md").read_text()
AGAIN = "run `python -m pytest tests/combinations --combinations docs/generation.md`"


def test_every_yaml_and_every_cache_is_on_the_page():
    for side in SIDES:
        said = written(PAGE, side)
        assert said.keys() == FILES.keys(), AGAIN
        for file, cells in said.items():
            assert list(cells) == list(CACHES), AGAIN
            for cell in cells.values():
                for one in cell.split(", "):
                    word, mark = re.fullmatch(r"(?:\w+: )?([\w ]+)(\[\^\d+\])?", one).groups()
                    assert word in WORDS and word != "broken", (file, cell)
                    assert f"- **{word}**: {WORDS[word]}\n" in PAGE, AGAIN
                    assert mark is None or f"\n{mark}: " in PAGE, (file, cell)
    for name, kind in CACHES.items():
        assert f"- *{name}*: {kind.says}.\n" in PAGE, AGAIN
    assert PAGE.endswith(TEXT), AGAIN
