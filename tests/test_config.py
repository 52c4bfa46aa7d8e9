"""The configuration of `distprop train`: read, checked, changed from the command line, saved, and run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from distprop import job
from distprop.cli import main
from distprop.comm import Communicator, run_threads
from distprop.config import Config, ConfigError, Data, Train, load_config, save_config
from distprop.job import build_model, build_optimizer, prepare, train_from_config


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text('[data]\nname = "digits"\n[model]\nhidden = [16]\n[train]\nepochs = 2\n')
    return path


def test_what_is_not_said_has_its_default(toml: Path) -> None:
    config = load_config(toml)
    assert config.model.hidden == [16]
    assert config.train.epochs == 2
    assert config.optim == Config().optim


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optim.lr=0.5", 0.5),
        ("optim.schedule=cosine", "cosine"),
        ('optim.schedule="cosine"', "cosine"),
        ("model.hidden=[3, 4]", [3, 4]),
        ("optim.nesterov=true", True),
        ("data.root=a=b", "a=b"),
    ],
)
def test_a_setting_changes_one_value(toml: Path, setting: str, expected: object) -> None:
    section, key = setting.partition("=")[0].split(".")
    assert getattr(getattr(load_config(toml, [setting]), section), key) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lrr=0.1", r"optim\.lrr: unknown key; did you mean lr\?"),
        ("otpim.lr=0.1", r"otpim: unknown key; did you mean optim\?"),
        ("lr=0.1", r": lr: unknown key; did you mean optim\.lr\?"),
        ("optim.epochs=3", r"optim\.epochs: unknown key; did you mean train\.epochs\?"),
        ("train.xyzzy=1", r"train\.xyzzy: unknown key; there are loss, epochs"),
        ("optim.lr=fast", r"optim\.lr: expected `float`, got `str`"),
        ("optim.lr=-1", r"optim\.lr: expected `float` >= 0"),
        ("model.hidden=[8, 0]", r"model\.hidden.*expected `int` >= 1"),
        ("model.dropout=1.0", r"model\.dropout: expected `float` < 1"),
        ("optim.lr=inf", r"optim\.lr: expected `float` <= 1e\+38"),
        ("model.activation=relo", r"model\.activation: cannot be 'relo'; did you mean relu\?"),
        (
            "optim.name=xyzzy",
            r"optim\.name: cannot be 'xyzzy'; there are sgd, adam, adamw, rmsprop, adagrad, lars, lamb",
        ),
        ("train.wire=f16", r"train\.wire: cannot be 'f16'; did you mean fp16\?"),
        ("train.epochs=2.5", r"train\.epochs: expected `int`, got `float`"),
        ("train.epochs.x=2", r"epochs is a value, not a section"),
        ("optim", r"section\.key=value"),
        (".lr=1", r"section\.key=value"),
    ],
)
def test_a_mistake_names_the_key_and_what_was_expected(toml: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(toml, [setting])


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        load_config(broken)


def test_a_saved_configuration_reads_back_as_the_same(toml: Path, tmp_path: Path) -> None:
    config = load_config(toml, ["optim.lr=0.25", "train.clip_norm=1.5"])
    save_config(config, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml") == config


def test_the_model_has_the_configured_layers(toml: Path) -> None:
    config = load_config(toml, ["model.hidden=[5, 6]", "model.activation=tanh", "model.dropout=0.5"])
    kinds = [type(layer).__name__ for layer in build_model(config.model, 4, 3)]
    assert kinds == ["Flatten", "Linear", "Tanh", "Dropout", "Linear", "Tanh", "Dropout", "Linear"]


def test_the_schedule_warms_up_and_falls_to_zero(toml: Path) -> None:
    config = load_config(toml, ["optim.lr=0.4", "optim.schedule=cosine", "optim.warmup_steps=10"])
    optimizer = build_optimizer(config.optim, build_model(config.model, 4, 3), steps=30)
    rate = optimizer.param_groups[0]["lr"]
    assert (rate(0), rate(5), rate(10)) == pytest.approx((0.0, 0.2, 0.4))
    assert rate(30) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop", "adagrad", "lars", "lamb"])
def test_every_optimizer_can_be_named(toml: Path, name: str) -> None:
    config = load_config(toml, [f"optim.name={name}", "optim.weight_decay=0.01", "optim.lr=0.01"])
    optimizer = build_optimizer(config.optim, build_model(config.model, 4, 3), steps=30)
    assert type(optimizer).__name__.lower() == name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_train_leaves_the_metrics_and_the_resolved_configuration(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(main, ["train", str(toml), "--set", "train.seed=3"])
    assert answer.exit_code == 0, answer.output
    assert "epoch 2" in answer.output
    run_dir = tmp_path / "runs" / "small"
    assert load_config(run_dir / "config.toml") == load_config(toml, ["train.seed=3"])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "epoch_loss" in line] == [0, 1]
    assert 0 < lines[-1]["validation_accuracy"] <= 1


def test_a_second_run_does_not_touch_the_first(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(main, ["train", str(toml)]).exit_code == 0
    first = (tmp_path / "runs/small/metrics.jsonl").read_bytes()
    assert runner.invoke(main, ["train", str(toml)]).exit_code == 0
    assert (tmp_path / "runs/small-2/metrics.jsonl").exists()
    answer = runner.invoke(main, ["train", str(toml), "--set", "train.run_dir=runs/small"])
    assert answer.exit_code == 2
    assert "holds another run" in answer.output
    assert (tmp_path / "runs/small/metrics.jsonl").read_bytes() == first


def test_resume_goes_on_where_the_run_stopped(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["--set", "train.checkpoint_every=20", "--set", "train.deterministic=true"]
    runner = CliRunner()
    answer = runner.invoke(main, ["train", str(toml), *settings, "--resume"])
    assert answer.exit_code == 2
    assert "there is no run to resume in runs/small; leave --resume out to begin one" in answer.output
    assert runner.invoke(main, ["train", str(toml), *settings]).exit_code == 0
    run_dir = tmp_path / "runs" / "small"
    before = (run_dir / "metrics.jsonl").read_text().splitlines()
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)  # as if the run had been killed before its end
    answer = runner.invoke(main, ["train", str(toml), *settings, "--resume"])
    assert answer.exit_code == 0, answer.output
    assert sorted((run_dir / "checkpoints").iterdir())[-1] == newest
    after = (run_dir / "metrics.jsonl").read_text().splitlines()
    without_times = [[{**json.loads(line), "seconds": 0} for line in lines] for lines in (before, after)]
    assert without_times[0] == without_times[1]
    answer = runner.invoke(main, ["train", str(toml), *settings, "--set", "optim.lr=0.5", "--resume"])
    assert answer.exit_code == 2
    assert "cannot resume runs/small with other settings: optim.lr is 0.1 there and 0.5 here; " in answer.output
    assert "to go on as it began: distprop train runs/small/config.toml --resume" in answer.output
    answer = runner.invoke(main, ["train", "runs/small/config.toml", "--resume"])
    assert answer.exit_code == 0, answer.output


def test_data_from_npz_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    np.savez("regression.npz", x=x, y=x @ np.array([[1.0], [2.0], [3.0]]))
    (tmp_path / "r.toml").write_text(
        '[data]\nname = "npz"\ntrain = "regression.npz"\n[train]\nloss = "mse_loss"\nepochs = 1\n'
    )
    answer = CliRunner().invoke(main, ["train", "r.toml"])
    assert answer.exit_code == 0, answer.output
    answer = CliRunner().invoke(main, ["train", "r.toml", "--set", "train.loss=cross_entropy"])
    assert answer.exit_code == 2
    assert "cross_entropy needs integer labels, not float32" in answer.output


def _text(path: Path) -> None:
    path.write_text("nothing")


def _truncated(path: Path) -> None:
    np.savez(path, x=np.zeros((40, 3)), y=np.zeros(40, int))
    path.write_bytes(path.read_bytes()[:700])


def _damaged(path: Path) -> None:
    np.savez_compressed(path, x=np.arange(120.0).reshape(40, 3), y=np.zeros(40, int))
    content = bytearray(path.read_bytes())
    content[150:180] = bytes(30)
    path.write_bytes(content)


def _array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((40, 3)))


def _lengths(path: Path) -> None:
    np.savez(path, x=np.zeros((40, 3)), y=np.zeros(39, int))


def _nothing(path: Path) -> None:
    np.savez(path, x=np.zeros((0, 3)), y=np.zeros(0, int))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_text, "is not a .npz file with arrays x and y"),
        (_truncated, "is not a .npz file with arrays x and y"),
        (_damaged, "is not a .npz file with arrays x and y"),
        (_array, "is not a .npz file with arrays x and y"),
        (_lengths, "the leading axes must be equal"),
        (_nothing, "has no examples"),
    ],
)
def test_a_file_that_holds_no_examples_is_named(
    write: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.npz")
    (tmp_path / "r.toml").write_text('[data]\nname = "npz"\ntrain = "bad.npz"\n')
    answer = CliRunner().invoke(main, ["train", "r.toml"])
    assert answer.exit_code == 2, answer.exception
    assert "bad.npz" in answer.output
    assert message in answer.output
    assert not (tmp_path / "runs").exists()


X = np.ones((4, 3))
NPZ = {
    "labels from -1": ((X, np.arange(4) - 1), "data.train: its labels go from -1 to 2"),
    "labels in a column": ((X, np.zeros((4, 1), int)), "data.train: cross_entropy needs integer labels of shape (4,)"),
    "words": ((X, np.array(list("abcd"))), "train.loss: cross_entropy needs integer labels, not <U1"),
    "one axis": ((np.ones(4), np.arange(4)), "train.npz: x is of shape (4,); expected (examples, features)"),
    "more classes": ((X, np.arange(4), X, np.arange(4) + 1), "data.test: its labels go from 1 to 4"),
    "other labels": ((X, np.arange(4), X, np.zeros((4, 1), int)), "data.test: cross_entropy needs integer labels"),
}


@pytest.mark.parametrize("name", NPZ)
def test_targets_that_the_loss_cannot_take_are_refused(name: str, tmp_path: Path) -> None:
    arrays, message = NPZ[name]
    for number, key in enumerate(("train", "test")[: len(arrays) // 2]):
        np.savez(tmp_path / key, x=arrays[2 * number], y=arrays[2 * number + 1])
    test = str(tmp_path / "test.npz") if len(arrays) == 4 else None
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(Config(data=Data(name="npz", train=str(tmp_path / "train.npz"), test=test)))


def test_one_target_an_example_may_be_without_a_column(tmp_path: Path) -> None:
    np.savez(tmp_path / "train", x=X, y=X.sum(axis=1))
    path = str(tmp_path / "train.npz")
    config = Config(data=Data(name="npz", train=path, test=path), train=Train(loss="mse_loss", epochs=1))
    assert np.isfinite(train_from_config(config, tmp_path / "run")[-1].validation["loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.wire=bf16", "train.deterministic=true"], "train.wire: "),
        (["optim.nesterov=true", "optim.momentum=0"], "optim.nesterov: it needs optim.momentum, which is 0"),
        (["train.seed=99999999999999999999"], "train.seed: expected `int` <= "),
        (["train.run_dir="], "train.run_dir: expected `str` of length >= 1"),
        (["model.hidden=[1000000000000]"], "model.hidden: there is no memory for [1000000000000]: "),
        ([f"model.hidden=[{10**24}]"], f"model.hidden: there is no memory for [{10**24}]: "),
    ],
)
def test_settings_that_do_not_go_together_or_into_memory_are_refused(
    settings: list[str], message: str, toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(main, ["train", str(toml), *(word for s in settings for word in ("--set", s))])
    assert answer.exit_code == 2, answer.exception
    assert message in answer.output
    assert not (tmp_path / "runs").exists()


def test_a_start_that_fails_leaves_nothing_that_refuses_the_next(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*parts: object, **options: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(job, "Trainer", refuse)
    with pytest.raises(ValueError, match="no such thing"):
        train_from_config(load_config(toml), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_examples_of_another_shape_for_validation_are_refused(tmp_path: Path) -> None:
    for name, columns in (("train", 3), ("test", 4)):
        np.savez(tmp_path / name, x=np.zeros((8, columns)), y=np.zeros(8, int))
    data = Data(name="npz", train=str(tmp_path / "train.npz"), test=str(tmp_path / "test.npz"))
    with pytest.raises(ConfigError, match=r"data\.test: its examples are of shape \(4,\), those of data.train \(3,\)"):
        prepare(Config(data=data))


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path, toml: Path) -> None:
    (tmp_path / "taken").write_text("")
    answer = CliRunner().invoke(main, ["train", str(toml), "--set", f"train.run_dir={tmp_path / 'taken'}"])
    assert answer.exit_code == 2, answer.exception
    assert f"train.run_dir: cannot write to {tmp_path / 'taken'}: File exists" in answer.output


def test_a_mistake_that_rank_0_finds_is_known_to_all_ranks(tmp_path: Path, toml: Path) -> None:
    train_from_config(load_config(toml), tmp_path / "run")
    config = load_config(toml, [f"train.run_dir={tmp_path / 'run'}"])

    def body(comm: Communicator) -> None:
        with pytest.raises(ConfigError, match="holds another run; --resume it, or name a new folder"):
            train_from_config(config, tmp_path, comm=comm)

    run_threads(3, body, timeout_seconds=20)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    tmp_path: Path, toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", str(toml), "--set", "train.checkpoint_every=10"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    checkpoints = list(tmp_path.glob("runs/small/checkpoints/step-*"))
    for folder in checkpoints:
        (folder / "manifest.json").write_text("{")
    answer = CliRunner().invoke(main, [*arguments, "--resume"])
    assert answer.exit_code == 2, answer.exception
    assert f"all {len(checkpoints)} checkpoints in runs/small/checkpoints are damaged" in answer.output
