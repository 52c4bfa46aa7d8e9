"""Start N ranks with the launcher that belongs to the MPI library mpi4py loads, and end all of them when asked to.

`plan()` decides everything, the command, its environment and a line that says so, without starting anything; `run()`
starts it and answers for its processes: whatever happens, none is left behind.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distprop import hosts as other_hosts
from distprop import slurm
from distprop.comm import mpi, watchdog
from distprop.hosts import probe
from distprop.hosts.hostfile import count
from distprop.launcher import (
    Launcher,
    LaunchError,
    find_launcher,
    launcher_environment,
    launcher_flags,
    major_version,
    may_read_peers,
    mca,
    open_mpi_folders,
    open_mpi_folders_of_hosts,
)
from distprop.panel import RESTORE
from distprop.processes import Stop, exit_status, tether, wait
from distprop.stopping import STATUS, Watch, deadline, resume_forced
from distprop.witness import Witness

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """What `run` starts. `environment` is what is set in addition to the present environment."""

    ranks: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    description: str
    advice: str = ""
    launcher: Launcher | None = None  # one process, without MPI
    hosts: tuple[other_hosts.Host, ...] = ()  # empty: this one, or those of a Slurm job
    elsewhere: bool = False  # there are ranks on other nodes of a Slurm job

    def shell(self) -> str:
        """The job as one line that can be pasted into a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.command)])


def plan(
    ranks: int | None,
    arguments: Sequence[str],
    *,
    module: bool = False,
    hosts: Sequence[other_hosts.Host] = (),
    files: Sequence[str] = (),
    timeout_seconds: float | None = None,
) -> Job:
    """How to run a script with its arguments (with `module`, a module's name with its arguments) on N ranks.

    They run on `hosts`, which are asked whether they can; in a Slurm job on what it has been given; otherwise here.
    Without a number, hosts and Slurm jobs get as many as they take. `files` are those, besides the script, that must
    be the same on all hosts.

    `timeout_seconds` is how long a rank may make no progress while others wait for it.

    Raises:
        LaunchError: fewer than one rank, more than a Slurm job has slots or this host memory for, no such script or
            module, no launcher that belongs to the MPI library, or a variable of the environment that says nothing.
        HostsError: more ranks than slots, or hosts that cannot run the job.
        MPIMissingError: more than one rank, and no MPI library is installed.
    """
    try:
        watchdog.timeout_seconds()  # of the environment, as the next two: each rank would find it wrong by itself
        deadline()
        resume_forced()
        allocation = slurm.allocation() if not hosts else None
    except (slurm.AllocationError, ValueError) as error:
        raise LaunchError(str(error)) from error
    if ranks is None and not hosts and not allocation:
        raise LaunchError("say how many ranks, with -n")
    if ranks is not None and ranks < 1:
        raise LaunchError(f"-n {ranks}: a job has 1 rank or more")
    _check_program(arguments, module)
    program = [*(["-m"] if module else []), *arguments]
    limit = {} if timeout_seconds is None else {watchdog.TIMEOUT_VARIABLE: f"{timeout_seconds:g}"}
    if hosts:
        script = [] if module or not Path(arguments[0]).is_file() else [arguments[0]]
        return _plan_hosts(other_hosts.allot(hosts, ranks), program, [*script, *files], limit)
    if allocation:
        return _plan_allocation(allocation, ranks, program, limit)
    assert ranks is not None
    cores = allowed_cores()
    environment, threads = _thread_environment(max(1, cores // ranks))
    if ranks == 1:
        return Job(1, (sys.executable, *program), environment, f"1 rank on this host, without MPI, {threads}")

    if problem := other_hosts.short_of_memory(probe.free_memory(), ranks):
        raise LaunchError(f"-n {ranks}: {problem}")
    library = mpi.library()
    launcher = find_launcher(library)
    environment |= limit | {"DISTPROP_SIZE": str(ranks)}  # world() refuses a world of another size
    environment |= _terminal_environment()
    reads_peers = may_read_peers()
    environment |= launcher_environment(library, ranks, cores, reads_peers)
    flags = launcher_flags(library, ranks, cores, reads_peers)
    command = [str(launcher.path), *flags, sys.executable, "-m", "distprop.rank"]
    return Job(
        ranks,
        (*command, *program),
        environment,
        f"{ranks} ranks on this host, {library.name}, {threads} each",
        f"{ranks} ranks share {count(cores, 'core')}: correct, but slow" if ranks > cores else "",
        launcher,
    )


def _plan_hosts(
    hosts: Sequence[other_hosts.Host], program: Sequence[str], files: Sequence[str], limit: Mapping[str, str]
) -> Job:
    """How to run a program on hosts that have their numbers of ranks."""
    library = mpi.library()
    launcher = find_launcher(library)
    cluster = other_hosts.check(hosts, files)
    environment, threads = _thread_environment(cluster.threads or 1)
    if not cluster.threads and environment:  # the hosts differ, and world() gives each rank its share of its host's
        environment, threads = {}, "as many BLAS threads as each host has cores for"
    environment |= {"DISTPROP_SIZE": str(cluster.ranks), **limit} | _terminal_environment()
    cores = cluster.ranks - cluster.oversubscribed
    environment |= launcher_environment(library, cluster.ranks, cores, cluster.reads_peers)
    flags = launcher_flags(library, cluster.ranks, cores, cluster.reads_peers, cluster.fabric)
    if library.vendor == "openmpi":
        variables = [*os.environ, *environment]
        flags += other_hosts.open_mpi_flags(cluster, major_version(library.version), variables, mca)
    else:
        environment |= other_hosts.hydra_environment(cluster)
        flags += other_hosts.hydra_flags(cluster, [*os.environ, *environment])
    command = [str(launcher.path), *flags, sys.executable, "-m", "distprop.rank", *program]
    description = f"{count(cluster.ranks, 'rank')} on {cluster}, {library.name}, {threads} each"
    advice = "; ".join([*cluster.crowded, *cluster.clocks])
    return Job(cluster.ranks, tuple(command), environment, description, advice, launcher, cluster.hosts)


def _plan_allocation(
    allocation: slurm.Allocation, ranks: int | None, program: Sequence[str], limit: Mapping[str, str]
) -> Job:
    """How to run a program in a Slurm job; the launchers find its nodes by themselves."""
    try:
        allotted = allocation.allot(ranks)
    except slurm.AllocationError as error:
        raise LaunchError(str(error)) from error
    ranks, nodes = sum(allotted), sum(map(bool, allotted))
    environment, threads = _thread_environment(allocation.threads(allotted))
    environment |= {"DISTPROP_SIZE": str(ranks)}
    if ranks == 1 and allocation.here:
        where = f"the first of {allocation}" if len(allocation.tasks) > 1 else f"the node of {allocation}"
        return Job(1, (sys.executable, *program), environment, f"1 rank on {where}, without MPI, {threads}")

    library = mpi.library()
    launcher = find_launcher(library)
    crowded, reads_peers = allocation.crowded(allotted), may_read_peers()
    environment |= {**limit, **_terminal_environment()}
    environment |= {"SLURM_EXPORT_ENV": "ALL"}  # for the launcher's own srun, even in a job with --export=NONE
    environment |= launcher_environment(library, ranks, ranks - crowded, reads_peers)
    fabric = probe.fabric()
    flags = launcher_flags(library, ranks, ranks - crowded, reads_peers, fabric)
    if library.vendor == "openmpi" and nodes > 1 and not fabric and "OMPI_MCA_btl_tcp_if_include" not in os.environ:
        # Every node's docker0 has the same address, by which no node is reached: it would wait for ever.
        flags += mca("btl_tcp_if_exclude", ",".join(["127.0.0.0/8", *probe.bridges()]))
    command = [str(launcher.path), *flags, sys.executable, "-m", "distprop.rank", *program]
    where = str(allocation) if nodes == len(allocation.tasks) else f"{nodes} of {allocation}"
    advice = f"{ranks} ranks share fewer cores: correct, but slow" if crowded else ""
    description = f"{count(ranks, 'rank')} on {where}, {library.name}, {threads} each"
    elsewhere = nodes > 1 or not allocation.here
    return Job(ranks, tuple(command), environment, description, advice, launcher, elsewhere=elsewhere)


def run(job: Job, watch: Watch | None = None, *, supervise: bool = False, stdout: IO[str] | None = None) -> int:
    """Run the job to its end and return its exit status; 128 + n if signal n ended it.

    SIGINT, SIGTERM and SIGHUP end all ranks; a second one, or 5 seconds, does it by force. With a `watch`, a job that
    trains with checkpoints is first asked to write one and to stop, and has 120 seconds for it. A single rank takes
    this process's place instead, so that the terminal, debuggers and signals are its own, and `run` does not return;
    unless the caller wants to `supervise` it.
    """
    watch = watch or Watch()
    environment = {**os.environ, **job.environment, **watch.environment()}
    sys.stdout.flush()
    sys.stderr.flush()
    if job.launcher is None and not supervise:
        os.execvpe(job.command[0], job.command, environment)
    with other_hosts.Guard(job.hosts, uuid.uuid4().hex, environment.get("DISTPROP_REPORT", "")) as guard:
        status = _run_guarded(job, environment, watch, guard, stdout)
        guard.well = status in (0, STATUS)
    return status or int(bool(guard.lost))  # Open MPI's mpirun (5.0) at times calls the loss of a host a success


def _run_guarded(
    job: Job, environment: Mapping[str, str], watch: Watch, guard: other_hosts.Guard, stdout: IO[str] | None
) -> int:
    vendor, marker, witness = job.launcher.vendor if job.launcher else "", guard.marker, Witness()
    of_this_run, command = {**witness.environment, "DISTPROP_JOB": marker}, list(job.command)
    if vendor == "openmpi":
        alone = not job.hosts and not job.elsewhere
        of_this_run |= open_mpi_folders(witness.folder) if alone else open_mpi_folders_of_hosts(marker)
    if job.hosts:
        of_this_run["DISTPROP_SIGN"] = guard.sign
        known = {**os.environ, **job.environment}  # whose names the planned command has
        new = {name: environment[name] for name in other_hosts.forwarded(environment) if name not in known}
        command = other_hosts.passing_on(job.command, vendor, {**new, **of_this_run})
    try:
        process = subprocess.Popen(
            [*tether(), *command],
            # Hydra (4.3, 5.0) loses the last variable that it is to pass on to another host by its name.
            env={**environment, **of_this_run, "DISTPROP_END": ""},
            start_new_session=True,  # so that the terminal's Ctrl-C comes to this process alone
            stdout=stdout,
            stdin=subprocess.DEVNULL,  # Open MPI 5.0 does not pass on its end, and repeats parts of what exceeds 64 kB
        )
    except OSError:
        witness.close()
        raise
    stop = Stop(process, watch)
    previous = stop.listen()
    try:
        status = exit_status(wait(process, marker, witness, guard), vendor)
        if status and stdout is None and sys.stdout.isatty():  # a rank that was killed gave no rows back
            print(RESTORE, end="", flush=True)
        if status not in (0, STATUS) and not stop.reason:
            print(witness.report(status), end="", file=sys.stderr, flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stop.reason or process.returncode:
            probe.kill_marked(marker)
        witness.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + stop.reason if stop.reason and not (watch.asked and status in (0, STATUS)) else status


def ask(job: Job) -> tuple[int, str]:
    """Run the job, and return its exit status with the line of JSON that one of its ranks has printed, if any."""
    with tempfile.TemporaryFile("w+") as output:
        status = run(job, supervise=True, stdout=output)
        output.seek(0)
        return status, next((line for line in output if line.startswith("{")), "")


def allowed_cores() -> int:
    """How many cores this process may use; fewer than the machine has under taskset, Slurm or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _thread_environment(threads: int) -> tuple[dict[str, str], str]:
    """One BLAS thread for each core that a rank does not share, unless the user has said something; and a phrase."""
    chosen = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    if chosen:
        return {}, f"BLAS threads by {' '.join(chosen)}"
    return dict.fromkeys(THREAD_VARIABLES, str(threads)), count(threads, "BLAS thread")


def _terminal_environment() -> dict[str, str]:
    """Tells rank 0 whether a person watches, and in which window: what it sees itself is the launcher's."""
    if not sys.stdout.isatty():
        return {"DISTPROP_TERMINAL": "0"}
    columns, lines = shutil.get_terminal_size()
    window = f"{os.uname().nodename}:"
    with contextlib.suppress(OSError):  # a container may not have the file
        window += os.ttyname(sys.stdout.fileno())
    return {"DISTPROP_TERMINAL": "1", "DISTPROP_WINDOW": window, "COLUMNS": str(columns), "LINES": str(lines)}


def _check_program(arguments: Sequence[str], module: bool) -> None:
    if not arguments:
        raise LaunchError(f"give a {'module' if module else 'script'} to run")
    name = arguments[0]
    if not module:
        if not Path(name).is_file() and not Path(name, "__main__.py").is_file():
            raise LaunchError(f"no script {name} in {Path.cwd()}")
        if name.endswith(".toml"):
            raise LaunchError(f"{name} is a configuration, not a script: distprop train {name} -n ...")
        return
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    if name.endswith(".py"):
        raise LaunchError(f"no module named {name!r}: -m is for modules; leave it out for a script")
    top = name.partition(".")[0]  # only this part; a submodule cannot be looked up without running its package
    if not top or (PathFinder.find_spec(top, [os.getcwd()]) is None and find_spec(top) is None):
        raise LaunchError(f"no module named {top!r}, neither installed for {sys.executable} nor in {Path.cwd()}")
