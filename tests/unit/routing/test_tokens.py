"""What is known about tokens, and that it survives whatever happens to a batch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from routing import LinearRouter, Site, TwoHeads, Unscored
from routing.observer import lengthened
from routing.router import RouterInputs
from routing.tokens import TokenKind, Tokens

V, Q, A, PAD = TokenKind.VISION, TokenKind.QUESTION, TokenKind.ANSWER, TokenKind.PAD
KINDS = torch.tensor([[V, V, Q, A], [V, V, Q, PAD]])
EVIDENCE = torch.tensor([[0, 1, 0, 0], [-1, -1, 0, 0]])
IDS = torch.tensor([7, 2**40])


def known() -> Tokens:
    return Tokens.of(KINDS, evidence_BT=EVIDENCE, id_B=IDS)


def test_of_gives_them_their_types() -> None:
    tokens = known()
    assert tokens.evidence_BT is not None and tokens.evidence_BT.dtype == torch.int8
    assert tokens.id_B is not None and tokens.id_B.dtype == torch.int64 and tokens.id_B.tolist() == [7, 2**40]
    assert Tokens.of(KINDS).evidence_BT is None and Tokens.of(KINDS).id_B is None


def test_facts_follow_their_rows() -> None:
    twice = known().repeated(2)
    assert twice.evidence_BT is not None and twice.id_B is not None
    assert torch.equal(twice.evidence_BT, EVIDENCE[[0, 0, 1, 1]]) and torch.equal(twice.id_B, IDS[[0, 0, 1, 1]])


def test_new_answers_are_no_evidence() -> None:
    longer = known().extended(2)
    assert longer.evidence_BT is not None and longer.id_B is not None
    assert longer.evidence_BT.tolist() == [[0, 1, 0, 0, 0, 0], [-1, -1, 0, 0, 0, 0]]
    assert longer.kind_BT[:, 4:].eq(A).all() and longer.image_BT[:, 4:].eq(-1).all()
    assert torch.equal(longer.id_B, IDS) and longer.counts_B[0][A] == 3 and longer.shape == (2, 6)


def test_generation_keeps_them() -> None:
    seen = lengthened(known(), torch.zeros(6, 5, dtype=torch.long)).during("prefill", 1.0)
    assert seen.evidence_BT is not None and seen.id_B is not None
    assert seen.evidence_BT[3].tolist() == [-1, -1, 0, 0, 0] and seen.id_B.tolist() == [7] * 3 + [2**40] * 3


def test_they_are_moved_and_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    away = known().to("meta")
    assert away.evidence_BT is not None and away.id_B is not None
    assert {fact.device.type for fact in (*away._tensors(), away.evidence_BT, away.id_B)} == {"meta"}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda fact: fact + 1)
    pinned = known().pin_memory()
    assert pinned.evidence_BT is not None and pinned.id_B is not None
    assert torch.equal(pinned.evidence_BT, EVIDENCE + 1) and torch.equal(pinned.id_B, IDS + 1)


def test_the_unknown_stays_unknown() -> None:
    tokens = Tokens.of(KINDS).repeated(2).extended(1).during("decode", 0.5).to("cpu")
    assert tokens.evidence_BT is None and tokens.id_B is None and tokens.phase == "decode"


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"evidence_BT": EVIDENCE[:, :3]}, r"evidence_BT has shape \(2, 3\)\.\nAllowed: \(2, 4\)"),
        ({"id_B": IDS[:1]}, r"id_B has shape \(1,\)\.\nAllowed: \(2,\)"),
        ({"id_B": IDS[:, None]}, r"id_B has shape \(2, 1\)"),
    ],
)
def test_shapes_are_checked(facts: dict[str, torch.Tensor], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Tokens.of(KINDS, **facts)


def compiled(function, *given):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(*given)


def test_a_compiler_sees_the_kinds_of_tokens():
    """It takes ``==`` of a tensor and an enum's member for False, without a word."""
    tokens = Tokens.of(torch.tensor([[4, 0, 2, 4, 3]]))
    tokens.mask((TokenKind.PAD,))  # what is kept is made; on Python 3.11 a compiler cannot look through its lock
    got = compiled(lambda: tokens.mask((TokenKind.VISION, TokenKind.ANSWER)) | False)
    assert got.tolist() == [[True, False, False, True, True]]
    heads = TwoHeads(Unscored().build(8, 1), LinearRouter(std=1.0).build(8, 1))
    inputs = RouterInputs(torch.randn(1, 5, 8), tokens, (), Site(0, 1, "layer", "depth"))
    scores = compiled(heads, inputs)
    assert scores[0, [0, 3], 0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(scores, heads(inputs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("folder", ["routing", "plugins"])
def test_nobody_compares_a_tensor_with_a_kind_by_an_operator(folder):
    for path in Path(folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                tensors = any(re.search(r"_[BTK]+\b", side) for side in sides)
                assert not (tensors and any("TokenKind." in side for side in sides)), f"{path}:{node.lineno}"
