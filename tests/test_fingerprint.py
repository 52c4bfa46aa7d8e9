"""Fingerprints: equal runs have equal ones, and where runs or ranks differ, the first place is named."""

import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import distprop as dp
from distprop import fingerprint, nn, optim
from distprop import functional as F
from distprop.cli import main
from distprop.comm import Communicator, SoloCommunicator, run_threads
from distprop.fingerprint import COMPARE_EVERY, FINGERPRINTS, Hashes, Record, RecordError, replay_advice
from distprop.replicas import DivergenceError
from distprop.update import NonFiniteLossError

ROWS, STEPS = 40, 20


def train(comm: Communicator, run_dir: Path | None, seed: int = 0, steps: int = STEPS, **options) -> dp.Trainer:
    """Train a small network; `fault=(rank, step, layer)` changes one number there by one unit in its last place.

    It happens in the update of that step, or with `early` before its forward pass.
    """
    dp.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fault, early = options.pop("fault", None), options.pop("early", False)

    def change(result: dp.StepResult | None = None) -> None:
        if fault is not None and fault[:2] == (comm.rank, result.step + 1 if result else optimizer.steps):
            value = model.state_dict()[fault[2]]
            value.flat[-1] = np.nextafter(value.flat[-1], np.float32(9))

    def step_and_change() -> None:
        step()
        change()

    if early:
        options["callbacks"] = [change]
    else:
        step, optimizer.step = optimizer.step, step_and_change
    options = {"deterministic": True, "batch_size": 8, "shards": 3, **options}
    trainer = dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, run_dir=run_dir, progress=False, **options)
    trainer.fit(dataset(), steps=steps)
    return trainer


def dataset() -> dp.data.ArrayDataset:
    rng = np.random.default_rng(0)
    return dp.data.ArrayDataset(rng.normal(size=(ROWS, 4)).astype(np.float32), rng.integers(0, 3, ROWS))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["fingerprint", *map(str, arguments)])


def test_it_prints_a_hash_a_step_from_the_initial_parameters_on(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path)
    answer = command(tmp_path)
    assert (answer.exit_code, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert [re.fullmatch(r"(\d+)  [0-9a-f]{8}", line)[1] for line in lines] == [str(n) for n in range(STEPS + 1)]
    assert len({line.split()[1] for line in lines}) == STEPS + 1


def test_runs_on_any_number_of_ranks_print_the_same(tmp_path: Path) -> None:
    for ranks in (1, 2, 3, 5):
        run_threads(ranks, lambda comm, ranks=ranks: train(comm, tmp_path / str(ranks)) and None)
    assert len({command(tmp_path / str(ranks)).stdout for ranks in (1, 2, 3, 5)}) == 1
    assert len({(tmp_path / str(ranks) / FINGERPRINTS).read_bytes() for ranks in (1, 2, 3, 5)}) == 1
    answer = command(tmp_path / "1", tmp_path / "3")
    assert answer.stdout == f"the runs agree at all {STEPS + 1} steps of both, from 0 to {STEPS}\n"
    assert answer.exit_code == 0


def test_other_seeds_differ_from_the_initial_parameters_on(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(SoloCommunicator(), tmp_path / str(seed), seed=seed)
    answer = command(tmp_path / "0", tmp_path / "1")
    assert answer.stderr == "the first difference is at step 0, layer 0.weight, all ranks\n"
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert command(tmp_path / "0").stdout.splitlines()[0] != command(tmp_path / "1").stdout.splitlines()[0]


@pytest.mark.parametrize("layer", ["0.bias", "1.running_var", "3.weight"])
@pytest.mark.parametrize(("ranks", "rank"), [(3, 0), (3, 2), (2, 1)])
@pytest.mark.parametrize("mode", [{}, {"early": True}, {"deterministic": False, "fingerprint": True}])
def test_a_silent_change_on_one_rank_is_named_exactly(
    layer: str, ranks: int, rank: int, mode: dict, tmp_path: Path
) -> None:
    options = {"fault": (rank, 7, layer), **mode}
    place = f"the first difference is at step 7, layer {layer}, rank {rank}"
    with pytest.raises(DivergenceError) as error:
        run_threads(ranks, lambda comm: train(comm, tmp_path / "bad", **options) and None)
    advice = f"To see that step's numbers: distprop replay {tmp_path / 'bad'} --step 7 --rank {rank}"
    assert str(error.value) == f"the ranks no longer have the same parameters: {place}. {advice}"
    answer = command(tmp_path / "bad")
    assert (answer.exit_code, answer.stderr) == (1, f"{place}\n{advice}\n")
    assert len(answer.stdout.splitlines()) == COMPARE_EVERY  # it ends there, and not at step 20
    del options["fault"]
    run_threads(ranks, lambda comm: train(comm, tmp_path / "good", **options) and None)
    assert command(tmp_path / "good", tmp_path / "bad").stderr.splitlines()[0] == f"{place} of the second run"
    assert command(tmp_path / "bad", tmp_path / "good").stderr.splitlines()[0] == f"{place} of the first run"


def test_of_two_ranks_a_run_on_one_tells_which_is_right(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path / "one")
    with pytest.raises(DivergenceError, match=r"step 4, layer 3\.bias, rank 1"):  # it differs from rank 0
        run_threads(2, lambda comm: train(comm, tmp_path / "two", fault=(0, 4, "3.bias")) and None)
    first = command(tmp_path / "one", tmp_path / "two").stderr.splitlines()[0]
    assert first.endswith("layer 3.bias, all but rank 1 of the second run")


def test_no_checkpoint_is_written_of_ranks_that_differ(tmp_path: Path) -> None:
    options = {"checkpoint_every": 3, "fault": (1, 5, "0.weight")}
    with pytest.raises(DivergenceError, match=r"step 5, layer 0\.weight, rank 1"):
        run_threads(3, lambda comm: train(comm, tmp_path, **options) and None)
    for writer in threading.enumerate():
        if writer.name == "checkpoint":
            writer.join()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


def test_a_run_that_fails_leaves_what_it_had_recorded(tmp_path: Path) -> None:
    def poison(result: dp.StepResult) -> None:
        if result.step == 5:
            trainer.model[0].weight.data[:] = np.nan

    dp.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    options = {"batch_size": 8, "run_dir": tmp_path, "deterministic": True, "progress": False, "callbacks": [poison]}
    trainer = dp.Trainer(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1), **options)
    with pytest.raises(NonFiniteLossError):
        trainer.fit(dp.data.ArrayDataset(np.ones((16, 4), np.float32), np.zeros(16, np.int64)), steps=9)
    assert list(fingerprint.read(tmp_path).steps) == [0, 1, 2, 3, 4, 5]


def test_a_further_call_of_fit_goes_on(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path / "once", steps=12)
    trainer = train(SoloCommunicator(), tmp_path / "twice", steps=7)
    trainer.fit(dataset(), steps=5)
    assert (tmp_path / "once" / FINGERPRINTS).read_bytes() == (tmp_path / "twice" / FINGERPRINTS).read_bytes()


def test_a_new_run_in_the_same_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path, seed=0, steps=9)
    train(SoloCommunicator(), tmp_path, seed=1, steps=4)
    train(SoloCommunicator(), tmp_path / "other", seed=1, steps=4)
    assert (tmp_path / FINGERPRINTS).read_bytes() == (tmp_path / "other" / FINGERPRINTS).read_bytes()


def test_it_is_recorded_in_deterministic_mode_with_a_folder_or_on_demand(tmp_path: Path) -> None:
    for number, (options, records) in enumerate(
        [
            ({"deterministic": True}, True),
            ({"deterministic": True, "fingerprint": False}, False),
            ({"deterministic": False}, False),
            ({"deterministic": False, "fingerprint": True}, True),
        ]
    ):
        train(SoloCommunicator(), tmp_path / str(number), steps=2, **options)
        assert (tmp_path / str(number) / FINGERPRINTS).exists() == records
    train(SoloCommunicator(), None, steps=2)  # no folder, no record
    with pytest.raises(ValueError, match="fingerprint=True needs a run_dir"):
        train(SoloCommunicator(), None, fingerprint=True)


def test_a_configuration_switches_it(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[model]\nhidden = [4]\n[train]\nepochs = 1\nbatch_size = 512\ndeterministic = true\n")
    for word, records in (("true", True), ("false", False)):
        folder = tmp_path / word
        settings = ["--set", f"train.fingerprint={word}", "--set", f"train.run_dir={folder}"]
        assert CliRunner().invoke(main, ["train", str(config), *settings]).exit_code == 0
        assert (folder / FINGERPRINTS).exists() == records


def test_without_a_record_it_says_what_to_do(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path, steps=2, deterministic=False)
    answer = command(tmp_path)
    assert answer.exit_code == 2
    assert "has no fingerprints. Train with deterministic=True and run_dir" in answer.stderr
    answer = command(tmp_path / "nowhere")
    assert answer.exit_code == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in answer.stderr


def test_a_line_that_was_cut_off_is_left_out_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    train(SoloCommunicator(), tmp_path, steps=3)
    path = tmp_path / FINGERPRINTS
    content = path.read_text()
    for end in range(1, len(content.splitlines()[-1])):
        path.write_text(content[: -end - 1])
        assert max(fingerprint.read(tmp_path).steps) == 2
    path.write_text(content.replace('"step": 1', '"step": 1x'))
    with pytest.raises(RecordError, match="line 2, is not what a run writes"):
        fingerprint.read(tmp_path)


def test_other_models_and_other_steps_cannot_be_compared() -> None:
    def record(layers: str, *steps: int) -> Record:
        return Record(tuple(layers.split()), {step: Hashes(np.zeros(len(layers.split()), np.uint32)) for step in steps})

    with pytest.raises(RecordError, match="the first has b where the second has c"):
        fingerprint.compare(record("a b", 0), record("a c", 0))
    with pytest.raises(RecordError, match="the first has nothing where the second has b"):
        fingerprint.compare(record("a", 0), record("a b", 0))
    with pytest.raises(RecordError, match="no step in common"):
        fingerprint.compare(record("a", 0, 1), record("a", 2))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FINGERPRINTS).symlink_to("/dev/full")
    trainer = train(SoloCommunicator(), None, steps=0)
    record = fingerprint.Fingerprints(trainer.model, trainer.comm, tmp_path)
    with record:
        for step in range(3 * COMPARE_EVERY):
            record._last = step - 1  # not as the first step of all, which would replace the file
            record.record(step)
    assert re.fullmatch(r"distprop: no more fingerprints are written: .*space.*\n", capsys.readouterr().err)


def test_the_names_of_the_layers_are_in_the_first_line_only(tmp_path: Path) -> None:
    """So that the file of a long run stays small."""
    train(SoloCommunicator(), tmp_path)
    first, *others = [json.loads(line) for line in (tmp_path / FINGERPRINTS).read_text().splitlines()]
    assert first["layers"][:2] == ["0.weight", "0.bias"]
    for line in others:
        assert set(line) == {"step", "hashes"}
        assert len(line["hashes"]) == 8 * len(first["layers"])


def test_the_first_step_can_be_replayed_and_what_was_before_it_cannot() -> None:
    assert "distprop replay run --step 1 --rank 2" in replay_advice(Path("run"), 1, 2)
    assert replay_advice(Path("run"), 0, 2) == replay_advice(None, 1, 2) == ""
