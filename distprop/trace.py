"""What a profile says: where the time of each rank went, and the path through the ranks that decided how long it took.

A reduction ends for nobody before the last rank has come to it. So the critical path follows, from one reduction to the
next, the rank that arrives last: what that rank did in between, then the reduction itself, is what a step had to take.
Everything else on other ranks is waiting, and making it faster changes nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distprop.rundir import RunDirError
from distprop.timeline import FORMAT, PHASES, TRACE

OTHER = "other"


@dataclass(frozen=True)
class Span:
    """One span of one rank, in µs; `category` is a phase, "layer" or "step"."""

    name: str
    category: str
    began: float
    ended: float


@dataclass(frozen=True)
class Trace:
    """The spans of each rank in the order in which they began, an outer one before what is in it."""

    hosts: list[str]
    spans: list[list[Span]]
    clock_uncertainty_us: list[float]


@dataclass(frozen=True)
class Summary:
    """Seconds, from one profile.

    Attributes:
        steps: how many were recorded.
        total: from the first span of any rank to the last.
        phases: for each phase, and "other", a number by rank; a reduction is not part of the backward pass around it.
        waiting: by rank, the part of its reductions in which a later rank had not come yet.
        layers: for each module (forward, backward), without the modules in it, the mean over the ranks.
        path: for each (rank, phase) its part of the critical path; the reductions themselves have rank None.
        arrived_last: by rank, in how many reductions it was the one waited for.
    """

    steps: int
    total: float
    phases: dict[str, list[float]]
    waiting: list[float]
    layers: dict[str, tuple[float, float]]
    path: dict[tuple[int | None, str], float]
    arrived_last: list[int]


def read_trace(run_dir: Path) -> Trace:
    """The profile in a run's folder.

    Raises:
        RunDirError: there is none, it is damaged, or a newer version wrote it.
    """
    path = run_dir / TRACE
    if not run_dir.is_dir():
        raise RunDirError(f"there is no folder {run_dir}")
    if not path.exists():
        raise RunDirError(
            f"{run_dir} has no {TRACE}. Train with distprop train --profile, or Trainer(profile=True, run_dir=...); it "
            "is written when the profiled steps have been made"
        )
    try:
        tree = json.loads(path.read_bytes())
        about = tree["otherData"]
        number = about["format"]
        if number != FORMAT:
            raise RunDirError(f"{path} has format {number}; this version of distprop reads format {FORMAT}: upgrade it")
        spans: list[list[Span]] = [[] for _ in about["hosts"]]
        for event in tree["traceEvents"]:
            if event["ph"] == "X":
                ended = round(event["ts"] + event["dur"], 3)  # the `ts` of what begins then, to the last bit
                spans[event["pid"]].append(Span(event["name"], event["cat"], event["ts"], ended))
        return Trace(about["hosts"], spans, about["clock_uncertainty_us"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, RunDirError):
            raise
        raise RunDirError(f"{path} is not what a profile writes: {error!r}") from error


def summarise(trace: Trace) -> Summary:
    """Where the time went."""
    pieces = [list(phase_pieces(spans)) for spans in trace.spans]
    began = min((spans[0].began for spans in trace.spans if spans), default=0.0)
    ended = max((span.ended for spans in trace.spans for span in spans), default=0.0)
    phases = {phase: [_sum(of_rank, phase) for of_rank in pieces] for phase in (*PHASES, OTHER)}
    reductions = [[p for p in of_rank if p.category == "reduction"] for of_rank in pieces]
    last = [max(times) for times in zip(*((r.began for r in of_rank) for of_rank in reductions), strict=False)]
    waiting = [
        sum(max(0.0, min(at, r.ended) - r.began) for at, r in zip(last, of_rank, strict=False)) / 1e6
        for of_rank in reductions
    ]
    path, arrived = _critical_path(pieces, reductions)
    steps = max((sum(span.category == "step" for span in spans) for spans in trace.spans), default=0)
    return Summary(steps, (ended - began) / 1e6, phases, waiting, _layers(trace), path, arrived)


def show(trace: Trace) -> str:
    """The summary for a terminal."""
    summary = summarise(trace)
    ranks = range(len(trace.spans))
    total = sum(map(sum, summary.phases.values())) or 1
    lines = [
        f"{summary.steps} steps on {len(ranks)} rank{'s' * (len(ranks) > 1)}, {summary.total:.3f} s; "
        f"clocks aligned to ±{max(trace.clock_uncertainty_us):,.0f} µs",
        "",
        "where the time went, in seconds",
        f"{'':<14}" + "".join(f"{f'rank {rank}':>10}" for rank in ranks) + f"{'share':>9}",
    ]
    for phase, seconds in summary.phases.items():
        if any(seconds):
            lines.append(_row(phase, seconds, sum(seconds) / total))
            if phase == "reduction":
                lines.append(_row("  of it waiting", summary.waiting, sum(summary.waiting) / total))
    lines += ["", f"{'layer':<34}{'forward':>10}{'backward':>10}   ms a step"]
    ordered = sorted(summary.layers.items(), key=lambda item: -sum(item[1]))
    for name, times in ordered[:12]:
        forward, backward = (1e3 * t / max(1, summary.steps) for t in times)
        lines.append(f"{name[-33:]:<34}{forward:10.3f}{backward:10.3f}")
    if len(ordered) > 12:
        lines.append(f"... and {len(ordered) - 12} more")
    return "\n".join([*lines, "", *describe_path(summary)])


def describe_path(summary: Summary) -> list[str]:
    """The critical path in words."""
    total = sum(summary.path.values())
    if not total:
        return ["no critical path: the profile has no reduction"]
    by_phase: Counter[str] = Counter()
    for (_, phase), seconds in summary.path.items():
        by_phase[phase] += seconds  # type: ignore[assignment] # a Counter adds floats as well
    said = ", ".join(f"{phase} {seconds:.3f} s ({seconds / total:.0%})" for phase, seconds in by_phase.most_common())
    lines = [f"critical path, {total:.3f} s: {said}"]
    if len(summary.arrived_last) > 1:
        often = ", ".join(f"rank {rank} {count}" for rank, count in enumerate(summary.arrived_last))
        lines.append(f"arrived last at a reduction, and so was on the path (times): {often}")
    return lines


def phase_pieces(spans: Sequence[Span]) -> Iterator[Span]:
    """A rank's phases as pieces that do not overlap, in order: a reduction cuts the backward pass around it in two.

    What of a step belongs to no phase is "other".
    """
    outer: list[Span] = []  # open steps and phases
    at = 0.0

    def close(until: float) -> Iterator[Span]:
        nonlocal at
        while outer and outer[-1].ended <= until:
            top = outer.pop()
            if top.ended > at:
                yield _piece(top, at, top.ended)
                at = top.ended

    for span in spans:
        if span.category == "layer":
            continue
        yield from close(span.began)
        if outer and span.began > at:
            yield _piece(outer[-1], at, span.began)
        at = max(at, span.began)
        outer.append(span)
    yield from close(float("inf"))


def _piece(span: Span, began: float, ended: float) -> Span:
    category = OTHER if span.category == "step" else span.category
    return Span(category, category, began, ended)


def _sum(pieces: Sequence[Span], phase: str) -> float:
    return sum(piece.ended - piece.began for piece in pieces if piece.category == phase) / 1e6


def _critical_path(
    pieces: Sequence[Sequence[Span]], reductions: Sequence[Sequence[Span]]
) -> tuple[dict[tuple[int | None, str], float], list[int]]:
    """Seconds by (rank, phase), and how often each rank came last."""
    ranks, count = range(len(pieces)), min(map(len, reductions), default=0)
    path: dict[tuple[int | None, str], float] = defaultdict(float)
    arrived = [0 for _ in ranks]
    if not count:
        return {}, arrived
    last = [max(ranks, key=lambda rank, k=k: reductions[rank][k].began) for k in range(count)]  # type: ignore[misc]
    for k, rank in enumerate(last):
        arrived[rank] += 1
        since = reductions[rank][k - 1].ended if k else pieces[rank][0].began
        _add_between(path, rank, pieces[rank], since, reductions[rank][k].began)
        following = last[k + 1] if k + 1 < count else rank
        path[None, "reduction"] += max(0.0, reductions[following][k].ended - reductions[rank][k].began) / 1e6
    rank = last[-1]
    _add_between(path, rank, pieces[rank], reductions[rank][count - 1].ended, pieces[rank][-1].ended)
    return dict(path), arrived


def _add_between(
    path: dict[tuple[int | None, str], float], rank: int, pieces: Sequence[Span], since: float, until: float
) -> None:
    covered = 0.0
    for piece in pieces:
        length = min(piece.ended, until) - max(piece.began, since)
        if length > 0:
            path[rank, piece.category] += length / 1e6
            covered += length
    path[rank, OTHER] += max(0.0, until - since - covered) / 1e6


def _layers(trace: Trace) -> dict[str, tuple[float, float]]:
    """For each module its seconds (forward, backward) without those of modules in it, the mean over the ranks."""
    sums: dict[str, list[float]] = {}
    for spans in trace.spans:
        outer: list[Span] = []
        for span in spans:
            while outer and outer[-1].ended <= span.began:
                outer.pop()
            if span.category == "layer":
                column = next((1 for o in outer if o.category == "backward"), 0)
                if not any(o.category == "evaluation" for o in outer):
                    sums.setdefault(span.name, [0.0, 0.0])[column] += span.ended - span.began
                    if outer and outer[-1].category == "layer":
                        sums[outer[-1].name][column] -= span.ended - span.began
            outer.append(span)
    scale = 1e6 * max(1, len(trace.spans))
    return {name: (forward / scale, backward / scale) for name, (forward, backward) in sums.items()}


def _row(name: str, seconds: Sequence[float], share: float) -> str:
    return f"{name:<14}" + "".join(f"{value:10.3f}" for value in seconds) + f"{share:9.1%}"
