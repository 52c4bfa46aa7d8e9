"""Attention: each query reads a mixture of the values, weighed by how well the query matches their keys.

Everything but the scores is small, so the division by the softmax's denominator and its derivative are applied to the
outputs, and the scores are passed over as few times as possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from distprop.functional.check import same_dtype
from distprop.functional.dropout import check_probability, dropout_scale
from distprop.functional.embedding import take
from distprop.tape import Array, Out, sum_to
from distprop.tensor import Operand, Tensor, as_tensor, record

_BLOCK = 131072  # scores; the second-level cache holds them
_SAFE = 40.0  # e^±40 and sums of it are normal numbers in float32, so smaller scores need no shift before exp


def scaled_dot_product_attention(
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """O = P V, where P is the softmax of the scores S = s Q Kᵀ + mask over the keys; s = 1/√E by default.

    Shapes: Q `(..., L, E)`, K `(..., S, E)`, V `(..., S, Ev)`, O `(..., L, Ev)`, for instance with
    `(batch, heads)` in front. `attn_mask` broadcasts to `(..., L, S)`: True where a query may look, or floating-point
    numbers that are added to the scores. `is_causal` lets query i look at the keys 0 to i only; with a mask, both
    hold (PyTorch refuses that). A query that may look nowhere gets 0. `dropout_p` zeroes weights whenever it is not 0,
    with the masks of `dropout`: the first axis is the batch. With `enable_gqa` K and V may have fewer heads, the axis
    before the last two, each for several neighbouring heads of Q (grouped queries: Ainslie et al., 2023,
    arXiv:2305.13245).

    Derivative: dV = Pᵀ g, dS = P ⊙ (g Vᵀ − Σ g ⊙ O), the sum over a query's outputs, dQ = s dS K, dK = s dSᵀ Q;
    the mask's, if it needs one, is dS. Sources: Vaswani et al., 2017, arXiv:1706.03762; Σ g ⊙ O instead of
    Σ P ⊙ (g Vᵀ): Dao et al., 2022, arXiv:2205.14135.

    Raises:
        ValueError: shapes that do not fit, a mask that does not broadcast, dropout_p outside [0, 1].
        TypeError: the dtypes differ, or the mask is neither boolean nor of the queries' dtype.
    """
    q, k, v = as_tensor(query), as_tensor(key), as_tensor(value)
    if enable_gqa:
        k, v = _for_all_heads(q, k), _for_all_heads(q, v)
    _check_inputs(q, k, v)
    check_probability("scaled_dot_product_attention", dropout_p)
    shape = (*q.shape[:-1], k.shape[-2])
    mask = None if attn_mask is None else as_tensor(attn_mask)
    allowed, added = _mask(mask, is_causal, shape, q)
    factor = q.dtype.type(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scaled = q.data * factor
    kept = dropout_scale(shape, dropout_p, q.dtype) if dropout_p else None
    exps, denominators = np.empty(shape, q.dtype), np.empty((*shape[:-1], 1), q.dtype)  # P = exps/denominators
    outputs = np.empty_like(q.data, shape=(*q.shape[:-1], v.shape[-1]))  # in the memory order of the queries
    for part in _blocks(shape):
        e = np.matmul(scaled[part], _transposed(k.data[part]), out=exps[part])
        _exponentiate(e, _part(allowed, part, shape), _part(added, part, shape))
        d = np.matmul(e, np.ones((shape[-1], 1), q.dtype), out=denominators[part])
        d[d == 0] = 1
        o = np.matmul(e if kept is None else e * kept[part], v.data[part], out=outputs[part])
        o /= d

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        dq, dk, dv = (np.empty_like(t.data) if t.requires_grad else None for t in (q, k, v))
        dmask = np.empty(shape, q.dtype) if mask is not None and mask.requires_grad else None
        for part in _blocks(shape):
            g = grad[part] / denominators[part]
            e = exps[part]
            if dv is not None:
                np.matmul(np.swapaxes(e if kept is None else e * kept[part], -1, -2), g, out=dv[part])
            if dq is None and dk is None and dmask is None:
                continue
            ds = g @ _transposed(v.data[part])
            if kept is not None:
                ds *= kept[part]
            ds -= np.vecdot(g, outputs[part])[..., None]
            ds *= e
            if dq is not None:
                np.matmul(ds, k.data[part], out=dq[part])
                dq[part] *= factor
            if dk is not None:
                np.matmul(np.swapaxes(ds, -1, -2), scaled[part], out=dk[part])
            if dmask is not None:
                dmask[part] = ds
        masks = [] if mask is None else [None if dmask is None else sum_to(dmask, mask.shape)]
        return [dq, dk, dv, *masks]

    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    return record(outputs, inputs, vjp)


def _for_all_heads(q: Tensor, shared: Tensor) -> Tensor:
    """Keys or values with each head repeated for the neighbouring heads of the queries that share it."""
    heads = [tensor.shape[-3] if tensor.ndim > 2 else 0 for tensor in (q, shared)]
    if not heads[1] or heads[0] % heads[1]:
        raise ValueError(
            f"scaled_dot_product_attention got query {q.shape} and key or value {shared.shape}; with enable_gqa the "
            "heads, the axis before the last two, must be several for each one of the keys"
        )
    return take(shared, np.repeat(np.arange(heads[1]), heads[0] // heads[1]), dim=-3)


def _transposed(matrices: Array) -> Array:
    """A copy with the last two axes exchanged; with the copy a product of 64 x 32 by 32 x 64 takes 0.65 of the time."""
    return np.ascontiguousarray(np.swapaxes(matrices, -1, -2))


def _exponentiate(scores: Array, allowed: Array | None, added: Array | None) -> None:
    """exp(scores) in place, divided by the largest of each query where that is needed; 0 where not allowed."""
    if added is not None:
        scores += added
    needs_shift = scores.size and not (scores.max() <= _SAFE and scores.min() >= -_SAFE)  # or there are NaNs
    if needs_shift:
        if allowed is not None:
            np.copyto(scores, -np.inf, where=allowed == 0)
        largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        largest[largest == -np.inf] = 0
        scores -= largest
    np.exp(scores, out=scores)
    if allowed is not None and not needs_shift:
        scores *= allowed


def _mask(mask: Tensor | None, is_causal: bool, shape: tuple[int, ...], q: Tensor) -> tuple[Array | None, Array | None]:
    """What scores are multiplied with after exp, 0 or 1, and what is added to them before."""
    causal = np.tri(*shape[-2:], dtype=q.dtype) if is_causal else None
    if mask is None:
        return causal, None
    try:
        fits = np.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"scaled_dot_product_attention got a mask of shape {mask.shape}; "
            f"it must broadcast to (..., queries, keys), here {shape}"
        )
    if mask.dtype == q.dtype:
        return causal, mask.data
    if mask.dtype != np.bool_:
        raise TypeError(
            f"scaled_dot_product_attention got a mask of dtype {mask.dtype}; "
            f"it must be boolean, or {q.dtype} as the queries are"
        )
    allowed = mask.data.astype(q.dtype)
    return allowed if causal is None else allowed * causal, None


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis; all of it if that is the queries'."""
    if len(shape) == 2:
        return iter([slice(None)])
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _part(mask: Array | None, part: slice, shape: tuple[int, ...]) -> Array | None:
    """The mask of a block of the first axis."""
    return mask[part] if mask is not None and mask.ndim == len(shape) and mask.shape[0] > 1 else mask


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    same_dtype("scaled_dot_product_attention", query=q, key=k, value=v)
    if (
        q.ndim < 2
        or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        or q.shape[-1] != k.shape[-1]
        or k.shape[-2:-1] != v.shape[-2:-1]
    ):
        raise ValueError(
            f"scaled_dot_product_attention got query {q.shape}, key {k.shape}, value {v.shape}; "
            "it needs (..., L, E), (..., S, E) and (..., S, Ev)"
        )
