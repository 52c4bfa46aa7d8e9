"""Files in MNIST's format, of noise, for tests that must not need the real ones."""

import numpy as np


def idx(array, code=0x08):
    """The bytes of `array` as an IDX file."""
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def mnist_contents(train, test):
    """A small MNIST: the name of each file and its uncompressed bytes."""
    numbers = np.random.default_rng(0)
    files = {}
    for part, rows in (("train", train), ("t10k", test)):
        files[f"{part}-images-idx3-ubyte"] = idx(numbers.integers(0, 256, (rows, 28, 28), np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(numbers.integers(0, 10, rows, np.uint8))
    return files
