"""The gradient checker, public: whoever writes an operation of their own can hold it against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from distprop.tape import Array
from distprop.tensor import Operand, Tensor


def check_grads(
    function: Callable[..., Tensor],
    inputs: Operand | Sequence[Operand],
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
) -> None:
    """Hold the gradients of `function(*inputs)` against central differences in float64.

    Every input is differentiated; a result of several numbers is weighed with fixed random numbers first, which tests
    all of its derivatives at once. Keep inputs away from kinks such as relu's 0.

    Raises:
        AssertionError: a gradient has the wrong shape or differs by more than atol + rtol·|expected|; names the input
            and the element.

    >>> check_grads(lambda a, b: a * b + a**3, [2.0, -3.0])
    """
    values = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    arrays = [np.array(v.data if isinstance(v, Tensor) else v, dtype=np.float64) for v in values]
    tensors = [Tensor(a, requires_grad=True) for a in arrays]
    result = function(*tensors)
    cotangent = np.random.default_rng(0).uniform(0.5, 1.5, result.shape)
    result.backward(cotangent)
    for number, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        found = tensor.grad if tensor.grad is not None else np.zeros_like(array)
        if found.shape != array.shape:
            raise AssertionError(f"input {number} of shape {array.shape} got a gradient of shape {found.shape}")
        expected = _central_differences(function, arrays, number, cotangent, eps)
        wrong = ~(np.abs(found - expected) <= atol + rtol * np.abs(expected))
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"input {number} of shape {array.shape}, element {where}: backward gives {found[where]:.8g}, "
                f"central differences {expected[where]:.8g}; {wrong.sum()} of {wrong.size} elements differ"
            )


def _central_differences(
    function: Callable[..., Tensor], arrays: list[Array], number: int, cotangent: Array, eps: float
) -> Array:
    expected = np.empty_like(arrays[number])
    for where in np.ndindex(expected.shape):
        sides = []
        for step in (eps, -eps):
            moved = [a.copy() for a in arrays]
            moved[number][where] += step
            sides.append(float((function(*[Tensor(a) for a in moved]).data * cotangent).sum()))
        expected[where] = (sides[0] - sides[1]) / (2 * eps)
    return expected
