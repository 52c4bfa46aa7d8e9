"""Where parameters lie in flat memory, the state beside them, and both cut into pieces that stay in the cache.

Walking the flat arrays piece by piece keeps values, gradients, state and scratch in the second-level cache through all
passes of an update, and no temporary of the model's size is ever made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from distprop.buffer import FlatBuffer
from distprop.comm.node import Node
from distprop.tape import Array
from distprop.tensor import Parameter

CHUNK_BYTES = 128 * 1024


class Segment(NamedTuple):
    """The part of a chunk that has one weight decay: views of its values, gradients and scratch."""

    data: Array
    grad: Array
    first: Array
    second: Array
    weight_decay: float


@dataclass(slots=True)
class Chunk:
    """A piece of the flat arrays: views of equal length, to be updated in place."""

    data: Array
    grad: Array  # read-only by convention
    state: dict[str, Array]
    scratch: tuple[Array, Array]
    segments: list[Segment]  # that cover it; none if nothing in it decays

    def signed(self, maximize: bool) -> Array:
        """g, or to go uphill −g, made in the first scratch array."""
        return np.negative(self.grad, out=self.scratch[0]) if maximize else self.grad

    def gradient(self, maximize: bool = False) -> Array:
        """±g + weight_decay·w, made in the first scratch array; `signed` where nothing decays."""
        if not self.segments:
            return self.signed(maximize)
        for data, grad, first, _, weight_decay in self.segments:
            if weight_decay:
                np.multiply(data, weight_decay, out=first)
                (np.subtract if maximize else np.add)(first, grad, out=first)
            else:
                (np.negative if maximize else np.positive)(grad, out=first)
        return self.scratch[0]

    def shrink(self, lr: float) -> None:
        """w ← w − lr·weight_decay·w, the decay that does not pass through the gradient."""
        for data, _, _, _, weight_decay in self.segments:
            if weight_decay:
                np.multiply(data, 1 - lr * weight_decay, out=data)

    def add_decay(self) -> None:
        """Add weight_decay·w to the first scratch array; uses the second."""
        for data, _, first, second, weight_decay in self.segments:
            if weight_decay:
                np.multiply(data, weight_decay, out=second)
                np.add(first, second, out=first)


class FlatState:
    """Arrays of the parameters' sizes, in the order in which the parameters lie in memory.

    Attributes:
        arrays: for each parameter its arrays by name, `(size,)`, views of one flat array for each buffer and name.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self.arrays: list[dict[str, Array]] = [{} for _ in parameters]
        self._arranged_for: object = None
        self._places: dict[tuple[int, str], tuple[Array, int]] = {}

    def add(self, parameters: Sequence[Parameter]) -> None:
        """More parameters, behind those that there are."""
        self.parameters += parameters
        self.arrays += [{} for _ in parameters]

    def arrange(
        self, order: Sequence[int], names: Sequence[Sequence[str]], initial: Callable[[int, str], ArrayLike]
    ) -> None:
        """Give the parameters numbered `order` their state `names`, side by side; what there was before is kept.

        Raises:
            ValueError: a parameter has changed its size.
        """
        arranged_for = [(i, self.parameters[i].buffer, tuple(names[i])) for i in order]
        if arranged_for == self._arranged_for:
            return
        self._check_sizes()
        sizes: dict[tuple[object, str], int] = {}
        starts: dict[tuple[int, str], int] = {}
        for i, buffer, own_names in arranged_for:
            for name in own_names:
                starts[i, name] = sizes.get((buffer, name), 0)
                sizes[buffer, name] = starts[i, name] + self.parameters[i].data.size
        flat: dict[tuple[object, str], Array] = {}
        for i, buffer, own_names in arranged_for:
            parameter, before, self.arrays[i] = self.parameters[i], self.arrays[i], {}
            for name in own_names:
                if (buffer, name) not in flat:
                    assert isinstance(buffer, FlatBuffer)
                    flat[buffer, name] = buffer.allocate_like_data(sizes[buffer, name])
                view = flat[buffer, name][starts[i, name] :][: parameter.data.size]
                view[...] = before[name] if name in before else initial(i, name)
                self.arrays[i][name] = view
                self._places[i, name] = (flat[buffer, name], starts[i, name])
        self._arranged_for = arranged_for

    def replace(self, arrays: list[dict[str, Array]]) -> None:
        """Other values, which are arranged before the next use."""
        self.arrays, self._arranged_for, self._places = arrays, None, {}

    def along(self, stretch: Sequence[int], names: Sequence[str]) -> dict[str, Array]:
        """The state of parameters that lie side by side, as one array for each name."""
        size = sum(self.parameters[i].data.size for i in stretch)
        places = {name: self._places[stretch[0], name] for name in names}
        return {name: flat[start : start + size] for name, (flat, start) in places.items()}

    def _check_sizes(self) -> None:
        for i, (parameter, arrays) in enumerate(zip(self.parameters, self.arrays, strict=True)):
            for name, array in arrays.items():
                if array.size != parameter.data.size:
                    raise ValueError(
                        f"parameter {i} has shape {parameter.shape} now, but {name} for {array.size} values; "
                        "shapes must not change under an optimizer"
                    )


def give_buffers(parameters: Sequence[Parameter]) -> None:
    """Put parameters that are in no flat buffer into one."""
    homeless = [parameter for parameter in parameters if parameter.buffer is None]
    if homeless:
        FlatBuffer(homeless)


def sharers_of(parameters: Sequence[Parameter]) -> list[Node]:
    """Who shares the memory of the parameters' buffers, where ranks do; each once, in the same order on all of them."""
    buffers = (parameter.buffer for parameter in parameters)
    sharers = (buffer.sharers for buffer in buffers if isinstance(buffer, FlatBuffer))
    return list(dict.fromkeys(ranks for ranks in sharers if ranks is not None))


def meet(sharers: Sequence[Node]) -> None:
    """Wait for the ranks that share memory."""
    for ranks in sharers:
        ranks.barrier()


def memory_order(parameters: Sequence[Parameter]) -> list[int]:
    """The numbers of `parameters` in the order in which they lie in their buffers."""
    buffers: dict[object, int] = {}
    numbers = [buffers.setdefault(parameter.buffer, len(buffers)) for parameter in parameters]
    return sorted(range(len(parameters)), key=lambda i: (numbers[i], *_span(parameters[i])))


def stretches(parameters: Sequence[Parameter], order: Sequence[int], kinds: Sequence[Hashable]) -> list[list[int]]:
    """`order` cut where memory is not contiguous or the kind changes."""
    found: list[list[int]] = []
    for i in order:
        last = found[-1][-1] if found else None
        if last is not None and kinds[last] == kinds[i] and _side_by_side(parameters[last], parameters[i]):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def flat_views(parameters: Sequence[Parameter], stretch: Sequence[int]) -> tuple[Array, Array]:
    """Values and gradients of parameters that lie side by side, `(size,)` each."""
    buffer = parameters[stretch[0]].buffer
    assert isinstance(buffer, FlatBuffer)
    whole = slice(_span(parameters[stretch[0]])[0], _span(parameters[stretch[-1]])[1])
    return buffer.data[whole], buffer.grad[whole]


def own_part(parameters: Sequence[Parameter], stretch: Sequence[int], whole: bool) -> slice:
    """Which numbers of a stretch this rank updates; of one that must be `whole` all or none, where ranks share it."""
    buffer = parameters[stretch[0]].buffer
    assert isinstance(buffer, FlatBuffer)
    start, stop, own = _span(parameters[stretch[0]])[0], _span(parameters[stretch[-1]])[1], buffer.own
    if whole:
        return slice(0, stop - start if own.start <= start < own.stop else 0)
    return slice(max(0, own.start - start), max(0, min(stop, own.stop) - start))


def chunks_of(
    data: Array, grad: Array, state: dict[str, Array], scratch: Array, parts: Sequence[tuple[int, float]], own: slice
) -> list[Chunk]:
    """The `own` part of a stretch in pieces of at most the length of `scratch`, (2, length).

    `parts` are the sizes of the parameters in the stretch, each with its weight decay.
    """
    ends = list(accumulate(size for size, _ in parts))
    made: list[Chunk] = []
    for piece in pieces(own, scratch.shape[1]):
        views = (
            data[piece],
            grad[piece],
            scratch[0, : piece.stop - piece.start],
            scratch[1, : piece.stop - piece.start],
        )
        segments: list[Segment] = []
        number, start = bisect_right(ends, piece.start), piece.start
        while start < piece.stop:
            weight_decay = parts[number][1]
            while number + 1 < len(parts) and parts[number + 1][1] == weight_decay:
                number += 1
            stop = min(ends[number], piece.stop)
            inside = slice(start - piece.start, stop - piece.start)
            data_part, grad_part, first, second = (view[inside] for view in views)
            segments.append(Segment(data_part, grad_part, first, second, weight_decay))
            number, start = number + 1, stop
        decays = any(segment.weight_decay for segment in segments)
        stored = {name: array[piece] for name, array in state.items()}
        made.append(Chunk(views[0], views[1], stored, (views[2], views[3]), segments if decays else []))
    return made


def pieces(whole: slice, length: int) -> Iterator[slice]:
    """`whole` in slices of `length`."""
    for start in range(whole.start, whole.stop, length):
        yield slice(start, min(start + length, whole.stop))


def _span(parameter: Parameter) -> tuple[int, int]:
    assert isinstance(parameter.buffer, FlatBuffer)
    return parameter.buffer.span(parameter)


def _side_by_side(first: Parameter, second: Parameter) -> bool:
    return first.buffer is second.buffer and _span(first)[1] == _span(second)[0]
