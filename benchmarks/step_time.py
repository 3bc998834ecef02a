"""Times the training step and the prefill of configs, taking turns on one otherwise idle GPU.

python benchmarks/step_time.py configs/digits/dense.yaml configs/digits/p_mod.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule, Trainer

import datamodules  # noqa: F401  (short names)
import lit_modules  # noqa: F401
from lit_modules.batches import model_inputs
from routing import discover
from routing.cost import count

ROUNDS, STEPS, WARM_UP = 7, 20, 5


@dataclass
class Timing:
    """Milliseconds by round, and what does not vary."""

    step_ms: list[float] = field(default_factory=list)
    prefill_ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    kv_mib: float = 0.0
    gflops: float = 0.0
    train_shape: str = ""
    prefill_shape: str = ""


def load(config: Path) -> tuple[LightningModule, LightningDataModule]:
    """The module and the datamodule that a config describes."""
    discover()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    parser.add_argument("--data", type=LightningDataModule)
    given = yaml.safe_load(config.read_text())
    given["model"].setdefault("class_path", "RoutedVLM")
    made = parser.instantiate_classes(parser.parse_object({key: given[key] for key in ("model", "data")}))
    return made.model, made.data


class Subject:
    """A config's model with one training batch and one batch of questions on the GPU."""

    def __init__(self, config: Path) -> None:
        self.module, data = load(config)
        data.prepare_data()
        data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
        data.setup("fit")
        self.train = to_cuda(next(iter(data.train_dataloader())))
        self.questions = to_cuda(next(iter(data.val_dataloader())))
        self.module.trainer = data.trainer
        self.module.configure_model()
        self.module.to("cuda")
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], fused=True)

    def step(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            step = self.module.forward_step(self.train)
            loss = torch.stack(list(self.module.objective(step).values())).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self) -> None:
        batch = self.questions
        with torch.autocast("cuda", dtype=torch.bfloat16), self.module.tape.about(batch["tokens"]):
            self.module.model(**model_inputs(batch, mask=True), use_cache=False, logits_to_keep=1)


def to_cuda(batch: dict) -> dict:
    return {key: value.to("cuda") if hasattr(value, "to") else value for key, value in batch.items()}


def clock(call: Callable[[], None]) -> float:
    """Milliseconds per call on the device."""
    for _ in range(WARM_UP):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / STEPS


def time_configs(configs: list[Path]) -> dict[str, Timing]:
    """All configs, in turns, so that a drift of the clock meets each alike."""
    subjects = {config.stem: Subject(config) for config in configs}
    timings = {name: Timing() for name in subjects}
    for _ in range(ROUNDS):
        for name, subject in subjects.items():
            subject.module.model.train()
            timings[name].step_ms.append(clock(subject.step))
            subject.module.model.eval()
            timings[name].prefill_ms.append(clock(subject.prefill))
    for name, subject in subjects.items():
        timing, tokens = timings[name], subject.questions["tokens"]
        cost = count(subject.module.model, tokens)
        timing.kv_mib, timing.gflops = cost.kv_bytes / 2**20, cost.flops / 1e9
        timing.train_shape = " x ".join(map(str, subject.train["tokens"].shape))
        timing.prefill_shape = " x ".join(map(str, tokens.shape))
        subject.module.model.train()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        timing.peak_mib = (torch.cuda.max_memory_allocated() - held) / 2**20
    return timings


if __name__ == "__main__":
    for name, timing in time_configs([Path(path) for path in sys.argv[1:]]).items():
        print(name, timing)
