"""What every plugin block of ``configs/**`` is held to; what a rule breaks by definition, its own properties excuse."""

import copy
import dataclasses
import functools

import pytest
import torch
from lightning import Trainer
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_modules import RoutedVLM, TinyLlava
from routing import Constant, RoutedMLP, TokenKind, Tokens, Weighting, attach
from routing.specs import to_spec
from tests.laws.blocks import parser
from tests.laws.models import (
    ROWS,
    declared,
    gated,
    gates,
    gradients,
    grown,
    names,
    one,
    phases,
    prompts,
    questions,
    routed,
    steps,
    taught,
    told,
    unlike_the_network,
)
from tests.laws.verdict import law, measured
from tests.stub_data import StubData
from tests.tiny import IMAGE, PATCHES, facts, padded, tiny_llava

LOGITS = "between logits"


@dataclasses.dataclass(frozen=True)
class One(Weighting):
    def __call__(self, scores_BTE):
        return torch.ones_like(scores_BTE)


@law("dense")
@pytest.mark.parametrize("phase", ["train", "prefill"])
@pytest.mark.parametrize(("rows", "atol"), [(ROWS[:1], 0.0), (ROWS, 1e-6)])
def test_full_capacity_and_weight_one_are_the_dense_model(plugins, rows, atol, phase):
    model, _ = routed(plugins)
    batch = padded(rows)
    tokens = facts(batch).during(phase, 1.0)
    unfollowed = [gate.selector.rule(phase) for gate in gates(model) if gate.selector.kept(tokens, 1.0) is None]
    for layer in gated(model):
        layer.gate = dataclasses.replace(layer.gate, capacity=Constant(1.0), weighting=One())
    for mlp in grown(model):
        mlp.gate = dataclasses.replace(mlp.gate, weighting=One())
    dense = tiny_llava()
    got, want = (each.train(phase == "train")(**batch, use_cache=False).logits for each in (model, dense))
    gap = (got - want)[batch["attention_mask"].bool()].abs().max().item()
    excuse = f"{names(unfollowed)} does not follow the capacity (kept = None)" if unfollowed else None
    if mixing := [layer.merge for layer in gated(model) if layer.merge.mixes]:
        excuse = f"tokens come to a layer mixed with others ({names(mixing)}: mixes = True)"
    if left_out := unlike_the_network(model, phase):
        excuse = left_out
    atol = max(atol, 1e-5) if grown(model) else atol  # grouped products round otherwise than one product does
    measured(gap, LOGITS, within=atol, excuse=excuse)


@law("keys")
def test_no_pretrained_key_is_renamed(plugins):
    model, _ = routed(plugins)
    dense, names = set(tiny_llava().state_dict()), set(model.state_dict())
    became = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, RoutedMLP))
    assert all(name.startswith(became) for name in dense - names)  # a feed-forward network that became experts
    assert all(name.startswith(("routers.", *became)) for name in names - dense)


@law("shapes")
def test_hidden_states_keep_the_dense_shapes(plugins):
    model, _ = routed(plugins)
    states = model(**padded(ROWS), use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == 9 and len({state.shape for state in states}) == 1


@law("replay")
def test_checkpointing_changes_no_gradient(plugins):
    model, _ = routed(plugins)
    replayed = copy.deepcopy(model)
    enable = getattr(replayed, "activation_checkpointing_enable", None) or replayed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    plain, again = gradients(model), gradients(replayed)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


@law("rows")
@pytest.mark.parametrize(  # every pair of the three
    ("phase", "side", "attention", "start"),
    [
        ("train", "right", "sdpa", "own"),
        ("train", "right", "eager", "trained"),
        ("prefill", "left", "sdpa", "trained"),
        ("prefill", "left", "eager", "own"),
    ],
)
@torch.no_grad()
def test_a_row_depends_neither_on_batch_mates_nor_on_padding(plugins, phase, side, attention, start):
    with torch.enable_grad():
        model, _ = routed(plugins, attention, start)
    model.train(phase == "train")
    images = padded(ROWS + ROWS)["pixel_values"]
    own = []
    for tokens in ROWS + ROWS:
        seen = sum(ids.count(IMAGE) for ids in (ROWS + ROWS)[: len(own)]) // PATCHES
        alone = padded([tokens])
        if "pixel_values" in alone:
            alone["pixel_values"] = images[seen : seen + len(alone["pixel_values"])]
        own.append(model(**alone, use_cache=False).logits[0])
    gap = 0.0
    for B in (1, 2, 3, 5, 8):
        batch = padded((ROWS + ROWS)[:B], side)
        batch["pixel_values"] = images[: len(batch["pixel_values"])]
        mask = batch["attention_mask"].bool()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        together = model(**batch, position_ids=positions, use_cache=False).logits
        gap = max(gap, *((together[b][mask[b]] - own[b]).abs().max().item() for b in range(B)))
    mixing = [gate.selector.rule(phase) for gate in gates(model) if not gate.selector.rule(phase).batch_independent]
    excuse = f"{names(mixing)} looks at the whole batch (batch_independent = False)" if mixing else None
    measured(gap, LOGITS, within=2e-5, excuse=excuse)


@law("cache")
@torch.no_grad()
def test_cached_decoding_equals_one_forward(plugins):
    model, tape = routed(plugins)
    model.eval()
    batch, new, allowed = prompts(), 6, steps(model)
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}
    with tape.about(told(batch)):
        if not allowed:
            with pytest.raises(ValueError, match="ranks tokens among those of one"):
                model.generate(**batch, **how)
        stepped = model.generate(**batch, **how, use_cache=allowed)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1)
        whole = {**batch, "input_ids": stepped.sequences, "attention_mask": mask}
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        once = model(**whole, position_ids=positions, use_cache=False).logits[:, -new - 1 : -1]
        plain = model.generate(**batch, **how, use_cache=False)
    gap = (torch.stack(stepped.logits, 1) - once).abs().max().item()
    differ = (stepped.sequences != plain.sequences)[:, -new:].float().mean().item()
    answers, excuse = one(TokenKind.ANSWER), None
    for gate in gates(model):
        first, then = gate.selector.rule("prefill"), gate.selector.rule("decode")
        asked = first.candidates(answers) or then.candidates(answers)
        if asked and not (first.causal and first == then):
            behind = f"{declared(then)} behind a cache" if allowed else "are refused behind a cache"
            excuse = f"answers meet {declared(first)} in one forward and {behind}"
    assert excuse or differ == 0
    unit = f"{LOGITS}, {differ:.0%} of the greedy tokens differ" if allowed else LOGITS
    measured(gap, unit, within=1e-5, excuse=excuse)


@law("gradients")
def test_every_router_that_can_matter_gets_a_gradient(plugins):
    model, tape = routed(plugins)
    moved = {name for name, gradient in gradients(model).items() if name.startswith("routers") and gradient.any()}
    moved |= taught(model, tape, plugins)
    idle, end = (), len(model.get_decoder().layers) - 1
    for gate in gates(model):
        if gate.site.layer == end and not gate.selector.rule("train").candidates(one(TokenKind.QUESTION)):
            # The last layer's vision outputs reach no loss: a router of its own has nothing to learn there.
            idle = (f"routers.{gate.site.by}.{end}.",)
    can = {name for name, _ in model.named_parameters() if name.startswith("routers") and not name.startswith(idle)}
    assert can <= moved


@law("device")
def test_no_layer_asks_the_device(plugins):
    model, tape = routed(plugins)
    batch = padded(ROWS)
    dense = _questions_of_the_dense_model()
    counts = {phase: asked - dense[phase] for phase, asked in _questions(model, tape, phases(model)).items()}
    counted = [p for p in counts if all(g.kept(facts(batch).during(p, 1.0)) is not None for g in gates(model))]
    if "train" in counted:
        _run_without_data(plugins, facts(batch))
    assert not any(counts[phase] for phase in counted)
    unknown = [phase for phase in counts if phase not in counted]
    rules = names(gate.selector.rule(phase) for gate in gates(model) for phase in unknown)
    excuse = f"how many tokens {rules} keeps depends on the data (kept = None in {', '.join(unknown)})"
    unit = f"questions a forward in {len(gates(model))} layers"
    measured(max(counts.values()), unit, excuse=excuse if unknown else None)


def _questions(model, tape, phases) -> dict[str, int]:
    """How often the host waits in a forward of each phase."""
    batch, prompt, read = padded(ROWS), prompts(), []
    asked = {}
    with tape.about(facts(batch)):
        asked["train"] = questions(lambda: model.train()(**batch, use_cache=False))
    with tape.about(told(prompt)), torch.no_grad():
        asked["prefill"] = questions(lambda: read.append(model.eval()(**prompt, use_cache=True)))
        if "decode" in phases:
            step = {"input_ids": torch.full((len(ROWS), 1), 9), "past_key_values": read[0].past_key_values}
            asked["decode"] = questions(lambda: model(**step, use_cache=True))
    return asked


@functools.cache
def _questions_of_the_dense_model() -> dict[str, int]:
    model = tiny_llava()
    return _questions(model, attach(model, {}), ("train", "prefill", "decode"))


def _run_without_data(plugins, tokens: Tokens) -> None:
    """Tensors without data cannot be asked: every layer runs on them."""
    model = tiny_llava().bfloat16()  # of grouped products PyTorch knows the shapes in bf16 alone
    tape = attach(model, plugins)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: mode.from_tensor(tensor) for name, tensor in held.items() if tensor is not None})
        told = Tokens(*(mode.from_tensor(t) for t in tokens._tensors()), tokens.counts_B)
        tape.begin(told, words_BT=told.kind_BT.long())
        x = torch.empty(*tokens.shape, 32, dtype=torch.bfloat16)
        angles = model.get_decoder().rotary_emb(x, position_ids=torch.arange(tokens.shape[1])[None])
        for layer in model.get_decoder().layers:
            x = layer(x, attention_mask=None, position_embeddings=angles)
        assert x.shape == (*tokens.shape, 32)


@law("twice")
def test_greedy_evaluation_twice_is_bit_identical(plugins):
    model, tape = routed(plugins)
    batch = prompts()
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": steps(model)}
    how |= {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": [IMAGE]}
    with tape.about(told(batch)):
        runs = [model.eval().generate(**batch, **how) for _ in range(2)]
    first, second = (torch.stack(run.logits) for run in runs)
    assert torch.equal(first, second)


@law("clash")
def test_two_plugins_on_one_site_are_refused_by_name(plugins):
    (name, plugin), *_ = plugins.items()
    with pytest.raises(ValueError, match=f"'{name}' and 'again' both route"):
        attach(tiny_llava(), {**plugins, "again": plugin})


@law("config")
def test_the_saved_config_is_the_loaded_one(plugins):
    reader = parser()
    written = reader.dump(reader.parse_object({"plugins": to_spec(plugins)}))
    read = reader.parse_string(written)
    assert "Unable to serialize" not in written
    assert reader.dump(read) == written and reader.instantiate(read).plugins == plugins


@law("checkpoint")
def test_a_checkpoint_reloads_to_equal_tensors(plugins, tmp_path):
    model = RoutedVLM(TinyLlava(layers=8, width=16, heads=2, hidden=32), plugins)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, enable_model_summary=False, **quiet)
    trainer.fit(model, StubData())
    trainer.save_checkpoint(tmp_path / "law.ckpt")
    loaded = RoutedVLM.load_from_checkpoint(tmp_path / "law.ckpt")
    stored, again = model.state_dict(), loaded.state_dict()
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    assert loaded.plugins == plugins and dict(loaded.hparams) == dict(model.hparams)
