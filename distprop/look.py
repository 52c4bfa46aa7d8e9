"""What was seen of a network at one step, as a line of `metrics.jsonl` and as part of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ParameterHealth:
    """Numbers of one parameter; a norm that is not finite is that of a gradient that is not.

    Attributes:
        grad_norm: ‖∂L/∂w‖ of the mean gradient, before clipping.
        weight_norm: ‖w‖ before the update.
        update_ratio: ‖Δw‖ / ‖w‖; NaN where w is 0, as biases are at first.
        learning_speed: ‖∂L/∂b‖ of the bias of the same layer (Nielsen, chapter 5), if it has one.
        is_matrix: weights of two axes or more; no biases or scales, and no embedding, of which a batch uses some rows.
    """

    grad_norm: float
    weight_norm: float
    update_ratio: float = math.nan
    learning_speed: float | None = None
    is_matrix: bool = True


@dataclass(frozen=True)
class UnitsHealth:
    """Numbers of one activation.

    Attributes:
        kind: "ReLU", "Sigmoid" or "Tanh".
        saturated: the share of sigmoid's outputs within 0.01 of 0 or 1, or of tanh's within 0.01 of -1 or 1.
        silent: of a ReLU which units were 0 for every example of the global batch, `(units looked at,)`.
    """

    kind: str
    saturated: float | None = None
    silent: tuple[bool, ...] | None = None

    @property
    def dead(self) -> float | None:
        """The share of units that were silent."""
        return sum(self.silent) / len(self.silent) if self.silent else None


@dataclass(frozen=True)
class Favourite:
    """The class that is predicted most: its number, its share of the predictions and of the targets."""

    number: int
    predicted: float
    true: float


@dataclass(frozen=True)
class Look:
    """What was seen at one step; `loss` is the mean over the steps since the look before."""

    step: int
    loss: float
    lr: float
    examples: int
    parameters: Mapping[str, ParameterHealth]
    units: Mapping[str, UnitsHealth] = field(default_factory=dict)
    noise: tuple[float, float] | None = None  # estimates of tr(Σ), the variance of one example's gradient, and ‖G‖²
    noise_scale: float | None = None
    favourite: Favourite | None = None
    compute_seconds: tuple[float, ...] = ()  # by rank

    def line(self) -> dict[str, Any]:
        """For `metrics.jsonl`; what is not finite is null, and marked as bad where it is a gradient."""
        units = {
            name: {key: round(v, 4) for key in ("dead", "saturated") if (v := getattr(of_one, key)) is not None}
            for name, of_one in self.units.items()
        }
        line: dict[str, Any] = {
            "step": self.step,
            "health": {name: _as_json(of_one) for name, of_one in self.parameters.items()},
        }
        if units:
            line["units"] = units
        if self.noise_scale is not None:
            line["noise_scale"] = _rounded(self.noise_scale)
        if self.favourite is not None:
            favourite = self.favourite
            line["favourite"] = {"class": favourite.number, "predicted": favourite.predicted, "true": favourite.true}
        if self.compute_seconds:
            line["seconds"] = {"compute": [round(seconds, 6) for seconds in self.compute_seconds]}
        return line

    def state(self) -> dict[str, Any]:
        """As JSON can say it, for a checkpoint; `look_from` makes it a look again."""
        state = asdict(self)
        del state["compute_seconds"]  # of the ranks that there were
        for of_one in state["parameters"].values():
            of_one["update_ratio"] = None if math.isnan(of_one["update_ratio"]) else of_one["update_ratio"]
        for units in state["units"].values():
            units["silent"] = None if units["silent"] is None else "".join("01"[silent] for silent in units["silent"])
        return state


def look_from(state: Mapping[str, Any]) -> Look:
    """The look whose `state` this is."""
    parameters, units = state["parameters"], state["units"]
    return Look(
        **{
            **state,
            "parameters": {
                name: ParameterHealth(**{**of_one, "update_ratio": _number(of_one["update_ratio"])})
                for name, of_one in parameters.items()
            },
            "units": {
                name: UnitsHealth(of_one["kind"], of_one["saturated"], _silent(of_one["silent"]))
                for name, of_one in units.items()
            },
            "noise": tuple(state["noise"]) if state["noise"] is not None else None,
            "favourite": Favourite(**state["favourite"]) if state["favourite"] is not None else None,
        }
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _silent(text: str | None) -> tuple[bool, ...] | None:
    return None if text is None else tuple(digit == "1" for digit in text)


def _as_json(of_one: ParameterHealth) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "grad_norm": _rounded(of_one.grad_norm),
        "weight_norm": _rounded(of_one.weight_norm),
    }
    if not math.isnan(of_one.update_ratio):
        entry["update_ratio"] = _rounded(of_one.update_ratio)
    if of_one.learning_speed is not None:
        entry["learning_speed"] = _rounded(of_one.learning_speed)
    if not math.isfinite(of_one.grad_norm):
        entry["bad"] = True
    return entry


def _rounded(value: float) -> float | None:
    """Six digits, which keeps a line of 50 layers under 8 kB; None if JSON cannot say it."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
