"""What Slurm says of the job that this process belongs to, and how the job is started again.

Slurm tells a process in environment variables what it was given; only whether the job is still meant to run has to be
asked for. The launchers of all MPI libraries read the same variables, and find the nodes by themselves.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANSWER_SECONDS = 60.0  # for Slurm's controller, which may be busy


class AllocationError(Exception):
    """The allocation cannot run the job as asked; nothing has been started."""


@dataclass(frozen=True)
class Allocation:
    """What Slurm has given to a job. Its tasks are the job's slots: as many ranks as it has by default, and at most.

    Attributes:
        job: as users know it, "12" or "12_3" for task 3 of an array; `scontrol` takes it.
        nodes: their names in Slurm's way, such as "n[1-2]".
        tasks: how many each node takes.
        cores: of each node.
        cores_per_task: if that was asked for.
        here: whether this process is on one of the nodes; in the shell that `salloc` opens it may be on a login node.
    """

    job: str
    nodes: str
    tasks: tuple[int, ...]
    cores: tuple[int, ...]
    cores_per_task: int | None
    here: bool

    def allot(self, ranks: int | None) -> tuple[int, ...]:
        """How many of the ranks each node gets: filled in their order, as launchers do; all slots for None.

        Raises:
            AllocationError: more ranks than slots; says how to get more.
        """
        slots = sum(self.tasks)
        if ranks is None:
            return self.tasks
        if ranks > slots:
            each = -(-ranks // len(self.tasks))
            raise AllocationError(
                f"-n {ranks}: Slurm job {self.job} has {_count(slots, 'slot')}, one for each of its tasks "
                f"({_count(len(self.tasks), 'node')}, {self.nodes}). Leave -n out to use them all, ask for more with "
                f"--ntasks={ranks}, or oversubscribe, which is correct but slow: sbatch --ntasks={ranks} "
                f"--overcommit, or in this job SLURM_TASKS_PER_NODE='{each}(x{len(self.tasks)})' before the command"
            )
        filled = []
        for tasks in self.tasks:
            filled.append(min(tasks, ranks))
            ranks -= filled[-1]
        return tuple(filled)

    def threads(self, allotted: Sequence[int]) -> int:
        """How many cores each rank may use, if the nodes get so many: the fewest of any."""
        shares = [cores // ranks for cores, ranks in zip(self.cores, allotted, strict=True) if ranks]
        return max(1, self.cores_per_task or min(shares))

    def crowded(self, allotted: Sequence[int]) -> bool:
        """Whether ranks have to share cores on any node."""
        return any(ranks > cores for cores, ranks in zip(self.cores, allotted, strict=True))

    def __str__(self) -> str:
        """For people: "2 nodes of Slurm job 12, n[1-2]"."""
        return f"{_count(len(self.tasks), 'node')} of Slurm job {self.job}, {self.nodes}"


def allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """The allocation that this process is in; None outside a Slurm job.

    Raises:
        AllocationError: Slurm's variables make no sense, as when somebody has changed one.
    """
    if not (tasks := environment.get("SLURM_TASKS_PER_NODE")) or not (job := job_name(environment)):
        return None
    numbers = parse_counts("SLURM_TASKS_PER_NODE", tasks)
    cores = parse_counts("SLURM_JOB_CPUS_PER_NODE", environment.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    if len(cores) != len(numbers):  # in a step of fewer nodes than the job has
        here = parse_counts("SLURM_CPUS_ON_NODE", environment.get("SLURM_CPUS_ON_NODE", str(min(cores))))
        cores = here[:1] * len(numbers)
    per_task = environment.get("SLURM_CPUS_PER_TASK")
    return Allocation(
        job=job,
        nodes=environment.get("SLURM_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""),
        tasks=numbers,
        cores=cores,
        cores_per_task=parse_counts("SLURM_CPUS_PER_TASK", per_task)[0] if per_task else None,
        here="SLURMD_NODENAME" in environment,
    )


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    """A number for each node, as Slurm abbreviates them in the variable `name`.

    >>> parse_counts("SLURM_TASKS_PER_NODE", "2(x3),1")
    (2, 2, 2, 1)

    Raises:
        AllocationError: it is not written like this.
    """
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:\(x([1-9]\d*)\))?", entry.strip())
        if not match:
            raise AllocationError(f"{name} is {text!r}; Slurm writes it as in 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def job_name(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job as users know it: "12", or "12_3" for task 3 of an array; None outside a job.

    >>> job_name({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"})
    '12_3'
    """
    if task := environment.get("SLURM_ARRAY_TASK_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{task}"
    return environment.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often Slurm has started this job again: after `requeue`, a preemption, or the failure of a node."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def copies(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes srun has started where this one is, if srun itself has started it; otherwise 1.

    Launchers start their daemons with srun, so ranks that a launcher has started see srun's variables too.
    """
    by_hydra = "PMI_RANK" in environment and "PMI_JOBID" not in environment  # srun --mpi=pmi2 sets both
    by_launcher = by_hydra or "OMPI_COMM_WORLD_SIZE" in environment or "DISTPROP_SIZE" in environment
    return 1 if by_launcher else int(environment.get("SLURM_STEP_NUM_TASKS") or 1)


def is_spokesman(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all that srun has started: what each of them finds is then said once."""
    return environment.get("SLURM_PROCID", "0") == "0"


def requeue(advanced: bool) -> bool:
    """Put this job, which has stopped early, back into the queue; says so, or why not.

    Slurm then kills this process, perhaps before it hears that Slurm agrees: so it is said before.

    `advanced` says whether it has a newer checkpoint than it began with. Otherwise it is not started again: without
    checkpoints, or with a time limit that is too short for a single step, it would start for ever.
    """
    job = job_name()
    if job is None:
        return _say("not requeued: this is no Slurm job")
    if not advanced:
        return _say(
            f"job {job} is not requeued: it has no newer checkpoint than it began with. Does it write any "
            "(checkpoint_every), and is its time limit long enough?"
        )
    state = _ask("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    if state != "RUNNING":
        return _say(f"job {job} is not requeued: Slurm says {state or 'that it has ended'}")
    _say(f"job {job} goes back into the queue, and on from its checkpoint when Slurm starts it again")
    if refusal := _ask("scontrol", "requeue", job):
        return _say(f"job {job} could not be requeued: {refusal}")
    return True


def _ask(*command: str) -> str:
    """What one of Slurm's commands answers, or why it does not."""
    import subprocess  # not for every rank

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def _say(message: str) -> bool:
    print(f"distprop: {message}", file=sys.stderr, flush=True)
    return False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
