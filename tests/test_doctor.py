"""What `distprop doctor` shows of one host and of several, real ranks' measurements, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from distprop import comm, doctor, launch
from distprop.bench import links
from distprop.doctor import Finding, examination, job, machine, software
from distprop.doctor.finding import merged
from distprop.hosts import Host, HostsError, Survey
from test_cli_run import NO_MPI, ROOT
from test_launch import needs_mpi


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launch.THREAD_VARIABLES, *software.KERNEL_VARIABLES, "NPY_DISABLE_CPU_FEATURES", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name in comm._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def distprop(*arguments: str, seconds: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "distprop", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_a_check_that_fails_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "interfaces", lambda: 1 / 0)
    monkeypatch.setattr(software, "thread_level", lambda: Finding("thread level", "multiple"))
    found = {finding.name: finding for finding in doctor.check_host(tmp_path)}
    assert found["interfaces"].status == "fail"
    assert "ZeroDivisionError" in found["interfaces"].value
    assert len(found) == 13


# -------------------------------------------------------------------------------------------------------- several ranks


def test_ranks_bound_to_one_core_are_a_warning() -> None:
    assert job.binding("a", ["0,1", "0,1"]).value == "2 ranks on 2 cores, not bound"
    assert job.binding("a", ["0", "1"]).status == "ok"
    assert job.binding("a", ["0", "0", "1"]).status == "ok"  # more ranks than cores is another finding
    assert "--bind-to none" in job.binding("a", ["0", "0", "1,2"]).advice


def test_cores_are_those_of_all_ranks_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {threading.get_ident()})  # each is bound to its own
    monkeypatch.setattr(links, "measure_links", lambda comm, host: links.Links((), None))
    monkeypatch.setattr(links, "measure_speed", lambda comm: [1.0] * comm.size)
    found, _ = comm.run_threads(2, lambda ranks: job.check_job(ranks, tmp_path))
    (cores,) = (finding for finding in found if finding.name == "cores")
    assert (cores.status, cores.value.split()[0]) == ("ok", "2")


def test_hosts_that_differ_are_named() -> None:
    findings = {"a": [Finding("Python", "3.11"), Finding("cores", "4")], "b": [Finding("Python", "3.12")] * 2}
    (different,) = job.compare_hosts(findings)
    assert (different.status, different.advice) == ("warn", "b and a differ: install the same on all hosts")
    assert job.compare_hosts({"a": findings["a"]}) == []


def test_what_is_the_same_on_several_hosts_is_one_row_of_the_table() -> None:
    cores, few = Finding("cores", "8"), Finding("cores", "2", "warn", "take fewer")
    found = [replace(finding, host=host) for host, finding in {"a": cores, "b": few, "c": cores}.items()]
    found += [Finding("BLAS", "OpenBLAS", host=host) for host in "abc"]
    assert [(finding.name, finding.status, finding.host) for finding in merged(found, set("abc"))] == [
        ("cores", "ok", "a, c"),
        ("cores", "warn", "b"),
        ("BLAS", "ok", "all hosts"),
    ]


def test_the_table_names_hosts_and_is_short_where_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    many = [Finding("interfaces", f"eth0 10.0.0.{number}", host=f"node{number}") for number in range(20)]
    doctor.show([*many, Finding("cores", "2", "warn", "take fewer", host="node7")])
    text = capsys.readouterr().out
    assert "eth0 10.0.0.6 " in text
    assert "eth0 10.0.0.7 " not in text
    assert "and the like on 13 more hosts; --json has them" in text
    assert "cores on node7: take fewer" in text


FACTS = {"hostname": "a1", "python": "3.11.2", "cores": 4, "memory": 2**30, "asked": 70.0, "time": 71, "answered": 78}


def test_hosts_that_cannot_take_part_are_findings_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = {"a": FACTS, "b": {**FACTS, "time": 40.0}}
    failures = {"c": "ssh: Connection refused; does an ssh server run there?", "d": "numpy is 2.0 there and 2.4 here"}
    monkeypatch.setattr(examination, "survey", lambda hosts: Survey(answers, failures, None))
    asked = []

    def ask(planned: object) -> tuple[int, str]:
        asked.append(planned)
        return 0, doctor.to_json([Finding("Allreduce between hosts", "fast")])

    monkeypatch.setattr(examination, "plan", lambda ranks, program, module, hosts: (ranks, hosts))
    monkeypatch.setattr(examination, "ask", ask)
    found = doctor.examine(tmp_path, None, [Host("a", 2), Host("b", 2), Host("c"), Host("d")])
    assert asked == [(4, [Host("a", 2), Host("b", 2)])]
    assert [(finding.host, finding.status, finding.advice) for finding in found] == [
        ("a", "ok", ""),
        ("b", "warn", "logs and file times will mislead: set its clock by NTP"),
        ("c", "fail", "does an ssh server run there?"),
        ("d", "fail", "give it what this host has"),
        ("", "ok", ""),
    ]
    assert found[0].value == "a1, Python 3.11.2, 4 cores, 1,024 MiB free, slots 2"
    assert found[1].value.endswith("its clock is 30 s behind")
    assert found[2].value == "ssh: Connection refused"


def test_ranks_that_cannot_be_started_on_hosts_are_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plan(*arguments: object, **options: object) -> None:
        raise HostsError("no route\n  from b to a")

    monkeypatch.setattr(examination, "survey", lambda hosts: Survey({"a": FACTS}, {"b": "gone"}, None))
    monkeypatch.setattr(examination, "plan", plan)
    monkeypatch.setattr(examination, "check_host", lambda run_dir, ranks: [])
    *_, last = doctor.examine(tmp_path, None, [Host("a"), Host("b")])
    assert (last.status, last.value, last.advice) == ("fail", "1 rank cannot be started", "no route from b to a")


def test_one_address_on_two_hosts_is_a_warning() -> None:
    hosts = {"a": {"eth0": "10.0.0.1", "docker0": "172.17.0.1"}, "b": {"eth0": "10.0.0.2", "docker0": "172.17.0.1"}}
    assert job.same_addresses(hosts).advice.endswith("OMPI_MCA_btl_tcp_if_exclude=lo,docker0")
    assert job.same_addresses({"a": hosts["a"]}).status == "ok"


def test_a_slow_rank_is_named_with_its_host() -> None:
    hosts = {0: "a", 1: "a", 2: "b"}
    found = job.slowest_rank([1.0, 1.0, 1.5], hosts)
    assert (found.status, found.value) == ("warn", "rank 2 on b, 1.50 times the median")
    assert job.slowest_rank([1.0, 1.0, 1.2], hosts).status == "ok"


@needs_mpi
def test_ranks_are_started_and_measured(tmp_path: Path) -> None:
    done = distprop("doctor", "-n", "2", "--json", "--run-dir", str(tmp_path))
    answer = json.loads(done.stdout)
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert done.returncode == (answer["status"] == "fail"), done.stderr
    assert found["world size"]["value"] == "2, started by distprop run"
    assert found["thread level"]["value"] in ("multiple", "serialized", "funneled", "single")
    assert found["Allreduce within"]["value"].startswith("2 ranks: ")
    assert found["slowest rank"]["value"].startswith("rank ")


@needs_mpi
def test_two_names_on_one_machine_are_two_hosts(tmp_path: Path) -> None:
    script = tmp_path / "hosts.py"
    script.write_text(
        "import pathlib, sys\nfrom distprop import doctor\nfrom distprop.comm import world\n"
        "comm = world()\nfindings = doctor.check_job(comm, pathlib.Path(sys.argv[1]), 'ab'[comm.rank // 2])\n"
        "if comm.rank == 0: print(doctor.to_json(findings))\n"
    )
    done = distprop("run", "-n", "4", str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = {(finding["name"], finding["host"]): finding for finding in json.loads(done.stdout)["findings"]}
    for name in ("Python", "cores", "run directory", "binding", "Allreduce within"):
        assert {(name, "a"), (name, "b")} <= set(found)
    assert found["Allreduce between hosts", ""]["value"].startswith("2 hosts: ")
    assert found["run directory shared", ""]["value"] == "by all hosts"


# ---------------------------------------------------------------------------------------------------------- the command


def test_without_mpi_it_says_so_and_nothing_fails(tmp_path: Path) -> None:
    done = distprop("doctor", "--run-dir", str(tmp_path), **NO_MPI)
    assert done.returncode == 0, done.stdout
    assert "none; one process works without" in done.stdout
    assert "MPI library: for several ranks: pip install" in done.stdout
    assert max(map(len, done.stdout.partition("\n\n")[0].splitlines())) <= 80


def test_several_ranks_without_mpi_fail(tmp_path: Path) -> None:
    done = distprop("doctor", "-n", "2", "--run-dir", str(tmp_path), **NO_MPI)
    assert done.returncode == 1
    assert "2 ranks cannot be started" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="root can write everywhere but to /proc")
def test_what_fails_is_the_exit_status() -> None:
    done = distprop("doctor", "--json", "--run-dir", "/proc/self/runs", **NO_MPI)
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "fail"
