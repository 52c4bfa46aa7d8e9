"""Real hosts: the containers of docker-compose.yml, on a real Docker engine. Skipped where there is none, unless
DISTPROP_REQUIRE_DOCKER=1, as in CI.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest
from containers import HERE, LIMIT_SECONDS, NODES, ROOT, Compose, Hosts


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
    """The images of docker-compose.yml and of the tests, which are built once for all processes that run tests; and
    nothing is left of tests that were killed.
    """
    with open(tmp_path_factory.getbasetemp().parent / "distprop-images", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_abandoned()
        compose = Compose(docker_compose, "distprop-build", tmp_path_factory.mktemp("build"))
        downloading(lambda: compose.run("build", "setup"))
        build_image("distprop-build", ROOT / "launch/Dockerfile", "--target", "build")
        build_image("distprop-mpis", HERE / "Dockerfile")


def remove_abandoned() -> None:
    """Containers, networks and volumes of tests whose process, by the number in their names, has ended."""
    for kind, *options in (("container", "--all", "--format={{.Names}}"), ("network",), ("volume",)):
        listing = ["docker", kind, "ls", *(options or ["--format={{.Name}}"])]
        for name in subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split():
            found = re.match(r"distprop-(?:demo|hosts)-(\d+)[-_]", name)
            if found and has_ended(int(found[1])):
                command = ["docker", kind, "rm", *([] if kind == "network" else ["--force"]), name]
                subprocess.run(command, capture_output=True)  # it fails where another process does it as well


def has_ended(number: int) -> bool:
    """Whether the process that had this number is gone: there is none, or it is this one, which has just begun."""
    with contextlib.suppress(PermissionError):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
    return number == os.getpid()


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
    downloading(
        lambda: subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=2 * LIMIT_SECONDS
        )
    )


def downloading(build: Callable[[], subprocess.CompletedProcess[str]]) -> None:
    """Build with what apt and pip download; a second time where that has failed."""
    done = build()
    if done.returncode:
        done = build()
    assert done.returncode == 0, done.stdout
