"""One run, one folder."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback


class RunFolder(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, which must not be another run's."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the folder; of two runs that ask for it at the same time, one gets it.

        Raises:
            ValueError: another run has it.
        """
        if not self.already_saved and not self.overwrite:
            folder = trainer.log_dir  # a collective: all ranks ask
            taken = trainer.is_global_zero and folder is not None and not self._take(folder)
            if trainer.strategy.broadcast(taken):
                raise ValueError(
                    f"{folder} holds another run: its {self.config_filename} is there.\nAllowed: a folder for each run,"
                    " resumed ones included.\nLeave out `trainer.logger.init_args.version`, or give another `name` or"
                    " `save_dir`."
                )
            self.overwrite = True  # the empty file that is there now is ours
        super().setup(trainer, pl_module, stage)

    def _take(self, folder: str) -> bool:
        if "://" in folder:
            return True
        config = Path(folder) / self.config_filename
        config.parent.mkdir(parents=True, exist_ok=True)
        try:
            config.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
