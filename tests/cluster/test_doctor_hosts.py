"""`distprop doctor --hosts` and `distprop predict --hosts` on real hosts: what is found, what is measured."""

from __future__ import annotations

import json
import re

from containers import Hosts


def test_the_doctor_looks_at_every_host_and_measures_within_and_between_them(hosts: Hosts) -> None:
    done = hosts.distprop("doctor", "--hosts", "node1:2,node2:2,nowhere", "--json")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    found = {(finding["name"], finding["host"]): finding for finding in answer["findings"]}
    assert answer["status"] == "fail"
    assert found["host", "nowhere"]["status"] == "fail"
    assert "Could not resolve hostname nowhere" in found["host", "nowhere"]["value"]
    for host in ("node1", "node2"):
        assert found["host", host]["value"].startswith(f"{host}, Python 3.11.2, ")
        assert found["world size", host]["value"] == "4, started by distprop run"
        assert re.fullmatch(r"/dev/shm: \d+ MB free of 537 MB", found["shared memory", host]["value"])
        assert found["binding", host]["value"].startswith("2 ranks on ")
        assert found["Allreduce within", host]["value"].startswith("2 ranks: ")
    assert found["Allreduce between hosts", ""]["value"].startswith("2 hosts: ")
    assert found["run directory shared", ""]["value"] == "by all hosts"
    assert found["slowest rank", ""]["value"].startswith("rank ")


def test_the_doctor_shows_a_table_of_the_hosts_in_a_file(hosts: Hosts) -> None:
    hosts.on("launcher", "sh", "-c", "printf 'node1\\nnode4\\n' > /tmp/two")
    done = hosts.distprop("doctor", "--hostfile", "/tmp/two", options=["-e", "COLUMNS=160"])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "warn "))]
    assert sum("all hosts" in row for row in rows) >= 6, done.stdout
    for name in ("network", "interfaces", "Allreduce between hosts", "slowest rank"):
        assert any(row.split("  ", 1)[1].lstrip().startswith(name) for row in rows), done.stdout


def test_predict_measures_the_hosts_and_the_link_between_them(hosts: Hosts) -> None:
    command = ["predict", "--hosts", "node1,node2", "--sizes", "64,32,10", "--batch", "8", "--json"]
    done = hosts.distprop(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["measured"]["hosts"] == ["node1", "node2"]
    assert found["measured"]["between"]["latency"] > 0
    assert found["measured"]["step_seconds"] > 0
    assert any(note.startswith("between hosts: ") and note.endswith("(measured)") for note in found["notes"])


def test_a_host_that_does_not_fit_is_refused_before_anything_is_measured(hosts: Hosts) -> None:
    done = hosts.distprop("predict", "--hosts", "node1,nowhere")
    assert done.returncode == 2
    assert "nowhere: ssh: Could not resolve hostname nowhere" in done.stderr
