"""Checkpoints: what is saved, how it is made durable, how it is verified.

A checkpoint is a folder: safetensors files, `state.json`, and `manifest.json` with the size and SHA-256 of each,
written last. It is written under another name, every file and the folder flushed to the disk, and renamed when it is
complete. So a folder with a checkpoint's name is whole, and what the disk did to it since is found when it is read.

The state is logical: nothing in it belongs to a rank, so any number of ranks can resume it. Nothing is pickled: reading
a checkpoint runs no code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distprop.comm.base import Communicator, allgather_for
from distprop.tape import Array

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

FORMAT = 1  # the layout of the folder; a newer one is refused
_NAME = re.compile(r"step-(\d{9})")


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, unreadable, or not of this run."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state.

    Attributes:
        step: updates made; names the folder.
        tensors: for each file ("model", "optimizer") its arrays by name.
        state: everything else, as JSON can say it.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Array]]
    state: Mapping[str, Any]


def save(root: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `root` and return its folder. When this returns, it survives a power failure.

    Raises:
        OSError: the disk is full or read-only; what was there before is untouched.
    """
    from safetensors.numpy import save as to_bytes

    root.mkdir(parents=True, exist_ok=True)
    name = f"step-{checkpoint.step:09d}"
    partial, final = root / f".{name}.partial", root / name
    _remove(partial)  # left by a writer that was killed
    with contextlib.suppress(CheckpointError):
        read(final)
        return final  # this step has been written before; a resumed run passes it again
    try:
        partial.mkdir()
        files = {
            f"{part}.safetensors": to_bytes({key: np.array(array, order="C") for key, array in arrays.items()})
            for part, arrays in checkpoint.tensors.items()
        }
        files["state.json"] = json.dumps({**checkpoint.state, "step": checkpoint.step}, indent=1).encode()
        entries = {}
        for file_name, content in files.items():
            _write_durably(partial / file_name, content)
            entries[file_name] = {"bytes": len(content), "sha256": _sha256(content)}
        _write_durably(partial / "manifest.json", json.dumps({"format": FORMAT, "files": entries}, indent=1).encode())
        _flush_folder(partial)
        if final.exists():
            _remove(final)  # not whole, or it would have been returned above
        partial.rename(final)
        _flush_folder(root)
    except BaseException:
        _remove(partial)
        raise
    return final


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the format is a newer one; says which and how.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    manifest = _read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')}; this version reads format {FORMAT}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or "state.json" not in entries:
        raise CheckpointError(f"{folder}: the manifest lists no state.json")
    contents = {name: _verified(folder / name, entry) for name, entry in entries.items()}
    state = json.loads(contents.pop("state.json"))
    try:
        tensors = {name.removesuffix(".safetensors"): from_bytes(content) for name, content in contents.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return Checkpoint(state.pop("step"), tensors, state)


def newest(root: Path, report: Callable[[str], object], before: float = math.inf) -> Checkpoint | None:
    """The newest whole checkpoint in `root` of a step `before` that, or None; `report` is told of each damaged one.

    Raises:
        CheckpointError: there are some, but all of them are damaged.
    """
    folders = sorted(((step, folder) for step, folder in _folders(root) if step < before), reverse=True)
    for _, folder in folders:
        try:
            return read(folder)
        except CheckpointError as error:
            report(f"{error}; trying the checkpoint before it")
    if folders:
        raise CheckpointError(f"all {len(folders)} checkpoints in {root} are damaged")
    return None


def broadcast(found: Checkpoint | None, comm: Communicator) -> Checkpoint | None:
    """Rank 0's checkpoint on every rank, so that only rank 0 needs to see the disk it is on."""
    layout = b"null"
    if found is not None:
        kinds = {part: {n: [a.dtype.str, a.shape] for n, a in arrays.items()} for part, arrays in found.tensors.items()}
        layout = json.dumps([found.step, found.state, kinds]).encode()
    described = json.loads(allgather_for("a checkpoint", comm, layout if comm.rank == 0 else b"")[0])
    if described is None:
        return None
    step, state, kinds = described
    tensors: dict[str, dict[str, Array]] = {}
    for part, arrays in kinds.items():
        tensors[part] = {}
        for name, (dtype, shape) in arrays.items():
            array = np.empty(shape, dtype) if found is None else np.array(found.tensors[part][name], order="C")
            tensors[part][name] = comm.broadcast(array)
    return Checkpoint(step, tensors, state)


def prune(root: Path, keep: int, also: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of step `also`, and what killed writers left."""
    for step, folder in sorted(_folders(root), reverse=True)[keep:]:
        if step != also:
            _remove(folder)
    for leftover in root.glob(".step-*"):
        _remove(leftover)


class Writer:
    """Writes checkpoints in a thread while training goes on, and keeps the newest `keep` and the best one.

    A failed write is reported and training goes on: the checkpoints before it are untouched. The arrays are copied at
    once, so training may change them. `saved` is called with the step of each one that is on the disk, in the thread.
    """

    def __init__(
        self,
        root: Path,
        report: Callable[[str], object] = print,
        saved: Callable[[int], object] = lambda step: None,
        keep: int = 3,
    ) -> None:
        self.root, self.keep, self.report, self.saved = root, keep, report, saved
        self.best_step: int | None = None
        self.newest: int | None = None  # the step of the last one that this writer has written
        self.seconds = 0.0  # how long the slowest one took
        self._thread: threading.Thread | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Start writing; waits for the write before, so that two never overlap."""
        copies = {
            part: {name: np.array(array) for name, array in arrays.items()}
            for part, arrays in checkpoint.tensors.items()
        }
        state = json.loads(json.dumps(checkpoint.state))  # what JSON cannot say is an error here, not in the thread
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(Checkpoint(checkpoint.step, copies, state),), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the write under way has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        began = time.perf_counter()
        try:
            save(self.root, checkpoint)
            self.newest, self.seconds = checkpoint.step, max(self.seconds, time.perf_counter() - began)
            self.saved(checkpoint.step)
            prune(self.root, self.keep, self.best_step)
        except OSError as error:
            self.report(f"the checkpoint of step {checkpoint.step} could not be written to {self.root}: {error}")


def _folders(root: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints in `root` with their steps."""
    if root.is_dir():
        for folder in root.iterdir():
            if match := _NAME.fullmatch(folder.name):
                yield int(match[1]), folder


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _sha256(content: bytes) -> str:
    import hashlib  # loads OpenSSL, which a run without checkpoints does not need

    return hashlib.sha256(content).hexdigest()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make names in `folder` durable, where the system can flush a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _verified(path: Path, entry: Any) -> bytes:
    content = _read_bytes(path)
    if not isinstance(entry, dict) or len(content) != entry.get("bytes"):
        raise CheckpointError(f"{path} has {len(content)} bytes; the manifest says {entry}")
    if _sha256(content) != entry.get("sha256"):
        raise CheckpointError(f"{path} is not what was written: its SHA-256 differs from the manifest's")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_read_bytes(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return tree


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
