import gc
import threading
import time

import numpy as np
import pytest

from communicator_suite import suite
from distprop.comm import CollectiveError, SoloCommunicator, _share_cores, node, play, run_threads, world
from distprop.comm.base import allgather_for
from scenario import run

# The table of communicators that live in one process: a world of one, and threads. tests/parallel has MPI's row.
SIZES = (1, 2, 3, 4, 5)


@pytest.mark.parametrize(("scenario", "size"), suite.in_threads(SIZES))
def test_communicator(scenario, size):
    run(scenario, size)


@pytest.mark.parametrize("scenario", [p.values[0] for p in suite.in_threads([1])], ids=lambda f: f.__name__)
def test_communicator_of_one_thread(scenario):
    run_threads(1, scenario, 5)


def test_aborting_a_world_of_one_leaves_with_the_status():
    with pytest.raises(SystemExit) as leaving:
        SoloCommunicator().abort(7)
    assert leaving.value.code == 7


def test_run_threads_returns_the_results_by_rank():
    def rank_slowly(comm):
        time.sleep(0.02 * (comm.size - comm.rank))
        return comm.rank * 10

    assert run_threads(3, rank_slowly) == [0, 10, 20]


def test_a_world_has_a_rank():
    with pytest.raises(ValueError, match="1 rank or more"):
        run_threads(0, lambda comm: None)


def test_a_barrier_waits_for_the_slowest():
    arrived = []

    def late(comm):
        time.sleep(0.05 * comm.rank)
        arrived.append(comm.rank)
        comm.barrier()
        return len(arrived)

    assert run_threads(4, late) == [4] * 4


def test_a_rank_that_raises_makes_the_others_raise_and_its_error_is_the_one_reported():
    others = {}

    def fail_on_one(comm):
        if comm.rank == 1:
            time.sleep(0.1)  # the others are waiting by then
            raise KeyError("the cause")
        try:
            comm.allreduce(np.zeros(3))
        except CollectiveError as error:
            others[comm.rank] = str(error)
            raise

    began = time.monotonic()
    with pytest.raises(KeyError, match="the cause") as caught:
        run_threads(4, fail_on_one)
    assert time.monotonic() - began < 5
    assert caught.value.__notes__ == ["raised on rank 1 of 4"]
    assert sorted(others) == [0, 2, 3]
    assert all("allreduce" in text and "the cause" in text for text in others.values())


def test_a_rank_that_raised_earlier_is_noticed_too():
    def fail_at_once(comm):
        if comm.rank == 0:
            raise KeyError("the cause")
        time.sleep(0.1)
        comm.barrier()

    with pytest.raises(KeyError, match="the cause"):
        run_threads(3, fail_at_once)


def test_abort_ends_every_rank_with_the_status():
    ended = []

    def abort_on_one(comm):
        try:
            if comm.rank == 1:
                comm.abort(3)
            comm.barrier()
        finally:
            ended.append(comm.rank)

    with pytest.raises(SystemExit) as leaving:
        run_threads(3, abort_on_one)
    assert leaving.value.code == 3
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ranks", "others", "said", "culprits"),
    [
        (2, "fit()", r"rank 0: evaluation; rank 1: fit\(\)", (0, 1)),
        (3, "fit()", r"rank 0: evaluation; ranks 1, 2: fit\(\)", (0,)),
        (3, None, "rank 0: evaluation; ranks 1, 2: something else", (0,)),
    ],
)
def test_ranks_that_gather_for_different_purposes_are_told(ranks, others, said, culprits):
    """They would take each other's messages for their own."""

    def gather(comm):
        if comm.rank and others is None:
            return comm.allgather(b"of a script's own")
        with pytest.raises(CollectiveError, match=said) as caught:
            allgather_for(others if comm.rank else "evaluation", comm, b"message")
        assert caught.value.culprits == culprits
        return None

    run_threads(ranks, gather)
    assert run_threads(2, lambda comm: allgather_for("evaluation", comm, b"%d" % comm.rank)) == [[b"0", b"1"]] * 2


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (lambda comm: comm.allreduce(np.zeros(3)), lambda comm: comm.barrier()),
        (lambda comm: comm.allreduce(np.zeros(3)), lambda comm: comm.allreduce(np.zeros(4))),
        (lambda comm: comm.allreduce(np.zeros(3)), lambda comm: comm.allreduce(np.zeros(3, np.float32))),
        (lambda comm: comm.broadcast(np.zeros(3), 0), lambda comm: comm.broadcast(np.zeros(3), 1)),
        (lambda comm: comm.broadcast(np.zeros(3)), lambda comm: comm.broadcast(np.zeros((3, 1)))),
    ],
    ids=["operations", "shapes", "dtypes", "roots", "shapes of a broadcast"],
)
def test_ranks_that_disagree_are_told_so(first, other):
    refused = []

    def disagree(comm):
        with pytest.raises(CollectiveError, match=rf"rank {comm.rank} called .* while rank \d called"):
            (other if comm.rank == 1 else first)(comm)
        refused.append(comm.rank)

    run_threads(3, disagree)
    assert sorted(refused) == [0, 1, 2]


def test_a_rank_that_never_comes_ends_the_wait():
    with pytest.raises(CollectiveError, match=r"could not complete barrier: no answer in 0\.2 s"):
        run_threads(2, lambda comm: comm.barrier() if comm.rank else None, timeout_seconds=0.2)


def test_a_barrier_that_all_have_reached_is_passed_although_one_fails_after_it():
    passed = []

    def fail_after(comm):
        comm.barrier()
        if comm.rank == 2:
            raise KeyError("the cause")
        passed.append(comm.rank)

    for _ in range(50):
        with pytest.raises(KeyError):
            run_threads(4, fail_after)
    assert len(passed) == 150


def test_ranks_that_work_one_at_a_time_may_share_a_generator_between_collectives():
    def draw(comm):
        np.random.seed(3)
        drawn = []
        for _ in range(4):
            time.sleep(0.002)  # another rank would come in between
            drawn.append(np.random.random())
        comm.barrier()
        return drawn

    drawn = run_threads(3, draw, None, one_at_a_time=True)
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_played_world_is_that_of_the_thread():
    def look(comm):
        with play(comm):
            inside = world()
        return inside is comm, world() is comm

    assert run_threads(3, look) == [(True, False)] * 3


def test_no_thread_is_left_behind():
    with pytest.raises(ZeroDivisionError):
        run_threads(3, lambda comm: 1 / comm.rank and comm.barrier())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_shared_memory_has_no_name_and_is_forgotten_with_its_array(monkeypatch, tmp_path):
    """Its number may be another array's afterwards."""
    monkeypatch.setattr(node, "_FOLDER", str(tmp_path))

    def share(comm):
        message = comm.allocate(10, np.float32)
        assert comm.node.check_sums(message, 10)
        assert (len(comm.node._arrays), len(comm.node._checks)) == (1, 1)
        comm.barrier()  # the first rank has taken the name away
        assert list(tmp_path.iterdir()) == []
        del message
        gc.collect()
        return len(comm.node._arrays), len(comm.node._checks)

    assert run_threads(2, share, share_memory=True) == [(0, 0)] * 2


def test_ranks_that_run_on_the_same_cores_share_them_out_unless_a_variable_says_how_many(monkeypatch):
    asked = []
    monkeypatch.setattr("threadpoolctl.threadpool_limits", lambda limits, user_api: asked.append((limits, user_api)))
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(7)), raising=False)
    run_threads(3, _share_cores)
    assert asked == [(2, "blas")] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_threads(3, _share_cores)
    assert len(asked) == 3


def test_ranks_that_disagree_on_the_length_of_what_they_exchange_are_told_so():
    def disagree(comm):
        send, receive = np.zeros(4), np.zeros(4)
        halves = [slice(0, 2), slice(2, 4)]
        comm.alltoall(send, halves, receive, [slice(0, 1), slice(1, 4)] if comm.rank else halves)

    with pytest.raises(CollectiveError, match="rank 1 awaits 1 numbers, not 2"):
        run_threads(2, disagree)
