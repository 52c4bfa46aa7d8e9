"""A folder that is the same on all hosts, and one that is not: ranks as threads, each with a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from distprop import shared_folder
from distprop.comm import Communicator, run_threads
from distprop.shared_folder import NotSharedError, check_shared


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "_PATIENCE_SECONDS", 0.2)


def test_one_folder_for_all_is_left_as_it_was(tmp_path: Path) -> None:
    run_threads(3, lambda comm: check_shared(tmp_path, comm, required=True))
    assert list(tmp_path.iterdir()) == []


def check_apart(tmp_path: Path, required: bool) -> list[str]:
    """What the ranks raise, each of which sees a folder of its own."""

    def check(comm: Communicator) -> str:
        try:
            check_shared(tmp_path / str(comm.rank), comm, required=required)
        except NotSharedError as error:
            return str(error)
        return ""

    return run_threads(2, check)


def test_a_folder_of_each_host_is_refused_on_all_ranks_where_it_must_be_shared(tmp_path: Path) -> None:
    first, second = check_apart(tmp_path, required=True)
    assert first.replace("/0 ", "/1 ", 1) == second
    assert "must be one folder for all hosts" in first
    assert "with no checkpoint" in first
    assert check_apart(tmp_path, required=False) == ["", ""]


def test_a_checkpoint_that_rank_0_does_not_see_is_not_passed_over(tmp_path: Path) -> None:
    for rank, step in enumerate((100, 300)):
        (tmp_path / str(rank) / f"step-{step:09d}").mkdir(parents=True)
    first, _ = check_apart(tmp_path, required=False)
    assert "its own with step 100, and" in first
    assert "has step 300" in first
    (tmp_path / "0" / "step-000000300").mkdir()
    assert check_apart(tmp_path, required=False) == ["", ""]
