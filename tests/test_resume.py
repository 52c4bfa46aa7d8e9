"""A run that was interrupted goes on as if nothing had happened, on any number of ranks."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import distprop as dp
from distprop import checkpoint, nn, optim
from distprop import functional as F
from distprop.checkpoint import CheckpointError
from distprop.comm import SoloCommunicator, run_threads
from distprop.fingerprint import FINGERPRINTS

ROWS = 56


def dataset() -> dp.data.ArrayDataset:
    rng = np.random.default_rng(0)
    return dp.data.ArrayDataset(rng.normal(size=(ROWS, 6)).astype(np.float32), rng.integers(0, 3, ROWS))


def make_trainer(comm: dp.comm.Communicator, run_dir: Path, **options) -> dp.Trainer:
    dp.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = optim.SGD(model.parameters(), lr=optim.schedule.cosine(0.2, 40), momentum=0.9)
    options = {
        "batch_size": 8,
        "shards": 2,
        "seed": 3,
        "deterministic": True,
        "checkpoint_every": 5,
        "progress": False,
    } | options
    return dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, run_dir=run_dir, **options)


def parameters(trainer: dp.Trainer) -> bytes:
    return b"".join(array.tobytes() for array in trainer.model.state_dict().values())


def lines(run_dir: Path) -> list[dict]:
    """The metrics without the times, which differ."""
    text = (run_dir / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


def test_numpys_numbers_are_saved_and_resumed_as_pythons(tmp_path: Path) -> None:
    """As options of the optimizer, and as settings; JSON cannot say them."""

    def run(folder: Path, number, steps: int, **options) -> bytes:
        dp.manual_seed(0)
        model = nn.Linear(6, 3)
        betas, weight_decay = (number(np.float64(0.9)), 0.75), number(np.float32(0.5))
        optimizer = optim.Adam(model.parameters(), lr=number(np.float32(0.5)), betas=betas, weight_decay=weight_decay)
        numbers = {"batch_size": number(np.int64(8)), "seed": number(np.int32(3)), "accumulate": number(np.uint8(2))}
        numbers |= {"clip_norm": number(np.float32(0.5)), "checkpoint_every": 2}
        trainer = dp.Trainer(model, F.cross_entropy, optimizer, run_dir=folder, progress=False, **numbers, **options)
        trainer.fit(dataset(), steps=steps)
        return parameters(trainer)

    expected = run(tmp_path / "plain", lambda value: value.item(), 6)
    run(tmp_path / "numpy", lambda value: value, 4)
    assert len(list((tmp_path / "numpy/checkpoints").glob("step-*"))) == 2
    assert run(tmp_path / "numpy", lambda value: value, 6, resume=True) == expected


class Interruption(Exception):  # noqa: N818 - it is no error
    pass


def interrupt_at(step: int):
    def callback(result: dp.StepResult) -> None:
        if result.step == step:
            raise Interruption

    return callback


def interrupted_and_resumed(run_dir: Path, ranks_before: int, ranks_after: int, at: int) -> bytes:
    """Interrupt a run of 4 epochs (28 steps) after step `at`, and resume it."""

    def before(comm: dp.comm.Communicator) -> None:
        trainer = make_trainer(comm, run_dir, callbacks=[interrupt_at(at)])
        try:
            trainer.fit(dataset(), epochs=4, validation=dataset())
        finally:
            trainer._checkpoints.wait()

    def after(comm: dp.comm.Communicator) -> bytes:
        trainer = make_trainer(comm, run_dir, resume=True)
        assert trainer.step == at // 5 * 5 or trainer.step % 7 == 0  # every 5 steps, and at the end of an epoch if best
        trainer.fit(dataset(), epochs=4, validation=dataset())
        assert trainer.step == 28
        return parameters(trainer)

    with pytest.raises(Interruption):
        run_threads(ranks_before, before)
    results = run_threads(ranks_after, after)
    assert len(set(results)) == 1
    return results[0]


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 1), (2, 3), (3, 1), (1, 4)])
@pytest.mark.parametrize("at", [6, 17, 27])
def test_a_resumed_run_ends_in_the_bits_of_the_uninterrupted_one(
    ranks_before: int, ranks_after: int, at: int, tmp_path: Path
) -> None:
    whole = make_trainer(SoloCommunicator(), tmp_path / "whole")
    whole.fit(dataset(), epochs=4, validation=dataset())
    found = interrupted_and_resumed(tmp_path / "parts", ranks_before, ranks_after, at)
    assert found == parameters(whole)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert (tmp_path / "parts" / FINGERPRINTS).read_bytes() == (tmp_path / "whole" / FINGERPRINTS).read_bytes()
    newest = [checkpoint.newest(tmp_path / part / "checkpoints", pytest.fail) for part in ("whole", "parts")]
    assert newest[0].state == newest[1].state
    for part in ("model", "optimizer"):
        for name, array in newest[0].tensors[part].items():
            assert array.tobytes() == newest[1].tensors[part][name].tobytes()


@pytest.mark.parametrize("at", [2, 7, 9, 14, 17, 20])
def test_a_program_of_several_calls_of_fit_ends_in_the_bits_of_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    """Calls that were complete make no step, whether the interruption came in the first one or later."""

    def program(folder: Path, **options) -> dp.Trainer:
        trainer = make_trainer(SoloCommunicator(), folder, checkpoint_every=2, **options)
        for number in range(4):
            trainer.fit(dataset(), **({"steps": 4} if number == 2 else {"epochs": 1}))
        return trainer

    whole = program(tmp_path / "whole")
    with pytest.raises(Interruption):
        program(tmp_path / "parts", callbacks=[interrupt_at(at)])
    resumed = program(tmp_path / "parts", resume=True)
    assert (resumed.step, resumed.epoch) == (whole.step, whole.epoch) == (21, 3)
    assert parameters(resumed) == parameters(whole)
    again = program(tmp_path / "parts", resume=True)
    assert (again.step, parameters(again)) == (21, parameters(whole))


@pytest.mark.parametrize("stop_at", [4, 5, 7])  # 5 has a checkpoint of its own, 7 is the end of an epoch
def test_a_call_of_fit_that_a_callback_ended_is_complete(stop_at: int, tmp_path: Path) -> None:
    def program(folder: Path, fails: bool = False, **options) -> bytes:
        trainer = make_trainer(SoloCommunicator(), folder, callbacks=[lambda r: r.step == stop_at], **options)
        trainer.fit(dataset(), epochs=3, validation=dataset())
        assert trainer.step == stop_at
        trainer.callbacks.clear()
        if fails:
            raise Interruption
        trainer.fit(dataset(), steps=5)
        return parameters(trainer)

    whole = program(tmp_path / "whole")
    with pytest.raises(Interruption):
        program(tmp_path / "parts", fails=True)
    assert program(tmp_path / "parts", resume=True) == whole


@pytest.mark.parametrize("sharded_update", [False, True])
@pytest.mark.parametrize("fails_at", [4, 6, 8, 9, 10, 11, 13])
def test_what_is_changed_between_calls_of_fit_is_changed_once(
    fails_at: int, sharded_update: bool, tmp_path: Path
) -> None:
    """It is in the checkpoint, or it comes after it; the second call is ended by a callback."""

    def program(trainer: dp.Trainer, comm: dp.comm.Communicator) -> bytes:
        trainer.fit(dataset(), steps=5)
        trainer.optimizer.param_groups[0]["momentum"] *= 0.5
        if comm.rank == 0 or not sharded_update:
            trainer.model[4].weight.data *= 0.5
        comm.barrier()
        trainer.fit(dataset(), steps=20)
        assert trainer.step >= 10
        trainer.optimizer.param_groups[0]["momentum"] *= 0.5
        trainer.fit(dataset(), steps=4)
        trainer.fit(dataset(), steps=1)
        return parameters(trainer)

    def train(comm: dp.comm.Communicator, folder: Path, fails_at: int = 0, **options) -> bytes:
        callbacks = [interrupt_at(fails_at), lambda r: r.step == 10]
        options |= {"checkpoint_every": 3, "sharded_update": sharded_update}
        trainer = make_trainer(comm, folder, callbacks=callbacks, **options)
        try:
            return program(trainer, comm)
        finally:
            trainer._checkpoints.wait()

    def on_2_ranks(*args, **options) -> bytes:
        results = run_threads(2, lambda comm: train(comm, *args, **options), share_memory=True)
        assert results[0] == results[1]
        return results[0]

    whole = on_2_ranks(tmp_path / "whole")
    with pytest.raises(Interruption):
        on_2_ranks(tmp_path / "parts", fails_at=fails_at)
    assert on_2_ranks(tmp_path / "parts", resume=True) == whole


def test_calls_of_fit_that_return_at_once_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(SoloCommunicator(), tmp_path)
    for _ in range(3):
        trainer.fit(dataset(), steps=2)
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    assert resumed.fit(dataset(), steps=2) == []
    assert "distprop: goes on with step 7; 2 calls of fit() before it return at once\n" in capsys.readouterr().err


def test_a_run_is_resumed_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(SoloCommunicator(), tmp_path, fingerprint=False).fit(dataset(), steps=7)
    (tmp_path / "checkpoints/step-000000007").rename(tmp_path / "elsewhere")
    before, (soft, hard) = lines(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))  # no file grows beyond 50 bytes
    try:
        trainer = make_trainer(SoloCommunicator(), tmp_path, fingerprint=False, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trainer.step == 5
    assert re.search(r"distprop: lines after step 5 stay in \S+metrics\.jsonl: .*too large", capsys.readouterr().err)
    assert lines(tmp_path) == before
    assert not list(tmp_path.glob("*.partial"))


def test_damaged_checkpoints_are_an_error_on_every_rank(tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=7)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{")

    def refused(comm: dp.comm.Communicator) -> bool:
        with pytest.raises(CheckpointError, match=r"all 2 checkpoints in \S+ are damaged"):
            make_trainer(comm, tmp_path, resume=True)
        return True

    assert run_threads(3, refused, timeout_seconds=20) == [True] * 3


def test_parameters_that_an_update_made_infinite_are_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their gradients were finite; a run that is resumed, with the rate mended, begins before that update."""

    def run(steps: int, rate: float, **options) -> dp.Trainer:
        trainer = make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=1, **options)
        trainer.optimizer.param_groups[0]["lr"] = lambda step: rate if step == 6 else 0.1
        with np.errstate(all="ignore"):
            trainer.fit(dataset(), steps=steps)
        return trainer

    run(7, rate=1e39)
    assert re.search(r"distprop: 0\.\w+ is not finite after step 7: no checkpoint is written", capsys.readouterr().err)
    assert run(7, rate=0.1, resume=True).step == 7
    assert np.isfinite(checkpoint.newest(tmp_path / "checkpoints", pytest.fail).tensors["model"]["0.weight"]).all()


def test_every_example_is_seen_once_an_epoch_across_an_interruption(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watched:
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, indices):
            seen.extend(indices.tolist())
            return dataset()[indices]

    trainer = make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=1, callbacks=[interrupt_at(4)])
    with pytest.raises(Interruption):
        trainer.fit(Watched(), epochs=1)
    trainer._checkpoints.wait()
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    last = resumed.step  # the callback raised before step 4 was written
    assert last == 3
    del seen[last * 8 :]
    resumed.fit(Watched(), epochs=1)
    assert sorted(seen) == list(range(ROWS))


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=12)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    assert resumed.step == resumed.parallel.reductions == 10
    message = capsys.readouterr().err
    assert str(newest / "model.safetensors") in message
    assert "SHA-256" in message


def test_if_all_are_damaged_nothing_is_started_over(tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=12)
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"all 3 checkpoints in .* are damaged"):
        make_trainer(SoloCommunicator(), tmp_path, resume=True)


def test_a_new_run_does_not_write_into_the_folder_of_another(tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=3)
    with pytest.raises(ValueError, match="holds checkpoints of another run; pass resume=True"):
        make_trainer(SoloCommunicator(), tmp_path)


def test_resuming_without_a_checkpoint_starts_at_the_beginning_and_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Interruption):
        make_trainer(SoloCommunicator(), tmp_path, callbacks=[interrupt_at(3)], profile=1).fit(dataset(), epochs=1)
    before, hashes = (tmp_path / "metrics.jsonl").read_text(), (tmp_path / FINGERPRINTS).read_bytes()
    trainer = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    assert trainer.step == 0
    aside = "metrics-before-1.jsonl, fingerprints-before-1.jsonl, trace-before-1.json"
    assert f"has no checkpoint to go on from and starts anew; before: {aside}" in capsys.readouterr().err
    assert not (tmp_path / "trace.json").exists()
    assert (tmp_path / "metrics-before-1.jsonl").read_text() == before != ""
    assert (tmp_path / "fingerprints-before-1.jsonl").read_bytes() == hashes != b""
    trainer.fit(dataset(), steps=2)
    assert trainer.step == 2
    steps = [line["step"] for line in lines(tmp_path) if "health" not in line]
    assert steps == [1, 2, 2]  # two steps and what there is of the epoch


@pytest.mark.parametrize(("option", "value"), [("seed", 4), ("batch_size", 10), ("shards", 4), ("accumulate", 2)])
def test_resuming_with_other_settings_is_refused(option: str, value: int, tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=3)
    with pytest.raises(ValueError, match=rf"{option} was \d+, is {value}"):
        make_trainer(SoloCommunicator(), tmp_path, resume=True, **{option: value})


def test_a_completed_run_is_not_trained_further_by_resuming(tmp_path: Path) -> None:
    first = make_trainer(SoloCommunicator(), tmp_path)
    first.fit(dataset(), epochs=2)
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    assert resumed.fit(dataset(), epochs=2) == []
    assert parameters(resumed) == parameters(first)
    resumed.fit(dataset(), epochs=1)  # a further call is a further epoch
    assert resumed.epoch == 3


def test_the_metrics_up_to_a_checkpoint_are_on_the_disk_when_it_is_written(tmp_path: Path) -> None:
    """A job that is killed then is resumed from there, and its steps before are made no second time."""
    found = []

    def look(result: dp.StepResult) -> None:
        if result.step == 5:
            found.extend(line["step"] for line in lines(tmp_path))

    make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=4, health=False, callbacks=[look]).fit(
        dataset(), steps=5
    )
    assert found[:4] == [1, 2, 3, 4]


def test_a_checkpoint_is_expected_to_take_some_time_before_one_was_written(tmp_path: Path) -> None:
    """A job that has little time left stops early enough for it."""
    assert make_trainer(SoloCommunicator(), tmp_path)._checkpoints.seconds > 0


def test_a_checkpoint_that_is_due_at_the_end_of_an_epoch_is_of_the_next_one(tmp_path: Path) -> None:
    """Not the best one, and not of an epoch whose line in the metrics would be written twice."""
    whole = make_trainer(SoloCommunicator(), tmp_path / "whole", checkpoint_every=7)
    whole.fit(dataset(), epochs=2)
    first = make_trainer(SoloCommunicator(), tmp_path / "parts", checkpoint_every=7, callbacks=[interrupt_at(9)])
    with pytest.raises(Interruption):
        first.fit(dataset(), epochs=2)
    first._checkpoints.wait()
    resumed = make_trainer(SoloCommunicator(), tmp_path / "parts", checkpoint_every=7, resume=True)
    assert (resumed.step, resumed.epoch, resumed.batch) == (7, 1, 0)
    resumed.fit(dataset(), epochs=2)
    assert parameters(resumed) == parameters(whole)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=3)
    results = trainer.fit(dataset(), epochs=6, validation=dataset())
    losses = [result.validation["loss"] for result in results]
    best_step = 7 * (1 + int(np.argmin(losses)))
    assert f"step-{best_step:09d}" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_the_best_checkpoint_is_kept_after_a_resume(tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=3).fit(dataset(), epochs=1, validation=dataset())
    resumed = make_trainer(SoloCommunicator(), tmp_path, checkpoint_every=3, resume=True)
    resumed._best_loss = 0.0  # nothing that follows is better
    resumed.fit(dataset(), epochs=1)
    resumed.fit(dataset(), epochs=3)
    assert "step-000000007" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_the_best_checkpoint_is_known_after_a_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    first = make_trainer(SoloCommunicator(), tmp_path)
    first.fit(dataset(), steps=10, validation=dataset())  # where a checkpoint is due, too
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    assert resumed.step == 10
    assert resumed._best_loss == first._best_loss < np.inf
    resumed._best_loss = 0.0  # nothing that follows is better
    resumed.fit(dataset(), steps=40, validation=dataset())
    assert "step-000000010" in {path.name for path in (tmp_path / "checkpoints").iterdir()}


def test_a_resumed_run_ends_where_it_should_after_a_call_that_was_refused(tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=10)
    resumed = make_trainer(SoloCommunicator(), tmp_path, resume=True)
    with pytest.raises(ValueError, match="the rest of it is not in a dataset of 40"):
        resumed.fit(dp.data.ArrayDataset(*dataset()[np.arange(40)]), epochs=2)
    resumed.fit(dataset(), epochs=2)
    assert (resumed.epoch, resumed.step) == (2, 14)


def test_a_damaged_byte_in_the_metrics_is_no_obstacle(tmp_path: Path) -> None:
    make_trainer(SoloCommunicator(), tmp_path).fit(dataset(), steps=10)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"\xff\xfe\n" + metrics.read_bytes() + b'{"step": 9, "note": "\xff"}\n')
    make_trainer(SoloCommunicator(), tmp_path, resume=True)
    kept = metrics.read_bytes().splitlines()
    assert kept[0].startswith(b'{"')
    assert kept[-1] == b'{"step": 9, "note": "\xff"}'


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import distprop as dp
from test_resume import dataset, make_trainer

def slow(result):
    time.sleep(60 if result.step == 20 and "to be killed" in sys.argv else 0.05)

trainer = make_trainer(dp.world(), Path(sys.argv[1]), resume=True, checkpoint_every=2, callbacks=[slow])
print("from step", trainer.step, flush=True)
trainer.fit(dataset(), epochs=4, validation=dataset())
"""


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 1), (2, 1), (1, 3)])
def test_a_killed_job_resumes_to_the_same_bits(ranks_before: int, ranks_after: int, tmp_path: Path) -> None:
    """Real processes, killed by SIGKILL in the middle of training and of writing."""
    from test_launch import Jobs, wait_until  # not by those that import this module: it asks which MPI there is

    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    run_dir = tmp_path / "run"

    def command(ranks: int) -> list[str]:
        start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "distprop", "run", "-n", str(ranks)]
        return [*start, str(script), str(run_dir)]

    jobs = Jobs(tmp_path)
    environment = {**os.environ, "TEST_MARK": jobs.mark}
    job = subprocess.Popen(
        [*command(ranks_before), "to be killed"], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(run_dir.glob("checkpoints/step-*"))) < 3:
        assert job.poll() is None, "the job ended by itself"
        assert time.monotonic() < deadline, "no checkpoint was written in 60 s"
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(20)
    assert wait_until(lambda: not jobs.left(), 20), "its ranks still write into the folder"
    answer = subprocess.run(command(ranks_after), capture_output=True, text=True, timeout=100, check=True)
    assert 4 <= int(answer.stdout.split()[2]) <= 20  # where it waited to be killed

    whole = make_trainer(SoloCommunicator(), tmp_path / "whole")
    whole.fit(dataset(), epochs=4, validation=dataset())
    found = checkpoint.newest(run_dir / "checkpoints", pytest.fail)
    assert found.step == 28
    for name, array in whole.model.state_dict().items():
        assert array.tobytes() == found.tensors["model"][name].tobytes()
    assert lines(run_dir) == lines(tmp_path / "whole")
    assert (run_dir / FINGERPRINTS).read_bytes() == (tmp_path / "whole" / FINGERPRINTS).read_bytes()


def test_the_rest_of_an_epoch_is_not_looked_for_in_a_dataset_of_another_size(tmp_path: Path) -> None:
    comm, longer = (
        dp.comm.SoloCommunicator(),
        dp.data.ArrayDataset(*(np.tile(a, (2,) + (1,) * (a.ndim - 1)) for a in dataset().arrays)),
    )
    make_trainer(comm, tmp_path).fit(dataset(), steps=5)
    trainer = make_trainer(comm, tmp_path, resume=True)
    before = parameters(trainer)
    with pytest.raises(ValueError, match=rf"stands at batch 5 of an epoch over {ROWS} examples.*dataset of {2 * ROWS}"):
        trainer.fit(longer, steps=8)
    assert parameters(trainer) == before
    trainer.fit(dataset(), epochs=1)
    assert trainer.batch == 0
    trainer.fit(longer, epochs=1)  # a new epoch may have other examples
