"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour photographs of 32 × 32 pixels, from their binary files.

A file is a row of records: one byte for each label, then 1024 bytes of red, of green and of blue, row by row.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from distprop.data.dataset import ArrayDataset

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


def load_cifar10(root: str | os.PathLike[str] | None = None) -> tuple[ArrayDataset, ArrayDataset]:
    """CIFAR-10 as (train, test): x float32 `(n, 3, 32, 32)` with values k/255 in [0, 1], y int64 `(n,)` in 0..9.

    Reads `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` from `root`, by default
    `$DISTPROP_DATA/cifar10`, or from the folder `cifar-10-batches-bin` in it. The training images take 614 MB.

    Raises:
        FileNotFoundError: a file is missing; says which, and where to get it.
        ValueError: a file is truncated, empty, or has a label outside 0..9.
    """
    train_names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    folder = _folder(root, "cifar10", "cifar-10-batches-bin", [*train_names, "test_batch.bin"])
    return _read(folder, train_names, (10,), 0), _read(folder, ["test_batch.bin"], (10,), 0)


def load_cifar100(
    root: str | os.PathLike[str] | None = None, *, labels: Literal["fine", "coarse"] = "fine"
) -> tuple[ArrayDataset, ArrayDataset]:
    """CIFAR-100 as (train, test): x as for `load_cifar10`, y int64 `(n,)`, one of 100 classes, or with
    `labels="coarse"` of 20 groups of them.

    Reads `train.bin` and `test.bin` from `root`, by default `$DISTPROP_DATA/cifar100`, or from the folder
    `cifar-100-binary` in it. Raises what `load_cifar10` raises.
    """
    if labels not in ("fine", "coarse"):
        raise ValueError(f'load_cifar100: labels must be "fine" or "coarse", got {labels!r}')
    folder = _folder(root, "cifar100", "cifar-100-binary", ["train.bin", "test.bin"])
    column = 0 if labels == "coarse" else 1
    return _read(folder, ["train.bin"], (20, 100), column), _read(folder, ["test.bin"], (20, 100), column)


def _folder(root: str | os.PathLike[str] | None, name: str, inner: str, files: list[str]) -> Path:
    """The folder that has all of `files`."""
    from pathlib import Path

    if root is None:
        if not (data := os.environ.get("DISTPROP_DATA")):
            raise FileNotFoundError(f"load_{name} needs a root, or DISTPROP_DATA set to a folder with {name} in it")
        root = Path(data) / name
    folders = [Path(root).expanduser(), Path(root).expanduser() / inner]
    looked = []
    for folder in folders:
        lacks = [file for file in files if not (folder / file).is_file()]
        if not lacks:
            return folder
        looked.append(f"{folder}: " + (f"lacks {', '.join(lacks)}" if folder.is_dir() else "no such folder"))
    archive = f"{inner.removesuffix('-batches-bin').removesuffix('-binary')}-binary.tar.gz"
    raise FileNotFoundError(
        f"load_{name} did not find its files in\n  "
        + "\n  ".join(looked)
        + f"\nUnpack {archive} there: the binary version on Alex Krizhevsky's CIFAR page at the University of Toronto"
    )


def _read(folder: Path, names: list[str], classes: tuple[int, ...], column: int) -> ArrayDataset:
    """The examples of all files, with the labels of `column`; a record has one label for each of `classes`."""
    parts = [_records(folder / name, classes) for name in names]
    x = np.empty((sum(map(len, parts)), *_SHAPE), np.float32)
    start = 0
    for records in parts:  # part by part: no second copy of the whole
        images = records[:, len(classes) :].reshape(-1, *_SHAPE)
        np.divide(images, np.float32(255), out=x[start : start + len(records)])
        start += len(records)
    return ArrayDataset(x, np.concatenate([records[:, column] for records in parts]).astype(np.int64))


def _records(path: Path, classes: tuple[int, ...]) -> NDArray[np.uint8]:
    """The bytes of a file, a row for each record, after checking that it holds whole records with possible labels."""
    length, size = len(classes) + _PIXELS, path.stat().st_size
    if size == 0 or size % length:
        raise ValueError(
            f"{path} is {'truncated' if size else 'empty'}: {size} bytes, where whole records take {length} each"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, length)
    for column, count in enumerate(classes):
        labels = records[:, column]
        if labels.max() >= count:
            row = int(labels.argmax())
            raise ValueError(f"{path} has the label {labels[row]} in record {row}; its labels are 0..{count - 1}")
    return records
