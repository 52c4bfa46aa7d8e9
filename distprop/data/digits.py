"""Handwritten digits inside the package: a real classification problem with no download, in a few milliseconds.

The rows of the file are already in their shuffled order, so the split is a plain cut and cannot change with NumPy's
random numbers. Source, licence and changes: DIGITS.md beside this file.
"""

from __future__ import annotations

import numpy as np

from distprop.data.dataset import ArrayDataset

_TRAIN_ROWS = 1437
_PIXELS = 64


def load_digits() -> tuple[ArrayDataset, ArrayDataset]:
    """The optical digits of UCI as (train, test): 1,437 and 360 disjoint examples, the same ones every time.

    x is float32 `(n, 64)`, an 8 × 8 image row by row with values k/16 in [0, 1]; y is int64 `(n,)`, the digit 0..9.
    A linear classifier gets about 0.97 of the test part right. The arrays are new with each call.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
    https://doi.org/10.24432/C50P49, CC BY 4.0.

    >>> train, test = load_digits()
    >>> train.x.shape, test.y.shape
    ((1437, 64), (360,))
    """
    import gzip
    from importlib.resources import files

    lines = gzip.decompress(files("distprop.data").joinpath("digits.csv.gz").read_bytes()).decode("ascii").splitlines()
    rows = np.loadtxt(lines, dtype=np.uint8, delimiter=",")
    x = rows[:, :_PIXELS].astype(np.float32) / np.float32(16)
    y = rows[:, _PIXELS].astype(np.int64)
    examples = ArrayDataset(x, y)
    return examples.take(slice(0, _TRAIN_ROWS)), examples.take(slice(_TRAIN_ROWS, None))
