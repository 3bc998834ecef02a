"""Times the training step and the prefill of configs, taking turns on one otherwise idle GPU.

python benchmarks/step_time.py configs/digits/dense.yaml configs/digits/p_mod.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datamodules  # noqa: F401  (short names)
import lit_modules  # noqa: F401
from lit_modules.configured import read
from lit_modules.speed import Batches, Rounds, Subject, Timing, in_turns


def time_configs(configs: list[Path]) -> dict[str, Timing]:
    """All configs, in turns, so that a drift of the clock meets each alike."""
    batches = Batches()
    return in_turns({config.stem: Subject(read(config), batches) for config in configs}, Rounds(7, 20, 5))


if __name__ == "__main__":
    for name, timing in time_configs([Path(path) for path in sys.argv[1:]]).items():
        print(name, timing)
