"""Every operation, forward and backward, beside PyTorch's on one thread and beside a plain copy of what it touches.

A copy of inputs and outputs is what moving the data costs; an operation that takes a small multiple of it is bound by
memory, and the rest is arithmetic or overhead. Images come contiguous and channels-last, to both, and for each the
faster one counts. PyTorch's names and arguments being ours, one function of `(functional, *inputs)` says what to do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from distprop import functional as F
from distprop.tape import Array
from distprop.tensor import Tensor

NEAR, LIMIT = 1.6, 2.0  # times PyTorch's time

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operation and the shapes of its differentiable inputs.

    `ours` is called with `distprop.functional`, the inputs and the constants; so is `theirs`, with
    `torch.nn.functional`, or if it is None, `ours` again.
    """

    name: str
    shapes: Sequence[tuple[int, ...]]
    ours: Operation
    theirs: Operation | None = None
    constants: Sequence[Array] = ()
    images: bool = False  # to be timed in both memory orders
    positive: bool = False  # inputs from 1/2 on, for what has no value below 0


@dataclass(frozen=True)
class OperationTimes:
    """Medians in seconds; those of PyTorch are None where it is not installed."""

    name: str
    megabytes: float  # of inputs and outputs
    forward: float
    backward: float
    copy: float
    torch_forward: float | None
    torch_backward: float | None

    @property
    def ratio(self) -> float | None:
        """Forward and backward over PyTorch's."""
        if self.torch_forward is None or self.torch_backward is None:
            return None
        return (self.forward + self.backward) / (self.torch_forward + self.torch_backward)


def bench_ops(names: Sequence[str] = (), repeats: int = 15) -> Iterator[OperationTimes]:
    """Time the operations whose name contains one of `names`, or all of them."""
    torch = _torch()
    for case in cases():
        if names and not any(name in case.name for name in names):
            continue
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=shape).astype(np.float32) for shape in case.shapes]
        arrays = [np.abs(array) + np.float32(0.5) for array in arrays] if case.positive else arrays
        value = case.ours(F, *map(Tensor, arrays), *case.constants).data
        grad = np.asarray(rng.normal(size=value.shape), value.dtype)
        ours, theirs = [], []
        for layout in (_contiguous, _channels_last) if case.images else (_contiguous,):
            *inputs, seed = (layout(array) for array in (*arrays, grad))
            leaves: list[Any] = [Tensor(array, requires_grad=True) for array in inputs]
            ours.append(partial(_times, partial(case.ours, F, *leaves, *case.constants), leaves, seed))
            if torch is not None:
                call = partial(case.theirs or case.ours, torch.nn.functional)
                leaves = [torch.from_numpy(array).requires_grad_() for array in inputs]
                call = partial(call, *leaves, *map(torch.from_numpy, case.constants))
                theirs.append(partial(_times, call, leaves, torch.from_numpy(seed)))
        copy = partial(_copy_times, (*arrays, value))
        runs: list[Callable[[], tuple[float, ...]]] = [copy, *ours, *theirs]
        turns = [[run() for run in runs] for _ in range(repeats + 2)][2:]  # the first two warm up
        medians = [tuple(map(statistics.median, zip(*times, strict=True))) for times in zip(*turns, strict=True)]
        forward, backward = min(medians[1 : 1 + len(ours)], key=sum)
        torch_forward, torch_backward = min(medians[1 + len(ours) :], key=sum, default=(None, None))
        megabytes = sum(array.nbytes for array in (*arrays, value)) / 1e6
        yield OperationTimes(case.name, megabytes, forward, backward, medians[0][0], torch_forward, torch_backward)


def show(times: OperationTimes) -> str:
    """One line of the table."""
    line = f"{times.name:<33}{times.megabytes:6.1f} {times.forward * 1e3:8.3f} {times.backward * 1e3:8.3f}"
    line += f" {times.copy * 1e3:8.3f}"
    if times.torch_forward is not None and times.torch_backward is not None and times.ratio is not None:
        line += f" {times.torch_forward * 1e3:8.3f} {times.torch_backward * 1e3:8.3f} {times.ratio:6.2f}"
        line += "  over 2" if times.ratio > LIMIT else "  near 2" if times.ratio > NEAR else ""
    return line


def summary(table: Sequence[OperationTimes]) -> str:
    """The closing line: which operations come near twice PyTorch's time, and which take more."""
    ratios = sorted(((times.ratio, times.name) for times in table if times.ratio is not None), reverse=True)
    if not ratios:
        return f"{len(table)} operations; PyTorch is not installed"
    over = [f"{name} ({ratio:.2f})" for ratio, name in ratios if ratio > LIMIT]
    near = [f"{name} ({ratio:.2f})" for ratio, name in ratios if LIMIT >= ratio > NEAR]
    middle = statistics.median(ratio for ratio, _ in ratios)
    return (
        f"{len(ratios)} operations, half of them in less than {middle:.2f} times PyTorch's time\n"
        f"more than {LIMIT:g} times: {', '.join(over) or 'none'}\n"
        f"near it, more than {NEAR:g} times: {', '.join(near) or 'none'}"
    )


HEADER = (
    f"{'operation, ms':<33}{'MB':>6}{'forward':>9}{'backward':>9}{'copy':>9}{'PyTorch':>9}{'backward':>9}{'ratio':>7}"
)


def _times(forward: Callable[[], Any], leaves: Sequence[Any], grad: Any) -> tuple[float, float]:
    for leaf in leaves:
        leaf.grad = None
    began = time.perf_counter()
    value = forward()
    middle = time.perf_counter()
    value.backward(grad)
    return middle - began, time.perf_counter() - middle


def _copy_times(arrays: Sequence[Array]) -> tuple[float]:
    began = time.perf_counter()
    for array in arrays:
        array.copy()
    return (time.perf_counter() - began,)


def _contiguous(array: Array) -> Array:
    return array


def _channels_last(array: Array) -> Array:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if array.ndim == 4 else array


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    return torch


_LARGE = (1024, 1024)  # 4 MB
_IMAGES = (64, 32, 28, 28)  # 6 MB


def cases() -> list[Case]:
    """The table: an operation is one row."""
    images = (replace(case, images=True) for case in _image_cases())
    return [*_pointwise_cases(), *_loss_cases(), *images, *_sequence_cases(), *_shape_cases(), *_tensor_cases()]


def _pointwise_cases() -> list[Case]:
    same = ("relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "softplus")
    return [
        *(Case(name, [_LARGE], lambda f, x, name=name: getattr(f, name)(x)) for name in same),
        Case("gelu tanh", [_LARGE], lambda f, x: f.gelu(x, approximate="tanh")),
        Case("softmax", [_LARGE], lambda f, x: f.softmax(x, dim=-1)),
        Case("log_softmax", [_LARGE], lambda f, x: f.log_softmax(x, dim=-1)),
        Case("dropout", [_LARGE], lambda f, x: f.dropout(x, 0.1)),
        Case("linear", [(512, 1024), (1024, 1024), (1024,)], lambda f, x, w, b: f.linear(x, w, b)),
    ]


def _loss_cases() -> list[Case]:
    rng = np.random.default_rng(1)
    target = rng.uniform(size=_LARGE).astype(np.float32)
    labels = rng.integers(0, 1000, 1024)
    names = ("mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
    return [
        *(Case(name, [_LARGE], lambda f, x, y, name=name: getattr(f, name)(x, y), None, [target]) for name in names),
        Case("cross_entropy", [(1024, 1000)], lambda f, x, y: f.cross_entropy(x, y), None, [labels]),
        Case("nll_loss", [(1024, 1000)], lambda f, x, y: f.nll_loss(x, y), None, [labels]),
    ]


def _image_cases() -> list[Case]:
    small, strided = (64, 32, 14, 14), (128, 32, 16, 16)
    channels, bias = (32,), (64,)
    return [
        Case("conv2d 3x3", [small, (64, 32, 3, 3), bias], lambda f, x, w, b: f.conv2d(x, w, b, padding=1)),
        Case(
            "conv2d 3x3 stride 2",
            [strided, (64, 32, 3, 3), bias],
            lambda f, x, w, b: f.conv2d(x, w, b, stride=2, padding=1),
        ),
        Case("conv2d 1x1", [_IMAGES, (64, 32, 1, 1), bias], lambda f, x, w, b: f.conv2d(x, w, b)),
        Case(
            "conv2d 3x3 in 4 groups",
            [_IMAGES, (64, 8, 3, 3), bias],
            lambda f, x, w, b: f.conv2d(x, w, b, padding=1, groups=4),
        ),
        Case(
            "conv2d 3x3 depthwise",
            [_IMAGES, (32, 1, 3, 3), (32,)],
            lambda f, x, w, b: f.conv2d(x, w, b, padding=1, groups=32),
        ),
        Case(
            "conv2d 3x3 depthwise stride 2",
            [_IMAGES, (32, 1, 3, 3), (32,)],
            lambda f, x, w, b: f.conv2d(x, w, b, stride=2, padding=1, groups=32),
        ),
        Case("conv1d", [(64, 32, 256), (64, 32, 5), bias], lambda f, x, w, b: f.conv1d(x, w, b)),
        Case(
            "conv1d depthwise",
            [(64, 128, 128), (128, 1, 5), (128,)],
            lambda f, x, w, b: f.conv1d(x, w, b, padding=2, groups=128),
        ),
        Case(
            "conv_transpose2d",
            [small, (32, 16, 4, 4), (16,)],
            lambda f, x, w, b: f.conv_transpose2d(x, w, b, stride=2, padding=1),
        ),
        Case("max_pool2d", [_IMAGES], lambda f, x: f.max_pool2d(x, 2)),
        Case("max_pool2d 3x3 stride 2", [_IMAGES], lambda f, x: f.max_pool2d(x, 3, stride=2, padding=1)),
        Case("max_pool2d 3x3 stride 1", [_IMAGES], lambda f, x: f.max_pool2d(x, 3, stride=1, padding=1)),
        Case("avg_pool2d", [_IMAGES], lambda f, x: f.avg_pool2d(x, 2)),
        Case("avg_pool2d 3x3 stride 2", [_IMAGES], lambda f, x: f.avg_pool2d(x, 3, stride=2, padding=1)),
        Case("avg_pool2d 3x3 stride 1", [_IMAGES], lambda f, x: f.avg_pool2d(x, 3, stride=1, padding=1)),
        Case("adaptive_avg_pool2d to 1", [_IMAGES], lambda f, x: f.adaptive_avg_pool2d(x, 1)),
        Case("adaptive_avg_pool2d to 7", [_IMAGES], lambda f, x: f.adaptive_avg_pool2d(x, 7)),
        Case(
            "batch_norm",
            [_IMAGES, channels, channels],
            lambda f, x, w, b: f.batch_norm(x, None, None, w, b, training=True),
        ),
        Case(
            "batch_norm in eval mode",
            [_IMAGES, channels, channels],
            lambda f, x, w, b, mean, var: f.batch_norm(x, mean, var, w, b),
            None,
            [np.zeros(channels, np.float32), np.ones(channels, np.float32)],
        ),
        Case("group_norm", [_IMAGES, channels, channels], lambda f, x, w, b: f.group_norm(x, 8, w, b)),
    ]


def _sequence_cases() -> list[Case]:
    rng = np.random.default_rng(2)
    heads = (12, 8, 128, 32)
    ids, few = rng.integers(0, 5000, (64, 128)), rng.integers(0, 65, (64, 128))
    mask = np.where(rng.uniform(size=(128, 128)) < 0.9, 0, -1e9).astype(np.float32)
    names = (("rnn", 1), ("lstm", 4), ("gru", 3))
    tokens, width, wide = (8192, 128), (128,), (768,)
    return [
        Case("layer_norm", [tokens, width, width], lambda f, x, w, b: f.layer_norm(x, width, w, b)),
        Case("layer_norm of 768", [(1024, 768), wide, wide], lambda f, x, w, b: f.layer_norm(x, wide, w, b)),
        Case("rms_norm", [tokens, width], lambda f, x, w: f.rms_norm(x, width, w)),
        Case(
            "batch_norm of rows",
            [tokens, width, width],
            lambda f, x, w, b: f.batch_norm(x, None, None, w, b, training=True),
        ),
        *(Case(name, _recurrent_shapes(name, gates), *_recurrent(name)) for name, gates in names),
        Case("embedding", [(5000, 128)], lambda f, w, ids: f.embedding(ids, w), None, [ids]),
        Case("embedding of 65", [(65, 128)], lambda f, w, ids: f.embedding(ids, w), None, [few]),
        Case("attention", [heads] * 3, lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v)),
        Case(
            "attention causal", [heads] * 3, lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True)
        ),
        Case(
            "attention with a mask",
            [heads] * 3,
            lambda f, q, k, v, mask: f.scaled_dot_product_attention(q, k, v, mask),
            None,
            [mask],
        ),
    ]


def _recurrent_shapes(name: str, gates: int) -> list[tuple[int, ...]]:
    """64 steps of 32 sequences, 128 wide: x, the states and the parameters."""
    states = [(32, 128)] * (2 if name == "lstm" else 1)
    return [(64, 32, 128), *states, (gates * 128, 128), (gates * 128, 128), (gates * 128,), (gates * 128,)]


def _recurrent(name: str) -> tuple[Operation, Operation]:
    """One layer in one direction, without the cell that an LSTM returns; for PyTorch a state is of one layer."""

    def ours(functional: Any, *inputs: Any) -> Any:
        result = getattr(functional, name)(*inputs)
        return result[0] if name == "lstm" else result

    def theirs(functional: Any, x: Any, *inputs: Any) -> Any:
        states = [h[None] for h in inputs[:-4]]
        function = getattr(_torch(), "rnn_tanh" if name == "rnn" else name)
        return function(x, states if name == "lstm" else states[0], inputs[-4:], True, 1, 0.0, True, False, False)[0]

    return ours, theirs


def _shape_cases() -> list[Case]:
    rng = np.random.default_rng(3)
    half = (512, 1024)
    chosen, numbers = rng.uniform(size=_LARGE) < 0.5, rng.integers(0, 1024, 1024)
    torch = _torch()
    return [
        Case("concatenate", [half] * 2, lambda f, a, b: f.concatenate([a, b]), lambda f, a, b: torch.cat([a, b])),
        Case("stack", [half] * 2, lambda f, a, b: f.stack([a, b]), lambda f, a, b: torch.stack([a, b])),
        Case("split", [_LARGE], lambda f, x: f.split(x, 512)[0], lambda f, x: torch.split(x, 512)[0]),
        Case("pad", [_LARGE], lambda f, x: f.pad(x, (2, 2))),
        Case(
            "where",
            [_LARGE] * 2,
            lambda f, a, b, chosen: f.where(chosen, a, b),
            lambda f, a, b, chosen: torch.where(chosen, a, b),
            [chosen],
        ),
        Case(
            "take of rows",
            [_LARGE],
            lambda f, x, numbers: f.take(x, numbers, 0),
            lambda f, x, numbers: torch.index_select(x, 0, numbers),
            [numbers],
        ),
        Case(
            "take of columns",
            [_LARGE],
            lambda f, x, numbers: f.take(x, numbers, 1),
            lambda f, x, numbers: torch.index_select(x, 1, numbers),
            [numbers],
        ),
        Case(
            "take of entries",
            [_LARGE],
            lambda f, x, places: f.take(x, places),
            lambda f, x, places: torch.take(x, places),
            [rng.integers(0, 1 << 20, 1 << 18)],
        ),
    ]


def _tensor_cases() -> list[Case]:
    """Tensor's own operators and methods."""
    row = (1024,)
    return [
        Case("x + y", [_LARGE] * 2, lambda f, x, y: x + y),
        Case("x + row", [_LARGE, row], lambda f, x, y: x + y),
        Case("x - y", [_LARGE] * 2, lambda f, x, y: x - y),
        Case("minus x", [_LARGE], lambda f, x: -x),
        Case("x * y", [_LARGE] * 2, lambda f, x, y: x * y),
        Case("x / y", [_LARGE] * 2, lambda f, x, y: x / y),
        Case("x ** 2", [_LARGE], lambda f, x: x**2),
        Case("x @ y", [(512, 1024), _LARGE], lambda f, x, y: x @ y),
        Case("batches x @ y", [(64, 128, 64), (64, 64, 128)], lambda f, x, y: x @ y),
        Case("x.to(float64)", [_LARGE], lambda f, x: x.to(np.float64), lambda f, x: x.double()),
        Case("x.exp()", [_LARGE], lambda f, x: x.exp()),
        Case("x.log()", [_LARGE], lambda f, x: x.log(), positive=True),
        Case("x.sqrt()", [_LARGE], lambda f, x: x.sqrt(), positive=True),
        Case("x.abs()", [_LARGE], lambda f, x: x.abs()),
        Case("x.relu()", [_LARGE], lambda f, x: x.relu()),
        Case("x.tanh()", [_LARGE], lambda f, x: x.tanh()),
        Case("x.sigmoid()", [_LARGE], lambda f, x: x.sigmoid()),
        Case("x.sum()", [_LARGE], lambda f, x: x.sum()),
        Case("x.sum(0)", [_LARGE], lambda f, x: x.sum(0)),
        Case("x.mean(1)", [_LARGE], lambda f, x: x.mean(1)),
        Case("x.var(1)", [_LARGE], lambda f, x: x.var(1)),
        Case("x.max(1)", [_LARGE], lambda f, x: x.max(1), lambda f, x: x.amax(1)),
        Case("x.min(1)", [_LARGE], lambda f, x: x.min(1), lambda f, x: x.amin(1)),
        Case("x[rows]", [_LARGE], lambda f, x, rows: x[rows], None, [np.arange(0, 1024, 2)]),
        Case("x[:, ::2]", [_LARGE], lambda f, x: x[:, ::2]),
    ]
