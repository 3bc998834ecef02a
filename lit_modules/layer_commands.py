"""``lit arank`` and ``lit plan``: which layers of a config's dense model its depth plugin should route."""

from __future__ import annotations

import shlex
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jsonargparse import set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything

from lit_modules.attention_rank import attention_ranks
from lit_modules.command_line import MergedConfigs, Parser
from lit_modules.dense_subject import DenseSubject, Split, loaded
from lit_modules.estimate import Estimate
from lit_modules.layer_files import LayerFiles, table
from lit_modules.layer_plan import RankRule, placeable, planned
from lit_modules.layer_plots import plan_figure, ranks_figure
from lit_modules.layer_scores import layer_effects
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
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples}.\nAllowed: at least 1.\nGive more, such as the default 32.")


@dataclass(frozen=True, kw_only=True)
class RankOptions(Options, RankRule):
    """Measures the rank of the attention maps (ARank, arXiv 2410.13859) and routes the layers where it is low.

    Args:
        split: Whose rows are read: conversations of ``train``, or questions of ``val`` or ``test``.
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


def arank(args: list[str], default_config: Path) -> None:
    """Measures ARank layer by layer, and writes what lies under the rule."""
    options, given = parsed("arank", RankOptions, args, default_config)
    dense, files = prepared(options, given, LayerFiles(Path(options.out), "arank"))
    ranks = attention_ranks(dense, dense.samples(options.samples, options.split))
    chosen, complaint = (), None
    try:
        chosen = options.rule(ranks)
    except ValueError as error:  # what was measured is kept
        complaint = error
    rows = [(r.layer, r.rank, r.relative, "yes" if r.layer in chosen else "no") for r in ranks]
    print(table(("layer", "ARank", "ARank / (S - 1)", "routed"), rows))
    layers = [{**asdict(rank), "routed": rank.layer in chosen} for rank in ranks]
    files.measured(
        {**asdict(options), "rule": str(options.rule), "layers": layers}, ranks_figure(ranks, options.rule, chosen)
    )
    if complaint is not None:
        raise complaint
    said = files.chosen(options.plugin, chosen, f"ARank, rule: {options.rule}; {command('arank', args)}")
    print(f"\n{len(chosen)} of {len(ranks)} layers are routed ({options.rule}); give them back by --config {said}")


def plan(args: list[str], default_config: Path) -> None:
    """Orders the layers by a score, and writes the fewest that reach the budget."""
    options, given = parsed("plan", PlanOptions, args, default_config)
    dense, files = prepared(options, given, LayerFiles(Path(options.out), "plan"))
    tokens, scores = dense.prompts(), layer_scores(dense, options)
    order = sorted(range(len(scores)), key=lambda layer: scores[layer].mean)
    found = planned(dense, options.plugin, order, options.budget, tokens)
    after = dict(zip(found.order, found.shares, strict=True))
    layers = [
        {
            "layer": n,
            **asdict(scores[n]),
            "share": after.get(n),
            "routed": n in found.layers,
            "why": found.refused.get(n),
        }
        for n in order
    ]
    rows = [
        (each["layer"], scores[each["layer"]], *(("-", "cannot be") if each["why"] else _told(each))) for each in layers
    ]
    print(table(("layer", options.by, "FLOPs with it", "routed"), rows))
    for reason in dict.fromkeys(found.refused.values()):
        those = ", ".join(str(n) for n, why in sorted(found.refused.items()) if why == reason)
        print(f"{options.plugin!r} cannot route {those} alone: {reason}")
    numbers = {**asdict(options), "reached": found.share, "prefill": list(tokens.shape), "layers": layers}
    files.measured(numbers, plan_figure(scores, LABELS[options.by], found, options.budget))
    said = files.chosen(
        options.plugin, found.layers, f"{options.by}, budget {options.budget:g}; {command('plan', args)}"
    )
    print(
        f"\n{found.routed} of {len(scores)} layers are routed: a prefill's layers take {found.share:.3f} of the dense"
        f" FLOPs (budget {options.budget:g});\ngive them back by --config {said}"
    )


def _told(each: Mapping[str, Any]) -> tuple[str, str]:
    return f"{each['share']:.3f}", "yes" if each["routed"] else "no"


def layer_scores(dense: DenseSubject, options: PlanOptions) -> list[Estimate]:
    """One number for each layer; the lowest are routed first."""
    if options.by == "random":
        depth = dense.model.config.get_text_config().num_hidden_layers
        drawn = torch.rand(depth, generator=torch.Generator().manual_seed(options.seed))
        return [Estimate(number, None) for number in drawn.tolist()]
    samples = dense.samples(options.samples)
    if options.by == "arank":
        return [rank.relative for rank in attention_ranks(dense, samples)]
    return layer_effects(dense, samples, options.by)


def prepared(options: Options, given: Mapping[str, Any], files: LayerFiles) -> tuple[DenseSubject, LayerFiles]:
    """The dense model with its data, and the folder for what is found; mistakes are found before any of it is long."""
    module, data = loaded(given, options.ckpt_path)
    placeable(module.plugins, options.plugin)
    files.open()
    seed = given.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed_everything(seed, verbose=False)
    with _called_ckpt_path(options):
        dense = DenseSubject.of(module, data, given.get("trainer") or {})
    names = ", ".join(f"{name} ({type(each).__name__})" for name, each in dense.plugins.items() if each.enabled)
    if names:
        print(f"The config's plugins are not applied while layers are measured: {names}.")
    return dense, files


@contextmanager
def _called_ckpt_path(options: Options) -> Iterator[None]:
    """Mistakes with weights, under the name of the option that made them."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        raise ValueError(said.replace("start_from", "ckpt_path") if options.ckpt_path else said) from error


def parsed(name: str, kind: type[OptionsT], args: list[str], default_config: Path) -> tuple[OptionsT, dict[str, Any]]:
    """A command's own options, and the config that all of its ``--config`` and other arguments make together."""
    set_parsing_settings(import_path_denylist=[], import_path_allowlist=[])
    parser = Parser(
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
    given = parser.parse_args(args).as_dict()
    return kind(**{field.name: given[field.name] for field in fields(kind)}), given


def command(name: str, args: list[str]) -> str:
    """What was typed."""
    return f"python -m lit {name} {shlex.join(args)}"
