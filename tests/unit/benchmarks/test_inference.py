"""benchmarks/inference.py, from its command to its page, with a tiny model on the CPU."""

import sys

import pytest
import torch
from transformers import CompileConfig

from benchmarks import inference
from benchmarks.inference import METHODS, compare
from benchmarks.inference_page import Result
from benchmarks.settings import Plan, Setting
from benchmarks.shares import scale, shift
from benchmarks.subject import Entered, Held, Prompt, Subject, Timing, dense_model
from routing import Tokens
from routing.cost import Convention, count
from routing.names import decoder_layers

TINY = "configs/models/llava_tiny.json"
SETTINGS = Setting(1, 24, 8), Setting(3, 24, 8)
LARGE = Setting(2, 8, 4, target=0.75, methods=("dense", "p-MoD"))
PLAN = Plan(budget=0, steps=8, turn=2)
EAGER = CompileConfig(backend="eager", mode=None, fullgraph=True)
ROUTED = ("p-MoD", "gamma-MoD", "MoDification", "MoDification, every kind")


@pytest.fixture(scope="module")
def base():
    return dense_model(TINY)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("inference") / "inference.md"
    return compare(TINY, SETTINGS, PLAN, out, "python it", EAGER), out.read_text()


@pytest.fixture
def subject(base):
    return lambda name: Subject(base, {"routed": METHODS[name].plugin} if METHODS[name].plugin else {})


def prompt_of(base, rows, vision=24, text=8, steps=4):
    return Prompt.of(rows, vision, text, steps, base.config.image_token_id)


def test_every_cache_holds_what_is_counted(measured):
    results, _ = measured
    assert [line for result in results for line in result.miscounted()] == []
    for timing in results[0].timings.values():  # a row alone leaves no slot empty
        assert all(held.measured == held.used == held.counted for held in timing.held)
    assert any(timing.held[1].measured > timing.held[1].used for timing in results[1].timings.values())


def test_the_page_has_a_row_for_each_method_and_verdicts_that_follow_from_it(measured):
    results, page = measured
    tables, verdicts = page.split("## Decode over dense")
    verdicts, compiled = verdicts.split("## The same steps, compiled")
    for result in results:
        assert page.count(f"## {result.setting.title}") == 1
    for name in METHODS:
        assert tables.count(f"\n| {name} | ") == len(SETTINGS)
    rows = [line.split(" | ") for line in verdicts.splitlines() if line.startswith(("| 1 row", "| 3 rows"))]
    assert len(rows) == len(SETTINGS) * len(ROUTED)
    for _, name, ratio, target, verdict, equal in rows:
        assert name in ROUTED and equal == "yes |"
        assert verdict == ("held" if float(ratio.split()[0]) <= float(target) else "missed")
    rows = [line.split(" | ") for line in compiled.splitlines() if line.startswith(("| 1 row", "| 3 rows"))]
    assert [row[1] for row in rows] == ["dense", "p-MoD"] * len(SETTINGS)
    for _, name, _, _, ratio, _, target, verdict, held, counted, _ in rows:
        assert held.split()[0] == counted
        if name == "p-MoD":
            assert verdict == ("held" if float(ratio.strip("*").split()[0]) <= float(target) else "missed")


def test_every_method_has_as_many_turns(measured):
    for result in measured[0]:
        assert {len(timing.token_ms) for timing in result.timings.values()} == {result.rounds * PLAN.steps // PLAN.turn}
        assert {len(timing.prefill_ms) for timing in result.timings.values()} == {result.rounds * PLAN.prefills}
        assert {len(steps.token_ms) for steps in result.compiled.values()} == {PLAN.steps // PLAN.turn - 2}


def test_all_methods_share_their_weights_and_the_model_they_come_from_stays_dense(base, subject):
    dense, routed = subject("dense"), subject("gamma-MoD")
    own = dict(routed.model.named_parameters())
    for name, parameter in base.named_parameters():
        assert own[name] is parameter
    assert {name for name in own if name.startswith("routers.")} == own.keys() - dict(base.named_parameters()).keys()
    classes = {type(layer) for layer in [*decoder_layers(base), *dense.layers]}
    assert len(classes) == 1 and not classes & {type(layer) for layer in routed.layers[3:-1]}


@torch.no_grad()
def test_a_router_without_bias_is_scaled_to_a_share_and_one_with_bias_started_there(base, subject):
    prompt = prompt_of(base, rows=4)
    gamma = subject("gamma-MoD")
    scale(gamma, prompt, 0.62, 0.005)
    assert abs(gamma.observe(prompt).prompt.share() - 0.62) < 0.03
    single = subject("MoDification")
    routes = METHODS["MoDification"].plugin.routes
    shift(single, prompt, 0.25, 0.5, routes)
    shares = single.observe(prompt).prompt.shares()
    assert len(shares) == 4 and all(abs(share - 0.25) < 0.03 for share in shares)


@torch.no_grad()
@pytest.mark.parametrize("name", ("dense", "p-MoD"))
def test_flops_are_those_of_the_analytic_count(base, subject, name):
    one, prompt = subject(name), prompt_of(base, rows=2)
    assert one.observe(prompt).flops == count(one.model, prompt.tokens, Convention(routers=False)).flops


@torch.no_grad()
def test_a_step_reads_the_layers_that_someone_enters_and_their_cache(base, subject):
    one = subject("dense")
    layers, weights = len(one.layers), [sum(p.nbytes for p in layer.parameters()) for layer in one.layers]
    head = one.model.lm_head.weight.nbytes
    nobody = torch.zeros(layers, dtype=torch.long)
    step, held = torch.zeros(layers, 2, dtype=torch.long), torch.full((layers, 2), 5)
    step[2], step[5, 1], held[5] = 1, 1, torch.tensor([7, 11])
    read = one._bytes_read(Entered(step, nobody, nobody), Entered(held, nobody, nobody))
    token = 2 * 2 * 16 * 2  # keys and values, heads of 16 numbers, 2 bytes
    assert read == head + weights[2] + weights[5] + (5 + 5 + 11) * token


def test_a_cache_that_does_not_hold_the_count_is_named():
    nothing = Entered(*[torch.zeros(1, dtype=torch.long)] * 3)
    timing = Timing(nothing, nothing, (Held(8, 8, 8), Held(8, 6, 6)), 1, 1, None)
    alone, batch = (Result(Setting(rows, 1, 1), 1, {"p-MoD": timing}) for rows in (1, 2))
    assert len(alone.miscounted()) == 1 and "p-MoD, after all tokens" in alone.miscounted()[0]
    assert batch.miscounted() == []  # slots of shorter rows


def test_rows_of_a_prompt_differ_and_its_facts_say_what_stands_where(base):
    prompt = prompt_of(base, rows=2, vision=3, text=5)
    assert isinstance(prompt.tokens, Tokens) and prompt.tokens.kind_BT[0].tolist() == [1, 1, 4, 4, 4, 2, 2, 2]
    assert not torch.equal(*prompt.ids_BT) and len(prompt.answers) == 4 and prompt.answers[0].shape == (2, 1)
    assert (prompt.ids_BT != base.config.image_token_id).all()


def test_the_command_writes_the_page(monkeypatch, tmp_path):
    out = tmp_path / "inference.md"
    monkeypatch.setattr(inference, "SETTINGS", (SETTINGS[0], LARGE))
    monkeypatch.setattr(inference, "PLAN", PLAN)
    monkeypatch.setattr(inference, "CONFIG", EAGER)
    command = ["benchmarks/inference.py", TINY, "--budget", "0", "--settings", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    inference.main()
    page = out.read_text()
    assert f"`python {' '.join(command)}`" in page
    assert page.count("\n| dense | ") == 1 and "gamma-MoD | " not in page and " | 0.75 | " in page
