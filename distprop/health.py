"""What training does to a network, in numbers, at a few steps: norms, learning speed, dead units, gradient noise.

What has to be summed over the ranks travels behind the gradients in the message that is sent anyway; its room is the
same at every step, and so no bit of the training depends on whether anybody looks. The mean gradient is the same on all
ranks afterwards, so its norms need no message at all. `verdicts` says in words what is wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distprop.comm import Communicator
from distprop.comm.recorder import here
from distprop.look import Favourite, Look, ParameterHealth, UnitsHealth
from distprop.metrics import StepResult, classifies
from distprop.nn.embedding import Embedding
from distprop.nn.layers import ReLU, Sigmoid, Tanh
from distprop.nn.module import Module
from distprop.nn.watch import watch_forward
from distprop.tape import Array
from distprop.tensor import Parameter, Tensor

EVERY = 50  # steps between two looks; before the first 50 those at 1, 2, 4, 8, 16 and 32
UNITS = 256  # of a layer that has more, so many are looked at, evenly spread
CLASSES = 64  # with more, predictions are not counted
SMOOTHED = 10  # looks that the noise scale is a mean over; one alone is off by its own size
_HEAD = 2  # numbers of each watched module before those of its units


def is_looked_at(step: int, every: int) -> bool:
    """Whether step number `step` is one of those looked at: every so many, and powers of two before the first.

    >>> [step for step in range(1, 151) if is_looked_at(step, 50)]
    [1, 2, 4, 8, 16, 32, 50, 100, 150]
    """
    return bool(every) and (step % every == 0 or (step < every and step & (step - 1) == 0))


def learning_speeds(model: Module) -> dict[str, float]:
    """‖∂L/∂b‖ for each layer of `model` with a weight and a bias, by the layer's name, after a backward pass.

    Nielsen, "Neural Networks and Deep Learning", chapter 5: how fast the units of a layer learn.
    """
    return {
        name: norm(bias.grad)
        for name, module in model.named_modules()
        if isinstance(bias := getattr(module, "bias", None), Parameter)
        and isinstance(getattr(module, "weight", None), Parameter)
        and bias.grad is not None
    }


def noise_estimates(small: float, small_examples: float, big: float, examples: float) -> tuple[float, float] | None:
    """(tr(Σ), ‖G‖²) from squared gradient norms: the mean one over `small_examples`, and that over all `examples`.

    ‖mean over B examples‖² is ‖G‖² + tr(Σ)/B in the mean, so two batch sizes give both. McCandlish et al., "An
    empirical model of large-batch training", 2018, arXiv:1812.06162, appendix A.1. None if there is no difference in
    size.
    """
    if not 0 < small_examples < examples or not (math.isfinite(small) and math.isfinite(big)):
        return None
    variance = (small - big) / (1 / small_examples - 1 / examples)
    return variance, (examples * big - small_examples * small) / (examples - small_examples)


def norm(array: Array) -> float:
    """The Euclidean norm of all numbers in `array`, also where its square is beyond float32."""
    flat = array.reshape(-1)
    with np.errstate(all="ignore"):
        square = float(np.dot(flat, flat))
        if not 1e-30 < square < math.inf:  # too small or too large for the square, or not finite
            square = float(np.dot(wide := flat.astype(np.float64), wide))
    return math.sqrt(square) if square >= 0 else math.nan


class Health:
    """Looks at `model` every so many steps of `Trainer`; the `Extra` of its `DataParallel`. `every` 0 never looks.

    A step is: the passes inside `looking`, then `before_update`, the update, `after_update`; then `take` has the look.
    Units are those of the modules `nn.ReLU`, `nn.Sigmoid` and `nn.Tanh`, not of functions that are called in a
    `forward`; those of the module that computes the model's output are left out, since they are to be extreme.
    """

    def __init__(self, model: Module, comm: Communicator, every: int, accumulate: int = 1) -> None:
        self.every = every
        self._model, self._comm, self._accumulate = model, comm, accumulate
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._layers = {name: f"{name}.weight" if name else "weight" for name, _ in model.named_modules()}
        self._embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
        self._watched: dict[int, _Watched] = {}
        start = 3 + comm.size
        for name, module in model.named_modules():
            if isinstance(module, ReLU | Sigmoid | Tanh) and id(module) not in self._watched:
                watched = _Watched(name, type(module).__name__, start)
                self._watched[id(module)] = watched
                start += watched.size
        self._classes_at = start
        self.size = start + _HEAD + 2 * CLASSES
        self._own = np.zeros(self.size)  # of this rank, or of its present shard
        self._sums = np.zeros(self.size)
        self._looks = False
        self._clock = (0.0, 0.0)
        self._seen: dict[str, ParameterHealth] = {}
        self._before: list[Array] = []
        self._losses = (0.0, 0)  # their sum and number since the last look
        self._noise: list[tuple[float, float]] = []

    # --- a step

    @contextmanager
    def looking(self, step: int) -> Iterator[None]:
        """Around the forward and backward passes of `step`."""
        self._looks, self._seen = is_looked_at(step, self.every), {}
        if not self._looks:
            yield
            return
        self._own[:] = self._sums[:] = 0
        self._clock = time.perf_counter(), here.waited
        with watch_forward(self._model, lambda module: None, self._after_forward):
            yield

    def predictions(self, output: Any, target: Array) -> None:
        """Count the classes that the model predicts, and the true ones."""
        if not self._looks or not target.size or not classifies(output, target) or output.shape[1] > CLASSES:
            return
        classes, start = output.shape[1], self._classes_at
        self._own[start : start + _HEAD] = 1, classes
        for number, chosen in enumerate((output.data.argmax(axis=1), target)):
            found = chosen[(chosen >= 0) & (chosen < classes)]  # a negative label is one to be ignored
            begin = start + _HEAD + number * CLASSES
            self._own[begin : begin + classes] += np.bincount(found.reshape(-1), minlength=classes)

    def after_backward(self, examples: float, weight: float) -> None:
        """See `parallel.Extra`."""
        if self._looks and examples:
            grads = [p.grad for _, p in self._parameters if p.grad is not None]
            square = sum(norm(grad) ** 2 for grad in grads) * (self._accumulate / weight) ** 2
            self._own[:3] += examples * square, examples, 1

    def before_sum(self, numbers: Array) -> None:
        """See `parallel.Extra`."""
        if self._looks:
            began, self._clock = self._clock, (time.perf_counter(), here.waited)
            self._own[3 + self._comm.rank] = self._clock[0] - began[0] - (self._clock[1] - began[1])
            with np.errstate(over="ignore"):
                numbers[:] = self._own
            self._own[:] = 0

    def after_sum(self, numbers: Array) -> None:
        """See `parallel.Extra`."""
        if self._looks:
            self._sums[:] = numbers

    def before_update(self) -> None:
        """The mean gradients are there, and not clipped yet."""
        if self._looks:
            self._seen = self._norms()
            self._before = [parameter.data.copy() for _, parameter in self._parameters]

    def after_update(self) -> None:
        """The parameters have been changed."""
        if not self._looks:
            return
        for (name, parameter), before in zip(self._parameters, self._before, strict=True):
            before -= parameter.data
            seen, change = self._seen[name], norm(before)
            self._seen[name] = replace(seen, update_ratio=change / seen.weight_norm if seen.weight_norm else math.nan)
        self._before = []

    def take(self, result: StepResult) -> Look | None:
        """What was seen in the step with this `result`, if it was looked at; called after every step."""
        self._losses = self._losses[0] + result.loss, self._losses[1] + 1
        if not self._looks:
            return None
        self._looks = False
        loss, self._losses = self._losses[0] / self._losses[1], (0.0, 0)
        noise = self._noise_of(result.examples)
        start = 3
        return Look(
            result.step,
            loss,
            result.lr,
            result.examples,
            self._seen,
            {watched.name: found for watched in self._watched.values() if (found := watched.read(self._sums))},
            noise,
            self._noise_scale(noise),
            self._favourite(),
            tuple(self._sums[start : start + self._comm.size].tolist()),
        )

    def failed(self, step: int, lr: float) -> Look:
        """What is to be seen of a step whose loss or gradients are not finite; there was no update."""
        self._looks = False
        return Look(step, math.nan, lr, 0, self._norms())

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what `restore` wants to see the same as if there had been no pause."""
        return {"noise": self._noise, "losses": self._losses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._noise = [(variance, square) for variance, square in state["noise"]]
        self._losses = state["losses"][0], state["losses"][1]

    # --- reading the sums

    def _norms(self) -> dict[str, ParameterHealth]:
        speeds = {self._layers[name]: speed for name, speed in learning_speeds(self._model).items()}
        return {
            name: ParameterHealth(
                norm(p.grad) if p.grad is not None else 0.0,
                norm(p.data),
                learning_speed=speeds.get(name),
                is_matrix=p.ndim > 1 and id(p) not in self._embeddings,
            )
            for name, p in self._parameters
        }

    def _noise_of(self, examples: int) -> tuple[float, float] | None:
        weighed, small_examples, senders = self._sums[:3].tolist()
        if not senders:
            return None
        big = sum(seen.grad_norm**2 for seen in self._seen.values())
        return noise_estimates(weighed / small_examples, small_examples / senders, big, examples)

    def _noise_scale(self, noise: tuple[float, float] | None) -> float | None:
        """tr(Σ)/‖G‖², in examples; numerator and denominator are means by themselves."""
        if noise is None:
            return None
        self._noise = [*self._noise[1 - SMOOTHED :], noise]
        variance, square = (sum(values) for values in zip(*self._noise, strict=True))
        return variance / square if variance > 0 and square > 0 else None

    def _favourite(self) -> Favourite | None:
        senders, classes = self._sums[self._classes_at : self._classes_at + _HEAD].tolist()
        if not senders:
            return None
        counts = self._sums[self._classes_at + _HEAD :].reshape(2, CLASSES)[:, : round(classes / senders)]
        predicted, true = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        number = int(predicted.argmax())
        return Favourite(number, round(float(predicted[number]), 4), round(float(true[number]), 4))

    def _after_forward(self, module: Module, output: Any) -> None:
        if (watched := self._watched.get(id(module))) is not None and isinstance(output, Tensor):
            watched.see(output, self._own)
        if module is self._model:
            for watched in self._watched.values():
                watched.leave_out(output, self._own)


@dataclass
class _Watched:
    """One activation and its numbers: (senders, units) and a flag for each unit, or (outputs, saturated outputs)."""

    name: str
    kind: str
    start: int
    _output: Tensor | None = None

    @property
    def size(self) -> int:
        return _HEAD + (UNITS if self.kind == "ReLU" else 0)

    def see(self, output: Tensor, numbers: Array) -> None:
        """Note what the activation gave."""
        self._output = output
        axis = 1 if output.ndim == 4 else output.ndim - 1  # channels of images, features otherwise
        stride = max(1, math.ceil(output.shape[axis] / UNITS)) if output.ndim else 1
        some = output.data[(slice(None),) * axis + (slice(None, None, stride),)] if output.ndim else output.data
        mine = numbers[self.start : self.start + self.size]
        if self.kind == "ReLU":
            active = (some > 0).any(axis=tuple(a for a in range(some.ndim) if a != axis))
            if mine[0] and mine[1] != active.size:
                return  # one module in two places of different width; the first one counts
            mine[:_HEAD] = 1, active.size
            np.maximum(mine[_HEAD : _HEAD + active.size], active, out=mine[_HEAD : _HEAD + active.size])
        else:
            far = np.abs(some - 0.5) > 0.49 if self.kind == "Sigmoid" else np.abs(some) > 0.99
            mine += far.size, np.count_nonzero(far)

    def leave_out(self, output: Any, numbers: Array) -> None:
        """Forget it, if it gave the model's `output`."""
        if self._output is output:
            numbers[self.start : self.start + self.size] = 0
        self._output = None

    def read(self, sums: Array) -> UnitsHealth | None:
        """What all senders have seen."""
        mine = sums[self.start : self.start + self.size]
        if not mine[0]:
            return None
        if self.kind == "ReLU":
            units = round(mine[1] / mine[0])
            return UnitsHealth(self.kind, silent=tuple((mine[_HEAD : _HEAD + units] == 0).tolist()))
        return UnitsHealth(self.kind, saturated=float(mine[1] / mine[0]))
