"""The page of generation: rules x caches, for prompts that are padded on the left and on the right."""

from __future__ import annotations

import torch
import transformers

from tests.combinations.cell import ATTENTIONS, CACHES, NEW, SIDES, WITHIN, Cell, Verdict
from tests.combinations.models import ROWS
from tests.laws.blocks import BLOCKS, FILES

Cells = dict[Cell, Verdict]

HEAD = """# Generating with a routed model

`model.generate(...)` is transformers' own. A combination of rule, cache, side of the padding, attention and size of the
batch either answers each row as it is answered alone, token for token, or is refused by a `ValueError` that says what
to do instead. The tables say which, and every cell is a test that ran. One exception is marked *as dense*.

Made by `python -m pytest tests/combinations --combinations docs/generation.md` (torch {torch}, transformers
{transformers}, CPU, float32, a LLaVA of eight layers with random weights and routers). {ran:,} batches were answered or
refused: {rules} rules x {caches} caches x 2 sides x attention {attentions} x batches of 1 to {rows} rows
of {short} to {long} tokens, without a picture, with one and with two, in front and in between. {tokens} greedy tokens
of each row were held against the row alone with a dynamic cache (under *none*, *sliding*, *quantized* and *beams*:
alone in the same way). The widest gap between logits of equal answers is {gap:.1g}; {within:g} is allowed.
"""
WORDS = {
    "equal": "tokens and logits of every row are those of the row alone, in batches of every size.",
    "refused": "a `ValueError` in batches of every size.",
    "single": "a single row is equal, and batches are refused.",
    "as dense": "rows are answered otherwise than alone, and by the dense model too, in the very same batches.",
    "GPU": "needs an accelerator: `python -m pytest -m gpu tests/combinations` compares three rules.",
    "broken": "a bug.",
}
TEXT = """## What to do instead

- **Padding**: on the left (`processor.tokenizer.padding_side = "left"`). `generate` takes the first new token from the
  last place of each row, which on the right is padding, in the dense model too. A forward of a batch that is padded on
  the right is right at every real token, and so are steps after it that are taken by hand, with `attention_mask` and
  `position_ids` of one's own.
- **Static caches** need a rule that bounds how many tokens enter, such as `ExpertChoice`; thresholds have none. A
  routed layer takes as many slots as the bound and the later tokens need. On a GPU transformers compiles the steps that
  follow, and so it is here where no whole layer decides about answers: one CUDA graph, experts included. Other steps
  run eagerly, as do the first one and all that are recorded; `disable_compile=True` has all of them do.
- **Chunks**: under a rule that ranks, one chunk must hold all tokens that are ranked with each other, such as all
  pictures of the batch. Rules that read what a prompt attends to (`FastV`, `PyramidDrop`, `AttentionDepths`)
  need the prompt in one piece. transformers 5.17 reads no picture when the prompt comes in chunks, in the dense model
  too; 5.23 does. `generate` tells the gates where the prompt ends. Who reads chunks by hand says so:

  ```python
  with model.routing.tape.about(tokens):  # facts of the whole prompt: `routing.Tokens`
      out = model(**first)
      out = model(**second, past_key_values=out.past_key_values)
  ```

  Several tokens behind a cache are refused without it where the rules of prompts and answers differ.
- **Further turns**: give `generate` the whole conversation and the `past_key_values` of the turn before. New words meet
  the rule of prompts. New pictures under a rule that ranks, and words where it ranks words, are refused: begin anew,
  without the cache. Earlier turns stay as they were read: their answers by the rule of answers, and pictures as the
  first question attended to them. Begun anew, all of it is one prompt.
- **Cropping**: `cache.crop(-n)` forgets the last `n` tokens, whether they got a slot or not. Tokens that were ranked
  with each other go together or not at all: the error names the lengths that are allowed. `crop(n)` with a positive
  number is refused.
- **Guessing ahead** (`prompt_lookup_num_tokens`, `assistant_model`) needs one rule for prompts and answers, or rules
  that leave answers alone, and a single row: transformers has it no other way. `assistant_early_exit` is refused.
- **No cache**: every step reads all tokens as a prompt. Where the rule of answers is another one, that is another
  answer than with a cache; the table says where it was seen.
- **Quantized caches, sliding windows, paged caches** (`generate_batch`): a layer cannot hold fewer tokens than the
  others there. Use a dynamic cache, or `use_cache=False`, which suits sliding windows too. `ShortV` is not refused: its
  layers hold every token. Quantized to 8 bits by a scale of the whole batch, rows depend on each other in any model.
- **Attention**: `sdpa` and `eager`. `flash_attention_2` takes prompts and single steps, and is refused where several
  tokens follow a cache (chunks, further turns, guesses), because its masks tell padding alone; it was not run here.
  `flex_attention` is refused: its masks cannot be cut.
- **Exported models** (`load_routed`) are these models: all of the above holds for them. Without facts from
  `tape.about`, `generate` takes image tokens for pictures and all others for the question; a rule that tells a system's
  words from a question's must be told.
"""


def markdown(cells: Cells) -> str:
    notes: list[str] = []
    ran = [cell for cell, verdict in cells.items() if verdict.word != "GPU"]
    words = [verdict.word for verdict in cells.values()]
    head = HEAD.format(
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        ran=sum(len(cell.sizes) for cell in ran),
        rules=len(BLOCKS),
        caches=len({cell.cache for cell in ran}),
        attentions=" and ".join(ATTENTIONS),
        rows=max((cell.sizes[-1] for cell in ran), default=0),
        short=min(map(len, ROWS)),
        long=max(map(len, ROWS)),
        tokens=NEW,
        gap=max((verdict.gap for verdict in cells.values()), default=0.0),
        within=WITHIN,
    )
    parts = [head]
    for side in SIDES:
        parts.append(f"## Padded on the {side}\n")
        parts.append(table(cells, side, notes) + "\n")
    parts.append("\n".join(f"- **{word}**: {said}" for word, said in WORDS.items() if word in words) + "\n")
    parts.append("\n".join(f"- *{name}*: {kind.says}." for name, kind in CACHES.items()) + "\n")
    parts.append("\n".join(f"[^{n}]: {note}." for n, note in enumerate(notes, 1)) + "\n")
    return "\n".join([*parts, TEXT])


def table(cells: Cells, side: str, notes: list[str]) -> str:
    """A row for all rules of which the same is said, a column for each cache."""
    rules: dict[tuple[str, ...], list[str]] = {}
    for file, block in FILES.items():
        row = tuple(_text(cells, block, cache, side, notes) for cache in CACHES)
        rules.setdefault(row, []).append(f"`{file}`")
    rows = [[", ".join(files), *row] for row, files in rules.items()]
    lines = [["", *CACHES], ["---", *[":---:"] * len(CACHES)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cells: Cells, block: str, cache: str, side: str, notes: list[str]) -> str:
    """A word and the number of its reason; one for both kinds of attention where they agree."""
    said = {}
    for attention in ATTENTIONS:
        verdict = cells.get(Cell(block, cache, side, attention), Verdict("unknown"))
        if verdict.why and verdict.why not in notes:
            notes.append(verdict.why)
        mark = f"[^{notes.index(verdict.why) + 1}]" if verdict.why else ""
        said[attention] = verdict.word + mark
    if len(set(said.values())) == 1:
        return said[ATTENTIONS[0]]
    return ", ".join(f"{attention}: {text}" for attention, text in said.items())


def written(page: str, side: str = "left") -> dict[str, dict[str, str]]:
    """What a page says of each file and cache."""
    _, _, part = page.partition(f"## Padded on the {side}\n")
    lines = [line for line in part.partition("\n## ")[0].splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines] or [[], []]
    return {
        file.strip("` "): dict(zip(head[1:], cells, strict=True)) for files, *cells in rows for file in files.split(",")
    }
