"""Two processes train experts as one does, though some experts are idle on one of them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback

from forked import ranks, start
from routing import load_E
from tests.cli.test_ranks import STRATEGIES, arguments, config, losses, records  # noqa: F401  (fixtures)

ROOT = Path(__file__).parent.parent.parent
STEPS = 4
EXPERTS = {
    "class_path": "MixtureOfExperts",
    "init_args": {
        "experts": 8,
        "router": {
            "class_path": "Balanced",
            "init_args": {
                "router": {"class_path": "LinearRouter", "init_args": {"bias": False, "std": 0.5}},
                "rate": 0.05,
            },
        },
        "losses": [
            {"class_path": "LoadBalance", "init_args": {"weight": 0.1, "layers": "sum"}},
            {"class_path": "ZLoss", "init_args": {"weight": 0.01}},
        ],
    },
}


class Loads(Callback):
    """Appends what each rank's experts got in each step to a file of the rank.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.open = pl_module.tape.recording()
        self.records = self.open.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.open.__exit__(None, None, None)
        with (self.folder / f"loads_{trainer.global_rank}").open("a") as file:
            file.write(json.dumps([load_E(record).tolist() for record in self.records]) + "\n")
        with (self.folder / f"rank_{trainer.global_rank}").open("a") as file:
            file.write(f"{outputs['loss'].item()} {'pixel_values' in batch}\n")


@pytest.fixture(scope="module")
def experts(config, tmp_path_factory):  # noqa: F811
    read = yaml.safe_load(config.read_text())
    read["model"]["init_args"]["plugins"] = {"moe": EXPERTS}
    read["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS}
    path = tmp_path_factory.mktemp("experts") / "config.yaml"
    path.write_text(yaml.safe_dump(read))
    return path


def command(path, folder, strategy, devices):
    *how, _, _ = arguments(path, folder, strategy, devices)
    return [*how, f"--trainer.callbacks+={__name__}.Loads", f"--trainer.callbacks.folder={folder}"]


@pytest.fixture(scope="module")
def alone(experts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    child = start(command(experts, folder, "auto", 1))
    child.join(100)
    assert child.exitcode == 0
    (last,) = folder.rglob("last.ckpt")
    return losses(folder, 1), torch.load(last, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2, full checkpoints"])
def test_two_ranks_are_one(name, alone, experts, tmp_path):
    assert ranks(command(experts, tmp_path, STRATEGIES[name], 2)) == [0, 0]
    loads = [
        torch.tensor([json.loads(line) for line in (tmp_path / f"loads_{r}").read_text().splitlines()]) for r in (0, 1)
    ]
    idle = [load == 0 for load in loads]
    assert (idle[0] ^ idle[1]).any()  # an expert that only one of them has tokens for
    want, weights = alone
    assert losses(tmp_path, 2) == pytest.approx(want, abs=1e-5) and len(want) == STEPS
    (last,) = tmp_path.rglob("last.ckpt")
    got = torch.load(last, weights_only=True)["state_dict"]
    assert got.keys() == weights.keys()
    biases = [key for key in weights if key.endswith("level_LE")]
    assert len(biases) == 2 and all(torch.equal(got[key], weights[key]) and got[key].any() for key in biases)
    # AdamW makes steps of full size from gradients that are zero but for rounding, such as those of key biases.
    apart = torch.cat([(value - weights[key]).abs().flatten() for key, value in got.items()])
    assert apart.max() < 5e-3 and apart.mean() < 1e-5
