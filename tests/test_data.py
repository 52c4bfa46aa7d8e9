import hashlib
import itertools
import subprocess
import sys
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest

import distprop.data
from distprop.data import ArrayDataset, Loader, load_digits
from distprop.data.loader import order, share
from distprop.random import row_bits


def rank_of(rank, size):
    return SimpleNamespace(rank=rank, size=size)


def serve(length, batch_size, size, epochs=1, **options):
    """What every rank is given: `served[rank][batch]` is the array of example numbers."""
    dataset = ArrayDataset(np.arange(length))
    loaders = [Loader(dataset, batch_size=batch_size, comm=rank_of(rank, size), **options) for rank in range(size)]
    return [[x for _ in range(epochs) for (x,) in loader] for loader in loaders]


# ArrayDataset


def test_array_dataset_indexes_every_array_at_once():
    x, y = np.arange(12.0).reshape(4, 3), np.array([10, 11, 12, 13])
    dataset = ArrayDataset(x, y)
    rows_x, rows_y = dataset[np.array([3, 0, 3])]
    assert len(dataset) == 4
    assert dataset.x is x
    assert dataset.y is y
    np.testing.assert_array_equal(rows_x, x[[3, 0, 3]])
    np.testing.assert_array_equal(rows_y, [13, 10, 13])


def test_array_dataset_holds_any_number_of_arrays():
    assert ArrayDataset(np.zeros(3)).arrays[0].shape == (3,)
    assert len(ArrayDataset(np.zeros(3), [1, 2, 3], np.zeros((3, 1)))[np.array([1])]) == 3


def test_array_dataset_with_one_array_has_no_y():
    with pytest.raises(AttributeError, match="holds only x"):
        _ = ArrayDataset(np.zeros(3)).y


def test_array_dataset_of_no_rows_keeps_the_shape():
    x, y = ArrayDataset(np.zeros((4, 3), np.float32), np.arange(4))[np.empty(0, np.int64)]
    assert x.shape == (0, 3)
    assert x.dtype == np.float32
    assert y.shape == (0,)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((), "no arrays"),
        ((np.zeros((5, 2)), np.zeros((4, 1))), r"5 examples of shape \(5, 2\).*4 of shape \(4, 1\).*must be equal"),
        ((np.zeros(3), np.float64(1)), r"shape \(\) .* as array 1"),
        ((np.array(["a", None], object),), "dtype object as array 0"),
    ],
)
def test_array_dataset_refuses(arrays, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataset(*arrays)


def test_take_makes_a_dataset_of_those_rows():
    dataset = ArrayDataset(np.arange(10), np.arange(10) * 2)
    assert dataset.take(np.array([7, 1])).y.tolist() == [14, 2]
    head = dataset.take(slice(0, 3))
    assert len(head) == 3
    assert np.shares_memory(head.x, dataset.x)


def test_memory_mapped_arrays_stay_memory_mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20.0).reshape(10, 2))
    dataset = ArrayDataset(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(10))
    assert isinstance(dataset.x, np.memmap)
    assert isinstance(dataset.take(slice(2, 5)).x, np.memmap)
    x, y = next(iter(Loader(dataset, batch_size=4, shuffle=False)))
    assert x.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert y.tolist() == [0, 1, 2, 3]


def test_repr_shows_shapes_and_dtypes():
    assert repr(ArrayDataset(np.zeros((2, 3), np.float32))) == "ArrayDataset((2, 3) float32)"


# order and share


def test_order_is_a_function_of_seed_and_epoch():
    first = order(seed=3, epoch=1, length=50)
    np.testing.assert_array_equal(first, order(seed=3, epoch=1, length=50))
    np.testing.assert_array_equal(np.sort(first), np.arange(50))
    assert not np.array_equal(first, order(seed=3, epoch=2, length=50))
    assert not np.array_equal(first, order(seed=4, epoch=1, length=50))
    np.testing.assert_array_equal(order(seed=3, epoch=1, length=5, shuffle=False), np.arange(5))


@pytest.mark.parametrize(("rows", "size"), list(itertools.product([0, 1, 2, 7, 8, 64, 101], range(1, 9))))
def test_share_splits_as_array_split_does(rows, size):
    parts = [np.arange(rows)[share(rows, rank, size)] for rank in range(size)]
    for part, expected in zip(parts, np.array_split(np.arange(rows), size), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(("rows", "rank", "size"), [(-1, 0, 1), (4, 2, 2), (4, -1, 2), (4, 0, 0)])
def test_share_refuses_a_rank_outside_the_world(rows, rank, size):
    with pytest.raises(ValueError, match="needs rows >= 0"):
        share(rows, rank, size)


# Loader


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize(("length", "batch_size"), [(1, 1), (3, 8), (5, 100), (37, 8), (40, 8), (41, 5), (10, 1)])
def test_every_example_is_served_once_an_epoch_in_the_same_global_batches(length, batch_size, size):
    served = serve(length, batch_size, size, epochs=2, seed=5)
    alone = serve(length, batch_size, 1, epochs=2, seed=5)[0]
    assert [len(batches) for batches in served] == [len(alone)] * size
    for shares, whole in zip(zip(*served, strict=True), alone, strict=True):
        lengths = [len(rows) for rows in shares]
        assert max(lengths) - min(lengths) <= 1
        np.testing.assert_array_equal(np.concatenate(shares), whole)
    for epoch in (alone[: len(alone) // 2], alone[len(alone) // 2 :]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(length))


def test_without_shuffle_the_order_is_the_datasets():
    assert [x.tolist() for x in serve(5, 2, 1, shuffle=False)[0]] == [[0, 1], [2, 3], [4]]


def test_an_empty_share_has_shape_and_dtype():
    dataset = ArrayDataset(np.zeros((2, 3), np.float32), np.zeros(2, np.int64))
    ((x, y),) = Loader(dataset, batch_size=8, comm=rank_of(2, 3))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((0, 3), np.float32, (0,), np.int64)


def test_each_iteration_is_the_next_epoch():
    loader = Loader(ArrayDataset(np.arange(20)), batch_size=20, seed=1)
    first = next(iter(loader))[0]
    assert loader.epoch == 1
    second = next(iter(loader))[0]
    assert loader.epoch == 2
    assert not np.array_equal(first, second)
    loader.epoch = 0
    np.testing.assert_array_equal(next(iter(loader))[0], first)
    np.testing.assert_array_equal(first, order(seed=1, epoch=0, length=20))


def test_batches_resumes_in_the_middle_of_an_epoch():
    loader = Loader(ArrayDataset(np.arange(23)), batch_size=4, seed=1, comm=rank_of(1, 2))
    whole = [x.tolist() for (x,) in loader.batches(3)]
    assert len(whole) == len(loader) == 6
    for start in range(7):
        assert [x.tolist() for (x,) in loader.batches(3, start=start)] == whole[start:]
    assert loader.epoch == 0


def test_batches_refuses_places_outside_the_epoch_at_once():
    loader = Loader(ArrayDataset(np.arange(4)), batch_size=2)
    for epoch, start in [(-1, 0), (0, -1), (0, 3)]:
        with pytest.raises(ValueError, match=f"epoch={epoch}, start={start}"):
            loader.batches(epoch, start)


@pytest.mark.parametrize(("length", "batches"), [(4, 1), (8, 2), (9, 2), (11, 2), (12, 3)])
def test_drop_last_leaves_out_the_smaller_batch(length, batches):
    loader = Loader(ArrayDataset(np.arange(length)), batch_size=4, drop_last=True)
    assert [len(x) for (x,) in loader] == [4] * batches
    assert len(loader) == batches


@pytest.mark.parametrize("size", [2, 3, 8])
def test_dropout_bits_follow_the_position_in_the_global_batch(size):
    dataset = ArrayDataset(np.arange(13))

    def masks(comm):
        """The random bits that two dropout layers of 5 units would draw for every batch of two epochs."""
        loader = Loader(dataset, batch_size=5, seed=2, comm=comm)
        return [[row_bits(len(x), 5) for _ in "ab"] for _ in range(2) for (x,) in loader]

    alone = masks(None)
    shares = [masks(rank_of(rank, size)) for rank in range(size)]
    for batch, layer in itertools.product(range(len(alone)), range(2)):
        joined = np.concatenate([rank[batch][layer] for rank in shares])
        np.testing.assert_array_equal(joined, alone[batch][layer])
    draws = [bits[0, 0] for batch in alone for bits in batch]
    assert len(set(draws)) == len(draws)  # no step or layer repeats another's


def test_dropout_bits_follow_the_seed():
    first, again, other = (
        [row_bits(3, 4).tolist() for _ in Loader(ArrayDataset(np.arange(6)), batch_size=3, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_resumed_epoch_draws_the_same_dropout_bits():
    loader = Loader(ArrayDataset(np.arange(12)), batch_size=3)
    whole = [row_bits(3, 4) for _ in loader.batches(1)]
    resumed = [row_bits(3, 4) for _ in loader.batches(1, start=2)]
    np.testing.assert_array_equal(resumed, whole[2:])


@pytest.mark.parametrize("batch_size", [2.0, "2", None, True])
def test_batch_size_must_be_an_integer(batch_size):
    with pytest.raises(TypeError, match="batch_size must be an integer, got"):
        Loader(ArrayDataset(np.arange(4)), batch_size=batch_size)


def test_batch_size_may_be_numpys_integer():
    assert len(Loader(ArrayDataset(np.arange(4)), batch_size=np.int64(3))) == 2


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (4, {"batch_size": 0}, "1 or more; got 0"),
        (4, {"batch_size": -2}, "1 or more; got -2"),
        (0, {"batch_size": 1}, "the dataset is empty"),
        (4, {"batch_size": 5, "drop_last": True}, "batch_size is 5 and there are 4"),
        (4, {"batch_size": 2, "seed": -1}, "the seed must be 0 or more"),
        (4, {"batch_size": 2, "shards": 0}, "shards is the number of pieces .*, 1 or more; got 0"),
    ],
)
def test_loader_refuses(length, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(ArrayDataset(np.arange(length)), **options)


def test_an_epoch_of_another_length_is_refused():
    """Its last rows would never be served, or its batches would have fewer rows than the ranks count on."""

    class Growing(ArrayDataset):
        def at_epoch(self, epoch):
            return ArrayDataset(np.arange(4 + epoch))

    loader = Loader(Growing(np.arange(4)), batch_size=2)
    assert len(list(loader)) == 2
    with pytest.raises(ValueError, match="epoch 1 of Growing has 5 examples, where it said 4"):
        list(loader)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: rows, r"Broken\[indices of shape \(2,\)\] returned ndarray"),
        (lambda rows: (rows, rows[:1]), r"returned \(\(2,\), \(1,\)\); .* each with 2 rows"),
    ],
)
def test_a_dataset_that_returns_something_else_is_named(answer, message):
    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, indices):
            return answer(indices)

    with pytest.raises(ValueError, match=message):
        next(iter(Loader(Broken(), batch_size=2)))


# the embedded digits


def test_digits_have_the_promised_shapes_and_values():
    train, test = load_digits()
    assert (train.x.shape, test.x.shape) == ((1437, 64), (360, 64))
    for part in (train, test):
        assert part.x.dtype == np.float32
        assert part.y.dtype == np.int64
        assert part.y.shape == (len(part),)
        assert np.isin(part.x * 16, np.arange(17)).all()
        assert np.unique(part.y).tolist() == list(range(10))
    assert train.x.max() == test.x.max() == 1


def test_digits_are_the_documented_data_in_a_fixed_order():
    rows = [np.column_stack([part.x * 16, part.y]).astype(np.uint8) for part in load_digits()]
    text = "".join(",".join(map(str, row)) + "\n" for row in np.concatenate(rows).tolist())
    documented = (resources.files("distprop.data") / "DIGITS.md").read_text()
    assert f"`{hashlib.sha256(text.encode()).hexdigest()}`" in documented


def test_digits_are_a_real_problem_with_an_honest_split():
    """The nearest training image has the test image's digit nearly always: rows and labels belong together."""
    train, test = load_digits()
    assert not set(map(bytes, train.x)) & set(map(bytes, test.x))
    distances = (train.x**2).sum(1) - 2 * test.x @ train.x.T
    accuracy = (train.y[distances.argmin(1)] == test.y).mean()
    assert 0.97 < accuracy < 1


def test_each_call_gives_arrays_of_its_own():
    load_digits()[0].x[:] = -1
    assert load_digits()[0].x.min() == 0


# the package


def test_names_are_exported():
    assert sorted(distprop.data.__all__) == [
        "ArrayDataset",
        "Augmented",
        "CharVocabulary",
        "Dataset",
        "Loader",
        "RandomCrop",
        "RandomHorizontalFlip",
        "RandomRotation",
        "RandomShift",
        "RandomWindows",
        "TextWindows",
        "ahead",
        "load_cifar10",
        "load_cifar100",
        "load_digits",
        "load_mnist",
        "read_idx",
    ]
    assert all(hasattr(distprop.data, name) for name in distprop.data.__all__)


def test_importing_the_package_loads_nothing_for_the_network():
    program = "import numpy, sys; old = set(sys.modules); import distprop.data; print(*set(sys.modules) - old)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "distprop.data.mnist" in loaded
    assert not {"mpi4py", "http.client", "urllib.request", "socket", "ssl", "gzip", "fcntl"} & set(loaded)
