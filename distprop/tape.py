"""The tape: what was computed from what, and the walk back along it that is backpropagation.

An operation calls `record(value, inputs, vjp)`. The node it makes holds the inputs and the operation's derivative as a
vector-Jacobian product: `vjp(grad, out)` takes the gradient of the loss with respect to the value and returns one
gradient for each input, or None for an input with `requires_grad` False. It must treat `grad` as read-only. `out`
follows NumPy's convention: `out[i]`, where it is not None, is an array that the i-th gradient may be written into; for
a parameter it is a slice of the buffer that Allreduce sends, so a matrix product puts its result where it is needed.

Backward visits the nodes in the reverse order of their creation, with a heap: an operation is newer than everything it
was computed from, so each node is reached when its gradient is complete. No recursion, no global list; a graph that is
dropped is freed by reference counts, and the order is the same on every rank.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from distprop.allocator import is_all_of, keep_freed_memory
from distprop.sums import sum_over

if TYPE_CHECKING:
    from distprop.tensor import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Array: TypeAlias = NDArray[Any]
Out: TypeAlias = Sequence[Array | None]
VectorJacobianProduct: TypeAlias = Callable[[Array, Out], Sequence[Array | None]]


class BackwardPass(Protocol):
    """What a wrapper such as `DataParallel` wants to know of the backward passes through its model."""

    def begin(self, first: BackwardPass | None) -> float:
        """Called before the walk; returns the weight of this pass, a factor for all of its gradients.

        `first` is whoever was asked before, in a walk through several models, whose weights have to be the same.
        """

    def end(self) -> None:
        """Called when all gradients are there."""


class Node:
    """One operation on the tape."""

    __slots__ = ("__weakref__", "absent", "grad", "inputs", "number", "passes", "vjp")

    def __init__(
        self, inputs: tuple[Tensor, ...], vjp: VectorJacobianProduct, passes: tuple[BackwardPass, ...]
    ) -> None:
        self.number = next(_numbers)
        self.inputs = inputs
        self.vjp: VectorJacobianProduct | None = vjp
        self.passes = passes
        self.absent: Callable[[], object] | None = None  # see `take_part`
        self.grad: Array | None = None

    def receive(self, gradient: Array) -> bool:
        """Add one consumer's gradient; tells whether it was the first."""
        before, self.grad = self.grad, gradient
        if before is None:
            return True
        if _holders(before) == _NOBODY_ELSE:
            before += gradient
            self.grad = before
        else:
            self.grad = before + gradient
        return False


def recording() -> bool:
    """Whether operations on what requires gradients go on the tape; not inside `no_grad`."""
    return _recording.get()


def gradients_needed(inputs: tuple[Tensor, ...]) -> bool:
    """Whether an operation on `inputs` goes on the tape."""
    if _recording.get():
        for tensor in inputs:
            if tensor.requires_grad:
                return True
    return False


def node_for(inputs: tuple[Tensor, ...], vjp: VectorJacobianProduct) -> Node | None:
    """The tape entry of an operation, if it needs one; it inherits the backward passes that its inputs belong to."""
    if not gradients_needed(inputs):
        return None
    passes: tuple[BackwardPass, ...] = ()
    for tensor in inputs:
        source = tensor.node
        if source is not None and source.passes is not passes and source.passes:
            passes += tuple(p for p in source.passes if p not in passes) if passes else source.passes
    return Node(inputs, vjp, passes)


def walk_back(root: Node, grad: Array) -> None:
    """Backpropagation: send `grad` from `root` to every leaf that requires a gradient.

    Each node is released as soon as it has been visited, so memory falls while the walk goes on.

    Raises:
        RuntimeError: a part of the graph was walked before and has been released.
    """
    keep_freed_memory()
    passes = root.passes
    weight = _common_weight(passes)
    if weight == 0:  # a rank without examples: whatever the loss says, it contributes nothing
        take_part(root)
    elif weight == 1:
        _propagate(root, grad)
    else:
        _propagate(root, grad * grad.dtype.type(weight))
    for listener in passes:
        listener.end()


def take_part(root: Node) -> None:
    """The walk of a rank that contributes nothing: no derivative is computed, and no gradient changes.

    An operation whose derivative is a collective, such as synchronised batch norm, sets its node's `absent`: what such
    a rank does in its place, so that the others do not wait for ever. The nodes come in the same order on all ranks.
    """
    heap = [(-root.number, root)]
    while heap:
        node = heappop(heap)[1]
        inputs, absent = node.inputs, node.absent
        node.vjp, node.inputs, node.absent = None, (), None  # when it comes again, nothing is left to do
        if absent is not None:
            absent()
        for tensor in inputs:
            if tensor.node is not None:
                heappush(heap, (-tensor.node.number, tensor.node))


def _common_weight(passes: tuple[BackwardPass, ...]) -> float:
    weights = {listener.begin(passes[0] if number else None) for number, listener in enumerate(passes)}
    if len(weights) > 1:
        raise RuntimeError(
            "one backward pass goes through forward passes over different numbers of examples, in the proportion "
            f"{' : '.join(f'{weight:g}' for weight in sorted(weights))}; "
            "say how many the loss is a mean over with parallel.backward(loss, examples=n)"
        )
    return weights.pop() if weights else 1


def _propagate(root: Node, grad: Array) -> None:
    root.receive(grad)
    heap = [(-root.number, root)]
    observe = _observer.get()
    try:
        while heap:
            node = heappop(heap)[1]
            if observe is not None:
                observe(node)
            inputs, gradients, places = _visit(node)
            for number, tensor in enumerate(inputs):
                gradient, gradients[number] = gradients[number], None
                if gradient is None or not tensor.requires_grad:
                    continue
                if gradient is places[number]:  # it is where it belongs
                    tensor.accumulate(gradient, ours=False)
                    continue
                source = tensor.node
                if source is None:
                    ours = _holders(gradient) == _NOBODY_ELSE
                    tensor.accumulate(gradient, ours)
                elif source.receive(gradient):
                    heappush(heap, (-source.number, source))
    finally:
        if observe is not None:
            observe(None)
        for _, node in heap:  # after an error: a later walk through these must not find half a gradient there
            node.grad = None


def _visit(node: Node) -> tuple[tuple[Tensor, ...], list[Array | None], list[Array | None]]:
    """Apply one chain rule and release the node; the inputs, their gradients, and where these could be written."""
    vjp, grad, inputs = node.vjp, node.grad, node.inputs
    if node.number < _last_change:
        _check_unchanged(node)
    if vjp is None or grad is None:
        node.grad = None
        raise RuntimeError(
            "backward() went through a part of the graph a second time; its intermediate values are released by the "
            "first. Add the losses and call backward() once, or compute the forward pass again"
        )
    node.vjp, node.grad, node.inputs, node.absent = None, None, (), None
    out = [x.gradient_target() if x.node is None and x.requires_grad else None for x in inputs]
    if len(inputs) > 1 and len(set(inputs)) < len(inputs):  # one parameter taken twice: only one may write
        out = [None if any(x is earlier for earlier in inputs[:i]) else out[i] for i, x in enumerate(inputs)]
    gradients = list(vjp(grad, out))
    if len(gradients) != len(inputs):
        raise ValueError(f"an operation of {len(inputs)} inputs gave {len(gradients)} gradients; it must be one each")
    return inputs, gradients, out


def _check_unchanged(node: Node) -> None:
    """Raise RuntimeError if an input has other values than in the forward pass, with which the derivative is computed.

    Also where the derivative happens not to need them, as that of a sum: then, too, it is one of values that are gone.
    """
    for tensor in node.inputs:
        if tensor.changed > node.number:
            node.grad = None
            raise RuntimeError(
                f"a {type(tensor).__name__} of shape {tensor.shape} was changed between the forward and the backward "
                "pass, by step(), load_state_dict(), an assignment or in place, so its gradients would be wrong; call "
                "backward() before it changes, or compute the forward pass again"
            )


def _holders(gradient: Array) -> tuple[int, int, bool]:
    """How often Python refers to a gradient and to the array that it is a view of; whether it is all of that, to write.

    A gradient that a vjp may have kept, or handed out twice, has to be copied before it is added to or kept. Most are
    made for the one who receives them, which PyTorch, too, tells by counting references.
    """
    owner, writeable = gradient.base, gradient.flags.writeable
    if owner is None:
        return sys.getrefcount(gradient), _NOBODY_ELSE[1], writeable and gradient.flags.owndata
    whole = isinstance(owner, np.ndarray) and owner.flags.owndata and is_all_of(gradient, owner)
    return sys.getrefcount(gradient), sys.getrefcount(owner), writeable and whole


def _holders_of_a_new_view() -> tuple[int, int, bool]:
    """What `_holders` says of an array that only its caller has; how references are counted differs between Pythons."""
    gradient = np.empty((1, 2)).T
    return _holders(gradient)


@overload
def no_grad() -> _GeneratorContextManager[None]: ...


@overload
def no_grad(function: Callable[P, R]) -> Callable[P, R]: ...


def no_grad(function: Callable[P, R] | None = None) -> _GeneratorContextManager[None] | Callable[P, R]:
    """Inside, operations are not recorded: no graph, no memory for it. Also a decorator, `@no_grad` or `@no_grad()`."""
    return _no_grad() if function is None else _no_grad()(function)


@contextmanager
def _no_grad() -> Iterator[None]:
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


@contextmanager
def observe_backward(observe: Callable[[Node | None], object]) -> Iterator[None]:
    """Inside, backward passes call `observe(node)` before each derivative, and `observe(None)` at their end."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def next_number() -> int:
    """A number between those of the nodes made before and those of the nodes made after."""
    return next(_numbers)


def note_change() -> int:
    """Like `next_number`, for values that have just been changed, which is what `Tensor.changed` says."""
    global _last_change
    _last_change = next(_numbers)
    return _last_change


def sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: add up `gradient` over the axes along which an operand of `shape` was repeated."""
    if gradient.shape == shape:
        return gradient
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, n in enumerate(shape) if n == 1 and gradient.shape[i + extra] != 1
    )
    return sum_over(gradient, axes).reshape(shape)


_NOBODY_ELSE = (0, 0, True)
_NOBODY_ELSE = _holders_of_a_new_view()
_numbers = itertools.count()
_last_change = -1
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_observer: ContextVar[Callable[[Node | None], object] | None] = ContextVar("observer", default=None)
