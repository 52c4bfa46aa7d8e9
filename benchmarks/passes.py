"""What single calls of NumPy cost, of which operations are made: `python benchmarks/passes.py`.

Milliseconds for 1,048,576 float32, as many as `distprop bench ops` gives to GELU and layer norm, in pieces that stay in
the second-level cache, as `distprop` works on them; or for as many multiplications. The calls take turns, and each time
is the median of its turns. PyTorch's kernels make one pass forward and one backward, whatever the formula.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import as_strided

from distprop.allocator import aligned_empty
from distprop.functional.short_buffers import short_buffers
from distprop.pieces import CHUNK

MILLION, PIECE, TURNS = 1 << 20, CHUNK // 2, 25


def main(turns: int = TURNS) -> None:
    """Print the table."""
    calls = {**elementwise(), **rows(), **products(), **depthwise()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, (count, call) in calls.items():
            repeats = -(-MILLION // count)
            with short_buffers():
                began = time.perf_counter()
                for _ in range(repeats):
                    call()
            times[name].append((time.perf_counter() - began) * 1e3 * MILLION / (repeats * count))
    for name, milliseconds in times.items():
        print(f"{name:<68}{statistics.median(milliseconds[2:]):7.2f} ms")


Calls = dict[str, tuple[int, Callable[[], object]]]  # by what they do: how many numbers that is, and the call


def elementwise() -> Calls:
    """One pass over a million numbers, in pieces."""
    x, y, z, zero = noise(PIECE), noise(PIECE), noise(PIECE), np.zeros((), np.float32)
    memory, more, chosen = noise(MILLION), noise(MILLION), noise(PIECE) > 1
    pieces = [slice(start, start + PIECE) for start in range(0, MILLION, PIECE)]
    coefficients, powers, polynomials = noise(3, 4), noise(4, PIECE), noise(3, PIECE)

    def each(call: Callable[[slice], object]) -> tuple[int, Callable[[], object]]:
        return MILLION, lambda: [call(piece) for piece in pieces]

    return {
        "a product or a sum, all in the cache": each(lambda piece: np.multiply(x, y, out=z)),
        "a product, x read from memory": each(lambda piece: np.multiply(memory[piece], y, out=z)),
        "a product, written to memory": each(lambda piece: np.multiply(x, y, out=more[piece])),
        "a maximum": each(lambda piece: np.maximum(x, zero, out=z)),
        "a choice, np.where": each(lambda piece: np.where(chosen, x, y)),
        "a comparison": each(lambda piece: np.greater(x, zero)),
        "a quotient": each(lambda piece: np.divide(x, y, out=z)),
        "exp": each(lambda piece: np.exp(x, out=z)),
        "tanh": each(lambda piece: np.tanh(x, out=z)),
        "three polynomials of degree 3, one matrix product": each(
            lambda piece: np.matmul(coefficients, powers, out=polynomials)
        ),
    }


def rows() -> Calls:
    """Rows of 128 numbers, 512 at a time."""
    x, each = noise(512, 128), noise(512, 1)
    pairs, two, result = noise(512, 2), noise(2, 128), aligned_empty((512, 128), np.float32)
    ones = np.ones(128, np.float32)
    return {
        "rows of 128, a number for each": (x.size, lambda: np.multiply(x, each, out=result)),
        "rows of 128, a number for each, spread by a matrix product first": (
            x.size,
            lambda: np.multiply(x, np.matmul(pairs, two, out=result), out=result),
        ),
        "rows of 128, the sum of each": (x.size, lambda: x @ ones),
        "rows of 128, the sum of squares of each": (x.size, lambda: np.vecdot(x, x)),
    }


def products() -> Calls:
    """Small products, as those of convolutions are: few columns are slow."""
    calls: Calls = {}
    for columns in (8, 16, 64):
        a, b = noise(1_000_000 // (4800 * columns), 100, 48), noise(48, columns)
        out = aligned_empty((len(a), 100, columns), np.float32)
        name = f"products of 100 x 48 with {columns} columns, multiplications"
        calls[name] = (a.size * columns, partial(np.matmul, a, b, out=out))
    return calls


def depthwise() -> Calls:
    """3×3 over 12 images of 28×28 with 32 channels, channels-last, padded; a million multiplications."""
    images, kernel = noise(12, 30, 30 * 32), noise(3, 3, 28 * 32)
    image, row, number = images.strides
    pixels = as_strided(images, (12, 28, 3, 3, 28 * 32), (image, row, row, 32 * number, number))
    out, product = noise(12, 28, 28 * 32), noise(12, 28, 28 * 32)

    def nine() -> None:
        np.multiply(pixels[:, :, 0, 0], kernel[0, 0], out=out)
        for i, j in list(np.ndindex(3, 3))[1:]:
            np.multiply(pixels[:, :, i, j], kernel[i, j], out=product)
            np.add(out, product, out=out)

    count = 9 * out.size
    return {
        "depthwise 3x3, one einsum, multiplications": (
            count,
            lambda: np.einsum("nrijm,ijm->nrm", pixels, kernel, out=out),
        ),
        "depthwise 3x3, nine products and sums, multiplications": (count, nine),
    }


def noise(*shape: int) -> np.ndarray:
    """Numbers around 1."""
    array = aligned_empty(shape, np.float32)
    array[...] = np.random.default_rng(0).uniform(0.5, 1.5, shape)
    return array


if __name__ == "__main__":
    main()
