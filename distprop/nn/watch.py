"""Seeing every module of a network at work, for a profile or a replay; a network that nobody watches pays nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from distprop.nn.module import Module
from distprop.tape import Array
from distprop.tensor import Tensor


@contextmanager
def watch_forward(
    model: Module, before: Callable[[Module], object], after: Callable[[Module, Any], object]
) -> Iterator[None]:
    """Inside, `before(module)` and `after(module, output)` are called around every `forward` in `model`.

    >>> from distprop.nn.layers import Linear
    >>> import numpy as np
    >>> layer = Linear(3, 2)
    >>> with watch_forward(layer, lambda module: None, lambda module, output: print(module, output.shape)):
    ...     output = layer(np.ones((4, 3), np.float32))
    Linear(3, 2) (4, 2)
    """
    watched = {id(module): (module, vars(module).get("forward")) for module in model.modules()}
    for module, _ in watched.values():
        vars(module)["forward"] = _watched(module, module.forward, before, after)
    try:
        yield
    finally:
        for module, own in watched.values():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def parts_of(output: Any, place: str = "") -> Iterator[tuple[str, Tensor | Array]]:
    """The tensors and arrays in what a module returned, each with its place in there.

    >>> [place for place, _ in parts_of({"scores": np.ones(2), "states": (np.ones(3), np.ones(4))})]
    ['[scores]', '[states][0]', '[states][1]']
    """
    if isinstance(output, Tensor | np.ndarray):
        yield place, output
    elif isinstance(output, Mapping):
        for key, part in output.items():
            yield from parts_of(part, f"{place}[{key}]")
    elif isinstance(output, list | tuple):
        for number, part in enumerate(output):
            yield from parts_of(part, f"{place}[{number}]")
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from parts_of(getattr(output, field.name), f"{place}.{field.name}")


def _watched(
    module: Module,
    forward: Callable[..., Any],
    before: Callable[[Module], object],
    after: Callable[[Module, Any], object],
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before(module)
        output = forward(*args, **kwargs)
        after(module, output)
        return output

    return call
