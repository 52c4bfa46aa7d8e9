"""distprop beside PyTorch on the same cores: `python benchmarks/compare.py`. See README.md here for what is measured.

Every figure comes from processes that were started in turns, PyTorch, distprop, PyTorch, distprop, and the median over
the rounds counts, because machines drift. PyTorch first has a round of its own in which it chooses its fastest options.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from networks import NETWORKS
from table import disagreements, show

HERE = Path(__file__).parent
LIMIT_SECONDS = 170  # for one process
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
LAUNCHERS = {
    ("torch", 1): [],
    ("distprop", 1): [],
    ("torch", 2): ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ("distprop", 2): ["-m", "distprop", "run", "-n", "2"],
}
MNIST_EPOCHS = 4  # over which the learning rate falls; 98 % are reached in the third
REDUCED_MEGABYTES = ("2.7", "23", "100")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="some of them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each program has (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps timed in a turn (default: 40 to 300, by the network)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-mnist", action="store_true", help="leave out the time to 98 %% on MNIST")
    parser.add_argument("--no-allreduce", action="store_true", help="leave out the reduction alone")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that it runs; no figures")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and no table")
    parser.add_argument(
        "--merge", nargs="+", metavar="FILE", help="measure nothing; the table of earlier --json output"
    )
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the worker is ended too
    names = [name for name in args.networks.split(",") if name]
    if unknown := set(names) - set(NETWORKS):
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    results = merged(args.merge) if args.merge else measured(names, args)
    print(json.dumps(results) if args.json else show(results))
    wrong = disagreements(results)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def measured(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for."""
    results: dict[str, Any] = {"networks": {}, "conditions": conditions(), "rounds": 1 if args.quick else args.rounds}
    for name in names:
        steps = 3 if args.quick else args.steps or NETWORKS[name].steps
        results["networks"][name] = compare_network(name, steps, results["rounds"], bool(args.quick))
        if not (args.quick or args.no_compile):
            results["networks"][name]["compiled"] = compiled(name, steps)
    if not (args.quick or args.no_mnist):
        results["mnist"] = compare_mnist(results["rounds"])
    if not (args.quick or args.no_allreduce):
        results["allreduce"] = reductions()
    return results


def merged(files: list[str]) -> dict[str, Any]:
    """The results of several runs as one; what comes later replaces what is there."""
    results: dict[str, Any] = {"networks": {}}
    commands = []
    for file in files:
        found = json.loads(Path(file).read_text())
        commands.append(found["conditions"]["command"])
        results["networks"] |= found.pop("networks")
        results |= found
    results["conditions"]["command"] = "; ".join(dict.fromkeys(commands))
    return results


def compare_network(name: str, steps: int, rounds: int, quick: bool) -> dict[str, Any]:
    """The medians of the network's figures over the rounds, for each library on 1 and 2 ranks."""
    alone, together = best_variants(name, steps, quick)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for library, ranks in LAUNCHERS:
            job = {"network": name, "steps": steps, "variant": alone if ranks == 1 else together}
            runs.setdefault(f"{library}{ranks}", []).append(worker(library, ranks, job))
    result: dict[str, Any] = {key: median_run(several) for key, several in runs.items()}
    result["torch1"]["variant"], result["torch2"]["variant"] = alone, together
    return result


def best_variants(name: str, steps: int, quick: bool) -> tuple[dict[str, bool], dict[str, bool]]:
    """PyTorch's fastest options on one rank and on two. These runs choose, they do not count."""
    layouts = [{"channels_last": True}, {}] if NETWORKS[name].images else [{}]
    alone = [{**layout, **more} for layout, more in itertools.product(layouts, ({}, {"fused": True}))]
    alone = alone[:1] if quick else alone
    first = fastest(name, steps, 1, alone)
    fused = {"fused": True} if first.get("fused") else {}
    together = [{**layout, **fused, **more} for layout, more in itertools.product(layouts, ({}, {"bucket_view": True}))]
    return first, fastest(name, steps, 2, together[:1] if quick else together)


def fastest(name: str, steps: int, ranks: int, variants: list[dict[str, bool]]) -> dict[str, bool]:
    """The variant with the shortest step."""
    if len(variants) == 1:
        return variants[0]
    runs = [worker("torch", ranks, {"network": name, "steps": steps, "variant": variant}) for variant in variants]
    return min(zip(variants, runs, strict=True), key=lambda pair: pair[1]["seconds"])[0]


def compiled(name: str, steps: int) -> dict[str, Any]:
    """PyTorch on one rank through torch.compile, from an empty cache; {"error": ...} where it cannot."""
    results = []
    with tempfile.TemporaryDirectory() as cache:
        layouts = [{"channels_last": True}, {}] if NETWORKS[name].images else [{}]
        for layout in layouts:
            job = {"network": name, "steps": steps, "variant": {**layout, "compile": True}}
            try:
                results.append(worker("torch", 1, job, TORCHINDUCTOR_CACHE_DIR=str(Path(cache, str(len(results))))))
            except WorkerError as error:
                return {"error": error.last_line}
    return min(results, key=lambda run: run["seconds"])


def compare_mnist(rounds: int) -> dict[str, Any]:
    """Seconds from the command to 98 % of the test images, on two ranks, with another seed in each round."""
    if "DISTPROP_DATA" not in os.environ:
        return {"error": "DISTPROP_DATA is not set to a folder with mnist/"}
    runs: dict[str, list[dict[str, Any]]] = {"torch": [], "distprop": []}
    for seed in range(rounds):
        for library, several in runs.items():
            job = {"network": "mlp512", "epochs": MNIST_EPOCHS, "seed": seed, "variant": {"bucket_view": True}}
            several.append(worker(library, 2, job))
    return {library: median_run(several) for library, several in runs.items()}


def reductions() -> list[dict[str, Any]]:
    """`distprop bench allreduce` on two ranks."""
    sizes = ",".join(REDUCED_MEGABYTES)
    return run_for_json([sys.executable, "-m", "distprop", "bench", "allreduce", "-n", "2", "--sizes", sizes, "--json"])


class WorkerError(RuntimeError):
    """A worker failed; `last_line` is what it said last."""

    def __init__(self, command: list[str], output: str) -> None:
        lines = output.strip().splitlines()
        super().__init__(f"{' '.join(command)} failed:\n{output}")
        self.last_line = next(
            (line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output"
        )


def worker(library: str, ranks: int, job: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Start a worker, wait for it, and return what it measured."""
    script = str(HERE / f"train_{library}.py")
    command = [sys.executable, *LAUNCHERS[library, ranks], script, json.dumps(job)]
    print(f"{library} {ranks} {json.dumps(job)}", file=sys.stderr, flush=True)
    return run_for_json(command, **environment)


def run_for_json(command: list[str], **environment: str) -> Any:
    """What the command prints on its last line; it knows when it was started."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {**os.environ, **ONE_THREAD, **environment, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command,
        env={**wanted, "COMPARE_BEGAN": repr(time.time())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise WorkerError(command, f"no answer within {LIMIT_SECONDS} s") from None
    finally:
        process.terminate()  # torchrun and distprop run end their ranks; nothing happens if it has ended
    if process.returncode:
        raise WorkerError(command, errors)
    return json.loads(output.splitlines()[-1])


def median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number the median over the runs; of anything else the first run's."""
    return {
        key: statistics.median(run[key] for run in runs)
        if isinstance(value, int | float) and key != "reached"
        else value
        for key, value in runs[0].items()
    } | ({"reached": all(run["reached"] for run in runs)} if "reached" in runs[0] else {})


def conditions() -> dict[str, str]:
    """Where and with what this is measured; the workers say which BLAS they had."""
    import numpy

    from distprop.comm import mpi

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now().astimezone().date().isoformat(),
        "command": " ".join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        "processor": f"{model[0] if model else platform.processor()}, {len(os.sched_getaffinity(0))} cores in use",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "mpi": mpi.library().name,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", "not set"),
    }


if __name__ == "__main__":
    sys.exit(main())
