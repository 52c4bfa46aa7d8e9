"""Random numbers that have a name instead of a history.

Every random number in training is a function of (seed, what it is for, when, which example), through NumPy's
counter-based Philox generator. Nothing depends on the rank or on how many numbers were drawn before, so a shuffle, a
dropout mask or an augmentation is the same on any number of ranks and after any restart.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_UINT32_PER_BLOCK = 8  # Philox4x64 makes four 64-bit words for each value of its counter


class Stream(IntEnum):
    """What a random number is for. Two streams of one seed never share a number."""

    INITIALISE = 0
    SHUFFLE = 1
    DROPOUT = 2
    AUGMENT = 3
    WINDOW = 4


def generator(seed: int, stream: Stream, first: int = 0, second: int = 0) -> np.random.Generator:
    """The generator named by (`seed`, `stream`, `first`, `second`), for instance (seed, SHUFFLE, epoch).

    Raises:
        ValueError: the seed is negative, or has more than 64 bits.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, stream), counter=[0, 0, first, second]))


def manual_seed(seed: int) -> None:
    """Start the initialisation of layers, and dropout outside a `Loader` or `Trainer`, from `seed`.

    Without a call the seed is 0: a script that never mentions randomness gives the same result every time.
    """
    _initialiser.set(generator(seed, Stream.INITIALISE))
    _place.set(Place(seed))


def initialiser() -> np.random.Generator:
    """The generator that layers draw their first weights from."""
    current = _initialiser.get()
    if current is None:
        current = generator(0, Stream.INITIALISE)
        _initialiser.set(current)
    return current


@dataclass
class Place:
    """Where training is: the seed, the step, and the global batch's row that this rank's local batch starts with."""

    seed: int = 0
    step: int = 0
    first_row: int = 0
    draws: int = 0  # masks drawn at this place so far, so that two dropout layers get two masks
    said: bool = False  # by `at`


def at(seed: int, step: int, first_row: int) -> None:
    """Say where training is, before a forward pass. `Loader` and `Trainer` do it for every batch."""
    _place.set(Place(seed, step, first_row, said=True))


def place() -> Place:
    """Where training is; the start, with seed 0, if nobody has said."""
    current = _place.get()
    if current is None:
        current = Place()
        _place.set(current)
    return current


def row_bits(rows: int, width: int) -> NDArray[np.uint32]:
    """Uniform 32-bit integers `(rows, width)`; row i is a function of (seed, step, draw, first row + i) only."""
    here = place()
    blocks = -(-width // _UINT32_PER_BLOCK)  # each row starts on a counter of its own
    counter = [here.first_row * blocks, 0, here.draws, here.step]
    bits = np.random.Philox(key=_key(here.seed, Stream.DROPOUT), counter=counter)
    here.draws += 1
    words = bits.random_raw(rows * blocks * _UINT32_PER_BLOCK // 2).view(np.uint32)
    return words.reshape(rows, blocks * _UINT32_PER_BLOCK)[:, :width]


def _key(seed: int, stream: Stream) -> NDArray[np.uint64]:
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be 0 or more and less than 2^64, got {seed}")
    return np.array([seed, stream], np.uint64)  # NumPy makes float64 of a list with 2^63 or more


# Context variables, not globals: the ranks that tests run as threads of one process each have their own.
_initialiser: ContextVar[np.random.Generator | None] = ContextVar("initialiser", default=None)
_place: ContextVar[Place | None] = ContextVar("place", default=None)
