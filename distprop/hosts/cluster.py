"""Hosts that can run a job together: what each rank may use there, and what their users should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distprop.hosts.hostfile import Host, count
from distprop.hosts.network import Network

CLOCK_SECONDS = 2.0  # of difference that is worth a word


@dataclass(frozen=True)
class Cluster:
    """Hosts that have passed `hosts.check`; `slots` of each is the number of ranks it gets.

    `threads` is what each rank may use of its host's cores, None where the hosts differ. `subnets` and `interface` are
    those of a `Network`.
    """

    hosts: tuple[Host, ...]
    threads: int | None
    oversubscribed: bool
    fabric: bool
    reads_peers: bool
    subnets: tuple[str, ...]
    interface: str | None
    crowded: tuple[str, ...] = ()  # where ranks share cores, in words
    clocks: tuple[str, ...] = ()  # that are off, in words

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return sum(host.slots for host in self.hosts)

    def __str__(self) -> str:
        """For people: "node1:2, node2:2 over eth0"."""
        names = ", ".join(f"{host.name}:{host.slots}" for host in self.hosts)
        return names if not self.subnets else f"{names} over {self.interface or ' and '.join(self.subnets)}"


def cluster_of(hosts: Sequence[Host], found: Mapping[str, Mapping[str, Any]], network: Network) -> Cluster:
    """What the hosts' answers mean for a job. Hosts that are containers of one machine share its cores."""
    machines = {host.name: found[host.name].get("machine", host.name) for host in hosts}
    ranks_there: Counter[str] = Counter()
    for host in hosts:
        ranks_there[machines[host.name]] += host.slots
    cores = {host.name: found[host.name]["cores"] for host in hosts}
    threads = {max(1, cores[host.name] // ranks_there[machines[host.name]]) for host in hosts}
    full = {host.name: ranks_there[machines[host.name]] for host in hosts}
    crowded = []
    for machine, ranks in ranks_there.items():
        names = [name for name, where in machines.items() if where == machine]
        if ranks > cores[names[0]]:
            share = f"{ranks} ranks share {count(cores[names[0]], 'core')}: correct, but slow"
            crowded.append(f"{', '.join(names)}{' are one machine, where' if len(names) > 1 else ':'} {share}")
    return Cluster(
        hosts=tuple(hosts),
        threads=threads.pop() if len(threads) == 1 else None,
        oversubscribed=any(full[name] > cores[name] for name in full),
        fabric=all(facts["fabric"] for facts in found.values()),
        reads_peers=all(facts["reads_peers"] for facts in found.values()),
        subnets=network.subnets,
        interface=network.interface,
        crowded=tuple(crowded),
        clocks=tuple(f"{name}: its clock is {clock}" for name in found if (clock := clock_is_off(found[name]))),
    )


def clock_is_off(facts: Mapping[str, Any]) -> str:
    """By how much at least, if that is worth a word; empty otherwise. It was read between question and answer."""
    ahead, behind = facts["time"] - facts["answered"], facts["asked"] - facts["time"]
    seconds = max(ahead, behind)
    return f"{seconds:.0f} s {'ahead' if ahead > behind else 'behind'}" if seconds > CLOCK_SECONDS else ""
