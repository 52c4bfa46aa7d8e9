"""A small training job in which one rank goes wrong: `job.py RUN_DIR [FAULT RANK STEP]`.

At the fault it writes the time into RUN_DIR/fault, so that the parent can tell how long the job took to end.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

import distprop as dp
from distprop import functional as F
from distprop import nn, optim

STEPS, CHECKPOINT_EVERY, ROWS = 20, 2, 96


class Model(nn.Sequential):
    """A network whose forward pass goes wrong in training step `step` of this process."""

    def __init__(self, fault: str = "", step: int = 0) -> None:
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        self.fault, self.fault_step, self.steps, self.last = fault, step, 0, -1

    def forward(self, x):
        step = dp.comm.recorder.here.step
        output = super().forward(x)
        if self.training and self.fault and step == self.fault_step and self.last != step:
            self.last = step
            before = fault_file.parent / f"checkpoints/step-{step - 3:09d}"
            while step > 3 and not before.is_dir():
                time.sleep(0.01)  # it is written while training goes on
            fault_file.write_text(repr(time.time()))
            output = FAULTS[self.fault](self, output)
        if self.training and self.fault == "is slow":
            time.sleep(0.2)  # five times what the others take, even with other jobs on their cores
        return output


def raises(model, output):
    raise ValueError("boom")


def raises_in_a_thread(model, output):
    threading.Thread(target=raises, args=(model, output)).start()
    time.sleep(60)


def is_killed(model, output):
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(model, output):
    os.kill(os.getpid(), signal.SIGSTOP)


def exits(model, output):
    sys.exit(0)


def hangs(model, output):
    time.sleep(600)


def runs_out_of_memory(model, output):
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (100 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kept = []
    while True:
        kept.append(np.ones(1 << 20))


def has_a_nan_gradient(model, output):
    with np.errstate(all="ignore"):
        return output + (output * 0) ** 0.5  # adds 0, with a derivative of 0 times infinity


def changes_a_parameter(model, output):
    model[2].weight.data[1, 3] += 1e-3
    return output


FAULTS = {
    "raises": raises,
    "raises in a thread": raises_in_a_thread,
    "is killed": is_killed,
    "is stopped": is_stopped,
    "exits": exits,
    "hangs": hangs,
    "runs out of memory": runs_out_of_memory,
    "has a NaN gradient": has_a_nan_gradient,
    "changes a parameter": changes_a_parameter,
    "is slow": lambda model, output: output,
    "calls in another order": lambda model, output: output,
    "evaluates alone": lambda model, output: output,
}


def dataset() -> dp.data.ArrayDataset:
    rng = np.random.default_rng(0)
    return dp.data.ArrayDataset(rng.normal(size=(ROWS, 12)).astype(np.float32), rng.integers(0, 4, ROWS))


def make_trainer(model: Model, run_dir: Path, comm, **options) -> dp.Trainer:
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"batch_size": 16, "deterministic": True, "shards": 6, "progress": False, "resume": True}
    return dp.Trainer(
        model,
        F.cross_entropy,
        optimizer,
        comm=comm,
        run_dir=run_dir,
        checkpoint_every=CHECKPOINT_EVERY,
        **settings,
        **options,
    )


def main() -> None:
    global fault_file
    run_dir = Path(sys.argv[1])
    fault, rank, step = (sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 2 else ("", 0, 0)
    fault_file = run_dir / "fault"
    comm = dp.world()
    dp.manual_seed(0)
    model = Model(fault if comm.rank == rank else "", step)

    def after_step(result: dp.train.StepResult) -> None:
        if fault == "calls in another order":
            odd = comm.rank == rank and result.step == step
            for call in (comm.barrier, lambda: comm.allgather(b""))[:: -1 if odd else 1]:
                call()
        if fault == "evaluates alone" and result.step == step and comm.rank == rank:
            trainer.evaluate(dataset())
        if fault == "is slow":
            time.sleep(0.004)

    trainer = make_trainer(model, run_dir, comm, callbacks=[after_step])
    steps = STEPS
    if fault == "is slow":
        trainer.parallel.verify_every, steps = 10, 35
    trainer.fit(dataset(), steps=steps)


if __name__ == "__main__":
    main()
