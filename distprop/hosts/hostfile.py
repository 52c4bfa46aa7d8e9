"""Which hosts a job has, and how many ranks each of them takes: from `--hosts`, or from a file."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


class HostsError(Exception):
    """The hosts cannot run the job as asked; nothing has been started on them."""


@dataclass(frozen=True)
class Host:
    """A host by the name that ssh knows it by, and how many ranks it takes."""

    name: str
    slots: int = 1


def parse_hosts(text: str) -> list[Host]:
    """Hosts from "a:2,b:2" or "a slots=2,b slots=2"; one without a number takes one rank, as mpirun has it.

    >>> parse_hosts("a:2,b")
    [Host(name='a', slots=2), Host(name='b', slots=1)]

    Raises:
        HostsError: something that is no host's name or number of slots.
    """
    return _merged(_host(entry, "--hosts") for entry in text.split(","))


def read_hostfile(path: Path) -> list[Host]:
    """Hosts from a file in the way of Open MPI ("a slots=2") or of MPICH ("a:2"), one on a line; # begins a comment.

    Raises:
        HostsError: it cannot be read, or a line is none of these; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows begin it with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise HostsError(f"--hostfile: cannot read {path}: {getattr(error, 'strerror', error)}") from error
    hosts = []
    for number, line in enumerate(lines, start=1):
        if entry := line.partition("#")[0].strip():
            hosts.append(_host(entry, f"{path}, line {number}"))
    if not hosts:
        raise HostsError(f"{path} names no host; {_SYNTAX}")
    return _merged(hosts)


_SYNTAX = "expected NAME, NAME:SLOTS or NAME slots=SLOTS"


def _host(entry: str, place: str) -> Host:
    entry = " ".join(entry.split())
    if match := re.fullmatch(r"([^\s:]+) slots ?= ?(\d+)(?: max[-_]slots ?= ?\d+)?", entry):
        entry = f"{match[1]}:{match[2]}"
    name, colon, slots = entry.partition(":")
    if "@" in name:
        raise HostsError(f"{place}: {entry!r}: MPI takes no user's name; put `User` under `Host` in ~/.ssh/config")
    # A name goes to ssh and to mpirun as an argument, which must not be taken for an option or for shell.
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", name) or (colon and not re.fullmatch(r"\d+", slots)):
        raise HostsError(f"{place}: {entry!r} is not a host; {_SYNTAX}")
    if colon and not int(slots):
        raise HostsError(f"{place}: {entry!r}: a host takes 1 rank or more; leave it out if it takes none")
    return Host(name, int(slots) if colon else 1)


def _merged(hosts: Iterable[Host]) -> list[Host]:
    """A host that is named twice has the slots of both."""
    slots: Counter[str] = Counter()
    for host in hosts:
        slots[host.name] += host.slots
    return list(itertools.starmap(Host, slots.items()))


def allot(hosts: Sequence[Host], ranks: int | None) -> list[Host]:
    """The hosts that get ranks, each with their number: filled in their order, as mpirun does; all slots for None.

    Raises:
        HostsError: more ranks than slots.
    """
    total = sum(host.slots for host in hosts)
    if ranks is None:
        return list(hosts)
    if ranks < 1:
        raise HostsError(f"-n {ranks}: a job has 1 rank or more")
    if ranks > total:
        every = -(-ranks // len(hosts))
        more = ",".join(f"{host.name}:{max(host.slots, every)}" for host in hosts)
        raise HostsError(
            f"-n {ranks}: the hosts have {count(total, 'slot')} ({names(hosts)}). Leave -n out to use them all, or "
            f"oversubscribe, which is correct but slow, by more slots: --hosts {more}"
        )
    filled = []
    for host in hosts:
        here = min(host.slots, ranks)
        ranks -= here
        filled += [replace(host, slots=here)] if here else []
    return filled


def names(hosts: Sequence[Host]) -> str:
    """As `--hosts` takes them."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def count(number: int, noun: str) -> str:
    """A number with its noun, "2 hosts"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
