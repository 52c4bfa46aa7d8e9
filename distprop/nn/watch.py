"""Seeing every module of a network at work, for a profile or a replay; a network that nobody watches pays nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distprop.nn.module import Module


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
