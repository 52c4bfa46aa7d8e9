"""Train a small network on the embedded digits (1,797 images of 8x8 pixels, 10 classes).

python examples/digits.py                      one process, no MPI needed
distprop run -n 2 examples/digits.py           two MPI ranks; `make demo` runs this
"""

import argparse

import distprop as dp
from distprop import functional as F
from distprop import nn, optim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of the global batch, over all ranks")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate, which falls along a cosine")
    parser.add_argument("--run-dir", help="folder for metrics.jsonl")
    args = parser.parse_args()

    train_set, test_set = dp.data.load_digits()
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    steps = args.epochs * -(-len(train_set) // args.batch_size)
    lr = optim.schedule.cosine(args.lr, steps)
    optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    trainer = dp.Trainer(model, F.cross_entropy, optimizer, batch_size=args.batch_size, seed=0, run_dir=args.run_dir)
    trainer.fit(train_set, epochs=args.epochs, validation=test_set)
    result = trainer.evaluate(test_set)
    if trainer.comm.rank == 0:
        print(f"{result['accuracy']:.2%} of the {len(test_set)} held-out digits are right")


if __name__ == "__main__":
    main()
