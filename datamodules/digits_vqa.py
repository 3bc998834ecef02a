"""The embedded default data: questions about scenes of real handwritten digits, made on first use."""

from __future__ import annotations

from pathlib import Path

from datamodules.digits.scene import Geometry
from datamodules.digits.stem import StemSpec
from datamodules.digits.write import SYSTEM, DigitsSpec, Order, write_digits
from datamodules.llava import LlavaData, SplitSummary
from datamodules.records import Record


class DigitsVQA(LlavaData):
    """Questions about scenes of handwritten digits, small enough for two CPU cores.

    Every scene is a textured picture with two to five of scikit-learn's 1,797 scans, one to nine patches large, among
    scrambled strokes of equal energy. Local questions (cell, left_of, read, exists) need few patches, global ones
    (count, sum, largest, caption) all digits, arithmetic none. No scan stands in two splits. The first use writes
    ``root``: LLaVA JSON, pictures, ``processor/``, and ``vision_tower/``, a small vision tower that has learned to name
    single training scans: a stand-in for CLIP.

    Args:
        root: Folder to write and read; it must not hold data made with other arguments.
        train_scenes: Pictures to train on.
        val_scenes: Pictures to validate on.
        test_scenes: Pictures to test on.
        questions: Questions about each picture, 1 to 8.
        eval_questions: The same in the validation and test splits; None for as many as ``questions``.
        order: ``image_first``: one conversation per picture. ``question_first``: one per question, picture last.
        text_share: Conversations without a picture (arithmetic), as a share of the pictures, in [0, 1].
        image_size: Pixels of a picture's side; a multiple of ``patch_size``, at least nine patches.
        patch_size: Pixels of a patch's side.
        stem: The vision tower and its training.
        batch_size: Conversations of a training batch, per device.
        eval_batch_size: Questions of an evaluation batch, per device.
        num_workers: Processes that read, per device; and, if not 0, that draw the pictures on first use.
        seed: Of the data and of the order of the training rows.
        cache: Folder that keeps the encoded rows and pictures, so that later runs need not encode them; None for none.
            It takes 110 kB for each picture of 96 pixels, and may be deleted when no run reads it.
    """

    def __init__(
        self,
        root: str = "data/digits",
        train_scenes: int = 4000,
        val_scenes: int = 60,
        test_scenes: int = 60,
        questions: int = 6,
        eval_questions: int | None = None,
        order: Order = "image_first",
        text_share: float = 0.05,
        image_size: int = 96,
        patch_size: int = 8,
        stem: StemSpec = StemSpec(),  # noqa: B008
        batch_size: int = 16,
        eval_batch_size: int = 60,
        num_workers: int = 0,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        stem = StemSpec(**stem) if isinstance(stem, dict) else stem  # from a checkpoint
        folder = Path(root)
        super().__init__(
            train=str(folder / "train.json"),
            val=str(folder / "val.json"),
            test=str(folder / "test.json"),
            image_folder=str(folder / "images"),
            processor=str(folder / "processor"),
            system=SYSTEM,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache=cache,
        )
        self.root = folder
        scenes = {"train": train_scenes, "val": val_scenes, "test": test_scenes}
        geometry = Geometry(image_size, patch_size)
        self.spec = DigitsSpec(scenes, questions, order, text_share, geometry, stem, seed, eval_questions)  # type: ignore[arg-type]

    @property
    def vision_tower(self) -> Path:
        """Folder of the vision tower; there once ``prepare_data`` has run."""
        return self.root / "vision_tower"

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """``macro_identity``: the kinds whose answer is the identity of digits."""
        return {"macro_identity": ("cell", "left_of", "read", "largest")}

    def prepare_data(self) -> None:
        """Writes the data, unless it is there."""
        write_digits(self.root, self.spec, self.num_workers)

    def _summarise(self, records: list[Record]) -> SplitSummary:
        seen = super()._summarise(records)
        scans = {scan for record in records for scan in record.extra.get("scans", ())}
        return SplitSummary(seen.scenes, seen.questions, seen.kinds, len(scans))
