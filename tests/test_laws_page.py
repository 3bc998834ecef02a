"""``docs/laws.md`` has a row for every YAML with plugins, a column for every law, and a verdict in every cell."""

import re
from pathlib import Path

import tests.laws.test_laws  # noqa: F401  (files the laws)
from tests.laws.blocks import FILES
from tests.laws.verdict import LAWS

PAGE = (Path(__file__).parent.parent / "docs/laws.md").read_text()
AGAIN = "run `python -m pytest tests/laws --report docs/laws.md`"


def test_every_yaml_and_every_law_is_on_the_page():
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    assert head[1:] == list(LAWS), AGAIN
    assert [row[0] for row in rows] == [f"`{file}`" for file in FILES], AGAIN
    for file, *cells in rows:
        assert len(cells) == len(LAWS), file
        for cell in cells:
            assert cell == "held" or f"\n{re.fullmatch(r'excused(.+)', cell)[1]}: " in PAGE, (file, cell)
    for word, sentence in LAWS.items():
        assert f"- **{word}**: {sentence}\n" in PAGE, AGAIN
