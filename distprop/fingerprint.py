"""A hash of every parameter after every step, so that runs can be compared: where do they differ first?

Each rank hashes its own copy of the model. Every few steps the ranks compare their hashes, one short message, and
rank 0 appends them to `fingerprints.jsonl` in `run_dir`. Nothing in that file depends on the number of ranks, so in
deterministic mode the files of two runs are equal byte for byte. `distprop fingerprint` reads them.

A hash is the CRC-32 of the bytes: a change of one value never escapes it, others do by a chance of 2⁻³². It takes
0.4 ms for 670,000 parameters in float32 with zlib 1.2.13, where BLAKE2b takes 2.1 ms. (A sum of words times odd
factors would take 0.16 ms, and not see two values of the other sign.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from distprop.comm import Communicator
from distprop.comm.base import allgather_for, odd_ranks
from distprop.metrics import forget_after
from distprop.nn.module import Module
from distprop.replicas import DivergenceError, checksum
from distprop.tape import Array

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

FINGERPRINTS = "fingerprints.jsonl"
COMPARE_EVERY = 16  # steps; comparing and writing then cost 0.04 ms a step on 2 ranks of one host


class Fingerprints:
    """Records the hashes of all parameters and buffers of `model`; without a `run_dir` it does nothing.

    All ranks of `comm` call `record` at the same steps, and rank 0 writes. The first step recorded takes the place of
    what an earlier run, or one that is resumed from there, has written about it and later ones. Use it as a context:
    when an exception ends it, rank 0 writes what has not been compared yet as its own.

    Raises:
        DivergenceError: by `record` and `flush`, on all ranks, when they do not have the same parameters; names the
            first step, the first layer and the first rank that differ.
    """

    def __init__(self, model: Module, comm: Communicator, run_dir: Path | None) -> None:
        self._model, self._comm, self._run_dir = model, comm, run_dir
        self._steps: list[int] = []
        self._rows: list[Array] = []
        self._last: int | None = None  # the step recorded last by this process
        self._named = True  # the file says which layers the hashes are of
        self._writes = run_dir is not None and comm.rank == 0
        self._file: BinaryIO | None = None

    def record(self, step: int) -> None:
        """Hash the parameters as they are after `step` updates, unless that was done already. Collective."""
        if self._run_dir is None or step == self._last:
            return
        if self._last is None and self._writes:
            forget_after(self._run_dir, step - 1, FINGERPRINTS)
            path = self._run_dir / FINGERPRINTS
            self._named = path.exists() and path.stat().st_size > 0
        self._last = step
        self._steps.append(step)
        self._rows.append(layer_hashes(self._model))
        if len(self._rows) == COMPARE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Compare the ranks, and write what has been recorded. Collective."""
        if not self._rows:
            return
        steps, mine = self._steps, np.stack(self._rows)
        self._steps, self._rows = [], []
        of_all = allgather_for("fingerprints", self._comm, checksum(mine).to_bytes(4, "little"))
        if len(set(of_all)) == 1:
            self._write({step: Hashes(row) for step, row in zip(steps, mine, strict=True)})
            return
        rows = [np.frombuffer(m, np.uint32).reshape(mine.shape) for m in self._comm.allgather(mine.tobytes())]
        usual = rows[max(range(len(rows)), key=lambda rank: of_all.count(of_all[rank]))]  # the first among equals
        hashes = {
            step: Hashes(usual[i], {rank: own[i] for rank, own in enumerate(rows) if any(own[i] != usual[i])})
            for i, step in enumerate(steps)
        }
        self._write(hashes)
        self._comm.barrier()  # the first rank that raises ends the job, and rank 0 is to have written by then
        where = first_difference(Record(tuple(self._model.state_dict()), hashes))
        culprits = odd_ranks(dict(enumerate(of_all)))
        advice = f". {replay_advice(self._run_dir, where.step, where.rank)}" if where is not None else ""
        raise DivergenceError(f"the ranks no longer have the same parameters: {where}{advice}", culprits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._rows:  # other ranks may be gone, so nobody is asked
            self._write(dict(zip(self._steps, map(Hashes, self._rows), strict=True)))
            self._steps, self._rows = [], []
        self._close()

    def _write(self, steps: Mapping[int, Hashes]) -> None:
        if not self._writes or self._run_dir is None:
            return
        lines = []
        for step, hashes in steps.items():
            line: dict[str, Any] = {"step": step, "hashes": _hex(hashes.layers)}
            if not self._named:
                line["layers"] = list(self._model.state_dict())
                self._named = True
            if hashes.ranks:
                line["ranks"] = {str(rank): _hex(row) for rank, row in hashes.ranks.items()}
            lines.append(json.dumps(line) + "\n")
        try:
            if self._file is None:  # kept open: what a rank that outlives its job writes goes to the file of its own
                self._run_dir.mkdir(parents=True, exist_ok=True)
                self._file = (self._run_dir / FINGERPRINTS).open("ab")
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            self._writes = False
            self._close()
            print(f"distprop: no more fingerprints are written: {error}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        file, self._file = self._file, None
        with suppress(OSError):  # what was written was flushed, or reported
            if file is not None:
                file.close()


@dataclass(frozen=True)
class Hashes:
    """The state after one step: for each layer its hash, and for each rank that has others, those."""

    layers: Array
    ranks: Mapping[int, Array] = field(default_factory=dict)

    @property
    def together(self) -> str:
        """One hash of all layers, as 8 hexadecimal digits."""
        return f"{checksum(self.layers):08x}"


@dataclass(frozen=True)
class Record:
    """What a run has recorded: the names of its layers, and its hashes by step."""

    layers: tuple[str, ...]
    steps: Mapping[int, Hashes]


@dataclass(frozen=True)
class Difference:
    """A place where ranks, or runs, differ first: `text` says it, after `step` updates; `rank` is one to look at."""

    step: int
    rank: int
    text: str

    def __str__(self) -> str:
        return self.text


class RecordError(ValueError):
    """There are no fingerprints to read or to compare; says what to do."""


def layer_hashes(model: Module) -> Array:
    """The hash of every parameter and buffer of `model`, `(layers,)`."""
    return np.array([checksum(array) for array in model.state_dict().values()], np.uint32)


def state_hash(model: Module) -> str:
    """One hash of all parameters and buffers, as `distprop fingerprint` prints it."""
    return Hashes(layer_hashes(model)).together


def replay_advice(run_dir: Path | None, step: int, rank: int, other: Path | None = None) -> str:
    """How to look into the step after which a difference was found, and to compare it with that of an `other` run."""
    if run_dir is None or step < 1:
        return ""
    command = f"distprop replay {run_dir} --step {step} --rank {rank}"
    if other is not None:
        command = f"distprop replay {other} --step {step} --rank {rank}, then {command} --compare "
        command += f"{other / 'replay' / f'step-{step}-rank-{rank}.npz'}, and so for the other ranks"
    return f"To see that step's numbers: {command}"


def read(run_dir: Path) -> Record:
    """The fingerprints of a run; a last line that was cut off is left out.

    Raises:
        RecordError: there are none, or the file is damaged.
    """
    path = run_dir / FINGERPRINTS
    if not run_dir.is_dir():
        raise RecordError(f"there is no folder {run_dir}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    layers: tuple[str, ...] = ()
    steps: dict[int, Hashes] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            layers = tuple(entry.get("layers", layers))
            ranks = {int(rank): _from_hex(text, layers) for rank, text in entry.get("ranks", {}).items()}
            steps[entry["step"]] = Hashes(_from_hex(entry["hashes"], layers), ranks)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise RecordError(f"{path}, line {number}, is not what a run writes: {error!r}") from error
    if not steps:
        raise RecordError(
            f"{run_dir} has no fingerprints. Train with deterministic=True and run_dir, or in the default mode with "
            "fingerprint=True (train.fingerprint = true in a configuration)"
        )
    return Record(layers, steps)


def first_difference(record: Record) -> Difference | None:
    """Where the ranks of a run first differ from one another, or None."""
    for step, hashes in sorted(record.steps.items()):
        if hashes.ranks:
            place, rank = _first_rank(hashes)
            where = f"the first difference is at step {step}, layer {record.layers[place]}, rank {rank}"
            return Difference(step, rank, where)
    return None


def compare(first: Record, second: Record) -> Difference | None:
    """Where two runs first differ, or their ranks from one another; None if they agree at all steps of both.

    Raises:
        RecordError: they are of different models, or have no step in common.
    """
    if first.layers != second.layers:
        pairs = zip((*first.layers, "nothing"), (*second.layers, "nothing"), strict=False)
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        raise RecordError(f"these are different models: the first has {here} where the second has {there}")
    common = sorted(first.steps.keys() & second.steps.keys())
    if not common:
        raise RecordError("the two runs have no step in common")
    for step in common:
        one, other = first.steps[step], second.steps[step]
        where = f"the first difference is at step {step}, layer "
        for name, own, usual in (("second", other, one.layers), ("first", one, other.layers)):
            if own.ranks:  # the cause: in the update after it all ranks differ from the other run
                place, rank = _first_rank(own)
                right = own.ranks[rank][place] == usual[place] != own.layers[place]
                who = f"{'all but ' if right else ''}rank {rank} of the {name} run"
                return Difference(step, rank, f"{where}{first.layers[place]}, {who}")
        if any(one.layers != other.layers):
            return Difference(step, 0, f"{where}{first.layers[_first(one.layers, other.layers)]}, all ranks")
    return None


def _first_rank(hashes: Hashes) -> tuple[int, int]:
    """The first layer in which the ranks of one run differ, and the first rank that does."""
    return min((_first(hashes.layers, theirs), rank) for rank, theirs in hashes.ranks.items())


def _first(one: Array, other: Array) -> int:
    """The first place where two rows differ."""
    return int(np.argmax(one != other))


def _hex(row: Array) -> str:
    return row.astype("<u4").tobytes().hex()


def _from_hex(text: str, layers: tuple[str, ...]) -> Array:
    row = np.frombuffer(bytes.fromhex(text), "<u4")
    if len(row) != len(layers):
        raise ValueError(f"{len(row)} hashes of {len(layers)} layers")
    return row
