"""docker-compose.yml as a new user runs it, on a real engine: the log, the results, the status, a host that is lost."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from containers import NODES, ROOT, Compose

SHORT = "--set train.epochs=3 --set train.deterministic=true"


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True, timeout=120).stdout


def newest_tensors(run_dir: Path) -> dict[str, bytes]:
    """The files with parameters and optimizer state of the last checkpoint."""
    last = max((run_dir / "checkpoints").glob("*"))
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def test_four_hosts_train_and_give_the_bits_of_one_process(compose: Compose) -> None:
    done = compose.run("up", "--build", "--exit-code-from", "launcher", OPTIONS=SHORT)
    assert done.returncode == 0, done.stdout
    log = [line for line in done.stdout.splitlines() if "launcher" in line]
    for part in (
        *NODES,
        "8 ranks",
        "epoch 1 ",
        "epoch 3 ",
        "results in runs/digits; ",
        "% of the validation set are right",
    ):
        assert any(part in line for line in log), f"{part!r} is not in the launcher's log:\n{done.stdout}"
    run_dir = compose.folder / "runs/digits"
    assert {path.name for path in run_dir.iterdir()} == {"config.toml", "metrics.jsonl", "checkpoints"}
    owner = (ROOT / "docker-compose.yml").stat().st_uid
    assert {path.stat().st_uid for path in run_dir.rglob("*")} == {owner}

    alone = ["run", "--rm", "--no-deps", "launcher", "distprop", "train", *SHORT.split(), "examples/digits.toml"]
    compose.check("run", "--rm", "--no-deps", "--user", "root", *alone[3:])
    four, one = newest_tensors(run_dir), newest_tensors(compose.folder / "runs/digits-2")
    assert four == one
    assert four


def test_the_image_is_small_and_has_neither_keys_nor_root_as_its_user(compose: Compose) -> None:
    image, base = (json.loads(docker("image", "inspect", name))[0] for name in ("distprop", "debian:bookworm-slim"))
    assert image["Size"] - base["Size"] < 220e6
    assert image["Config"]["User"] == "trainer"
    listed = docker(
        "run", "--rm", "--user", "root", "distprop", "sh", "-c", "ls -A /keys; find /etc/ssh -name '*_key*'"
    )
    assert listed == ""


def test_the_status_of_the_job_is_the_status_of_the_command(compose: Compose) -> None:
    done = compose.run("up", "--exit-code-from", "launcher", CONFIG="examples/missing.toml")
    assert "cannot read examples/missing.toml" in done.stdout
    assert done.returncode == 2


def test_a_host_that_is_killed_ends_the_job_with_its_name(compose: Compose) -> None:
    long = "--set train.epochs=5000"
    compose.check("up", "-d", OPTIONS=f"--max-restarts 0 {long}")
    launcher = compose.container("launcher")
    wait_for(launcher, "epoch 2 ")
    users = {compose.check("exec", "-T", name, "id", "-un").strip() for name in (*NODES, "launcher")}
    assert users == {"trainer"}
    docker("kill", compose.container("node3"))
    assert int(docker("wait", launcher)) not in (0, 2)
    said = subprocess.run(["docker", "logs", launcher], capture_output=True, text=True).stderr
    assert "lost host node3" in said


def test_the_hosts_that_are_left_finish_the_training(compose: Compose) -> None:
    compose.check("up", "-d", OPTIONS="--max-restarts 1 --set train.epochs=30")
    launcher = compose.container("launcher")
    wait_for(launcher, "epoch 6 ")  # past the first checkpoint, of step 100
    docker("kill", compose.container("node3"))
    status = int(docker("wait", launcher))
    log = subprocess.run(
        ["docker", "logs", launcher], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout
    assert status == 0, log
    assert "restart 1 of 1 in 1 s on 6 ranks, those of node1, node2, node4" in log
    assert "resuming /work/runs/digits at step " in log
    assert "% of the validation set are right" in log


def wait_for(container: str, text: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while text not in docker("logs", container):
        if time.monotonic() > deadline:
            pytest.fail(f"no {text!r} after {seconds} s: {docker('logs', container)}")
        time.sleep(0.5)
