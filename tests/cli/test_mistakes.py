"""A mistake is answered in at most ten lines that name the value, what is allowed, and what to do; exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lit
from answers import QUICKSTART, answered, check
from forked import start
from lit_modules.command_line import RoutingCLI

ROOT = Path(__file__).parent.parent.parent
DEPTH = "--model.init_args.plugins.depth"
BACKBONE = "--model.init_args.backbone"
LOW = f"{DEPTH}.init_args.capacity.init_args.low"
LAYERS = f"{DEPTH}.init_args.placement=Layers {DEPTH}.init_args.placement.init_args.layers"

# arguments -> value, something allowed, remedy
AT_PARSING = {
    f"{DEPTH}.class_path=ProgresiveDepths": ("ProgresiveDepths", "ProgressiveDepths", "Did you mean"),
    f"{DEPTH}.init_args.capcity=0.5": ("capcity", "capacity", "Did you mean"),
    f"{DEPTH}.init_args.capacity=ShiftdCosine": ("ShiftdCosine", "ShiftedCosine", "Did you mean"),
    f"{DEPTH}.init_args.capacity.init_args.low=abc": ("abc", "float", "Give"),
    f"{DEPTH}.init_args.rank_on=luck": ("luck", "'router', 'weight'", "Give one of these"),
    f"{DEPTH}.init_args.router=LinerRouter": ("LinerRouter", "LinearRouter", "Did you mean"),
    f"{BACKBONE}=TinyLava": ("TinyLava", "TinyLlava", "Did you mean"),
    f"{BACKBONE}.init_args.layrs=3": ("layrs", "layers", "Did you mean"),
    "--data=DigitVQA": ("DigitVQA", "DigitsVQA", "Did you mean"),
    "--data.init_args.batchsize=3": ("batchsize", "batch_size", "Did you mean"),
    "--trainer.max_epoch=3": ("max_epoch", "max_epochs", "Did you mean"),
    "--trainer.max_epochs=few": ("few", "int", "Give"),
    "--trainer.precision=bf17": ("bf17", "bf16-mixed", "Give"),
    "--trainer.callbacks+=ModelChekpoint": ("ModelChekpoint", "ModelCheckpoint", "Did you mean"),
    "--config=configs/quikstart.yaml": ("quikstart", "configs/", "Give the path"),
}

AT_BUILDING = {
    **{
        f"{LOW}={low}": (f"low={float(low.strip('.'))}", "(0, 1]", "give e.g. 0.5")
        for low in ("0", "-1", "1.5", ".nan")
    },
    "--model.init_args.parts.routrs=1e-3": ("routrs", "vision, projector, language_model, routers", "Nearest: routers"),
    "--model.init_args.parts.routers=-1": ("-1", ">= 0", "0 freezes"),
    '--model.init_args.parts={"vision":0}': ("no parameter trains", "vision, projector, language_model", "Give a part"),
    "--model.init_args.optimization.warmup=3": ("warmup=3.0", "[0, 1]", "give e.g. 0.03"),
    f"{BACKBONE}=FromConfig {BACKBONE}.init_args.path=nosuch.json": ("nosuch.json", "llava_1_5_7b.json", "Give one"),
    f"{LAYERS}=[99]": ("layer 99 does not exist", "0 to 7", "Name others"),
    f"{LAYERS}=[3,3]": ("layer 3 is listed twice", "each layer once", "list each"),
    f"{LAYERS}=[3,-5]": ("layer 3 is listed twice", "(3, -5)", "list each"),
    f"{DEPTH}2.class_path=ProgressiveDepths": ("'depth2'", "disjoint placements", "enabled: false"),
    "--trainer.precision=bf16-true": ("bf16-true", "32-true, bf16-mixed", "Use bf16-mixed"),
    "--trainer.precision=64-true": ("64-true", "32-true, bf16-mixed", "double-precise"),
}

GAMMA = (
    "{class_path: GammaDepths, init_args: {selector: {class_path: SelectBy, init_args: {train: {class_path: MaskedTopK,"
    " init_args: {%s}}}}}}"
)

IN_YAML = {
    "modle: {class_path: RoutedVLM}": ("modle", "model", "Did you mean"),
    "model: {init_args: {plugin: {a: {class_path: ProgressiveDepths}}}}": ("plugin", "plugins", "Did you mean"),
    "model: {init_args: {plugins: {a: {class_path: ProgressveDepths}}}}": ("Progressve", "Progressive", "Did you mean"),
    "trainer: {max_epoch: 3}": ("max_epoch", "max_epochs", "Did you mean"),
    "model: {init_args: {generation: {max_tokens: 3}}}": ("max_tokens", "max_new_tokens", "Did you mean"),
    "model: {init_args: {plugins: {a: {class_path: ProgressiveDepths, init_args: {capacity: 0.5}}}}}": (
        "'0.5' does not say which CapacitySchedule",
        "Constant, Linear",
        "Give {class_path: …",
    ),
    f"model: {{init_args: {{plugins: {{a: {GAMMA % 'protect: [QUESTIONS]'}}}}}}}": (
        "selector.train.protect: there is no 'QUESTIONS'",
        "PAD, SYSTEM",
        "Did you mean 'QUESTION'?",
    ),
    f"model: {{init_args: {{plugins: {{a: {GAMMA % 'protect: none'}}}}}}}": ("'none' is not allowed", "a list", "Give"),
    "model: {init_args: {plugins: {a: {class_path: subprocess.run}}}}": ("subprocess.run", "not allowed", ""),
}


@pytest.fixture
def only_parsing(monkeypatch):
    """A mistake that goes unnoticed must not start the real job."""
    monkeypatch.setattr(RoutingCLI, "before_instantiate_classes", lambda self: pytest.fail("nobody complained"))


@pytest.mark.parametrize("args", AT_PARSING, ids=str)
def test_at_parsing(args, capsys, only_parsing):
    check(answered(args.split(), capsys), AT_PARSING[args])


@pytest.mark.parametrize("args", AT_BUILDING, ids=str)
def test_at_building(args, capsys, tiny):
    check(answered([*tiny, *args.split()], capsys), AT_BUILDING[args])


@pytest.mark.parametrize("text", IN_YAML, ids=str)
def test_in_yaml(text, capsys, tmp_path, only_parsing):
    (tmp_path / "given.yaml").write_text(text + "\n")
    check(answered([f"--config={tmp_path / 'given.yaml'}"], capsys), IN_YAML[text])


def seen_by_a_stranger(given, code, error):
    assert code == 2 and given.partition("=")[2] in error
    assert len([line for line in error.splitlines() if "Seed set" not in line]) <= 10, error


def test_as_a_stranger_sees_it(tmp_path):
    given = f"{DEPTH}.class_path=ProgresiveDepths"
    command = [sys.executable, str(ROOT / "lit.py"), "fit", "--config", QUICKSTART, given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    seen_by_a_stranger(given, done.returncode, done.stderr)


def test_as_a_stranger_sees_what_comes_up_at_building(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    given = f"{BACKBONE}.init_args.heads=3"
    child = start(["fit", "--config", QUICKSTART, given])
    child.join(60)
    seen_by_a_stranger(given, child.exitcode, capfd.readouterr().err)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, tiny):
    from lit_modules import RoutedVLM

    monkeypatch.setattr(RoutedVLM, "setup", lambda self, stage: [].index(1))
    with pytest.raises(ValueError, match="not in list"):
        lit.main(["fit", "--config", QUICKSTART, *tiny])
