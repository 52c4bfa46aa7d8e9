"""Vanishing and exploding gradients, seen and cured.

    python examples/vanishing.py
    distprop run -n 2 examples/vanishing.py
    distprop run -n 2 examples/vanishing.py --run-dir runs/vanishing    trains one too: distprop report runs/vanishing

The table of chapter 5 of Nielsen's "Neural Networks and Deep Learning": the learning speed of each hidden layer of 30
sigmoid units, the norm of its mean bias gradient over 1,000 MNIST images, before any training. Then what each remedy
does to it, and the same for a recurrent network, whose gradients explode through time.
"""

import argparse
from functools import partial

import numpy as np

import distprop as dp
from distprop import data, nn, optim
from distprop import functional as F
from distprop.health import learning_speeds

WIDTH = 30  # of every hidden layer
LENGTHS = (1, 5, 10, 20, 40)  # steps of the recurrent network


class Residual(nn.Module):
    """x + f(x): the gradient has a path with factor 1."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner = inner

    def forward(self, x: dp.Tensor) -> dp.Tensor:
        return x + self.inner(x)


def network(hidden: int, activation=nn.Sigmoid, init=None, normalise=False, residual=False) -> nn.Sequential:
    """[784, 30, ..., 30, 10]. Without `init`, as Nielsen: weights normal with variance 1/fan_in, biases N(0, 1)."""
    dp.manual_seed(1)
    layers: list[nn.Module] = []
    for number in range(hidden):
        linear = nn.Linear(WIDTH if number else 784, WIDTH)
        block = nn.Sequential(linear, *([nn.LayerNorm(WIDTH)] if normalise else []), activation())
        layers.append(Residual(block) if residual and number else block)
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    for linear in linears(model):
        (init or (lambda w: nn.init.normal_(w, std=w.shape[1] ** -0.5)))(linear.weight)
        (nn.init.zeros_ if init else nn.init.normal_)(linear.bias)
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def hidden_speeds(model: nn.Module, images: data.ArrayDataset, comm: dp.comm.Communicator, clip=None) -> list[float]:
    """‖∂C/∂b‖ of each hidden layer, first layer first, the mean over all images of all ranks, perhaps clipped."""
    parallel = dp.DataParallel(model, comm)
    (x, y), *_ = data.Loader(images, batch_size=len(images), comm=comm, shuffle=False)
    loss = F.binary_cross_entropy_with_logits(parallel(x), np.eye(10, dtype=np.float32)[y]) * 10
    loss.backward()
    if clip is not None:
        optim.clip_grad_norm_(model.parameters(), clip)
    speeds = learning_speeds(model)
    return [speeds[name] for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]


def orthogonal(scale: float):
    """An initialisation with which a product scales every vector by `scale`."""
    return lambda weight: nn.init.orthogonal_(weight, scale)


def through_time(steps: int, init, layer=nn.RNN, clip=None, **options) -> float:
    """‖∂L/∂h₀‖ after `steps` steps near 0, where tanh is the identity; of an LSTM ‖∂L/∂c₀‖: its cell is a short cut."""
    dp.manual_seed(1)
    rnn = layer(WIDTH, WIDTH, batch_first=True, **options)
    init(rnn.weight_hh_l0)
    nn.init.zeros_(rnn.bias_hh_l0)
    nn.init.zeros_(rnn.bias_ih_l0)
    start = state = nn.Parameter(np.full((1, 1, WIDTH), 1e-9, np.float32))
    if layer is nn.LSTM:
        rnn.bias_hh_l0.data[WIDTH : 2 * WIDTH] = 3  # of the forget gate: the cell keeps σ(3) = 0.95 of itself
        state = np.zeros_like(start.data), start
    output, _ = rnn(np.zeros((1, steps, WIDTH), np.float32), state)
    output[:, -1].sum().backward()
    if clip is not None:
        optim.clip_grad_norm_([start], clip)
    return float(np.linalg.norm(start.grad))


def through_normalised_time(steps: int, init) -> float:
    """The same with h ← tanh(norm(W h)): the scale of W goes out with the norm, forward and backward."""
    dp.manual_seed(1)
    weight = init(nn.Parameter(np.empty((WIDTH, WIDTH), np.float32)))
    start = h = nn.init.normal_(nn.Parameter(np.empty((1, WIDTH), np.float32)))
    for _ in range(steps):
        h = F.layer_norm(F.linear(h, weight), (WIDTH,)).tanh()
    h.sum().backward()
    return float(np.linalg.norm(start.grad))


def draw(speeds: dict[str, list[float]], norms: dict[str, list[float]], path: str) -> None:
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return print('no figure: install matplotlib with pip install "distprop[plots]"')
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, curves in (left, speeds), (right, norms):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # the usual ten repeat
        for name, values in curves.items():
            axes.semilogy(LENGTHS if axes is right else range(1, len(values) + 1), values, marker="o", label=name)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below, where no curve is
    left.set(title="Learning speed", xlabel="hidden layer", xticks=(1, 2, 3, 4), ylabel="‖mean bias gradient‖")
    right.set(title="Gradient through time", xlabel="steps back", ylabel="‖∂L/∂h₀‖")
    figure.savefig(path)
    print(f"\ndrawn into {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with MNIST's four IDX files")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--run-dir", help="train ten sigmoid layers as well, which hardly learn, and keep the run here")
    parser.add_argument("--figure", default="vanishing.svg", help="what to draw the tables into: .svg or .png")
    args = parser.parse_args()
    comm = dp.world()
    say = print if comm.rank == 0 else lambda text: None
    images = data.load_mnist(args.root)[0].take(np.arange(args.images))

    say("Vanishing: ‖mean bias gradient‖ of each hidden layer, the first one first")
    kaiming = {"activation": nn.ReLU, "init": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu")}
    models = {
        **{f"{hidden} hidden, sigmoid": network(hidden) for hidden in (1, 2, 3, 4)},
        "4, sigmoid, Xavier": network(4, init=nn.init.xavier_normal_),
        "4, ReLU": network(4, activation=nn.ReLU),
        "4, ReLU, LeCun": network(4, activation=nn.ReLU, init=nn.init.lecun_normal_),
        "4, ReLU, Kaiming": network(4, **kaiming),
        "4, sigmoid, short cuts": network(4, residual=True),
        "4, sigmoid, layer norm": network(4, normalise=True),
        "4, ReLU, Kaiming, layer norm, short cuts": network(4, **kaiming, normalise=True, residual=True),
    }
    speeds = {name: hidden_speeds(model, images, comm) for name, model in models.items()}
    speeds["4, sigmoid, clipped to norm 0.1"] = hidden_speeds(network(4), images, comm, clip=0.1)
    for name, values in speeds.items():
        say(f"{name:<42}" + "  ".join(f"{speed:7.4f}" for speed in values))

    say("\nExploding: ‖∂L/∂h₀‖ of a recurrent network after so many steps")
    say(f"{'orthogonal weights scaled by':<42}" + "  ".join(f"{steps:7d}" for steps in LENGTHS))
    runs = {
        **{str(scale): partial(through_time, init=orthogonal(scale)) for scale in (0.8, 1.0, 1.5)},
        "1.5, clipped to norm 1": partial(through_time, init=orthogonal(1.5), clip=1.0),
        "0.8, LSTM": partial(through_time, init=orthogonal(0.8), layer=nn.LSTM),
        "0.8, layer norm": partial(through_normalised_time, init=orthogonal(0.8)),
        "1.5, layer norm": partial(through_normalised_time, init=orthogonal(1.5)),
        "Xavier instead": partial(through_time, init=nn.init.xavier_normal_),
        "Kaiming instead, ReLU": partial(through_time, init=kaiming["init"], nonlinearity="relu"),
    }
    norms = {name: [run(steps) for steps in LENGTHS] for name, run in runs.items()}
    for name, values in norms.items():
        say(f"{name:<42}" + "  ".join(f"{norm:7.3g}" for norm in values))
    if comm.rank == 0:
        draw(speeds, norms, args.figure)
    if args.run_dir:
        model = network(10)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        trainer = dp.Trainer(model, F.cross_entropy, optimizer, batch_size=50, comm=comm, run_dir=args.run_dir)
        trainer.fit(images, epochs=20)


if __name__ == "__main__":
    main()
