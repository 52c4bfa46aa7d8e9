"""Whether all hosts see one folder. Rank 0 has the checkpoints, and after a restart it may be on another host."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

from distprop.comm.base import Communicator, allgather_for, allgather_json

_PATIENCE_SECONDS = 3.0  # until a new file is seen on other hosts; NFS remembers for so long that there was none


class NotSharedError(ValueError):
    """A folder that must be the same on all hosts is another one on some."""


def check_shared(folder: Path, comm: Communicator, *, required: bool) -> None:
    """Look from every rank for a file that rank 0 makes in `folder`, and for the checkpoints there.

    Raises:
        NotSharedError: on every rank; a host has a checkpoint that rank 0 does not see, which would be lost; or, with
            `required`, a host does not see rank 0's folder.
    """
    if comm.size == 1:
        return
    name = f".seen-{uuid.uuid4().hex}" if comm.rank == 0 else ""
    if comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    seen = folder / allgather_for("a look at the run directory", comm, name.encode())[0].decode()
    mine = {"host": os.uname().nodename, "sees": _appears(seen), "step": _newest_step(folder)}
    answers = allgather_json("a look at the run directory", comm, mine)
    if comm.rank == 0:
        seen.unlink()
    first = answers[0]
    blind = {answer["host"]: answer["step"] for answer in answers if not answer["sees"]}
    ahead = [f"{host} has step {step}" for host, step in blind.items() if step > first["step"]]
    if ahead or (blind and required):
        step = f"step {first['step']}" if first["step"] >= 0 else "no checkpoint"
        what = ", ".join(ahead) if ahead else f"{', '.join(blind)} cannot see it"
        raise NotSharedError(
            f"{folder} must be one folder for all hosts, but {first['host']}, where rank 0 is, has its own "
            f"with {step}, and {what}; put it on a file system that the hosts share"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _newest_step(folder: Path) -> int:
    """The number in the name of the newest checkpoint, as `distprop.checkpoint` writes it; -1 for none."""
    steps = [-1]
    with contextlib.suppress(OSError):
        steps += [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return max(steps)
