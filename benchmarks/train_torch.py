"""A worker of `compare.py`: trains in PyTorch, on one process or under torchrun. JSON comes in and goes out."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn import functional as F

from measure import Product, operands, take_turns, train_mnist
from networks import ADAMW, LR, MOMENTUM, NETWORKS, batches, initial_state, torch_model


class TorchTraining:
    """The usual loop; `channels_last`, `fused`, `bucket_view` and `compile` are what a user may switch on."""

    def __init__(
        self,
        name: str,
        channels_last: bool = False,
        fused: bool = False,
        bucket_view: bool = False,
        compile: bool = False,
    ) -> None:
        self.network = NETWORKS[name]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        model = torch_model(name)
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        model.load_state_dict({key: torch.from_numpy(a) for key, a in initial_state(name, shapes).items()})
        self.model = model.to(memory_format=self.memory_format)
        if self.network.adamw:
            matrices = [p for p in self.model.parameters() if p.ndim >= 2]
            vectors = [p for p in self.model.parameters() if p.ndim < 2]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            self.optimizer: Any = torch.optim.AdamW(groups, **ADAMW, fused=fused or None)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, fused=fused or None)
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.forward: Any = torch.compile(self.model) if compile else self.model
        if self.size > 1:
            distributed.init_process_group("gloo")
            self.forward = torch.nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=bucket_view)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """One update."""
        scores = self.forward(x)
        loss = F.cross_entropy(scores.view(-1, scores.shape[-1]), y.view(-1))
        self.optimizer.zero_grad()
        loss.backward()
        if self.network.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.network.clip_norm)
        self.optimizer.step()
        return loss.item()

    def convert(self, x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Tensors that share the arrays' memory, but for images in another order."""
        images = torch.from_numpy(x)
        return images.to(memory_format=self.memory_format) if x.ndim == 4 else images, torch.from_numpy(y)

    def gather(self, value: float) -> list[float]:
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values = torch.zeros(self.size, dtype=torch.float64)
        values[self.rank] = value
        distributed.all_reduce(values)
        return values.tolist()

    def count_right(self, x: torch.Tensor, y: torch.Tensor) -> int:
        """How many of these images are recognised."""
        with torch.no_grad():
            return int((self.model(x).argmax(1) == y).sum())


def products(product: Product) -> Callable[[], None]:
    """PyTorch's matmul, each result into memory that is there."""
    x, w, g, y, dw, dx = map(torch.from_numpy, operands(product))
    wt, gt = w.transpose(-1, -2), g.transpose(-1, -2)

    def run() -> None:
        torch.matmul(x, wt, out=y)
        torch.matmul(gt, x, out=dw)
        if product.dx:
            torch.matmul(g, w, out=dx)

    return run


def mnist(training: TorchTraining, epochs: int, seed: int) -> dict[str, Any]:
    """MNIST's files as arrays, pixels from 0 to 1."""
    folder = Path(os.environ["DISTPROP_DATA"], "mnist")
    arrays = []
    for part in ("train", "t10k"):
        images = np.frombuffer(
            gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16
        )
        labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
        arrays += [images.reshape(-1, 784).astype(np.float32) / 255, labels.astype(np.int64)]

    def set_lr(lr: float) -> None:
        for group in training.optimizer.param_groups:
            group["lr"] = lr

    return train_mnist(training, arrays, set_lr, training.count_right, epochs, seed)


def compile_seconds(training: TorchTraining, name: str) -> float:
    """How long the first step of a compiled model takes, all else being loaded."""
    x, y = training.convert(*next(batches(name, 0)))
    began = time.perf_counter()
    training.step(x, y)
    return time.perf_counter() - began


def blas_description() -> str:
    """Which BLAS PyTorch was built with, its vector instructions and the threads."""
    match = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
    blas = f"MKL {match[1]}" if match else "not MKL"
    return f"{blas}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread"


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    training = TorchTraining(job["network"], **job.get("variant", {"bucket_view": True, "fused": True}))
    if "epochs" in job:
        answer = mnist(training, job["epochs"], job["seed"])
        if training.rank == 0:
            print(json.dumps(answer))
    else:
        about = {"blas": blas_description(), "torch": torch.__version__}
        if job["variant"].get("compile"):
            about["compile_seconds"] = compile_seconds(training, job["network"])
        take_turns(training, job["network"], products, lambda: about)
    if training.size > 1:  # gloo at times never returns from destroy_process_group, nor from the interpreter's end
        distributed.barrier()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
