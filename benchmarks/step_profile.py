"""Where a step of one of the four networks goes: `distprop run -n 2 benchmarks/step_profile.py cnn`.

Trains on noise, records every rank's time line, of 100 steps or as many as the second argument says, and prints what
`distprop trace` says of them; then as many steps again, without a record, and what each function takes on rank 0. As in
`compare.py`, a rank has one BLAS thread, also if it is alone.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import threadpoolctl

import distprop as dp
from distprop import functional as F
from distprop import optim, trace
from distprop.data import ArrayDataset
from distprop.environment import blas_description
from functions import FunctionTimes
from networks import ADAMW, LR, MOMENTUM, NETWORKS, batches, distprop_model

WARM_UP = 10  # steps


def main() -> None:
    name, steps = (*sys.argv[1:], *("", "100")[len(sys.argv) - 1 :])[:2]
    if name not in NETWORKS or not steps.isdecimal():
        sys.exit(f"usage: step_profile.py NETWORK [STEPS], NETWORK being one of {', '.join(NETWORKS)}")
    threadpoolctl.threadpool_limits(1, user_api="blas")
    network, comm = NETWORKS[name], dp.world()
    model = distprop_model(name)
    if network.adamw:
        optimizer = optim.AdamW(optim.decay_groups(model, ADAMW["weight_decay"]), lr=ADAMW["lr"], betas=ADAMW["betas"])
    else:
        optimizer = optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    stream = batches(name, 0)
    x, y = (np.concatenate(parts) for parts in zip(*(next(stream) for _ in range(8)), strict=True))
    options = {"comm": comm, "batch_size": network.batch * comm.size, "clip_norm": network.clip_norm}
    options |= {"health": False, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        dp.Trainer(model, F.cross_entropy, optimizer, **options).fit(ArrayDataset(x, y), steps=WARM_UP)
        trainer = dp.Trainer(model, F.cross_entropy, optimizer, run_dir=folder, profile=int(steps), **options)
        trainer.fit(ArrayDataset(x, y), steps=int(steps))
        if comm.rank == 0:
            print(f"{blas_description()}\n{trace.show(trace.read_trace(Path(folder)))}")
    functions = FunctionTimes()
    with functions.watching():
        dp.Trainer(model, F.cross_entropy, optimizer, **options).fit(ArrayDataset(x, y), steps=int(steps))
    if comm.rank == 0:
        print(f"\n{functions.show(int(steps))}")


if __name__ == "__main__":
    main()
