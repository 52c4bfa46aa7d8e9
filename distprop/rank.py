"""What `distprop run` starts N times: `python -m distprop.rank script.py ...` runs the script as `python` would.

It closes the gaps in which one failed rank leaves the others waiting for ever. MPI libraries end a job when a rank is
killed, but not all do so when one raises before MPI is started (MPICH), or exits with a failure afterwards (none does).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import os
import runpy
import signal
import sys
import termios
import time
from pathlib import Path
from types import TracebackType

from distprop.comm.recorder import END, FOLDER_VARIABLE, LAUNCHER, here

DAEMONS = "DISTPROP_DAEMONS"  # the folder of Open MPI's daemons, distprop-daemons.JOB on each of several hosts
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Run `sys.argv[1:]`, a script or `-m module` with its arguments; a failure ends the whole job."""
    _die_with_launcher()
    _keep_record()
    _remove_folders_of_daemons()
    _have_no_input()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # It is a pipe, on which lines are to arrive as they are printed; and whole, which PYTHONUNBUFFERED prevents.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
    process, status = os.getpid(), 0
    try:
        _run(sys.argv[1:])
    except SystemExit as leaving:
        status = _status(leaving)
        if status and os.getpid() == process:
            _end_job(status, patience_seconds=5)
    except BaseException as error:
        error.__traceback__ = _trace_of_script(error)
        # After world() the hook is the one that names the rank and aborts the job; it does not return.
        sys.excepthook(type(error), error, error.__traceback__)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        if os.getpid() == process:
            _end_job(status, patience_seconds=0)
    if os.getpid() != process and "mpi4py.MPI" in sys.modules:
        from distprop.comm import mpi

        mpi.leave_forked(status)
    if not status and not here.hosts and os.getpid() == process:  # after world() its watchdog says so
        here.at(END)
    sys.exit(status)


def _die_with_launcher() -> None:
    """Ask Linux for a SIGKILL when the parent dies; Open MPI 5 leaves its ranks running when it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _keep_record() -> None:
    """Where `distprop run` reads it, which so knows of this rank before it calls world(), or if it never does."""
    number = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if number and os.path.exists(os.path.join(folder, LAUNCHER)):
        with contextlib.suppress(OSError):
            here.keep(folder, int(number), int(os.environ.get("DISTPROP_SIZE", 1)))


def _remove_folders_of_daemons() -> None:
    """Those that earlier jobs have left empty on this host; one of this minute may be about to be filled."""
    own = Path(os.environ.get(DAEMONS, ""))
    for folder in own.parent.glob(own.with_suffix(".*").name) if own.suffix else ():
        with contextlib.suppress(OSError):  # it is not empty, or somebody else's
            if time.time() - folder.stat().st_mtime > 60:
                folder.rmdir()


def _have_no_input() -> None:
    """Read nothing from standard input, rather than wait: Open MPI 5.0 never passes on that it has ended."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _run(arguments: list[str]) -> None:
    """As `python` does it: `sys.path` begins with the script's directory, or for a module with the current one."""
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        script = Path(arguments[0])
        if script.is_file() and not sys.flags.safe_path:
            sys.path[0] = str(script.resolve().parent)
        runpy.run_path(str(script), run_name="__main__")


def _status(leaving: SystemExit) -> int:
    """The exit status that `sys.exit(code)` asks for; a message is printed and counts as 1."""
    if leaving.code is None or isinstance(leaving.code, int):
        return int(leaving.code or 0)
    print(leaving.code, file=sys.stderr)
    return 1


def _trace_of_script(error: BaseException) -> TracebackType | None:
    """The traceback without the frames of this file and of runpy, above the script's own."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace


def _await_reader(streams: tuple[int, int], seconds: float) -> None:
    """Wait until the launcher has read what was printed; Hydra (5.0) drops what it has not when it ends the job."""
    deadline = time.monotonic() + seconds
    for stream in streams:
        while time.monotonic() < deadline:
            try:
                unread = fcntl.ioctl(stream, termios.FIONREAD, bytes(4))
            except OSError:  # neither a pipe nor a terminal
                break
            if not any(unread):
                break
            time.sleep(0.005)


def _end_job(status: int, patience_seconds: float) -> None:
    """End the other ranks; if MPI runs, only those that do not leave with a failure as well in the time given."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed by the script, or one of its own
            stream.flush()
    _await_reader((1, 2), seconds=1)
    if "mpi4py.MPI" in sys.modules:
        from distprop.comm import mpi

        if mpi.leave(status, patience_seconds):
            return
    # MPI was not started here, and other ranks may wait for that. Hydra, MPICH's launcher, wants to be told, in a line
    # of its PMI protocol; Open MPI's ends the job when this process exits with a failure.
    if descriptor := os.environ.get("PMI_FD"):
        os.write(int(descriptor), f"cmd=abort exitcode={status}\n".encode())
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        time.sleep(1)  # version 5.0 crashed or hung 7 times in 15 when the others were just connecting to it


if __name__ == "__main__":
    main()
