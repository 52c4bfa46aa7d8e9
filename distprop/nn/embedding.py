"""A table of vectors, one for each word, character or other thing that has a number."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.functional.check import integer
from distprop.nn import init
from distprop.nn.module import Module
from distprop.tensor import Operand, Parameter, Tensor


class Embedding(Module):
    """The row of `weight` `(num_embeddings, embedding_dim)` for each id of x; `(...)` becomes `(..., embedding_dim)`.

    The rows start from the standard normal distribution. The row `padding_idx` starts as zeros and gets no gradient.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        integer("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim, padding_idx=padding_idx or 0)
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"Embedding needs at least one row and column, got ({num_embeddings}, {embedding_dim})")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"Embedding got padding_idx {padding_idx} for a table of {num_embeddings} rows")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = init.normal_(Parameter(np.empty((num_embeddings, embedding_dim), dtype)))
        if self.padding_idx is not None:
            self.weight.data[self.padding_idx] = 0

    def forward(self, input: Operand) -> Tensor:
        """See `functional.embedding`."""
        return F.embedding(input, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        """The arguments."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
