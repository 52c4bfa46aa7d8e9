"""Blame and replay: one rank's step of a run that is over, made again in one process without MPI, with all its numbers.

The program of the run is run once more, by all of its ranks in turn, in threads. The Trainer that has the run's folder
starts from the newest checkpoint before the step, or from the beginning, and the program ends after the step. So the
ranks do to one another what they did then: the steps in between, collectives and batch statistics included, need no
other code than the run's own. Every step is compared with what the run has written down of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distprop import checkpoint, fingerprint
from distprop.capture import Capture
from distprop.checkpoint import Checkpoint, CheckpointError
from distprop.comm import ThreadCommunicator, play, run_threads
from distprop.data.dataset import at_epoch
from distprop.data.loader import Loader, order
from distprop.evidence import Evidence
from distprop.fingerprint import Record, RecordError
from distprop.metrics import StepResult
from distprop.repeat import repeating
from distprop.rerun import Program, ProgramError, find_program
from distprop.rundir import RUN, Run, RunDirError, read_run, session_at
from distprop.stopping import DEADLINE, MAX_TIME, REPORT, RESUME
from distprop.tape import Array

if TYPE_CHECKING:
    from distprop.train import Trainer

FOLDER = "replay"  # in the folder of the run
_IDENTITY = (
    "seed", "batch_size", "shards", "accumulate", "deterministic", "clip_norm", "examples",
    "model", "optimizer", "loss",
)  # fmt: skip


class ReplayError(ValueError):
    """The step cannot be made again; says why, and what to do."""


@dataclass(frozen=True)
class Plan:
    """What is to be made again.

    Attributes:
        run: the folder, and what is in it.
        step: the update to look at, 1 for the first.
        rank: whose.
        session: the call of `fit` that made the step.
        found: the state to begin with; None for that of a new run.
        program: makes the run again.
        hashes: the run's fingerprints, if there are any.
        remarks: what a reader of the numbers should know.
    """

    run: Run
    step: int
    rank: int
    session: Mapping[str, Any]
    found: Checkpoint | None
    program: Program
    hashes: Record | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """On how many ranks the step was made."""
        return int(self.session["ranks"])

    @property
    def begins(self) -> int:
        """The step of the state to begin with."""
        return self.found.step if self.found is not None else 0


@dataclass(frozen=True)
class Replayed:
    """The numbers of a step; `arrays` and `kinds` as in `Capture`, `summary` for people, `path` where they are."""

    arrays: Mapping[str, Array]
    kinds: Mapping[str, str]
    summary: str
    path: Path


def plan(run_dir: Path, step: int, rank: int, *, script: Path | None = None, program: Program | None = None) -> Plan:
    """Find out how the step can be made again; nothing is run, and nothing written.

    Args:
        run_dir: the folder of the run.
        step: the update, 1 for the first.
        rank: whose share of it.
        script: where the run's script is now, if it has moved.
        program: in place of what the folder says.

    Raises:
        ReplayError: it cannot be.
    """
    run_dir, remarks = run_dir.resolve(), list[str]()
    try:
        run = read_run(run_dir)
    except RunDirError as error:
        raise ReplayError(str(error)) from error
    if not run.sessions:
        raise ReplayError(f"{run_dir} has no {RUN}, so nobody knows what was run there; a run of now has one")
    last = max((line["step"] for line in run.steps), default=0)
    last += run.state not in ("finished", "stopped")  # that which failed
    if step > last and run.state in ("going", "died"):  # killed, perhaps, before the last lines were written
        remarks.append(
            f"step {step} is not in metrics.jsonl, which ends with step {last - 1}; it may come all the same"
        )
    elif not 1 <= step <= last:
        made = f"the steps 1 to {last}" if last else "no step"
        raise ReplayError(f"--step {step}: the run in {run_dir} made {made}")
    session = session_at(run.sessions, step)
    if session is None or not isinstance(session.get("ranks"), int) or "program" not in session:
        raise ReplayError(f"{run_dir / RUN} does not say what made step {step}; an older version of distprop wrote it")
    if not 0 <= rank < session["ranks"]:
        made = (
            f"{session['ranks']} ranks, 0 to {session['ranks'] - 1}"
            if session["ranks"] > 1
            else "1 rank; give --rank 0"
        )
        raise ReplayError(f"--rank {rank}: step {step} was made on {made}")
    try:
        program = program or find_program(run_dir, session, script, remarks.append)
    except ProgramError as error:
        raise ReplayError(str(error)) from error
    return Plan(run, step, rank, session, _state(run_dir, step, remarks), program, _hashes(run_dir), remarks)


def replay(plan: Plan) -> Replayed:
    """Make the step again, save its numbers in `replay` in the folder of the run, and return them.

    Raises:
        ReplayError: the program is not that of the run, or does not come as far as the step.
    """
    evidence = Evidence(plan.run, plan.hashes, plan.rank)
    models: dict[int, int] = {}  # the rank of each, by id
    ranks = [_Rank(plan, evidence, models) for _ in range(plan.size)]
    ending = _run(plan, ranks)
    seen = ranks[plan.rank]
    if seen.capture is None:
        reason = "the program ended" if ending is None else f"{type(ending).__name__}: {ending}"
        raise ReplayError(f"rank {plan.rank} did not come to step {plan.step} of {plan.run.path}: {reason}") from ending
    arrays = seen.capture.arrays(seen.indices, seen.batch)
    path = plan.run.path / FOLDER / f"step-{plan.step}-rank-{plan.rank}.npz"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # its stub takes the arrays for allow_pickle
    os.replace(partial, path)
    lines = [_heading(plan, seen), _origin(plan, ending is None), *evidence.lines()]
    if ending is not None:
        lines.append(f"the step ended with {type(ending).__name__}: {ending}")
    return Replayed(arrays, seen.capture.kinds, "\n".join(lines), path)


def _state(run_dir: Path, step: int, remarks: list[str]) -> Checkpoint | None:
    """The newest state before `step` that the program can go on from."""
    try:
        return checkpoint.newest(run_dir / "checkpoints", remarks.append, before=step)
    except CheckpointError as error:
        remarks.append(f"{error}; the run is made again from its beginning")
        return None


def _hashes(run_dir: Path) -> Record | None:
    try:
        return fingerprint.read(run_dir)
    except RecordError:
        return None


def _run(plan: Plan, ranks: Sequence[_Rank]) -> BaseException | None:
    """Run the program on all ranks; returns the exception that has ended it before the end of the step, if any."""

    def work(comm: ThreadCommunicator) -> None:
        token = repeating.set(ranks[comm.rank])
        try:
            with play(comm):
                plan.program()
        except _EndOfReplayError as end:
            if end.error is not None:
                raise end.error from None  # the others learn of it
        finally:
            repeating.reset(token)

    with _quiet_environment(), _blas_threads(plan.session), plan.program.surroundings():
        try:
            run_threads(plan.size, work, None, one_at_a_time=True)
        except ReplayError:
            raise
        except (Exception, SystemExit) as error:
            return error
    return None


@contextmanager
def _quiet_environment() -> Iterator[None]:
    """A launcher's wishes are not meant for a replay that is started from its job."""
    taken = {name: os.environ.pop(name, None) for name in (DEADLINE, MAX_TIME, REPORT, RESUME)}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in taken.items() if value is not None})


@contextmanager
def _blas_threads(session: Mapping[str, Any]) -> Iterator[None]:
    """As many threads for matrix products as each rank had; their number changes the rounding."""
    import threadpoolctl

    said = re.search(r"(\d+) thread", str(session.get("environment", {}).get("blas", "")))
    with threadpoolctl.threadpool_limits(int(said[1]) if said else None, user_api="blas"):
        yield


class _EndOfReplayError(SystemExit):
    """Ends the program after the step, with status 0; `error` is what went wrong in the step."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(0)
        self.error = error


class _Rank:
    """A `Repeat` for one rank of a plan; the one that was asked for keeps its numbers."""

    def __init__(self, plan: Plan, evidence: Evidence, models: dict[int, int]) -> None:
        self._plan, self._evidence, self._models = plan, evidence, models
        self._trainer: Trainer | None = None
        self.capture: Capture | None = None
        self.indices: Array = np.empty(0, np.int64)
        self.batch: Sequence[Array] = ()
        self.rows = 0  # of the global batch
        self.result: StepResult | None = None

    def begin(self, trainer: Trainer, run_dir: str | Path) -> Checkpoint | None:
        plan = self._plan
        if str(run_dir) != plan.session.get("run_dir") and Path(run_dir).resolve() != plan.run.path:
            raise ReplayError(
                f"the program trains in {run_dir} now; the run to be repeated was in {plan.session.get('run_dir')}. "
                "A program that trains in several folders, or in one with another name each time, cannot be repeated"
            )
        if self._trainer is not None:
            raise ReplayError(f"the program makes a second Trainer for {run_dir}; only one can be repeated")
        self._trainer = trainer
        if self._models.setdefault(id(trainer.model), trainer.comm.rank) != trainer.comm.rank:
            raise ReplayError(
                "the ranks of a replay live in one process, and several of them have got the same model, as happens "
                "when an imported module makes it. Make it in the script, or in a function that the script calls"
            )
        trainer.parallel.verify_every = 0  # ranks that differ are what one wants to see
        return plan.found

    def check(self, trainer: Trainer, settings: Mapping[str, Any]) -> None:
        sessions = self._plan.run.sessions
        of_then = session_at(sessions, trainer.step + 1) or {}
        different = [
            f"{name} was {of_then[name]}, is {settings[name]}"
            for name in _IDENTITY
            if name in of_then and of_then[name] != json.loads(json.dumps(settings[name]))
        ]
        if different:
            raise ReplayError(f"the program is not the one of {self._plan.run.path} any more: {'; '.join(different)}")
        if (
            trainer.step == 0
            and of_then.get("from_step") == 0
            and of_then.get("state", settings["state"]) != settings["state"]
        ):
            raise ReplayError(
                f"there is no checkpoint before step {self._plan.step}, and the program begins with other parameters "
                f"than the run did (hash {settings['state']}, not {of_then['state']}): they come from random numbers "
                "without a seed, or from a file that has changed. Seed them, with distprop.manual_seed for layers, or "
                "train with checkpoint_every"
            )

    def step(
        self, trainer: Trainer, loader: Loader, batch: Sequence[Array], make: Callable[[], StepResult]
    ) -> StepResult:
        number, last = trainer.step + 1, self._plan.step
        try:
            if number == last and trainer.comm.rank == self._plan.rank:
                self.result = self._watched(trainer, loader, batch, make)
            else:
                self.result = make()
        except Exception as error:
            raise _EndOfReplayError(error) from error
        self._evidence.look(trainer.comm.rank, trainer.model, self.result)
        if number >= last:
            raise _EndOfReplayError
        return self.result

    def _watched(
        self, trainer: Trainer, loader: Loader, batch: Sequence[Array], make: Callable[[], StepResult]
    ) -> StepResult:
        """Gradients become this rank's part of the mean over the global batch, whatever they are in the message."""
        self.rows, self.batch = loader.rows(trainer.batch), batch
        first = trainer.batch * loader.batch_size
        whole = order(loader.seed, trainer.epoch, len(loader.dataset), loader.shuffle)[first : first + self.rows]
        self.indices = whole[loader.share_of(self.rows)]
        *_, targets = at_epoch(loader.dataset, trainer.epoch)[whole]
        share = trainer.accumulate / (trainer.examples(targets) or 1)
        self.capture = Capture(trainer.model, trainer.parallel.expected_examples * share)
        loss, trainer.loss = trainer.loss, self.capture.loss(trainer.loss, trainer.examples)
        try:
            with self.capture.watching():
                return make()
        finally:
            trainer.loss = loss


def _heading(plan: Plan, seen: _Rank) -> str:
    result = seen.result if seen.result is not None and seen.result.step == plan.step else None
    over_all = f"; the loss over all ranks is {result.loss:.6g}" if result is not None else ""
    return f"step {plan.step}, rank {plan.rank} of {plan.size}: {len(seen.batch[-1])} of {seen.rows} examples{over_all}"


def _origin(plan: Plan, complete: bool) -> str:
    """Which steps were made; `complete` if the last one was."""
    made = range(plan.begins + 1, plan.step + complete)
    source = f"the checkpoint of step {plan.begins}" if plan.found is not None else "the initial parameters"
    what = f"steps {made[0]} to {made[-1]} were" if len(made) > 1 else f"step {made[0]} was" if made else "no step was"
    return f"from {source}, on {plan.size} rank{'s' * (plan.size > 1)} in this process: {what} made again"
