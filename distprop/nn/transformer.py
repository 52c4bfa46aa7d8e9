"""The transformer's encoder: attention with several heads, and the layer around it.

Inside, the batch is always the first axis: dropout's masks belong to the examples, on whatever rank they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.functional.check import integer
from distprop.nn import init
from distprop.nn.layers import Dropout, Linear
from distprop.nn.module import Module
from distprop.nn.norm import LayerNorm
from distprop.tensor import Operand, Parameter, Tensor, as_tensor


class MultiheadAttention(Module):
    """Attention in `num_heads` subspaces at once: Concat(head_1 … head_h) Wₒᵀ, each head as
    `functional.scaled_dot_product_attention` of the projected queries, keys and values.

    Parameters, as in PyTorch: `in_proj_weight` `(3 embed_dim, embed_dim)`, the projections of queries, keys and values
    one above the other, `in_proj_bias` `(3 embed_dim,)`, `out_proj.weight`, `out_proj.bias`. Where keys have another
    width `kdim`, or values `vdim`, there are `q_proj_weight` `(embed_dim, embed_dim)`, `k_proj_weight` `(embed_dim,
    kdim)` and `v_proj_weight` `(embed_dim, vdim)` instead of the first.

    `add_bias_kv` has every query look at one more key and value, `bias_k` and `bias_v`, `(1, 1, embed_dim)`, behind the
    others, and `add_zero_attn` at one more that are 0, behind those. No mask hides them.

    The weights cost time and memory: pass `need_weights=False` where they are not looked at.

    Source: Vaswani et al., 2017, arXiv:1706.03762.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        integer("MultiheadAttention", embed_dim=embed_dim, num_heads=num_heads)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"MultiheadAttention got embed_dim {embed_dim}; {num_heads} heads do not divide it")
        if not 0 <= dropout <= 1:
            raise ValueError(f"MultiheadAttention needs a dropout between 0 and 1, got {dropout}")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = embed_dim, num_heads, dropout, batch_first
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        if min(self.kdim, self.vdim) < 1:
            raise ValueError(f"MultiheadAttention needs a kdim and a vdim of at least 1, got {kdim} and {vdim}")
        self.add_zero_attn = add_zero_attn

        def projection(rows: int, columns: int) -> Parameter:
            return init.xavier_uniform_(Parameter(np.empty((rows, columns), dtype)))

        self.in_proj_weight = None
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = projection(3 * embed_dim, embed_dim)
        else:
            self.q_proj_weight = projection(embed_dim, embed_dim)
            self.k_proj_weight = projection(embed_dim, self.kdim)
            self.v_proj_weight = projection(embed_dim, self.vdim)
        self.in_proj_bias = Parameter(np.zeros(3 * embed_dim, dtype)) if bias else None
        self.bias_k, self.bias_v = (
            init.xavier_normal_(Parameter(np.empty((1, 1, embed_dim), dtype))) if add_bias_kv else None
            for _ in range(2)
        )
        self.out_proj = Linear(embed_dim, embed_dim, bias, dtype=dtype)
        if self.out_proj.bias is not None:
            init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Operand,
        key: Operand,
        value: Operand,
        key_padding_mask: Operand | None = None,
        need_weights: bool = True,
        attn_mask: Operand | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, of the query's shape, and with `need_weights` the attention weights, otherwise None.

        Shapes: query `(steps, batch, embed_dim)`, or `(batch, steps, embed_dim)` with `batch_first`, or without a batch
        `(steps, embed_dim)`; key and value likewise, with a number of steps and widths of their own. `key_padding_mask`
        `(batch, key steps)`; `attn_mask` `(query steps, key steps)` or `(batch · heads, query steps, key steps)`.
        Weights `(batch, query steps, key steps)`, the mean over the heads, or `(batch, heads, ...)` of each.

        In masks, as in PyTorch, True is where *not* to look, the opposite of `scaled_dot_product_attention`; numbers
        are added to the scores. `is_causal` needs no mask, unlike in PyTorch, and holds in addition to one.
        """
        q, k, v = as_tensor(query), as_tensor(key), as_tensor(value)
        self._check(q, k, v)
        batched = q.ndim == 3
        views = {id(x): self._batch_first(x) for x in (q, k, v)}  # what is one tensor stays one
        q, k, v = (self._heads(x) for x in self._project(*(views[id(x)] for x in (q, k, v))))
        mask = self._mask(q, k, key_padding_mask, attn_mask, batched)
        if self.bias_k is not None or self.add_zero_attn:
            if is_causal:
                mask, is_causal = _causal(mask, q.shape[2], k.shape[2]), False
            k, v, mask = self._with_more(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:  # attention to the unit vectors
            units = np.broadcast_to(np.eye(k.shape[2], dtype=k.dtype), (*k.shape[:3], k.shape[2]))
            weights = F.scaled_dot_product_attention(q, k, units, mask, dropout, is_causal)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)  # (batch, heads, steps, width)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, in as few products as possible."""
        width, bias, weight = self.embed_dim, self.in_proj_bias, self.in_proj_weight
        if weight is None:
            own = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = [None] * 3 if bias is None else F.split(bias, width)
            return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), own, biases, strict=True))
        if q is k and k is v:
            return F.split(F.linear(q, weight, bias), width, dim=-1)
        sections = [width, 2 * width] if k is v else [width] * 3
        weights = F.split(weight, sections)
        biases = [None] * 3 if bias is None else F.split(bias, sections)
        if k is v:
            both = F.linear(k, weights[1], biases[1])
            return F.linear(q, weights[0], biases[0]), *F.split(both, width, dim=-1)
        return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=False))

    def _with_more(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those that are always looked at behind them; `(batch, heads, steps, width)`."""
        before = k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            each = np.zeros((k.shape[0], 1, self.embed_dim), k.dtype)  # a batch of them
            k = F.concatenate([k, self._heads(self.bias_k + each)], 2)
            v = F.concatenate([v, self._heads(self.bias_v + each)], 2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - before), value=mask.dtype == np.bool_)
        return k, v, mask

    def _heads(self, x: Tensor) -> Tensor:
        """`(batch, steps, embed_dim)` as `(batch, heads, steps, width)`, without a copy."""
        return x.reshape(*x.shape[:2], self.num_heads, self.embed_dim // self.num_heads).transpose(1, 2)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x.reshape(1, *x.shape)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self, q: Tensor, k: Tensor, key_padding_mask: Operand | None, attn_mask: Operand | None, batched: bool
    ) -> Tensor | None:
        """Both masks in one that broadcasts to `(batch, heads, queries, keys)`, True where to look."""
        (batch, heads, queries, _), keys = q.shape, k.shape[2]
        masks = []
        if attn_mask is not None:
            mask = as_tensor(attn_mask)
            each, one = (batch * heads, queries, keys), (queries, keys)
            if mask.shape not in (each, one):
                raise ValueError(
                    f"MultiheadAttention got an attn_mask of shape {mask.shape}; "
                    f"it must be (queries, keys) = {one} or (batch · heads, queries, keys) = {each}"
                )
            masks.append(mask.reshape(batch, heads, queries, keys) if mask.shape == each else mask)
        if key_padding_mask is not None:
            mask = as_tensor(key_padding_mask)
            wanted = (batch, keys) if batched else (keys,)
            if mask.shape != wanted:
                raise ValueError(
                    f"MultiheadAttention got a key_padding_mask of shape {mask.shape}; "
                    f"it must be {'(batch, keys)' if batched else '(keys,)'} = {wanted}"
                )
            masks.append(mask.reshape(batch, 1, 1, keys))
        if not masks:
            return None
        if all(mask.dtype == np.bool_ for mask in masks):
            return Tensor(~(masks[0].data | masks[-1].data))
        numbers = [_as_numbers(mask, q.dtype) for mask in masks]
        return numbers[0] if len(numbers) == 1 else numbers[0] + numbers[1]

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        time = 1 if self.batch_first else 0
        widths = (self.embed_dim, self.kdim, self.vdim)
        right = q.ndim == k.ndim == v.ndim and q.ndim in (2, 3)
        right = right and (q.shape[-1], k.shape[-1], v.shape[-1]) == widths and k.shape[:-1] == v.shape[:-1]
        if not right or (q.ndim == 3 and q.shape[1 - time] != k.shape[1 - time]):
            order = "batch, steps" if self.batch_first else "steps, batch"
            width = str(self.embed_dim) if self.in_proj_weight is not None else f"one of {widths}"
            raise ValueError(
                f"MultiheadAttention({self.embed_dim}, {self.num_heads}) got query {q.shape}, key {k.shape}, value "
                f"{v.shape}; each must be ({order}, {width}) or (steps, {width}), key and value alike"
            )


class TransformerEncoderLayer(Module):
    """Attention of a sequence to itself, then two linear layers on each step, each with a residual and a layer norm.

    x + f(x) is normalised afterwards; with `norm_first` it is x + f(norm(x)), which trains deep stacks without warm-up.
    `activation` is "relu", "gelu" or a function. Parameter names as in PyTorch: `self_attn.*`, `linear1`, `linear2`,
    `norm1`, `norm2`.

    Sources: Vaswani et al., 2017, arXiv:1706.03762; `norm_first`: Xiong et al., 2020, arXiv:2002.04745.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        if isinstance(activation, str):
            if activation not in ("relu", "gelu"):
                raise ValueError(f'activation must be "relu", "gelu" or a function, got {activation!r}')
            activation = F.relu if activation == "relu" else F.gelu
        self.d_model, self.batch_first, self.norm_first, self.activation = d_model, batch_first, norm_first, activation
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=True, dtype=dtype)
        self.linear1 = Linear(d_model, dim_feedforward, bias, dtype=dtype)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, dtype=dtype)
        self.norm1 = LayerNorm(d_model, layer_norm_eps, bias=bias, dtype=dtype)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, bias=bias, dtype=dtype)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)

    def forward(
        self,
        src: Operand,
        src_mask: Operand | None = None,
        src_key_padding_mask: Operand | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The sequences, of the shape they came in.

        `(steps, batch, d_model)`, or `(batch, steps, d_model)` with `batch_first`, or `(steps, d_model)`. The masks are
        those of `MultiheadAttention`.
        """
        x = as_tensor(src)
        if x.ndim not in (2, 3) or x.shape[-1] != self.d_model:
            order = "batch, steps" if self.batch_first else "steps, batch"
            raise ValueError(
                f"TransformerEncoderLayer got src of shape {x.shape}; "
                f"it must be ({order}, {self.d_model}) or (steps, {self.d_model})"
            )
        if x.ndim == 2:
            padding = None if src_key_padding_mask is None else as_tensor(src_key_padding_mask)
            if padding is not None:
                if padding.shape != x.shape[:1]:
                    raise ValueError(
                        f"TransformerEncoderLayer got a src_key_padding_mask of shape {padding.shape} for src of shape "
                        f"{x.shape}; it must be (steps,) = {x.shape[:1]}"
                    )
                padding = padding.reshape(1, *padding.shape)
            return self._layer(x.reshape(1, *x.shape), src_mask, padding, is_causal)[0]
        if self.batch_first:
            return self._layer(x, src_mask, src_key_padding_mask, is_causal)
        return self._layer(x.transpose(0, 1), src_mask, src_key_padding_mask, is_causal).transpose(0, 1)

    def _layer(self, x: Tensor, mask: Operand | None, padding: Operand | None, is_causal: bool) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            output, _ = self.self_attn(x, x, x, padding, need_weights=False, attn_mask=mask, is_causal=is_causal)
            return self.dropout1(output)

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + feed_forward(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + feed_forward(x))


def _causal(mask: Tensor | None, queries: int, keys: int) -> Tensor:
    """`mask`, True where to look or numbers to add, and no query looks at keys behind its own step."""
    seen = np.tril(np.ones((queries, keys), np.bool_))
    if mask is None or mask.dtype == np.bool_:
        return Tensor(seen if mask is None else mask.data & seen)
    return mask + np.where(seen, 0, -np.inf).astype(mask.dtype)


def _as_numbers(mask: Tensor, dtype: DTypeLike) -> Tensor:
    """A mask that is added to scores: −∞ where a boolean one says not to look."""
    if mask.dtype == np.bool_:
        return Tensor(np.where(mask.data, -np.inf, 0).astype(dtype))
    if mask.dtype != dtype:
        raise TypeError(f"MultiheadAttention got a mask of dtype {mask.dtype}; it must be boolean or {dtype}")
    return mask
