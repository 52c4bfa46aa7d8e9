"""The arrays of an .npz file. Imported where one is read: the module for ZIP files would delay every start."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """All arrays, or those of `names`, by name.

    Raises:
        ValueError: it cannot be read, is no whole .npz file, holds Python objects, or lacks one of the names.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in (arrays.files if names is None else names)}
    # an array alone, which is what an .npy file has, is no context
    except (OSError, KeyError, EOFError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error
