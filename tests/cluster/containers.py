"""What the tests on containers hold on to: a project of Docker Compose, and four hosts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
NODES = ("node1", "node2", "node3", "node4")
LIMIT_SECONDS = 300.0  # for a command that hangs otherwise


@dataclass(frozen=True)
class Compose:
    """docker-compose.yml with the tests' additions, as a project of its own."""

    command: tuple[str, ...]
    project: str
    folder: Path
    additions: tuple[str, ...] = ()

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Its output has standard error in it; the status is for the caller to judge."""
        files = [ROOT / "docker-compose.yml", *(HERE / name for name in self.additions)]
        options = [word for file in files for word in ("-f", str(file))]
        return subprocess.run(
            [*self.command, "-p", self.project, *options, *arguments],
            cwd=ROOT,
            env={**os.environ, "TEST_FOLDER": str(self.folder), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * LIMIT_SECONDS,  # perhaps with a build
        )

    def check(self, *arguments: str, **environment: str) -> str:
        """Its output; it must succeed."""
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def container(self, service: str) -> str:
        return self.check("ps", "-q", service).split()[-1]


@dataclass(frozen=True)
class Hosts:
    """Four hosts, by name, and the launcher in which commands are typed."""

    containers: dict[str, str]
    scripts: Path

    def on(self, name: str, *command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        docker = ["docker", "exec", *options, self.containers[name], *command]
        return subprocess.run(docker, capture_output=True, text=True, timeout=LIMIT_SECONDS)

    def distprop(
        self, *arguments: str, mpi: str = "distprop", options: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """The command on the launcher, with one of the MPIs."""
        return self.on("launcher", f"/opt/{mpi}/bin/python", "-m", "distprop", *arguments, options=options)

    def left(self) -> list[str]:
        """What runs on the hosts besides their ssh servers and those logged in to wait for nothing."""
        found = []
        for name in NODES:
            done = self.on(name, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; echo")
            assert done.returncode == 0, done.stderr  # only a host that runs can say that nothing is left there
            words = ("distprop.rank", "prted", "orted", "hydra_pmi_proxy", "json.loads")
            found += [f"{name}: {word}" for word in words if word in done.stdout]
        return found
