"""The checkpoints of one training run: what it resumes from, and what it writes while it goes on.

Rank 0 looks at the disk and writes; every rank learns what was found. A folder that holds another run's checkpoints is
refused, and so is going on with settings that would change which examples a step sees.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from distprop import checkpoint
from distprop.checkpoint import Checkpoint, CheckpointError
from distprop.comm import Communicator
from distprop.comm.base import allgather_for
from distprop.fingerprint import FINGERPRINTS
from distprop.metrics import METRICS, forget_after, set_aside
from distprop.nn.module import Module
from distprop.optim.optimizer import Optimizer
from distprop.stopping import DISK_BYTES_PER_SECOND, Report
from distprop.timeline import TRACE

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

_WRITTEN = (METRICS, FINGERPRINTS, TRACE)  # while a run goes on


class RunCheckpoints:
    """The checkpoints of the run in `run_dir`; without one there are none.

    Args:
        model: its parameters and buffers are in them,
        optimizer: and its arrays and numbers.
        comm: the ranks.
        run_dir: the folder of the run, of rank 0.
        identity: the settings that must be the same when the run is resumed.
        report: tells the launcher of a restarted job how far the run is.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        run_dir: Path | None,
        identity: Mapping[str, Any],
        report: Report,
    ) -> None:
        self._model, self._optimizer, self._comm, self._report = model, optimizer, comm, report
        self._run_dir, self._identity = run_dir, identity
        self._writer: checkpoint.Writer | None = None

    def open(self, resume: bool, writes: bool, quiet: bool = False) -> Checkpoint | None:
        """Find the newest one and restore model and optimizer, if `resume`; return it for the rest. Collective.

        With `writes`, `write` is going to be called.

        Raises:
            ValueError: there are some, and `resume` is False; or they are of a run with other settings.
            CheckpointError: all that there are are damaged.
        """
        if self._run_dir is None:
            return None
        root = self._run_dir / "checkpoints"
        restarts = bool(os.environ.get("DISTPROP_RESTARTS"))  # after one, rank 0 may be on another host
        if resume or restarts:
            from distprop.shared_folder import check_shared

            check_shared(root, self._comm, required=restarts)
        found, mistake = None, ""
        try:
            found = checkpoint.newest(root, _warn) if self._comm.rank == 0 else None
        except CheckpointError as error:
            mistake = str(error)
        if mistake := allgather_for("a search for checkpoints", self._comm, mistake.encode())[0].decode():
            raise CheckpointError(mistake)  # on all ranks, none of which waits for another
        found = checkpoint.broadcast(found, self._comm)
        if found is not None and not resume:
            raise ValueError(
                f"{root} holds checkpoints of another run; pass resume=True to go on with it, or move it away"
            )
        if found is not None:
            self.restore(found)
            if not quiet and self._comm.rank == 0:
                print(f"resuming {self._run_dir} at step {found.step}", flush=True)
        step = found.step if found is not None else 0
        if resume and self._comm.rank == 0:
            if found is not None:
                forget_after(self._run_dir, step)
            elif aside := [path.name for name in _WRITTEN if (path := set_aside(self._run_dir, name))]:
                _warn(f"{self._run_dir} has no checkpoint to go on from and starts anew; before: {', '.join(aside)}")
        self._report.began(self._run_dir, step)
        if writes and self._comm.rank == 0:
            self._writer = checkpoint.Writer(root, _warn, partial(self._report.reached, self._run_dir))
            size = 3 * sum(parameter.data.nbytes for parameter in self._model.parameters())  # with an optimizer's state
            self._writer.seconds = size / DISK_BYTES_PER_SECOND
            self._writer.best_step = found.state["best_step"] if found is not None else None
        return found

    def restore(self, found: Checkpoint) -> None:
        """Load model and optimizer; ValueError if it is of a run with other settings."""
        different = [
            f"{name} was {found.state.get(name)}, is {value}"
            for name, value in self._identity.items()
            if found.state.get(name) != value
        ]
        if different:
            raise ValueError(f"cannot resume from step {found.step} with other settings: {'; '.join(different)}")
        self._model.load_state_dict(found.tensors["model"])
        self._optimizer.load_state_dict({**found.state["optimizer"], "arrays": found.tensors["optimizer"]})

    @property
    def seconds(self) -> float:
        """How long the slowest one took to write, or is expected to take; 0 if this rank writes none."""
        return self._writer.seconds if self._writer is not None else 0.0

    @property
    def newest(self) -> int | None:
        """The step of the last one that this rank has written."""
        return self._writer.newest if self._writer is not None else None

    def write(self, step: int, state: Mapping[str, Any], best: bool, final: bool) -> None:
        """Write the one of `step`, with `state` beside the arrays, while training goes on. Only rank 0 does anything.

        The `best` one is kept until there is a better one; the `final` one is waited for. Parameters that an update
        has made infinite are no state to go on from: the checkpoint before stays the newest.
        """
        if self._writer is None:
            return
        for name, parameter in self._model.named_parameters():
            if not np.isfinite(parameter.data).all():
                _warn(f"{name} is not finite after step {step}: no checkpoint is written of it")
                return self.wait()
        if best:
            self._writer.best_step = step
        optimizer = self._optimizer.state_dict()
        arrays = optimizer.pop("arrays")
        everything = {**state, "best_step": self._writer.best_step, "optimizer": optimizer, **self._identity}
        self._writer.write(Checkpoint(step, {"model": self._model.state_dict(), "optimizer": arrays}, everything))
        if final:
            self.wait()

    def wait(self) -> None:
        """Return when the write under way has ended."""
        if self._writer is not None:
            self._writer.wait()


def _warn(message: str) -> None:
    print(f"distprop: {message}", file=sys.stderr, flush=True)
