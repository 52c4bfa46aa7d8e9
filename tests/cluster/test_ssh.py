"""`distprop run --hosts` on real hosts with a real ssh server, under every MPI: what arrives, and what is left."""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
import time
from collections.abc import Callable

import pytest
from containers import LIMIT_SECONDS, NODES, ROOT, Hosts

MPIS = {"distprop": "Open MPI 5", "openmpi4": "Open MPI 4.1", "mpich5": "MPICH 5", "mpich4": "MPICH 4"}
REPORT = """
import glob, json, os
import numpy as np
from mpi4py import MPI
from distprop.comm import world
comm = world()
total = comm.allreduce(np.full(1_000_000, comm.rank + 1.0, np.float32))
gradient = comm.allocate(1000, np.float32)
gradient[:] = comm.rank + 1
comm.allreduce(gradient)
together = len(comm.node.arrays(gradient)) if comm.node else 1  # ranks that sum it in memory of their host
host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
window = MPI.Win.Allocate_shared(8, 8, comm=host)
np.frombuffer(window.Shared_query(host.rank)[0])[0] = 10 + comm.rank
window.Fence()
of_host = [float(np.frombuffer(window.Shared_query(rank)[0])[0]) for rank in range(host.size)]
print("report " + json.dumps({
    "rank": comm.rank, "size": comm.size, "total": float(total[-1]),
    "gradient": float(gradient[-1]), "together": together, "host": os.uname().nodename, "shared": of_host,
    "folder": os.getcwd(), "user": os.getuid(),
    "daemons": len(glob.glob(os.getenv("DISTPROP_DAEMONS", "/nowhere") + "/*")),
    "variables": {name: os.getenv(name) for name in ("DISTPROP_TIMEOUT", "OMP_NUM_THREADS", "MKL_X", "PYTHONPATH")},
}))
window.Free()
"""
STUCK = """
import os, sys, time
from distprop.comm import world
comm = world()
print("ready", comm.rank, flush=True)
if len(sys.argv) > 1 and comm.rank == int(sys.argv[1]):
    while not os.path.exists("scripts/all-are-there"):
        time.sleep(0.1)
    raise ValueError("boom")
if comm.rank == 0:
    comm.barrier()
time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def scripts(hosts: Hosts) -> None:
    """Under the same path on all hosts."""
    for name, source in {"report.py": REPORT, "stuck.py": STUCK}.items():
        (hosts.scripts / name).write_text(textwrap.dedent(source))


@pytest.mark.parametrize("mpi", MPIS)
def test_ranks_run_where_they_are_told_with_what_they_need(mpi: str, hosts: Hosts) -> None:
    options = ["-e", "DISTPROP_TIMEOUT=77", "-e", "MKL_X=a b", "-e", "PYTHONPATH=/work/scripts", "-e", "SECRET=1"]
    command = ["run", "-n", "5", "--hosts", "node2:2,node1:2,node4:2", "scripts/report.py"]
    done = hosts.distprop(*command, mpi=mpi, options=options)
    assert done.returncode == 0, done.stderr
    assert f"5 ranks on node2:2, node1:2, node4:1 over eth0, {MPIS[mpi]}" in done.stderr
    reports = [json.loads(line.removeprefix("report ")) for line in done.stdout.splitlines() if "report" in line]
    reports.sort(key=lambda report: report["rank"])
    assert [report["host"] for report in reports] == ["node2", "node2", "node1", "node1", "node4"]
    assert [report["shared"] for report in reports] == [[10, 11]] * 2 + [[12, 13]] * 2 + [[14]]
    assert [report["together"] for report in reports] == [2, 2, 2, 2, 1]
    assert [report["daemons"] for report in reports] == ([1] * 5 if mpi in ("distprop", "openmpi4") else [0] * 5)
    wanted = {"DISTPROP_TIMEOUT": "77", "OMP_NUM_THREADS": "1", "MKL_X": "a b", "PYTHONPATH": "/work/scripts"}
    for report in reports:
        assert (report["size"], report["total"], report["gradient"]) == (5, 15.0, 15.0)
        assert (report["folder"], report["user"]) == ("/work", 1000)
        assert report["variables"] == wanted
    assert "rror" not in done.stderr  # such as of copies between processes, which containers forbid


def start(hosts: Hosts, mpi: str, *arguments: str) -> subprocess.Popen[str]:
    """A job on three hosts whose ranks are all there, which they learn as well."""
    there = hosts.scripts / "all-are-there"
    there.unlink(missing_ok=True)
    command = ["docker", "exec", hosts.containers["launcher"], "timeout", "100"]
    command += [f"/opt/{mpi}/bin/python", "-m", "distprop"]
    command += ["run", "--hosts", "node1:2,node2,node3", "scripts/stuck.py", *arguments]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout
    for _ in range(4):
        line = job.stdout.readline()
        assert line.startswith("ready"), line + job.communicate()[1]
    there.touch()
    return job


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def signal_launcher(hosts: Hosts, signal: str, *patterns: str) -> None:
    """To the processes of the launcher's container whose command begins so; others may end meanwhile."""
    source = (
        "import contextlib, glob, os, signal\n"
        "for path in glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    with contextlib.suppress(FileNotFoundError, ProcessLookupError):\n"
        "        words = open(path).read().replace(chr(0), ' ')\n"
        f"        if words.startswith({patterns!r}): os.kill(int(path.split('/')[2]), signal.{signal}); print(words)"
    )
    done = hosts.on("launcher", "python", "-c", source)
    assert done.returncode == 0, done.stderr
    assert done.stdout, f"no process whose command begins with {patterns}"


@pytest.mark.parametrize("mpi", MPIS)
def test_a_rank_that_raises_ends_the_job_on_all_hosts(mpi: str, hosts: Hosts) -> None:
    with start(hosts, mpi, "3") as job:
        _, complaint = job.communicate(timeout=30)
    assert job.returncode == 1
    assert "rank 3 of 4 on node3, start: ValueError: boom; ending the job" in complaint
    assert wait_until(lambda: not hosts.left()), hosts.left()


@pytest.mark.parametrize("mpi", ["distprop", "mpich5"])
def test_a_signal_ends_the_job_on_all_hosts(mpi: str, hosts: Hosts) -> None:
    with start(hosts, mpi) as job:
        signal_launcher(hosts, "SIGTERM", f"/opt/{mpi}/bin/python -m distprop run")
        _, complaint = job.communicate(timeout=30)
    assert job.returncode == 143
    assert "SIGTERM; ending all ranks" in complaint
    assert wait_until(lambda: not hosts.left()), hosts.left()


@pytest.mark.parametrize(
    ("killed", "mpi"),
    [
        *((killed, mpi) for killed in ("distprop run", "distprop run and mpirun") for mpi in ("distprop", "mpich5")),
        ("distprop run and mpirun", "openmpi4"),
    ],
)
def test_no_rank_on_any_host_outlives(killed: str, mpi: str, hosts: Hosts) -> None:
    with start(hosts, mpi) as job:
        if killed != "distprop run":
            signal_launcher(hosts, "SIGSTOP", f"/opt/{mpi}/bin/python -m distprop run")
            signal_launcher(hosts, "SIGKILL", *(f"/opt/{mpi}/bin/{name}" for name in ("prterun", "mpirun", "mpiexec")))
        signal_launcher(hosts, "SIGKILL", f"/opt/{mpi}/bin/python -m distprop run")
        assert job.wait(30) == 137
    assert wait_until(lambda: not hosts.left()), hosts.left()


@pytest.mark.parametrize("mpi", MPIS)
def test_a_host_that_is_lost_ends_the_job_and_is_named(mpi: str, hosts: Hosts) -> None:
    with start(hosts, mpi) as job:
        subprocess.run(["docker", "kill", hosts.containers["node3"]], check=True, capture_output=True)
        try:
            _, complaint = job.communicate(timeout=30)
        finally:
            subprocess.run(["docker", "start", hosts.containers["node3"]], check=True, capture_output=True)
    assert job.returncode not in (0, None)
    assert "lost host node3" in complaint
    assert wait_until(lambda: not hosts.left()), hosts.left()
    assert wait_until(lambda: hosts.on("node3", "ssh", "localhost", "true").returncode == 0, LIMIT_SECONDS)


# ------------------------------------------------------------------------------------------------ hosts that do not fit


def refusal(hosts: Hosts, *arguments: str) -> str:
    """What is said on standard error; nothing has been started, and there is no traceback."""
    done = hosts.distprop("run", *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_every_host_that_cannot_take_part_is_named_with_its_reason(hosts: Hosts) -> None:
    for name, change in {
        "node2": "mv /opt/distprop /opt/away",
        "node3": "echo '# changed' >> /opt/distprop/lib/python3.11/site-packages/distprop/nn/layers.py",
        "node4": "mv /opt/distprop/lib/libmpi.so.40 /opt/away",
    }.items():
        assert hosts.on(name, "sh", "-c", change, options=["-u", "root"]).returncode == 0
    try:
        said = refusal(hosts, "--hosts", "node1,node2,node3,node4,nowhere,setup", "scripts/report.py")
    finally:
        for name, change in {
            "node2": "mv /opt/away /opt/distprop",
            "node3": "sed -i '$d' /opt/distprop/lib/python3.11/site-packages/distprop/nn/layers.py",
            "node4": "mv /opt/away /opt/distprop/lib/libmpi.so.40",
        }.items():
            assert hosts.on(name, "sh", "-c", change, options=["-u", "root"]).returncode == 0
    assert "5 of 6 hosts cannot run the job; nothing was started" in said
    assert "node1:" not in said
    assert "node2: there is no /opt/distprop/bin/python" in said
    assert "node3: source of distprop is " in said
    assert "node4: distprop cannot be used by /opt/distprop/bin/python there: MPIMissingError" in said
    assert "nowhere: ssh: Could not resolve hostname nowhere" in said
    assert "setup: ssh: connect to host setup port 2222: Connection refused" in said
    assert hosts.distprop("run", "--hosts", ",".join(NODES), "scripts/report.py").returncode == 0


PRETEND = "/opt/distprop/lib/python3.11/site-packages/pretend.pth"  # whose line Python runs when it starts


def test_hosts_with_another_python_or_package_are_named_and_a_wrong_clock_is_mentioned(hosts: Hosts) -> None:
    for name, source in {
        "node1": "import time; time.time = lambda ns=time.time_ns: ns() / 1e9 - 3600",
        "node2": "import platform; platform.python_version = lambda: '3.12.1'",
        "node3": "import numpy; numpy.__version__ = '2.0.0'",
        "node4": "import sys; sys.modules['distprop'] = None",
    }.items():
        command = ["sh", "-c", f'echo "$0" > {PRETEND}', source]
        assert hosts.on(name, *command, options=["-u", "root"]).returncode == 0
    try:
        said = refusal(hosts, "--hosts", "node1,node2,node3,node4", "scripts/report.py")
        alone = hosts.distprop("run", "--hosts", "node1", "scripts/report.py")
    finally:
        for name in NODES:
            hosts.on(name, "rm", PRETEND, options=["-u", "root"])
    assert "3 of 4 hosts cannot run the job" in said
    assert "node2: /opt/distprop/bin/python is Python 3.12.1 there and 3.11.2 here" in said
    assert "node3: numpy is 2.0.0 there and " in said
    assert "node4: distprop cannot be used by /opt/distprop/bin/python there: ModuleNotFoundError" in said
    assert alone.returncode == 0, alone.stderr
    assert re.search(r"node1: its clock is (35[4-9]\d|3600) s behind", alone.stderr), alone.stderr


def test_a_run_directory_of_each_host_is_refused_where_another_may_have_to_go_on(hosts: Hosts) -> None:
    settings = ["--set", "train.run_dir=/tmp/a-run", "--set", "train.epochs=1"]
    command = ["train", "--hosts", "node1,node2", "--max-restarts", "1", *settings, "examples/digits.toml"]
    done = hosts.distprop(*command)
    assert done.returncode not in (0, None), done.stderr
    assert "/tmp/a-run/checkpoints must be one folder for all hosts, but node1, where rank 0 is" in done.stderr
    assert "put it on a file system that the hosts share" in done.stderr


def test_a_script_and_a_folder_must_be_on_every_host(hosts: Hosts) -> None:
    hosts.on("launcher", "sh", "-c", "mkdir -p /tmp/here; echo 'print(1)' | tee /tmp/here/train.py > /tmp/train.py")
    assert "node1: /tmp/train.py: No such file or directory" in refusal(hosts, "--hosts", "node1", "/tmp/train.py")
    hosts.on("node1", "sh", "-c", "echo 'print(2)' > /tmp/train.py")
    assert "node1: /tmp/train.py: not the file that is here" in refusal(hosts, "--hosts", "node1", "/tmp/train.py")
    done = hosts.distprop("run", "--hosts", "node1", "train.py", options=["-w", "/tmp/here"])
    assert "node1: the working directory /tmp/here: No such file or directory" in done.stderr


def test_more_ranks_than_slots_and_a_wrong_hostfile_are_refused_before_any_host_is_asked(hosts: Hosts) -> None:
    said = refusal(hosts, "-n", "9", "--hosts", "node1:2,nowhere:2", "scripts/report.py")
    assert "the hosts have 4 slots (node1:2,nowhere:2)" in said
    assert "--hosts node1:5,nowhere:5" in said
    hosts.on("launcher", "sh", "-c", "printf 'node1 slots=2\\nnode2 slot=2\\n' > /tmp/hostfile")
    assert "/tmp/hostfile, line 2: 'node2 slot=2' is not a host" in refusal(
        hosts, "--hostfile", "/tmp/hostfile", "scripts/report.py"
    )


def test_a_script_for_a_hostfile(hosts: Hosts) -> None:
    (hosts.scripts / "cluster.sh").write_text((ROOT / "launch/cluster.sh").read_text())
    hosts.on("launcher", "sh", "-c", "printf 'node1 slots=2\\nnode2:1\\n' > /tmp/hostfile")
    done = hosts.on("launcher", "sh", "scripts/cluster.sh", "/tmp/hostfile", "scripts/report.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report") == 3


# ----------------------------------------------------------------------------------------------------- between networks


def docker_network(*arguments: str) -> str:
    return subprocess.run(["docker", "network", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_hosts_without_a_way_to_each_other_are_named_and_a_common_network_is_found(hosts: Hosts) -> None:
    """node4 moves to another network, where the launcher is as well; then node1 comes there too."""
    first = next(iter(json.loads(docker_inspect(hosts.containers["node4"]))))
    other = docker_network("create", f"{first}-other")
    joined = ["launcher", "node4"]
    try:
        for name in joined:
            docker_network("connect", "--alias", name, other, hosts.containers[name])
        docker_network("disconnect", first, hosts.containers["node4"])
        said = refusal(hosts, "--hosts", "node1,node4", "scripts/report.py")
        assert "node1: no route from node4 to it" in said
        assert "node4: no route from node1 to it" in said
        docker_network("connect", "--alias", "node1", other, hosts.containers["node1"])
        joined.append("node1")
        for mpi in ("distprop", "mpich5"):
            done = hosts.distprop("run", "--hosts", "node1,node4", "scripts/report.py", mpi=mpi)
            assert done.returncode == 0, done.stderr
            assert "2 ranks on node1:1, node4:1 over " in done.stderr
    finally:
        for name in joined:
            docker_network("disconnect", other, hosts.containers[name])
        docker_network("connect", "--alias", "node4", first, hosts.containers["node4"])
        docker_network("rm", other)


def docker_inspect(container: str) -> str:
    command = ["docker", "inspect", "-f", "{{json .NetworkSettings.Networks}}", container]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
