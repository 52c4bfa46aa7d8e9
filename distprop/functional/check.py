"""Checks that several operations share: each raises before anything is computed and shows what it got."""

from __future__ import annotations

import operator

import numpy as np

from distprop.tensor import Operand, Tensor, as_tensor


def floating(operation: str, x: Tensor) -> None:
    """Raise TypeError unless `x` is floating point."""
    if x.data.dtype.kind != "f":
        raise TypeError(
            f"{operation} got a tensor of dtype {x.dtype}; it needs floating point: convert with .astype(np.float32)"
        )


def same_dtype(operation: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all are floating point of one dtype: a silent float64 halves the speed."""
    first, *others = tensors.values()
    floating(operation, first)
    for x in others:
        if x.dtype != first.dtype:
            found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
            raise TypeError(f"{operation} needs one floating-point dtype, got {found}; convert with .astype(...)")


def integer(operation: str, **numbers: int) -> None:
    """Raise TypeError unless all of them are integers."""
    for name, number in numbers.items():
        try:
            operator.index(number)
        except TypeError:
            raise TypeError(f"{operation}: {name} must be an integer, got {number!r}") from None


def real(operation: str, **numbers: float) -> None:
    """Raise TypeError unless all of them are numbers."""
    for name, number in numbers.items():
        if not isinstance(number, int | float | np.number):
            raise TypeError(f"{operation}: {name} must be a number, got {number!r}")


def affine_inputs(
    operation: str, input: Operand, weight: Operand | None, bias: Operand | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, γ and β as tensors of one floating-point dtype."""
    x = as_tensor(input)
    parameters = {name: as_tensor(p) for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    same_dtype(operation, x=x, **parameters)
    return x, parameters.get("weight"), parameters.get("bias")


def check_affine(operation: str, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise unless γ and β, where they are given, have the shape `shape`."""
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(
                f"{operation} of x of shape {x.shape} got a {name} of shape {parameter.shape}; it must be {shape}"
            )


def valid_axis(operation: str, dim: int, shape: tuple[int, ...]) -> int:
    """`dim` counted from the first axis; raise IndexError if there is none such."""
    if not -len(shape) <= dim < len(shape):
        raise IndexError(f"{operation} got dim {dim}, which is out of range for shape {shape}")
    return dim % len(shape)
