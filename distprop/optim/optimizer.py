"""What every optimizer shares: parameter groups, schedules, and walking flat arrays in cache-sized chunks.

A subclass states its update for one chunk. Chunks are short enough that parameter, gradient, state and scratch stay in
the second-level cache through all passes of the update, and no temporary of the model's size is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from distprop.buffer import FlatBuffer, fill_missing, shared_buffer
from distprop.tape import Array
from distprop.tensor import Parameter

Schedule: TypeAlias = Callable[[int], float]
ParameterGroups: TypeAlias = Iterable[Parameter] | Iterable[Mapping[str, Any]]

CHUNK_BYTES = 128 * 1024


@dataclass
class Chunk:
    """A piece of the flat arrays: views of equal length, to be updated in place."""

    data: Array
    grad: Array  # read-only by convention
    state: dict[str, Array]
    scratch: Array  # (2, length)


class Optimizer:
    """Base of all optimizers.

    `params` are parameters, or PyTorch's parameter groups: dictionaries with "params" and options that differ from the
    defaults. A learning rate is a number or a schedule, a function of the step (0 for the first).

    A parameter without a gradient this step counts as having a zero one, so that the update does not depend on which
    rank saw what (PyTorch skips it). One with `requires_grad` False is left alone.

    Raises:
        ValueError: no parameters, one given twice, or an option out of its range.
        TypeError: something that is not a parameter, or an option that the optimizer does not have.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: ParameterGroups, **defaults: Any) -> None:
        self.steps = 0
        self.param_groups = _groups(params, defaults)
        for group in self.param_groups:
            self._check(group)
        self._state = [self._new_state(group) for group in self.param_groups]
        self._runs: list[list[_Run]] = []
        self._runs_made_for: list[tuple[object, bool]] = []
        self._scratch: Array = np.empty((2, 0))

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters of all groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def lr(self) -> float:
        """The learning rate of the next step (of the first group)."""
        return self.rate(self.param_groups[0])

    def rate(self, group: Mapping[str, Any]) -> float:
        """The learning rate of the next step for one group."""
        lr = group["lr"]
        return float(lr(self.steps) if callable(lr) else lr)

    def zero_grad(self) -> None:
        """Forget the gradients. Costs nothing: the next backward pass overwrites them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self) -> None:
        """Update every parameter from its gradient."""
        self._find_runs()
        for group, state, runs in zip(self.param_groups, self._state, self._runs, strict=True):
            options = {**group, "lr": self.rate(group)}
            for run in runs:
                length = max(1, CHUNK_BYTES // run.data.itemsize)
                for start in range(0, run.data.size, length):
                    piece = slice(start, min(start + length, run.data.size))
                    stored = slice(run.offset + piece.start, run.offset + piece.stop)
                    self._update(
                        Chunk(
                            run.data[piece],
                            run.grad[piece],
                            {name: array[stored] for name, array in state.items()},
                            self._scratch[:, : piece.stop - piece.start],
                        ),
                        options,
                    )
        self.steps += 1

    def _update(self, chunk: Chunk, options: Mapping[str, Any]) -> None:
        """Update one chunk in place; every optimizer defines it."""
        raise TypeError(f"{type(self).__name__} does not define _update()")

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for options out of range."""
        if not callable(group["lr"]) and not group["lr"] >= 0:
            raise ValueError(f"the learning rate must be 0 or more, got {group['lr']}")
        for name in ("momentum", "weight_decay"):
            if name in group and not group[name] >= 0:
                raise ValueError(f"{name} must be 0 or more, got {group[name]}")

    def _new_state(self, group: Mapping[str, Any]) -> dict[str, Array]:
        size = sum(parameter.data.size for parameter in group["params"])
        return {name: np.zeros(size, group["params"][0].dtype) for name in self.state_names}

    def _find_runs(self) -> None:
        """See where the parameters lie now; anew only if they moved (a buffer was made) or were frozen."""
        self._give_buffers()
        now = [(parameter.buffer, parameter.requires_grad) for parameter in self.parameters]
        if now != self._runs_made_for:
            self._runs_made_for = now
            self._runs = [_contiguous_runs(group["params"]) for group in self.param_groups]
            for number, (group, state) in enumerate(zip(self.param_groups, self._state, strict=True)):
                if any(array.dtype != group["params"][0].dtype for array in state.values()):
                    self._state[number] = {n: a.astype(group["params"][0].dtype) for n, a in state.items()}
            dtype = self.parameters[0].dtype
            self._scratch = np.empty((2, CHUNK_BYTES // dtype.itemsize), dtype)
        fill_missing(self.parameters)

    def _give_buffers(self) -> None:
        homeless = [parameter for parameter in self.parameters if parameter.buffer is None]
        if homeless:
            shared_buffer(homeless)


@dataclass
class _Run:
    """Parameters of one group that lie side by side in a buffer; `offset` is where their state begins."""

    data: Array
    grad: Array
    offset: int


def _contiguous_runs(parameters: Sequence[Parameter]) -> list[_Run]:
    """The stretches of flat memory that `parameters` cover, as few as possible."""
    runs: list[_Run] = []
    last: tuple[object, int] = (None, -1)
    span = (0, 0)
    offset = 0
    for parameter in reversed(parameters):
        buffer = parameter.buffer
        assert isinstance(buffer, FlatBuffer)
        start, stop = buffer.span(parameter)
        if parameter.requires_grad:
            if last == (buffer, start) and runs:
                span = (span[0], stop)
                runs[-1] = _Run(buffer.data[slice(*span)], buffer.grad[slice(*span)], runs[-1].offset)
            else:
                span = (start, stop)
                runs.append(_Run(buffer.data[start:stop], buffer.grad[start:stop], offset))
            last = (buffer, stop)
        offset += stop - start
    return runs


def _groups(params: ParameterGroups, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups with all options filled in."""
    given: list[Any] = list(params)
    if given and all(isinstance(item, Mapping) for item in given):
        groups = [{**defaults, **group, "params": list(group["params"])} for group in given]
    else:
        groups = [{**defaults, "params": given}]
    seen: set[int] = set()
    for group in groups:
        if unknown := set(group) - set(defaults) - {"params"}:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(defaults)}")
        if not group["params"]:
            raise ValueError("an optimizer needs at least one parameter (was the generator used up before?)")
        for parameter in group["params"]:
            if not isinstance(parameter, Parameter):
                raise TypeError(f"an optimizer takes parameters, got {type(parameter).__name__}")
            if id(parameter) in seen:
                raise ValueError(f"a parameter of shape {parameter.shape} was given twice")
            seen.add(id(parameter))
    return groups
