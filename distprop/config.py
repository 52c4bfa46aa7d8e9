"""Typed configuration: what a TOML file for `distprop train` may say, with its defaults and limits.

    [data]
    name = "mnist"
    [model]
    hidden = [512, 512]
    [optim]
    lr = 0.1
    [train]
    epochs = 5

An unknown key or a value of the wrong type is an error that names the key and suggests the nearest one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

import msgspec

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
NotNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e38)]  # within float32's range
Probability: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; says which key, and what was expected."""


class Data(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Where the examples come from."""

    name: Literal["digits", "mnist", "npz"] = "digits"
    root: str | None = None  # mnist: the folder of the IDX files
    train: str | None = None  # npz: a file with arrays x (examples, ...) and y
    test: str | None = None  # npz: the same for validation


class Model(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A fully connected network; its input and output widths follow from the data."""

    name: Literal["mlp"] = "mlp"
    hidden: list[Count] = msgspec.field(default_factory=lambda: [128])
    activation: Literal["relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh"] = "relu"
    dropout: Probability = 0.0


class Optim(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """The optimizer and its learning rate."""

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "lars", "lamb"] = "sgd"
    lr: NotNegative = 0.1
    weight_decay: NotNegative = 0.0  # of weights; biases and norms do not decay
    momentum: Probability = 0.9  # sgd, lars
    nesterov: bool = False  # sgd
    beta1: Probability = 0.9  # adam, adamw, lamb
    beta2: Probability = 0.999  # adam, adamw, lamb
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, msgspec.Meta(ge=0)] = 0


class Train(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How long, how much at once, and where the results go."""

    loss: Literal["cross_entropy", "mse_loss", "l1_loss", "huber_loss"] = "cross_entropy"
    epochs: Count = 10
    batch_size: Count = 128  # of the global batch
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    accumulate: Count = 1
    clip_norm: Annotated[float, msgspec.Meta(gt=0)] | None = None
    prefetch: Annotated[int, msgspec.Meta(ge=0)] = 0  # batches loaded ahead in a background thread
    deterministic: bool = False  # the same bits on any number of ranks
    shards: Count = 8
    wire: Literal["bf16", "fp16"] | None = None  # 16 bits between nodes; float32 by default
    sharded_update: bool = False  # one copy of the parameters a node, each rank updates its slice
    run_dir: Annotated[str, msgspec.Meta(min_length=1)] | None = None  # runs/<name of the file> by default
    checkpoint_every: Count | None = None  # steps
    health: bool | Annotated[int, msgspec.Meta(ge=0)] = True  # steps between looks at gradients and units; true is 50
    fingerprint: bool | None = None  # a hash of every parameter after every step; by default if deterministic


class Config(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """A whole training run."""

    data: Data = msgspec.field(default_factory=Data)
    model: Model = msgspec.field(default_factory=Model)
    optim: Optim = msgspec.field(default_factory=Optim)
    train: Train = msgspec.field(default_factory=Train)


def load_config(path: Path, settings: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `settings` such as "optim.lr=0.1" on top.

    Raises:
        ConfigError: the file is missing or not TOML, or it or a setting has an unknown key or an impossible value.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for setting in settings:
        _apply(tree, setting)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explain(str(error))}") from None


def save_config(config: Config, path: Path) -> None:
    """Write every value, defaults included, as TOML that `load_config` reads back."""
    import tomli_w

    tree = msgspec.to_builtins(config)
    sections = {name: {k: v for k, v in section.items() if v is not None} for name, section in tree.items()}
    path.write_text(tomli_w.dumps(sections), encoding="utf-8")


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"a setting is written section.key=value, got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that a shell needs no second pair of quotes
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{setting!r}: {part} is a value, not a section")
    tree[parts[-1]] = value


def _explain(message: str) -> str:
    """msgspec's message in the words of the file: `optim.lrr: unknown key; did you mean lr?`."""
    text, _, path = message.partition(" - at ")
    place = path.strip("`").removeprefix("$").removeprefix(".")
    if match := re.search(r"unknown field `(.*)`", text):
        known, key = list(_SECTIONS[place].__struct_fields__), match[1]
        elsewhere = [
            f"{name}.{key}" for name, section in _SECTIONS.items() if name and key in section.__struct_fields__
        ]
        hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else _suggest(key, known)
        return f"{f'{place}.' if place else ''}{key}: unknown key; {hint}"
    if match := re.search(r"Invalid enum value (.*)", text):
        section, _, key = place.partition(".")
        return f"{place}: cannot be {match[1]}; {_suggest(match[1], _choices(_SECTIONS[section], key))}"
    return f"{place or 'the file'}: {text[0].lower()}{text[1:]}"


def _suggest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.strip("'"), known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _choices(section: type[msgspec.Struct], key: str) -> list[str]:
    """The words that a key may be, from its type, which is a Literal or one or None."""
    hint = get_type_hints(section)[key]
    values = [value for part in get_args(hint) for value in get_args(part) or [part]]
    return [value for value in values if isinstance(value, str)]


_SECTIONS: Mapping[str, type[msgspec.Struct]] = {"": Config} | get_type_hints(Config)
