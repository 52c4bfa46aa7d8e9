"""The watchdog's judgement as a function, and the watchdogs of several ranks with a clock of their own."""

from __future__ import annotations

import re

import pytest

from distprop.comm import recorder
from distprop.comm.recorder import BACKWARD, END, FORWARD, REDUCTION, Record, Snapshot
from distprop.comm.watchdog import TICK_SECONDS, TIMEOUT_VARIABLE, Sighting, Verdict, Watchdog, judge, timeout_seconds


class Rank(Record):
    """A rank without a process."""

    def __init__(self, rank: int, size: int, collectives: int = 5) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        recorder._HEADER.pack_into(self.memory, 0, b"distprop", rank, size, 0, b"a-host")
        self.at(FORWARD, 3)
        for _ in range(collectives):
            self.enter(b"allreduce", 100)
            self.leave()

    def snapshot(self) -> Snapshot:
        return recorder.read(self.memory)


def ranks(size: int = 3, inside: tuple[int, ...] = ()) -> list[Rank]:
    found = [Rank(number, size) for number in range(size)]
    for number in inside:
        found[number].at(REDUCTION)
        found[number].enter(b"allreduce", 100)
    return found


def sightings(found: list[Rank], idle: float = 0.0, **of_rank: Sighting) -> list[Sighting]:
    return [of_rank.get(f"rank{rank.rank}", Sighting(rank.snapshot(), idle)) for rank in found]


# ------------------------------------------------------------------------------------------------------- judgement


def test_a_rank_that_computes_is_waited_for_until_the_limit() -> None:
    found = ranks(inside=(0, 2))
    assert judge(sightings(found, 119), 120) is None
    verdict = judge(sightings(found, 120), 120)
    assert verdict == Verdict(
        (1,),
        "no progress for 120 s, while rank 0 waits in collective 6, allreduce of 100 bytes (step 3, reduction); "
        "the limit is 120 s",
    )
    assert judge(sightings(found, 1e6), 0) is None  # no limit


def test_a_rank_that_makes_progress_is_not_ended_however_long_the_others_wait() -> None:
    found = ranks(inside=(0, 2))
    assert judge(sightings(found, 500, rank1=Sighting(found[1].snapshot(), idle=3)), 120) is None


def test_a_silent_rank_is_the_culprit_at_the_limit() -> None:
    found = ranks(inside=(0, 2))
    silent = Sighting(found[1].snapshot(), 0, silent=True)
    assert judge(sightings(found, 119, rank1=silent), 120) is None
    verdict = judge(sightings(found, 121, rank1=silent), 120)
    assert verdict is not None
    assert (verdict.culprits, verdict.reason[:15]) == ((1,), "does not answer")


def test_nobody_is_accused_as_long_as_nobody_waits() -> None:
    found = ranks()
    assert judge(sightings(found, 1000), 120) is None
    found[1].at(END)
    assert judge(sightings(found, 1000), 120) is None


def test_a_rank_that_has_ended_is_the_culprit_at_once() -> None:
    found = ranks(inside=(0, 2))
    found[1].at(END)
    assert judge(sightings(found, 2.9), 120) is None
    verdict = judge(sightings(found, 3), 120)
    assert verdict is not None
    assert verdict.culprits == (1,)
    assert "rank 0 waits for it in collective 6" in verdict.reason


def test_a_rank_that_has_ended_after_the_last_collective_of_the_others_is_not() -> None:
    found = ranks(inside=(0, 2))
    found[1].enter(b"allreduce", 100)
    found[1].leave()
    found[1].at(END)  # as the root of a broadcast may
    assert judge(sightings(found, 100), 120) is None
    verdict = judge(sightings(found, 120), 120)
    assert verdict is not None
    assert "do not arrive" in verdict.reason


@pytest.mark.parametrize(("operation", "size"), [(b"barrier", 0), (b"allreduce", 8)])
def test_a_rank_that_calls_something_else_is_the_culprit_at_once(operation: bytes, size: int) -> None:
    found = ranks(inside=(0, 2))
    found[1].enter(operation, size)
    verdict = judge(sightings(found, 3), 0)
    assert verdict is not None
    assert verdict.culprits == (1,)
    assert f"called {operation.decode()}" in verdict.reason
    assert "as collective 6, where ranks 0, 2 called allreduce of 100 bytes" in verdict.reason


def test_nobody_is_accused_of_another_call_before_most_ranks_agree() -> None:
    found = ranks(inside=(2,))
    found[1].enter(b"barrier", 0)
    assert judge(sightings(found, 10), 120) is None  # rank 0 has not come yet
    found[0].enter(b"allreduce", 100)
    verdict = judge(sightings(found, 10), 120)
    assert verdict is not None
    assert verdict.culprits == (1,)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (2, "rank 0 called allreduce of 100 bytes, rank 1 called barrier, as collective 6; all ranks must"),
        (4, "ranks 0, 2 called allreduce of 100 bytes, ranks 1, 3 called barrier, as collective 6; all ranks must"),
    ],
)
def test_of_two_camps_of_one_size_that_disagree_both_are_named_at_once(size: int, said: str) -> None:
    """No other rank will come and tell who is wrong."""
    found = ranks(size, inside=tuple(range(0, size, 2)))
    for rank in found[1::2]:
        rank.enter(b"barrier", 0)
    verdict = judge(sightings(found, 3), 0)
    assert verdict is not None
    assert verdict.culprits == tuple(range(size))
    assert verdict.reason.startswith(said)


@pytest.mark.parametrize("operation", [b"allgather", b"alltoall"])
def test_messages_of_different_lengths_may_be_exchanged(operation: bytes) -> None:
    found = ranks()
    for rank in found:
        rank.enter(operation, rank.rank)
    assert judge(sightings(found, 100), 120) is None


def test_a_rank_of_which_nothing_is_known_yet_may_be_the_one_that_is_missing() -> None:
    found = ranks(inside=(0, 1, 2))
    assert judge(sightings(found, 120, rank1=Sighting(None)), 120) is None


def test_messages_that_do_not_arrive_end_the_job_at_the_limit() -> None:
    found = ranks(inside=(0, 1, 2))
    assert judge(sightings(found, 119), 120) is None
    verdict = judge(sightings(found, 120), 120)
    assert verdict is not None
    assert "do not arrive" in verdict.reason


# ------------------------------------------------------------------------------------------- several ranks at once


class Post:
    """Channels between ranks of one process; the messages of ranks in `cut_off` are lost."""

    def __init__(self, size: int) -> None:
        self.boxes: list[list[tuple[int, bytes]]] = [[] for _ in range(size)]
        self.sent = 0

    def channel(self, rank: int) -> Post.Channel:
        return Post.Channel(self, rank)

    class Channel:
        def __init__(self, post: Post, rank: int) -> None:
            self.post, self.rank = post, rank

        def send(self, rank: int, message: bytes) -> None:
            self.post.sent += 1
            self.post.boxes[rank].append((self.rank, message))

        def receive(self) -> list[tuple[int, bytes]]:
            messages, self.post.boxes[self.rank] = self.post.boxes[self.rank], []
            return messages


class World:
    def __init__(self, found: list[Rank], timeout: float = 10) -> None:
        self.post, self.ended, self.said = Post(len(found)), [], []
        self.dogs = [
            Watchdog(
                self.post.channel(r.rank),
                r,
                timeout,
                lambda verdict, _, rank=r.rank: self.end(rank, verdict),
                self.said.append,
            )
            for r in found
        ]

    def end(self, rank: int, verdict: Verdict) -> None:
        self.ended.append((rank, verdict.culprits))

    def run(self, seconds: float, stopped: tuple[int, ...] = ()) -> float:
        """Tick until a watchdog ends the job or the time is over; returns how long that took."""
        for tick in range(int(seconds / TICK_SECONDS)):
            for rank, dog in enumerate(self.dogs):
                if rank not in stopped:
                    dog.tick(TICK_SECONDS)
            if self.ended:
                return (tick + 1) * TICK_SECONDS
        return seconds


@pytest.mark.parametrize("gone", range(5))
def test_one_watchdog_ends_the_job_within_seconds_whichever_rank_has_ended(gone: int) -> None:
    found = ranks(5, inside=tuple(rank for rank in range(5) if rank != gone))
    found[gone].at(END)
    world = World(found)
    assert world.run(30) < 7
    assert world.ended == [(0, (gone,))]


@pytest.mark.parametrize(("stopped", "speaker"), [(0, 4), (2, 0), (4, 0)])
def test_a_stopped_rank_ends_the_job_at_the_limit(stopped: int, speaker: int) -> None:
    world = World(ranks(5, inside=tuple(rank for rank in range(5) if rank != stopped)))
    assert 10 <= world.run(60, stopped=(stopped,)) < 15
    assert world.ended == [(speaker, (stopped,))]


def test_if_all_who_would_judge_are_stopped_another_rank_ends_the_job() -> None:
    world = World(ranks(5, inside=(1, 2, 3)))
    assert 10 < world.run(60, stopped=(0, 4)) < 30
    assert world.ended[0] == (1, (0, 4))


def test_a_hanging_rank_ends_the_job_at_the_limit_and_may_be_rank_0_itself() -> None:
    world = World(ranks(3, inside=(1, 2)))
    assert 10 <= world.run(60) < 13
    assert world.ended == [(0, (0,))]


def test_without_a_limit_nobody_is_too_slow() -> None:
    world = World(ranks(5, inside=(1, 2, 3)), timeout=0)
    world.run(60)
    assert world.ended == []


def test_a_rank_whose_phases_come_round_again_makes_progress() -> None:
    """Forward and backward passes in turn, such as those of an accumulated step: no look tells one from the next."""
    found = ranks(5, inside=(0, 2, 3, 4))
    world = World(found)
    for _ in range(60):
        found[1].at(BACKWARD)
        found[1].at(FORWARD)
        world.run(0.5)
    assert world.ended == []
    world.run(60)
    assert world.ended == [(0, (1,))]


def at_end(size: int, *, but: int) -> list[Rank]:
    found = ranks(size)
    for rank in found:
        if rank.rank != but:
            rank.at(END)
    return found


@pytest.mark.parametrize("late", range(5))
def test_a_rank_that_has_something_to_do_alone_is_waited_for_at_the_end_and_that_is_said_once(late: int) -> None:
    world = World(at_end(5, but=late))
    assert world.run(100) == 100
    (line,) = world.said
    assert re.fullmatch(
        rf"distprop: ranks .* since \d\d:\d\d:\d\d, waiting for rank {late} \(step 3, forward pass\)", line
    )


@pytest.mark.parametrize("stopped", range(5))
@pytest.mark.parametrize("ended", [True, False])
def test_a_rank_that_is_stopped_while_the_others_are_at_their_end_ends_the_job(stopped: int, ended: bool) -> None:
    world = World(at_end(5, but=-1 if ended else stopped))
    world.run(5)
    assert 8 <= world.run(60, stopped=(stopped,)) < 16  # it last answered a moment before
    assert [culprits for _, culprits in world.ended] == [(stopped,)]


def test_a_rank_that_answers_seldom_is_not_ended_however_long_the_others_wait() -> None:
    """A library that it calls may keep the interpreter for a while."""
    for found in (at_end(3, but=1), ranks(3, inside=(0, 2))):
        world = World(found)
        for _ in range(20):
            found[1].at(FORWARD)
            world.run(8, stopped=(1,))
            found[1].at(FORWARD)
            world.run(0.5)
        assert world.ended == []


def test_nothing_is_sent_while_collectives_end() -> None:
    found = ranks(3)
    world = World(found)
    for _ in range(20):
        for rank in found:
            rank.enter(b"allreduce", 100)
        world.run(1)
        for rank in found:
            rank.leave()
    assert (world.post.sent, world.ended) == (0, [])


def test_a_job_that_was_suspended_as_a_whole_goes_on() -> None:
    found = ranks(3, inside=(0, 2))
    world = World(found, timeout=60)
    for dog in world.dogs:
        dog.tick(TICK_SECONDS)
        dog.tick(3600.0)
    world.run(5)
    assert world.ended == []


# ------------------------------------------------------------------------------------------------------ the setting


def test_the_limit_is_set_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    assert timeout_seconds() == 120
    for text, seconds in (("", 120), ("7.5", 7.5), ("0", 0)):
        monkeypatch.setenv(TIMEOUT_VARIABLE, text)
        assert timeout_seconds() == seconds
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, text)
        with pytest.raises(ValueError, match=f"DISTPROP_TIMEOUT={text}: give a number of seconds, or 0 for no limit"):
            timeout_seconds()
