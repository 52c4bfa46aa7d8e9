"""`distprop predict` between hosts whose network is as slow as it is told: predicted and measured steps agree."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from containers import Hosts

from distprop.cost import Cluster
from distprop.forecast import Steps, parse_link, predict

TOLERANCE = 0.15
TOLD_TOLERANCE = {"100mbit": TOLERANCE, "1gbit": 0.5}  # of a nominal rate; two shared cores are busy at 1 Gbit/s
TC = """
FROM debian:bookworm-slim
RUN apt-get update && apt-get install --yes --no-install-recommends iproute2
"""


@pytest.fixture(scope="module")
def tc() -> str:
    """An image with `tc`, which sets the rate of another container's network."""
    build = ["docker", "build", "--quiet", "-t", "distprop-tc", "-"]
    done = subprocess.run(build, input=TC, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return "distprop-tc"


@contextmanager
def slow_network(hosts: Hosts, tc: str, rate: str) -> Iterator[None]:
    """node1 and node2 send no faster than `rate`."""

    def queue(verb: str, *limit: str) -> None:
        for name in ("node1", "node2"):
            docker = ["docker", "run", "--rm", "--network", f"container:{hosts.containers[name]}"]
            command = [*docker, "--cap-add", "NET_ADMIN", tc, "tc", "qdisc", verb, "dev", "eth0", "root", *limit]
            subprocess.run(command, check=True, capture_output=True, timeout=60)

    queue("add", "tbf", "rate", rate, "burst", "64kb", "latency", "50ms")  # of the message, 2 % pass at any rate
    try:
        yield
    finally:
        queue("del")


@pytest.mark.timing
@pytest.mark.parametrize("rate", TOLD_TOLERANCE)
def test_predicted_and_measured_step_differ_by_less_than_15_percent(rate: str, hosts: Hosts, tc: str) -> None:
    with slow_network(hosts, tc, rate):
        done = hosts.distprop("predict", "--hosts", "node1,node2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    measured = found["measured"]["step_seconds"]
    by_measured_link = found["measured_ranks"]["step_seconds"]
    told = parse_link(f"{rate},100us")
    by_told_link = predict(Steps(**found["steps"]), Cluster(1, told, told), found["batch"], ranks=[2])[0].step_seconds
    print(
        f"{rate}: a step of 2 hosts took {measured * 1e3:.1f} ms; predicted from the measured link "
        f"{by_measured_link * 1e3:.1f} ms ({by_measured_link / measured - 1:+.0%}), from --network {rate},100us "
        f"{by_told_link * 1e3:.1f} ms ({by_told_link / measured - 1:+.0%})"
    )
    assert measured == pytest.approx(by_measured_link, rel=TOLERANCE)
    assert measured == pytest.approx(by_told_link, rel=TOLD_TOLERANCE[rate])
    assert found["verdicts"][0].startswith("2 to "), "on this network a few ranks are slower than one, and it says so"
