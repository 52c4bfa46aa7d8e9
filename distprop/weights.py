"""Weights on disk as safetensors, the format that PyTorch's users exchange: names, shapes and numbers, and no code.

`save_state(model.state_dict(), path)` writes what `safetensors.torch.load_file(path)` reads, and the other way round.
Names and layouts are PyTorch's, so the file fits the same model there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from distprop.tape import Array


class WeightsError(ValueError):
    """A file that is not a whole safetensors file, or not one of NumPy's numbers."""


def save_state(state: Mapping[str, Array], path: str | os.PathLike[str]) -> None:
    """Write arrays by name. The file appears under its name when it is complete.

    Raises:
        OSError: the disk is full or read-only; a file of that name is untouched.
    """
    from pathlib import Path

    from safetensors.numpy import save

    content = save({name: np.array(array, order="C") for name, array in state.items()})
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read arrays by name, for `Module.load_state_dict`.

    Raises:
        WeightsError: the file is truncated, says something false about its offsets, is no safetensors file, or has
            numbers of a type that NumPy lacks, such as bfloat16.
        FileNotFoundError: there is none.
    """
    from pathlib import Path

    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(Path(path).read_bytes()))
    except (SafetensorError, ValueError) as error:  # the latter by NumPy, of a shape that no array can have
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error
    except KeyError as error:  # what the library says of a type that it does not know
        raise WeightsError(
            f"{path} has numbers of type {error.args[0]}, which NumPy does not have; save them as float32"
        ) from None
