"""Whether hosts can run a job together; all are asked at once, over ssh, before MPI starts.

MPI's own answer to a host that does not fit is a job that hangs, or a page about daemons. Whatever host fails, the
message names it and says why.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distprop.hosts.cluster import Cluster, cluster_of
from distprop.hosts.hostfile import Host, HostsError, count
from distprop.hosts.network import find_network
from distprop.hosts.session import ask_all, connect_all

RANK_BYTES = 100 * 2**20  # the least that a rank with MPI takes


@dataclass(frozen=True)
class Survey:
    """What hosts have answered, by their names, and why some of them cannot take part; without such, the cluster."""

    answers: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    cluster: Cluster | None


def check(hosts: Sequence[Host], files: Sequence[str] = ()) -> Cluster:
    """The hosts as a cluster, if each can run its ranks: it answers, has what this host has, and reaches the others.

    `files`, such as the script, must have the same content everywhere.

    Raises:
        HostsError: names each host that fails, and why.
    """
    found = survey(hosts, files)
    if found.cluster is None:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in found.failures.items())
        failed, every = len(found.failures), count(max(len(hosts), len(found.failures)), "host")
        raise HostsError(f"{failed} of {every} cannot run the job; nothing was started{lines}")
    return found.cluster


def survey(hosts: Sequence[Host], files: Sequence[str] = ()) -> Survey:
    """Ask every host at once whether it can run its ranks. The way between them is tried if all that answer fit.

    Raises:
        HostsError: this host itself cannot be asked.
    """
    here, *there = connect_all([None, *hosts])
    try:
        mine, *answers = ask_all([here, *there], {"do": "facts", "directory": os.getcwd(), "files": list(files)})
        if isinstance(mine, str):
            raise HostsError(f"this host cannot be asked: {mine}")
        found: dict[str, dict[str, Any]] = {}
        failures: dict[str, str] = {}
        for host, answer in zip(hosts, answers, strict=True):
            if isinstance(answer, str):
                failures[host.name] = answer
                continue
            if reason := _difference(mine, answer, host.slots):
                failures[host.name] = reason
            elif twin := next((name for name in found if _identity(found[name]) == _identity(answer)), None):
                failures[host.name] = f"it is the same host as {twin}; give that one the slots of both"
            found[host.name] = answer
        if failures:
            return Survey(found, failures, None)
        network, failures = find_network(here, mine, dict(zip(found, there, strict=True)), found)
        return Survey(found, failures, None if failures else cluster_of(hosts, found, network))
    finally:
        for session in (here, *there):
            session.close()


def alive(hosts: Sequence[Host]) -> list[Host]:
    """The hosts that answer within some seconds; all are asked at once."""
    sessions = connect_all(hosts)
    try:
        answers = ask_all(sessions, {"do": "answer"})
        return [host for host, answer in zip(hosts, answers, strict=True) if not isinstance(answer, str)]
    finally:
        for session in sessions:
            session.close()


def _difference(mine: Mapping[str, Any], other: Mapping[str, Any], ranks: int) -> str:
    """Why a host that answered cannot take part; empty if it can."""
    if other["python"].rsplit(".", 1)[0] != mine["python"].rsplit(".", 1)[0]:
        return f"{sys.executable} is Python {other['python']} there and {mine['python']} here"
    if "directory" in other:
        return f"the working directory {os.getcwd()}: {other['directory']}; a job needs it under the same path"
    if "error" in other["software"]:
        return f"distprop cannot be used by {sys.executable} there: {other['software']['error']}"
    for name, value in mine["software"].items():
        if other["software"].get(name) != value:
            return f"{name} is {other['software'].get(name)} there and {value} here"
    for name, content in mine["files"].items():
        if other["files"][name] != content:
            reason = other["files"][name]
            return f"{name}: {'not the file that is here' if re.fullmatch('[0-9a-f]{64}', reason) else reason}"
    return short_of_memory(other["memory"], ranks)


def short_of_memory(free: int, ranks: int) -> str:
    """Why so many ranks do not fit into so many bytes of free memory, or ""; 0 stands for a host that cannot say."""
    if not 0 < free < ranks * RANK_BYTES:
        return ""
    return f"{free >> 20} MiB of memory are free, and {count(ranks, 'rank')} with MPI take {RANK_BYTES >> 20} MiB each"


def _identity(facts: Mapping[str, Any]) -> tuple[object, ...]:
    return facts.get("machine"), facts["hostname"], str(facts["interfaces"])
