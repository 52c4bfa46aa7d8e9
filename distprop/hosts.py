"""The hosts of a job: who they are, whether they fit together, by which network, and that nothing is left on them.

`check()` asks all hosts at once, over ssh, before MPI starts: MPI's own answer to a host that does not fit is a job
that hangs, or a page about daemons. Whatever host fails, the message names it and says why. A name that leads to this
machine needs no ssh, neither here nor for mpirun.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from distprop import host_probe

SSH = ("ssh", "-T", "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
ANSWER_SECONDS = 60.0  # for a host that accepts the connection; a cold import over a network file system takes 20
RANK_BYTES = 100 * 2**20  # the least that a rank with MPI takes
CLOCK_SECONDS = 2.0  # of difference that is worth a word

# Variables that ranks on other hosts are to have as well: of this package, of Python, of threads and of MPI.
_FORWARDED = (
    "DISTPROP_",
    "PYTHON",
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "BLIS_",
    "MPI4PY_",
    "MPIR_",
    "UCX_",
    "FI_",
    "I_MPI_",
    "LD_LIBRARY_PATH",
    "COLUMNS",
    "LANG",
    "LC_",
    "TZ",
)
_NEEDED_TO_IMPORT = ("PYTHON", "MPI4PY_", "LD_LIBRARY_PATH")


class HostsError(Exception):
    """The hosts cannot run the job as asked; nothing has been started on them."""


@dataclass(frozen=True)
class Host:
    """A host by the name that ssh knows it by, and how many ranks it takes."""

    name: str
    slots: int = 1


@dataclass(frozen=True)
class Cluster:
    """Hosts that have passed `check`; `slots` of each is the number of ranks it gets.

    `threads` is what each rank may use of its host's cores, None where the hosts differ. `subnets` are those of the
    interfaces by which the hosts reach one another, `interface` their name if it is the same on all.
    """

    hosts: tuple[Host, ...]
    threads: int | None
    oversubscribed: bool
    fabric: bool
    reads_peers: bool
    subnets: tuple[str, ...]
    interface: str | None
    advice: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Of all hosts."""
        return sum(host.slots for host in self.hosts)

    def __str__(self) -> str:
        """For people: "node1:2, node2:2 over eth0"."""
        names = ", ".join(f"{host.name}:{host.slots}" for host in self.hosts)
        return names if not self.subnets else f"{names} over {self.interface or ' and '.join(self.subnets)}"


# -------------------------------------------------------------------------------------------------- which hosts


def parse_hosts(text: str) -> list[Host]:
    """Hosts from "a:2,b:2"; one without a number takes one rank, as mpirun has it.

    >>> parse_hosts("a:2,b")
    [Host(name='a', slots=2), Host(name='b', slots=1)]

    Raises:
        HostsError: something that is no host's name or number of slots.
    """
    return _merged(_host(entry.strip(), "--hosts") for entry in text.split(","))


def read_hostfile(path: Path) -> list[Host]:
    """Hosts from a file in the way of Open MPI ("a slots=2") or of MPICH ("a:2"), one on a line; # begins a comment.

    Raises:
        HostsError: it cannot be read, or a line is none of these; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HostsError(f"--hostfile: cannot read {path}: {getattr(error, 'strerror', error)}") from error
    hosts = []
    for number, line in enumerate(lines, start=1):
        entry = " ".join(line.partition("#")[0].split())
        if match := re.fullmatch(r"([^\s:]+) slots ?= ?(\d+)(?: max[-_]slots ?= ?\d+)?", entry):
            entry = f"{match[1]}:{match[2]}"
        if entry:
            hosts.append(_host(entry, f"{path}, line {number}"))
    if not hosts:
        raise HostsError(f"{path} names no host; {_SYNTAX}")
    return _merged(hosts)


_SYNTAX = "expected NAME, NAME:SLOTS or NAME slots=SLOTS"


def _host(entry: str, place: str) -> Host:
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
            f"-n {ranks}: the hosts have {_count(total, 'slot')} ({_names(hosts)}). Leave -n out to use them all, or "
            f"oversubscribe, which is correct but slow, by more slots: --hosts {more}"
        )
    filled = []
    for host in hosts:
        here = min(host.slots, ranks)
        ranks -= here
        filled += [replace(host, slots=here)] if here else []
    return filled


# ------------------------------------------------------------------------------------------- do they fit together


def check(hosts: Sequence[Host], files: Sequence[str] = ()) -> Cluster:
    """Ask every host at once whether it can run its ranks: it answers, has what this host has, and reaches the others.

    `files`, such as the script, must have the same content everywhere.

    Raises:
        HostsError: names each host that fails, and why.
    """
    here, *there = _connect_all([None, *hosts])
    try:
        request = {"do": "facts", "directory": os.getcwd(), "files": list(files)}
        answers = _ask_all([here, *there], request)
        mine = answers[0]
        if isinstance(mine, str):
            raise HostsError(f"this host cannot be asked: {mine}")
        found: dict[str, dict[str, Any]] = {}
        failures: dict[str, str] = {}
        for host, answer in zip(hosts, answers[1:], strict=True):
            reason = answer if isinstance(answer, str) else _difference(mine, answer, host.slots)
            if reason:
                failures[host.name] = reason
            elif isinstance(answer, dict):
                twin = next((name for name in found if _identity(found[name]) == _identity(answer)), None)
                if twin:
                    failures[host.name] = f"it is the same host as {twin}; give that one the slots of both"
                found[host.name] = answer
        _refuse(failures, len(hosts))
        nodes = dict(zip(found, there, strict=True)) if len(found) == len(there) else {}
        return _cluster(hosts, found, _network(here, mine, nodes, found), mine)
    finally:
        for session in (here, *there):
            session.close()


def alive(hosts: Sequence[Host]) -> list[Host]:
    """The hosts that answer within some seconds; all are asked at once."""
    sessions = _connect_all(hosts)
    try:
        answers = _ask_all(sessions, {"do": "answer"})
        return [host for host, answer in zip(hosts, answers, strict=True) if not isinstance(answer, str)]
    finally:
        for session in sessions:
            session.close()


def _refuse(failures: Mapping[str, str], of: int) -> None:
    if failures:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failures.items())
        raise HostsError(f"{len(failures)} of {_count(of, 'host')} cannot run the job; nothing was started{lines}")


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
    if 0 < other["memory"] < ranks * RANK_BYTES:
        free = other["memory"] // 2**20
        return f"{free} MiB of memory are free, and {_count(ranks, 'rank')} with MPI take {RANK_BYTES >> 20} MiB each"
    return ""


def _identity(facts: Mapping[str, Any]) -> tuple[object, ...]:
    return facts.get("machine"), facts["hostname"], str(facts["interfaces"])


def _cluster(
    hosts: Sequence[Host],
    found: Mapping[str, Mapping[str, Any]],
    network: tuple[tuple[str, ...], str | None],
    mine: Mapping[str, Any],
) -> Cluster:
    """What the facts mean for the job. Hosts that are containers of one machine share its cores."""
    machines = {host.name: found[host.name].get("machine", host.name) for host in hosts}
    ranks_there: Counter[str] = Counter()
    for host in hosts:
        ranks_there[machines[host.name]] += host.slots
    cores = {host.name: found[host.name]["cores"] for host in hosts}
    threads = {max(1, cores[host.name] // ranks_there[machines[host.name]]) for host in hosts}
    full = {host.name: ranks_there[machines[host.name]] for host in hosts}
    advice = []
    for machine, ranks in ranks_there.items():
        names = [name for name, where in machines.items() if where == machine]
        if ranks > cores[names[0]]:
            share = f"{ranks} ranks share {_count(cores[names[0]], 'core')}: correct, but slow"
            advice.append(f"{', '.join(names)}{' are one machine, where' if len(names) > 1 else ':'} {share}")
    for name, facts in found.items():
        apart = facts["time"] - mine["time"]  # taken at the same moment, give or take the way of the answer
        if abs(apart) > CLOCK_SECONDS + facts["delay"]:
            advice.append(f"{name}: its clock is {abs(apart):.0f} s {'ahead' if apart > 0 else 'behind'}")
    return Cluster(
        hosts=tuple(hosts),
        threads=threads.pop() if len(threads) == 1 else None,
        oversubscribed=any(full[name] > cores[name] for name in full),
        fabric=all(facts["fabric"] for facts in found.values()),
        reads_peers=all(facts["reads_peers"] for facts in found.values()),
        subnets=network[0],
        interface=network[1],
        advice=tuple(advice),
    )


# --------------------------------------------------------------------------------------------------- which network


def _network(
    here: _Session,
    mine: Mapping[str, Any],
    sessions: Mapping[str, _Session],
    found: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], str | None]:
    """The subnets, and the name, of the interfaces by which each host is reached by all others and by this one.

    Each host tries every address of the others, since a subnet says little: Docker's bridge has the same one, and the
    same address, on every host, and a wire may lead nowhere.
    """
    facts = dict(found)
    asked = dict(sessions)
    if not any(session.local for session in sessions.values()):
        facts["this host"], asked["this host"] = mine, here  # mpirun's own messages go by the network as well
    if len(asked) < 2:
        return (), None
    names = list(facts)
    peers = {
        name: [
            {
                "addresses": [interface["address"] for interface in facts[other]["interfaces"]],
                "port": facts[other]["port"],
                "token": facts[other]["token"],
            }
            for other in names
        ]
        for name in names
    }
    answers = _ask_all(list(asked.values()), *({"do": "connect", "peers": peers[name]} for name in names))
    failures: dict[str, str] = {}
    choices: dict[str, list[Mapping[str, Any]]] = {}
    for position, name in enumerate(names):
        ways = {interface["address"]: interface for interface in facts[name]["interfaces"]}
        for other, answer in zip(names, answers, strict=True):
            if other == name:
                continue
            if isinstance(answer, str):
                failures[other] = answer
                continue
            reached = answer[position]["reached"]
            if not reached:
                tried = "; ".join(answer[position]["refused"]) or "it has no address but loopback's"
                failures.setdefault(name, f"no route from {other} to it ({tried})")
            ways = {address: interface for address, interface in ways.items() if address in reached}
        choices[name] = list(ways.values())
        if not ways and name not in failures:
            failures[name] = "the other hosts reach it by different addresses, and by none of them all"
    _refuse(failures, len(names))
    return _common(list(choices.values()))


def _common(choices: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[tuple[str, ...], str | None]:
    """One interface for each host: in a subnet that all share if there is one, its fastest otherwise.

    >>> lan, wide = {"name": "eth0", "subnet": "10.0.0.0/24"}, {"name": "wan0", "subnet": "192.0.2.0/24"}
    >>> _common([[wide, lan], [lan]])
    (('10.0.0.0/24',), 'eth0')
    """
    shared = [way["subnet"] for way in choices[0] if all(way["subnet"] in _subnets(ways) for ways in choices)]
    chosen = [next((way for way in ways if way["subnet"] in shared[:1]), ways[0]) for ways in choices]
    names = {way["name"] for way in chosen}
    return tuple(dict.fromkeys(_subnets(chosen))), names.pop() if len(names) == 1 else None


def _subnets(ways: Iterable[Mapping[str, Any]]) -> list[str]:
    return [way["subnet"] for way in ways]


# ------------------------------------------------------------------------------------- what mpirun is told of them


def open_mpi_flags(
    cluster: Cluster, major: int, variables: Iterable[str], mca: Callable[[str, str], list[str]]
) -> list[str]:
    """Open MPI's options for these hosts, besides those for any job; `mca` writes a parameter of the library."""
    flags = ["--host", _names(cluster.hosts)]
    # One ssh from here to each host. Open MPI's tree of daemons would need a way, and a key, from each host to others.
    flags += mca("plm_rsh_no_tree_spawn", "1") if major < 5 else ["--prtemca", "plm_ssh_no_tree_spawn", "1"]
    if cluster.subnets:
        subnets = ",".join(cluster.subnets)
        flags += mca("btl_tcp_if_include", subnets) if not cluster.fabric else []
        flags += mca("oob_tcp_if_include", subnets) if major < 5 else ["--prtemca", "prte_if_include", subnets]
    for name in forwarded(variables):
        flags += ["-x", name]
    return flags


def hydra_flags(cluster: Cluster, variables: Iterable[str]) -> list[str]:
    """The options of Hydra, MPICH's launcher, which also is Intel MPI's."""
    flags = ["-launcher", "ssh", "-hosts", _names(cluster.hosts)]
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


# ------------------------------------------------------------------------------------------ no process is left there


class Guard:
    """While a job runs: one ssh connection to each other host, at whose end the host kills what is left of the job.

    It ends when the job does, and also when this process is killed. If it ends before, the host is named. Nothing is
    killed after a job that has ended well, which `well` says. What a rank there writes into the file `mirrored`, which
    exists on its host only, is written into the same file here.
    """

    def __init__(self, hosts: Sequence[Host], marker: str, mirrored: str = "") -> None:
        self._hosts = hosts
        self.marker = marker
        self._sessions: list[_Session] = []
        self._watchers: list[threading.Thread] = []
        self.sign = f"/tmp/distprop-{marker}"
        self._mirrored = mirrored
        self._leaving = False
        self._ending = False
        self.well = False
        self.lost: list[str] = []

    def __enter__(self) -> Guard:
        """Connect to every host that is not this one."""
        self._sessions = [session for session in _connect_all(self._hosts) if not session.local]
        request = {"do": "guard", "marker": self.marker, "sign": self.sign, "mirrored": self._mirrored, "content": ""}
        if os.path.exists(self._mirrored):  # by an earlier attempt
            request["content"] = Path(self._mirrored).read_text(encoding="utf-8")
        _ask_all(self._sessions, request)
        for session in self._sessions:
            watcher = threading.Thread(target=self._watch, args=(session,), daemon=True)
            watcher.start()
            self._watchers.append(watcher)
        return self

    def __exit__(self, kind: object, error: object, trace: TracebackType | None) -> None:
        """Wait some seconds until each host has cleaned up."""
        self._leaving = True
        for session in self._sessions:
            if self.well:
                session.write("well")
            session.close(wait_seconds=0)
        deadline = time.monotonic() + 10
        for session, watcher in zip(self._sessions, self._watchers, strict=True):
            session.close(wait_seconds=max(0.1, deadline - time.monotonic()))
            watcher.join()
        with contextlib.suppress(OSError):
            os.remove(self.sign)

    def is_ending(self) -> bool:
        """Whether MPI should end the job at once: a host is lost, or a rank has asked for it, by the file `sign`."""
        return self._ending or os.path.exists(self.sign)

    def _watch(self, session: _Session) -> None:
        while (news := session.listen()) is not None:
            self._ending |= "ending" in news
            if content := news.get("mirrored"):
                partial = Path(f"{self._mirrored}.partial")
                partial.write_text(content, encoding="utf-8")
                partial.replace(self._mirrored)
        status = session.wait()
        if status or not self._leaving:  # at the end of its input the guard leaves with 0
            self._ending = True
            self.lost.append(session.name)
            reason = session.complaint() or "the connection ended"
            print(f"\ndistprop: lost host {session.name}: {reason}", file=sys.stderr, flush=True)


class _Session:
    """The probe, running on a host (None: here) and answering a line with a line."""

    def __init__(self, host: Host | None) -> None:
        self.name = host.name if host else "this host"
        self.local = host is None or _is_here(host.name)
        environment = {name: value for name, value in os.environ.items() if name.startswith(_NEEDED_TO_IMPORT)}
        if path := environment.get("PYTHONPATH"):  # a login begins in another directory
            environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
        python = [sys.executable, "-c", "import json, sys; exec(json.loads(sys.stdin.readline()))"]
        command = ["exec", "env", *(f"{name}={value}" for name, value in environment.items()), *python]
        if not self.local and not shutil.which("ssh"):
            raise HostsError("there is no ssh on PATH, by which ranks are started on other hosts")
        self._complaints: list[str] = []
        self._process = subprocess.Popen(
            python if self.local else [*SSH, "--", self.name, shlex.join(command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that the terminal's Ctrl-C leaves it to us
        )
        self._reader = threading.Thread(target=self._read_complaints, daemon=True)
        self._reader.start()
        self.write(Path(host_probe.__file__).read_text(encoding="utf-8"))

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer, or as a string why there is none."""
        begin = time.time()
        patience = threading.Timer(ANSWER_SECONDS, self._kill)
        patience.start()
        try:
            self.write(request)
            answer = self.listen()
            if isinstance(answer, dict):
                answer["delay"] = time.time() - begin
            return self._why() if answer is None else answer
        finally:
            patience.cancel()

    def listen(self) -> Any:
        """The next answer; None when there will be none. A login shell's own lines are passed over."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(host_probe.MARK):
                return json.loads(line.removeprefix(host_probe.MARK))
        return None

    def wait(self) -> int:
        """Until it ends."""
        return self._process.wait()

    def close(self, wait_seconds: float = 2) -> None:
        """Let it end, which it does at the end of its input."""
        with contextlib.suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        if wait_seconds:
            try:
                self._process.wait(wait_seconds)
            except subprocess.TimeoutExpired:
                self._kill()
                self._process.wait()
            self._reader.join(1)
            for pipe in (self._process.stdout, self._process.stderr):
                if pipe:
                    pipe.close()

    def complaint(self) -> str:
        """The last line of standard error."""
        return next(reversed(self._complaints), "")

    def _kill(self) -> None:
        """With what ssh has started, such as a ProxyCommand, which would hold its pipes open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def write(self, value: object) -> None:
        """Send a line."""
        with contextlib.suppress(OSError):  # it has ended; why, the answer says
            assert self._process.stdin
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _read_complaints(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if line.strip():
                self._complaints.append(line.strip())

    def _why(self) -> str:
        """In words: no connection (ssh says 255), no such Python there (127), or what was last heard."""
        status = self._process.wait()
        self._reader.join(1)
        heard = self.complaint()
        if status < 0:
            return f"no answer within {ANSWER_SECONDS:.0f} s"
        if status == 255 and not self.local:
            return _refusal(heard, self.name)
        if status in (126, 127):
            return (
                f"there is no {sys.executable}; install the same Python environment under the same path on every host"
            )
        return f"{heard or 'no answer'} (status {status} of {'python' if self.local else 'ssh'})"


def _refusal(heard: str, name: str) -> str:
    """What ssh said, and what to do."""
    for pattern, advice in {
        "resolve": "is the name spelled right, and known here or in ~/.ssh/config?",
        "Permission denied": f"`ssh {name} true` must work without a password: ssh-copy-id {name}",
        "Host key verification": f"run `ssh {name}` once and accept its key, if it is the right one",
        "refused": "does an ssh server run there, and on the port of ~/.ssh/config?",
        "timed out": "is it switched on, and not behind a firewall?",
    }.items():
        if pattern in heard:
            return f"{heard}; {advice}"
    return heard or "ssh does not connect"


def _connect_all(hosts: Sequence[Host | None]) -> list[_Session]:
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return list(pool.map(_Session, hosts))


def _ask_all(sessions: Sequence[_Session], *requests: Mapping[str, Any]) -> list[Any]:
    """Ask all at once: each its own request, or all the same one."""
    each = requests if len(requests) > 1 else requests * len(sessions)
    with ThreadPoolExecutor(max(1, len(sessions))) as pool:
        return list(pool.map(_Session.ask, sessions, each))


def _is_here(name: str) -> bool:
    """Whether the name leads to an address of this machine; only such an address can be listened on."""
    try:
        addresses = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, address in addresses:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as attempt:
            attempt.bind(address)
            return True
    return False


def _names(hosts: Sequence[Host]) -> str:
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
