"""How long each function of `distprop.functional` takes within training, and each of a tensor's own operations."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from distprop import functional as F
from distprop.tape import Array, Out
from distprop.tensor import Tensor

METHODS = ("__add__", "__mul__", "__getitem__", "reshape", "transpose", "permute", "flatten", "mean", "sum")


class FunctionTimes:
    """Seconds of the forward and the backward pass by function, `{name: [forward, backward]}`, in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._inside = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, calls are timed; what a function calls in turn is part of it."""
        with mock.patch.multiple(F, **{name: self._timed(name, getattr(F, name)) for name in F.__all__}):
            methods = {name: self._timed(name.strip("_"), getattr(Tensor, name)) for name in METHODS}
            with mock.patch.multiple(Tensor, **methods):
                yield

    def show(self, steps: int) -> str:
        """A table in milliseconds a step, the longest first."""
        lines = [f"{'function':<34}{'forward':>10}{'backward':>10}   ms a step"]
        for name, times in sorted(self.seconds.items(), key=lambda item: -sum(item[1])):
            forward, backward = (1e3 * t / steps for t in times)
            lines.append(f"{name:<34}{forward:10.3f}{backward:10.3f}")
        return "\n".join(lines)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.perf_counter()
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside = False
            self.seconds[name][0] += time.perf_counter() - began
            for part in result if isinstance(result, list | tuple) else [result]:
                self._time_derivative(name, part)
            return result

        return call

    def _time_derivative(self, name: str, result: Any) -> None:
        if not isinstance(result, Tensor) or result.node is None or result.node.vjp is None:
            return
        vjp = result.node.vjp

        def timed(grad: Array, out: Out) -> Any:
            began = time.perf_counter()
            gradients = vjp(grad, out)
            self.seconds[name][1] += time.perf_counter() - began
            return gradients

        result.node.vjp = timed
