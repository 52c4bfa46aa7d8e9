"""What `compare.py` prints: the figures of each network, whether both libraries trained the same, and the targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from networks import NETWORKS

SAME_LOSS = 1e-5  # largest relative difference of a loss in the first steps; float32 rounding gives up to about 1e-6

# For each target: how it reads, and for each network that has one the least or largest ratio.
THROUGHPUT_2 = {"mlp512": 3.5, "mlp2048": 2.4, "cnn": 1.4, "gpt": 2.0}
THROUGHPUT_1 = {"mlp512": 2.0, "mlp2048": 1.9, "cnn": 1.1, "gpt": 1.6}
OVER_PRODUCTS = {"mlp512": 1.25, "mlp2048": 1.25, "cnn": 2.0, "gpt": 1.5}
SCALING, MEMORY, REDUCTION, START, MNIST = 1.9, 0.5, 3.0, 0.4, 0.4

START_NETWORK = "mlp512"
STEPS, PRODUCTS = "steps_in_turns", "products_in_turns"  # seconds, one figure a round


def show(results: dict[str, Any]) -> str:
    """All tables as one text."""
    parts = [_conditions(results), _times(results), _agreement(results), _targets(results)]
    return "\n\n".join(part for part in parts if part)


def disagreements(results: dict[str, Any]) -> list[str]:
    """A line for each network that the libraries did not train alike."""
    return [
        f"{NETWORKS[name].title} on {ranks} ranks: losses of the first steps differ by {difference:.1e}, "
        f"{figures[f'distprop{ranks}']['losses']} in distprop, {figures[f'torch{ranks}']['losses']} in PyTorch"
        for name, figures in results["networks"].items()
        for ranks, difference in _differences(figures).items()
        if not difference <= SAME_LOSS
    ]


def _conditions(results: dict[str, Any]) -> str:
    known = dict(results.get("conditions", {}))
    figures = next(iter(results["networks"].values()), None)
    if figures:
        known |= {"distprop multiplies with": figures["distprop1"]["blas"]}
        known |= {"PyTorch": figures["torch1"]["torch"], "PyTorch multiplies with": figures["torch1"]["blas"]}
    known |= {"threads": "one a rank", "rounds": str(results.get("rounds", ""))}
    return "\n".join(f"{name + ':':<26}{value}" for name, value in known.items())


def _times(results: dict[str, Any]) -> str:
    header = ["ms a step", "PyTorch 1", "distprop 1", "ratio", "PyTorch 2", "distprop 2", "ratio", "2 over 1"]
    header += ["products 2 over 1", "compiled (compile s)", "products NumPy", "PyTorch", "step/products"]
    header += ["MB distprop", "PyTorch"]
    rows = []
    for name, figures in results["networks"].items():
        one, two = figures["distprop1"], figures["distprop2"]
        torch_one, torch_two = figures["torch1"], figures["torch2"]
        cells = [_ms(torch_one), _ms(one), f"{_ratio(torch_one, one):.2f}"]
        cells += [_ms(torch_two), _ms(two), f"{_ratio(torch_two, two):.2f}"]
        cells += [f"{2 * _ratio(one, two):.2f}", f"{2 * _ratio(one, two, PRODUCTS, PRODUCTS):.2f}"]
        cells += [_compiled(figures.get("compiled")), _ms(one, PRODUCTS), _ms(torch_one, PRODUCTS)]
        cells += [f"{_ratio(one, one, STEPS, PRODUCTS):.2f}"]
        cells += [f"{run['peak_bytes'] / 1e6:.0f}" for run in (two, torch_two)]
        rows.append([NETWORKS[name].title, *cells])
    options = [
        f"- PyTorch's choice for {NETWORKS[name].title}: "
        + ", ".join(f"{_options(figures[f'torch{ranks}'])} on {ranks} rank{'s' * (ranks > 1)}" for ranks in (1, 2))
        for name, figures in results["networks"].items()
    ]
    return "\n".join([_aligned([header, *rows]), "", *options]) if rows else ""


def _ms(figures: dict[str, Any], what: str = STEPS) -> str:
    return f"{1e3 * statistics.median(figures[what]):.2f}"


def _ratio(above: dict[str, Any], below: dict[str, Any], first: str = STEPS, second: str = STEPS) -> float:
    """The median over the rounds of how many times as long as `below` `above` took in the same round."""
    return statistics.median(a / b for a, b in zip(above[first], below[second], strict=True))


def _compiled(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "not measured"
    if "error" in figures:
        return figures["error"]
    return f"{_ms(figures)} ({figures['compile_seconds']:.0f} s)"


def _options(figures: dict[str, Any]) -> str:
    return " and ".join(name.replace("_", " ") for name, chosen in figures["variant"].items() if chosen) or "defaults"


def _agreement(results: dict[str, Any]) -> str:
    rows = [["largest difference of a loss in the first 5 steps", "1 rank", "2 ranks", ""]]
    for name, figures in results["networks"].items():
        found = _differences(figures)
        same = all(difference <= SAME_LOSS for difference in found.values())
        rows.append(
            [NETWORKS[name].title, *(f"{found[ranks]:.1e}" for ranks in (1, 2)), "same" if same else "DIFFERENT"]
        )
    return _aligned(rows) if len(rows) > 1 else ""


def _differences(figures: dict[str, Any]) -> dict[int, float]:
    """By the number of ranks, the largest relative difference of the libraries' losses."""
    found = {}
    for ranks in (1, 2):
        pairs = zip(figures[f"distprop{ranks}"]["losses"], figures[f"torch{ranks}"]["losses"], strict=True)
        found[ranks] = float(np.max([abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]))  # NaN if one is
    return found


@dataclass(frozen=True)
class Target:
    """A ratio that was wanted, of what, and what was measured.

    Attributes:
        products_alone: what it would be if distprop's step were its matrix products and nothing else.
    """

    title: str
    of: str
    wanted: float
    measured: float
    at_least: bool = True
    products_alone: float | None = None

    def row(self) -> list[str]:
        """For the table."""
        met = self.measured >= self.wanted if self.at_least else self.measured <= self.wanted
        alone = "" if self.products_alone is None else f"{self.products_alone:.2f}"
        wanted = f"{'>=' if self.at_least else '<='} {self.wanted}"
        return [self.title, self.of, wanted, f"{self.measured:.2f}", "met" if met else "missed", alone]


def _targets(results: dict[str, Any]) -> str:
    rows = [target.row() for target in _all_targets(results)]
    table = _aligned([["target", "", "wanted", "measured", "", "with products alone"], *rows]) if rows else ""
    if error := results.get("mnist", {}).get("error"):
        table += f"\n\nThe time to 98 % on MNIST is not measured: {error}"
    return table


def _all_targets(results: dict[str, Any]) -> Iterator[Target]:
    networks = results["networks"]
    for ranks, title, wanted in (
        (2, "throughput of 2 ranks over PyTorch DDP", THROUGHPUT_2),
        (1, "throughput of 1 process over PyTorch", THROUGHPUT_1),
    ):
        for name, of in networks.items():
            theirs, ours = of[f"torch{ranks}"], of[f"distprop{ranks}"]
            alone = _ratio(theirs, ours, STEPS, PRODUCTS)
            yield Target(title, name, wanted[name], _ratio(theirs, ours), products_alone=alone)
    for name, of in networks.items():
        one, two = of["distprop1"], of["distprop2"]
        alone = 2 * _ratio(one, two, PRODUCTS, PRODUCTS)
        yield Target("samples/s of 2 ranks over 1", name, SCALING, 2 * _ratio(one, two), products_alone=alone)
    for name, of in networks.items():
        measured = _ratio(of["distprop1"], of["distprop1"], STEPS, PRODUCTS)
        yield Target("step over products alone", name, OVER_PRODUCTS[name], measured, at_least=False)
    for row in results.get("allreduce", []):
        measured = row["library_seconds"] / row["seconds"]
        yield Target("reduction, library's time over ours", f"{row['bytes'] / 1e6:g} MB", REDUCTION, measured)
    for name, of in networks.items():
        measured = of["distprop2"]["peak_bytes"] / of["torch2"]["peak_bytes"]
        yield Target("peak memory of a rank over PyTorch's", name, MEMORY, measured, at_least=False)
    if START_NETWORK in networks:
        ours, theirs = (networks[START_NETWORK][key]["first_step_seconds"] for key in ("distprop2", "torch2"))
        yield Target("command to first step over torchrun's", START_NETWORK, START, ours / theirs, at_least=False)
    mnist = results.get("mnist", {})
    if "torch" in mnist:
        reached = all(mnist[library]["reached"] for library in ("torch", "distprop"))
        measured = mnist["distprop"]["seconds"] / mnist["torch"]["seconds"] if reached else math.inf
        yield Target("time to 98 % on MNIST over DDP's", "mlp512", MNIST, measured, at_least=False)


def _aligned(rows: list[list[str]]) -> str:
    """A Markdown table whose columns stand below one another."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(first: str, *others: str) -> str:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        return f"| {' | '.join([first.ljust(widths[0]), *right])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(*rows[0]), f"|{rule}|", *(line(*row) for row in rows[1:])])
