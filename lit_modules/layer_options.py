"""What ``lit arank`` and ``lit plan`` are asked on the command line."""

from __future__ import annotations

import re
import shlex
from argparse import SUPPRESS
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from jsonargparse import set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer

from lit_modules import class_files
from lit_modules.command_line import MergedConfigs, Parser
from lit_modules.dense_subject import Split
from lit_modules.layer_plan import RankRule
from lit_modules.monitor import RoutingMonitor

Score = Literal["arank", "sensitivity", "contribution", "random"]
OptionsT = TypeVar("OptionsT", bound="Options")
LABELS: dict[Score, str] = {
    "arank": "ARank as a share of S - 1",
    "sensitivity": "sensitivity: increase of the loss (nats)",
    "contribution": "contribution: KL divergence (nats)",
    "random": "drawn number",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both commands ask for.

    Args:
        out: Folder for the numbers, the picture and ``layers.yaml``, which goes back by ``--config``; files of an
            earlier call there are written anew.
        ckpt_path: Whose weights the dense model gets: a run's folder, a checkpoint, or a folder that save_pretrained
            wrote. Without it they are those that the config starts from.
        samples: Rows with a picture that are measured, at least 1; fewer where the data have fewer.
        plugin: Name of the plugin in the config that the layers are for.
    """

    out: str
    ckpt_path: str | None = None
    samples: int = 32
    plugin: str = "depth"

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ValueError("--out is empty.\nAllowed: a folder, which is made if it is not there.\nGive one.")
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples}.\nAllowed: at least 1.\nGive more, such as the default 32.")


@dataclass(frozen=True, kw_only=True)
class RankOptions(Options, RankRule):
    """Measures the rank of the attention maps (ARank, arXiv 2410.13859) and routes the layers where it is low.

    Args:
        split: Whose rows are read: conversations of ``train``, or questions of ``val`` or ``test``. Questions that
            share a picture are much alike, and make the intervals too narrow.
    """

    split: Split = "train"

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        RankRule.__post_init__(self.rule)

    @property
    def rule(self) -> RankRule:
        """The rule by itself."""
        return RankRule(**{field.name: getattr(self, field.name) for field in fields(RankRule)})


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """Routes as few layers as bring the FLOPs of a prefill to a budget, those with the lowest score first.

    Args:
        budget: Most FLOPs of a prefill's decoder layers, as a share of the dense ones, in (0, 1).
        by: ``arank``: rank of the layer's attention maps. ``sensitivity``: how much the loss grows when all vision
            tokens pass this layer alone by. ``contribution``: how far answers move when vision tokens are frozen in
            this layer alone (KL divergence; ShortV, arXiv 2504.00502). ``random``: by the seed.
        seed: Of the random order.
    """

    budget: float
    by: Score
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget < 1:
            raise ValueError(
                f"--budget {self.budget:g}.\nAllowed: a share of the dense FLOPs between 0 and 1, ends excluded.\nGive"
                " one, such as 0.55."
            )


class LayerParser(Parser):
    """Names options that are missing as they are typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if match := re.match(r"the following arguments are required: (.+)", message):
            names = match[1].split(", ")
            choices = f"\nAllowed: --by {', '.join(LABELS)}." * ("by" in names)
            message = (
                f"{', '.join(f'--{name}' for name in names)} {'are' if names[1:] else 'is'} missing.{choices}\nGive"
                f" {'them' if names[1:] else 'it'}; --help says what each option means."
            )
        super().error(message, ex)


def parsed(name: str, kind: type[OptionsT], args: list[str], default_config: Path) -> tuple[OptionsT, dict[str, Any]]:
    """A command's own options, and the config that all of its ``--config`` and other arguments make together."""
    set_parsing_settings(import_path_denylist=[], import_path_allowlist=[])
    parser = LayerParser(
        prog=f"python -m lit {name}",
        usage=f"python -m lit {name} --config FILE [--config FILE …] --out FOLDER [options]",
        description=(kind.__doc__ or "").partition("\n")[0],
        default_config_files=[str(default_config)],
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action=MergedConfigs, help="YAML file; several are merged, later ones win.")
    parser.add_class_arguments(kind, instantiate=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="Seed of random weights.")
    parser.add_argument("--weights_only", type=bool | None, default=None, help=SUPPRESS)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=True)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(RoutingMonitor, "monitor")
    given = parser.parse_args(class_files.arguments(args)).as_dict()
    return kind(**{field.name: given[field.name] for field in fields(kind)}), given


def command(name: str, args: list[str]) -> str:
    """What was typed."""
    return f"python -m lit {name} {shlex.join(args)}"
