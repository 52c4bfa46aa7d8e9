"""The watchdog: a thread of each rank that finds out why a collective does not end, and ends the job with the reason.

It owns a communicator of its own, and wakes twice a second, also while the main thread waits inside MPI. As long as
collectives end, it does nothing. A rank that has been in one for a few seconds tells rank 0 and the last rank, which
ask all others where they are. From the answers `judge` tells a job that is lost (a rank has ended, or calls something
else) from one that is waiting for a slow rank, and only the time limit ends that.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from distprop.comm.base import odd_ranks
from distprop.comm.recorder import END, SAME_CALLS, Call, Record, Snapshot, comparable, described, read

TIMEOUT_VARIABLE = "DISTPROP_TIMEOUT"
DEFAULT_TIMEOUT_SECONDS = 120.0
TICK_SECONDS = 0.5
PATIENCE_SECONDS = 3.0  # in one collective, before anybody is asked
FRESH_SECONDS = 2.0  # how long an answer counts as the present
ANSWER_SECONDS = 2.5  # after which a rank that was asked counts as silent

_PREFIX = struct.Struct("<?d")  # whether an answer is wanted, seconds without progress


def timeout_seconds() -> float:
    """The limit that DISTPROP_TIMEOUT sets; 0 is none.

    Raises:
        ValueError: it is no number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT_SECONDS)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{TIMEOUT_VARIABLE}={text}: give a number of seconds, or 0 for no limit")
    return seconds


@dataclass(frozen=True)
class Sighting:
    """What is known of a rank."""

    snapshot: Snapshot | None
    idle: float = 0.0  # seconds without progress, by its own count
    silent: bool = False  # it was asked and did not answer
    unheard: float = float("inf")  # seconds since its last answer


@dataclass(frozen=True)
class Verdict:
    """The job is lost: because of which ranks, and why."""

    culprits: tuple[int, ...]
    reason: str


def judge(sightings: Sequence[Sighting], timeout: float) -> Verdict | None:
    """Whether the ranks, in order, will ever come together again; None while there is hope.

    Progress is a collective entered or left, or the begin of a phase of a step. A rank that computes for longer
    than `timeout` while others wait for it is a stall; one that is only slow is not. For one that others wait for at
    the end of their scripts there is no limit, as long as it answers: it may have something to do alone.
    """
    waiting = [s for s in sightings if s.snapshot and s.snapshot.inside and s.idle >= PATIENCE_SECONDS]
    if not waiting:
        at_end = [s for s in sightings if s.snapshot and s.snapshot.ended]
        last = max(at_end, key=lambda s: s.idle, default=None)
        return _silence(sightings, last, timeout) if timeout and last and last.idle >= timeout else None
    known = [s.snapshot for s in sightings if s.snapshot]
    waits = max(waiting, key=lambda s: s.idle)
    assert waits.snapshot
    return (
        _disagreement(known)
        or _desertion(known, [s.snapshot for s in waiting if s.snapshot])
        or (_stall(sightings, waits, timeout) if timeout and waits.idle >= timeout else None)
    )


class Channel(Protocol):
    """Messages between watchdogs that never block."""

    def send(self, rank: int, message: bytes) -> None:
        """Send, unless the message before has not left yet."""

    def receive(self) -> list[tuple[int, bytes]]:
        """What has arrived: (sender, message)."""


class Watchdog:
    """One rank's; `tick` is one look. `end_job(verdict, snapshots)` is called at most once, and so is `say(line)`.

    Time is counted in ticks, none longer than twice their interval: a job that was suspended as a whole, by a batch
    system or with its machine, goes on as if nothing had happened.
    """

    def __init__(
        self,
        channel: Channel,
        record: Record,
        timeout: float,
        end_job: Callable[[Verdict, Mapping[int, Snapshot]], object],
        say: Callable[[str], object],
    ) -> None:
        self.channel, self.record, self.timeout = channel, record, timeout
        self.end_job, self.say = end_job, say
        self.idle = 0.0
        self._clock = 0.0
        self._last: tuple[object, ...] = ()
        self._seen: dict[int, tuple[float, float, Snapshot]] = {}  # by rank: when, its idle seconds, where it is
        self._asked: dict[int, float] = {}
        self._told = 0.0
        self._lost_since: float | None = None
        self._done = self._said = False
        self._centres = sorted({0, record.size - 1})

    def tick(self, elapsed: float) -> None:
        """Look at this rank, listen, answer, and where it is this rank's task ask the others and judge."""
        elapsed = min(elapsed, 2 * TICK_SECONDS)
        self._clock += elapsed
        record = self.record
        now = (record.sequence, record.inside, record.phases)
        self.idle = self.idle + elapsed if now == self._last else 0.0
        self._last = now
        for sender, message in self.channel.receive():
            asks, idle = _PREFIX.unpack_from(message)
            self._seen[sender] = (self._clock, idle, read(message[_PREFIX.size :]))
            self._asked.pop(sender, None)
            if asks:
                self._tell(sender)
        if record.rank in self._centres:
            self._preside()
        elif (
            (record.inside or record.phase == END)
            and self.idle >= PATIENCE_SECONDS
            and self._clock - self._told >= FRESH_SECONDS
        ):
            self._told = self._clock
            for centre in self._centres:
                self._tell(centre, ask=True)
        if self.timeout and (record.inside or record.phase == END) and record.rank not in self._centres:
            heard = max((self._seen[centre][0] for centre in self._centres if centre in self._seen), default=0.0)
            if min(self.idle, self._clock - heard) >= self.timeout + 15:  # nobody is left who would judge
                reason = f"no answer, while rank {record.rank} waits for {self.idle:.0f} s"
                self._end(Verdict(tuple(self._centres), reason))

    def _preside(self) -> None:
        """Ask everybody as long as somebody waits, and judge."""
        record = self.record
        self._seen[record.rank] = (self._clock, self.idle, read(record.memory))
        if not any(
            (snapshot.inside or snapshot.ended) and idle >= PATIENCE_SECONDS and self._clock - when <= 2 * FRESH_SECONDS
            for when, idle, snapshot in self._seen.values()
        ):
            self._asked.clear()
            self._lost_since = None
            return
        for rank in range(record.size):
            stale = self._clock - self._seen[rank][0] >= FRESH_SECONDS if rank in self._seen else True
            if stale and rank not in self._asked:
                self._asked[rank] = self._clock
                self._tell(rank, ask=True)
        sightings = [self._sighting(rank) for rank in range(record.size)]
        verdict = judge(sightings, self.timeout)
        if verdict is None:
            self._lost_since = None
            self._say_who_is_late(sightings)
            return
        if self._lost_since is None:
            self._lost_since = self._clock
        first = record.rank == 0 or sightings[0].silent
        if first or self._clock - self._lost_since > 3:  # rank 0 speaks, if it can
            self._end(verdict, {rank: s.snapshot for rank, s in enumerate(sightings) if s.snapshot})

    def _say_who_is_late(self, sightings: Sequence[Sighting]) -> None:
        """Once, where the others have waited at their end for as long as the limit."""
        ended = [s for s in sightings if s.snapshot and s.snapshot.ended]
        late = [s.snapshot for s in sightings if s.snapshot and not s.snapshot.ended]
        seconds = max((s.idle for s in ended), default=0.0)
        if self.record.rank == 0 and self.timeout and seconds >= self.timeout and late and not self._said:
            self._said = True
            who = ", ".join(f"{self.record.name(s.rank)} ({s.place})" for s in late[:8])
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
            self.say(
                f"distprop: {_ranks([s.snapshot.rank for s in ended if s.snapshot])} at the end of the script since "
                f"{since}, waiting for {who}"
            )

    def _sighting(self, rank: int) -> Sighting:
        silent = self._clock - self._asked.get(rank, self._clock) >= ANSWER_SECONDS
        when, idle, snapshot = self._seen.get(rank, (float("-inf"), 0.0, None))
        if rank in self.record.peers:  # on this host its memory says it, whether it answers or not
            snapshot = read(self.record.peers[rank])
        return Sighting(snapshot, idle, silent, self._clock - when)

    def _tell(self, rank: int, ask: bool = False) -> None:
        self.channel.send(rank, _PREFIX.pack(ask, self.idle) + bytes(self.record.memory))

    def _end(self, verdict: Verdict, snapshots: Mapping[int, Snapshot] | None = None) -> None:
        if not self._done:
            self._done = True
            self.end_job(verdict, snapshots if snapshots is not None else self.record.seen())


class WatchdogThread:
    """Ticks until `stop`."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distprop watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return once the last tick has ended."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(TICK_SECONDS):
            now = time.monotonic()
            self._watchdog.tick(now - before)
            before = now


def _disagreement(known: Sequence[Snapshot]) -> Verdict | None:
    """The first collective that some ranks made another call of than others."""
    for number in sorted({number for snapshot in known for number in snapshot.ring}):
        calls = {s.rank: comparable(s.ring[number]) for s in known if number in s.ring}
        if len(set(calls.values())) > 1:
            odd = odd_ranks(calls)
            camps: dict[Call, list[int]] = {}
            for rank, call in calls.items():
                camps.setdefault(call, []).append(rank)
            if len(odd) < len(calls):
                common = next(call for call, camp in camps.items() if camp[0] not in odd)
                reason = (
                    f"called {described(calls[odd[0]])} as collective {number}, where {_ranks(camps[common])} called "
                    f"{described(common)}"
                )
            elif len(calls) < known[0].size:
                return None  # ranks that come later will tell who is wrong
            else:
                said = [f"{_ranks(camp)} called {described(call)}" for call, camp in list(camps.items())[:8]]
                reason = f"{', '.join(said)}, as collective {number}"
            return Verdict(odd, f"{reason}; {SAME_CALLS}")
    return None


def _desertion(known: Sequence[Snapshot], waiting: Sequence[Snapshot]) -> Verdict | None:
    """Ranks that have ended, while another waits in a collective that they never entered."""
    latest = max(waiting, key=lambda s: s.sequence)
    gone = tuple(s.rank for s in known if s.ended and s.sequence < latest.sequence)
    if not gone:
        return None
    return Verdict(
        gone,
        "has come to the end of its script or called sys.exit(), while "
        f"rank {latest.rank} waits for it in {latest.collective} ({latest.place})",
    )


def _behind(waits: Snapshot, timeout: float) -> str:
    where = "at the end of its script" if waits.ended else f"in {waits.collective} ({waits.place})"
    return f"while rank {waits.rank} waits {where}; the limit is {timeout:g} s"


def _silence(sightings: Sequence[Sighting], waits: Sighting, timeout: float) -> Verdict | None:
    """Ranks that have not answered for as long as another may wait."""
    silent = tuple(rank for rank, s in enumerate(sightings) if s.silent and min(s.unheard, waits.idle) >= timeout)
    if not silent or not waits.snapshot:
        return None
    state = process_state(sightings[silent[0]].snapshot)
    return Verdict(silent, f"{state or 'does not answer'}, {_behind(waits.snapshot, timeout)}")


def _stall(sightings: Sequence[Sighting], waits: Sighting, timeout: float) -> Verdict | None:
    """Ranks that do not answer, or that have computed for as long as another has waited."""
    assert waits.snapshot
    behind = _behind(waits.snapshot, timeout)
    if silence := _silence(sightings, waits, timeout):
        return silence
    computing = [
        (rank, s)
        for rank, s in enumerate(sightings)
        if s.snapshot and not (s.silent or s.snapshot.inside or s.snapshot.ended)
    ]
    stalled = tuple(rank for rank, s in computing if s.idle >= timeout)
    if stalled:
        return Verdict(stalled, f"no progress for {sightings[stalled[0]].idle:.0f} s, {behind}")
    if computing or any(s.silent or s.snapshot is None for s in sightings):
        return None
    oldest = min(s.snapshot.sequence for s in sightings if s.snapshot)
    late = tuple(rank for rank, s in enumerate(sightings) if s.snapshot and s.snapshot.sequence == oldest)
    return Verdict(late, f"the messages of a collective do not arrive, though all ranks are in one, {behind}")


def process_state(snapshot: Snapshot | None) -> str:
    """What Linux says of a rank of this host that does not answer: stopped, waiting for a disk, dead; or nothing."""
    if snapshot is None or snapshot.host != os.uname().nodename:
        return ""
    with contextlib.suppress(OSError, IndexError):
        with open(f"/proc/{snapshot.process}/stat", encoding="utf-8") as file:
            letter = file.read().rpartition(")")[2].split()[0]
        return {
            "T": "is stopped (SIGSTOP) and does not answer",
            "t": "is stopped by a debugger and does not answer",
            "D": "waits for a disk or a file server and does not answer",
            "Z": "has died",
        }.get(letter, "")
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', …' * (len(ranks) > 8)}"
