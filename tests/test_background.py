import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from distprop import random
from distprop.data import ArrayDataset, Loader, ahead
from test_data import rank_of

PATIENCE_SECONDS = 10


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("length", [0, 1, 2, 30])
def test_the_items_come_in_order_and_all_of_them(length, count):
    assert list(ahead(range(length), count)) == list(range(length))
    assert list(ahead((i for i in range(length)), count)) == list(range(length))


@pytest.mark.parametrize("count", [1, 3])
def test_exactly_so_many_items_are_loaded_ahead_in_another_thread(count):
    loaded = []

    def items():
        for number in range(10):
            loaded.append(threading.current_thread())
            yield number

    iterator = ahead(items(), count)
    assert not loaded  # nothing happens before the first item is wanted
    for number in range(3):
        assert next(iterator) == number
        wait_until(lambda number=number: len(loaded) == number + 1 + count)
        time.sleep(0.02)
        assert len(loaded) == number + 1 + count
    assert threading.current_thread() not in loaded
    assert len(set(loaded)) == 1
    iterator.close()


def test_an_item_is_loaded_while_the_last_one_is_in_use():
    asked = threading.Event()

    def items():
        yield 0
        asked.set()
        yield 1

    for _ in ahead(items()):
        assert asked.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize("count", [1, 4])
def test_an_exception_is_raised_in_the_consumer_at_its_place(count):
    def items():
        yield from range(2)
        raise KeyError("the third")

    iterator = ahead(items(), count)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(KeyError, match="the third") as error:
        next(iterator)
    assert list(iterator) == []
    assert any(entry.name == "items" for entry in error.traceback)  # it says where


@pytest.mark.parametrize("count", [1, 4])
def test_stopping_early_ends_the_thread_and_closes_the_source(count):
    closed = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            closed.set()

    for item in ahead(items(), count):
        if item == 3:
            break
    assert closed.is_set()


def test_an_exception_in_the_consumer_ends_the_thread():
    def consume():
        for _ in ahead(range(1000)):
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        consume()


def test_an_iterator_that_is_never_used_starts_nothing():
    ahead(range(3))
    ahead(range(3)).close()


def test_a_process_ends_though_an_iterator_is_left_over():
    program = (
        "import itertools; from distprop.data import ahead; left = ahead(itertools.count()); print(next(left)); "
        "import sys; sys.modules['keep'] = left"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "0\n", "")


def test_a_count_below_one_is_refused_at_once():
    with pytest.raises(ValueError, match="at least one item ahead, got count=0"):
        ahead(range(3), 0)
    with pytest.raises(ValueError, match=r"prefetch is the number of batches .* got -1"):
        Loader(ArrayDataset(np.arange(3)), batch_size=1, prefetch=-1)


# in a Loader


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("size", [1, 3])
def test_a_loader_serves_the_same_batches_at_the_same_places(size, prefetch):
    """Dropout is drawn when a batch is used: what was loaded meanwhile must not have moved the place."""

    def epochs(prefetch, rank):
        loader = Loader(ArrayDataset(np.arange(11)), batch_size=4, seed=1, comm=rank_of(rank, size), prefetch=prefetch)
        seen = []
        for _ in range(2):
            for (x,) in loader:
                place = random.place()
                bits = random.row_bits(len(x), 3)
                time.sleep(0.002)  # the next batches are loaded
                assert random.place() is place
                seen.append((x.tolist(), place.step, place.first_row, bits.tolist()))
        return seen

    for rank in range(size):
        assert epochs(prefetch, rank) == epochs(0, rank)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_loader_loads_in_the_background_only_if_asked_to(prefetch):
    threads = []

    class Watched(ArrayDataset):
        def __getitem__(self, indices):
            threads.append(threading.current_thread() is threading.main_thread())
            return super().__getitem__(indices)

    assert len(list(Loader(Watched(np.arange(6)), batch_size=2, prefetch=prefetch))) == 3
    assert threads == [prefetch == 0] * 3


def test_a_loader_raises_what_its_dataset_raises():
    class Broken(ArrayDataset):
        def __getitem__(self, indices):
            if 5 in indices:
                raise OSError("the disk is gone")
            return super().__getitem__(indices)

    batches = iter(Loader(Broken(np.arange(8)), batch_size=2, shuffle=False, prefetch=2))
    assert [next(batches)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_resumed_epoch_is_loaded_ahead_too():
    loaders = [Loader(ArrayDataset(np.arange(9)), batch_size=2, prefetch=prefetch) for prefetch in (0, 1)]
    plain, fetched = ([x.tolist() for (x,) in loader.batches(3, start=2)] for loader in loaders)
    assert plain == fetched
    assert len(plain) == 3
