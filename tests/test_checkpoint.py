"""Checkpoints survive a writer that is killed at any moment, and damage is found and named."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distprop import checkpoint
from distprop.checkpoint import Checkpoint, CheckpointError, Writer

TENSORS = {
    "model": {"0.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7)},
    "optimizer": {"momentum": np.linspace(0, 1, 5)},
}


def example(step: int) -> Checkpoint:
    return Checkpoint(step, TENSORS, {"epoch": 3, "seed": 1})


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path / "new" / "checkpoints", example(12))
    found = checkpoint.read(folder)
    assert (found.step, found.state) == (12, {"epoch": 3, "seed": 1})
    assert {part: set(arrays) for part, arrays in found.tensors.items()} == {
        part: set(arrays) for part, arrays in TENSORS.items()
    }
    for part, arrays in TENSORS.items():
        for name, array in arrays.items():
            assert found.tensors[part][name].dtype == array.dtype
            assert found.tensors[part][name].shape == array.shape
            assert np.array_equal(found.tensors[part][name], array)


def test_arrays_that_are_not_contiguous_keep_their_values(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(3, 4).T
    found = checkpoint.read(checkpoint.save(tmp_path, Checkpoint(1, {"model": {"w": array}}, {})))
    assert np.array_equal(found.tensors["model"]["w"], array)


def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), events.append(os.fstat(file).st_ino)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("named"), rename(path, target)))
    folder = checkpoint.save(tmp_path, example(1))
    *files, whole_folder, named, root = events
    assert sorted(files) == sorted(path.stat().st_ino for path in folder.iterdir())
    assert (whole_folder, named, root) == (folder.stat().st_ino, "named", tmp_path.stat().st_ino)


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(tmp_path: Path, name: str) -> None:
    folder = checkpoint.save(tmp_path, example(1))
    content = (folder / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    folder = checkpoint.save(tmp_path, example(1))
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(folder)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found_or_harmless(tmp_path: Path, name: str) -> None:
    folder = checkpoint.save(tmp_path, example(1))
    content = (folder / name).read_bytes()
    found = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / name).write_bytes(damaged)
        try:
            read = checkpoint.read(folder)
        except CheckpointError:
            found += 1
        else:  # white space of the manifest
            assert name == "manifest.json"
            assert read.state == example(1).state
            assert np.array_equal(read.tensors["model"]["0.weight"], TENSORS["model"]["0.weight"])
    assert found == len(content) or (name == "manifest.json" and found > 0.8 * len(content))


def test_a_file_that_lies_about_its_offsets_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, example(1))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4096]}}).encode()
    lying = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(lying)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(lying), "sha256": hashlib.sha256(lying).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.read(folder)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, example(1))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2; this version reads format 1"):
        checkpoint.read(folder)


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_reported(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, example(step))
    (tmp_path / "step-000000015" / "model.safetensors").write_bytes(b"damaged")
    reports: list[str] = []
    found = checkpoint.newest(tmp_path, reports.append)
    assert found is not None
    assert found.step == 10
    assert len(reports) == 1
    assert "step-000000015" in reports[0]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere", pytest.fail) is None


def test_saving_a_step_again_keeps_a_whole_one_and_replaces_a_damaged_one(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, example(1))
    written = (folder / "manifest.json").stat().st_mtime_ns
    checkpoint.save(tmp_path, example(1))
    assert (folder / "manifest.json").stat().st_mtime_ns == written
    (folder / "state.json").write_text("{}")
    checkpoint.save(tmp_path, example(1))
    assert checkpoint.read(folder).state == example(1).state


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, example(step))
    (tmp_path / ".step-000000009.partial").mkdir()
    checkpoint.prune(tmp_path, keep=2, also=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000004", "step-000000005"]


# A process that saves step 2 and dies at the n-th call of the functions that change the disk.
KILLED = """
import os, sys, pathlib, shutil
from distprop import checkpoint
sys.path.insert(0, {tests!r})
from test_checkpoint import example

fatal, count = int(sys.argv[2]), 0
def counted(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == fatal:
            os._exit(9)
        return function(*args, **kwargs)
    return call

os.fsync = counted(os.fsync)
for name in ("mkdir", "rename", "open"):
    setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
shutil.rmtree = counted(shutil.rmtree)
checkpoint.save(pathlib.Path(sys.argv[1]), example(2))
print("completed", count)
"""


def test_a_writer_killed_at_any_moment_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, example(1))
    script = KILLED.format(tests=str(Path(__file__).parent))
    for fatal in range(1, 100):
        answer = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), str(fatal)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        found = checkpoint.newest(tmp_path, pytest.fail)
        assert found is not None
        if answer.returncode == 0:
            assert found.step == 2
            break
        assert answer.returncode == 9, answer.stderr
        assert found.step in (1, 2)
    assert fatal > 12  # every one of the steps was reached


def on_a_small_disk(tmp_path: Path, kilobytes: int) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a file system")
    return disk


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path: Path) -> None:
    disk = on_a_small_disk(tmp_path, 256)
    try:
        checkpoint.save(disk, example(1))
        reports: list[str] = []
        writer = Writer(disk, report=reports.append)
        writer.write(Checkpoint(2, {"model": {"large": np.zeros(10**6)}}, {}))
        writer.wait()
        assert len(reports) == 1
        assert "the checkpoint of step 2 could not be written" in reports[0]
        assert "No space left" in reports[0]
        writer.write(example(3))  # there is room again for a small one
        writer.wait()
        assert len(reports) == 1
        found = checkpoint.newest(disk, pytest.fail)
        assert found is not None
        assert found.step == 3
        assert checkpoint.read(disk / "step-000000001").step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_read_only_folder_is_reported(tmp_path: Path) -> None:
    disk = on_a_small_disk(tmp_path, 256)
    try:
        checkpoint.save(disk, example(1))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        reports: list[str] = []
        writer = Writer(disk, report=reports.append)
        writer.write(example(2))
        writer.wait()
        assert len(reports) == 1
        assert "Read-only file system" in reports[0]
        assert checkpoint.newest(disk, pytest.fail) is not None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_writer_copies_before_training_goes_on(tmp_path: Path) -> None:
    array = np.zeros(3)
    writer = Writer(tmp_path)
    writer.write(Checkpoint(1, {"model": {"w": array}}, {}))
    array += 1
    writer.wait()
    assert np.array_equal(checkpoint.read(tmp_path / "step-000000001").tensors["model"]["w"], np.zeros(3))


def test_the_writer_knows_how_long_the_slowest_took(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    for expected in (0.0, 3600.0):
        writer.seconds = expected
        writer.write(example(int(expected)))
        writer.wait()
        assert writer.seconds > 0
    assert writer.seconds == 3600.0


def test_the_writer_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep=2)
    for step in range(1, 6):
        if step == 2:
            writer.best_step = 2
        writer.write(example(step))
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000004", "step-000000005"]
