"""Real hosts: the containers of docker-compose.yml, on a real Docker engine. Skipped where there is none, unless
DISTPROP_REQUIRE_DOCKER=1, as in CI.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from containers import HERE, NODES, ROOT, Compose, Hosts


@pytest.fixture(scope="session")
def docker_compose() -> tuple[str, ...]:
    """How Compose is called here."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            break
    else:
        missing("Docker Compose is not installed")
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        missing("no Docker engine answers")
    return command


def missing(what: str) -> None:
    if os.environ.get("DISTPROP_REQUIRE_DOCKER") == "1":
        pytest.fail(f"DISTPROP_REQUIRE_DOCKER=1, but {what}", pytrace=False)
    pytest.skip(f"{what}; the tests on several hosts need it")


@pytest.fixture(scope="session")
def built(docker_compose: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The image that docker-compose.yml uses."""
    compose = Compose(docker_compose, "distprop-build", tmp_path_factory.mktemp("build"))
    compose.check("build", "setup")


@pytest.fixture(scope="module")
def compose(
    built: None, docker_compose: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """The demonstration as it is, with results in a folder of the tests."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "runs").mkdir()
    compose = Compose(docker_compose, f"distprop-demo-{os.getpid()}", folder, ("runs.yml",))
    yield compose
    compose.check("down", "--volumes", "--timeout", "1")


@pytest.fixture(scope="session")
def hosts(built: None, docker_compose: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Four hosts with every MPI, up for all tests that type commands there."""
    build_image("distprop-build", ROOT / "launch/Dockerfile", "--target", "build")
    build_image("distprop-mpis", HERE / "Dockerfile")
    folder = tmp_path_factory.mktemp("hosts")
    folder.chmod(0o755)
    for name in ("runs", "scripts"):
        (folder / name).mkdir()
    compose = Compose(docker_compose, f"distprop-hosts-{os.getpid()}", folder, ("runs.yml", "hosts.yml"))
    try:
        compose.check("up", "-d", "--no-build", "launcher")
        names = ("setup", "launcher", *NODES)
        yield Hosts({name: compose.container(name) for name in names}, folder / "scripts")
    finally:
        compose.check("down", "--volumes", "--timeout", "1")


def build_image(name: str, file: pathlib.Path, *options: str) -> None:
    command = ["docker", "build", "--quiet", "-t", name, "-f", str(file), *options]
    command += ["--build-arg", f"PIP_INDEX_URL={os.environ.get('PIP_INDEX_URL', '')}", str(ROOT)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
