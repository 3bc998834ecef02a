"""Two processes train as one does: p-MoD with one shared router, checkpointing on, pictures on one rank only."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback

import lit
from forked import ranks, start

ROOT = Path(__file__).parent.parent.parent
STEPS = 10
PLUGIN = {"class_path": "ProgressiveDepths", "init_args": {"sharing": "shared"}}
SHARDED = {"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1}}
FULL = {**SHARDED, "init_args": {**SHARDED["init_args"], "save_distributed_checkpoint": False}}
STRATEGIES = {"ddp": "ddp", "fsdp2": json.dumps(SHARDED), "fsdp2, full checkpoints": json.dumps(FULL)}
MORE = 2  # steps of one process, from where two have come


class Losses(Callback):
    """Appends each step's loss to a file of its rank, and whether the rank saw a picture.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.folder / f"rank_{trainer.global_rank}").open("a") as file:
            file.write(f"{outputs['loss'].item()} {'pixel_values' in batch}\n")


@pytest.fixture(scope="module")
def records(digits, tmp_path_factory):
    """Conversations in an order that gives every picture to the first of two ranks."""
    found = json.loads((digits / "train.json").read_text())
    seen, text = [r for r in found if "image" in r], [r for r in found if "image" not in r]
    if not text:
        text = [{"id": f"text-{n}", "conversations": _said(n)} for n in range(len(seen))]
    order = torch.randperm(4 * STEPS, generator=torch.Generator().manual_seed(0)).tolist()
    placed = [None] * len(order)
    for place, index in enumerate(order):
        placed[index] = (text if place % 2 else seen)[place // 2 % len(seen)]
    file = tmp_path_factory.mktemp("records") / "train.json"
    file.write_text(json.dumps(placed))
    return file


def _said(number):
    return [{"from": "human", "value": f"Say {number % 10} ."}, {"from": "gpt", "value": f"{number % 10}"}]


@pytest.fixture(scope="module")
def config(digits, records, tmp_path_factory):
    """Everything but the strategy, with one row on each of two ranks or two rows on one."""
    folder = tmp_path_factory.mktemp("ranks")
    data = {"train": str(records), "val": str(digits / "val.json"), "test": str(digits / "test.json")}
    data |= {
        "image_folder": str(digits / "images"),
        "processor": str(digits / "processor"),
        "max_length": 400,
        "eval_batch_size": 1,
    }
    model = {"backbone": {"class_path": "TinyLlava", "init_args": {"folder": str(digits), "layers": 4, "width": 32}}}
    model["backbone"]["init_args"] |= {"heads": 2, "hidden": 64}
    model |= {"plugins": {"depth": PLUGIN}, "checkpoint_activations": True}
    model |= {"parts": {"vision": 1e-3, "projector": 1e-3, "language_model": 1e-3, "routers": 1e-2}}
    trainer = {"accelerator": "cpu", "max_steps": STEPS, "enable_progress_bar": False, "limit_val_batches": 2}
    trainer |= {"limit_test_batches": 1, "log_every_n_steps": 5, "val_check_interval": STEPS}
    made = {"trainer": trainer, "data": {"class_path": "LlavaData", "init_args": data}, "model": {"init_args": model}}
    (folder / "config.yaml").write_text(yaml.safe_dump(made))
    return folder / "config.yaml"


def arguments(config, folder, strategy, devices):
    how = ["fit", f"--config={config}", f"--trainer.strategy={strategy}", f"--trainer.devices={devices}"]
    how += [f"--data.init_args.batch_size={2 // devices}", f"--trainer.logger.init_args.save_dir={folder}"]
    return [*how, f"--trainer.callbacks+={__name__}.Losses", f"--trainer.callbacks.folder={folder}"]


def losses(folder, world):
    """Mean over ranks of each step's loss."""
    lines = [(folder / f"rank_{rank}").read_text().split("\n")[:-1] for rank in range(world)]
    return [sum(float(line.split()[0]) for line in step) / world for step in zip(*lines, strict=True)]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The losses of one process, and what it had learnt in the end."""
    folder = tmp_path_factory.mktemp("alone")
    child = start(arguments(config, folder, "auto", 1))
    child.join(100)
    assert child.exitcode == 0
    (last,) = folder.rglob("last.ckpt")
    return losses(folder, 1), torch.load(last, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_are_one(name, alone, config, tmp_path, monkeypatch):
    assert ranks(arguments(config, tmp_path, STRATEGIES[name], 2)) == [0, 0]
    pictures = [set(line.split()[1] for line in (tmp_path / f"rank_{r}").read_text().splitlines()) for r in (0, 1)]
    assert pictures == [{"True"}, {"False"}]
    want, weights = alone
    assert losses(tmp_path, 2) == pytest.approx(want, abs=1e-5) and len(want) == STEPS
    assert len(list(tmp_path.rglob("kept_patches/*.png"))) == 1
    (last,) = tmp_path.rglob("last.ckpt")
    assert last.is_dir() == (name == "fsdp2")
    seen = []
    monkeypatch.setattr(lit_module(), "on_test_start", lambda self: seen.append(self.state_dict()), raising=False)
    lit.main(["test", f"--config={config}", f"--ckpt_path={last}", f"--trainer.logger.init_args.save_dir={tmp_path}/t"])
    # AdamW makes steps of full size from gradients that are zero but for rounding, such as those of key biases.
    apart = torch.cat([(value - weights[key]).abs().flatten() for key, value in seen[0].items()])
    assert seen[0].keys() == weights.keys() and apart.max() < 5e-3 and apart.mean() < 1e-5
    if last.is_dir():
        goes_on_alone(config, last, tmp_path / "more")


def goes_on_alone(config, checkpoint, folder):
    """One process trains on from a sharded checkpoint."""
    folder.mkdir()
    more = [f"--ckpt_path={checkpoint}", f"--trainer.max_steps={STEPS + MORE}"]
    child = start([*arguments(config, folder, "auto", 1), *more])
    child.join(100)
    assert child.exitcode == 0 and len(losses(folder, 1)) == MORE


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_router_that_reads_its_layers_norm_learns_on_two_ranks_as_on_one(name, config, tmp_path):
    made = yaml.safe_load(config.read_text())
    gamma = {"placement": {"class_path": "Between", "init_args": {"first": 1}}, "losses": []}  # means are per rank
    made["model"]["init_args"]["plugins"] = {"depth": {"class_path": "GammaDepths", "init_args": gamma}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(made))
    got = []
    for folder, strategy, devices in (("alone", "auto", 1), ("both", STRATEGIES[name], 2)):
        (tmp_path / folder).mkdir()
        told = arguments(tmp_path / "config.yaml", tmp_path / folder, strategy, devices)
        assert ranks(told, devices) == [0] * devices
        got.append(losses(tmp_path / folder, devices))
    assert got[1] == pytest.approx(got[0], abs=1e-5) and len(got[0]) == STEPS


def lit_module():
    from lit_modules import RoutedVLM

    return RoutedVLM
