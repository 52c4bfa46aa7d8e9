"""The training loop: batches, steps, evaluation, checkpoints, and the numbers that come out, the same on every rank.

Only reduced numbers leave a step, so a decision that a callback makes from them, such as stopping early, is made by all
ranks at the same step.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from distprop.checkpoint import Checkpoint
from distprop.comm import Communicator, recorder, world
from distprop.comm.recorder import here
from distprop.data.dataset import Dataset, check_dataset
from distprop.data.loader import Loader
from distprop.diagnosis import Diagnosis, Verdict
from distprop.evaluation import evaluate
from distprop.fingerprint import Fingerprints, replay_advice, state_hash
from distprop.functional.check import real
from distprop.health import EVERY, Health
from distprop.live import Plan, show_progress
from distprop.look import Look
from distprop.metrics import EpochResult, EpochSums, MetricsFile, StepResult
from distprop.nn.module import Module
from distprop.optim.optimizer import Optimizer
from distprop.parallel import DataParallel, NonFiniteGradientError
from distprop.progress import Progress
from distprop.repeat import repeating
from distprop.replicas import compare_settings
from distprop.run_checkpoints import RunCheckpoints
from distprop.rundir import session
from distprop.stopping import REPORT, Report, StopRequest, resume_forced
from distprop.timeline import STEPS, Profile, Timeline
from distprop.update import Batch, Loss, NonFiniteLossError, Update

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

Callback: TypeAlias = Callable[[StepResult], object]


class Trainer:
    """Trains `model` on all ranks of `comm`.

    >>> import distprop as dp
    >>> from distprop import functional as F
    >>> train_set, test_set = dp.data.load_digits()
    >>> model = dp.nn.Linear(64, 10)
    >>> optimizer = dp.optim.SGD(model.parameters(), lr=0.5)
    >>> trainer = Trainer(model, F.cross_entropy, optimizer, batch_size=64, progress=False)
    >>> results = trainer.fit(train_set, epochs=2)
    >>> trainer.evaluate(test_set)["accuracy"] > 0.8
    True

    Args:
        model: the network; `model(x)` is given to the loss.
        loss: a function of (output, target) that is a mean over the examples.
        optimizer: over the model's parameters.
        comm: the ranks; `world()` by default.
        batch_size: rows of the *global* batch; each rank takes its share.
        seed: names the order of the data and the dropout masks.
        deterministic: give the same bits on any number of ranks; see docs/parallel.md for what it costs. It limits BLAS
            to one thread in this process, whose number changes the rounding of matrix products.
        shards: with `deterministic`, the pieces of equal size that each global batch is cut into, the last one of an
            epoch too; where a remainder r is left, the first r have one row more. Which rows a piece has follows from
            the batch and `shards` alone. More ranks than shards would have nothing to do.
        wire: "bf16" or "fp16" for gradients that cross the network in 16 bits, with error feedback; see `DataParallel`.
            Not with `deterministic`. What rounding has left over is not part of a checkpoint.
        sharded_update: have one copy of the parameters and of the optimizer's state a node, of which each rank updates
            its slice; the bits are the same. For callbacks that only read parameters; see `DataParallel`.
        accumulate: cut each rank's share into so many pieces, one after the other, to save memory for the same update.
        clip_norm: clip the global gradient norm to this.
        prefetch: load so many batches ahead in a background thread. It pays where loading waits for a disk, or where a
            core is idle.
        run_dir: a folder for `metrics.jsonl` and `checkpoints`, of rank 0; made if it is missing.
        checkpoint_every: write a checkpoint every so many steps, when the validation loss is the best so far, and at
            the end of `fit`. The newest three and the best are kept.
        resume: go on from the newest whole checkpoint in `run_dir`, if there is one, on any number of ranks. Calls of
            `fit` that were complete by then return at once, and the next one ends where it would have ended without
            the interruption. With DISTPROP_RESUME=1, which a restart by `distprop run --max-restarts` sets, every
            Trainer that has a `run_dir` resumes.
        fingerprint: record a hash of every parameter after every step in `run_dir`, and compare the ranks by it every
            16 steps; see `distprop fingerprint`. By default in deterministic mode, if there is a `run_dir`.
        profile: record the time line of every rank in `trace.json` in `run_dir`, of the next so many steps of `fit`, or
            of 200 if True; Perfetto opens it, `distprop trace` sums it up.
        health: look at the gradients, the weights and the units of every layer each time so many steps have been made,
            of 50 if True, and more often at first; False or 0 for never. The numbers go into `metrics.jsonl`; what is
            wrong is said once, and kept in `verdicts`. See docs/insight.md.
        examples: a function of a batch's target that says over how many examples the loss is a mean, if these are not
            its rows: `lambda y: (y != -100).sum()` for `cross_entropy`, which leaves labels of -100 out, or the sum of
            the labels' class weights. Without it the mean over the global batch would depend on how it is cut.
        callbacks: called with the `StepResult` of every step, on every rank. One that returns True, on any rank, stops
            training on all. One with a method `log` gets every line of `metrics.jsonl`, on rank 0: docs/insight.md.
        progress: a live view on rank 0's terminal, plain lines elsewhere.

    Raises:
        ValueError: an argument out of range, or a `run_dir` that holds checkpoints of another run.
        CheckpointError: every checkpoint to resume from is damaged.
        NonFiniteLossError: by `fit`, when the loss is NaN or infinite; names the step and the rank.
        NonFiniteGradientError: by `fit`, when a gradient is; names the rank and the parameter as well.
        DivergenceError: by `fit`, when the ranks do not have the same parameters, at its end at the latest, and before
            a checkpoint is written of them; names the first that differs.
        StoppedError: by `fit`, on every rank at the same step, after SIGTERM or SIGUSR1 on any of them, Ctrl-C if there
            are checkpoints, or when DISTPROP_MAX_TIME is nearly over. A checkpoint has been written; as a `SystemExit`
            it ends the process with status 75. See docs/reliability.md.
    """

    def __init__(
        self,
        model: Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        comm: Communicator | None = None,
        batch_size: int,
        seed: int = 0,
        deterministic: bool = False,
        shards: int = 8,
        wire: Literal["bf16", "fp16"] | None = None,
        sharded_update: bool = False,
        accumulate: int = 1,
        clip_norm: float | None = None,
        prefetch: int = 0,
        run_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        fingerprint: bool | None = None,
        profile: bool | int = False,
        health: bool | int = True,
        examples: Callable[[Any], float] | None = None,
        callbacks: Iterable[Callback] = (),
        progress: bool = True,
    ) -> None:
        _check_parts(model, loss, optimizer)
        batch_size, accumulate = _whole("batch_size", batch_size, 1), _whole("accumulate", accumulate, 1)
        shards, seed, prefetch = _whole("shards", shards, 1), _whole("seed", seed, 0), _whole("prefetch", prefetch, 0)
        if checkpoint_every is not None:
            checkpoint_every = _whole("checkpoint_every", checkpoint_every, 1)
        clip_norm = _checked_norm(clip_norm)
        if run_dir is not None and not os.fspath(run_dir):
            raise ValueError("run_dir is empty; give a folder, such as runs/a, or None for none")
        if run_dir is None and (checkpoint_every is not None or resume):
            raise ValueError("checkpoint_every and resume need a run_dir")
        if run_dir is None and fingerprint:
            raise ValueError("fingerprint=True needs a run_dir")
        if _whole("profile", profile, 0) and run_dir is None:
            raise ValueError(f"profile is a number of steps and needs a run_dir; got profile={profile}")
        _whole("health", health, 0)
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            if not callable(callback):
                raise TypeError(f"a callback is a function of a StepResult; got {callback!r}")
        self._repeat = repeating.get() if run_dir is not None else None
        repeated_dir = run_dir
        if self._repeat is not None:  # nothing is written into the folder of a run that is repeated
            run_dir = checkpoint_every = None
            fingerprint = profile = progress = health = False
        self.comm = comm if comm is not None else world()
        self.model, self.optimizer = model, optimizer
        self.shards = shards if deterministic else None
        if deterministic:
            _limit_blas_to_one_thread()
        fingerprint = deterministic and run_dir is not None if fingerprint is None else fingerprint
        self._health = Health(model, self.comm, EVERY if health is True else int(health), accumulate)
        self.verdicts: list[Verdict] = []  # what was wrong so far
        self._diagnosis = Diagnosis(clipped=clip_norm is not None)
        self.parallel = DataParallel(
            model, self.comm, shards=self.shards, wire=wire, sharded_update=sharded_update, extra=self._health
        )
        self.batch_size, self.seed, self.accumulate = batch_size, seed, accumulate
        self.examples: Callable[[Any], float] = len if examples is None else examples
        self._prefetch = prefetch
        self.run_dir = _path(run_dir) if run_dir is not None else None
        self._fingerprints = Fingerprints(model, self.comm, self.run_dir if fingerprint else None)
        self.checkpoint_every = checkpoint_every
        self.step = 0  # updates made
        self.epoch = 0  # the epoch that the next step belongs to
        self.batch = 0  # the batch of that epoch that comes next
        self._sums = EpochSums()  # of the steps of this epoch
        self._progress = progress
        self._metrics = MetricsFile(None)
        self._timeline = Timeline()
        self._profile: Profile | None = None
        if profile and self.run_dir is not None:
            self._profile = Profile(
                self._timeline, model, self.comm, self.run_dir, STEPS if profile is True else profile
            )
        self._best_loss = math.inf
        self._fit_began = (0, 0)  # (epoch, step) at the beginning of the present call of fit
        self._fit_ended = False  # by a callback; only then does nothing but this tell that the call is complete
        self._resumed: Checkpoint | None = None  # until its call of fit, if there are others before it
        self._examples: int | None = None  # of the dataset that the present epoch goes through
        self._report = Report(os.environ.get(REPORT) if self.comm.rank == 0 else None)
        self._stop_request = StopRequest()
        self._checkpoints = RunCheckpoints(model, optimizer, self.comm, self.run_dir, self._identity(), self._report)
        found = self._checkpoints.open(resume or resume_forced(), checkpoint_every is not None, quiet=not progress)
        if self._repeat is not None and repeated_dir is not None:
            found = self._repeat.begin(self, repeated_dir)
            if found is not None:
                self._checkpoints.restore(found)
        self._update = Update(
            self.parallel, loss, optimizer, accumulate=accumulate, clip_norm=clip_norm, shards=self.shards,
            health=self._health, timeline=self._timeline, wishes=self._wishes, examples=self.examples,
        )  # fmt: skip
        self._fits = 0  # calls of fit so far
        self._fit_resumed = 0  # the number of the call that the checkpoint is of, until it is made
        if found is not None:
            self._restore(found.step, found.state)
            self._resumed = found if self._fit_resumed > 1 else None

    @property
    def loss(self) -> Loss:
        """The function of (output, target) that is minimised; another one counts from the next step on."""
        return self._update.loss

    @loss.setter
    def loss(self, loss: Loss) -> None:
        self._update.loss = loss

    @property
    def clip_norm(self) -> float | None:
        """The largest norm of the global gradient; another one counts from the next step on."""
        return self._update.clip_norm

    @clip_norm.setter
    def clip_norm(self, norm: float | None) -> None:
        self._update.clip_norm = _checked_norm(norm)
        self._diagnosis.history.clipped = norm is not None

    def fit(
        self,
        dataset: Dataset,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        validation: Dataset | None = None,
    ) -> list[EpochResult]:
        """Train for `epochs` passes over `dataset`, or for `steps` updates, whichever ends first.

        A further call goes on where the last one stopped. With `validation`, that set is evaluated after each epoch.
        Returns a line for each epoch; the same on every rank.
        """
        if epochs is None and steps is None:
            raise ValueError("fit() needs epochs or steps")
        if not all(isinstance(number, int | np.integer | None) for number in (epochs, steps)):
            raise TypeError(f"epochs and steps are whole numbers, got {epochs!r} and {steps!r}")
        epochs, steps = (None if number is None else int(number) for number in (epochs, steps))
        if (epochs or 0) < 0 or (steps or 0) < 0:
            raise ValueError(f"epochs and steps must be 0 or more, got {epochs} and {steps}")
        check_dataset(dataset)
        if validation is not None:
            check_dataset(validation)
            if not len(validation):
                raise ValueError("fit() got an empty validation set")
        if self._fits + 1 < self._fit_resumed + self._fit_ended:
            return self._pass_over()
        told = {"examples": len(dataset), "epochs": epochs, "steps": steps, "clip_norm": self.clip_norm}
        told |= {"lr": self.optimizer.lr}
        compare_settings(told | self._identity(), self.comm)
        loader = Loader(
            dataset, batch_size=self.batch_size, comm=self.comm, seed=self.seed, shards=self.shards,
            prefetch=self._prefetch,
        )  # fmt: skip
        if self.batch and self._examples not in (None, len(dataset)):
            raise ValueError(
                f"training stands at batch {self.batch} of an epoch over {self._examples} examples; "
                f"the rest of it is not in a dataset of {len(dataset)}"
            )
        self._examples = len(dataset)
        self._restore_again()
        if not self._fit_resumed:
            self._fit_began = (self.epoch, self.step)
        self._fit_resumed = 0
        last_epoch = math.inf if epochs is None else self._fit_began[0] + epochs
        last_step = math.inf if steps is None else self._fit_began[1] + steps
        total = max(0, min(last_step - self.step, (last_epoch - self.epoch) * len(loader) - self.batch))
        results: list[EpochResult] = []
        logs = [callback for callback in self.callbacks if hasattr(callback, "log")]
        self._metrics = MetricsFile(self.run_dir, logs) if self.comm.rank == 0 else MetricsFile(None)
        self._fits += 1
        settings = self._settings(dataset, epochs, steps)
        if self._repeat is not None and total:
            self._repeat.check(self, settings)
        noted = session(self.run_dir, self.comm, settings)
        plan = Plan(int(total), len(loader), self.epoch, self.batch)
        progress_shown = show_progress(self._progress and self.comm.rank == 0, plan, self._timeline)
        with (
            noted as entry,
            self._metrics,
            self._fingerprints,
            progress_shown as progress,
            self._profile or nullcontext(),
            self._stop_request.listening(self.checkpoint_every is not None, self._report),
        ):
            self._fingerprints.record(self.step)
            self._fit_ended = False
            while self.epoch < last_epoch and self.step < last_step and not self._fit_ended:
                stopped = self._run_epoch(loader, last_step, progress)
                if self._stop_request.agreed:
                    entry["stopped"] = True
                    break  # at once; the epoch ends when the run is resumed
                self._fit_ended = stopped
                results.append(self._end_epoch(loader, validation, progress))
            self._save(final=True)
            self._stop_request.agree_at_the_end(self.comm)
        here.at(recorder.AFTER_FIT)
        if self._stop_request.agreed:
            saved_in = self.run_dir if self.checkpoint_every else None
            self._stop_request.leave(self.comm, self.step, self._checkpoints.newest, saved_in)
        return results

    def _pass_over(self) -> list[EpochResult]:
        """A call of `fit` that was complete when the checkpoint was written."""
        self._fits += 1
        if self._fits == 1 and self.comm.rank == 0:
            count = self._fit_resumed - 1 + self._fit_ended
            calls = f"{count} call{'s' * (count > 1)} of fit() before it return at once"
            print(f"distprop: goes on with step {self.step + 1}; {calls}", file=sys.stderr, flush=True)
        if self._fits == self._fit_resumed:
            self._restore_again()
            self._fit_resumed, self._fit_ended = 0, False
        return []

    def _restore_again(self) -> None:
        """Undo what the program has done once more between calls of `fit` that were passed over. Collective."""
        if self._resumed is not None:
            self.comm.barrier()  # no rank changes what is shared any more
            self._checkpoints.restore(self._resumed)
            self._resumed = None

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Mean loss, and accuracy where targets are class labels, over all of `dataset`; the same on every rank."""
        return evaluate(self.model, self.loss, dataset, self.comm, self.shards is not None, self.examples)

    # --- an epoch and its steps

    def _run_epoch(self, loader: Loader, last_step: float, progress: Progress) -> bool:
        """The rest of the current epoch, or its part before `last_step`; tells whether a callback stops training."""
        self.model.train()
        here.at(recorder.DATA, self.step + 1)
        for batch in self._timeline.waiting(loader.batches(self.epoch, self.batch)):
            make = partial(self._step, batch, loader.rows(self.batch))
            try:
                result = make() if self._repeat is None else self._repeat.step(self, loader, batch, make)
            except (NonFiniteLossError, NonFiniteGradientError):
                self._tell(self._health.failed(self.step + 1, self.optimizer.lr), progress)
                raise
            here.at(recorder.CALLBACKS)
            self._fingerprints.record(self.step)
            self.batch += 1
            self._sums.add(result, self.parallel.received["examples"])
            self._metrics.write_step(result)
            progress.step(result)
            if look := self._health.take(result):
                self._tell(look, progress)
            stopped = self._ask_callbacks(result)
            if stopped or self.step >= last_step:
                return stopped
            if self.checkpoint_every and self.step % self.checkpoint_every == 0 and self.batch < len(loader):
                self._save()
            received = self.parallel.received
            self._stop_request.agreed = bool(received["stop"])
            if self._stop_request.agreed:
                return True
            if received["save"]:
                self._save()
            here.at(recorder.DATA, self.step + 1)
        return False

    def _end_epoch(self, loader: Loader, validation: Dataset | None, progress: Progress) -> EpochResult:
        """Evaluate, write the epoch's line, and go on to the next epoch if this one is complete."""
        result = self._sums.result(self.epoch)
        if self.batch == len(loader):
            self.epoch, self.batch, self._sums = self.epoch + 1, 0, EpochSums()
        if validation is not None:
            with self._timeline("evaluation"):
                result.validation = self.evaluate(validation)
        self._metrics.write(
            {"epoch": result.epoch, "step": self.step, "epoch_loss": result.loss, **result.metrics}
            | {f"validation_{name}": value for name, value in result.validation.items()}
            | {"seconds": self._timeline.take_all(self.comm)}
        )
        progress.epoch(result.epoch, result.loss, result.metrics, result.validation)
        best = result.validation.get("loss", math.inf) < self._best_loss
        if best:
            self._best_loss = result.validation["loss"]
        if best or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
            self._save(best=best)
        return result

    def _tell(self, look: Look, progress: Progress) -> None:
        """The numbers of a look, and what is wrong by them, to everybody who wants to know."""
        line = look.line()
        self._metrics.write(line)
        progress.health(line)
        for verdict in self._diagnosis.add(look):
            self.verdicts.append(verdict)
            self._metrics.write(verdict.line())
            progress.verdict(verdict.text)

    def _ask_callbacks(self, result: StepResult) -> bool:
        """Whether a callback on any rank wants to stop; costs one small Allreduce, and only if there are callbacks."""
        if not self.callbacks:
            return False
        answers = [callback(result) for callback in self.callbacks]
        wishes = sum(isinstance(answer, bool | np.bool_) and bool(answer) for answer in answers)  # 1 == True, too
        return bool(self.comm.allreduce(np.array([wishes], np.float64))[0])

    def _step(self, batch: Batch, rows: int) -> StepResult:
        """One update, and what came out."""
        if self._profile is not None:
            self._profile.begin_step()
        began = time.perf_counter_ns()
        lr = self.optimizer.lr
        try:
            received = self._update(batch, rows, self.step + 1, self.epoch)
        except (NonFiniteLossError, NonFiniteGradientError) as error:
            if advice := replay_advice(self.run_dir, self.step + 1, error.culprits[0] if error.culprits else 0):
                error.add_note(advice)
            raise
        self.step += 1
        examples = received["examples"]
        loss = received["loss"] / examples if examples else math.nan
        metrics = {"accuracy": received["correct"] / received["labels"]} if received["labels"] else {}
        seconds = (time.perf_counter_ns() - began) / 1e9
        if self._profile is not None:
            self._profile.end_step(self.step, began)
        return StepResult(self.step, self.epoch, loss, metrics, round(examples), lr, seconds)

    def _wishes(self) -> tuple[float, float]:
        """What this rank wants of all: to stop, and to save."""
        return self._stop_request.numbers(self.comm.rank == 0, self._checkpoints.seconds)

    # --- what is kept

    def _save(self, best: bool = False, final: bool = False) -> None:
        """Write a checkpoint while training goes on; the last one is waited for. Never of parameters that differ."""
        here.at(recorder.CHECKPOINT)
        self._fingerprints.flush()  # ranks that differ have nothing to save
        if self.checkpoint_every or (final and self.parallel.verified_at != self.parallel.reductions):
            self.parallel.verify()
        if not self.checkpoint_every:
            return
        self._metrics.flush()  # first: a resumed run keeps the lines up to its checkpoint
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "epoch_sums": asdict(self._sums),
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "fit": self._fits,
            "fit_began": list(self._fit_began),
            "fit_ended": self._fit_ended,
            "examples": self._examples,
            "expected_examples": self.parallel.expected_examples,
            "health": self._health.state(),
            "diagnosis": self._diagnosis.state(),
        }
        with self._timeline("checkpoint"):
            self._checkpoints.write(self.step, state, best, final)

    def _restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on from what `_save` has written; model and optimizer have been restored."""
        self.step, self.epoch, self.batch = step, state["epoch"], state["batch"]
        self.parallel.reductions = self.step
        self.parallel.expected_examples = state["expected_examples"]
        self._sums = EpochSums(**state["epoch_sums"])
        self._best_loss = state["best_loss"] if state["best_loss"] is not None else math.inf
        self._fit_resumed = state["fit"]
        began_epoch, began_step = state["fit_began"]
        self._fit_began = (began_epoch, began_step)
        self._fit_ended = state.get("fit_ended", False)
        self._examples = state["examples"]
        self._health.restore(state["health"])
        self._diagnosis.restore(state["diagnosis"])

    def _settings(self, dataset: Dataset, epochs: int | None, steps: int | None) -> dict[str, Any]:
        """What a reader of the run's folder wants to know of this call of `fit`."""
        return {
            "run_dir": str(self.run_dir),
            "fit": self._fits,
            "from_step": self.step,
            "state": state_hash(self.model),
            "model": repr(self.model),
            "parameters": sum(parameter.data.size for parameter in self.model.parameters()),
            "optimizer": type(self.optimizer).__name__,
            "loss": getattr(self.loss, "__name__", type(self.loss).__name__),
            "lr": self.optimizer.lr,
            "examples": len(dataset),
            "epochs": epochs,
            "steps": steps,
            "deterministic": self.shards is not None,
            "reduction": self.parallel.reduction,
            "clip_norm": self.clip_norm,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """What decides which examples a step sees, and the rounding; it must not change when a run is resumed."""
        return {"seed": self.seed, "batch_size": self.batch_size, "shards": self.shards, "accumulate": self.accumulate}


def _whole(name: str, value: int, least: int) -> int:
    """`value` as Python's integer, since NumPy's are nothing for JSON."""
    if not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {'at least 1' if least else '0 or more'}, got {value}")
    return int(value)


def _checked_norm(norm: float | None) -> float | None:
    real("Trainer", clip_norm=0.0 if norm is None else norm)
    if norm is not None and not norm > 0:
        raise ValueError(f"clip_norm must be more than 0, got {norm}")
    return None if norm is None else float(norm)


def _check_parts(model: Module, loss: Loss, optimizer: Optimizer) -> None:
    if isinstance(model, DataParallel):
        raise TypeError("Trainer makes a DataParallel of its own; give it the module")
    if not isinstance(model, Module):
        raise TypeError(f"Trainer needs a Module as its model, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"the loss is a function of (output, target), such as functional.cross_entropy; got {loss!r}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Trainer needs an Optimizer, such as optim.SGD(model.parameters(), lr=0.1); got {optimizer!r}")
    own = {id(parameter) for parameter in model.parameters()}
    foreign = sum(id(parameter) not in own for parameter in optimizer.parameters)
    if foreign:
        raise ValueError(
            f"{foreign} of the optimizer's {len(optimizer.parameters)} parameters are not the model's; build the "
            "optimizer from this model's parameters()"
        )


def _path(name: str | Path) -> Path:
    from pathlib import Path

    return Path(name)


def _limit_blas_to_one_thread() -> None:
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")
