"""What MPI's launchers are told of the hosts: which, by what network, and what of the environment goes there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from distprop.comm.mpi import EAGER_BYTES
from distprop.hosts.cluster import Cluster
from distprop.hosts.hostfile import names

# Variables that ranks on other hosts are to have as well: of this package, Python, threads, MPI and the terminal.
_FORWARDED = (
    "DISTPROP_",
    "PYTHON",
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "BLIS_",
    "NPY_",
    "MPI4PY_",
    "MPIR_",
    "UCX_",
    "FI_",
    "I_MPI_",
    "LD_LIBRARY_PATH",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "TERM",
    "LANG",
    "LC_",
    "TZ",
)


def open_mpi_flags(
    cluster: Cluster, major: int, variables: Iterable[str], mca: Callable[[str, str], list[str]]
) -> list[str]:
    """Open MPI's options for these hosts, besides those for any job; `mca` writes a parameter of the library."""
    flags = ["--host", names(cluster.hosts)]
    # One ssh from here to each host. Open MPI's tree of daemons would need a way, and a key, from each host to others.
    flags += mca("plm_rsh_no_tree_spawn", "1") if major < 5 else ["--prtemca", "plm_ssh_no_tree_spawn", "1"]
    if cluster.subnets:
        subnets = ",".join(cluster.subnets)
        flags += mca("btl_tcp_if_include", subnets) if not cluster.fabric else []
        flags += mca("oob_tcp_if_include", subnets) if major < 5 else ["--prtemca", "prte_if_include", subnets]
    if not cluster.fabric:
        largest = str(EAGER_BYTES + 4096)  # and MPI's header
        flags += mca("btl_tcp_eager_limit", largest) + mca("btl_tcp_max_send_size", largest)
    for name in forwarded(variables):
        flags += ["-x", name]
    return flags


def hydra_flags(cluster: Cluster, variables: Iterable[str]) -> list[str]:
    """The options of Hydra, MPICH's launcher, which also is Intel MPI's."""
    flags = ["-launcher", "ssh", "-hosts", names(cluster.hosts)]
    flags += ["-iface", cluster.interface] if cluster.interface else []
    return [*flags, "-genvlist", ",".join(forwarded(variables))]


def hydra_environment(cluster: Cluster) -> dict[str, str]:
    """The interface for the messages of MPICH's two network layers, UCX and libfabric."""
    if not cluster.interface or cluster.fabric:
        return {}
    return {"UCX_NET_DEVICES": cluster.interface, "FI_TCP_IFACE": cluster.interface}


def passing_on(command: Sequence[str], vendor: str, variables: Mapping[str, str]) -> list[str]:
    """A launcher's command that passes on these variables too, which were not known when it was planned."""
    if vendor == "openmpi":
        options = [["-x", f"{name}={value}"] for name, value in variables.items()]
    else:
        options = [["-genv", name, value] for name, value in variables.items()]
    return [command[0], *itertools.chain(*options), *command[1:]]


def forwarded(variables: Iterable[str]) -> list[str]:
    """Of the names of variables those that ranks on other hosts get as well."""
    return sorted({name for name in variables if name.startswith(_FORWARDED)})
