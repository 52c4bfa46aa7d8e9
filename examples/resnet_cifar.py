"""ResNet-20 on CIFAR-10: He et al., 2015, arXiv:1512.03385, section 4.2.

    distprop run -n 2 examples/resnet_cifar.py --root cifar-10-batches-bin

The binary files of CIFAR-10 (data_batch_1.bin to data_batch_5.bin, test_batch.bin) are read from --root or from
$DISTPROP_DATA/cifar10. The paper trains for 164 epochs of batches of 128 and reports 91.25 %.
"""

import argparse
import math

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Without bias, as batch norm follows."""
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class BasicBlock(nn.Module):
    """relu(short cut + BN(conv(relu(BN(conv(x)))))); where the size changes the short cut is thinned out and padded."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))  # no parameters: option A
        return F.relu(x + y)


def resnet20(classes: int = 10) -> nn.Sequential:
    """Three stages of three blocks with 16, 32 and 64 channels."""
    layers: list[nn.Module] = [conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width in (16, 32, 64):
        for number in range(3):
            layers.append(BasicBlock(inputs, width, stride=2 if number == 0 and width > 16 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the binary files")
    parser.add_argument("--epochs", type=int, default=164)
    parser.add_argument("--batch-size", type=int, default=128, help="rows of the global batch, over all ranks")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--run-dir", help="folder for metrics.jsonl")
    args = parser.parse_args()

    train_set, test_set = data.load_cifar10(args.root)
    mean, std = (f(train_set.x, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    train_set, test_set = (data.ArrayDataset((part.x - mean) / std, part.y) for part in (train_set, test_set))
    augmented = data.Augmented(train_set, [data.RandomCrop(32, padding=4), data.RandomHorizontalFlip()])
    model = resnet20()
    steps = math.ceil(len(train_set) / args.batch_size)
    milestones = [args.epochs * steps // 2, args.epochs * steps * 3 // 4]
    lr = optim.schedule.multi_step(args.lr, milestones)
    optimizer = optim.SGD(optim.decay_groups(model, 1e-4), lr=lr, momentum=0.9)
    trainer = dp.Trainer(model, F.cross_entropy, optimizer, batch_size=args.batch_size, run_dir=args.run_dir)
    trainer.fit(augmented, epochs=args.epochs, validation=test_set)
    result = trainer.evaluate(test_set)
    if trainer.comm.rank == 0:
        print(f"{result['accuracy']:.2%} of {len(test_set):,} test images are right")


if __name__ == "__main__":
    main()
