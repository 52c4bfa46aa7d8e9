"""Tensors: NumPy arrays that remember how they were computed, and parameters, the leaves that training changes.

Each operation computes its value and states its derivative right beside it, as a function of the incoming gradient `g`.
The operations as coarse as a layer are in `distprop.functional`; the walk backwards is in `distprop.tape`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, Union

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from distprop.allocator import aligned_like
from distprop.pieces import compact, in_pieces, laid_out_as, like
from distprop.rows import add_rows
from distprop.sums import sum_over
from distprop.tape import (
    Array,
    Node,
    Out,
    VectorJacobianProduct,
    gradients_needed,
    node_for,
    note_change,
    sum_to,
    walk_back,
)

Operand: TypeAlias = Union["Tensor", ArrayLike]
Dim: TypeAlias = int | Sequence[int] | None


def tensor(data: Operand, requires_grad: bool = False, dtype: DTypeLike | None = None) -> Tensor:
    """A new tensor with a copy of `data`. Python floats become float32, as in PyTorch; NumPy arrays keep their dtype.

    >>> a, b = tensor(2.0, requires_grad=True), tensor(-3.0, requires_grad=True)
    >>> (a * b + a**3).backward()
    >>> a.grad, b.grad
    (array(9., dtype=float32), array(2., dtype=float32))
    """
    if dtype is None and not isinstance(data, Tensor | np.ndarray | np.generic):
        array = np.array(data)
        return Tensor(array.astype(np.float32) if array.dtype == np.float64 else array, requires_grad)
    return Tensor(np.array(data, dtype=dtype), requires_grad)


def as_tensor(data: Operand) -> Tensor:
    """`data` itself if it is a tensor, otherwise a constant that shares its memory where it can."""
    if isinstance(data, Tensor):
        return data
    return Tensor(data) if isinstance(data, np.ndarray) else tensor(data)


def record(value: ArrayLike, inputs: tuple[Tensor, ...], vjp: VectorJacobianProduct) -> Tensor:
    """The tensor of an operation's `value`, with `vjp` on the tape if a gradient is needed (see `distprop.tape`).

    This is how an operation of your own becomes differentiable:

    >>> def cube(x):
    ...     return record(x.data**3, (x,), lambda grad, out: [3 * x.data**2 * grad])
    >>> x = tensor([1.0, 2.0], requires_grad=True)
    >>> cube(x).sum().backward()
    >>> x.grad
    array([ 3., 12.], dtype=float32)
    """
    result = Tensor.__new__(Tensor)
    result._data = value if isinstance(value, np.ndarray) else np.asarray(value)
    result._grad = None
    result.changed = -1
    result.node = node = node_for(inputs, vjp)
    result.requires_grad = node is not None
    return result


class Tensor:
    """A NumPy array, `data`, with a gradient, `grad`, an array of the same shape once `backward()` has reached it.

    Attributes:
        changed: when the values were last changed, on the clock of `tape.next_number`; -1 if never. What changes them
            through NumPy, as `x.data[0] = 1` does, is not noticed; see `values_changed`.

    Raises:
        TypeError: `requires_grad` for data that are not floating point.
    """

    __slots__ = ("__weakref__", "_data", "_grad", "changed", "node", "requires_grad")
    __array_ufunc__ = None  # NumPy hands `array * tensor` over to us instead of making an array of tensors

    _data: Array
    _grad: Array | None
    node: Node | None

    def __init__(self, data: Operand, requires_grad: bool = False) -> None:
        self._data = np.asarray(data)
        if requires_grad and self._data.dtype.kind != "f":
            raise TypeError(f"only floating-point tensors can require gradients; got dtype {self._data.dtype}")
        self._grad = None
        self.requires_grad = requires_grad
        self.node = None
        self.changed = -1

    @property
    def data(self) -> Array:
        """The values."""
        return self._data

    @data.setter
    def data(self, value: Operand) -> None:
        self._data = np.asarray(value)
        self.changed = note_change()

    @property
    def grad(self) -> Array | None:
        """The accumulated gradient, or None before the first backward pass. Only leaves keep one."""
        return self._grad

    @grad.setter
    def grad(self, value: ArrayLike | None) -> None:
        self._grad = None if value is None else np.array(value, dtype=self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self._data.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._data.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype."""
        return self._data.dtype

    @property
    def T(self) -> Tensor:  # noqa: N802 - NumPy's and PyTorch's name
        """All axes reversed."""
        return self.transpose()

    # --- backpropagation

    def backward(self, grad: Operand | None = None) -> None:
        """Add the derivative of this tensor to the `grad` of every leaf that it was computed from.

        `grad` is the derivative of the final result with respect to this tensor, 1 for a single number.

        Raises:
            RuntimeError: nothing to differentiate, no `grad` for a tensor of several numbers, or a second call.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() on a tensor that does not depend on anything with requires_grad=True")
        if grad is None:
            if self._data.size != 1:
                raise RuntimeError(
                    f"backward() starts from a single number; got shape {self.shape}. "
                    "Reduce it with sum() or mean(), or pass the gradient to start from"
                )
            seed = np.ones_like(self._data)
        else:
            seed = np.asarray(grad, dtype=self.dtype)
            if seed.shape != self.shape:
                raise ValueError(f"backward() got a gradient of shape {seed.shape} for a tensor of shape {self.shape}")
        if self.node is None:
            self.accumulate(seed, ours=False)
        else:
            walk_back(self.node, seed)

    def gradient_target(self) -> Array | None:
        """Where an operation may write this leaf's gradient, or None; see `Parameter`."""
        return None

    def accumulate(self, gradient: Array, ours: bool) -> None:
        """Add `gradient` to `grad`, or take it if its memory is `ours`, or a copy; called by the tape for leaves."""
        gradient = np.asarray(gradient, self._data.dtype)
        if self._grad is not None:
            self._grad = np.asarray(self._grad + gradient)
        else:
            self._grad = gradient if ours else gradient.copy("K")

    def detach(self) -> Tensor:
        """The same values, as a constant."""
        return Tensor(self._data)

    def to(self, dtype: DTypeLike) -> Tensor:
        """In another floating-point dtype; itself if it has that."""
        if np.dtype(dtype).kind != "f":
            raise TypeError(f"to() takes a floating-point dtype, got {np.dtype(dtype)}; of others there is no gradient")
        return self if self.dtype == dtype else _elementwise(self._data.astype(dtype), (self, lambda g: g))

    def item(self) -> float:
        """The one number in it, as a Python number."""
        return self._data.item()

    def numpy(self) -> Array:
        """The values; the same memory."""
        return self._data

    # --- arithmetic, with NumPy's broadcasting

    def __add__(self, other: Operand) -> Tensor:
        x, y = self._both(other)
        return _elementwise(x.data + y.data, (x, lambda g: g), (y, lambda g: g))

    def __sub__(self, other: Operand) -> Tensor:
        x, y = self._both(other)
        return _elementwise(x.data - y.data, (x, lambda g: g), (y, np.negative))

    def __mul__(self, other: Operand) -> Tensor:
        x, y = self._both(other)
        return _elementwise(x.data * y.data, (x, lambda g: g * y.data), (y, lambda g: g * x.data))

    def __truediv__(self, other: Operand) -> Tensor:
        x, y = self._both(other)
        value = x.data / y.data
        return _elementwise(value, (x, lambda g: g / y.data), (y, lambda g: -g * value / y.data))

    def __pow__(self, other: Operand) -> Tensor:
        """x^y. The derivative with respect to y needs x > 0 and counts as 0 elsewhere."""
        x, y = self._both(other)
        value = x.data**y.data

        def for_base(g: Array) -> Array:
            return g * np.where(y.data == 0, 0, y.data * x.data ** np.where(y.data == 0, 1, y.data - 1))

        def for_exponent(g: Array) -> Array:
            return g * value * np.log(np.where(x.data > 0, x.data, 1))

        return _elementwise(value, (x, for_base), (y, for_exponent))

    def __radd__(self, other: Operand) -> Tensor:
        return self + other

    def __rsub__(self, other: Operand) -> Tensor:
        return self._operand(other) - self

    def __rmul__(self, other: Operand) -> Tensor:
        return self * other

    def __rtruediv__(self, other: Operand) -> Tensor:
        return self._operand(other) / self

    def __rpow__(self, other: Operand) -> Tensor:
        return self._operand(other) ** self

    def __iadd__(self, other: Operand) -> Tensor:
        return self if self._in_place(np.add, other) else self + other

    def __isub__(self, other: Operand) -> Tensor:
        return self if self._in_place(np.subtract, other) else self - other

    def __imul__(self, other: Operand) -> Tensor:
        return self if self._in_place(np.multiply, other) else self * other

    def __itruediv__(self, other: Operand) -> Tensor:
        return self if self._in_place(np.divide, other) else self / other

    def __neg__(self) -> Tensor:
        return _elementwise(-self.data, (self, np.negative))

    def __abs__(self) -> Tensor:
        return _elementwise(np.abs(self.data), (self, lambda g: g * np.sign(self.data)))

    def __matmul__(self, other: Operand) -> Tensor:
        return _matmul(*self._both(other))

    def __rmatmul__(self, other: Operand) -> Tensor:
        return _matmul(*self._operand(other)._both(self))

    def exp(self) -> Tensor:
        """e^x."""
        value = np.exp(self.data)
        return _elementwise(value, (self, lambda g: g * value))

    def log(self) -> Tensor:
        """Natural logarithm."""
        return _elementwise(np.log(self.data), (self, lambda g: g / self.data))

    def sqrt(self) -> Tensor:
        """Square root."""
        value = np.sqrt(self.data)
        return _elementwise(value, (self, lambda g: g / (2 * value)))

    def abs(self) -> Tensor:
        """Absolute value; the derivative at 0 counts as 0."""
        return abs(self)

    def tanh(self) -> Tensor:
        """Hyperbolic tangent; derivative 1 − tanh²(x)."""
        value = np.tanh(self.data)

        def derivative(g: Array) -> Array:
            d = np.asarray(value * value)
            np.subtract(1, d, out=d)
            d *= g
            return d

        return _elementwise(value, (self, derivative))

    def sigmoid(self) -> Tensor:
        """1 / (1 + e^−x); derivative σ(1 − σ)."""
        x = compact(self.data if self.dtype.kind == "f" else self.data.astype(np.float64))
        value = aligned_like(x)
        in_pieces(sigmoid_of, x, value)

        def derivative(g: Array, s: Array, d: Array) -> None:
            np.subtract(1, s, out=d)
            d *= s
            d *= g

        def vjp(grad: Array, out: Out) -> list[Array]:
            gradient = like(value, out[0])
            in_pieces(derivative, laid_out_as(value, grad), value, gradient)
            return [gradient]

        return record(value, (self,), vjp)

    def relu(self) -> Tensor:
        """max(x, 0); the derivative at 0 counts as 0."""
        value = np.maximum(self.data, 0)
        return _elementwise(value, (self, lambda g: g * (value > 0)))

    # --- reductions. `axis` and `keepdims` are accepted for `dim` and `keepdim`.

    def sum(self, dim: Dim = None, keepdim: bool = False, *, axis: Dim = None, keepdims: bool = False) -> Tensor:
        """Sum over `dim`, or over everything."""
        axes, keep = self._axes(dim, axis), keepdim or keepdims
        return _reduction(self, sum_over(self.data, axes, keep), axes, keep, lambda g: g)

    def mean(self, dim: Dim = None, keepdim: bool = False, *, axis: Dim = None, keepdims: bool = False) -> Tensor:
        """Mean over `dim`, or over everything; 0 over nothing, as every loss over an empty batch is."""
        if self.dtype.kind != "f":
            raise TypeError(f"mean() needs floating point, got dtype {self.dtype}")
        axes, keep = self._axes(dim, axis), keepdim or keepdims
        scale = self.dtype.type(1 / max(self._count(axes), 1))
        return _reduction(self, sum_over(self.data, axes, keep) * scale, axes, keep, lambda g: g * scale)

    def var(
        self, dim: Dim = None, correction: float = 1, keepdim: bool = False, *, axis: Dim = None, keepdims: bool = False
    ) -> Tensor:
        """Variance over `dim`, divided by n − `correction`; 1, the default, is PyTorch's, 0 is NumPy's; 0 over nothing.

        Raises:
            ValueError: n is not more than `correction` (PyTorch: nan).
        """
        if self.dtype.kind != "f":
            raise TypeError(f"var() needs floating point, got dtype {self.dtype}")
        axes, keep = self._axes(dim, axis), keepdim or keepdims
        n = self._count(axes)
        if 0 < n <= correction:
            raise ValueError(f"var() over {n} value{'s' if n > 1 else ''} needs a smaller correction than {correction}")
        count = n - correction if n else 1
        centred = self.data - sum_over(self.data, axes, True) / self.dtype.type(max(n, 1))
        value = sum_over(centred * centred, axes, keep) / np.asarray(count, self.dtype)
        return _reduction(self, value, axes, keep, lambda g: g * centred * (2 / count))

    def max(self, dim: Dim = None, keepdim: bool = False, *, axis: Dim = None, keepdims: bool = False) -> Tensor:
        """The largest value over `dim` (PyTorch's `amax`: values only). Equal maxima share the gradient equally."""
        return self._extremum(np.max, dim, keepdim, axis, keepdims)

    def min(self, dim: Dim = None, keepdim: bool = False, *, axis: Dim = None, keepdims: bool = False) -> Tensor:
        """The smallest value over `dim` (PyTorch's `amin`: values only). Equal minima share the gradient equally."""
        return self._extremum(np.min, dim, keepdim, axis, keepdims)

    def argmax(self, dim: int | None = None) -> NDArray[np.int64]:
        """The index of the largest value, as a NumPy array."""
        return np.asarray(self.data.argmax(axis=dim))

    # --- shape

    def reshape(self, *shape: int | Sequence[int]) -> Tensor:
        """The same values in another shape; one length may be -1.

        Of an empty batch it is what it is for a batch of one: `(0, 8, 8)` as `(0, -1)` is `(0, 64)` (PyTorch refuses).
        """
        wanted: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        if not self._data.size and 0 in wanted and list(wanted).count(-1) == 1:
            filled, known = (math.prod(n for n in lengths if n > 0) for lengths in (self.shape, wanted))
            if filled % known == 0:
                wanted = [filled // known if n == -1 else n for n in wanted]
        return record(self.data.reshape(wanted), (self,), lambda grad, out: [grad.reshape(self.shape)])

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        """Merge the axes from `start_dim` to `end_dim`."""
        if self.ndim == 0:
            return self.reshape(1)
        first, last = self._axes((start_dim, end_dim), None)
        if first > last:
            raise ValueError(f"flatten() goes from dim {start_dim} on to a later one, got {end_dim} as the last")
        return self.reshape(*self.shape[:first], int(np.prod(self.shape[first : last + 1])), *self.shape[last + 1 :])

    def transpose(self, *dims: int) -> Tensor:
        """Two axes exchanged, as in PyTorch; without arguments all axes reversed, as in NumPy."""
        if len(dims) not in (0, 2):
            raise TypeError(f"transpose() takes two axes or none, got {dims}; permute() takes them all")
        order = list(range(self.ndim))
        try:
            if dims:
                order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
        except IndexError:
            raise IndexError(f"transpose() got axes {dims} for a tensor of shape {self.shape}") from None
        return self.permute(*(order if dims else order[::-1]))

    def permute(self, *dims: int | Sequence[int]) -> Tensor:
        """The axes in the order `dims`."""
        wanted: Any = dims[0] if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
        order = self._axes(wanted, None) if wanted else ()
        inverse = np.argsort(order)
        return record(self.data.transpose(order), (self,), lambda grad, out: [grad.transpose(inverse)])

    def __getitem__(self, index: Any) -> Tensor:
        index = _plain_index(index)
        parts = index if isinstance(index, tuple) else (index,)
        plain = (slice, int, np.integer, type(None), type(Ellipsis))
        fancy = [np.asarray(part) for part in parts if not isinstance(part, plain)]
        repeats = any(part.dtype != np.bool_ for part in fancy)  # a place may be taken twice

        def vjp(grad: Array, out: Out) -> list[Array]:
            if repeats and len(parts) == 1 and self.data.size:
                full, count = np.empty(self.shape, self.dtype), len(self.data)
                numbers = fancy[0].astype(np.intp).reshape(-1)
                numbers[numbers < 0] += count
                width = self.data.size // count
                add_rows(numbers, grad.reshape(len(numbers), width), full.reshape(count, width))
                return [full]
            full = np.zeros_like(self.data)
            if repeats:
                np.add.at(full, index, grad)
            else:
                full[index] = grad
            return [full]

        return record(self.data[index], (self,), vjp)

    # --- comparison gives NumPy arrays of booleans; identity is what hashing uses

    def __eq__(self, other: object) -> NDArray[np.bool_]:  # type: ignore[override]
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> NDArray[np.bool_]:  # type: ignore[override]
        return self._compare(operator.ne, other)

    def __lt__(self, other: object) -> NDArray[np.bool_]:
        return self._compare(operator.lt, other)

    def __le__(self, other: object) -> NDArray[np.bool_]:
        return self._compare(operator.le, other)

    def __gt__(self, other: object) -> NDArray[np.bool_]:
        return self._compare(operator.gt, other)

    def __ge__(self, other: object) -> NDArray[np.bool_]:
        return self._compare(operator.ge, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return bool(self._data)

    def __float__(self) -> float:
        return float(self._data.item())

    def __int__(self) -> int:
        return int(self._data.item())

    def __format__(self, spec: str) -> str:
        return format(self.item() if spec and self._data.size == 1 else str(self), spec)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self._data, dtype=dtype, copy=copy)

    def __array_function__(
        self, function: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """NumPy's functions, such as `np.argmax`, take the values. Those that would cut the graph raise TypeError."""
        computed: list[Tensor] = []

        def values(argument: Any) -> Any:
            if isinstance(argument, list | tuple):
                parts = map(values, argument)
                return list(parts) if isinstance(argument, list) else tuple(parts)
            if not isinstance(argument, Tensor):
                return argument
            if argument.node is not None:
                computed.append(argument)
            return argument.data

        result = function(*values(args), **{name: values(argument) for name, argument in kwargs.items()})
        results = result if isinstance(result, list | tuple) else [result]
        if gradients_needed(tuple(computed)) and any(np.asarray(r).dtype.kind == "f" for r in results):
            raise TypeError(
                f"{function.__module__}.{function.__name__}() gives an array, behind which the gradient would be lost; "
                "take distprop's own operation, tensor.data for the values alone, or no_grad()"
            )
        return result

    def __repr__(self) -> str:
        text = np.array2string(self._data, separator=", ", prefix="tensor(")
        return f"tensor({text}, dtype={self.dtype}{', requires_grad=True' if self.requires_grad else ''})"

    def _operand(self, other: Operand) -> Tensor:
        """`other` as a tensor; a number takes this tensor's dtype instead of widening the result."""
        if isinstance(other, Tensor):
            return other
        if isinstance(other, int | float | np.generic) and self._data.dtype.kind == "f":
            return Tensor(np.asarray(other, self._data.dtype))
        return Tensor(np.asarray(other))

    def _both(self, other: Operand) -> tuple[Tensor, Tensor]:
        """This tensor and `other`; one of whole numbers takes the other's floating-point dtype, as in PyTorch."""
        x, y = self, self._operand(other)
        kinds = x._data.dtype.kind, y._data.dtype.kind
        if kinds[0] != kinds[1]:
            if kinds[0] == "f" and kinds[1] in "biu":
                return x, Tensor(y._data.astype(x._data.dtype))
            if kinds[1] == "f" and kinds[0] in "biu":
                return Tensor(x._data.astype(y._data.dtype)), y
        return x, y

    def _in_place(self, operation: np.ufunc, other: Operand) -> bool:
        """Under `no_grad` parameters change in place, so that `w -= lr * w.grad` updates one; constants never do."""
        if self.node is not None or not (self.requires_grad or isinstance(self, Parameter)):
            return False
        if gradients_needed((self,)):
            raise RuntimeError(
                "a leaf that requires a gradient does not change in place, except inside no_grad(); "
                "for a new tensor write w = w + ... instead of w += ..."
            )
        operation(self._data, self._operand(other)._data, out=self._data)
        self.changed = note_change()
        return True

    def _compare(self, compare: Callable[[Any, Any], Any], other: object) -> NDArray[np.bool_]:
        return np.asarray(compare(self._data, other._data if isinstance(other, Tensor) else other))

    def _axes(self, dim: Dim, axis: Dim) -> tuple[int, ...]:
        """The axes to reduce, none of them negative; all if none are named, also by (), as in PyTorch."""
        chosen = dim if dim is not None else axis
        axes = () if chosen is None else tuple(chosen) if isinstance(chosen, Sequence) else (chosen,)
        if not axes:
            return tuple(range(self.ndim))
        for a in axes:
            if not -self.ndim <= a < self.ndim:
                raise IndexError(f"dim {a} is out of range for a tensor of shape {self.shape}")
        return tuple(a % self.ndim for a in axes)

    def _count(self, axes: tuple[int, ...]) -> int:
        return int(np.prod([self.shape[a] for a in axes], dtype=np.int64))

    def _extremum(self, reduce: Any, dim: Dim, keepdim: bool, axis: Dim, keepdims: bool) -> Tensor:
        axes, keep = self._axes(dim, axis), keepdim or keepdims
        value = reduce(self.data, axis=axes, keepdims=True)

        def derivative(g: Array) -> Array:
            chosen = self.data == value
            return g * chosen / chosen.sum(axis=axes, keepdims=True, dtype=self.dtype)

        return _reduction(self, value if keep else value.squeeze(axes), axes, keep, derivative)


class Parameter(Tensor):
    """A leaf that training changes. Its gradient has a fixed place in memory, which operations write into.

    `FlatBuffer` moves values and gradients of many parameters into one array each; assigning to `data` or `grad` then
    writes into those arrays, unless the shape or the dtype changes.

    Attributes:
        has_grad: `grad` is not None. What asks this of every parameter in every step reads it here, which takes a
            third of the time.
        zeroed: `grad` is what `zero_grad(set_to_none=False)` has left.
        buffer: the `FlatBuffer` that it lives in, or None.
    """

    __slots__ = ("buffer", "has_grad", "zeroed")

    def __init__(self, data: Operand, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)
        self.has_grad = False  # `_grad` holds this step's gradient, not an old one
        self.zeroed = False
        self.buffer: object | None = None

    @property
    def data(self) -> Array:
        """The values, a view of the flat buffer once there is one."""
        return self._data

    @data.setter
    def data(self, value: Operand) -> None:
        array = np.asarray(value)
        if array.shape == self.shape and array.dtype == self.dtype and self._data.flags.writeable:
            self._data[...] = array
        else:
            self._data = np.array(array)
            self._grad, self.has_grad, self.buffer = None, False, None
        self.changed = note_change()

    @property
    def grad(self) -> Array | None:
        """This step's accumulated gradient, or None before the first backward pass since `zero_grad()`.

        An array assigned to it must have the parameter's shape, else ValueError; a single number goes everywhere.
        """
        return self._grad if self.has_grad else None

    @grad.setter
    def grad(self, value: ArrayLike | None) -> None:
        if value is not None:
            gradient = np.asarray(value)
            if gradient.ndim and gradient.shape != self.shape:
                raise ValueError(f"a gradient of shape {gradient.shape} for a parameter of shape {self.shape}")
            self._place()[...] = gradient
        self.has_grad, self.zeroed = value is not None, False

    def gradient_target(self) -> Array | None:
        """The place of the gradient if nothing of this step is in it yet."""
        return None if self.has_grad else self._grad if self._grad is not None else self._place()

    def accumulate(self, gradient: Array, ours: bool) -> None:
        """Add `gradient`, or take note that it has been written where it belongs."""
        self.zeroed = False
        if self.has_grad:
            place = self._place()
            np.add(place, gradient, out=place)
        else:
            if gradient is not self._grad:
                self._place()[...] = gradient
            self.has_grad = True

    def place_in(self, buffer: object, data: Array, grad: Array) -> None:
        """Move values and gradient to the views `data` and `grad` of a flat buffer."""
        data[...] = self._data
        if self.has_grad:
            grad[...] = self._place()
        self._data, self._grad, self.buffer = data, grad, buffer

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the values only; they are in no buffer and have no gradient yet."""
        return Parameter, (self._data, self.requires_grad)

    def _place(self) -> Array:
        if self._grad is None:
            self._grad = np.empty(self._data.shape, self._data.dtype)
        return self._grad

    def __repr__(self) -> str:
        return f"Parameter{super().__repr__().removeprefix('tensor')}"


def clear_gradients(parameters: Iterable[Parameter], set_to_none: bool) -> None:
    """Forget the gradients, at no cost, or overwrite those that there are with zeros."""
    if set_to_none:
        for parameter in parameters:
            parameter.has_grad = False
    else:
        for parameter in parameters:
            if parameter.has_grad:
                parameter.grad, parameter.zeroed = 0, True


def values_changed(parameters: Iterable[Parameter]) -> None:
    """To be called after a change of their values that went through the arrays; see `Tensor.changed`."""
    now = note_change()
    for parameter in parameters:
        parameter.changed = now


def sigmoid_of(x: Array, out: Array | None = None) -> Array:
    """1 / (1 + e^−x), precise for very negative x too; 0 where e^−x overflows (float32: below −88), as in PyTorch."""
    with np.errstate(over="ignore"):
        e = np.exp(np.negative(x, out=out), out=out)
    e += 1
    return np.divide(1, e, out=out)


Derivative: TypeAlias = Callable[[Array], Array]


def _elementwise(value: Array, *terms: tuple[Tensor, Derivative]) -> Tensor:
    """Record an operation given, for each input, the derivative as a function of the incoming gradient."""

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        # In x's dtype, which the result may not have: float32 beside float64 gives that
        return [
            np.asarray(sum_to(derivative(grad), x.shape), x.dtype) if x.requires_grad else None
            for x, derivative in terms
        ]

    return record(value, tuple(x for x, _ in terms), vjp)


def _reduction(x: Tensor, value: Array, axes: tuple[int, ...], keep: bool, derivative: Derivative) -> Tensor:
    """Record a reduction over `axes`; `derivative` gets the gradient with those axes kept."""

    def vjp(grad: Array, out: Out) -> list[Array]:
        kept = grad if keep else np.expand_dims(grad, axes)
        return [np.broadcast_to(derivative(kept), x.shape)]

    return record(value, (x,), vjp)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y with NumPy's rules for vectors and stacks of matrices. dx = g yᵀ, dy = xᵀ g."""
    if x.ndim == 0 or y.ndim == 0:
        raise ValueError(f"@ needs at least one axis on each side; got shapes {x.shape} and {y.shape}")
    if x.shape[-1] != y.shape[0 if y.ndim == 1 else -2]:
        raise ValueError(
            f"cannot multiply shapes {x.shape} @ {y.shape}: {x.shape[-1]} columns meet {y.shape[-2:][0]} rows"
        )

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        a = x.data[None, :] if x.ndim == 1 else x.data
        b = y.data[:, None] if y.ndim == 1 else y.data
        g = grad
        if x.ndim == 1:
            g = np.expand_dims(g, -1 if y.ndim == 1 else -2)
        if y.ndim == 1:
            g = np.expand_dims(g, -1)
        dx = dy = None
        if x.requires_grad:
            dx = np.asarray(sum_to(g @ np.swapaxes(b, -1, -2), a.shape), x.dtype).reshape(x.shape)
        if y.requires_grad:
            if b.ndim == 2 and a.ndim > 2:  # one large product instead of a stack of products and their sum
                rows = math.prod(a.shape[:-1])  # -1 cannot be told of an array without columns
                a, g = a.reshape(rows, a.shape[-1]), g.reshape(rows, g.shape[-1])
            dy = np.asarray(sum_to(np.swapaxes(a, -1, -2) @ g, b.shape), y.dtype).reshape(y.shape)
        return [dx, dy]

    return record(x.data @ y.data, (x, y), vjp)


def _plain_index(index: Any) -> Any:
    """Tensors inside an index become arrays."""
    if isinstance(index, tuple):
        return tuple(_plain_index(part) for part in index)
    return index.data if isinstance(index, Tensor) else index
