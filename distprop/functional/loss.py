"""Losses: what training makes small, and the gradient that backpropagation starts from.

`reduction` is "mean", "sum" or "none", as in PyTorch. A mean over no examples is 0 with zero gradients (PyTorch: nan),
so a rank without examples takes part in a step without a special case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from distprop.allocator import aligned_empty, aligned_like
from distprop.functional.activation import log1p_of
from distprop.functional.check import floating
from distprop.functional.pointwise import in_rows, row_sums
from distprop.pieces import in_pieces
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record, sigmoid_of

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def cross_entropy(
    input: Operand,
    target: Operand,
    weight: Operand | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """−Σ_c q_c log p_c, p being the softmax of the scores `input` over the classes and q the target distribution.

    Shapes: scores `(batch, classes)` or `(batch, classes, ...)`; target either integer labels `(batch, ...)` or
    probabilities of the scores' shape. Scores `(classes,)` with one label, or probabilities, are a single example.
    `label_smoothing` ε replaces q by (1 − ε) q + ε/classes. `weight` `(classes,)` weighs the classes; with labels the
    mean divides by the sum of their weights. Labels equal to `ignore_index` do not count.
    Derivative: p Σ_c q_c − q: the softmax's derivative and the logarithm's cancel, which is why they are one operation.

    Raises:
        IndexError: a label outside [0, classes).
        ValueError: shapes that do not fit together, or label_smoothing outside [0, 1].
    """
    x, y = as_tensor(input), _constant("cross_entropy", target)
    floating("cross_entropy", x)
    if x.ndim == 1 and y.shape == (x.shape if y.dtype.kind == "f" else ()):
        return cross_entropy(x.reshape(1, -1), y[None], weight, ignore_index, reduction, label_smoothing).reshape(())
    if x.ndim < 2:
        raise ValueError(f"cross_entropy needs scores of shape (batch, classes), got {x.shape}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is between 0 and 1, got {label_smoothing}")
    classes = x.shape[1]
    weights = None if weight is None else _class_weights(weight, classes, x.dtype)
    if y.dtype.kind != "f":
        _check_labels("cross_entropy", x, y, ignore_index)
        if weights is None and label_smoothing == 0 and x.ndim == 2 and not (y == ignore_index).any():
            return _cross_entropy_of_labels(x, y, reduction)
        q, count = _label_distribution(x, y, weights, ignore_index, label_smoothing)
    else:
        if y.shape != x.shape:
            raise ValueError(
                f"cross_entropy got target probabilities of shape {y.shape} for scores of shape {x.shape}; "
                "floating-point targets are probabilities, class labels must be integers"
            )
        q = (1 - label_smoothing) * y + label_smoothing / classes
        q, count = (q if weights is None else q * _along_classes(weights, x.ndim)).astype(x.dtype), x.data[:, 0].size
    log_p = _log_softmax(x.data)
    losses = _expected(q, log_p)

    def derivative(g: Array, d: Array) -> None:
        each = np.expand_dims(np.broadcast_to(g, losses.shape), 1)
        np.multiply(each, np.exp(log_p) * q.sum(axis=1, keepdims=True) - q, out=d)

    return _reduced(x, losses, derivative, reduction, count)


def nll_loss(
    input: Operand,
    target: Operand,
    weight: Operand | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """−w_y x_y: the negative log likelihood, given log probabilities `(batch, classes, ...)` and labels `(batch, ...)`.

    Log probabilities `(classes,)` with one label are a single example.
    Derivative: −w_y at the label, 0 elsewhere.
    """
    x, y = as_tensor(input), as_tensor(target).data
    floating("nll_loss", x)
    if x.ndim == 1 and y.ndim == 0:
        return nll_loss(x.reshape(1, -1), y[None], weight, ignore_index, reduction).reshape(())
    if x.ndim < 2:
        raise ValueError(f"nll_loss needs log probabilities of shape (batch, classes), got {x.shape}")
    _check_labels("nll_loss", x, y, ignore_index)
    counted = y != ignore_index
    at_label = (np.expand_dims(np.where(counted, y, 0), 1), 1)
    w = counted.astype(x.dtype)
    if weight is not None:
        w *= _class_weights(weight, x.shape[1], x.dtype)[at_label[0].squeeze(1)]
    chosen = np.take_along_axis(x.data, *at_label).squeeze(1)

    def derivative(g: Array, d: Array) -> None:
        d.fill(0)
        np.put_along_axis(d, at_label[0], np.expand_dims(g * -w, 1), 1)

    return _reduced(x, -np.where(w != 0, w * chosen, 0), derivative, reduction, float(w.sum()))


def mse_loss(input: Operand, target: Operand, reduction: Reduction = "mean") -> Tensor:
    """(x − y)², the mean over all elements. Derivative: 2(x − y), and the opposite for y."""
    return _difference("mse_loss", input, target, reduction, np.square, lambda d, out: np.multiply(d, 2, out=out))


def l1_loss(input: Operand, target: Operand, reduction: Reduction = "mean") -> Tensor:
    """|x − y|. Derivative: sign(x − y), and the opposite for y."""
    return _difference("l1_loss", input, target, reduction, np.abs, np.sign)


def huber_loss(input: Operand, target: Operand, reduction: Reduction = "mean", delta: float = 1.0) -> Tensor:
    """(x − y)²/2 where |x − y| ≤ δ, else δ(|x − y| − δ/2). Derivative: x − y, clipped to ±δ; for y the opposite.

    Source: Huber, 1964, "Robust estimation of a location parameter".
    """
    if delta <= 0:
        raise ValueError(f"huber_loss needs delta > 0, got {delta}")

    def derivative(d: Array, out: Array) -> None:
        np.clip(d, -delta, delta, out=out)

    def value(d: Array, out: Array) -> None:
        derivative(d, out)  # c; the loss is c (d − c/2)
        rest = np.multiply(out, -0.5, out=aligned_like(d))
        rest += d
        out *= rest

    return _difference("huber_loss", input, target, reduction, value, derivative)


def binary_cross_entropy_with_logits(
    input: Operand,
    target: Operand,
    weight: Operand | None = None,
    reduction: Reduction = "mean",
    pos_weight: Operand | None = None,
) -> Tensor:
    """−w [p_w y log σ(x) + (1 − y) log(1 − σ(x))], computed from log(1 + e^−x) so that it neither over- nor underflows.

    Shapes: x and y have the same; w = `weight` and p_w = `pos_weight` broadcast to it.
    Derivative: w [(1 − y) σ(x) − p_w y (1 − σ(x))], which is σ(x) − y without weights.

    Raises:
        ValueError: shapes that do not fit together.
    """
    x, labels = _pair("binary_cross_entropy_with_logits", input, target)
    y = _constant("binary_cross_entropy_with_logits", labels).astype(x.dtype, copy=False)
    w, positive = _weights("weight", weight, x), y * _weights("pos_weight", pos_weight, x)
    inputs = [_whole(array, x.shape) for array in (x.data, y, positive, w)]
    losses = np.empty(x.shape, x.dtype)

    def value(x: Array, y: Array, positive: Array, w: Array, out: Array) -> None:
        minus_log_p = np.clip(-x, 0, np.inf)  # −log σ(x); −log(1 − σ(x)) is x more
        minus_log_p += log1p_of(np.exp(-np.abs(x)))
        np.multiply(w, positive * minus_log_p + (1 - y) * (x + minus_log_p), out=out)

    def derivative(x: Array, y: Array, positive: Array, w: Array, g: Array, out: Array) -> None:
        s = sigmoid_of(x)
        np.multiply(g * w, (1 - y) * s - positive * (1 - s), out=out)

    in_pieces(value, *inputs, losses)
    return _reduced(
        x, losses, lambda g, d: in_pieces(derivative, *inputs, _whole(g, x.shape), d), reduction, x.data.size
    )


def _cross_entropy_of_labels(x: Tensor, labels: Array, reduction: Reduction) -> Tensor:
    """The common case without a one-hot array: the derivative is the softmax with 1 taken off at the label."""
    scores, rows = np.ascontiguousarray(x.data), np.arange(len(labels))
    e = np.empty_like(scores)
    largest, sums = np.empty((2, len(labels), 1), x.dtype)

    def value(x: Array, e: Array, largest: Array, sums: Array) -> None:
        np.max(x, axis=1, keepdims=True, out=largest)
        np.exp(x - largest, out=e)
        sums[...] = row_sums(e)

    def derivative(g: Array, d: Array) -> None:
        np.multiply(e, g.reshape(-1, 1) / sums, out=d)
        d[rows, labels] -= g

    in_rows(value, scores, e, largest, sums)
    losses = np.log(sums[:, 0]) + (largest[:, 0] - scores[rows, labels])
    return _reduced(x, losses, derivative, reduction, len(labels))


def _label_distribution(
    x: Tensor, labels: Array, weights: Array | None, ignore_index: int, smoothing: float
) -> tuple[Array, float]:
    """Labels as (weighted, smoothed) distributions of x's shape, and what a mean divides by."""
    classes = x.shape[1]
    counted = labels != ignore_index
    one_hot = np.moveaxis(np.eye(classes, dtype=x.dtype)[np.where(counted, labels, 0)], -1, 1)
    q = (1 - smoothing) * one_hot + smoothing / classes
    if weights is None:
        total = float(counted.sum())
    else:
        total = float(weights[labels[counted]].sum())
        q = q * _along_classes(weights, x.ndim)
    return (q * np.expand_dims(counted, 1)).astype(x.dtype), total


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _expected(q: Array, log_p: Array) -> Array:
    """−Σ_c q_c log p_c; a class that is impossible, log p = −∞, does not matter where q is 0."""
    return -np.multiply(q, log_p, out=np.zeros_like(log_p), where=q != 0).sum(axis=1)


def _check_labels(operation: str, x: Tensor, labels: Array, ignore_index: int) -> None:
    expected, classes = (x.shape[0], *x.shape[2:]), x.shape[1]
    if labels.shape != expected:
        raise ValueError(
            f"{operation} got labels of shape {labels.shape} for scores of shape {x.shape}; expected {expected}"
        )
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{operation} needs integer class labels, got dtype {labels.dtype}")
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        outside = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
        if outside.any():
            where = tuple(int(i) for i in np.argwhere(outside)[0])
            raise IndexError(
                f"{operation} got label {labels[where]} at position {', '.join(map(str, where))}; "
                f"with {classes} classes labels go from 0 to {classes - 1}"
            )


def _whole(array: Array, shape: tuple[int, ...]) -> Array:
    """`array` broadcast to `shape` and C-contiguous; a single number as it is."""
    return np.ascontiguousarray(np.broadcast_to(array, shape)) if array.ndim else array


def _weights(name: str, given: Operand | None, x: Tensor) -> Array:
    """One weight for all predictions x, or an array that broadcasts to them."""
    if given is None:
        return np.asarray(1, x.dtype)
    weights = as_tensor(given).data.astype(x.dtype, copy=False)
    try:
        np.broadcast_to(weights, x.shape)
    except ValueError:
        raise ValueError(f"{name} of shape {weights.shape} does not broadcast to predictions of {x.shape}") from None
    return weights


def _class_weights(weight: Operand, classes: int, dtype: np.dtype[np.floating]) -> Array:
    weights = as_tensor(weight).data.astype(dtype)
    if weights.shape != (classes,):
        raise ValueError(f"weight needs one number for each of the {classes} classes, got shape {weights.shape}")
    return weights


def _along_classes(weights: Array, ndim: int) -> Array:
    return weights.reshape(1, -1, *([1] * (ndim - 2)))


def _pair(operation: str, input: Operand, target: Operand) -> tuple[Tensor, Tensor]:
    x, y = as_tensor(input), as_tensor(target)
    floating(operation, x)
    if x.shape != y.shape:  # broadcasting (n, 1) against (n,) here is a well-known silent mistake
        raise ValueError(
            f"{operation} got predictions of shape {x.shape} and targets of shape {y.shape}; they must be equal, as "
            "y[:, None] makes (3, 1) of (3,)"
        )
    return x, y


def _constant(operation: str, target: Operand) -> Array:
    y = as_tensor(target)
    if y.requires_grad:
        raise ValueError(f"{operation}: the target must be a constant; detach() it")
    return y.data


def _difference(
    operation: str,
    input: Operand,
    target: Operand,
    reduction: Reduction,
    value: Callable[[Array, Array], Any],
    derivative: Callable[[Array, Array], Any],
) -> Tensor:
    """A loss of d = x − y: `value(d, out)` and `derivative(d, out)` write into `out`."""
    x, y = _pair(operation, input, target)
    d = np.subtract(x.data, y.data.astype(x.dtype, copy=False), out=aligned_empty(x.shape, x.dtype))
    losses = aligned_like(d)
    in_pieces(value, d, losses)

    def scaled(d: Array, g: Array, out: Array) -> None:
        derivative(d, out)
        out *= g

    if y.requires_grad:
        x = x - y  # d on the tape, which hands its gradient on to both
    return _reduced(x, losses, lambda g, out: in_pieces(scaled, d, _whole(g, x.shape), out), reduction, d.size)


def _reduced(
    x: Tensor,
    losses: Array,
    derivative: Callable[[Array, Array], Any],
    reduction: Reduction,
    count: float,
) -> Tensor:
    """Reduce `losses` and record the gradient, which `derivative(g, d)` writes into `d`, a C-contiguous array.

    g is the gradient of each loss, or a single number if they all have the same.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    scale = 1 / count if reduction == "mean" and count else 1.0
    value = losses if reduction == "none" else losses.sum() * np.asarray(scale, x.dtype)

    def vjp(grad: Array, out: Out) -> list[Array]:
        g = grad if reduction == "none" else np.asarray(grad * np.asarray(scale, x.dtype))
        d = out[0] if out[0] is not None and out[0].flags.c_contiguous else np.empty(x.shape, x.dtype)
        derivative(g, d)
        return [d]

    return record(value, (x,), vjp)
