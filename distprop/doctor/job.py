"""Checks of several ranks: what is amiss on each host, what differs between hosts, and what they measure together."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from distprop.comm.base import Communicator, allgather_json
from distprop.doctor.finding import Finding
from distprop.doctor.host import check_host
from distprop.doctor.machine import addresses, existing_folder
from distprop.hosts.hostfile import count

SLOW_RANK = 1.25  # times the median
SLOW_NETWORK = 0.9  # Gbit/s; what 1 Gbit/s carries
ALIKE = ("Python", "packages", "MPI library", "kernels")  # on all hosts


def check_job(comm: Communicator, run_dir: Path, host: str | None = None) -> list[Finding]:
    """What every host finds, what differs between them, and what the ranks measure together. Collective.

    `host` is this rank's; two names on one machine make two hosts of it.
    """
    from distprop.bench.links import measure_links, measure_speed, ranks_by_host
    from distprop.predict import describe

    by_host = ranks_by_host(comm, host)
    own = next(ranks for ranks in by_host.values() if comm.rank in ranks)
    affinity = ",".join(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else ""
    allowed = allgather_json("doctor", comm, affinity)
    cores = len({core for rank in own for core in allowed[rank].split(",")}) if affinity else None
    mine = check_host(run_dir, len(own), cores) if comm.rank == own[0] else []
    said = allgather_json("doctor", comm, [asdict(finding) for finding in mine])
    findings = {
        name: [Finding(**{**finding, "host": name}) for finding in said[ranks[0]]] for name, ranks in by_host.items()
    }
    together = [binding(name, [allowed[rank] for rank in ranks]) for name, ranks in by_host.items()]
    if len(by_host) > 1:
        together += compare_hosts(findings)
        every = allgather_json("doctor", comm, addresses())
        together.append(same_addresses({name: every[ranks[0]] for name, ranks in by_host.items()}))
        together.append(shared_run_directory(comm, run_dir, by_host))
    links = measure_links(comm, host=host)
    together += [
        Finding("Allreduce within", f"{len(here.ranks)} ranks: {describe(here.link)}", host=here.name)
        for here in links.hosts
        if here.link
    ]
    if links.between:
        slow = links.between.gigabits < SLOW_NETWORK
        advice = "a slow network: `distprop predict` says whether more hosts pay" if slow else ""
        value = f"{len(by_host)} hosts: {describe(links.between)}"
        together.append(Finding("Allreduce between hosts", value, "warn" if slow else "ok", advice))
    names = {rank: name for name, ranks in by_host.items() for rank in ranks}
    if comm.size > 1:
        together.append(slowest_rank(measure_speed(comm), names))
    return [*itertools.chain(*findings.values()), *together]


def binding(host: str, allowed: Sequence[str]) -> Finding:
    """Whether ranks are bound to cores that others have too; `allowed` are the cores of each rank of the host."""
    sets = [set(cores.split(",")) for cores in allowed]
    available = set().union(*sets)
    value = f"{count(len(allowed), 'rank')} on {count(len(available), 'core')}, "
    if all(cores == available for cores in sets):
        return Finding("binding", f"{value}not bound", host=host)
    crowded = max(allowed.count(cores) / len(cores.split(",")) for cores in allowed)
    if crowded > 1 and len(available) >= len(allowed):
        advice = "several ranks are bound to one core: mpirun --bind-to none"
        return Finding("binding", f"{value}bound", "warn", advice, host)
    return Finding("binding", f"{value}bound", host=host)


def compare_hosts(findings: dict[str, list[Finding]]) -> list[Finding]:
    """What should be the same on all hosts but is not."""
    (first, reference), *others = findings.items()
    found = []
    for number, finding in enumerate(reference):
        different = [host for host, theirs in others if theirs[number].value != finding.value]
        if finding.name in ALIKE and different:
            value = f"{different[0]}: {findings[different[0]][number].value}; {first}: {finding.value}"
            advice = f"{', '.join(different)} and {first} differ: install the same on all hosts"
            found.append(Finding(f"{finding.name} alike", value, "warn", advice))
    return found


def same_addresses(by_host: dict[str, dict[str, str]]) -> Finding:
    """Whether an interface has one address on several hosts, as Docker's bridge has; MPI may try to connect there."""
    owners: dict[str, set[str]] = {}
    for found in by_host.values():
        for interface, address in found.items():
            owners.setdefault(address, set()).add(interface)
    shared = {
        address: names
        for address, names in owners.items()
        if sum(address in found.values() for found in by_host.values()) > 1
    }
    if not shared:
        return Finding("addresses", "each belongs to one host")
    interfaces = ",".join(sorted(set().union(*shared.values())))
    advice = f"MPI may connect to the wrong host: export OMPI_MCA_btl_tcp_if_exclude=lo,{interfaces}"
    return Finding("addresses", f"{', '.join(shared)} on several hosts", "warn", advice)


def shared_run_directory(comm: Communicator, run_dir: Path, by_host: dict[str, list[int]]) -> Finding:
    """Whether all hosts see the same run directory. Collective."""
    mark: Path | None = None
    if comm.rank == 0:
        try:
            mark = Path(tempfile.mkdtemp(dir=existing_folder(run_dir), prefix=".distprop-doctor-"))
        except OSError:
            mark = None
    path = comm.allgather(str(mark).encode() if mark else b"")[0].decode()
    seen = comm.allgather(b"x" if path and Path(path).is_dir() else b"")
    if mark:
        mark.rmdir()
    if not path:
        return Finding("run directory shared", "not tried: rank 0 cannot write there")
    missing = [host for host, ranks in by_host.items() if not seen[ranks[0]]]
    if missing:
        advice = "only the host of rank 0 will hold checkpoints; a restart without it needs a shared folder"
        return Finding("run directory shared", f"not with {', '.join(missing)}", "warn", advice)
    return Finding("run directory shared", "by all hosts")


def slowest_rank(seconds: Sequence[float], hosts: dict[int, str]) -> Finding:
    """Which rank takes longest for the same matrix product; all others wait for it at every step."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    ratio = seconds[slowest] / statistics.median(seconds)
    value = f"rank {slowest} on {hosts[slowest]}, {ratio:.2f} times the median"
    if ratio > SLOW_RANK:
        return Finding("slowest rank", value, "warn", f"all ranks wait for it: look what else runs on {hosts[slowest]}")
    return Finding("slowest rank", value)
