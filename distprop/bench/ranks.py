"""One point of `distprop bench scaling`: trains on the ranks it finds itself on, and says how fast and to what result.

It is a program of its own, `python -m distprop.bench.ranks`, because each number of ranks is a job of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np

from distprop import functional as F
from distprop import optim
from distprop.bench.step import MOMENTUM, relu_network
from distprop.bench.workload import network
from distprop.comm import Communicator, world
from distprop.parallel import DataParallel
from distprop.random import manual_seed
from distprop.tape import Array

WIDTHS = (784, 512, 512, 10)
GLOBAL_BATCH = 50  # shared by 4 and 8 ranks unevenly
CHECKED_STEPS = 5


def main() -> None:
    """Print the measures as one line of JSON on rank 0; the arguments are rows on each rank and steps."""
    batch, steps = int(sys.argv[1]), int(sys.argv[2])
    comm = world()
    seconds, result = step_seconds(comm, batch, steps), trained_result(comm)
    if comm.rank == 0:
        print(json.dumps({"seconds": seconds, "result": result.tolist()}))


def step_seconds(comm: Communicator, batch: int, steps: int) -> float:
    """Median seconds of a step of the network of `WIDTHS` in float32, `batch` rows on each rank."""
    step = network(WIDTHS).step(comm, batch)
    times = []
    for _ in range(steps + 3):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def trained_result(comm: Communicator) -> Array:
    """All parameters, in float64, after a few steps on global batches that do not depend on the number of ranks."""
    manual_seed(0)
    model = relu_network((20, 16, 5)).to(np.float64)
    parallel = DataParallel(model, comm)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=MOMENTUM)
    rng = np.random.default_rng(0)
    for _ in range(CHECKED_STEPS):
        x, y = rng.normal(size=(GLOBAL_BATCH, 20)), rng.integers(0, 5, GLOBAL_BATCH)
        first, last = (GLOBAL_BATCH * rank // comm.size for rank in (comm.rank, comm.rank + 1))
        optimizer.zero_grad()
        F.cross_entropy(parallel(x[first:last]), y[first:last]).backward()
        optimizer.step()
    return np.concatenate([parameter.data.reshape(-1) for parameter in model.parameters()])


if __name__ == "__main__":
    main()
