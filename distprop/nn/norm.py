"""Normalising layers. Batch norm comes in two kinds: over the examples of this rank, and over those of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from distprop import functional as F
from distprop.comm import Communicator, world
from distprop.functional.check import integer, real
from distprop.functional.norm import lengths
from distprop.nn.module import Module
from distprop.tensor import Operand, Parameter, Tensor, as_tensor


class _BatchNorm(Module):
    """What the batch norms share: γ = weight, β = bias, and the running estimates for `eval()`."""

    wanted: str = "(batch, channels, ...)"
    dimensions: tuple[int, ...] = ()
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        integer(type(self).__name__, num_features=num_features)
        if num_features < 1:
            raise ValueError(f"{type(self).__name__} needs at least one channel, got {num_features}")
        real(type(self).__name__, eps=eps, momentum=0.0 if momentum is None else momentum)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.weight = Parameter(np.ones(num_features, dtype)) if affine else None
        self.bias = Parameter(np.zeros(num_features, dtype)) if affine and bias else None
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.register_buffer("running_mean", np.zeros(num_features, dtype))
            self.register_buffer("running_var", np.ones(num_features, dtype))
            self.register_buffer("num_batches_tracked", np.array(0, np.int64))

    def forward(self, input: Operand) -> Tensor:
        """See `functional.batch_norm`."""
        return self._normalise(self._checked(input), None)

    def extra_repr(self) -> str:
        """The arguments, as PyTorch shows them."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _checked(self, x: Operand) -> Tensor:
        x = as_tensor(x)
        right = x.ndim in self.dimensions if self.dimensions else x.ndim >= 2
        if not right or x.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}({self.num_features}) got x of shape {x.shape}; "
                f"it must be {self.wanted} with {self.num_features} channels"
            )
        return x

    def _normalise(self, x: Tensor, comm: Communicator | None) -> Tensor:
        from_batch = self.training or not self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        share = self.momentum
        if share is None:  # the mean over all batches so far
            share = 1 / (int(self.num_batches_tracked) + 1) if self.track_running_stats else 0.0
        y = F.batch_norm(x, mean, var, self.weight, self.bias, from_batch, share, self.eps, comm=comm)
        if from_batch and self.track_running_stats and (comm is not None or len(x)):
            self.num_batches_tracked[...] += 1
        return y


class BatchNorm1d(_BatchNorm):
    """γ (x − mean)/√(var + ε) + β for each channel of x `(batch, channels)` or `(batch, channels, length)`.

    While training, mean and var are those of this rank's batch, and running estimates of them are kept; in `eval()`
    these are used. `momentum` is the new batch's share in them; None gives all batches the same share. An empty batch
    changes nothing.

    Under `DataParallel` each rank normalises with its own share of the batch, so the result depends on how many ranks
    there are, as in PyTorch; `SyncBatchNorm` uses the whole batch.
    """

    wanted = "(batch, channels) or (batch, channels, length)"
    dimensions = (2, 3)


class BatchNorm2d(_BatchNorm):
    """`BatchNorm1d` for images `(batch, channels, height, width)`; the memory layout of x is kept."""

    wanted = "(batch, channels, height, width)"
    dimensions = (4,)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the examples of all ranks, x being this rank's `(batch, channels, ...)`.

    N ranks get what one rank with the whole batch gets, to rounding, however the examples are shared out; a rank
    without examples calls it with an empty x. Each forward pass while training gathers the ranks' counts, means and
    squared deviations, 2 · channels + 1 float64 numbers a rank; each backward pass sums 2 · channels numbers. So all
    ranks must make the same passes through it in the same order.

    The backward pass needs gradients of the *sum* over all examples, which is what `DataParallel` makes: it multiplies
    the derivative of each rank's mean loss by the rank's number of examples (0 for a rank without) before the walk back
    and divides by the count of all afterwards. Then the terms that the ranks exchange, Σ g and Σ g x̂, are plain sums,
    exact for uneven shares. The gradients of weight and bias stay local, for `DataParallel` sums those.

    With gradient accumulation the statistics are those of one piece on all ranks, not of the whole batch.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: the new batch's share in the running estimates; None for the mean over all batches.
        affine: whether there are weight and bias.
        track_running_stats: whether running estimates are kept.
        comm: the ranks; `world()`, at the first use, by default.
        bias: False for a weight without a bias.
        dtype: of the parameters.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        comm: Communicator | None = None,
        *,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias, dtype=dtype)
        self.comm = comm

    def forward(self, input: Operand) -> Tensor:
        """See `functional.batch_norm`. Collective while training."""
        x = self._checked(input)
        if self.comm is None:
            self.comm = world()
        return self._normalise(x, self.comm)

    @staticmethod
    def convert_sync_batchnorm(module: Module, comm: Communicator | None = None) -> Module:
        """`module` with every batch norm in it replaced, in place, by one over all ranks of `comm`.

        The parameters, running estimates and modes are the old ones. If `module` itself is a batch norm, the result is
        a new module.
        """
        converted: dict[int, SyncBatchNorm] = {}  # one for a batch norm that stands in several places
        for part in list(module.modules()):
            if isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm):
                converted[id(part)] = SyncBatchNorm.__new__(SyncBatchNorm)
                vars(converted[id(part)]).update(vars(part), comm=comm)
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                vars(part)[name] = converted.get(id(child), child)
        return converted.get(id(module), module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy talks to the same ranks; a communicator cannot be copied."""
        memo[id(self.comm)] = self.comm
        memo[id(self)] = duplicate = type(self).__new__(type(self))
        vars(duplicate).update(copy.deepcopy(vars(self), memo))
        return duplicate


class LayerNorm(Module):
    """γ (x − mean)/√(var + ε) + β over the last axes of x `(..., *normalized_shape)`, each row by itself."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        real("LayerNorm", eps=eps)
        self.normalized_shape = _shape("LayerNorm", normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self.weight = Parameter(np.ones(self.normalized_shape, dtype)) if elementwise_affine else None
        self.bias = Parameter(np.zeros(self.normalized_shape, dtype)) if elementwise_affine and bias else None

    def forward(self, input: Operand) -> Tensor:
        """See `functional.layer_norm`."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """The arguments, as PyTorch shows them."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class RMSNorm(Module):
    """γ x/√(⟨x²⟩ + ε) over the last axes of x `(..., *normalized_shape)`; ε is the dtype's smallest step by default."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        real("RMSNorm", eps=0.0 if eps is None else eps)
        self.normalized_shape = _shape("RMSNorm", normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self.weight = Parameter(np.ones(self.normalized_shape, dtype)) if elementwise_affine else None

    def forward(self, x: Operand) -> Tensor:
        """See `functional.rms_norm`."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """The arguments, as PyTorch shows them."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class GroupNorm(Module):
    """γ (x − mean)/√(var + ε) + β over each group of channels of each example; x is `(batch, channels, ...)`."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        integer("GroupNorm", num_groups=num_groups, num_channels=num_channels)
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise ValueError(f"GroupNorm needs groups that divide the channels, got ({num_groups}, {num_channels})")
        real("GroupNorm", eps=eps)
        self.num_groups, self.num_channels, self.eps, self.affine = num_groups, num_channels, eps, affine
        self.weight = Parameter(np.ones(num_channels, dtype)) if affine else None
        self.bias = Parameter(np.zeros(num_channels, dtype)) if affine and bias else None

    def forward(self, input: Operand) -> Tensor:
        """See `functional.group_norm`."""
        x = as_tensor(input)
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            raise ValueError(
                f"GroupNorm({self.num_groups}, {self.num_channels}) got x of shape {x.shape}; "
                f"it must be (batch, {self.num_channels}, ...)"
            )
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """The arguments, as PyTorch shows them."""
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


def _shape(layer: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = lengths(normalized_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"{layer} needs axes of at least one entry each, got {shape}")
    return shape
