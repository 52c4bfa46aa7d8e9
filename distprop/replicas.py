"""Every rank has a replica of the model: the same layout and values at the start, compared bit for bit from then on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distprop.comm.base import Communicator, allgather_for, allgather_json, odd_ranks
from distprop.nn.module import Module
from distprop.tape import Array
from distprop.tensor import Parameter


class DivergenceError(RuntimeError):
    """Parameters that should be equal on all ranks are not. `culprits` are the ranks that differ from most, or all."""

    def __init__(self, message: str, culprits: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.culprits = culprits


def compare_layout(module: Module, comm: Communicator) -> None:
    """Compare names, shapes and dtypes of all parameters and buffers. Collective.

    Raises:
        ValueError: they differ; names the first one that does.
    """
    layout = [f"{n} {p.shape} {p.dtype}{'' if p.requires_grad else ' frozen'}" for n, p in module.named_parameters()]
    layout += [f"{name} {buffer.shape} {buffer.dtype} buffer" for name, buffer in module.named_buffers()]
    layouts = allgather_json("DataParallel() or Trainer()", comm, layout)
    for rank, other in enumerate(layouts):
        if other != layouts[0]:
            length = min(len(other), len(layouts[0]))
            at = next((i for i in range(length) if other[i] != layouts[0][i]), length)
            first, second = (entries[at] if at < len(entries) else "nothing" for entries in (layouts[0], other))
            text = f"the ranks' models differ: rank 0 has {first} where rank {rank} has {second}"
            raise _with_culprits(ValueError(text), layouts)


def compare_settings(settings: Mapping[str, Any], comm: Communicator) -> None:
    """Compare what all ranks have to agree in, such as the size of a batch. Collective.

    Raises:
        ValueError: they differ; names the first setting that does.
    """
    every = allgather_json("fit()", comm, {name: repr(value) for name, value in settings.items()})
    first, *others = every
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                text = f"the ranks differ in {name}: {value} on rank 0, {other[name]} on rank {rank}"
                raise _with_culprits(ValueError(text), every)


def compare_values(parameters: Sequence[tuple[str, Parameter]], comm: Communicator, note: float) -> list[float]:
    """Compare all parameters by their checksums. Collective. Returns the `note` of every rank, which travels along.

    Raises:
        DivergenceError: names the first parameter that differs, and the ranks.
    """
    sums = np.array([checksum(parameter.data) for _, parameter in parameters], np.uint32)
    messages = allgather_for("a comparison of parameters", comm, np.float64(note).tobytes() + sums.tobytes())
    every_sum = [np.frombuffer(message, np.uint32, offset=8) for message in messages]
    for number, (name, parameter) in enumerate(parameters):
        by_sum: dict[int, list[int]] = {}
        for rank, of_rank in enumerate(every_sum):
            by_sum.setdefault(int(of_rank[number]), []).append(rank)
        if len(by_sum) > 1:
            groups = sorted(by_sum.values(), key=len)
            raise DivergenceError(
                f"parameter {name} of shape {parameter.shape} differs between ranks: "
                f"{_ranks(groups[0])} against {_ranks(groups[-1])}",
                odd_ranks({rank: int(of_rank[number]) for rank, of_rank in enumerate(every_sum)}),
            )
    return [float(np.frombuffer(message, np.float64, 1)[0]) for message in messages]


def checksum(array: Array) -> int:
    """CRC-32 of the bytes of `array`."""
    return zlib.crc32(np.ascontiguousarray(array).data.cast("B")) if array.size else 0


def _with_culprits(error: ValueError, of_all: Sequence[Any]) -> ValueError:
    """Raised on all ranks, it says which of them have something else than most."""
    error.culprits = odd_ranks({rank: str(value) for rank, value in enumerate(of_all)})  # type: ignore[attr-defined]
    return error


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''}"
