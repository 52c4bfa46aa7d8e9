"""Run the parallel tests under mpirun: `python tests/mpirun.py 1 2 3 4 5 8` for so many ranks each.

On more than 4 ranks, which share cores in most places, only the deterministic mode is tested. Each run has a time
limit, so a deadlock is a failure and not a wait.
"""

import os
import subprocess
import sys
from pathlib import Path

from distprop import launch
from distprop.comm import mpi
from distprop.launcher import find_launcher, launcher_environment, launcher_flags

LIMIT_SECONDS = 900  # a single test has a minute; all of them take two on four ranks that share two busy cores
FOLDER = Path(__file__).parent / "parallel"


def main() -> int:
    library = mpi.library()
    launcher = find_launcher(library)
    for ranks in map(int, sys.argv[1:]):
        print(f"=== {ranks} rank{'s' * (ranks > 1)}, {library.name}", flush=True)
        pytest = [sys.executable, "-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider"]
        pytest += [str(FOLDER / "test_mpi_deterministic.py" if ranks > 4 else FOLDER)]
        flags = launcher_flags(library, ranks, launch.allowed_cores())
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        environment |= launcher_environment(library, ranks, launch.allowed_cores())
        job = subprocess.Popen([launcher.path, *flags, *pytest], env=environment, stdin=subprocess.DEVNULL)
        try:
            status = job.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            job.terminate()
            job.wait(20)
            print(f"the tests on {ranks} ranks did not end within {LIMIT_SECONDS} s: a deadlock", file=sys.stderr)
            return 1
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
