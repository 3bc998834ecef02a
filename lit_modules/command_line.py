"""LightningCLI with plugins merged by name, short errors, and configs that beat checkpoints."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_modules import checkpoint_files
from lit_modules.checkpoint_files import WholeCheckpoints
from lit_modules.complaints import explain
from lit_modules.monitor import RoutingMonitor
from lit_modules.run_folder import RunFolder

PLUGINS = "model.init_args.plugins"
BASES = {
    "model": LightningModule,
    "data": LightningDataModule,
    "trainer": Trainer,
    "trainer.logger": Logger,
    "trainer.callbacks": Callback,
}


def run(args: list[str], *, default_config: Path, ours: Iterable[str]) -> None:
    """Parses and runs one command.

    Args:
        args: As from the shell.
        default_config: Config that is read before all others.
        ours: Packages whose ValueErrors are about what the user gave, and need no traceback.

    Raises:
        SystemExit: with code 2 after a mistake of the user's.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch's, about Lightning
    # A config is data that may come from a stranger: it may not name what runs commands.
    set_parsing_settings(import_path_denylist=[], import_path_allowlist=[])
    subparser = {"default_config_files": [str(default_config)], "allow_abbrev": False}
    try:
        RoutingCLI(
            LightningModule,
            LightningDataModule,
            args=args,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m lit", "allow_abbrev": False}
            | {command: dict(subparser) for command in LightningCLI.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            # RoutedVLM writes its own specs, the same from YAML and from Python.
            load_from_checkpoint_support=False,
            save_config_callback=RunFolder,
        )
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("LIT_TRACEBACK") or not _is_users(error, set(ours)):
            raise
        complain(str(error))
        raise SystemExit(2) from error


def _is_users(error: Exception, ours: set[str]) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return isinstance(error, MisconfigurationException) or package in ours | {"jsonargparse"}


def complain(message: str, parser: LightningArgumentParser | None = None) -> None:
    """Prints a mistake in at most ten lines."""
    options = [] if parser is None else [o for o in parser._option_string_actions if o.startswith("--")]
    sys.stderr.write(f"error: {explain(message, options, BASES)}\n")


class MergedConfigs(ActionConfigFile):
    """A later ``--config`` keeps the plugins of the earlier ones that it does not name."""

    @staticmethod
    def apply_config(parser: LightningArgumentParser, cfg, dest: str, value: str) -> None:  # type: ignore[no-untyped-def]
        before = cfg.get(PLUGINS) or {}
        ActionConfigFile.apply_config(parser, cfg, dest, value)
        if before:
            cfg[PLUGINS] = {**before, **(cfg.get(PLUGINS) or {})}


class Parser(LightningArgumentParser):
    """Answers mistakes in a few lines instead of two screens of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser: the outer one knows the whole path
            super().error(message, ex)
        complain(message, getattr(ex, "subcommand_parser", None) or self)
        raise SystemExit(2) from ex


class RoutingCLI(LightningCLI):
    """fit, validate, test and predict, from YAML."""

    def __init__(self, *classes: type, args: list[str], **how: Any) -> None:
        self.asked = args[0] if args else None
        super().__init__(*classes, args=args, **how)

    def init_parser(self, **kwargs: object) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=MergedConfigs, help="YAML file; several are merged, later ones win."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RoutingMonitor, "monitor")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """With whole checkpoints; a monitor among the callbacks stands in for the one under ``monitor``."""
        plugins = config.get("plugins") or []
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config = {**config, "plugins": [*plugins, WholeCheckpoints()]}
        if any(isinstance(callback, RoutingMonitor) for callback in config.get("callbacks") or ()):
            callbacks = [callback for callback in callbacks if not isinstance(callback, RoutingMonitor)]
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: object) -> LightningArgumentParser:
        if self.asked in self.subcommands() and subcommand != self.asked:
            self._subcommand_method_arguments[subcommand] = []
            return self.parser_class(description=kwargs.get("description"))  # nobody asks it; whole, it took 0.05 s
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if "verbose" in self._subcommand_method_arguments[subcommand]:
            parser.set_defaults(verbose=False)  # RoutedVLM prints its own table
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's hyper-parameters beat the config and the command line."""
        given = self.config[self.config["subcommand"]]
        if path := given.get("ckpt_path"):
            given.ckpt_path = checkpoint_files.found(path)

    def _say_where_logs_are(self) -> None:
        run, logger = self.trainer.log_dir, self.trainer.logger  # log_dir is a collective: all ranks ask
        if self.trainer.is_global_zero and logger is not None and logger.save_dir:
            print(f"\nLogs of this run: {run}\nShow them: tensorboard --logdir {logger.save_dir}")

    after_fit = after_validate = after_test = after_predict = _say_where_logs_are
