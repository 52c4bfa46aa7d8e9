"""Every number of one training step on one rank: what went in, what came out of every module, and all gradients.

The modules are watched while they work, and the tape while it is walked back. Nothing that is computed changes by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from distprop.nn.module import Module
from distprop.nn.watch import parts_of, watch_forward
from distprop.tape import Array, Node, observe_backward
from distprop.tensor import Tensor


class Capture:
    """The numbers of a step of `model`; `gradient_scale` is a factor for all gradients.

    Attributes:
        kinds: the type of each module, by the names of `arrays`.
    """

    def __init__(self, model: Module, gradient_scale: float = 1.0) -> None:
        self.kinds: dict[str, str] = {}
        self._model, self._scale = model, gradient_scale
        self._names = {id(part): name for name, part in reversed(list(model.named_modules()))}
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._before: dict[str, Array] = {}
        self._forward: dict[str, Array] = {}
        self._backward: dict[str, Array] = {}
        self._modules: dict[str, str] = {}  # whose output a gradient is of
        self._awaited: dict[int, tuple[Node, list[str]]] = {}  # nodes of outputs, and the names of their gradients
        self._last_output: Any = None
        self._losses: list[tuple[float, float]] = []  # with their examples
        self._total: dict[str, Array] = {}  # gradients of the shards before this one
        self._present: dict[str, Array] = {}  # and of this one

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the step is made."""
        parameters = dict(self._model.named_parameters())
        for name, array in self._model.state_dict().items():
            self._before[f"{'parameter' if name in parameters else 'buffer'}/{name}"] = array.copy()
        with watch_forward(self._model, self._begin, self._end), observe_backward(self._visit):
            yield
        self._awaited.clear()

    def loss(
        self, function: Callable[[Any, Any], Tensor], examples: Callable[[Any], float] = len
    ) -> Callable[[Any, Any], Tensor]:
        """The same loss function; what it returns is kept, a mean over `examples(target)`."""

        def call(output: Any, target: Any) -> Tensor:
            loss = function(output, target)
            if loss.data.size == 1:
                self._losses.append((loss.item(), float(examples(target))))
            return loss

        return call

    def arrays(self, indices: Array, batch: Sequence[Array]) -> dict[str, Array]:
        """All numbers by name, in the order of a step; as many of them as there are if an error has ended it.

        Args:
            indices: which examples of the dataset this rank has.
            batch: those examples, the target last.
        """
        *inputs, target = batch
        named = {f"input{f'@{i + 1}' if i else ''}": array for i, array in enumerate(inputs)}
        numbers = {"indices": indices, **named, "target": target, **self._before, **self._forward}
        if self._losses:
            numbers["loss"] = np.array(_mean(self._losses))
        numbers |= self._gradients(len(target))
        return {name: np.asarray(array, order="C") for name, array in numbers.items()}

    def _gradients(self, examples: int) -> dict[str, Array]:
        """In the order in which backpropagation comes to them: a module's parameters after its output."""
        self._close_shard()
        of_module: dict[str, dict[str, Array]] = {}
        for name, parameter in reversed(self._trained.items()):
            module = name.rpartition(".")[0]
            if name in self._total:
                of_module.setdefault(module, {})[f"grad/{name}"] = self._scaled(self._total[name])
            elif not examples:  # nothing to differentiate: this rank sends zeros
                of_module.setdefault(module, {})[f"grad/{name}"] = np.zeros_like(parameter.data)
        last = {self._modules[name]: name for name in self._backward}
        gradients: dict[str, Array] = {}
        for name, gradient in self._backward.items():
            gradients[name] = gradient
            if last[self._modules[name]] == name:
                gradients |= of_module.pop(self._modules[name], {})
        return gradients | {name: grad for rest in of_module.values() for name, grad in rest.items()}

    def _begin(self, module: Module) -> None:
        if module is self._model and not any(p.has_grad for p in self._trained.values()):
            self._close_shard()

    def _end(self, module: Module, output: Any) -> None:
        name = self._names.get(id(module), "")
        if output is self._last_output and module is not self._model and any(module.children()):
            return  # it hands on what the last one in it has made
        self._last_output = output
        for place, part in parts_of(output):
            suffix = f"{f'/{name}' if name else ''}{place}"
            key = _free(f"output{suffix}", self._forward)
            self.kinds[key] = type(module).__name__
            if isinstance(part, Tensor):
                self._forward[key] = part.data.copy()
                if part.node is not None:
                    gradient = key.replace("output", "output_grad", 1)
                    self.kinds[gradient], self._modules[gradient] = type(module).__name__, name
                    self._awaited.setdefault(id(part.node), (part.node, []))[1].append(gradient)
            else:
                self._forward[key] = np.array(part)

    def _visit(self, node: Node | None) -> None:
        """The gradient of `node` is complete; None at the end of a walk."""
        if node is None:
            for name, parameter in self._trained.items():
                grad = parameter.grad
                self._present[name] = np.zeros_like(parameter.data) if grad is None else grad.copy()
            return
        if node.grad is not None:
            for name in self._awaited.pop(id(node), (node, []))[1]:
                self._backward[name] = self._scaled(node.grad)

    def _close_shard(self) -> None:
        """The gradients of a shard are complete; those of accumulated pieces have been added up by the tape."""
        for name, grad in self._present.items():
            self._total[name] = self._total[name] + grad if name in self._total else grad
        self._present = {}

    def _scaled(self, gradient: Array) -> Array:
        return gradient * gradient.dtype.type(self._scale) if self._scale != 1 else gradient.copy()


def _mean(losses: Sequence[tuple[float, float]]) -> float:
    """The mean over the examples; 0 if there are none."""
    if len(losses) == 1:
        return losses[0][0]
    return sum(loss * n for loss, n in losses if n) / (sum(n for _, n in losses) or 1)


def _free(name: str, taken: Mapping[str, object]) -> str:
    """`name`, or with `@2`, `@3` and so on behind it where a module is called again."""
    if name not in taken:
        return name
    return next(again for n in range(2, len(taken) + 3) if (again := f"{name}@{n}") not in taken)
