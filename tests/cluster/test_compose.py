"""docker-compose.yml as a new user runs it, on a real engine: the log, the results, the status, a host that is lost.

The tests are one session at the terminal: each goes on with the containers that the one before has left.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from pathlib import Path

from containers import LIMIT_SECONDS, NODES, ROOT, Compose, Hosts

SHORT = "--set train.epochs=2 --set train.deterministic=true"


def docker(*arguments: str) -> str:
    return subprocess.run(
        ["docker", *arguments], check=True, capture_output=True, text=True, timeout=LIMIT_SECONDS
    ).stdout


def inspect(kind: str, name: str) -> dict[str, object]:
    return json.loads(docker(kind, "inspect", name))[0]


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
        "epoch 2 ",
        "results in runs/digits; ",
        "% of the validation set are right",
    ):
        assert any(part in line for line in log), f"{part!r} is not in the launcher's log:\n{done.stdout}"
    assert "kex_exchange_identification" not in done.stdout  # what an ssh server says of a health check that hangs up
    run_dir = compose.folder / "runs/digits"
    assert {"config.toml", "metrics.jsonl", "run.json", "checkpoints"} <= {path.name for path in run_dir.iterdir()}
    owner = (ROOT / "docker-compose.yml").stat().st_uid
    assert {path.stat().st_uid for path in run_dir.rglob("*")} == {owner}

    alone = ["distprop", "train", *SHORT.split(), "examples/digits.toml"]
    compose.check("run", "--rm", "--no-deps", "--user", "root", "launcher", *alone)
    four, one = newest_tensors(run_dir), newest_tensors(compose.folder / "runs/digits-2")
    assert four == one
    assert four


def test_results_go_to_a_folder_beside_the_file(compose: Compose) -> None:
    plain = Compose(compose.command, compose.project, compose.folder)
    assert f"{ROOT}/runs:/work/runs" in plain.check("config") or re.search(
        rf"source: {re.escape(str(ROOT))}/runs\s+target: /work/runs", plain.check("config")
    )


def test_the_image_is_small_and_has_neither_keys_nor_root_as_its_user(compose: Compose) -> None:
    image, base = inspect("image", "distprop"), inspect("image", "debian:bookworm-slim")
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


def test_a_host_that_is_killed_is_named_and_those_that_are_left_finish_the_training(compose: Compose) -> None:
    runs = compose.folder / "runs"
    earlier = set(runs.glob("*/checkpoints/step-*"))
    compose.check("up", "-d", OPTIONS="--max-restarts 1 --set train.epochs=15")
    launcher, node3 = compose.container("launcher"), compose.container("node3")
    follow = ["docker", "logs", "--follow", launcher]
    log, killed = "", False
    with subprocess.Popen(follow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as following:
        patience = threading.Timer(2 * LIMIT_SECONDS, following.kill)
        patience.start()
        assert following.stdout
        for line in following.stdout:
            log += line
            if "epoch " in line and not killed and set(runs.glob("*/checkpoints/step-*")) - earlier:
                killed = bool(docker("kill", node3))
        patience.cancel()
    assert int(docker("wait", launcher)) == 0, log
    assert "lost host node3" in log
    assert "restart 1 of 1 in 1 s on 6 ranks, those of node1, node2, node4" in log
    assert re.search(r"resuming /work/runs/digits(-\d+)? at step ", log), log
    assert "% of the validation set are right" in log


def test_hosts_have_what_they_need_and_no_more(hosts: Hosts) -> None:
    for name in NODES:
        found = inspect("container", hosts.containers[name])
        assert found["State"]["Health"]["Status"] == "healthy"
        assert found["HostConfig"]["Init"] is True
        assert found["HostConfig"]["ShmSize"] == 512 * 2**20
        assert not found["HostConfig"]["PortBindings"]
    owners = hosts.on("node1", "sh", "-c", "id -un; stat -c %U /proc/[0-9]*; stat -c '%U %a' /keys/user")
    assert set(owners.stdout.split()) == {"trainer", "600"}
