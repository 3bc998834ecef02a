"""What benchmarks/inference.py measures, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A batch that is read and gone on with.

    Args:
        rows: Batch size.
        vision: Vision tokens of each row.
        text: Text tokens of each row.
        target: Most that a decode step may take, over dense.
        methods: Those that are timed; None for all.
    """

    rows: int
    vision: int
    text: int
    target: float = 1.03
    methods: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        return f"{self.rows} row{'s' * (self.rows > 1)} of {self.vision:,} vision and {self.text} text tokens"


SETTINGS = (
    Setting(1, 576, 64),
    Setting(8, 576, 64),
    Setting(1, 2880, 64),
    Setting(32, 2880, 64, target=0.75, methods=("dense", "p-MoD")),  # a third cache would not fit
)


@dataclass(frozen=True)
class Plan:
    """How long is measured.

    Args:
        budget: Seconds for all settings together; each has at least one round.
        steps: Tokens that follow the prompt.
        turn: Steps after which the next method has its turn.
        prefills: Prefills of each method in a round.
    """

    budget: float = 170.0
    steps: int = 64
    turn: int = 4
    prefills: int = 2
