"""What is known about tokens, and that it survives whatever happens to a batch."""

from __future__ import annotations

import pytest
import torch

from routing.observer import lengthened
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
