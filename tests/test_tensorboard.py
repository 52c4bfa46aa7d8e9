"""TensorBoard's event files, read back: every number of metrics.jsonl is in them, to float32's precision."""

import json
import math
import struct
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import distprop as dp
from distprop import functional as F
from distprop import nn, optim
from distprop.cli import main
from distprop.comm import SoloCommunicator, run_threads
from distprop.logs import lines_of, scalars
from distprop.metrics import METRICS
from distprop.rundir import read_run
from test_fingerprint import dataset
from test_logs import HEALTH, VERDICT
from test_rundir import step, train, write

pytest.importorskip("tensorboardX")
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder: Path) -> list[Event]:
    """TFRecord: the length and its checksum, the event and its checksum."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked(data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    assert found[0].file_version == "brain.Event:2"
    return found[1:]


def numbers(found: list[Event]) -> list[tuple[int, str, float]]:
    return [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value if not v.HasField("tensor")]


def promised(run_dir: Path) -> list[tuple[int, str, float]]:
    lines = lines_of(read_run(run_dir))
    return [(line["step"], tag, float(np.float32(v))) for line in lines for tag, v in scalars(line).items()]


def same(found: list, wanted: list) -> bool:
    """In any order of lines of one step; NaN equals NaN."""
    assert wanted
    key = [[(s, t, "nan" if math.isnan(v) else v) for s, t, v in side] for side in (found, wanted)]
    return sorted(key[0], key=str) == sorted(key[1], key=str)


def test_an_export_has_every_number_and_verdict(tmp_path: Path) -> None:
    run_threads(2, lambda comm: train(comm, tmp_path, steps=12))
    with (tmp_path / METRICS).open("a") as file:
        file.write(json.dumps(HEALTH) + "\n" + json.dumps(VERDICT) + "\n")
    target = tmp_path / "board"
    answer = CliRunner().invoke(main, ["export", str(tmp_path), "--tensorboard", str(target)])
    assert (answer.exit_code, answer.stderr) == (0, "")
    found = events(target)
    assert answer.stdout == f"{target}: {len(found)} events\n"
    assert same(numbers(found), promised(tmp_path))
    (text,) = [v for e in found for v in e.summary.value if v.HasField("tensor")]
    assert text.tensor.string_val[0].decode() == VERDICT["verdict"]["text"]
    began = datetime.fromisoformat(read_run(tmp_path).sessions[0]["began"]).timestamp()
    steps = [e for e in found if any(v.tag == "loss" for v in e.summary.value)]
    times = [e.wall_time - began for e in steps]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(sum(line["seconds"] for line in read_run(tmp_path).steps), abs=1e-3)


def test_the_callback_writes_what_metrics_jsonl_gets(tmp_path: Path) -> None:
    from distprop.tensorboard import TensorBoard

    def body(comm) -> None:
        dp.manual_seed(0)
        model = nn.Linear(4, 3)
        trainer = dp.Trainer(
            model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), comm=comm, batch_size=8, progress=False,
            run_dir=tmp_path, callbacks=[TensorBoard(tmp_path / "board")],
        )  # fmt: skip
        trainer.fit(dataset(), epochs=2, validation=dataset())
        trainer.fit(dataset(), epochs=1, validation=dataset())

    run_threads(2, body)
    assert same(numbers(events(tmp_path / "board")), promised(tmp_path))  # one file: rank 0's


def test_it_needs_no_run_dir(tmp_path: Path) -> None:
    from distprop.tensorboard import TensorBoard

    train(SoloCommunicator(), None, steps=3, callbacks=[TensorBoard(tmp_path / "board")])
    assert {s for s, tag, _ in numbers(events(tmp_path / "board")) if tag == "loss"} == {1, 2, 3}


def test_a_folder_with_event_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    assert CliRunner().invoke(main, ["export", str(tmp_path), "--tensorboard", str(tmp_path)]).exit_code == 0
    answer = CliRunner().invoke(main, ["export", str(tmp_path), "--tensorboard", str(tmp_path)])
    assert answer.exit_code == 2
    assert f"{tmp_path} has event files of TensorBoard already; give a new folder" in answer.stderr
    assert len(events(tmp_path)) == 1


def test_without_tensorboardx_the_extra_is_named_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path, step(1))
    code = (
        "import sys; sys.modules['tensorboardX'] = None\n"
        "from distprop.cli import main\n"
        f"main(['export', {str(tmp_path)!r}, '--tensorboard', {str(tmp_path / 'board')!r}])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    message = 'Error: TensorBoard event files need tensorboardX: pip install "distprop[tensorboard]"\n'
    assert answer.stderr == message
    assert not (tmp_path / "board").exists()
