"""Evaluation: each rank takes its share of a dataset, sums and counts are reduced, so every example counts once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distprop.comm import Communicator, recorder
from distprop.comm.base import allgather_for
from distprop.comm.recorder import here
from distprop.data.dataset import Dataset, check_dataset, split_target
from distprop.data.loader import share
from distprop.metrics import Tally
from distprop.nn.module import Module
from distprop.tape import no_grad
from distprop.tensor import Tensor

EVALUATION_ROWS = 512  # rows a rank evaluates at once


def evaluate(
    model: Module,
    loss: Callable[[Any, Any], Tensor],
    dataset: Dataset,
    comm: Communicator,
    same_blocks: bool = False,
    examples: Callable[[Any], float] = len,
) -> dict[str, float]:
    """{"loss": mean, "accuracy": share of right answers where targets are class labels} over all of `dataset`.

    A negative label is none, and no answer to it counts.

    Collective; the same on every rank. Dropout and batch statistics are switched off meanwhile.

    Args:
        model: `model(x)` is given to the loss.
        loss: a function of (output, target) that is a mean over the examples.
        dataset: not empty.
        comm: the ranks.
        same_blocks: evaluate in blocks that do not depend on the number of ranks, for the same bits on any number.
        examples: of how many examples the loss is the mean, by the target.

    Raises:
        TypeError: it is no dataset.
        ValueError: it is empty.
    """
    check_dataset(dataset)
    if not len(dataset):
        raise ValueError("evaluate() got an empty dataset")
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    phase = here.phase
    here.at(recorder.EVALUATION)
    sums: list[tuple[float, ...]] = []
    try:
        with no_grad():
            for block in _blocks(len(dataset), comm, same_blocks):
                here.at(recorder.EVALUATION)
                inputs, target = split_target(dataset[np.arange(block.start, block.stop)])
                output, tally = model(*inputs), Tally()
                tally.add(loss(output, target).item(), output, target, float(examples(target)))
                sums.append((tally.examples, tally.loss, tally.correct, tally.labels))
    finally:
        for module, training in was_training:
            module.training = training
    purpose = f"evaluation of {len(dataset):,} examples"
    of_all = np.frombuffer(b"".join(allgather_for(purpose, comm, np.array(sums, np.float64).tobytes())))
    here.at(phase)
    columns = of_all.reshape(-1, 4).T.tolist()
    count, total, correct, labels = map(_sum, columns)
    return {"loss": total / count if count else math.nan} | ({"accuracy": correct / labels} if labels else {})


def _sum(numbers: list[float]) -> float:
    """Exact, so in any order; of numbers that are not finite what NumPy says."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else float(np.sum(numbers))


def _blocks(rows: int, comm: Communicator, same: bool) -> Iterator[slice]:
    """What this rank evaluates: an even share, or its run of the `same` blocks that any number of ranks has."""
    if same:
        blocks = share(math.ceil(rows / EVALUATION_ROWS), comm.rank, comm.size)
        mine = slice(blocks.start * EVALUATION_ROWS, min(blocks.stop * EVALUATION_ROWS, rows))
    else:
        mine = share(rows, comm.rank, comm.size)
    for start in range(mine.start, mine.stop, EVALUATION_ROWS):
        yield slice(start, min(start + EVALUATION_ROWS, mine.stop))
