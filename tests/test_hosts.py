"""Hosts of a job: how they are named, how many ranks each gets, and why one of them cannot take part.

`ssh` is played here by a script on PATH, for the words of a message; tests/cluster has real hosts and the real ssh.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from distprop import hosts, launch
from distprop.hosts import Host, HostsError
from test_launch import needs_mpi


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a:2,b:2", [Host("a", 2), Host("b", 2)]),
        ("a, b", [Host("a", 1), Host("b", 1)]),
        ("a:2,b,a", [Host("a", 3), Host("b", 1)]),
        ("node-1.example.org:16", [Host("node-1.example.org", 16)]),
    ],
)
def test_hosts_with_their_slots(text: str, wanted: list[Host]) -> None:
    assert hosts.parse_hosts(text) == wanted


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=id", "a;id", "a b", "$(id)", "a:", "a:x", "a:-1", "", "a,,b", "a:2:3"]
)
def test_what_is_no_host_is_refused_before_ssh_sees_it(name: str) -> None:
    with pytest.raises(HostsError, match="is not a host; expected NAME, NAME:SLOTS or NAME slots=SLOTS"):
        hosts.parse_hosts(name)


def test_a_user_and_no_slots_are_refused_with_what_to_do() -> None:
    with pytest.raises(HostsError, match=r"'me@a:2'.*~/\.ssh/config"):
        hosts.parse_hosts("me@a:2")
    with pytest.raises(HostsError, match="1 rank or more"):
        hosts.parse_hosts("a:0")


def test_a_hostfile_is_open_mpis_or_mpichs(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\n\na slots=2 # fast\n  b:3\nc\nd slots = 4 max_slots=8\n")
    assert hosts.read_hostfile(path) == [Host("a", 2), Host("b", 3), Host("c", 1), Host("d", 4)]


def test_the_list_of_a_pbs_job_is_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "nodefile"
    path.write_text("node1\nnode1\nnode2\nnode2\n")
    assert hosts.read_hostfile(path) == [Host("node1", 2), Host("node2", 2)]


@pytest.mark.parametrize("line", ["b slot=2", "b slots=two", "b 2", "b:2 slots=3", "-b", "b slots=2 c", "b slots="])
def test_a_typing_error_in_a_hostfile_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"a slots=2\n\n{line}\n")
    with pytest.raises(HostsError, match=r"hosts, line 3: .* is not a host; expected"):
        hosts.read_hostfile(path)


def test_a_hostfile_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostsError, match=r"cannot read .*missing: No such file"):
        hosts.read_hostfile(tmp_path / "missing")
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(HostsError, match="names no host"):
        hosts.read_hostfile(tmp_path / "empty")


def test_ranks_fill_the_hosts_in_their_order() -> None:
    two = [Host("a", 2), Host("b", 2)]
    assert hosts.allot(two, None) == two
    assert hosts.allot(two, 3) == [Host("a", 2), Host("b", 1)]
    assert hosts.allot(two, 2) == [Host("a", 2)]


def test_more_ranks_than_slots_says_how_many_there_are_and_how_to_oversubscribe() -> None:
    with pytest.raises(HostsError, match=r"-n 5: the hosts have 4 slots \(a:2,b:2\).*oversubscribe.*--hosts a:3,b:3"):
        hosts.allot([Host("a", 2), Host("b", 2)], 5)


def test_one_network_for_all_is_preferred_to_the_fastest_of_each() -> None:
    fast = {"name": "ib0", "subnet": "10.9.0.0/16"}
    lan, other_lan = {"name": "eth0", "subnet": "10.0.0.0/24"}, {"name": "eno1", "subnet": "10.0.0.0/24"}
    assert hosts._common([[fast, lan], [lan]]) == (("10.0.0.0/24",), "eth0")
    assert hosts._common([[lan], [other_lan]]) == (("10.0.0.0/24",), None)
    assert hosts._common([[lan], [fast]]) == (("10.0.0.0/24", "10.9.0.0/16"), None)


def test_only_variables_that_matter_go_to_other_hosts() -> None:
    names = [
        "HOME",
        "PATH",
        "DISTPROP_TIMEOUT",
        "OMP_NUM_THREADS",
        "OPENBLAS_CORETYPE",
        "MKL_X",
        "PYTHONPATH",
        "SSH_TTY",
    ]
    assert hosts.forwarded(names) == ["DISTPROP_TIMEOUT", "MKL_X", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE", "PYTHONPATH"]


# ---------------------------------------------------------------------------------------- what a host may answer

SHA = {"here": "0" * 64, "there": "1" * 64}
FACTS = {
    "python": "3.11.2",
    "software": {"distprop": "0.1.0 in /env", "numpy": "2.4.6", "MPI": "Open MPI 5.0.11 from /env/lib/libmpi.so"},
    "files": {"train.py": SHA["here"]},
    "memory": 2**31,
}


def test_a_host_that_has_the_same_can_take_part() -> None:
    assert hosts._difference(FACTS, FACTS, 4) == ""
    assert hosts._difference(FACTS, {**FACTS, "python": "3.11.9"}, 4) == ""


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
    assert re.search(reason, hosts._difference(FACTS, {**FACTS, **other}, 4))


SSH = """#!/bin/sh
# The host is the last argument but one, the command the last.
while [ $# -gt 2 ]; do shift; done
case $1 in
    away) echo "ssh: Could not resolve hostname away: Name or service not known" >&2; exit 255 ;;
    locked) echo "me@locked: Permission denied (publickey)." >&2; exit 255 ;;
    shut) echo "ssh: connect to host shut port 22: Connection refused" >&2; exit 255 ;;
    bare) shift; exec /bin/sh -c "exec /nowhere/python" ;;
    slow) sleep 60 ;;
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
    monkeypatch.setenv("PYTHONPATH", str(Path(hosts.__file__).parent.parent))
    monkeypatch.setattr(hosts, "_is_here", lambda name: False)
    monkeypatch.setattr(hosts, "_identity", lambda facts: object())
    monkeypatch.setattr(hosts, "_network", lambda *facts: (("10.0.0.0/24",), "eth0"))
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 20.0)


@needs_mpi
@pytest.mark.usefixtures("ssh")
def test_hosts_that_fit_are_a_cluster_whose_cores_are_shared_by_the_ranks() -> None:
    cores = launch.allowed_cores()
    cluster = hosts.check([Host("a", cores), Host("b", 1)], [__file__])
    assert (cluster.ranks, cluster.threads, cluster.oversubscribed) == (cores + 1, 1, True)
    assert str(cluster) == f"a:{cores}, b:1 over eth0"
    assert cluster.advice == (
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
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 1.0)
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
        report.write_text("step 100")
        written = report.stat().st_ino
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


# ----------------------------------------------------------------------------------------------- what each MPI is told

CLUSTER = hosts.Cluster((Host("a", 2), Host("b", 1)), 1, False, False, True, ("10.0.0.0/24",), "eth0")


def mca(name: str, value: str) -> list[str]:
    return ["--mca", name, value]


def test_open_mpi_is_told_the_hosts_their_network_and_what_to_pass_on() -> None:
    flags = " ".join(hosts.open_mpi_flags(CLUSTER, 5, ["HOME", "DISTPROP_SIZE"], mca))
    assert flags == (
        "--host a:2,b:1 --prtemca plm_ssh_no_tree_spawn 1 --mca btl_tcp_if_include 10.0.0.0/24 "
        "--prtemca prte_if_include 10.0.0.0/24 -x DISTPROP_SIZE"
    )
    flags = " ".join(hosts.open_mpi_flags(CLUSTER, 4, ["DISTPROP_SIZE"], mca))
    assert flags == (
        "--host a:2,b:1 --mca plm_rsh_no_tree_spawn 1 --mca btl_tcp_if_include 10.0.0.0/24 "
        "--mca oob_tcp_if_include 10.0.0.0/24 -x DISTPROP_SIZE"
    )


def test_hydra_is_told_the_same() -> None:
    flags = " ".join(hosts.hydra_flags(CLUSTER, ["HOME", "DISTPROP_SIZE", "OMP_NUM_THREADS"]))
    assert flags == "-launcher ssh -hosts a:2,b:1 -iface eth0 -genvlist DISTPROP_SIZE,OMP_NUM_THREADS"
    assert hosts.hydra_environment(CLUSTER) == {"UCX_NET_DEVICES": "eth0", "FI_TCP_IFACE": "eth0"}


def test_a_fast_fabric_is_left_to_the_library() -> None:
    fabric = replace(CLUSTER, fabric=True)
    assert "btl_tcp_if_include" not in hosts.open_mpi_flags(fabric, 5, [], mca)
    assert hosts.hydra_environment(fabric) == {}
