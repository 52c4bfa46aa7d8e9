"""The hosts of a job: who they are, whether they fit together, by which network, and that nothing is left on them.

`hostfile` reads which hosts there are, `compatibility` asks them, in a `session` each, whose other end is `probe`;
`network` finds the way between them, `flags` tells MPI, and `guard` stays with them until the job has ended.
"""

from __future__ import annotations

from distprop.hosts.cluster import Cluster, clock_is_off
from distprop.hosts.compatibility import Survey, alive, check, short_of_memory, survey
from distprop.hosts.flags import forwarded, hydra_environment, hydra_flags, open_mpi_flags, passing_on
from distprop.hosts.guard import Guard
from distprop.hosts.hostfile import Host, HostsError, allot, parse_hosts, read_hostfile

__all__ = [
    "Cluster",
    "Guard",
    "Host",
    "HostsError",
    "Survey",
    "alive",
    "allot",
    "check",
    "clock_is_off",
    "forwarded",
    "hydra_environment",
    "hydra_flags",
    "open_mpi_flags",
    "parse_hosts",
    "passing_on",
    "read_hostfile",
    "short_of_memory",
    "survey",
]
