"""From the numbers of `health` to words: what is wrong with a training, in which layer, and what to try.

Each rule is a function of what has been seen so far and nothing else, so all ranks say the same. A rule speaks when its
sign has lasted for a few looks, since one batch shows anything. Every threshold stands here with its reason; the tests
hold each against a network built to have the fault, and all of them against healthy ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from distprop.look import Look, ParameterHealth

KEPT = 8  # looks
FEW = 32  # examples, in all of a rule's looks: of so few a unit may be silent, or a class not predicted, by chance

# Vanishing. Nielsen's sigmoid networks have learning speeds in ratios of 5, 24 and 95 at 2, 3 and 4 hidden layers.
VANISHING_SPEED = 30.0
# ... and so much less ‖gradient‖/‖weight‖: a bias before batch norm has no gradient at all, and needs none.
VANISHING_RATE = 10.0
VANISHING_RATE_ALONE = 300.0  # of layers without biases
EQUALISED = 0.3  # of the other's update ratio: Adam makes the updates of a layer with small gradients like the others'

# Exploding. ‖gradient‖/‖weight‖ of most layers; healthy networks begin with 0.01 to 10. Of most, since with ReLU the
# product of weight and gradient is the same for all layers. Weights that begin at 0 do not count at first: after k
# steps they are no more than k updates, and so the rate is about 1/(k × learning rate).
EXPLODING_RATE = 1000.0
EXPLODING_GROWTH = 100.0  # times the median norm of the looks before ...
EXPLODING_FIRST = 10.0  # ... and times the first norms: a trained network has small gradients, with outliers

# Units. Up to 40 % are dead in networks that learn well, and half of tanh's outputs are saturated in trained ones.
DEAD_SHARE = 0.5
SATURATED_SHARE = 0.8

# Plateau. The mean loss of so many steps fell by less than a share, from one that is not far below the first: a network
# that has converged stands still lower down.
STILL_STEPS = 200
STILL_FALL = 0.005
STILL_HIGH = 0.75

# Learning rate, by ‖Δw‖/‖w‖: 0.001 is usual, 0.3 is met in the first steps of Adam, 0.1 at its eighth.
SETTLED = 8  # steps
HIGH_RATIO = 0.1
RISING_RATIO = 0.02  # if the loss has risen, too
RISEN = 1.2  # times the first loss; single steps of small batches differ by 10 %
JUMPED = 2.0  # times the first loss, at one look with large updates
LARGE_RATIO = 1.0  # of any layer
LOW_RATIO = 1e-5
LOW_RATE = 0.01  # ‖gradient‖/‖weight‖; healthy networks begin with more, and one that has learnt comes below it
LOW_FALL = 0.02  # of the loss since the beginning, less is hardly any

# Class collapse. So many of the predictions are one class, and not even so many of the targets, over so many steps: a
# network that begins to learn slowly predicts one class for fifty.
COLLAPSED_STEPS = 100
COLLAPSED = 0.99
COLLAPSED_TRUE = 0.8


@dataclass
class History:
    """What has been seen.

    Attributes:
        looks: the last KEPT that are judged, the newest last.
        losses: (step, mean loss since the look before) of the last steps, as many as `plateau` needs.
        first_loss: that of the first look.
        first_norm: the largest gradient norm of the first three looks.
        clipped: gradients are clipped, so large ones do no harm.
    """

    looks: list[Look] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    first_loss: float = math.nan
    first_norm: float = 0.0
    number: int = 0  # of looks so far
    clipped: bool = False

    def add(self, look: Look, judged: bool = True) -> None:
        """One more look; of one that is not `judged` only the loss is kept."""
        if judged:
            self.looks = [*self.looks[1 - KEPT :], look]
        if not math.isfinite(look.loss):
            return
        if not self.number:
            self.first_loss = look.loss
        if self.number < 3:
            self.first_norm = max(self.first_norm, gradient_norm(look))
        self.number += 1
        self.losses = [(at, loss) for at, loss in self.losses if at > look.step - 2 * STILL_STEPS]
        self.losses.append((look.step, look.loss))

    def last(self, number: int) -> Sequence[Look]:
        """The newest `number` looks, or none if there are fewer."""
        return self.looks[-number:] if len(self.looks) >= number else ()

    @property
    def remains(self) -> float:
        """The newest loss as a share of the first."""
        return self.losses[-1][1] / self.first_loss if self.losses and self.first_loss > 0 else 1.0


@dataclass(frozen=True)
class Finding:
    """What a rule has found in the newest look."""

    layer: str
    text: str
    severity: float = 1.0


Rule: TypeAlias = Callable[[History], Finding | None]


def judge(history: History) -> dict[str, Finding]:
    """What every rule finds, by kind."""
    found = {kind: finding for kind, rule in RULES.items() if (finding := rule(history)) is not None}
    if "vanishing" in found or "dead" in found:
        found.pop("lr-low", None)  # the same small updates, for another reason
    return found


def advice_about_ranks(noise_scale: float, batch_size: float) -> str:
    """Whether more ranks would help, by McCandlish et al., 2018: far below the noise scale, twice the batch halves the
    steps; far above it, it saves none.

    >>> advice_about_ranks(5000, 128)
    'The batch of 128 is far below the gradient noise scale of about 5,000 examples: more ranks, with a larger global \
batch, would save steps almost in proportion.'
    """
    size, scale = f"{batch_size:,.0f}", f"about {noise_scale:,.0f} examples"
    if batch_size * 4 < noise_scale:
        return (
            f"The batch of {size} is far below the gradient noise scale of {scale}: more ranks, with a larger global "
            "batch, would save steps almost in proportion."
        )
    if batch_size > 4 * noise_scale:
        return (
            f"The batch of {size} is far above the gradient noise scale of {scale}: a larger one would save hardly any "
            "steps, and more ranks help only by sharing this batch."
        )
    return (
        f"The batch of {size} is near the gradient noise scale of {scale}: more ranks with a larger global batch would "
        "save some steps, but fewer than in proportion."
    )


def gradient_norm(look: Look) -> float:
    """The norm of all gradients together."""
    return math.sqrt(sum(of_one.grad_norm**2 for of_one in look.parameters.values()))


# --- rules


def non_finite(history: History) -> Finding | None:
    """A gradient, or the loss, is NaN or infinite; the step was not made."""
    look = history.looks[-1]
    if math.isfinite(look.loss):
        return None
    bad = [name for name, of_one in look.parameters.items() if not math.isfinite(of_one.grad_norm)]
    remedy = "try a lower learning rate, clip_norm=1.0, and look at the data"
    if not bad:
        return Finding("", f"the loss is not finite; {remedy}")
    if len(bad) == len(look.parameters):  # as a loss that is NaN makes them; the first layer is none the worse
        return Finding("", f"no gradient is finite, so `distprop replay` has to find where it began; {remedy}")
    layer, before = bad[0], ""
    if len(history.looks) > 1:
        earlier = history.looks[-2]
        before = f"; at step {earlier.step:,} its norm was {_short(earlier.parameters[layer].grad_norm)}"
    return Finding(layer, f"the gradient of `{layer}` is not finite{before}; {remedy}")


def vanishing(history: History) -> Finding | None:
    """A layer learns far more slowly than one behind it, three looks in a row."""
    at_zero = _began_at_zero(history)  # the layers before one of zeros have no gradient until it has grown
    found = [pair for look in history.last(3) if (pair := _slowest(look, at_zero)) is not None]
    if len(found) < 3:
        return None
    slow, fast, times = found[-1]
    curved = [units for units in history.looks[-1].units.values() if units.saturated is not None]
    worst = max(curved, key=lambda units: units.saturated or 0.0, default=None)
    seen = ""
    if worst is not None and (worst.saturated or 0) > 0.5:
        seen = f"; {worst.kind.lower()} units saturated {_percent(worst.saturated)}"
    remedy = "Kaiming initialisation, normalisation or short cuts"
    if curved:
        remedy = "ReLU or Xavier initialisation" if seen else "ReLU or short cuts"
    text = f"gradients vanish: `{slow}` learns {times:,.0f} times slower than `{fast}`{seen}; try {remedy}"
    return Finding(slow, text, times)


def exploding(history: History) -> Finding | None:
    """Gradients are far beyond the weights, or have grown far beyond what they were."""
    if history.clipped or not history.looks or not math.isfinite(now := gradient_norm(history.looks[-1])):
        return None
    look = history.looks[-1]
    remedy = "try clip_norm=1.0, a smaller initialisation, normalisation or a lower learning rate"
    at_zero = _began_at_zero(history)
    rates = {name: rate for name, rate in _rates(look).items() if name not in at_zero}
    if rates and (middle := _median(list(rates.values()))) > EXPLODING_RATE:
        layer = max(rates, key=rates.__getitem__)
        text = f"most are over {_short(middle)} times their weights, that of `{layer}` is {_short(rates[layer])} times"
        return Finding(layer, f"gradients explode: {text}; {remedy}", middle)
    usual = _median([gradient_norm(earlier) for earlier in history.looks[:-1]]) if len(history.looks) > 3 else math.inf
    if 0 < EXPLODING_GROWTH * usual < now and now > EXPLODING_FIRST * history.first_norm:
        layer = max(look.parameters, key=lambda name: look.parameters[name].grad_norm)
        text = f"their norm is {_short(now)}, {_short(now / usual)} times the usual, most of it in `{layer}`"
        return Finding(layer, f"gradients explode: {text}; {remedy}", now / usual)
    return None


def dead(history: History) -> Finding | None:
    """Many ReLU units of a layer gave 0 for every example of four looks."""
    looks = history.last(4)
    if (examples := _examples(looks)) < FEW:
        return None
    shares: dict[str, float] = {}
    for name in looks[-1].units:
        silent = [units.silent for look in looks if (units := look.units.get(name)) and units.silent]
        if len(silent) == len(looks) and len({len(of_one) for of_one in silent}) == 1:
            always = [all(of_unit) for of_unit in zip(*silent, strict=True)]
            shares[name] = sum(always) / len(always)
    layer = max(shares, key=shares.__getitem__, default="")
    if not shares or shares[layer] < DEAD_SHARE:
        return None
    text = f"{_percent(shares[layer])} of the units of `{layer}` gave 0 for all of {examples:,} examples"
    remedy = "try a lower learning rate, Kaiming initialisation with biases at 0, or LeakyReLU"
    return Finding(layer, f"dead ReLUs: {text}; {remedy}")


def saturated(history: History) -> Finding | None:
    """Most outputs of a hidden sigmoid or tanh are at its ends, three looks in a row."""
    looks = history.last(3)
    for name in looks[-1].units if looks else ():
        seen = [units for look in looks if (units := look.units.get(name)) is not None]
        if len(seen) == 3 and all((units.saturated or 0) > SATURATED_SHARE for units in seen):
            text = (
                f"{_percent(seen[-1].saturated)} of the {seen[-1].kind.lower()} outputs of `{name}` are at their ends"
            )
            remedy = "try Xavier initialisation, inputs of mean 0 and variance 1, normalisation or ReLU"
            return Finding(name, f"saturated: {text}, where the derivative is almost 0; {remedy}")
    return None


def plateau(history: History) -> Finding | None:
    """The mean loss of 200 steps is that of the 200 before, and not far below the first."""
    step = history.looks[-1].step if history.looks else 0
    if step < 2 * STILL_STEPS or history.remains < STILL_HIGH or _lr_falls(history):
        return None
    late = [loss for at, loss in history.losses if at > step - STILL_STEPS]
    early = [loss for at, loss in history.losses if step - 2 * STILL_STEPS < at <= step - STILL_STEPS]
    if not early or not late:
        return None
    before, now = sum(early) / len(early), sum(late) / len(late)
    if not before * (1 - STILL_FALL) < now < before * (1 + 10 * STILL_FALL):
        return None
    text = f"the loss has stood at {now:.4g} for {2 * STILL_STEPS} steps, {_percent(history.remains)} of the first"
    remedy = "try another learning rate or initialisation, and look at the data and the labels"
    return Finding("", f"plateau: {text}; {remedy}")


def lr_high(history: History) -> Finding | None:
    """Large updates: for three looks, or with a loss that has risen for as long, or in one that has doubled it."""
    looks = history.looks[-3:]
    ratios = [_update_ratios(look) for look in looks]
    if not looks or not all(ratios):
        return None
    middle = [_median(list(of_look.values())) for of_look in ratios]
    largest = min(max(of_look.values()) for of_look in ratios)
    first, losses = history.first_loss, [look.loss for look in looks]
    risen_by = [loss - first for loss in losses]  # beside |first|, since a loss may be negative
    risen = max(risen_by) > (JUMPED - 1) * abs(first) and max(middle) > HIGH_RATIO
    if len(looks) == 3 and looks[0].step >= SETTLED:
        risen = risen or (min(risen_by[1:]) > (RISEN - 1) * abs(first) and min(middle) > RISING_RATIO)
        large = min(middle) > HIGH_RATIO or largest > LARGE_RATIO
    else:
        large = False
    if not large and not risen:
        return None
    layer, ratio = max(ratios[-1].items(), key=lambda item: item[1])
    loss = f"the loss went from {first:.4g} to {max(losses):.4g}; " if risen else ""
    text = f"{loss}an update is {_short(ratio)} times as large as `{layer}`, where 0.001 is usual"
    remedy = f"try {_short(looks[-1].lr / 10)} instead of {_short(looks[-1].lr)}"
    return Finding(layer, f"learning rate too high: {text}; {remedy}", ratio)


def lr_low(history: History) -> Finding | None:
    """Tiny updates, though not for lack of gradients, and a loss that hardly falls; four looks, with no warm-up."""
    looks = history.last(4)
    if not looks or looks[-1].step < 30 or looks[-1].lr > looks[0].lr or history.remains < 1 - LOW_FALL:
        return None
    ratios = [_update_ratios(look) for look in looks]
    if not all(ratios) or max(max(of_look.values()) for of_look in ratios) > LOW_RATIO:
        return None
    if min(max(_rates(look).values()) for look in looks) < LOW_RATE:
        return None  # all ReLUs are dead, or the network has learnt: a larger learning rate would not help
    layer, ratio = max(ratios[-1].items(), key=lambda item: item[1])
    text = f"an update is {_short(ratio)} times as large as `{layer}` at the most, where 0.001 is usual"
    remedy = f"try {_short(looks[-1].lr * 100)} instead of {_short(looks[-1].lr)}"
    return Finding(
        layer, f"learning rate too low: {text}, and the loss hardly falls; {remedy}", LOW_RATIO / (ratio or 1)
    )


def collapse(history: History) -> Finding | None:
    """Almost all predictions are one class, the same in four looks in a row, and the targets are not."""
    looks = history.last(4)
    favourites = [look.favourite for look in looks if look.favourite is not None]
    if len(favourites) < 4 or looks[-1].step - looks[0].step < COLLAPSED_STEPS or _examples(looks) < FEW:
        return None
    if len({of_look.number for of_look in favourites}) > 1:
        return None
    if any(of_look.predicted < COLLAPSED or of_look.true > COLLAPSED_TRUE for of_look in favourites):
        return None
    last = favourites[-1]
    true = _percent(last.true)
    text = f"{_percent(last.predicted)} of the predictions are class {last.number}, and {true} of the targets"
    remedy = "try a lower learning rate, weights or sampling for rare classes, and look at the labels"
    return Finding("", f"class collapse: {text}; {remedy}")


RULES: Mapping[str, Rule] = {
    "non-finite": non_finite,
    "vanishing": vanishing,
    "exploding": exploding,
    "dead": dead,
    "saturated": saturated,
    "plateau": plateau,
    "lr-high": lr_high,
    "lr-low": lr_low,
    "collapse": collapse,
}


# --- what several rules need


def _examples(looks: Sequence[Look]) -> int:
    return sum(look.examples for look in looks)


def _matrices(look: Look) -> dict[str, ParameterHealth]:
    return {name: of_one for name, of_one in look.parameters.items() if of_one.is_matrix and of_one.weight_norm > 0}


def _rates(look: Look) -> dict[str, float]:
    """‖gradient‖/‖weight‖ of each matrix, in the order of the network."""
    return {name: of_one.grad_norm / of_one.weight_norm for name, of_one in _matrices(look).items()}


def _update_ratios(look: Look) -> dict[str, float]:
    return {name: r for name, of_one in _matrices(look).items() if not math.isnan(r := of_one.update_ratio)}


def _began_at_zero(history: History) -> set[str]:
    return {name for look in history.looks for name, of_one in look.parameters.items() if not of_one.weight_norm}


def _slowest(look: Look, passed_over: set[str]) -> tuple[str, str, float] | None:
    """(slow layer, the fastest layer behind it, how many times slower), if a layer is far too slow."""
    matrices = {name: of_one for name, of_one in _matrices(look).items() if name not in passed_over}
    rates = _rates(look)
    worst: tuple[str, str, float] | None = None
    fast = ""
    for slow in reversed(matrices):
        if fast and (times := _times_slower(matrices[slow], matrices[fast], rates[fast] / max(rates[slow], 1e-30))):
            worst = max(worst or (slow, fast, 0.0), (slow, fast, times), key=lambda triple: triple[2])
        if not fast or rates[slow] > rates[fast]:
            fast = slow
    return worst


def _times_slower(slow: ParameterHealth, fast: ParameterHealth, by_rate: float) -> float:
    """How many times slower one learns than the other, or 0 if that is nothing to speak of."""
    if slow.update_ratio > EQUALISED * fast.update_ratio:
        return 0.0
    if slow.learning_speed is None or fast.learning_speed is None:
        return by_rate if by_rate > VANISHING_RATE_ALONE else 0.0
    by_speed = fast.learning_speed / max(slow.learning_speed, 1e-30)
    return by_speed if by_speed > VANISHING_SPEED and by_rate > VANISHING_RATE else 0.0


def _lr_falls(history: History) -> bool:
    """Whether the learning rate is on its way down, as a schedule ends."""
    return history.looks[-1].lr < 0.5 * max(look.lr for look in history.looks)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def _short(value: float) -> str:
    return f"{value:.3g}"


def _percent(share: float | None) -> str:
    return f"{share or 0:.0%}".replace("%", " %")
