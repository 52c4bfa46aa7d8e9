"""MNIST with fully connected networks.

    distprop run -n 2 examples/mnist.py                        over 98.2 % on the test set
    distprop run -n 2 examples/mnist.py --recipe nielsen       the network of Nielsen's chapter 3

The images are read from $DISTPROP_DATA/mnist or --root, or downloaded once. Nielsen's recipe ("Neural Networks and Deep
Learning", chapter 3): [784, 100, 10] sigmoid units, cross-entropy of each output unit, mini-batches of 10, η = 0.1 for
60 epochs, λ = 5, trained on 50,000 images and judged on the 10,000 others of the training file. He reports 98.04 %.
"""

import argparse
import math

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F


def default_recipe(args: argparse.Namespace) -> tuple[dp.Trainer, data.ArrayDataset, data.ArrayDataset, int]:
    """An MLP with dropout and a learning rate that falls along a cosine."""
    train_set, test_set = data.load_mnist(args.root)
    if args.limit:
        train_set = train_set.take(np.arange(args.limit))
    epochs, batch_size = args.epochs or 10, args.batch_size or 128
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    steps = epochs * math.ceil(len(train_set) / batch_size)
    lr = optim.schedule.warmup(optim.schedule.cosine(0.1, steps), min(200, steps))
    optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    trainer = dp.Trainer(model, F.cross_entropy, optimizer, batch_size=batch_size, run_dir=args.run_dir)
    return trainer, train_set, test_set, epochs


def nielsen_recipe(args: argparse.Namespace) -> tuple[dp.Trainer, data.ArrayDataset, data.ArrayDataset, int]:
    """Sigmoid units throughout, so the cross-entropy is summed over ten separate outputs."""
    everything, _ = data.load_mnist(args.root)
    cut = len(everything) * 5 // 6  # 50,000
    train_set, validation = everything.take(np.arange(args.limit or cut)), everything.take(slice(cut, None))
    epochs, batch_size, eta, lmbda = args.epochs or 60, args.batch_size or 10, 0.1, 5.0
    model = nn.Sequential(nn.Linear(784, 100), nn.Sigmoid(), nn.Linear(100, 10))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
        nn.init.normal_(layer.bias)
    decay = lmbda / len(train_set)  # Nielsen's regularisation is λ/n, on the weights only
    optimizer = optim.SGD(
        [
            {"params": [model[0].weight, model[2].weight], "weight_decay": decay},
            {"params": [model[0].bias, model[2].bias]},
        ],
        lr=eta,
    )

    def ten_outputs(scores: dp.Tensor, labels: np.ndarray) -> dp.Tensor:
        one_hot = np.eye(10, dtype=scores.dtype)[labels]
        return F.binary_cross_entropy_with_logits(scores, one_hot) * 10  # a mean over images, a sum over outputs

    trainer = dp.Trainer(model, ten_outputs, optimizer, batch_size=batch_size, run_dir=args.run_dir)
    return trainer, train_set, validation, epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=["default", "nielsen"], default="default")
    parser.add_argument("--root", help="folder with the four IDX files")
    parser.add_argument("--epochs", type=int, help="10, or 60 for nielsen")
    parser.add_argument("--batch-size", type=int, help="rows of the global batch: 128, or 10 for nielsen")
    parser.add_argument("--limit", type=int, help="use only the first so many training images")
    parser.add_argument("--run-dir", help="folder for metrics.jsonl")
    args = parser.parse_args()

    recipe = nielsen_recipe if args.recipe == "nielsen" else default_recipe
    trainer, train_set, held_out, epochs = recipe(args)
    trainer.fit(train_set, epochs=epochs, validation=held_out)
    result = trainer.evaluate(held_out)
    if trainer.comm.rank == 0:
        print(f"{result['accuracy']:.2%} of {len(held_out):,} held-out images are right")


if __name__ == "__main__":
    main()
