"""When each rank did what: a few sums for every run, and every span of the first steps for one that is profiled.

The sums cost two readings of the clock for each phase of a step. A profile also wraps the `forward` of every module and
watches the tape, where the time between two nodes is that of the first one's derivative; whose it is follows from the
node's number, which lies between those at which its module's `forward` began and ended.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import numpy as np

from distprop.comm.base import Communicator, allgather_for, allgather_json
from distprop.nn.module import Module
from distprop.nn.watch import watch_forward
from distprop.tape import Node, next_number, observe_backward

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

T = TypeVar("T")
Span: TypeAlias = tuple[str, str, int, int]  # name, category (a phase, "layer" or "step"), begin and end in ns
TRACE = "trace.json"
FORMAT = 1  # of the trace; a newer one is refused
PHASES = ("data", "forward", "backward", "reduction", "update", "evaluation", "checkpoint")
STEPS = 200  # of a profile, unless told
_EXCHANGES = 20
_END = object()


class Timeline:
    """What this rank has spent its time on.

    >>> timeline = Timeline()
    >>> with timeline("update"):
    ...     pass
    >>> 0 < timeline.take()["update"] < 1
    True
    """

    def __init__(self) -> None:
        self.spans: list[Span] | None = None  # of a profile under way
        self._nanoseconds = dict.fromkeys(PHASES, 0)
        self._taken = dict(self._nanoseconds)

    def __call__(self, phase: str) -> _Timer:
        """A context whose time counts as that of `phase`."""
        return _Timer(self, phase)

    def add(self, phase: str, began: int, ended: int, inside: str | None = None) -> None:
        """Count the nanoseconds from `began` to `ended`; those of a phase that it lies `inside` become fewer."""
        self._nanoseconds[phase] += ended - began
        if inside is not None:
            self._nanoseconds[inside] -= ended - began
        if self.spans is not None:
            self.spans.append((phase, phase, began, ended))

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time that each takes to come is that of "data"."""
        iterator = iter(items)
        while True:
            with self("data"):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc] # not _END, so a T

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call."""
        seconds = {phase: (value - self._taken[phase]) / 1e9 for phase, value in self._nanoseconds.items()}
        self._taken = dict(self._nanoseconds)
        return seconds

    def total(self, phase: str) -> float:
        """The seconds of `phase` since the beginning."""
        return self._nanoseconds[phase] / 1e9

    def take_all(self, comm: Communicator) -> dict[str, list[float]]:
        """`take()` of every rank: for each phase a list by rank. Collective."""
        mine = struct.pack(f"={len(PHASES)}d", *self.take().values())
        rows = [
            struct.unpack(f"={len(PHASES)}d", message) for message in allgather_for("the end of an epoch", comm, mine)
        ]
        return {phase: [round(row[i], 4) for row in rows] for i, phase in enumerate(PHASES)}


class _Timer:
    __slots__ = ("_began", "_phase", "_timeline")

    def __init__(self, timeline: Timeline, phase: str) -> None:
        self._timeline, self._phase = timeline, phase

    def __enter__(self) -> None:
        self._began = time.perf_counter_ns()

    def __exit__(self, *exception: object) -> None:
        self._timeline.add(self._phase, self._began, time.perf_counter_ns())


class Profile:
    """Records every span of `steps` steps of `model` into `timeline`, and writes those of all ranks as one file.

    It begins with the first call of `begin_step`; all ranks make the same calls. `finish` is collective. As a context
    it is finished at the end, if there was no exception.
    """

    def __init__(self, timeline: Timeline, model: Module, comm: Communicator, run_dir: Path, steps: int) -> None:
        self._timeline, self._model, self._comm, self._run_dir, self._left = timeline, model, comm, run_dir, steps
        self._stack = ExitStack()  # what watches, during a step
        self._layers = _Layers(model)
        self._first: Clocks | None = None

    def begin_step(self) -> None:
        """A step is about to begin, waiting for its data included."""
        if self._first is None and self._left:
            self._first = compare_clocks(self._comm)
            self._timeline.spans = self._layers.spans = []
        if self._first is not None and self._left:
            self._stack.enter_context(watch_forward(self._model, self._layers.begin, self._layers.end))
            self._stack.enter_context(observe_backward(self._layers.visit))

    def end_step(self, step: int, began: int) -> None:
        """Update number `step`, which began at `began`, has been made; after the last one the file is written."""
        self._stack.close()
        if self._timeline.spans is None:
            return
        self._timeline.spans.append((f"step {step}", "step", began, time.perf_counter_ns()))
        self._layers.forget()
        self._left -= 1
        if not self._left:
            self.finish()

    def finish(self) -> None:
        """Write what has been recorded, unless that was done. Collective."""
        if self._timeline.spans is None or self._first is None:
            return
        spans = self._timeline.spans
        self.close()
        clocks = self._first.then(compare_clocks(self._comm))
        aligned = [(*span[:2], *clocks.aligned(self._comm.rank, span[2:])) for span in spans]
        of_all = allgather_json("the time line", self._comm, [os.uname().nodename, aligned])
        if self._comm.rank == 0:
            tree = chrome_trace([host for host, _ in of_all], [spans for _, spans in of_all])
            tree["otherData"]["clock_uncertainty_us"] = [round(ns / 1000, 3) for ns in clocks.uncertainty]
            partial = self._run_dir / f".{TRACE}.partial"
            partial.write_text(json.dumps(tree, separators=(",", ":")), encoding="utf-8")
            os.replace(partial, self._run_dir / TRACE)

    def close(self) -> None:
        """Stop watching; what has been recorded and not written is dropped. Not collective."""
        self._timeline.spans, self._left = None, 0
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()


class _Layers:
    """Turns what happens to modules and nodes into spans with the modules' names."""

    def __init__(self, model: Module) -> None:
        self.spans: list[Span] = []
        self._names = {
            id(part): f"{name} {type(part).__name__}".strip() for name, part in reversed(list(model.named_modules()))
        }
        self._open: list[tuple[str, int]] = []
        self._marks: list[int] = []  # node numbers from which on ...
        self._owners: list[str] = []  # ... nodes belong to this module
        self._backward: tuple[str, int] | None = None

    def begin(self, module: Module) -> None:
        """Its forward begins."""
        name = self._names.get(id(module), type(module).__name__)
        self._mark(name)
        self._open.append((name, time.perf_counter_ns()))

    def end(self, module: Module, output: Any) -> None:
        """Its forward has ended."""
        name, began = self._open.pop()
        self.spans.append((name, "layer", began, time.perf_counter_ns()))
        self._mark(self._open[-1][0] if self._open else "loss")

    def visit(self, node: Node | None) -> None:
        """The derivative of `node` is about to be computed; None at the end. Nodes of one module make one span."""
        now = time.perf_counter_ns()
        owner = None
        if node is not None:
            place = bisect.bisect_right(self._marks, node.number) - 1
            owner = self._owners[place] if place >= 0 else "loss"
        if self._backward is not None:
            name, began = self._backward
            if name == owner:
                return
            self.spans.append((name, "layer", began, now))
        self._backward = (owner, now) if owner is not None else None

    def forget(self) -> None:
        """The step's graph is gone."""
        self._marks, self._owners, self._open = [], [], []

    def _mark(self, owner: str) -> None:
        self._marks.append(next_number())
        self._owners.append(owner)


@dataclass(frozen=True)
class Clocks:
    """How far each rank's clock is ahead of rank 0's, in ns, at one reading of rank 0's, or at two.

    Attributes:
        readings: of rank 0's clock.
        ahead: for each reading an array by rank.
        uncertainty: by rank; the truth is within `ahead` ± this.
    """

    readings: tuple[int, ...]
    ahead: tuple[Sequence[float], ...]
    uncertainty: Sequence[float]

    def then(self, later: Clocks) -> Clocks:
        """With both, a clock that runs faster than rank 0's is corrected as well."""
        widest = np.maximum(self.uncertainty, later.uncertainty).tolist()
        return Clocks(self.readings + later.readings, self.ahead + later.ahead, widest)

    def aligned(self, rank: int, times: Sequence[int]) -> list[int]:
        """Times of `rank`'s clock as rank 0's clock would show them."""
        own = [float(reading + ahead[rank]) for reading, ahead in zip(self.readings, self.ahead, strict=True)]
        if len(own) == 1 or own[0] == own[-1]:
            return [round(t - self.ahead[0][rank]) for t in times]
        drift = (self.ahead[-1][rank] - self.ahead[0][rank]) / (own[-1] - own[0])
        return [round(t - self.ahead[0][rank] - drift * (t - own[0])) for t in times]


def compare_clocks(
    comm: Communicator, clock: Callable[[], int] = time.perf_counter_ns, identity: bytes | None = None
) -> Clocks:
    """Bounds from barriers: nobody leaves one before everybody has entered it. Collective.

    A rank's clock is ahead by at least (its entry − rank 0's exit) and at most (its exit − rank 0's entry). Of several
    barriers the narrowest bounds hold, and the middle between them is the estimate. A rank whose clock has the
    `identity` of rank 0's, by default that of this host's, reads the same one, and nothing is estimated.
    """
    comm.barrier()  # the ranks come from different work
    stamps = np.empty((_EXCHANGES, 2), np.int64)
    for row in stamps:
        row[0] = clock()
        comm.barrier()
        row[1] = clock()
    of_all = [
        np.frombuffer(message, np.int64).reshape(-1, 2)
        for message in allgather_for("a comparison of clocks", comm, stamps.tobytes())
    ]
    identities = allgather_for("a comparison of clocks", comm, _clock_identity() if identity is None else identity)
    first = of_all[0]
    low = np.array([(own[:, 0] - first[:, 1]).max() for own in of_all], float)
    high = np.array([(own[:, 1] - first[:, 0]).min() for own in of_all], float)
    same = [rank == 0 or (bool(own) and own == identities[0]) for rank, own in enumerate(identities)]
    low[same] = high[same] = 0
    return Clocks((int(first[:, 0].mean()),), (((low + high) / 2).tolist(),), ((high - low) / 2).tolist())


def _clock_identity() -> bytes:
    """Names the clock behind time.perf_counter: Linux has one for each start of a kernel and each time namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read() + os.readlink("/proc/self/ns/time").encode()
    except OSError:
        return b""


def chrome_trace(hosts: Sequence[str], spans: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """The spans of each rank in the Trace Event Format, which Perfetto and chrome://tracing open: a process a rank.

    Times are in µs from the first span, with three decimals; a span lies wholly inside, or outside, any other of its
    rank. Source: Trace Event Format, Google, 2016.
    """
    zero = min((span[2] for of_rank in spans for span in of_rank), default=0)
    events: list[dict[str, Any]] = []
    for rank, host in enumerate(hosts):
        events += [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank} on {host}"}},
            {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}},
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "training"}},
        ]
        # Perfetto puts spans that begin together into the order of the file: the outer one first
        for name, category, began, ended in sorted(spans[rank], key=lambda span: (span[2], -span[3])):
            place = {"pid": rank, "tid": 0, "ts": (began - zero) / 1000, "dur": (ended - began) / 1000}
            events.append({"ph": "X", "name": name, "cat": category, **place})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"format": FORMAT, "hosts": list(hosts)}}
