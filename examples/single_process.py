"""The engine alone: no MPI, no ranks, no trainer. A scalar expression, a gradient check, and a loop on the digits.

python examples/single_process.py
"""

import argparse

import distprop as dp
from distprop import functional as F
from distprop import nn, optim
from distprop.testing import check_grads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    # Backpropagation on single numbers: c = ab + a³, so dc/da = b + 3a² and dc/db = a.
    a, b = dp.tensor(2.0, requires_grad=True), dp.tensor(-3.0, requires_grad=True)
    c = a * b + a**3
    c.backward()
    print(f"c = {c.item():g}, dc/da = {a.grad:g}, dc/db = {b.grad:g}")

    # The same rule through a layer, held against finite differences.
    check_grads(lambda x, w: F.tanh(F.linear(x, w)), [[[0.1, -0.4], [0.7, 0.2]], [[0.3, 0.5]]])
    print("the gradient of tanh(x Wᵀ) agrees with finite differences")

    # A network, the loop written out.
    train_set, test_set = dp.data.load_digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    loader = dp.data.Loader(train_set, batch_size=64, seed=0)
    for epoch in range(args.epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)  # forward
            optimizer.zero_grad()
            loss.backward()  # backward: the chain rule, layer by layer
            optimizer.step()  # w ← w − lr·dw
        with dp.no_grad():
            accuracy = (model(test_set.x).argmax(1) == test_set.y).mean()
        if epoch % 5 == 4 or epoch == args.epochs - 1:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, {accuracy:.2%} of the held-out digits are right")


if __name__ == "__main__":
    main()
