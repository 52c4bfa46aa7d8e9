"""Running the program of a run once more: what `run.json` and `config.toml` say of it, and the surroundings it had.

A script is executed in a `__main__` of its own for each rank, since all ranks live in one process.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from distprop.config import Config, ConfigError, load_config
from distprop.environment import file_hash
from distprop.job import prepare


class ProgramError(ValueError):
    """Nobody knows what was run, or it is not there any more."""


class Program(Protocol):
    """What can be run once more; a call runs it on one rank."""

    def surroundings(self) -> Any:
        """A context for all ranks together: the working directory and so on."""

    def __call__(self) -> object:
        """Run it, on the rank that `world()` says."""


def find_program(
    run_dir: Path, session: Mapping[str, Any], script: Path | None, remark: Callable[[str], object]
) -> Program:
    """The program of the call of `fit` that `session` describes; `remark` is told what may be different now.

    Raises:
        ProgramError: there is none, or it has moved; with `script` it is there.
    """
    folder = _folder(session, remark)
    saved = run_dir / "config.toml"
    if saved.exists() and script is None:
        try:
            return Configured(load_config(saved), run_dir, folder)
        except ConfigError as error:
            raise ProgramError(str(error)) from error
    said = session.get("program")
    if not isinstance(said, dict) or not isinstance(said.get("script"), str):
        raise ProgramError(
            f"the run in {run_dir} was started at a prompt or with python -c; what has no file cannot be run again"
        )
    if (said.get("module") or "").split(".")[0] == "distprop" or Path(said["script"]).name == "distprop":
        why = "but its config.toml is gone" if script is None else "and --script is for runs of scripts; leave it out"
        raise ProgramError(f"the run in {run_dir} is one of distprop train, {why}")
    path = script if script is not None else Path(said["script"])
    if not path.is_file():
        raise ProgramError(f"there is no {path}, which made the run in {run_dir}; if it has moved: --script PATH")
    if file_hash(str(path)) != said.get("sha256"):
        remark(f"{path} has changed since the run; the numbers are those of the present one")
    module = said.get("module") if script is None else None
    return Script(path.resolve(), module, tuple(map(str, said.get("arguments", ()))), folder)


@dataclass(frozen=True)
class Configured:
    """What `distprop train` does with a saved configuration."""

    config: Config
    run_dir: Path
    folder: Path

    def surroundings(self) -> AbstractContextManager[None]:
        """The working directory."""
        return chdir(self.folder)

    def __call__(self) -> None:
        """Train; only what says how, not where to leave it, comes from the file."""
        task = prepare(self.config)
        trainer = task.trainer(run_dir=self.run_dir, checkpoint_every=self.config.train.checkpoint_every)
        trainer.fit(task.train_set, epochs=self.config.train.epochs, validation=task.test_set)


@dataclass(frozen=True)
class Script:
    """A script with its arguments, or a `module` as of `python -m`."""

    path: Path
    module: str | None
    arguments: Sequence[str]
    folder: Path

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """As `python` sets them up: the arguments, and the script's directory, or the current one, on the path."""
        arguments, path, main = sys.argv, sys.path, sys.modules["__main__"]
        with chdir(self.folder):
            sys.argv = [str(self.path), *self.arguments]
            sys.path = [str(self.folder if self.module else self.path.parent), *path]
            try:
                yield
            finally:
                sys.argv, sys.path, sys.modules["__main__"] = arguments, path, main

    def __call__(self) -> None:
        """Execute it as `__main__`."""
        main = ModuleType("__main__")
        spec = importlib.util.find_spec(self.module) if self.module else None
        vars(main).update(__file__=str(self.path), __builtins__=builtins, __spec__=spec)
        if spec is not None:
            vars(main)["__package__"] = spec.parent
        sys.modules["__main__"] = main
        exec(compile(self.path.read_bytes(), str(self.path), "exec", dont_inherit=True), vars(main))


def _folder(session: Mapping[str, Any], remark: Callable[[str], object]) -> Path:
    """Where the run was started; relative names in its program start from there."""
    said = session.get("environment", {}).get("folder")
    if isinstance(said, str) and os.path.isdir(said):
        return Path(said)
    remark(f"the folder in which the run was started, {said}, is not there; relative names start from the present one")
    return Path.cwd()
