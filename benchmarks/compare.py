"""distprop beside PyTorch on the same cores: `python benchmarks/compare.py`. See README.md here for what is measured.

All programs are alive at once and take short turns, PyTorch, distprop, PyTorch, distprop, because machines drift; a
ratio is the median over the rounds of the ratio within one. PyTorch's fastest options are found in the same way before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from networks import NETWORKS
from programs import Program, ProgramError, command_of, run_for_json
from table import START_NETWORK, disagreements, show

WITH_PRODUCTS = ("torch1", "distprop1", "distprop2")  # whose turns are to time the matrix products as well
STARTS = 3  # of which the median counts
MNIST_EPOCHS, MNIST_ROUNDS = 4, 3  # the learning rate falls over so many epochs; 98 % are reached in the third
REDUCED_MEGABYTES = ("2.7", "23", "100")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="some of them (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=positive, default=20, help="turns that each program has (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive, help="steps in a turn (default: 6 to 40, by the network)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-mnist", action="store_true", help="leave out the time to 98 %% on MNIST")
    parser.add_argument("--no-allreduce", action="store_true", help="leave out the reduction alone")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; figures mean nothing")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and no table")
    parser.add_argument(
        "--merge", nargs="+", metavar="FILE", help="measure nothing; the table of earlier --json output"
    )
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the programs are ended too
    names = [name for name in args.networks.split(",") if name]
    if unknown := set(names) - set(NETWORKS):
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    results = merged(args.merge) if args.merge else measured(names, args)
    print(json.dumps(results) if args.json else show(results))
    wrong, failed = disagreements(results), results.get("failed", [])
    for line in (*wrong, *failed):
        print(line, file=sys.stderr)
    return 2 if failed else 1 if wrong else 0


def positive(text: str) -> int:
    """A number of rounds or steps."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def measured(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for; "failed" says what could not be measured and why."""
    rounds = 2 if args.quick else args.rounds
    results: dict[str, Any] = {"networks": {}, "conditions": conditions(), "rounds": rounds}
    failed: list[str] = []

    def add(to: dict[str, Any], key: str, measure: Callable[[], Any]) -> None:
        try:
            to[key] = measure()
        except ProgramError as error:
            failed.append(str(error))

    for name in names:
        steps = 2 if args.quick else args.steps or NETWORKS[name].steps
        no_compile = args.quick or args.no_compile
        add(results["networks"], name, partial(compare_network, name, steps, rounds, args.quick, no_compile))
    if not (args.quick or args.no_mnist):
        add(results, "mnist", compare_mnist)
    if not (args.quick or args.no_allreduce):
        add(results, "allreduce", reductions)
    return results | ({"failed": failed} if failed else {})


def merged(files: list[str]) -> dict[str, Any]:
    """The results of several runs on one machine as one; what comes later replaces what is there."""
    results: dict[str, Any] = {"networks": {}}
    commands = []
    for file in files:
        try:
            found = json.loads(Path(file).read_text())
            commands.append(found["conditions"]["command"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            sys.exit(f"{file} is no output of compare.py --json: {error!r}")
        for what in ("processor", "python", "numpy", "mpi"):
            before, now = (run.get("conditions", {}).get(what) for run in (results, found))
            if before and before != now:
                sys.exit(f"{file} was measured with {what} {now}, the files before it with {before}")
        results["networks"] |= found.pop("networks")
        results |= found
    results["conditions"]["command"] = "; ".join(dict.fromkeys(commands))
    return results


def compare_network(name: str, steps: int, rounds: int, quick: bool, no_compile: bool) -> dict[str, Any]:
    """The figures of each library on 1 and on 2 ranks, and of a compiled PyTorch if that is wanted."""
    layouts = [{"channels_last": True}, {}] if NETWORKS[name].images else [{}]
    variants = [{**layout, **more} for layout in layouts for more in ({}, {"fused": True})]
    alone = fastest(name, steps, rounds, 1, variants[:1] if quick else variants)
    fused = {"fused": True} if alone.get("fused") else {}
    variants = [{**layout, **fused, **more} for layout in layouts for more in ({}, {"bucket_view": True})]
    together = fastest(name, steps, rounds, 2, variants[:1] if quick else variants)
    compiled: dict[str, Program] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:  # a compiler may still be writing
        for number, layout in enumerate([] if no_compile else layouts):
            job = {"network": name, "variant": {**layout, **fused, "compile": True}}
            cache = str(Path(caches, str(number)))  # an empty one
            compiled[f"compiled{number}"] = Program("torch", 1, job, TORCHINDUCTOR_CACHE_DIR=cache)
        programs = {
            "torch1": Program("torch", 1, {"network": name, "variant": alone}),
            "distprop1": Program("distprop", 1, {"network": name}),
            "torch2": Program("torch", 2, {"network": name, "variant": together}),
            "distprop2": Program("distprop", 2, {"network": name}),
        }
        result = in_turns(programs | compiled, steps, rounds, may_fail=compiled)
    result["torch1"]["variant"], result["torch2"]["variant"] = alone, together
    if name == START_NETWORK and not quick:
        result["torch2"]["first_step_seconds"] = median_start("torch", {"network": name, "variant": together})
        result["distprop2"]["first_step_seconds"] = median_start("distprop", {"network": name})
    if compiled:
        result["compiled"] = min((result.pop(key) for key in compiled), key=median_step)
    return result


def median_start(library: str, job: dict[str, Any]) -> float:
    """Seconds from the command to the first step on two ranks."""
    starts = []
    for _ in range(STARTS):
        with Program(library, 2, job) as program:
            starts.append(program.first["first_step_seconds"])
    return statistics.median(starts)


def fastest(name: str, steps: int, rounds: int, ranks: int, variants: list[dict[str, bool]]) -> dict[str, bool]:
    """PyTorch's options with the shortest step."""
    if len(variants) == 1:
        return variants[0]
    programs = {
        str(number): Program("torch", ranks, {"network": name, "variant": variant})
        for number, variant in enumerate(variants)
    }
    figures = in_turns(programs, steps, -(-rounds // 3))
    return variants[int(min(figures, key=lambda number: median_step(figures[number])))]


def in_turns(
    programs: dict[str, Program], steps: int, rounds: int, may_fail: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """What each program measured at its first steps, and in turns seconds of a step and of its products.

    {"error": ...} for one that fails although it `may_fail`.
    """
    figures: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        for turn in range(rounds + 1):  # the first is the start
            for key, program in programs.items():
                try:
                    if turn == 0:
                        first = stack.enter_context(program).first
                        figures[key] = {**first, "steps_in_turns": [], "products_in_turns": []}
                    elif "error" not in figures[key]:
                        for what in ("steps", "products") if key in WITH_PRODUCTS else ("steps",):
                            figures[key][f"{what}_in_turns"].append(program.turn(what, steps))
                except ProgramError as error:
                    if key not in may_fail:
                        raise
                    figures[key] = {"error": error.last_line}
    return figures


def median_step(figures: dict[str, Any]) -> float:
    """Seconds; infinite for a program that could not run."""
    return statistics.median(figures.get("steps_in_turns", [float("inf")]))


def compare_mnist() -> dict[str, Any]:
    """Seconds from the command to 98 % of the test images, on two ranks, with another seed in each round.

    {"error": ...} without the images.
    """
    if not Path(folder := os.environ.get("DISTPROP_DATA", "")).joinpath("mnist").is_dir():
        return {"error": f"DISTPROP_DATA={folder} is no folder with mnist/ in it"}
    runs: dict[str, list[dict[str, Any]]] = {"torch": [], "distprop": []}
    for seed in range(MNIST_ROUNDS):
        for library, several in runs.items():
            job = {"network": "mlp512", "epochs": MNIST_EPOCHS, "seed": seed}
            several.append(run_for_json(command_of(library, 2, job)))
    return {
        library: {
            "seconds": statistics.median(run["seconds"] for run in several),
            "accuracy": statistics.median(run["accuracy"] for run in several),
            "reached": all(run["reached"] for run in several),
        }
        for library, several in runs.items()
    }


def reductions() -> list[dict[str, Any]]:
    """`distprop bench allreduce` on two ranks."""
    sizes = ",".join(REDUCED_MEGABYTES)
    return run_for_json([sys.executable, "-m", "distprop", "bench", "allreduce", "-n", "2", "--sizes", sizes, "--json"])


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
