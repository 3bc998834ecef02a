"""Two GPUs with NCCL train as one does; the tests on two CPU processes say more."""

import pytest
import torch

from forked import ranks, start
from tests.cli.test_ranks import STEPS, STRATEGIES, arguments, losses
from tests.cli.test_ranks import config as config
from tests.cli.test_ranks import records as records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GPU = "--trainer.accelerator=gpu"


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The losses of one GPU."""
    folder = tmp_path_factory.mktemp("alone")
    child = start([*arguments(config, folder, "auto", 1), GPU])
    child.join(200)
    assert child.exitcode == 0
    return losses(folder, 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_gpus_are_one(name, alone, config, tmp_path):
    assert ranks([*arguments(config, tmp_path, STRATEGIES[name], 2), GPU]) == [0, 0]
    got = losses(tmp_path, 2)
    print(f"{name}: losses differ by {max(abs(a - b) for a, b in zip(got, alone, strict=True)):.1e}")
    assert got == pytest.approx(alone, abs=1e-5) and len(got) == STEPS
