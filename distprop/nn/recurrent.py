"""Recurrent layers: stacks of `functional.rnn`, `lstm` and `gru`, in one direction or two.

Arguments, parameter names and layouts are PyTorch's, so a state_dict goes from one to the other as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.functional.check import integer
from distprop.functional.join import concatenate
from distprop.nn import init
from distprop.nn.module import Module
from distprop.tensor import Operand, Parameter, Tensor, as_tensor

CellState: TypeAlias = tuple[Operand, Operand]


class _Recurrent(Module):
    """What RNN, LSTM and GRU share; a subclass says how one direction of one layer is run."""

    gates: int
    """How many times `hidden_size` rows a weight has."""
    state_names: tuple[str, ...] = ("h",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        name = type(self).__name__
        integer(name, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError(
                f"{name} needs input_size, hidden_size and num_layers of at least 1, "
                f"got {input_size}, {hidden_size} and {num_layers}"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"{name} needs a dropout probability between 0 and 1, got {dropout}")
        if dropout and num_layers == 1:
            own = type(self).__init__ is not _Recurrent.__init__  # a constructor, which has called this one
            warnings.warn(f"{name}: dropout is applied between layers, and there is only one", stacklevel=2 + own)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        rows, bound = self.gates * hidden_size, 1 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size * self._directions
            for reverse in range(self._directions):
                shapes = [(rows, width), (rows, hidden_size), (rows,), (rows,)]
                for parameter, shape in zip(self._names(layer, reverse), shapes, strict=False):
                    setattr(self, parameter, init.uniform_(Parameter(np.empty(shape, dtype)), -bound, bound))

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        parts += [f"{name}={getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual]
        return ", ".join(parts)

    def _one(self, x: Tensor, states: Sequence[Tensor], weights: list[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        """One direction of one layer: its output, and its last states, each `(1, batch, hidden)`."""
        raise TypeError(f"{type(self).__name__} does not define _one()")

    def _run(self, x: Operand, states: Sequence[Operand] | None) -> tuple[Tensor, list[Tensor]]:
        """The output, and the last state of every layer and direction for each of `state_names`."""
        x = as_tensor(x)
        self._check(x)
        batched = x.ndim == 3
        if not batched:
            x = x.reshape(len(x), 1, self.input_size)
        elif self.batch_first:
            x = x.transpose(0, 1)
        initial = self._initial(x, states, batched)
        last: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:  # the masks belong to the examples, whose axis must be the first
                x = F.dropout(x.transpose(0, 1), self.dropout, self.training).transpose(0, 1)
            outputs = []
            for reverse in range(self._directions):
                weights = [getattr(self, name) for name in self._names(layer, reverse)]
                row = len(last)
                output, *states_of_one = self._one(x, [s[row] for s in initial], weights, bool(reverse))
                outputs.append(output)
                last.append(states_of_one)
            x = _joined(outputs, 2)
        finals = [_joined(list(of_all), 0) for of_all in zip(*last, strict=True)]
        if batched:
            return x.transpose(0, 1) if self.batch_first else x, finals
        return x.reshape(len(x), x.shape[2]), [s.reshape(len(s), self.hidden_size) for s in finals]

    def _initial(self, x: Tensor, states: Sequence[Operand] | None, batched: bool) -> list[Tensor]:
        """The states to start with as `(layers · directions, batch, hidden)`, zeros where none are given."""
        rows, batch = self.num_layers * self._directions, x.shape[1]
        if states is None:
            return [Tensor(np.zeros((rows, batch, self.hidden_size), x.dtype))] * len(self.state_names)
        expected = (rows, batch, self.hidden_size) if batched else (rows, self.hidden_size)
        given = [as_tensor(state) for state in states]
        for name, state in zip(self.state_names, given, strict=True):
            if state.shape != expected:
                raise ValueError(
                    f"{type(self).__name__}({self.extra_repr()}) got a state {name} of shape {state.shape}; "
                    f"it needs {expected}: layers × directions, {'batch, ' if batched else ''}hidden"
                )
        return [state.reshape(rows, batch, self.hidden_size) for state in given]

    def _check(self, x: Tensor) -> None:
        time = 1 if self.batch_first and x.ndim == 3 else 0
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size or not x.shape[time]:
            batched = "(batch, steps, input)" if self.batch_first else "(steps, batch, input)"
            raise ValueError(
                f"{type(self).__name__}({self.extra_repr()}) got x of shape {x.shape}; it needs {batched} or "
                f"(steps, input) with at least one step and {self.input_size} inputs"
            )

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _names(self, layer: int, reverse: int) -> list[str]:
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [f"{kind}_l{layer}{'_reverse' if reverse else ''}" for kind in kinds]


class RNN(_Recurrent):
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh), or relu: Elman's network, in `num_layers` layers.

    `rnn(input, hx=None)` gives `(output, h_n)`. The input x is `(steps, batch, input_size)`, or with `batch_first`
    `(batch, steps, input_size)`, or `(steps, input_size)` for a single sequence. The output has the last layer's h of
    every step in x's layout, forward and backward side by side: `hidden_size · directions` features. hx, the h before
    the first step, and h_n are `(num_layers · directions, batch, hidden_size)`, in this order also with `batch_first`;
    hx is zero if not given.

    Use `batch_first=True` with `DataParallel` and `Trainer`: they take the leading axis of the first argument as the
    number of examples, and a `Loader` deals out rows.

    For truncated backpropagation through time pass on `h_n.detach()`. `dropout` is the probability for each output of
    a layer but the last, with masks that depend on the row of the global batch, never on the rank.

    Parameters, all uniform on ±1/√hidden_size at the start: `weight_ih_l0` `(hidden_size, input_size)`, `weight_hh_l0`
    `(hidden_size, hidden_size)`, `bias_ih_l0`, `bias_hh_l0`, and so on for `_l1`, with `_reverse` for the second
    direction.

    Raises:
        ValueError: a size below 1, or an x or a state of another shape.
    """

    gates = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f'RNN: nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, dtype=dtype)

    def forward(self, input: Operand, hx: Operand | None = None) -> tuple[Tensor, Tensor]:
        """`(output, h_n)`."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h

    def _one(self, x: Tensor, states: Sequence[Tensor], weights: list[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        output = F.rnn(x, *states, *weights, nonlinearity=self.nonlinearity, reverse=reverse)
        return output, _last(output, reverse)

    def extra_repr(self) -> str:
        """The arguments that are not the defaults."""
        relu = ", nonlinearity='relu'" if self.nonlinearity == "relu" else ""
        return super().extra_repr() + relu


class LSTM(_Recurrent):
    """Long short-term memory, in `num_layers` layers; see `functional.lstm` for the formulas.

    `lstm(input, hx=None)` gives `(output, (h_n, c_n))`; hx is a pair `(h, c)`, and c has h's shape. Shapes,
    `batch_first`, `dropout` and names are as for `RNN`; the weights have 4 · hidden_size rows, for the gates i, f, g,
    o. For truncated backpropagation through time pass on `(h_n.detach(), c_n.detach())`.

    Raises:
        ValueError: a size below 1, or an x or a state of another shape.
        TypeError: a state that is not a pair.
    """

    gates = 4
    state_names = ("h", "c")

    def forward(self, input: Operand, hx: CellState | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`(output, (h_n, c_n))`."""
        if hx is not None and (not isinstance(hx, tuple | list) or len(hx) != 2):
            raise TypeError(f"LSTM takes its state as a pair (h, c), got {_described(hx)}")
        output, (h, c) = self._run(input, hx)
        return output, (h, c)

    def _one(self, x: Tensor, states: Sequence[Tensor], weights: list[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        output, c = F.lstm(x, *states, *weights, reverse=reverse)
        return output, _last(output, reverse), c


class GRU(_Recurrent):
    """Gated recurrent units, in `num_layers` layers; see `functional.gru` for the formulas.

    `gru(input, hx=None)` gives `(output, h_n)`. Shapes, `batch_first`, `dropout` and names are as for `RNN`; the
    weights have 3 · hidden_size rows, for the gates r, z, n.

    Raises:
        ValueError: a size below 1, or an x or a state of another shape.
    """

    gates = 3

    def forward(self, input: Operand, hx: Operand | None = None) -> tuple[Tensor, Tensor]:
        """`(output, h_n)`."""
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h

    def _one(self, x: Tensor, states: Sequence[Tensor], weights: list[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        output = F.gru(x, *states, *weights, reverse=reverse)
        return output, _last(output, reverse)


def _last(output: Tensor, reverse: bool) -> Tensor:
    """The state after the last step of a direction, `(1, batch, hidden)`."""
    return output[:1] if reverse else output[-1:]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else concatenate(parts, dim)


def _described(value: Any) -> str:
    return f"an array of shape {np.shape(value)}" if isinstance(value, Tensor | np.ndarray) else repr(value)
