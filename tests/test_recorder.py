"""The flight recorder: what it keeps, who can read it, and what the one message of a lost job says."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from distprop.comm import CollectiveError, SoloCommunicator, recorder
from distprop.comm.recorder import BACKWARD, RING, Record
from distprop.data import ArrayDataset
from distprop.evaluation import EVALUATION_ROWS
from distprop.witness import Witness
from test_launch import wait_until
from test_resume import dataset, make_trainer


def test_the_ring_keeps_the_last_collectives() -> None:
    record = Record()
    record.at(BACKWARD, 12)
    for number in range(1, RING + 4):
        record.enter(b"allreduce", 10 * number)
        record.leave()
    record.enter(b"barrier", 0)
    snapshot = recorder.read(record.memory)
    assert (snapshot.place, snapshot.sequence, snapshot.inside) == ("step 12, backward pass", RING + 4, True)
    assert list(snapshot.ring) == list(range(5, RING + 5))
    assert snapshot.ring[RING + 3] == ("allreduce", 10 * (RING + 3), "")
    assert snapshot.line().endswith("; 19 allreduce 190; 20 barrier 0 (in it)")


def test_a_collective_that_raised_is_one_the_rank_is_still_in() -> None:
    record = Record()
    record.enter(b"allreduce", 8)
    record.fail()
    assert recorder.read(record.memory).inside
    assert (record.inside, record.failed) == (False, True)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (
            [(b"allreduce", 16, b"float32"), (b"allreduce", 16, b"int32")],
            "rank 0 called allreduce of 16 bytes of float32 as collective 1, where rank 1 called allreduce of 16 bytes "
            "of int32; all ranks must",
        ),
        ([(b"broadcast", 16), (b"broadcast", 24)], "called broadcast of 16 bytes as .* called broadcast of 24 bytes"),
        ([(b"barrier", 0), (b"allgather", 2)], "called barrier as .* called allgather"),
        ([(b"allreduce", 16), (b"allreduce", 16)], None),
        ([(b"allgather", 16), (b"allgather", 3)], None),
    ],
)
def test_a_call_that_is_not_the_neighbours_is_an_error_also_where_mpi_completes_both(calls, said) -> None:
    record, neighbour = Record(), Record()
    record.peers, record.neighbour = {1: neighbour.memory}, 1
    record.enter(*calls[0])
    record.compare()  # the neighbour has not come yet
    neighbour.enter(*calls[1])
    for _ in range(RING):
        with pytest.raises(CollectiveError, match=said) if said else nullcontext():
            record.compare()
        neighbour.leave()
        neighbour.enter(b"barrier", 0)
    record.compare()  # it is far ahead


def test_what_a_script_does_after_fit_is_no_longer_a_phase_of_it(tmp_path: Path) -> None:
    trainer = make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=2)
    for _ in range(2):
        trainer.fit(dataset(), steps=3)
        assert trainer.evaluate(dataset())["loss"] > 0
    assert recorder.read(recorder.here.memory).place == "step 6, after fit"


def test_each_block_of_an_evaluation_is_progress(tmp_path: Path) -> None:
    rows = 3 * EVALUATION_ROWS
    trainer, begun = make_trainer(SoloCommunicator(), tmp_path), recorder.here.phases
    trainer.evaluate(ArrayDataset(np.zeros((rows, 6), np.float32), np.zeros(rows, np.int64)))
    assert recorder.here.phases - begun >= 3 + 2  # and its begin and end


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match=f"a record has {recorder.LENGTH} bytes, not 3"):
        recorder.read(b"abc")


def test_a_record_without_a_launcher_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(recorder.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(recorder, "memory_folder", lambda: str(tmp_path))
    record = Record()
    record.connect(SoloCommunicator())
    record.at(BACKWARD, 3)
    assert recorder.read(record.memory).place == "step 3, backward pass"
    assert list(tmp_path.iterdir()) == []


def test_a_record_stays_with_its_process_where_no_file_can_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "no folder").write_text("")
    monkeypatch.delenv(recorder.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(recorder, "memory_folder", lambda: str(tmp_path / "no folder"))
    record = Record()
    record.connect(SoloCommunicator())
    record.at(BACKWARD, 3)
    assert recorder.read(record.memory).place == "step 3, backward pass"


def test_a_record_that_is_in_its_file_already_stays_there(tmp_path: Path) -> None:
    """The connection to the launcher is to be the file opened last, so nothing may be closed before it."""
    record = Record()
    record.keep(str(tmp_path), 1, 2)
    memory = record.memory
    record.keep(str(tmp_path), 1, 2)
    record.at(BACKWARD, 3)
    assert record.memory is memory
    assert [(found.rank, found.place) for found in recorder.records(str(tmp_path))] == [(1, "step 3, backward pass")]


def test_the_report_names_rank_host_step_phase_and_reason() -> None:
    record = Record()
    recorder._HEADER.pack_into(record.memory, 0, b"distprop", 2, 4, 77, b"node7")
    record.at(BACKWARD, 12)
    record.enter(b"allreduce", 1234)
    lines = recorder.report((2,), "ValueError: boom", {2: recorder.read(record.memory)}, "Traceback").splitlines()
    assert lines[1] == "distprop: rank 2 of 4 on node7, step 12, backward pass: ValueError: boom; ending the job"
    assert lines[3] == "  rank 2, step 12, backward pass: 1 allreduce 1,234 (in it)"
    assert lines[-1] == "Traceback"


RANK = """
import os, sys, time
from distprop.comm import SoloCommunicator
from distprop.comm.recorder import FORWARD, Record
class One(SoloCommunicator):
    rank = int(sys.argv[1])
    def allgather(self, message): return [message] * 3
record = Record()
record.connect(One())
record.at(FORWARD, 5)
if os.fork() == 0:  # a child that outlives its rank
    print("ready", flush=True)
    os.close(1)
    time.sleep(5)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="only Linux tells the order of deaths")
@pytest.mark.parametrize("looks", [True, False], ids=["seen alive", "never seen alive"])
def test_the_launcher_names_the_rank_that_died_first(looks: bool) -> None:
    witness = Witness()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(number)],
            env={**os.environ, **witness.environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in ranks:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    assert wait_until(lambda: len(witness._ranks) == 3, 60)  # a thread of its own has to be there in time
    if looks:
        witness.look()
    for number in (1, 2, 0) if looks else (1,):
        ranks[number].kill()
        ranks[number].wait()
    report = witness.report(137)
    folder = witness.folder
    witness.close()
    for process in ranks:
        process.kill()
        process.communicate()
    assert f"rank 1 of 1 on {os.uname().nodename}, step 5, forward pass: killed by SIGKILL" in report
    assert not folder.exists()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="only Linux tells the order of deaths")
def test_a_rank_that_dies_before_it_has_said_its_number_is_passed_over() -> None:
    witness = Witness()
    with socket.socket(socket.AF_UNIX) as rank:
        rank.connect(str(witness.folder / recorder.LAUNCHER))
    assert witness.report(137) == ""
    witness.close()


def test_a_folder_whose_path_is_too_long_for_a_socket_costs_the_order_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(recorder, "memory_folder", lambda: str(long))
    witness = Witness()
    assert (witness.folder / recorder.LAUNCHER).exists()
    assert witness.report(137) == ""
    witness.close()
    assert list(long.iterdir()) == []


MOUNTED = """
from pathlib import Path
import numpy as np
from distprop.comm import world

assert not list(Path("/dev/shm").glob("distprop-*"))
print(world().allreduce(np.ones(1))[0], flush=True)
"""


@pytest.mark.parametrize("options", ["size=64k", "size=16m", "ro"])
def test_a_job_starts_where_shared_memory_has_no_room_or_cannot_be_written(options: str, tmp_path: Path) -> None:
    """A /dev/shm of its own, in a name space of its own, as in a container."""
    script = tmp_path / "job.py"
    script.write_text(MOUNTED)
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    if subprocess.run([*alone, "mount -t tmpfs tmpfs /dev/shm"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything, in a name space of its own either")
    command = f"mount -t tmpfs -o {options} tmpfs /dev/shm; {sys.executable} -m distprop run -n 2 {script}"
    environment = {**os.environ, "DISTPROP_TIMEOUT": "20"}
    job = subprocess.run([*alone, command], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (job.returncode, job.stdout) == (0, "2.0\n2.0\n"), job.stderr
