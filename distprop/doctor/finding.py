"""What a check of `distprop doctor` has found, as a row of a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Literal

Status = Literal["ok", "warn", "fail"]
ROWS_ALIKE = 8  # of one check that is well everywhere, but says something else of every host; JSON has all of them


@dataclass(frozen=True)
class Finding:
    """What a check found. `advice` is one line, empty where all is well; `host` is empty where there is but one."""

    name: str
    value: str
    status: Status = "ok"
    advice: str = ""
    host: str = ""


def to_json(findings: Sequence[Finding]) -> str:
    """One line."""
    return json.dumps({"status": worst(findings), "findings": [asdict(finding) for finding in findings]})


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status."""
    return max((finding.status for finding in findings), key=("ok", "warn", "fail").index)


def show(findings: Sequence[Finding]) -> None:
    """Print the table, and below it the advice."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    console, table = Console(highlight=False), Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    hosts = {finding.host for finding in findings} - {""}
    rows = list(_shortened(merged(findings, hosts)))
    for finding in rows:
        table.add_row(Text(finding.status, styles[finding.status]), finding.name, Text(finding.value), finding.host)
    console.print(table)
    console.print()
    amiss = merged([replace(finding, value="") for finding in findings if finding.status != "ok"], hosts)
    for finding in amiss:
        where = f" on {finding.host}" if finding.host not in ("", ALL) else ""
        console.print(Text(f"{finding.name}{where}: {finding.advice}", styles[finding.status]), soft_wrap=True)
    if not amiss:
        console.print("nothing is amiss", style="green")


ALL = "all hosts"


def merged(findings: Sequence[Finding], every: AbstractSet[str]) -> list[Finding]:
    """One for each check and what it found, with those of all hosts where it found that; checks stay together.

    >>> [f.host for f in merged([Finding("cores", "2", host="a"), Finding("cores", "2", host="b")], {"a", "b"})]
    ['all hosts']
    """
    hosts: dict[Finding, list[str]] = {}
    for finding in findings:
        hosts.setdefault(replace(finding, host=""), []).append(finding.host)
    order = {finding.name: place for place, finding in reversed(list(enumerate(findings)))}
    return [
        replace(finding, host="" if len(every) < 2 else ALL if every == set(where) else ", ".join(where))
        for finding, where in sorted(hosts.items(), key=lambda item: order[item[0].name])
    ]


def _shortened(rows: Sequence[Finding]) -> Iterator[Finding]:
    for (name, status), group in groupby(rows, key=lambda finding: (finding.name, finding.status)):
        alike = list(group)
        if status != "ok" or len(alike) <= ROWS_ALIKE:
            yield from alike
            continue
        yield from alike[: ROWS_ALIKE - 1]
        yield Finding(name, f"and the like on {len(alike) - ROWS_ALIKE + 1} more hosts; --json has them")
