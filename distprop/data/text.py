"""Text as numbers, and windows of it in which each token's target is the next token.

A token is whatever a vocabulary numbers; `CharVocabulary` numbers characters.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distprop.random import Stream, generator


class CharVocabulary:
    """The distinct characters of `text`, sorted, numbered from 0.

    >>> vocabulary = CharVocabulary("hello")
    >>> vocabulary.characters, vocabulary.encode("hole")
    ('ehlo', array([1, 3, 2, 0]))
    >>> vocabulary.decode([1, 0, 2, 2, 3])
    'hello'
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("CharVocabulary got an empty text; it needs at least one character")
        self.characters = "".join(sorted(set(text)))
        self._codes = _code_points(self.characters)

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> NDArray[np.int64]:
        """The number of each character `(len(text),)`. ValueError names the first that is not in the vocabulary."""
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            raise ValueError(
                f"the character {text[unknown[0]]!r} at position {unknown[0]} is not among the {len(self)} characters "
                f"of the vocabulary, {self.characters!r}"
            )
        return ids.astype(np.int64, copy=False)

    def decode(self, ids: ArrayLike) -> str:
        """The text of the numbers `(n,)`. IndexError names the first that is not in 0..len-1."""
        numbers = np.asarray(ids, np.int64).reshape(-1)
        outside = np.flatnonzero((numbers < 0) | (numbers >= len(self)))
        if outside.size:
            raise IndexError(
                f"the number {numbers[outside[0]]} at position {outside[0]} is no character; "
                f"they go from 0 to {len(self) - 1}"
            )
        return "".join(self.characters[number] for number in numbers)


class TextWindows:
    """A dataset of windows that follow one another, for validation: x and y are `(n, block_size)`, int64.

    Window i begins at token i · stride; y is x one token further on. By default stride = `block_size`, which makes
    every token the target of exactly one window (but the very first, and up to `block_size` at the end). Windows are
    cut out when they are asked for; `ids` may be a memory map. An integer in place of an index array gives one window,
    x and y `(block_size,)`.

    >>> x, y = TextWindows(np.arange(10), block_size=4)[np.array([0, 1])]
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """

    def __init__(self, ids: ArrayLike, block_size: int, stride: int | None = None) -> None:
        self.ids = _checked("TextWindows", ids, block_size)
        self.block_size, self.stride = block_size, block_size if stride is None else stride
        if self.stride < 1:
            raise ValueError(f"TextWindows needs a stride of 1 or more, got {stride}")

    def __len__(self) -> int:
        return (len(self.ids) - 1 - self.block_size) // self.stride + 1

    def __getitem__(self, indices: NDArray[np.int64] | slice | int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _windows(self.ids, np.arange(len(self))[indices] * self.stride, self.block_size)


class RandomWindows:
    """A dataset of `length` windows that begin anywhere, for training: x and y are `(n, block_size)`, int64.

    Where window i begins is a function of (`seed`, epoch, i), never of the rank or of the batches; a `Loader` says
    which epoch it is. By default an epoch has about as many tokens as `ids`. nanoGPT's recipe of k steps is
    `length=k * batch_size` and one epoch.
    """

    def __init__(
        self, ids: ArrayLike, block_size: int, length: int | None = None, *, seed: int = 0, epoch: int = 0
    ) -> None:
        self.ids = _checked("RandomWindows", ids, block_size)
        self.length = max(len(self.ids) // block_size, 1) if length is None else length
        if self.length < 1:
            raise ValueError(f"RandomWindows needs a length of 1 or more, got {length}")
        self.block_size, self.seed, self.epoch = block_size, seed, epoch

    def at_epoch(self, epoch: int) -> RandomWindows:
        """The windows of another epoch."""
        return RandomWindows(self.ids, self.block_size, self.length, seed=self.seed, epoch=epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, indices: NDArray[np.int64] | slice | int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return _windows(self.ids, self._starts[indices], self.block_size)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        numbers = generator(self.seed, Stream.WINDOW, self.epoch)
        return numbers.integers(0, len(self.ids) - self.block_size, self.length)


def _windows(
    ids: NDArray[Any], starts: NDArray[np.int64], block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    tokens = ids[starts[..., None] + np.arange(block_size + 1)].astype(np.int64, copy=False)
    return tokens[..., :-1], tokens[..., 1:]


def _checked(name: str, ids: ArrayLike, block_size: int) -> NDArray[Any]:
    if isinstance(ids, str):
        raise TypeError(f"{name} takes token numbers, got a text: encode it with CharVocabulary first")
    array = ids if isinstance(ids, np.ndarray) else np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} takes integers of shape (n,), got {array.dtype} of shape {array.shape}")
    if not 1 <= block_size < len(array):
        raise ValueError(
            f"{name} got block_size {block_size} and {len(array)} tokens; "
            "it needs a block_size of 1 or more and at least one token more than that"
        )
    return array


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
