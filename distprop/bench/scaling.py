"""How the time of a step grows with the model, the batch, the depth, the ranks and the dataset.

Cost must grow linearly: in a doubly logarithmic picture the slope is at most 1, with `SLOPE_LIMIT` leaving room for
memory that no longer fits a cache. Each part is one table with its verdict below.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distprop import functional as F
from distprop import nn, optim
from distprop.bench.step import LR, relu_network
from distprop.bench.workload import network
from distprop.comm import world
from distprop.data import ArrayDataset, Loader
from distprop.launch import allowed_cores, plan
from distprop.parallel import DataParallel
from distprop.tape import Array

SLOPE_LIMIT = 1.1
LAYER_LIMIT = 10e-6  # seconds of Python that a layer may cost, forward, backward and update
FLAT_SHARE = 0.02  # of a dataset's file: so much private memory may grow, for the shuffled order of its rows
SAME_RESULT = 1e-12  # relative, in float64


@dataclass(frozen=True)
class Part:
    """A finished part: its table and what it shows. `met` is whether what was promised holds."""

    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdict: str
    met: bool
    figures: Any


def model_size(quick: bool = False) -> Part:
    """Time against the number of parameters, 10⁴ to 10⁸: four square layers, 32 rows."""
    sizes = [10**power for power in range(4, 6 if quick else 9)]
    points = []
    for size in sizes:
        width = round(math.sqrt(size / 4))
        points.append((4 * width * width, _step_seconds([width] * 5, rows=32, seconds_allowed=2.0)))
    rows = [[f"{count:,}", f"{s * 1e3:.3f}", f"{s / count * 1e9:.3f}"] for count, s in points]
    header = ["parameters", "ms a step", "ns a parameter"]
    return _linear("model", header, rows, points[-3:], "parameters", quick)


def batch_size(quick: bool = False) -> Part:
    """Time against the rows of a batch, 784-512-512-10."""
    sizes = [16 << i for i in range(3 if quick else 9)]
    points = [(size, _step_seconds([784, 512, 512, 10], size, seconds_allowed=1.0)) for size in sizes]
    rows = [[str(size), f"{s * 1e3:.3f}", f"{s / size * 1e6:.2f}"] for size, s in points]
    return _linear("batch", ["rows", "ms a step", "µs a row"], rows, points[-4:], "rows", quick)


def depth(quick: bool = False) -> Part:
    """Python's share of a layer: time against depth with tiny matrices, less the same products in plain NumPy."""
    counts = (10, 50) if quick else (100, 300, 1000)
    steps = 5 if quick else 60
    rows, worst, steepest = [], 0.0, 0.0
    layers: dict[str, list[Callable[[], nn.Module]]] = {
        "Linear": [_tiny_linear],
        "Linear, ReLU": [_tiny_linear, nn.ReLU],
    }
    for name, layer in layers.items():
        seconds = [_depth_seconds(layer, count, steps) for count in counts]
        more = (counts[-1] - counts[0]) * len(layer)
        grown, products = ((seconds[-1][i] - seconds[0][i]) / more for i in range(2))
        worst = max(worst, grown - products)
        steepest = max(steepest, slope([(count, ours) for count, (ours, _) in zip(counts, seconds, strict=True)]))
        figures = (grown, products, grown - products)
        rows.append([name, *(f"{ours * 1e3:.3f}" for ours, _ in seconds), *(f"{s * 1e6:.2f}" for s in figures)])
    header = ["layers", *(f"{count}: ms" for count in counts), "µs a layer", "its products", "overhead µs"]
    verdict = (
        f"time grows with layers to the power {steepest:.2f}; wanted <= {SLOPE_LIMIT}; at most {worst * 1e6:.1f} µs of "
        f"overhead a layer; wanted under {LAYER_LIMIT * 1e6:.0f}"
    )
    met = worst < LAYER_LIMIT and (quick or steepest <= SLOPE_LIMIT)
    return Part("depth", header, rows, verdict, met, worst)


def ranks(quick: bool = False) -> Part:
    """Time and result on 1, 2, 4, 8 ranks, the batch of a rank kept; more ranks than cores are for the result only."""
    cores, steps = allowed_cores(), 5 if quick else 100
    rows, reference, first_rate, met = [], None, 0.0, True
    figures = []
    for size in (1, 2) if quick else (1, 2, 4, 8):
        answer = _run_ranks(size, batch=128, steps=steps)
        result = np.array(answer["result"])
        reference = result if reference is None else reference
        difference = float(np.abs(result - reference).max() / np.abs(reference).max())
        rate = 128 * size / answer["seconds"]
        first_rate = first_rate or rate
        met = met and difference <= SAME_RESULT
        growth = f"{rate / first_rate:.2f}" if size <= cores else "more ranks than cores"
        rows.append([str(size), f"{answer['seconds'] * 1e3:.3f}", f"{rate:,.0f}", growth, f"{difference:.1e}"])
        figures.append({"ranks": size, "seconds": answer["seconds"], "difference": difference})
    header = ["ranks", "ms a step", "samples/s", "times one rank", "difference of parameters"]
    verdict = f"{'the' if met else 'NOT the'} same parameters on every number of ranks, to {SAME_RESULT:.0e} in float64"
    return Part("ranks", header, rows, verdict, met, figures)


def dataset_size(quick: bool = False) -> Part:
    """Time and private memory against the size of a memory-mapped file, up to more than a core's share of the memory.

    The file is sparse: it takes no room on the disk, and reading it takes room in the system's page cache only.
    """
    share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // allowed_cores()
    largest = 1 << 26 if quick else share * 11 // 10
    sizes = [largest >> shift for shift in ((2, 0) if quick else (9, 6, 3, 0))]
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            points.append((size, *_dataset_step(Path(folder, "x"), size, steps=20 if quick else 300)))
    rows = [[f"{size / 1e6:,.0f}", f"{s * 1e3:.3f}", f"{memory / 1e6:.1f}"] for size, s, memory in points]
    grown = points[-1][2] - points[0][2]
    met = grown <= FLAT_SHARE * points[-1][0]
    verdict = (
        f"private memory grew by {grown / 1e6:.0f} MB while the file grew by {(sizes[-1] - sizes[0]) / 1e6:,.0f} MB to "
        f"{sizes[-1] / share:.2f} of a core's share of the memory; wanted under {FLAT_SHARE:.0%} of the file"
    )
    return Part("dataset", ["MB of file", "ms a step", "private MB"], rows, verdict, met, grown)


PARTS: dict[str, Callable[[bool], Part]] = {
    "model": model_size,
    "batch": batch_size,
    "depth": depth,
    "ranks": ranks,
    "dataset": dataset_size,
}


def show(part: Part) -> str:
    """The part's table and verdict."""
    widths = [max(len(row[i]) for row in [part.header, *part.rows]) for i in range(len(part.header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in [part.header, *part.rows]]
    return "\n".join([*lines, f"{part.name}: {part.verdict}: {'met' if part.met else 'MISSED'}"])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through (log x, log y) with least squares."""
    x, y = np.log(np.array(points, np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def _linear(
    name: str, header: list[str], rows: list[list[str]], points: list[tuple[int, float]], what: str, quick: bool
) -> Part:
    """The verdict over the largest points, where the fixed cost of a step no longer hides the growth."""
    found = slope(points)
    verdict = f"time grows with {what} to the power {found:.2f} from {points[0][0]:,} on; wanted <= {SLOPE_LIMIT}"
    return Part(name, header, rows, verdict, quick or found <= SLOPE_LIMIT, found)


def _step_seconds(widths: Sequence[int], rows: int, seconds_allowed: float) -> float:
    """Median seconds of a training step of a ReLU network; at least 3, at most 200, or as many as the time allows."""
    step = network(widths).step(world(), rows)
    times: list[float] = []
    while len(times) < 5 or (len(times) < 200 and sum(times) < seconds_allowed):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])  # the first two warm up


_TINY = 4  # rows and width of the matrices whose products should cost nothing


def _tiny_linear() -> nn.Linear:
    layer = nn.Linear(_TINY, _TINY)
    layer.weight.data[...] = np.eye(_TINY)  # so that numbers keep their size through a thousand layers
    return layer


def _depth_seconds(layers: Sequence[Callable[[], nn.Module]], count: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step with `count` times these layers, and of their products and maxima in plain NumPy."""
    model = nn.Sequential(*(layer() for _ in range(count) for layer in layers))
    parallel = DataParallel(model, verify_every=0)
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    x = np.ones((_TINY, _TINY), np.float32)
    weights, grads = np.stack([np.eye(_TINY, dtype=np.float32)] * count), np.empty((count, _TINY, _TINY), np.float32)
    times, plain = [], []
    for _ in range(steps + 2):
        began = time.perf_counter()
        optimizer.zero_grad()
        parallel(x).mean().backward()
        optimizer.step()
        middle = time.perf_counter()
        _plain_step(x, weights, grads, relu=len(layers) > 1)
        times.append(middle - began)
        plain.append(time.perf_counter() - middle)
    return statistics.median(times[2:]), statistics.median(plain[2:])


def _plain_step(x: Array, weights: Array, grads: Array, relu: bool) -> None:
    """Forward and backward through square layers as short as NumPy can say it."""
    inputs = [x]
    for weight in weights:
        y = inputs[-1] @ weight.T
        inputs.append(np.maximum(y, 0, out=y) if relu else y)
    g = inputs.pop()
    for i in range(len(weights) - 1, -1, -1):
        np.matmul(g.T, inputs[i], out=grads[i])
        g = g @ weights[i]
        if relu:
            g *= inputs[i] > 0


def _run_ranks(size: int, batch: int, steps: int) -> dict[str, Any]:
    job = plan(size, ["distprop.bench.ranks", str(batch), str(steps)], module=True)
    answer = subprocess.run(
        job.command,
        env={**os.environ, **job.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if answer.returncode:
        raise RuntimeError(f"{size} ranks failed:\n{answer.stderr}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def _dataset_step(path: Path, size_bytes: int, steps: int) -> tuple[float, float]:
    """Median seconds of loading a shuffled batch and training on it, and the private memory meanwhile, in bytes."""
    rows = size_bytes // (4 * 784)
    with path.open("wb") as file:
        file.truncate(rows * 4 * 784)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        memory.madvise(mmap.MADV_RANDOM)  # else Linux reads 128 kB for every row of 3: 2.7 ms a step instead of 0.4
    x = np.frombuffer(memory, np.float32).reshape(rows, 784)
    labels = np.broadcast_to(np.int64(3), rows)  # no memory either
    model = relu_network([784, 64, 10])
    parallel = DataParallel(model)
    optimizer = optim.SGD(model.parameters(), lr=LR)
    times: list[float] = []
    began = time.perf_counter()
    for images, digits in Loader(ArrayDataset(x, labels), batch_size=128):
        optimizer.zero_grad()
        F.cross_entropy(parallel(images), digits).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
        private = _private_bytes()  # after the loop the epoch's order and the dataset are gone
        if len(times) > steps:
            break
        began = time.perf_counter()
    return statistics.median(times[1:]), private


def _private_bytes() -> int:
    """Memory of this process that is in no file: Linux' RssAnon; elsewhere 0."""
    try:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0
