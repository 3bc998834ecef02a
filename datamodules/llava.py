"""The datamodule for LLaVA-format data: a JSON list of conversations and a folder of pictures."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import AutoProcessor, ProcessorMixin

from datamodules.collate import QuestionCollator, TrainingCollator
from datamodules.dataset import Conversations, Questions, Rows
from datamodules.encode import Encoder
from datamodules.llava_file import read_records
from datamodules.loader import ReportingLoader, WindowLoader
from datamodules.records import ImageOrder, Record, SkipPolicy, majority_answers
from datamodules.row_cache import cached_rows
from datamodules.sampler import ResumableSampler
from datamodules.templates import VICUNA, Template, TemplateName

RowsT = TypeVar("RowsT", bound=Rows[Any])


@dataclass(frozen=True)
class SplitSummary:
    """What a split holds.

    Args:
        scenes: Different pictures.
        questions: Questions, those without a picture included.
        kinds: Questions of each kind.
        scans: Different handwritten scans in its pictures; None where that means nothing.
    """

    scenes: int
    questions: int
    kinds: dict[str, int]
    scans: int | None = None


class LlavaData(L.LightningDataModule):
    """LLaVA-format conversations about pictures.

    Training reads whole conversations; validation, test and prediction ask every question by itself.

    Args:
        train: Path of the training JSON; None if there is no training.
        val: Path of the validation JSON, or None.
        test: Path of the test JSON, or None; prediction reads it too.
        image_folder: Folder that the records' image paths are relative to; images outside it are refused.
        processor: Folder or hub name of the Hugging Face processor.
        template: ``instruct`` (vicuna v1, loss on the answers) or ``plain`` (caption pre-training).
        system: System sentence of ``instruct``; empty for none.
        image_order: ``first`` puts a turn's pictures before its words, as LLaVA does; ``as_written`` leaves them. A
            record's own ``image_order`` wins.
        batch_size: Conversations of a training batch, per device.
        eval_batch_size: Questions of an evaluation batch, per device.
        max_length: Tokens of a row at most, those of the pictures included.
        num_workers: Processes that read and encode, per device; 0 for none.
        seed: Of the order of the training rows.
        on_bad_sample: ``raise`` stops at a record that cannot be used; ``skip`` counts it and goes on.
        max_bad_fraction: Share of bad records, in [0, 1], above which ``skip`` stops too.
        cache: Folder that keeps the encoded rows and pictures, so that later runs need not encode them; None for none.
            It takes 12 bytes for each pixel of each picture, and may be deleted when no run reads it.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        image_folder: str = ".",
        processor: str = "llava-hf/llava-1.5-7b-hf",
        template: TemplateName = "instruct",
        system: str = VICUNA,
        image_order: ImageOrder = "first",
        batch_size: int = 16,
        eval_batch_size: int = 32,
        max_length: int = 2048,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.01,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "eval_batch_size": 1, "max_length": 1, "num_workers": 0}
        for name, value in zip(least, (batch_size, eval_batch_size, max_length, num_workers), strict=True):
            if value < least[name]:
                raise ValueError(f"{name}={value} is too small: give a whole number of at least {least[name]}.")
        self.save_hyperparameters(logger=False)
        # A checkpoint holds plain values, never objects of ours.
        self.hparams.update({key: asdict(v) for key, v in self.hparams.items() if is_dataclass(v)})  # type: ignore[arg-type]
        self.paths = {"train": train, "val": val, "test": test}
        self.image_folder = Path(image_folder)
        self.processor_path = processor
        self.template = Template(template, system, image_order)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length, self.num_workers, self.seed = max_length, num_workers, seed
        self.policy = SkipPolicy(on_bad_sample, max_bad_fraction)
        self.cache = None if cache is None else Path(cache)
        self.records: dict[str, list[Record]] = {}
        self.train_loader: WindowLoader | None = None
        self._interrupted: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Reads every JSON that is given, once; pictures are read when they are needed."""
        if self.records:
            return
        for split, path in self.paths.items():
            if path is not None:
                reading = read_records(Path(path), self.policy)
                self.records[split] = reading.records
                if told := str(reading):
                    rank_zero_warn(f"{split} ({path}): {told}.")
        if not self.image_folder.is_dir() and any(r.images for records in self.records.values() for r in records):
            raise ValueError(
                f"image_folder={str(self.image_folder)!r} is not a folder, and the records have images.\nAllowed: the"
                " folder that their paths are relative to.\nGive it as `data.init_args.image_folder`."
            )

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The processor, with the tokenizer and its padding and end tokens."""
        try:
            processor = AutoProcessor.from_pretrained(self.processor_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"processor={self.processor_path!r} cannot be loaded: {str(error).strip().splitlines()[0]}\nAllowed: a"
                " folder that save_pretrained wrote, or a name on the Hugging Face hub.\nCheck the spelling, the"
                " network (or HF_HUB_OFFLINE), and that you may read it."
            ) from error
        tokenizer = processor.tokenizer
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {self.processor_path} has no end token: set its eos_token and save it.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        return processor

    def exported_processor(self) -> ProcessorMixin:
        """A processor whose chat template writes the prompts that these data ask, and which pads them on the left."""
        processor = deepcopy(self.processor)
        processor.tokenizer.padding_side = processor.tokenizer.init_kwargs["padding_side"] = "left"
        processor.chat_template = self.template.exported(processor.image_token)
        return processor

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return int(self.processor.tokenizer.pad_token_id)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return int(self.processor.tokenizer.eos_token_id)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind of question in any split."""
        return tuple(sorted({turn.kind for records in self.records.values() for r in records for turn in r.turns}))

    @property
    def answer_end(self) -> str | None:
        """What ends an answer besides the end token: captions of the ``plain`` template end with their line."""
        return "\n" if self.template.name == "plain" else None

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Kinds of questions whose scores are also averaged by themselves."""
        return {}

    @property
    def majority(self) -> dict[str, str]:
        """The most frequent answer of the training split to each kind of question: the baseline to beat."""
        return majority_answers(self.records.get("train", []))

    def summary(self) -> dict[str, SplitSummary]:
        """What each split holds."""
        return {split: self._summarise(records) for split, records in self.records.items()}

    def _summarise(self, records: list[Record]) -> SplitSummary:
        kinds = Counter(turn.kind for record in records for turn in record.turns)
        pictures = {image for record in records for image in record.images}
        return SplitSummary(len(pictures), kinds.total(), dict(sorted(kinds.items())))

    @property
    def encoder(self) -> Encoder:
        """What turns records into rows."""
        return Encoder(self.processor, self.template, self.image_folder, self.max_length)

    def train_dataloader(self) -> WindowLoader:
        """Shuffled conversations, with the supervised tokens of each accumulation window."""
        dataset = self._cached(Conversations(self._split("train"), self.encoder, self.policy))
        trainer = self.trainer
        share = None if trainer is None else trainer.distributed_sampler_kwargs
        self.train_loader = WindowLoader(
            dataset,
            batch_size=self.batch_size,
            # Lightning tells it the epoch.
            sampler=ResumableSampler(dataset, seed=self.seed, **(share or {"num_replicas": 1, "rank": 0})),
            collate_fn=TrainingCollator(self.pad_id),
            window=1 if trainer is None else trainer.accumulate_grad_batches,
            limit=1.0 if trainer is None else trainer.limit_train_batches,
            **self._loading(),
        )
        self._go_on()
        return self.train_loader

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch is, so that an interrupted one goes on with the rows that it has not seen."""
        return {} if self.train_loader is None else self.train_loader.progress()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of ``fit`` only; sharded models are restored when their loader is there already, others before."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        self._interrupted = state_dict
        self._go_on()

    def _go_on(self) -> None:
        if self._interrupted and self.train_loader is not None:
            self.train_loader.resume(self._interrupted)
            self._interrupted = {}

    def val_dataloader(self) -> ReportingLoader:
        """Questions of the validation split, those with short answers first."""
        return self._questions("val")

    def test_dataloader(self) -> ReportingLoader:
        """Questions of the test split, those with short answers first."""
        return self._questions("test")

    def predict_dataloader(self) -> ReportingLoader:
        """Questions of the test split, those with short answers first."""
        return self._questions("test")

    def _questions(self, split: str) -> ReportingLoader:
        dataset = self._cached(Questions(self._split(split), self.encoder, self.policy))
        collator = QuestionCollator(self.pad_id)
        return ReportingLoader(dataset, batch_size=self.eval_batch_size, collate_fn=collator, **self._loading())

    def _cached(self, rows: RowsT) -> RowsT:
        if self.cache is not None:
            rows.cached = cached_rows(self.cache, rows, self.num_workers)
        return rows

    def _loading(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _split(self, split: str) -> list[Record]:
        if split not in self.records:
            raise ValueError(
                f"There is no {split} data: {split}={self.paths[split]!r}. Give {split} the path of a"
                " LLaVA-format JSON."
            )
        return self.records[split]
