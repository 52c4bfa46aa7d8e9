"""How fast training would be on more ranks: the step of one rank, plus what Allreduce costs by the model of `cost`.

Computation is measured on this machine for several batch sizes, links are measured or given; nothing else goes in, so
what comes out is what synchronous training can reach, without stragglers and with a network nobody else uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distprop.cost import Cluster, Link

RANKS = tuple(2**power for power in range(13))  # 1 to 4,096
NEGLIGIBLE = 0.1  # communication has stopped to matter when it is this share of a step
FRAME_SHARE = 1448 / 1538  # of a nominal bit rate: TCP's payload in an Ethernet frame, of all that is on the wire

Scaling = Literal["weak", "strong"]


@dataclass(frozen=True)
class Steps:
    """What a rank's step takes without messages, for several numbers of rows, and how many bytes it would send."""

    rows: tuple[float, ...]
    seconds: tuple[float, ...]
    message_bytes: int

    def compute_seconds(self, rows: float) -> float:
        """On the straight lines between the measured points; beyond the last one, on as the last line goes."""
        slope = self._last_slope()
        beyond = max(0.0, rows - self.rows[-1]) * slope
        return float(np.interp(rows, self.rows, np.maximum.accumulate(self.seconds))) + beyond

    def rows_that_take(self, seconds: float) -> float:
        """How many rows keep a rank busy for so long."""
        if seconds >= max(self.seconds):
            slope = self._last_slope()
            return self.rows[-1] + (seconds - max(self.seconds)) / slope if slope else float("inf")
        return float(np.interp(seconds, np.maximum.accumulate(self.seconds), self.rows))

    def _last_slope(self) -> float:
        if len(self.rows) == 1:
            return self.seconds[0] / self.rows[0]
        seconds = np.maximum.accumulate(self.seconds)
        return float((seconds[-1] - seconds[-2]) / (self.rows[-1] - self.rows[-2]))


@dataclass(frozen=True)
class Forecast:
    """Training on `ranks` ranks; `rows` are those of a rank, `rate` is in samples a second."""

    ranks: int
    hosts: int
    rows: int
    step_seconds: float
    allreduce_seconds: float
    rate: float
    speedup: float
    enough_rows: float  # of a rank, for which communication is NEGLIGIBLE

    @property
    def efficiency(self) -> float:
        """The share of `ranks` times one rank's speed."""
        return self.speedup / self.ranks


def predict(
    steps: Steps, cluster: Cluster, batch: int, scaling: Scaling = "weak", ranks: Sequence[int] = RANKS
) -> list[Forecast]:
    """What training would do on each number of ranks.

    With weak scaling every rank keeps `batch` rows, and the global batch grows; with strong scaling `batch` is the
    global batch, and the ranks share it.
    """
    alone = batch / steps.compute_seconds(batch)
    forecasts = []
    for number in ranks:
        rows = batch if scaling == "weak" else -(-batch // number)  # the rank with the most rows is waited for
        reduce = cluster.allreduce_seconds(number, steps.message_bytes)
        seconds = steps.compute_seconds(rows) + reduce
        rate = (batch * number if scaling == "weak" else batch) / seconds
        enough = steps.rows_that_take(reduce * (1 - NEGLIGIBLE) / NEGLIGIBLE)
        forecasts.append(
            Forecast(number, cluster.hosts(number), rows, seconds, reduce, rate, rate / alone, max(1.0, enough))
        )
    return forecasts


def verdicts(forecasts: Sequence[Forecast]) -> list[str]:
    """Sentences that say on how many ranks training would be slower than on fewer; one that it never is, otherwise."""
    lines = []
    for best, slower in _slower(forecasts):
        last = slower[-1] is forecasts[-1]
        who = f"{slower[0].ranks:,} to {slower[-1].ranks:,} ranks" if len(slower) > 1 else f"{slower[0].ranks:,} ranks"
        who = f"more than {best.ranks:,} rank{'s' * (best.ranks > 1)}" if last else who
        fastest = max(slower, key=lambda forecast: forecast.rate)
        lines.append(
            f"{who[0].upper()}{who[1:]} would be slower than {best.ranks:,}: {fastest.rate:,.0f} samples/s at most, "
            f"instead of {best.rate:,.0f}"
        )
    return lines or [f"More ranks are faster, up to {forecasts[-1].ranks:,}"]


def parse_link(text: str) -> Link:
    """A link from its nominal bit rate and its latency, "25gbit,10us".

    Of the rate, 94 % carries data, as on Ethernet with frames of 1,500 bytes.

    Raises:
        ValueError: says what was expected.

    >>> parse_link("25gbit,10us").latency
    1e-05
    """
    match = re.fullmatch(rf"({_NUMBER})([kmgt])bit(?:/s)?,({_NUMBER}(?:ns|us|µs|ms|s))", text.replace(" ", "").lower())
    if match is None or not float(match[1]):
        raise ValueError(f"a link is written RATE,LATENCY as in 25gbit,10us or 100mbit,0.2ms; got {text!r}")
    rate = float(match[1]) * 1000.0 ** (1 + "kmgt".index(match[2]))
    return Link(parse_seconds(match[3]), 8 / (rate * FRAME_SHARE))


def parse_seconds(text: str) -> float:
    """A time such as "5.1ms".

    Raises:
        ValueError: says what was expected.
    """
    match = re.fullmatch(rf"({_NUMBER})(ns|us|µs|ms|s)", text.replace(" ", "").lower())
    if match is None:
        raise ValueError(f"a time is a number with ns, us, ms or s behind it, as in 5.1ms; got {text!r}")
    return float(match[1]) / {"ns": 1e9, "us": 1e6, "µs": 1e6, "ms": 1e3, "s": 1.0}[match[2]]


_NUMBER = r"\d+(?:\.\d+)?"


def _slower(forecasts: Sequence[Forecast]) -> Iterator[tuple[Forecast, list[Forecast]]]:
    """Each number of ranks that larger ones do not reach, with those."""
    best, slower = forecasts[0], list[Forecast]()
    for forecast in forecasts[1:]:
        if forecast.rate < best.rate:
            slower.append(forecast)
            continue
        if slower:
            yield best, slower
        best, slower = forecast, []
    if slower:
        yield best, slower
