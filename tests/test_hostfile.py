"""Which hosts a job has: as they are typed, as they are in a file, and every mistake in either."""

from __future__ import annotations

from pathlib import Path

import pytest

from distprop import hosts
from distprop.hosts import Host, HostsError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a:2,b:2", [Host("a", 2), Host("b", 2)]),
        ("a, b", [Host("a", 1), Host("b", 1)]),
        ("a slots=2, b slots = 3", [Host("a", 2), Host("b", 3)]),
        ("a:2,b,a", [Host("a", 3), Host("b", 1)]),
        ("node-1.example.org:16", [Host("node-1.example.org", 16)]),
    ],
)
def test_hosts_with_their_slots(text: str, wanted: list[Host]) -> None:
    assert hosts.parse_hosts(text) == wanted


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=id", "a;id", "a b", "$(id)", "a:", "a:x", "a:-1", "", "a,,b", "a:2:3"]
)
def test_what_is_no_host_is_refused_before_ssh_sees_it(name: str) -> None:
    with pytest.raises(HostsError, match="is not a host; expected NAME, NAME:SLOTS or NAME slots=SLOTS"):
        hosts.parse_hosts(name)


def test_a_user_and_no_slots_are_refused_with_what_to_do() -> None:
    with pytest.raises(HostsError, match=r"'me@a:2'.*~/\.ssh/config"):
        hosts.parse_hosts("me@a:2")
    with pytest.raises(HostsError, match="1 rank or more"):
        hosts.parse_hosts("a:0")


def test_a_hostfile_is_open_mpis_or_mpichs(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# the cluster\n\na slots=2 # fast\n  b:3\nc\nd slots = 4 max_slots=8\n")
    assert hosts.read_hostfile(path) == [Host("a", 2), Host("b", 3), Host("c", 1), Host("d", 4)]


def test_a_hostfile_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb\n", encoding="utf-8-sig")
    assert hosts.read_hostfile(path) == [Host("a", 2), Host("b", 1)]


def test_the_list_of_a_pbs_job_is_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "nodefile"
    path.write_text("node1\nnode1\nnode2\nnode2\n")
    assert hosts.read_hostfile(path) == [Host("node1", 2), Host("node2", 2)]


@pytest.mark.parametrize("line", ["b slot=2", "b slots=two", "b 2", "b:2 slots=3", "-b", "b slots=2 c", "b slots="])
def test_a_typing_error_in_a_hostfile_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"a slots=2\n\n{line}\n")
    with pytest.raises(HostsError, match=r"hosts, line 3: .* is not a host; expected"):
        hosts.read_hostfile(path)


def test_a_hostfile_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostsError, match=r"cannot read .*missing: No such file"):
        hosts.read_hostfile(tmp_path / "missing")
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(HostsError, match="names no host"):
        hosts.read_hostfile(tmp_path / "empty")


def test_ranks_fill_the_hosts_in_their_order() -> None:
    two = [Host("a", 2), Host("b", 2)]
    assert hosts.allot(two, None) == two
    assert hosts.allot(two, 3) == [Host("a", 2), Host("b", 1)]
    assert hosts.allot(two, 2) == [Host("a", 2)]


def test_more_ranks_than_slots_says_how_many_there_are_and_how_to_oversubscribe() -> None:
    with pytest.raises(HostsError, match=r"-n 5: the hosts have 4 slots \(a:2,b:2\).*oversubscribe.*--hosts a:3,b:3"):
        hosts.allot([Host("a", 2), Host("b", 2)], 5)
