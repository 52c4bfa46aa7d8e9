"""Hosts of a job: why one of them cannot take part, what MPI is told of them, and what is left there.

`ssh` is played here by a script on PATH, for the words of a message; tests/cluster has real hosts and the real ssh.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from distprop import hosts, launch
from distprop.hosts import Host, HostsError, compatibility, network, probe, session
from test_launch import needs_mpi


def test_one_network_for_all_is_preferred_to_the_fastest_of_each() -> None:
    fast = {"name": "ib0", "subnet": "10.9.0.0/16"}
    lan, other_lan = {"name": "eth0", "subnet": "10.0.0.0/24"}, {"name": "eno1", "subnet": "10.0.0.0/24"}
    assert network._common([[fast, lan], [lan]]) == (("10.0.0.0/24",), "eth0")
    assert network._common([[lan], [other_lan]]) == (("10.0.0.0/24",), None)
    assert network._common([[lan], [fast]]) == (("10.0.0.0/24", "10.9.0.0/16"), None)


def test_a_host_that_is_reached_may_take_longer_to_greet_than_one_that_is_not_reached_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        late = threading.Timer(1, probe._greet, (listener, "a token"))
        late.daemon = True
        late.start()
        peer = {"addresses": ["127.0.0.1"], "port": listener.getsockname()[1], "token": "a token"}
        assert probe.connect([peer]) == [{"reached": ["127.0.0.1"], "refused": []}]


def test_only_variables_that_matter_go_to_other_hosts() -> None:
    names = [
        "HOME",
        "PATH",
        "DISTPROP_TIMEOUT",
        "OMP_NUM_THREADS",
        "OPENBLAS_CORETYPE",
        "MKL_X",
        "NPY_DISABLE_CPU_FEATURES",
        "PYTHONPATH",
        "SSH_TTY",
    ]
    assert hosts.forwarded(names) == sorted(set(names) - {"HOME", "PATH", "SSH_TTY"})


def test_what_the_live_view_has_to_know_of_the_terminal_goes_to_the_host_of_rank_0() -> None:
    names = ["COLUMNS", "DISTPROP_TERMINAL", "DISTPROP_WINDOW", "LANG", "LC_ALL", "LINES", "NO_COLOR", "TERM"]
    assert hosts.forwarded(names) == names


# ---------------------------------------------------------------------------------------- what a host may answer

SHA = {"here": "0" * 64, "there": "1" * 64}
FACTS = {
    "python": "3.11.2",
    "software": {"distprop": "0.1.0 in /env", "numpy": "2.4.6", "MPI": "Open MPI 5.0.11 from /env/lib/libmpi.so"},
    "files": {"train.py": SHA["here"]},
    "memory": 2**31,
}


def test_a_host_that_has_the_same_can_take_part() -> None:
    assert compatibility._difference(FACTS, FACTS, 4) == ""
    assert compatibility._difference(FACTS, {**FACTS, "python": "3.11.9"}, 4) == ""


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"python": "3.12.1"}, "is Python 3.12.1 there and 3.11.2 here"),
        ({"directory": "No such file or directory"}, "No such file or directory; a job needs it under the same path"),
        ({"software": {"error": "ModuleNotFoundError: no distprop"}}, "distprop cannot be used by .* no distprop"),
        ({"software": {**FACTS["software"], "numpy": "2.0.0"}}, "numpy is 2.0.0 there and 2.4.6 here"),
        ({"software": {**FACTS["software"], "MPI": "MPICH 5.0.2"}}, "MPI is MPICH 5.0.2 there and Open MPI 5.0.11"),
        ({"files": {"train.py": SHA["there"]}}, "train.py: not the file that is here"),
        ({"files": {"train.py": "No such file or directory"}}, "train.py: No such file or directory"),
        ({"memory": 300 * 2**20}, "300 MiB of memory are free, and 4 ranks with MPI take 100 MiB each"),
    ],
)
def test_what_differs_on_a_host_is_said(other: dict[str, object], reason: str) -> None:
    assert re.search(reason, compatibility._difference(FACTS, {**FACTS, **other}, 4))


@pytest.mark.parametrize(
    ("time", "said"), [(100, ""), (109, ""), (98.5, ""), (110.5, ""), (40, "60 s behind"), (112, "3 s ahead")]
)
def test_a_clock_is_off_by_what_the_wait_for_the_answer_does_not_explain(time: float, said: str) -> None:
    assert hosts.clock_is_off({"asked": 100, "answered": 109, "time": time}) == said


SSH = """#!/bin/sh
# The host is the last argument but one, the command the last.
while [ $# -gt 2 ]; do shift; done
case $1 in
    away) echo "ssh: Could not resolve hostname away: Name or service not known" >&2; exit 255 ;;
    locked) echo "me@locked: Permission denied (publickey)." >&2; exit 255 ;;
    shut) echo "ssh: connect to host shut port 22: Connection refused" >&2; exit 255 ;;
    bare) shift; exec /bin/sh -c "exec /nowhere/python" ;;
    slow) sleep 60 ;;
    dying) /bin/sh -c "$2"; echo "Connection to dying closed by remote host." >&2; exit 255 ;;
    *) echo "Welcome to $1"; echo "and to its motto" >&2; exec /bin/sh -c "$2" ;;
esac
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hosts are this one, unless their names say otherwise; the way between them is not looked for."""
    path = tmp_path / "bin" / "ssh"
    path.parent.mkdir()
    path.write_text(SSH)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parent.parent))
    monkeypatch.setattr(session, "_is_here", lambda name: False)
    monkeypatch.setattr(compatibility, "_identity", lambda facts: object())
    monkeypatch.setattr(compatibility, "find_network", lambda *facts: (network.Network(("10.0.0.0/24",), "eth0"), {}))
    monkeypatch.setattr(session, "ANSWER_SECONDS", 20.0)


@needs_mpi
@pytest.mark.usefixtures("ssh")
def test_hosts_that_fit_are_a_cluster_whose_cores_are_shared_by_the_ranks() -> None:
    cores = launch.allowed_cores()
    cluster = hosts.check([Host("a", cores), Host("b", 1)], [__file__])
    assert (cluster.ranks, cluster.threads, cluster.oversubscribed) == (cores + 1, 1, True)
    assert str(cluster) == f"a:{cores}, b:1 over eth0"
    assert cluster.crowded == (
        f"a, b are one machine, where {cores + 1} ranks share {_cores(cores)}: correct, but slow",
    )


def _cores(number: int) -> str:
    return f"{number} core{'s' * (number > 1)}"


@needs_mpi
@pytest.mark.usefixtures("ssh")
def test_every_host_that_fails_is_named_with_its_reason_and_what_to_do() -> None:
    names = ["fine", "away", "locked", "shut", "bare"]
    with pytest.raises(HostsError) as refusal:
        hosts.check([Host(name) for name in names])
    first, *lines = str(refusal.value).splitlines()
    assert first == "4 of 5 hosts cannot run the job; nothing was started"
    expected = ["away: .*not known; is the name", "locked: .*ssh-copy-id locked", "shut: .*refused", "bare: .*no /"]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.usefixtures("ssh")
def test_a_host_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "ANSWER_SECONDS", 1.0)
    assert hosts.alive([Host("slow")]) == []


@pytest.mark.usefixtures("ssh")
def test_hosts_that_are_alive_are_those_that_answer() -> None:
    assert hosts.alive([Host("a", 2), Host("away"), Host("b", 3), Host("shut")]) == [Host("a", 2), Host("b", 3)]


@pytest.mark.usefixtures("ssh")
def test_the_guard_kills_what_is_left_of_a_job_and_only_that() -> None:
    marker = uuid.uuid4().hex
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    marked, other = (
        subprocess.Popen(sleep, env={**os.environ, "DISTPROP_JOB": name}, stdout=subprocess.PIPE)
        for name in (marker, "another")
    )
    with marked, other:
        for process in (marked, other):
            assert process.stdout
            process.stdout.readline()  # by now the environment of the process is its own
        with hosts.Guard([Host("a")], marker) as guard:
            guard.well = True
        assert marked.poll() is None
        with hosts.Guard([Host("a")], marker) as guard:
            assert marked.poll() is None
        assert marked.wait(5) == -9
        assert other.poll() is None
        assert guard.lost == []
        other.kill()


@pytest.mark.usefixtures("ssh")
def test_the_guard_brings_here_what_a_rank_writes_and_hears_when_one_ends_the_job(tmp_path: Path) -> None:
    report = tmp_path / "report.json"  # the same file here and on the played host, so a copy is a new file
    with hosts.Guard([Host("a")], uuid.uuid4().hex, str(report)) as guard:
        with report.open("w") as file:
            file.write("step 100")
            written = os.fstat(file.fileno()).st_ino
        assert not guard.is_ending()
        guard.well = True
    assert report.read_text() == "step 100"
    assert report.stat().st_ino != written
    with hosts.Guard([Host("a")], uuid.uuid4().hex) as guard:
        Path(guard.sign).touch()
        deadline = time.monotonic() + 10
        while not guard._ending and time.monotonic() < deadline:
            time.sleep(0.01)
        assert guard._ending
    assert not Path(guard.sign).exists()


@pytest.mark.usefixtures("ssh")
def test_the_guard_names_the_host_that_it_loses(capfd: pytest.CaptureFixture[str]) -> None:
    with hosts.Guard([Host("a"), Host("shut")], "-") as guard:
        deadline = time.monotonic() + 10
        while not guard.lost and time.monotonic() < deadline:
            time.sleep(0.01)
    assert guard.lost == ["shut"]
    assert "lost host shut: ssh: connect to host shut port 22: Connection refused" in capfd.readouterr().err


@pytest.mark.usefixtures("ssh")
def test_the_guard_hears_the_last_news_and_words_however_late_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watch, read = hosts.Guard._watch, session.Session._read_complaints

    def late_watch(guard: hosts.Guard, of_host: session.Session) -> None:
        of_host.wait()
        time.sleep(1)
        watch(guard, of_host)

    def late_read(of_host: session.Session) -> None:
        of_host.wait()
        time.sleep(2 if of_host.name == "dying" else 0)
        read(of_host)

    monkeypatch.setattr(hosts.Guard, "_watch", late_watch)
    monkeypatch.setattr(session.Session, "_read_complaints", late_read)
    report = tmp_path / "report.json"
    with hosts.Guard([Host("a")], uuid.uuid4().hex, str(report)), report.open("w") as file:
        file.write("step 100")
        written = os.fstat(file.fileno()).st_ino
    assert report.stat().st_ino != written
    with hosts.Guard([Host("dying")], uuid.uuid4().hex):
        pass
    assert "lost host dying: Connection to dying closed by remote host." in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------- what each MPI is told

CLUSTER = hosts.Cluster((Host("a", 2), Host("b", 1)), 1, False, False, True, ("10.0.0.0/24",), "eth0")


def mca(name: str, value: str) -> list[str]:
    return ["--mca", name, value]


def test_open_mpi_is_told_the_hosts_their_network_and_what_to_pass_on() -> None:
    flags = " ".join(hosts.open_mpi_flags(CLUSTER, 5, ["HOME", "DISTPROP_SIZE"], mca))
    assert flags == (
        "--host a:2,b:1 --prtemca plm_ssh_no_tree_spawn 1 --mca btl_tcp_if_include 10.0.0.0/24 "
        "--prtemca prte_if_include 10.0.0.0/24 --mca btl_tcp_eager_limit 4198400 --mca btl_tcp_max_send_size 4198400 "
        "-x DISTPROP_SIZE"
    )
    flags = " ".join(hosts.open_mpi_flags(CLUSTER, 4, ["DISTPROP_SIZE"], mca))
    assert flags == (
        "--host a:2,b:1 --mca plm_rsh_no_tree_spawn 1 --mca btl_tcp_if_include 10.0.0.0/24 "
        "--mca oob_tcp_if_include 10.0.0.0/24 --mca btl_tcp_eager_limit 4198400 --mca btl_tcp_max_send_size 4198400 "
        "-x DISTPROP_SIZE"
    )


def test_hydra_is_told_the_same() -> None:
    flags = " ".join(hosts.hydra_flags(CLUSTER, ["HOME", "DISTPROP_SIZE", "OMP_NUM_THREADS"]))
    assert flags == "-launcher ssh -hosts a:2,b:1 -iface eth0 -genvlist DISTPROP_SIZE,OMP_NUM_THREADS"
    assert hosts.hydra_environment(CLUSTER) == {"UCX_NET_DEVICES": "eth0", "FI_TCP_IFACE": "eth0"}


def test_a_fast_fabric_is_left_to_the_library() -> None:
    fabric = replace(CLUSTER, fabric=True)
    assert "btl_tcp" not in " ".join(hosts.open_mpi_flags(fabric, 5, [], mca))
    assert hosts.hydra_environment(fabric) == {}
