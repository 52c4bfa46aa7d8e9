"""Does it pay to share the parameters of a node? `distprop run -n 2 benchmarks/sharded_update.py mlp2048`.

The same network twice in one job, in turns: with a copy of the parameters for each rank, all of which it updates, and
with one copy of which each rank updates its slice. A time is the median over the rounds of the median over the steps of
a turn, on rank 0; the ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time

from networks import NETWORKS, batches
from train_distprop import DistpropTraining


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    steps = NETWORKS[args.network].steps
    trainings = [DistpropTraining(args.network, sharded_update=sharded) for sharded in (False, True)]
    batch = next(batches(args.network, trainings[0].rank))
    rounds = [[turn(training, batch, steps) for training in trainings] for _ in range(args.rounds + 1)][1:]
    if trainings[0].rank == 0:
        whole, sharded = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(sharded / whole for whole, sharded in rounds)
        print(f"{args.network}: every rank updates all {whole:.2f} ms, its slice {sharded:.2f} ms, ratio {ratio:.3f}")


def turn(training: DistpropTraining, batch: tuple, steps: int) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        training.step(*batch)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
