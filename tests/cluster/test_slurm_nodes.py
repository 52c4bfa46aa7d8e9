"""Jobs on a real Slurm of two nodes. Skipped where there is none, unless DISTPROP_REQUIRE_SLURM=1, as in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_jobs import ROOT, SBATCH, Batch, Job

from distprop import checkpoint
from distprop.comm import SoloCommunicator
from distprop.comm.mpi import library
from distprop.rundir import read_sessions
from test_resume import dataset, make_trainer, parameters

MPICH = ROOT / ".venv-mpich5/bin/python"

CONFIG = """
[model]
hidden = [32]
[train]
epochs = 2
checkpoint_every = 20
"""

# Slow at first, so that there is time to disturb it; not once it has been started again.
TRAINING = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import distprop as dp
from pathlib import Path
from test_resume import dataset, make_trainer, parameters

def slow(result):
    if result.step == 3 and comm.rank == 0:
        print("ready", flush=True)
    if result.step >= 3 and not os.environ.get("SLURM_RESTART_COUNT"):
        time.sleep(float(os.environ["SLOW"]))

comm, run_dir = dp.world(), Path(sys.argv[1])
trainer = make_trainer(comm, run_dir, callbacks=[slow])
if comm.rank == 0:
    print("begins at", trainer.step, flush=True)
trainer.fit(dataset(), epochs=4, validation=dataset())
if comm.rank == 0:
    Path("trained").write_bytes(parameters(trainer))
"""


def missing(what: str) -> None:
    if os.environ.get("DISTPROP_REQUIRE_SLURM") == "1":
        pytest.fail(f"DISTPROP_REQUIRE_SLURM=1, but {what}", pytrace=False)
    pytest.skip(f"{what}; the tests on Slurm need it")


@pytest.fixture(scope="module")
def slurm() -> None:
    """Two nodes that take jobs."""
    if not shutil.which("sbatch"):
        missing("Slurm is not installed")
    question = ["sinfo", "--noheader", "--Node", "--format=%t"]
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(question, capture_output=True, text=True, timeout=60)
        if sum(state in ("idle", "alloc", "mix", "comp") for state in done.stdout.split()) >= 2:
            return
        if "*" not in done.stdout or time.monotonic() > deadline:  # idle*: it has been too busy to answer Slurm
            missing(f"no two nodes of Slurm are up: {(done.stdout + done.stderr).strip()}")
        time.sleep(1)


@pytest.fixture
def batch_with(slurm: None, tmp_path: Path) -> Iterator[Callable[[Path], Batch]]:
    batches: list[Batch] = []

    def make(python: Path) -> Batch:
        if not python.exists():
            missing(f"{python.parent.parent.name} is not there (`make .venv-mpich5/.test-installed` makes it)")
        batches.append(Batch(tmp_path, python))
        return batches[-1]

    (tmp_path / "small.toml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(TRAINING)
    yield make
    for batch in batches:
        batch.cancel()


@pytest.fixture
def batch(batch_with: Callable[[Path], Batch]) -> Batch:
    return batch_with(Path(sys.executable))


@pytest.fixture(params=["this MPI", "MPICH 5"])
def batch_of_each(batch_with: Callable[[Path], Batch], request: pytest.FixtureRequest) -> Batch:
    return batch_with(Path(sys.executable) if request.param == "this MPI" else MPICH)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The parameters after the same training in one process."""
    trainer = make_trainer(SoloCommunicator(), tmp_path_factory.mktemp("undisturbed") / "run")
    trainer.fit(dataset(), epochs=4, validation=dataset())
    return parameters(trainer)


def submit_training(batch: Batch, slow: float = 1) -> Job:
    """A run of 28 steps; returns once it trains."""
    job = batch.submit(str(SBATCH), "train.py", "run", SLOW=str(slow))
    job.wait_for_output("ready")
    return job


def assert_went_on(job: Job, undisturbed: bytes) -> None:
    output = job.finish()
    assert job.says("Restarts") == "1", output
    first, second = (int(line.split()[-1]) for line in output.splitlines() if line.startswith("begins at"))
    assert (first, second > 3) == (0, True), output
    assert (job.folder / "trained").read_bytes() == undisturbed


# ----------------------------------------------------------------------------------------------------- to the end


def test_a_configuration_is_trained_to_the_end_on_both_nodes(batch_of_each: Batch) -> None:
    job = batch_of_each.submit(str(SBATCH), "small.toml")
    output = job.finish()
    assert f"distprop: 2 ranks on 2 nodes of Slurm job {job.number}, " in output
    assert "1 BLAS thread each" in output
    run_dir = job.folder / f"runs/small-{job.number}"
    assert f"results in runs/small-{job.number}; " in output
    assert [session["ranks"] for session in read_sessions(run_dir)] == [2]
    assert checkpoint.newest(run_dir / "checkpoints", pytest.fail).step == 24  # 2 epochs


def test_distprop_run_uses_the_whole_job_even_with_a_bare_environment(batch: Batch) -> None:
    batch.folder.joinpath("show.py").write_text(
        textwrap.dedent("""
        import glob, os, distprop as dp
        comm = dp.world()
        node, mine = os.environ["SLURMD_NODENAME"], os.environ["DISTPROP_MINE"]
        print(f"rank {comm.rank} of {comm.size} on {node}, {mine}\\n", end="")
        files = os.environ["DISTPROP_DAEMONS"]
        print(len(glob.glob(f"{files}/*")), "of Open MPI's processes have files there\\n", end="")
        """)
    )
    command = f"{batch.python} -m distprop run"
    output = batch.run(
        f"DISTPROP_MINE=here {command} show.py",
        f"DISTPROP_MINE=crowded SLURM_TASKS_PER_NODE='2(x2)' {command} show.py",
        f"{command} -n 5 show.py; echo status $?",
        options=("--export=NONE",),
    )
    for line in ("rank 0 of 2 on n1, here", "rank 1 of 2 on n2, here", "rank 3 of 4 on n2, crowded"):
        assert line in output.splitlines(), output
    assert output.count("3 of Open MPI's processes have files there") == 2 + 4  # this Slurm's nodes are one machine
    assert "4 ranks share fewer cores: correct, but slow" in output
    assert "-n 5: Slurm job" in output
    assert "has 2 slots, one for each of its tasks (2 nodes, n[1-2])" in output
    assert "--overcommit" in output
    assert "status 2" in output


# ----------------------------------------------------------------------------------- interrupted, and started again


def test_a_preemption_signal_writes_a_checkpoint_and_the_requeued_job_goes_on(
    batch_of_each: Batch, undisturbed: bytes
) -> None:
    job = submit_training(batch_of_each)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job.number], check=True, timeout=60)
    job.wait_for_output(f"distprop: job {job.number} goes back into the queue")
    assert "distprop: SIGUSR1: stopped after step" in job.output()
    job.start_again()
    assert_went_on(job, undisturbed)


def test_before_the_time_limit_it_writes_a_checkpoint_and_the_requeued_job_goes_on(
    batch: Batch, undisturbed: bytes
) -> None:
    """The limit holds only while it trains: Slurm looks every 30 s, and would send the signal to a job that starts."""
    job = submit_training(batch, slow=2)  # 50 s
    job.update("TimeLimit=2")
    job.wait_for_output(f"distprop: job {job.number} goes back into the queue")
    assert "distprop: SIGUSR1: stopped after step" in job.output()
    job.start_again("TimeLimit=UNLIMITED")
    assert_went_on(job, undisturbed)


def test_a_job_that_slurm_itself_requeues_goes_on_from_its_newest_checkpoint(batch: Batch, undisturbed: bytes) -> None:
    job = submit_training(batch, slow=1)
    job.wait_for(lambda: any((job.folder / "run/checkpoints").glob("step-*5")), "the checkpoint of step 5")
    subprocess.run(["scontrol", "requeue", job.number], check=True, timeout=60)
    job.start_again()
    assert_went_on(job, undisturbed)


def test_a_cancelled_job_is_not_requeued_leaves_nothing_running_and_a_whole_checkpoint(batch: Batch) -> None:
    job = submit_training(batch)
    job.wait_for(lambda: any((job.folder / "run/checkpoints").glob("step-*5")), "the checkpoint of step 5")
    subprocess.run(["scancel", job.number], check=True, timeout=60)
    output = job.finish("CANCELLED")
    assert "back into the queue" not in output
    assert job.says("Restarts") == "0"
    job.wait_for(lambda: not running(str(job.folder)), "the end of its processes")
    assert checkpoint.newest(job.folder / "run/checkpoints", pytest.fail).step >= 5


def running(folder: str) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == folder and int(process.name) != os.getpid():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


# --------------------------------------------------------------------------------------------------------- arrays


def test_each_task_of_an_array_has_a_folder_and_a_seed_or_what_its_number_says(batch: Batch) -> None:
    one = ("--nodes=1", "--array=3-4")
    seeds = batch.submit(str(SBATCH), "small.toml", options=one)
    rates = batch.submit(str(SBATCH), "small.toml", "--set", "optim.lr=0.0%a", options=one)
    for array, section, name, values in ((seeds, "train", "seed", (3, 4)), (rates, "optim", "lr", (0.03, 0.04))):
        for task, value in zip((3, 4), values, strict=True):
            job = Job(f"{array.number}_{task}", batch.folder)
            job.finish()
            config = tomllib.loads((batch.folder / f"runs/small-{job.number}/config.toml").read_text())
            assert config[section][name] == value
            assert config["train"]["seed"] == (value if name == "seed" else 0)


# ------------------------------------------------------------------------------------------------------- refusals


def test_copies_that_srun_starts_are_refused_once_and_nothing_is_written(batch: Batch) -> None:
    srun = f"srun --mpi={'pmi2' if library().vendor == 'openmpi' else 'none'} {batch.python}"
    output = batch.run(
        f"{srun} {ROOT}/examples/digits.py --run-dir results; echo status $?",
        f"{srun} -m distprop train small.toml; echo status $?",
        f"{srun} -m distprop run train.py results; echo status $?",
    )
    said = [line for line in output.splitlines() if "srun: " not in line]
    refusal = f"distprop: srun started 2 processes, but {library().name}, which mpi4py loads, cannot join them this way"
    assert [line.partition(": each sees")[0] for line in said[0::2]] == [
        *[refusal] * 2,
        "Error: srun has started this command 2 times, and each of them would start all ranks; leave srun out: in a "
        "Slurm job distprop starts the ranks by itself",
        "over",
    ], output
    assert said[1::2] == ["status 1", "status 1", "status 2"]
    assert "`distprop run script.py`" in said[0]
    assert {path.suffix for path in batch.folder.iterdir()} == {".py", ".toml", ".sh", ".out"}


def test_srun_with_mpich_starts_ranks(batch_with: Callable[[Path], Batch]) -> None:
    """Without UCX, which Slurm does not start where there are many network interfaces: see docs/cluster.md."""
    batch = batch_with(MPICH)
    source = f"srun --mpi=pmi2 {MPICH} -m distprop train small.toml"
    output = batch.run(f"export MPIR_CVAR_CH4_NETMOD=ofi; {source}; echo status $?")
    assert "status 0" in output
    (run_dir,) = (batch.folder / "runs").iterdir()
    assert [session["ranks"] for session in read_sessions(run_dir)] == [2]


def test_a_run_folder_that_is_not_shared_is_refused_where_the_job_may_be_requeued(batch: Batch) -> None:
    script = TRAINING.replace("sys.argv[1]", "os.environ['SLURMD_NODENAME'], 'run'")
    batch.folder.joinpath("own.py").write_text(script)
    job = batch.submit(str(SBATCH), "own.py", SLOW="0")
    output = job.finish("FAILED")
    assert "must be one folder for all hosts" in output
    assert "put it on a file system that the hosts share" in output
    assert "begins at" not in output
    assert f"distprop: job {job.number} is not requeued: it ended with status 1" in output
