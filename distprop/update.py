"""One step of training, in its order: forward, backward, the sum over the ranks, clipping, the update.

A step takes a rank's rows of the global batch. What the ranks have to know of each other, such as the loss and whether
one of them wants to stop, travels with the gradients; so all learn it at the same step, and for nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from distprop import random
from distprop.data.dataset import split_target
from distprop.data.loader import share
from distprop.health import Health
from distprop.metrics import Tally
from distprop.optim.clip import clip_grad_norm_
from distprop.optim.optimizer import Optimizer
from distprop.parallel import DataParallel, NonFiniteGradientError
from distprop.tape import Array
from distprop.tensor import Tensor
from distprop.timeline import Timeline

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Batch: TypeAlias = Sequence[Array]

# what travels with the gradients, summed over the ranks
_SENT = ("loss", "correct", "labels", "bad", "bad_rank", "stop", "save")


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; raised on every rank before anything is updated. `culprits`: where, if known."""

    def __init__(self, message: str, culprits: tuple[int, ...]) -> None:
        super().__init__(message)
        self.culprits = culprits


class Update:
    """Makes one update of a model from each batch; the arguments are those of `Trainer`.

    Args:
        parallel: the model on all ranks.
        loss: a mean over the examples.
        optimizer: over the model's parameters.
        accumulate: the pieces of this rank's rows, whose gradients are added up before the update.
        clip_norm: the largest norm of the mean gradient, or None.
        shards: in deterministic mode, the pieces of the global batch.
        health: looks at some steps.
        timeline: is told when each part of a step begins and ends.
        wishes: (stop, save), what this rank wants of all of them; asked once a step.
        examples: of how many examples the loss is the mean, by the target.
    """

    def __init__(
        self,
        parallel: DataParallel,
        loss: Loss,
        optimizer: Optimizer,
        *,
        accumulate: int,
        clip_norm: float | None,
        shards: int | None,
        health: Health,
        timeline: Timeline,
        wishes: Callable[[], tuple[float, float]],
        examples: Callable[[Any], float] = len,
    ) -> None:
        self.examples, self._warned = examples, False
        self._bad = False  # this rank's loss was not finite in this step, which has been said
        self.parallel, self.loss, self.optimizer = parallel, loss, optimizer
        self.accumulate, self.clip_norm, self.shards = accumulate, clip_norm, shards
        self._health, self._timeline, self._wishes = health, timeline, wishes

    def __call__(self, batch: Batch, rows: int, number: int, epoch: int) -> Mapping[str, float]:
        """Make update `number`, of `epoch`, from this rank's part of a global batch of `rows`; the sums over all ranks.

        Raises:
            NonFiniteLossError, NonFiniteGradientError: on every rank, and nothing has been updated.
        """
        self._bad = False
        self.parallel.begin_step()  # zeroes also gradients that are not the optimizer's: they are clipped together
        try:
            with self._health.looking(number):
                if self.shards is None:
                    self._forward_backward(batch, random.place().first_row)
                else:
                    self._shard_by_shard(batch, rows, self.shards)
        except NonFiniteGradientError:
            self._refuse_non_finite_loss(number, epoch)  # which is the better reason
            raise
        self._timeline.add("reduction", *self.parallel.reduced, inside=None if self.shards else "backward")
        self._refuse_non_finite_loss(number, epoch)
        self._health.before_update()
        with self._timeline("update"):
            if self.clip_norm is not None:
                clip_grad_norm_(self.parallel.parameters(), self.clip_norm)
            self.optimizer.step()
        self._health.after_update()
        return self.parallel.received

    def _shard_by_shard(self, batch: Batch, rows: int, shards: int) -> None:
        """Gradients of this rank's shards, each by itself, so that every product has the same shape on any rank."""
        comm = self.parallel.comm
        run = share(shards, comm.rank, comm.size)
        mine = [share(rows, number, shards) for number in range(run.start, run.stop)]
        wishes = None
        if comm.size > shards:  # a rank without a shard sends nothing that its wishes could travel with
            wishes = comm.allreduce(np.array(self._wishes(), np.float64))
        for shard in mine:
            local = slice(shard.start - mine[0].start, shard.stop - mine[0].start)
            part = [array[local] for array in batch]
            self._forward_backward(part, shard.start, wishes if shard is mine[-1] else (0, 0))
            self.parallel.end_shard()
        self.parallel.send(**dict.fromkeys(_SENT, 0.0))
        self.parallel.reduce_shards()

    def _forward_backward(self, batch: Batch, first_row: int, wishes: Sequence[float] | Array | None = None) -> None:
        """Gradients of some rows, in `accumulate` pieces; the last piece's backward pass reduces them.

        The `wishes` travel along; None to ask for them.
        """
        tally, place = Tally(), random.place()
        for number in range(self.accumulate):
            piece = share(len(batch[-1]), number, self.accumulate)
            random.at(place.seed, place.step, first_row + piece.start)
            inputs, target = split_target(array[piece] for array in batch)
            with self._timeline("forward"):
                output = self.parallel(*inputs)
                loss = self.loss(output, target)
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss must be a tensor, made of the model's output; got a {type(loss).__name__}")
            if loss.data.size != 1:
                raise ValueError(f"the loss must be one number, the mean over the examples; got shape {loss.shape}")
            examples = float(self.examples(target))
            self._warn_of_labels_left_out(target)
            tally.add(loss.item(), output, target, examples)
            self._health.predictions(output, target)
            weighed = loss if self.accumulate == 1 else loss / self.accumulate
            if number < self.accumulate - 1:
                with self._timeline("backward"), self.parallel.no_sync():
                    self.parallel.backward(weighed, examples=examples)
        bad = not self._bad and not math.isfinite(tally.loss)  # a rank counts once, with however many shards
        self._bad |= bad
        rank = self.parallel.comm.rank if bad else 0
        values = tally.loss, tally.correct, tally.labels, bad, rank, *(self._wishes() if wishes is None else wishes)
        self.parallel.send(**dict(zip(_SENT, values, strict=True)))
        with self._timeline("backward"):
            self.parallel.backward(weighed, examples=examples)

    def _warn_of_labels_left_out(self, target: Array) -> None:
        if self.examples is len and target.dtype.kind == "i" and target.size and target.min() < 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "there are labels below 0; if the loss leaves them out, its mean is not over rows, and the gradient "
                "depends on how a batch is cut: give Trainer(examples=lambda y: (y != -100).sum()) (said once)",
                stacklevel=2,
            )

    def _refuse_non_finite_loss(self, number: int, epoch: int) -> None:
        received = self.parallel.received
        if received["bad"]:
            culprits = (int(received["bad_rank"]),) if received["bad"] == 1 else ()
            who = f"rank {culprits[0]}" if culprits else f"{received['bad']:.0f} ranks"
            raise NonFiniteLossError(
                f"step {number} (epoch {epoch + 1}): the loss is not finite on {who} of {self.parallel.comm.size}; "
                "nothing was updated. "
                "Look for too high a learning rate (clip_norm helps), a logarithm of 0 or bad data",
                culprits,
            ) from None
