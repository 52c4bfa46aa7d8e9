"""The seam between a Trainer and a replay: how one step of a run is made again without touching the run's folder.

`distprop replay` runs the program of a run once more. The Trainer that has the run's folder finds a `Repeat` here,
takes its state from it, and lets it make the steps. All others, and all in any other program, find nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from distprop.checkpoint import Checkpoint
from distprop.data.loader import Loader
from distprop.metrics import StepResult
from distprop.tape import Array

if TYPE_CHECKING:
    from pathlib import Path

    from distprop.train import Trainer


class Repeat(Protocol):
    """What a Trainer asks when a run is repeated; each rank has its own."""

    def begin(self, trainer: Trainer, run_dir: str | Path) -> Checkpoint | None:
        """A Trainer with this folder has been made; returns the state that it goes on from, None for its own."""

    def check(self, trainer: Trainer, settings: Mapping[str, Any]) -> None:
        """`fit` has been called, with what run.json says of such a call; refuses what is not the run's."""

    def step(
        self, trainer: Trainer, loader: Loader, batch: Sequence[Array], make: Callable[[], StepResult]
    ) -> StepResult:
        """Let `make` make the next step, of this rank's `batch`; after the one that was asked for the program ends."""


repeating: ContextVar[Repeat | None] = ContextVar("repeating", default=None)
