"""The exponential moving average of the weights, which often tests better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from distprop.optim.groups import checked_parameters
from distprop.optim.layout import (
    CHUNK_BYTES,
    FlatState,
    flat_views,
    give_buffers,
    meet,
    memory_order,
    own_part,
    pieces,
    sharers_of,
    stretches,
)
from distprop.tape import Array
from distprop.tensor import Parameter, values_changed


class ExponentialMovingAverage:
    """a ← decay·a + (1 − decay)·w after every step; the first `update()` takes the weights as they are.

    >>> from distprop import nn
    >>> model = nn.Linear(3, 1)
    >>> average = ExponentialMovingAverage(model.parameters(), decay=0.99)
    >>> average.update()                     # after each optimizer.step()
    >>> with average.averaged():             # inside, the model has the averaged weights
    ...     output = model(np.ones((2, 3), np.float32))

    The same as PyTorch's `AveragedModel` with `get_ema_multi_avg_fn(decay)`, but it averages parameters only, in place
    and without a second model. Every rank has the same weights, so every rank has the same average. Where the ranks of
    a node share the parameters (`DataParallel(sharded_update=True)`), they share the average too, and all of them call
    `update()` and enter and leave `averaged()`.

    Raises:
        ValueError: decay is not between 0 and 1, or there are no parameters.
        TypeError: something is no parameter, such as a module.
        RuntimeError: a call inside `averaged()` that needs the weights themselves.

    Source: Polyak and Juditsky, 1992 (averaging); Tarvainen and Valpola, 2017, arXiv:1703.01780 (exponential).
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float = 0.999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self._parameters = checked_parameters(parameters, "an average", Parameter)
        if not self._parameters:
            raise ValueError("an average needs at least one parameter (was the generator used up before?)")
        self._state = FlatState(self._parameters)
        self._swapped = False

    def update(self) -> None:
        """Take the weights as they are now into the average."""
        self._refuse_swapped("update()")
        share = 1 - self.decay if self.updates else 1.0
        for w, a, scratch in self._chunks():
            if share == 1:
                a[...] = w
            else:
                np.subtract(w, a, out=scratch)
                scratch *= share
                a += scratch
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their averages; afterwards their own values again."""
        self._refuse_swapped("averaged()")
        self._swap()
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """The number of "updates", and "arrays": the averages by the parameters' numbers, views and not copies."""
        self._refuse_swapped("state_dict()")
        if not self._state.arrays[0]:
            self._arrange()
        arrays = {
            str(i): own["average"].reshape(parameter.shape)
            for i, (own, parameter) in enumerate(zip(self._state.arrays, self._parameters, strict=True))
        }
        return {"updates": self.updates, "arrays": arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another average of the same shapes.

        Raises:
            ValueError: it does not fit; lists every difference. Nothing has been changed then.
        """
        self._refuse_swapped("load_state_dict()")
        updates = state.get("updates")
        arrays = {key: np.asarray(array) for key, array in state.get("arrays", {}).items()}
        problems = [] if isinstance(updates, int) and updates >= 0 else [f"updates is {updates!r}, expected 0 or more"]
        expected = {str(i): parameter for i, parameter in enumerate(self._parameters)}
        problems += [f"{key}: missing" for key in expected if key not in arrays]
        problems += [f"{key}: unexpected" for key in arrays if key not in expected]
        problems += [
            f"{key}: shape {arrays[key].shape}, expected {parameter.shape}"
            for key, parameter in expected.items()
            if key in arrays and arrays[key].shape != parameter.shape
        ]
        if problems:
            raise ValueError(f"the state does not fit this average: {'; '.join(problems)}")
        self._state.replace([{"average": arrays[k].astype(p.dtype).reshape(-1)} for k, p in expected.items()])
        self.updates = state["updates"]

    def _swap(self) -> None:
        for w, a, scratch in self._chunks():
            scratch[...] = w
            w[...] = a
            a[...] = scratch
        values_changed(self._parameters)

    def _chunks(self) -> Iterator[tuple[Array, Array, Array]]:
        """Values, averages and scratch of this rank's part, in pieces that stay in the cache."""
        parameters = self._parameters
        order, names = self._arrange()
        sharers = sharers_of(parameters)
        meet(sharers)
        for stretch in stretches(parameters, order, names):
            data, _ = flat_views(parameters, stretch)
            average = self._state.along(stretch, ("average",))["average"]
            scratch = np.empty(CHUNK_BYTES // data.itemsize, data.dtype)
            for piece in pieces(own_part(parameters, stretch, whole=False), scratch.size):
                yield data[piece], average[piece], scratch[: piece.stop - piece.start]
        meet(sharers)

    def _arrange(self) -> tuple[list[int], list[tuple[str, ...]]]:
        """Lay the averages out as the parameters lie, the weights themselves at first; their order, and names."""
        parameters = self._parameters
        give_buffers(parameters)
        order = memory_order(parameters)
        names: list[tuple[str, ...]] = [("average",)] * len(parameters)
        self._state.arrange(order, names, lambda i, name: parameters[i].data.reshape(-1))
        return order, names

    def _refuse_swapped(self, call: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{call} inside averaged(): the parameters hold the averages now")
