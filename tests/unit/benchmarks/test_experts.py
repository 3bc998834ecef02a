"""benchmarks/experts.py, from its command to its page, with tiny layers on the CPU and without the compiler."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import expert_products, experts
from benchmarks.expert_cases import CASES, Gap, gap, hard_cases
from benchmarks.expert_layers import (
    METHODS,
    OURS,
    Answered,
    E,
    K,
    Method,
    Shape,
    layers,
    loop,
    one_hot,
    rows_of_an_expert,
)
from benchmarks.experts import SMOKE, Plan, compare
from benchmarks.experts_page import Growth, Result, Row, Setting, page, wrong
from routing import experts as routed

CPU = torch.device("cpu")
GATED, PLAIN = SMOKE
TRAINED, DECODED = Setting(GATED, 64, "train"), Setting(PLAIN, 8, "decode")
PLAN = Plan((TRAINED, DECODED), modes=("eager",), seconds=0, turns=2, tokens=1, steps=1)


def rows_of(page_text: str, title: str) -> list[list[str]]:
    (section,) = [part for part in page_text.split("\n## ") if part.startswith(title)]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]


def test_the_command_measures_every_method_of_a_phase_and_finds_nothing_wrong(monkeypatch, tmp_path, capsys):
    out = tmp_path / "experts.md"
    command = ["benchmarks/experts.py", "--smoke", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    experts.main()
    text = out.read_text()
    assert f"`python {' '.join(command)}`" in text and text in capsys.readouterr().out
    for shape in SMOKE:
        trained = rows_of(text, f"{shape.name}, 64 tokens, forward and backward")
        assert [row[0] for row in trained] == [name for name, m in METHODS.items() if "train" in m.phases]
        decoded = rows_of(text, f"{shape.name}, 8 tokens, a step of decoding")
        assert [row[0] for row in decoded] == list(METHODS)
        assert len(rows_of(text, f"{shape.name}, 1 token, a step")) == len(METHODS)
        assert f"## {shape.name}, 96 tokens" not in text  # of interest for its memory alone
    assert len(rows_of(text, "Values where products go wrong")) == len(SMOKE) * len(CASES)


@pytest.mark.parametrize("shape", SMOKE, ids=lambda shape: shape.name)
@pytest.mark.parametrize("phase", ["train", "decode"])
def test_all_methods_but_dense_answer_as_the_exact_loop_does(shape, phase):
    made, exact = layers(shape, 64, phase, CPU)
    x = torch.randn(1, 64, shape.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = exact(x.bfloat16().float())
        for name, module in made.items():
            off = gap([module(x.bfloat16())], [want])
            assert (off > 0.5) if METHODS[name].experts is None else (off < 1e-2), name


@pytest.mark.parametrize("shape", SMOKE, ids=lambda shape: shape.name)
def test_products_alone_are_as_many_multiplications_grouped_as_dense(monkeypatch, shape):
    grouped = []
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: grouped.append(2 * a.numel() * b.shape[-1]))
    expert_products.grouped(shape, 64)()
    with FlopCounterMode(display=False) as counted:
        expert_products.dense(shape, 64)()
    want = 3 * 2 * 64 * K * shape.width * shape.hidden * (3 if shape.gated else 2)
    assert sum(grouped) == counted.get_total_flops() == want


@pytest.mark.parametrize("shape", SMOKE, ids=lambda shape: shape.name)
def test_dense_has_as_many_multiplications_as_the_experts_of_a_token(shape):
    made, _ = layers(shape, 8, "train", CPU)
    matrices = [p for p in made["dense"].parameters() if p.ndim == 2]
    of_experts = [p for name, p in made[OURS].named_parameters() if p.ndim == 3]
    assert E * sum(p.numel() for p in matrices) == K * sum(p.numel() for p in of_experts)


def test_a_one_hot_dispatch_drops_last_what_an_expert_has_no_room_for():
    made = GATED.experts()
    x_ND, weight_NK = torch.randn(8, 32), torch.rand(8, 2)
    expert_NK = torch.tensor([[0, 1]] * 8)
    assert rows_of_an_expert(8, 1.5) == 6 and rows_of_an_expert(8, 2.0) == 8
    with torch.no_grad():
        want = loop(made, x_ND, expert_NK, weight_NK)
        torch.testing.assert_close(one_hot(2.0)(made, x_ND, expert_NK, weight_NK), want, atol=1e-5, rtol=1e-5)
        full = one_hot(1.5)(made, x_ND, expert_NK, weight_NK)
    torch.testing.assert_close(full[:6], want[:6], atol=1e-5, rtol=1e-5)
    assert not full[6:].any()


def test_one_row_that_fails_leaves_the_others_and_is_wrong_only_if_it_is_ours(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no kernel | here")

    method = Method("breaks", lambda own, phase: Answered(own, broken), ("train",))
    monkeypatch.setitem(METHODS, "transformers eager", method)
    out = tmp_path / "experts.md"
    one = Plan((TRAINED,), modes=("eager",), seconds=0, turns=2, tokens=1, steps=1)
    assert compare(one, out, "it") == []
    row = next(row for row in rows_of(out.read_text(), TRAINED.title) if row[0] == "transformers eager")
    assert row[2] == "failed: RuntimeError: no kernel / here"
    monkeypatch.setitem(METHODS, OURS, method)
    assert any("ours, eager: RuntimeError" in line for line in compare(one, out, "it"))


def test_what_is_not_one_graph_is_compiled_in_pieces_and_says_so(monkeypatch, tmp_path):
    def compile_as(module, fullgraph=False, dynamic=None):
        def run(x):
            if fullgraph:
                raise RuntimeError("graph break")
            return module(x)

        return run

    monkeypatch.setattr(torch, "compile", compile_as)
    out = tmp_path / "experts.md"
    plan = Plan((DECODED,), modes=("eager", "compiled"), seconds=0, turns=2, tokens=1, steps=1)
    assert compare(plan, out, "it") == []
    modes = {row[0]: row[1] for row in rows_of(out.read_text(), DECODED.title) if row[1] != "eager"}
    assert modes.keys() == {name for name, method in METHODS.items() if method.compiles}
    assert set(modes.values()) == {"compiled, in pieces: RuntimeError: graph break"}
    assert len(rows_of(out.read_text(), "Targets")) == 2


def result(tokens: int, peak: int, ours: float = 1.04, off: float = 1e-3) -> Result:
    rows = {
        ("dense", "compiled"): Row([1.0, 1.0]),
        (OURS, "compiled"): Row([ours, ours], Gap(off, None), peak),
        ("one-hot einsum", "compiled"): Row([2.0, 3.0], Gap(1.0, None), tokens**2),
    }
    products = {"dense": [0.9, 0.9], "grouped": [0.93, 0.93]}
    return Result(Setting(Shape("tiny", 32, 64, True), tokens, "train"), rows, products)


def test_verdicts_follow_from_the_ratios():
    for ours, verdict in ((1.04, "held"), (1.06, "missed")):
        (row,) = rows_of(page("it", {}, [result(64, 1, ours)]), "Targets")
        assert row[1:] == ["compiled", "dense", f"{ours:.3f} ({ours:.3f} to {ours:.3f})", "1.030", "1.05", verdict]
    assert result(64, 1).best_other("compiled") == "one-hot einsum"


def test_memory_is_linear_up_to_what_does_not_depend_on_tokens():
    linear = [result(n, 1000 + 7 * n) for n in (64, 96, 128)]
    assert wrong({}, linear) == []
    table = rows_of(page("it", {}, linear), "Memory of a further token")
    assert [row[-1] for row in table] == ["linear", "not linear"]
    assert len(wrong({}, [result(n, 7 * n * n) for n in (64, 96, 128)])) == 1
    assert Growth("", 10.0, 10.9).linear and not Growth("", 10.0, 11.1).linear


def test_wrong_values_of_ours_are_named_and_nan_is_wrong():
    assert len(wrong({}, [result(64, 1, off=float("nan"))])) == 1
    assert wrong({("tiny", "a case"): Gap(0.0, 1.0)}, []) == ["tiny, a case: Gap(values=0.0, gradients=1.0)"]


class Unwritten(torch.autograd.Function):
    """Leaves NaN behind the last expert's rows, as memory may, both ways."""

    @staticmethod
    def forward(ctx, rows_SF, ends_E):
        ctx.end = ends_E[-1]
        return Unwritten.spoilt(rows_SF, ctx.end)

    @staticmethod
    def backward(ctx, grad_SF):
        return Unwritten.spoilt(grad_SF, ctx.end), None

    @staticmethod
    def spoilt(rows_SF, end):
        return rows_SF.masked_fill((torch.arange(len(rows_SF)) >= end)[:, None], torch.nan)


@pytest.mark.parametrize("shape", SMOKE, ids=lambda shape: shape.name)
def test_hard_cases_hold_over_nan_and_notice_when_nobodys_rows_are_read(monkeypatch, shape):
    product, of = routed._product, routed.Order.of.__func__

    def spoiling(x_SD, weight_EDF, ends_E):
        return Unwritten.apply(product(Unwritten.apply(x_SD, ends_E), weight_EDF, ends_E), ends_E)

    monkeypatch.setattr(routed, "_product", spoiling)
    assert not any(off.wrong for off in hard_cases([shape], CPU).values())
    careless = classmethod(lambda cls, *given: of(cls, *given)._replace(nobody_S1=None, nobody_NK1=None))
    monkeypatch.setattr(routed.Order, "of", careless)
    named = {case for (_, case), off in hard_cases([shape], CPU).items() if off.wrong}
    assert named == {"30 % of the choices are nobody's", "all are nobody's"}
