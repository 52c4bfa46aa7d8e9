"""What is read from Slurm's environment, what is planned from it, and when a job is put back into the queue.

The same on a real Slurm is in tests/cluster/test_slurm_nodes.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distprop import comm, config, job, launch, restart, slurm, stopping
from distprop.comm import SoloCommunicator
from distprop.comm.mpi import Library
from distprop.hosts import probe
from distprop.launcher import Launcher, LaunchError
from distprop.rundir import read_sessions
from test_cli_run import distprop

OPEN_MPI = Library("openmpi", "5.0.11", Path("/opt/mpi/lib/libmpi.so.40"))
MPICH = Library("mpich", "5.0.2", Path("/opt/mpi/lib/libmpi.so.12"))

JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_NODELIST": "n[1-3]",
    "SLURM_TASKS_PER_NODE": "4(x2),2",
    "SLURM_JOB_CPUS_PER_NODE": "8(x2),6",
    "SLURMD_NODENAME": "n1",
}


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in launch.THREAD_VARIABLES or name.startswith(("SLURM", "OMPI_", "PMI", "DISTPROP_", "MPIR_")):
            monkeypatch.delenv(name)


def in_job(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    for name, value in (JOB | more).items():
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------------------------------------- what Slurm has given


def given(**more: str) -> slurm.Allocation:
    allocation = slurm.allocation(JOB | more)
    assert allocation
    return allocation


def test_the_nodes_of_a_job_and_what_they_take() -> None:
    allocation = given()
    assert allocation == slurm.Allocation("12", "n[1-3]", (4, 4, 2), (8, 8, 6), None, here=True)
    assert str(allocation) == "3 nodes of Slurm job 12, n[1-3]"
    assert slurm.allocation({"SLURM_CONF": "/etc/slurm.conf"}) is None


def test_a_step_of_fewer_nodes_than_the_job_has_its_own_nodes_cores() -> None:
    assert given(SLURM_TASKS_PER_NODE="1", SLURM_CPUS_ON_NODE="8").cores == (8,)


@pytest.mark.parametrize("text", ["", "four", "0", "2(3)", "2(x0)", "1,,2", "2(x2"])
def test_counts_that_slurm_would_not_write_are_refused(text: str) -> None:
    with pytest.raises(slurm.AllocationError, match=r"SLURM_TASKS_PER_NODE is .*Slurm writes it as in"):
        slurm.parse_counts("SLURM_TASKS_PER_NODE", text)


def test_a_number_of_cores_that_slurm_would_not_write_is_refused() -> None:
    with pytest.raises(slurm.AllocationError, match="SLURM_CPUS_PER_TASK is 'two'"):
        given(SLURM_CPUS_PER_TASK="two")
    with pytest.raises(slurm.AllocationError, match="SLURM_CPUS_ON_NODE is 'eight'"):
        given(SLURM_TASKS_PER_NODE="1", SLURM_CPUS_ON_NODE="eight")


def test_nodes_are_filled_in_their_order() -> None:
    assert given().allot(None) == (4, 4, 2)
    assert given().allot(5) == (4, 1, 0)
    assert given().allot(10) == (4, 4, 2)


def test_more_ranks_than_slots_are_refused_with_how_many_there_are_and_how_to_get_more() -> None:
    with pytest.raises(slurm.AllocationError) as refusal:
        given().allot(11)
    for part in ("-n 11", "10 slots", "3 nodes, n[1-3]", "--ntasks=11", "--overcommit", "='4(x3)'"):
        assert part in str(refusal.value)


def test_cores_are_those_that_were_asked_for_or_those_of_the_fullest_node() -> None:
    assert given().threads((4, 4, 2)) == 2
    assert given().threads((4, 1, 0)) == 2
    assert given().threads((1, 0, 0)) == 8
    assert given(SLURM_CPUS_PER_TASK="3").threads((1, 0, 0)) == 3
    assert given(SLURM_JOB_CPUS_PER_NODE="1(x3)").threads((4, 4, 2)) == 1
    assert not given().crowded((4, 4, 2))
    assert given(SLURM_JOB_CPUS_PER_NODE="8(x2),1").crowded((4, 4, 2))


def test_copies_are_what_srun_itself_has_started() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    assert slurm.copies({}) == 1
    assert slurm.copies(step) == 2
    assert slurm.copies({**step, "PMI_RANK": "1", "PMI_JOBID": "12.0"}) == 2  # srun --mpi=pmi2
    assert slurm.copies({**step, "PMI_RANK": "1"}) == 1  # MPICH's mpiexec
    assert slurm.copies({**step, "OMPI_COMM_WORLD_SIZE": "2"}) == 1
    assert not slurm.is_spokesman(step)


# ------------------------------------------------------------------------------------------------- what is planned


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.touch()
    return str(path)


def use(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr("distprop.comm.mpi.library", lambda: library)
    launcher = Launcher(Path("/opt/mpi/bin/mpirun"), library.vendor, library.version)
    monkeypatch.setattr(launch, "find_launcher", lambda library: launcher)
    monkeypatch.setattr(launch, "may_read_peers", lambda: True)
    monkeypatch.setattr(probe, "fabric", lambda: False)
    monkeypatch.setattr(probe, "bridges", lambda: ["docker0"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_without_a_number_all_slots_are_used(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch)
    use(monkeypatch, OPEN_MPI)
    planned = launch.plan(None, [script])
    assert planned.description == "10 ranks on 3 nodes of Slurm job 12, n[1-3], Open MPI 5.0.11, 2 BLAS threads each"
    assert planned.environment["DISTPROP_SIZE"] == "10"
    assert planned.environment["SLURM_EXPORT_ENV"] == "ALL"
    command = " ".join(planned.command)
    assert command.startswith("/opt/mpi/bin/mpirun -n 10 ")
    assert "--mca btl_tcp_if_exclude 127.0.0.0/8,docker0 " in command
    assert not planned.advice
    assert planned.elsewhere  # where a folder that is made here does not exist


def test_an_interface_that_the_user_names_is_left_alone(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch)
    use(monkeypatch, OPEN_MPI)
    monkeypatch.setenv("OMPI_MCA_btl_tcp_if_include", "eth1")
    assert "btl_tcp_if_exclude" not in launch.plan(None, [script]).command


def test_with_a_fast_network_open_mpi_finds_it(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch)
    use(monkeypatch, OPEN_MPI)
    monkeypatch.setattr(probe, "fabric", lambda: True)
    assert not {"btl", "pml", "btl_tcp_if_exclude"} & set(launch.plan(None, [script]).command)


def test_fewer_ranks_have_their_nodes_cores(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch)
    use(monkeypatch, MPICH)
    planned = launch.plan(2, [script])
    assert planned.description == "2 ranks on 1 of 3 nodes of Slurm job 12, n[1-3], MPICH 5.0.2, 4 BLAS threads each"
    assert planned.command[:3] == ("/opt/mpi/bin/mpirun", "-n", "2")
    assert not planned.elsewhere


def test_more_ranks_than_slots_start_nothing(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job(monkeypatch)
    with pytest.raises(LaunchError, match="has 10 slots"):
        launch.plan(11, [script])
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "many")
    with pytest.raises(LaunchError, match="SLURM_TASKS_PER_NODE is 'many'"):
        launch.plan(None, [script])


def test_a_single_rank_needs_no_mpi_on_a_node_and_a_launcher_elsewhere(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch)
    use(monkeypatch, MPICH)
    planned = launch.plan(1, [script])
    assert planned.command == (sys.executable, script)
    assert planned.description.startswith("1 rank on the first of 3 nodes of Slurm job 12")
    monkeypatch.delenv("SLURMD_NODENAME")  # the shell of salloc on a login node
    assert launch.plan(1, [script]).launcher
    assert launch.plan(1, [script]).elsewhere


def test_a_world_of_one_under_distprop_run_needs_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "_world", None)
    monkeypatch.setenv("DISTPROP_SIZE", "1")
    monkeypatch.setattr("distprop.comm.mpi.MPICommunicator", lambda: pytest.fail("started MPI"))
    assert isinstance(comm.world(), SoloCommunicator)


# ---------------------------------------------------------------------------------------------------- the srun trap


@pytest.mark.parametrize("spokesman", [True, False])
@pytest.mark.parametrize("pmi2", [True, False])
def test_srun_with_open_mpi_is_refused_before_mpi_starts(
    pmi2: bool, spokesman: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job(monkeypatch, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0" if spokesman else "1")
    if pmi2:
        monkeypatch.setenv("PMI_SIZE", "2")
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_JOBID", "12.0")
    use(monkeypatch, OPEN_MPI)
    monkeypatch.setattr(comm, "_world", None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("distprop.comm.mpi.MPICommunicator", lambda: pytest.fail("started MPI"))
    with pytest.raises(comm.LauncherMismatchError, match=r"`distprop run script\.py`") as refusal:
        comm.world()
    assert "srun --mpi=pmi2" in str(refusal.value)
    sys.excepthook(refusal.type, refusal.value, refusal.tb)
    said = capsys.readouterr().err
    assert said == (f"distprop: {refusal.value}\n" if spokesman else "")


@pytest.mark.parametrize("procid", ["0", "1"])
def test_distprop_run_under_srun_is_refused_by_one(procid: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    done = distprop("run", str(script), **JOB, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=procid)
    assert done.returncode == 2
    assert ("srun has started this command 2 times" in done.stderr) == (procid == "0")
    assert done.stderr == "" or procid == "0"


def test_requeue_is_refused_outside_a_job() -> None:
    done = distprop("run", "-n", "1", "--requeue", __file__)
    assert done.returncode == 2
    assert "--requeue is for a Slurm job" in done.stderr


# ------------------------------------------------------------------------------------------------ started again


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was typed into Slurm's commands, played by scripts; squeue says what is in the file `state`."""
    record = tmp_path / "asked"
    for name, answer in (("squeue", f'cat "{tmp_path}/state"'), ("scontrol", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"{record}"\n{answer}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    in_job(monkeypatch)
    return record


def test_a_job_that_got_further_is_requeued(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.requeue(advanced=True)
    assert asked.read_text().splitlines()[-1] == "scontrol requeue 12"
    assert "job 12 goes back into the queue" in capsys.readouterr().err


def test_a_job_that_slurm_kills_at_once_has_said_that_it_is_requeued(asked: Path) -> None:
    (asked.parent / "scontrol").write_text("#!/bin/sh\nkill -9 $PPID\n")
    code = "from distprop import slurm; slurm.requeue(advanced=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "job 12 goes back into the queue" in done.stderr


def test_a_task_of_an_array_is_requeued_alone(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")  # the last task's number is the array's
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm.requeue(advanced=True)
    assert asked.read_text().splitlines()[-1] == "scontrol requeue 12_3"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "TIMEOUT", ""])
def test_a_job_that_slurm_is_ending_is_not_requeued(
    state: str, asked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (asked.parent / "state").write_text(state)
    assert not slurm.requeue(advanced=True)
    assert "scontrol" not in asked.read_text()
    assert f"not requeued: Slurm says {state}" in capsys.readouterr().err


def test_a_job_without_a_newer_checkpoint_is_not_requeued(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not slurm.requeue(advanced=False)
    assert not asked.exists()
    assert "no newer checkpoint than it began with" in capsys.readouterr().err


def test_a_refusal_of_slurms_is_passed_on(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (asked.parent / "scontrol").write_text("#!/bin/sh\necho Access denied >&2\nexit 1\n")
    assert not slurm.requeue(advanced=True)
    assert "could not be requeued: Access denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "advanced"),
    [("", False), ("report.began(run, 0)", False), ("report.began(run, 5); report.reached(run, 6)", True)],
)
def test_what_stops_early_is_told_whether_it_got_further(told: str, advanced: bool) -> None:
    code = f"""if True:
        import os, pathlib, sys
        from distprop.stopping import REPORT, Report
        report, run = Report(os.environ[REPORT]), pathlib.Path("run")
        {told}
        sys.exit(75)
    """
    heard: list[bool] = []
    planned = launch.Job(1, (sys.executable, "-c", code), {}, "")
    assert restart.run_restarting(planned, lambda attempt: planned, stopped=heard.append) == 75
    assert heard == [advanced]


def test_in_a_restarted_job_every_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not stopping.resume_forced()
    in_job(monkeypatch, SLURM_RESTART_COUNT="1")
    assert stopping.resume_forced()
    settings = {"model": {"hidden": [4]}, "train": {"epochs": 1, "checkpoint_every": 1000}}
    loaded = config.msgspec.convert(settings, config.Config)
    job.train_from_config(loaded, tmp_path / "run", comm=SoloCommunicator())  # nothing is there yet
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    job.train_from_config(loaded, tmp_path / "run", comm=SoloCommunicator())
    assert len(read_sessions(tmp_path / "run")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_folder_of_a_run_has_the_number_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text("[model]\nhidden = [4]\n[train]\nepochs = 1\n")
    one = JOB | {"SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_CPUS_PER_NODE": "1"}
    done = distprop("train", "small.toml", **one, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="3")
    assert "results in runs/small-12_3" in done.stdout, done.stderr
