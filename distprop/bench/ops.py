"""Every operation, forward and backward, beside PyTorch's on one thread and beside a plain copy of what it touches.

A copy of inputs and outputs is what moving the data costs; an operation that takes a small multiple of it is bound by
memory, and the rest is arithmetic or overhead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from distprop import functional as F
from distprop.tape import Array
from distprop.tensor import Tensor

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operation, the shapes of its differentiable inputs, and PyTorch's equivalent, given `torch` and the inputs."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    ours: Operation
    theirs: Callable[..., Any]


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
        value = case.ours(*arrays).data
        grad = rng.normal(size=value.shape).astype(np.float32)
        grad = grad if grad.ndim else np.ones_like(grad)
        tensors = [Tensor(array, requires_grad=True) for array in arrays]
        theirs = [] if torch is None else [torch.tensor(array, requires_grad=True) for array in arrays]
        times: list[tuple[float, ...]] = []
        for _ in range(repeats + 2):  # in turns; the first two warm up
            row: tuple[float, ...] = _time(partial(case.ours, *tensors), tensors, grad)
            row += (_copy_time([*arrays, value]),)
            if torch is not None:
                row += _time(partial(case.theirs, torch, *theirs), theirs, torch.from_numpy(grad))
            times.append(row)
        forward, backward, copy, *rest = (statistics.median(column) for column in zip(*times[2:], strict=True))
        torch_forward, torch_backward = rest or (None, None)
        megabytes = sum(array.nbytes for array in (*arrays, value)) / 1e6
        yield OperationTimes(case.name, megabytes, forward, backward, copy, torch_forward, torch_backward)


def show(times: OperationTimes) -> str:
    """One line of the table."""
    line = f"{times.name:<28}{times.megabytes:7.1f}{times.forward * 1e3:9.3f}{times.backward * 1e3:9.3f}"
    line += f"{times.copy * 1e3:9.3f}"
    if times.torch_forward is not None and times.torch_backward is not None and times.ratio is not None:
        line += f"{times.torch_forward * 1e3:9.3f}{times.torch_backward * 1e3:9.3f}{times.ratio:8.2f}"
        line += "  over 2" if times.ratio > 2 else "  near 2" if times.ratio > 1.6 else ""
    return line


HEADER = f"{'operation':<28}{'MB':>7}{'forward':>9}{'backward':>9}{'copy':>9}{'PyTorch':>9}{'backward':>9}{'ratio':>8}"


def _time(forward: Callable[[], Any], leaves: Sequence[Any], grad: Any) -> tuple[float, float]:
    for leaf in leaves:
        leaf.grad = None
    began = time.perf_counter()
    value = forward()
    middle = time.perf_counter()
    value.backward(grad)
    return middle - began, time.perf_counter() - middle


def _copy_time(arrays: Sequence[Array]) -> float:
    began = time.perf_counter()
    for array in arrays:
        array.copy()
    return time.perf_counter() - began


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    return torch


_LARGE = (1024, 1024)  # 4 MB
_IMAGES = (64, 32, 28, 28)  # 6 MB
_TOKENS = np.random.default_rng(0).integers(0, 5000, (64, 128))
_LABELS = np.random.default_rng(0).integers(0, 1000, 1024)


def cases() -> list[Case]:
    """The table: an operation is one row."""
    return [*_pointwise_cases(), *_loss_cases(), *_image_cases(), *_sequence_cases(), *_shape_cases()]


def _pointwise_cases() -> list[Case]:
    same = ("relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "softplus")
    rows = [
        Case(name, [_LARGE], getattr(F, name), lambda torch, x, name=name: getattr(torch.nn.functional, name)(x))
        for name in same
    ]
    return [
        *rows,
        Case(
            "gelu tanh",
            [_LARGE],
            lambda x: F.gelu(x, "tanh"),
            lambda torch, x: torch.nn.functional.gelu(x, approximate="tanh"),
        ),
        Case("softmax", [_LARGE], F.softmax, lambda torch, x: torch.softmax(x, -1)),
        Case("log_softmax", [_LARGE], F.log_softmax, lambda torch, x: torch.log_softmax(x, -1)),
        Case("dropout", [_LARGE], lambda x: F.dropout(x, 0.1), lambda torch, x: torch.nn.functional.dropout(x, 0.1)),
        Case(
            "linear",
            [(512, 1024), (1024, 1024), (1024,)],
            F.linear,
            lambda torch, x, w, b: torch.nn.functional.linear(x, w, b),
        ),
    ]


def _loss_cases() -> list[Case]:
    target = np.random.default_rng(1).uniform(size=_LARGE).astype(np.float32)
    names = ("mse_loss", "l1_loss", "huber_loss", "binary_cross_entropy_with_logits")
    rows = [
        Case(
            name,
            [_LARGE],
            lambda x, name=name: getattr(F, name)(x, target),
            lambda torch, x, name=name: getattr(torch.nn.functional, name)(x, torch.from_numpy(target)),
        )
        for name in names
    ]
    labelled = [
        Case(
            name,
            [(1024, 1000)],
            lambda x, name=name: getattr(F, name)(x, _LABELS),
            lambda torch, x, name=name: getattr(torch.nn.functional, name)(x, torch.from_numpy(_LABELS)),
        )
        for name in ("cross_entropy", "nll_loss")
    ]
    return rows + labelled


def _image_cases() -> list[Case]:
    channels = (32,)
    return [
        Case(
            "conv2d 3x3",
            [(64, 32, 14, 14), (64, 32, 3, 3), (64,)],
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            lambda torch, x, w, b: torch.nn.functional.conv2d(x, w, b, padding=1),
        ),
        Case(
            "conv2d 3x3 stride 2",
            [(128, 32, 16, 16), (64, 32, 3, 3), (64,)],
            lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
            lambda torch, x, w, b: torch.nn.functional.conv2d(x, w, b, stride=2, padding=1),
        ),
        Case(
            "conv2d 1x1",
            [_IMAGES, (64, 32, 1, 1), (64,)],
            F.conv2d,
            lambda torch, x, w, b: torch.nn.functional.conv2d(x, w, b),
        ),
        Case(
            "conv1d",
            [(64, 32, 256), (64, 32, 5), (64,)],
            F.conv1d,
            lambda torch, x, w, b: torch.nn.functional.conv1d(x, w, b),
        ),
        Case(
            "conv_transpose2d",
            [(64, 32, 14, 14), (32, 16, 4, 4), (16,)],
            lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1),
            lambda torch, x, w, b: torch.nn.functional.conv_transpose2d(x, w, b, stride=2, padding=1),
        ),
        Case(
            "max_pool2d", [_IMAGES], lambda x: F.max_pool2d(x, 2), lambda torch, x: torch.nn.functional.max_pool2d(x, 2)
        ),
        Case(
            "avg_pool2d", [_IMAGES], lambda x: F.avg_pool2d(x, 2), lambda torch, x: torch.nn.functional.avg_pool2d(x, 2)
        ),
        Case(
            "adaptive_avg_pool2d",
            [_IMAGES],
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda torch, x: torch.nn.functional.adaptive_avg_pool2d(x, 1),
        ),
        Case(
            "batch_norm",
            [_IMAGES, channels, channels],
            lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
            lambda torch, x, w, b: torch.nn.functional.batch_norm(x, None, None, w, b, training=True),
        ),
        Case(
            "group_norm",
            [_IMAGES, channels, channels],
            lambda x, w, b: F.group_norm(x, 8, w, b),
            lambda torch, x, w, b: torch.nn.functional.group_norm(x, 8, w, b),
        ),
    ]


def _sequence_cases() -> list[Case]:
    width = (128,)
    heads = (12, 8, 128, 32)
    return [
        Case(
            "layer_norm",
            [(8192, 128), width, width],
            lambda x, w, b: F.layer_norm(x, width, w, b),
            lambda torch, x, w, b: torch.nn.functional.layer_norm(x, width, w, b),
        ),
        Case(
            "rms_norm",
            [(8192, 128), width],
            lambda x, w: F.rms_norm(x, width, w),
            lambda torch, x, w: torch.nn.functional.rms_norm(x, width, w),
        ),
        Case(
            "embedding",
            [(5000, 128)],
            lambda w: F.embedding(_TOKENS, w),
            lambda torch, w: torch.nn.functional.embedding(torch.from_numpy(_TOKENS), w),
        ),
        Case(
            "attention",
            [heads, heads, heads],
            F.scaled_dot_product_attention,
            lambda torch, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        ),
        Case(
            "attention causal",
            [heads, heads, heads],
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda torch, q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
    ]


def _shape_cases() -> list[Case]:
    half = (512, 1024)
    chosen = np.random.default_rng(2).uniform(size=_LARGE) < 0.5
    rows = np.random.default_rng(3).integers(0, 1024, 1024)
    return [
        Case("concatenate", [half, half], lambda a, b: F.concatenate([a, b]), lambda torch, a, b: torch.cat([a, b])),
        Case("stack", [half, half], lambda a, b: F.stack([a, b]), lambda torch, a, b: torch.stack([a, b])),
        Case("pad", [_LARGE], lambda x: F.pad(x, (2, 2)), lambda torch, x: torch.nn.functional.pad(x, (2, 2))),
        Case(
            "where",
            [_LARGE, _LARGE],
            lambda a, b: F.where(chosen, a, b),
            lambda torch, a, b: torch.where(torch.from_numpy(chosen), a, b),
        ),
        Case(
            "take",
            [_LARGE],
            lambda x: F.take(x, rows, 0),
            lambda torch, x: torch.index_select(x, 0, torch.from_numpy(rows)),
        ),
    ]
