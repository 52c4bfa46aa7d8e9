"""The four networks that `compare.py` trains, each in both libraries, with one start and one stream of data.

Neither library is imported before its own model is asked for, so that a worker's memory and start are its own.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHARACTERS, CONTEXT, WIDTH, HEADS, LAYERS = 65, 64, 128, 4, 4  # nanoGPT's configuration for a CPU
LR, MOMENTUM = 0.01, 0.9  # of SGD
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
BATCHES = 8  # that come round again


@dataclass(frozen=True)
class Product:
    """A layer's matrix products: y = x Wᵀ, dW = gᵀ x and, if `dx`, dx = g W; x is (rows, inputs), W (outputs, inputs).

    With `copies` there are so many of each in a batch, as attention has for every head of every sequence.
    """

    rows: int
    inputs: int
    outputs: int
    dx: bool = True
    copies: int = 1


@dataclass(frozen=True)
class Network:
    """What is trained: `batch` examples a rank, `steps` in a turn; SGD with momentum, or AdamW and clipping."""

    title: str
    batch: int
    steps: int
    products: Sequence[Product]
    widths: Sequence[int] = ()  # of fully connected layers
    adamw: bool = False
    clip_norm: float | None = None
    images: bool = False  # whether the memory order of images is a choice


def _mlp(*widths: int, steps: int) -> Network:
    products = [Product(128, a, b, dx=i > 0) for i, (a, b) in enumerate(itertools.pairwise(widths))]
    return Network("MLP " + "-".join(map(str, widths)), 128, steps, products, widths)


def _gpt() -> Network:
    tokens, heads, head = 12 * CONTEXT, 12 * HEADS, WIDTH // HEADS
    block = [
        Product(tokens, WIDTH, 3 * WIDTH),
        Product(CONTEXT, head, CONTEXT, copies=heads),  # scores
        Product(CONTEXT, CONTEXT, head, copies=heads),  # mixtures
        Product(tokens, WIDTH, WIDTH),
        Product(tokens, WIDTH, 4 * WIDTH),
        Product(tokens, 4 * WIDTH, WIDTH),
    ]
    products = [*block * LAYERS, Product(tokens, WIDTH, CHARACTERS)]
    return Network("nanoGPT's CPU model", 12, 6, products, adamw=True, clip_norm=1.0)


NETWORKS = {
    "mlp512": _mlp(784, 512, 512, 10, steps=40),
    "mlp2048": _mlp(784, 2048, 2048, 10, steps=6),
    "cnn": Network(
        "CNN, 3x3 conv 32 and 64, fc 128",
        64,
        10,
        [  # the convolutions as products with all 3x3 windows
            Product(64 * 28 * 28, 9, 32, dx=False),
            Product(64 * 14 * 14, 9 * 32, 64),
            Product(64, 64 * 49, 128),
            Product(64, 128, 10),
        ],
        images=True,
    ),
    "gpt": _gpt(),
}


def batches(name: str, rank: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`BATCHES` batches of noise, made when they are first asked for, then the same again without end."""
    network, rng = NETWORKS[name], np.random.default_rng(rank)
    kept = []
    for _ in range(BATCHES):
        if name == "gpt":
            x, y = rng.integers(0, CHARACTERS, (2, network.batch, CONTEXT))
        else:
            shape = (1, 28, 28) if network.images else (784,)
            x = rng.normal(size=(network.batch, *shape)).astype(np.float32)
            y = rng.integers(0, 10, network.batch)
        kept.append((x, y))
        yield x, y
    yield from itertools.cycle(kept)


def initial_state(name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The start of both libraries: weights from one generator in the order of their names, biases 0, norms 1."""
    rng, state = np.random.default_rng(0), {}
    for parameter, shape in sorted(shapes.items()):
        if len(shape) == 1:
            state[parameter] = np.full(shape, float("norm" in parameter), np.float32)
        else:
            std = 0.02 if name == "gpt" else math.sqrt(2 / math.prod(shape[1:]))
            state[parameter] = rng.normal(0, std, shape).astype(np.float32)
    return state


# The models in distprop, and the same in PyTorch: names of parameters are equal. ReLU stands after the pooling, where
# it gives the same for less.


def distprop_model(name: str) -> Any:
    """The network as a `distprop.nn.Module`; nanoGPT's is that of examples/char_gpt.py."""
    from distprop import nn

    if name == "gpt":
        sys.path.append(str(Path(__file__).parent.parent / "examples"))
        from char_gpt import GPT

        return GPT(CHARACTERS, CONTEXT)
    return nn.Sequential(*(_cnn(nn) if name == "cnn" else _layers(nn, NETWORKS[name].widths)))


def torch_model(name: str) -> Any:
    """The network as a `torch.nn.Module`."""
    import torch

    if name == "gpt":
        return _torch_gpt()
    return torch.nn.Sequential(*(_cnn(torch.nn) if name == "cnn" else _layers(torch.nn, NETWORKS[name].widths)))


def _layers(nn: Any, widths: Sequence[int]) -> list[Any]:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return layers[:-1]


def _cnn(nn: Any) -> list[Any]:
    return [
        nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    ]  # fmt: skip


def _torch_gpt() -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.attention = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.projection = nn.Linear(WIDTH, WIDTH, bias=False)
            self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: Any) -> Any:
            B, T, C = x.shape
            q, k, v = (part.view(B, T, HEADS, -1).transpose(1, 2) for part in self.attention(self.norm1(x)).chunk(3, 2))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, C/heads)
            x = x + self.projection(mixed.transpose(1, 2).reshape(B, T, C))
            return x + self.narrow(F.gelu(self.widen(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.position = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
            self.norm = nn.LayerNorm(WIDTH, bias=False)

        def forward(self, ids: Any) -> Any:
            x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
            return F.linear(self.norm(self.blocks(x)), self.token.weight)  # (B, T, characters)

    return GPT()
