"""The open loop: your own training loop on any number of ranks, without an `if rank` around the mathematics.

python examples/custom_loop.py
distprop run -n 2 examples/custom_loop.py
"""

import argparse

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F


class Residual(nn.Module):
    """A layer whose input takes a short cut past it, which keeps gradients from vanishing."""

    def __init__(self, width: int) -> None:
        self.linear = nn.Linear(width, width)

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        return x + F.relu(self.linear(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of the global batch, over all ranks")
    args = parser.parse_args()

    comm = dp.world()  # MPI's world under a launcher, a world of one otherwise
    train_set, test_set = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 96), Residual(96), Residual(96), nn.Linear(96, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parallel = dp.DataParallel(model, comm)  # broadcasts the parameters, averages the gradients
    loader = data.Loader(train_set, batch_size=args.batch_size, comm=comm, seed=0)

    for epoch in range(args.epochs):
        for x, y in loader:  # this rank's share of each global batch
            loss = F.cross_entropy(parallel(x), y)
            optimizer.zero_grad()
            loss.backward()  # when it returns, the gradients are the global mean
            optim.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()

        # Any number can be summed over the ranks: here each rank counts on every size-th test example.
        x, y = test_set[np.arange(comm.rank, len(test_set), comm.size)]
        with dp.no_grad():
            correct = comm.allreduce(np.array([(model(x).argmax(1) == y).sum()]))
        if comm.rank == 0 and (epoch % 5 == 4 or epoch == args.epochs - 1):
            print(f"epoch {epoch + 1}: {correct[0] / len(test_set):.2%} of the held-out digits are right")


if __name__ == "__main__":
    main()
