import numpy as np
import pytest

from distprop.data import load_cifar10, load_cifar100

TRAIN10 = [f"data_batch_{number}.bin" for number in range(1, 6)]
ROWS = 3  # in each file


def records(rng, rows, *classes):
    labels = np.stack([rng.integers(0, count, rows) for count in classes], axis=1).astype(np.uint8)
    return np.concatenate([labels, rng.integers(0, 256, (rows, 3072), np.uint8)], axis=1)


@pytest.fixture
def files10(tmp_path, rng):
    """A small CIFAR-10: the records of each file, written into a folder."""
    made = {name: records(rng, ROWS, 10) for name in [*TRAIN10, "test_batch.bin"]}
    for name, array in made.items():
        (tmp_path / name).write_bytes(array.tobytes())
    return tmp_path, made


@pytest.fixture
def files100(tmp_path, rng):
    made = {name: records(rng, ROWS + 1, 20, 100) for name in ("train.bin", "test.bin")}
    for name, array in made.items():
        (tmp_path / name).write_bytes(array.tobytes())
    return tmp_path, made


def assert_is(dataset, rows, column, labels_a_record):
    assert dataset.x.dtype == np.float32
    assert dataset.y.dtype == np.int64
    assert dataset.y.tolist() == rows[:, column].tolist()
    pixels = rows[:, labels_a_record:].reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(dataset.x, pixels.astype(np.float32) / np.float32(255))


def test_cifar10_is_its_files_in_order(files10):
    folder, made = files10
    train, test = load_cifar10(folder)
    assert_is(train, np.concatenate([made[name] for name in TRAIN10]), 0, 1)
    assert_is(test, made["test_batch.bin"], 0, 1)
    assert train.x.shape == (5 * ROWS, 3, 32, 32)
    assert train.x.min() >= 0
    assert train.x.max() <= 1


def test_a_record_is_red_green_blue_row_by_row(files10):
    folder, _ = files10
    record = np.zeros(3073, np.uint8)
    record[0], record[1 + 2 * 1024 + 5 * 32 + 7] = 4, 255
    (folder / "test_batch.bin").write_bytes(record.tobytes())
    _, test = load_cifar10(str(folder))
    assert np.argwhere(test.x).tolist() == [[0, 2, 5, 7]]
    assert test.x.max() == 1
    assert test.y.tolist() == [4]


@pytest.mark.parametrize(("options", "column"), [({}, 1), ({"labels": "fine"}, 1), ({"labels": "coarse"}, 0)])
def test_cifar100_has_fine_and_coarse_labels(files100, options, column):
    folder, made = files100
    for dataset, name in zip(load_cifar100(folder, **options), ("train.bin", "test.bin"), strict=True):
        assert_is(dataset, made[name], column, 2)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_the_files_are_found_below_distprop_data(files10, tmp_path_factory, inner, monkeypatch):
    folder, made = files10
    data = tmp_path_factory.mktemp("data")
    (data / "cifar10" / inner).mkdir(parents=True)
    for name in made:
        (folder / name).rename(data / "cifar10" / inner / name)
    monkeypatch.setenv("DISTPROP_DATA", str(data))
    train, _ = load_cifar10()
    assert len(train) == 5 * ROWS
    assert len(load_cifar10(data / "cifar10")[1]) == ROWS


def test_cifar100_is_found_in_the_folder_of_its_archive(files100, tmp_path_factory, monkeypatch):
    folder, _ = files100
    data = tmp_path_factory.mktemp("data")
    (data / "cifar100").mkdir()
    folder.rename(data / "cifar100" / "cifar-100-binary")
    monkeypatch.setenv("DISTPROP_DATA", str(data))
    assert len(load_cifar100()[0]) == ROWS + 1


def test_without_root_and_variable_it_says_so(monkeypatch):
    monkeypatch.delenv("DISTPROP_DATA", raising=False)
    for load, name in ((load_cifar10, "cifar10"), (load_cifar100, "cifar100")):
        with pytest.raises(FileNotFoundError, match=f"load_{name} needs a root, or DISTPROP_DATA set .* {name} in it"):
            load()


def test_missing_files_are_named_with_where_to_get_them(files10, files100):
    folder, _ = files10
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_cifar10(folder)
    text = str(error.value)
    assert f"{folder}: lacks data_batch_3.bin\n" in text
    assert f"{folder / 'cifar-10-batches-bin'}: no such folder" in text
    assert "cifar-10-binary.tar.gz" in text
    assert "University of Toronto" in text
    with pytest.raises(FileNotFoundError, match=r"cifar-100-binary\.tar\.gz"):
        load_cifar100(folder / "nowhere")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data_batch_2.bin", lambda content: content[:-1], r"data_batch_2.bin is truncated: 9218 bytes, .* 3073 each"),
        ("test_batch.bin", lambda content: b"", "test_batch.bin is empty: 0 bytes"),
        ("test_batch.bin", lambda content: content[:3073] + b"\x0a" + content[3074:], "label 10 in record 1; .* 0..9"),
    ],
)
def test_damaged_files_are_refused(files10, name, change, message):
    folder, made = files10
    (folder / name).write_bytes(change(made[name].tobytes()))
    with pytest.raises(ValueError, match=message):
        load_cifar10(folder)


@pytest.mark.parametrize(("column", "label", "last"), [(0, 20, 19), (1, 100, 99)])
def test_cifar100_checks_both_labels_whichever_are_asked_for(files100, column, label, last):
    folder, made = files100
    made["train.bin"][2, column] = label
    (folder / "train.bin").write_bytes(made["train.bin"].tobytes())
    for labels in ("fine", "coarse"):
        with pytest.raises(ValueError, match=f"label {label} in record 2; its labels are 0..{last}"):
            load_cifar100(folder, labels=labels)


def test_other_labels_are_refused(tmp_path):
    with pytest.raises(ValueError, match='"fine" or "coarse", got \'medium\''):
        load_cifar100(tmp_path, labels="medium")
