"""What `distprop doctor` does when it is typed: look at this machine, or start ranks, here or elsewhere, that look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distprop.comm import mpi
from distprop.doctor.finding import Finding
from distprop.doctor.host import check_host
from distprop.hosts import Cluster, Host, HostsError, Survey, allot, clock_is_off, survey
from distprop.hosts.hostfile import count
from distprop.launch import ask, plan
from distprop.launcher import LaunchError


def examine(run_dir: Path, ranks: int | None = None, hosts: Sequence[Host] = ()) -> list[Finding]:
    """Check this machine; with several ranks, or on `hosts`, start them and let them check and measure.

    Hosts that cannot take part are findings, and the others are measured without them.

    Raises:
        HostsError: more ranks than slots, or this machine cannot ask other hosts anything.
    """
    if not hosts and ranks in (None, 1):
        return check_host(run_dir)
    number, found = ranks or 1, list[Finding]()
    if hosts:
        wanted = allot(hosts, ranks)
        surveyed = survey(wanted)
        found = [_host(host, surveyed) for host in wanted]
        found += _cluster(surveyed.cluster) if surveyed.cluster else []
        hosts = [host for host in wanted if host.name not in surveyed.failures]
        number = sum(host.slots for host in hosts)
        if not hosts:
            return [*check_host(run_dir), *found]
    program = ["distprop", "doctor", "--json", "--run-dir", str(run_dir.absolute())]
    try:
        status, line = ask(plan(number, program, module=True, hosts=hosts))
        if line:
            return [*found, *(Finding(**finding) for finding in json.loads(line)["findings"])]
        trouble = f"{count(number, 'rank')} ended with status {status} and without an answer"
        advice = "look at the messages above; distprop run --dry-run shows how ranks are started"
    except (LaunchError, HostsError, mpi.MPIMissingError) as error:
        trouble, advice = f"{count(number, 'rank')} cannot be started", " ".join(str(error).split())
    return [*check_host(run_dir, number), *found, Finding("ranks", trouble, "fail", advice)]


def _host(host: Host, surveyed: Survey) -> Finding:
    """What this machine has heard of one of the hosts."""
    if reason := surveyed.failures.get(host.name):
        value, _, advice = reason.partition("; ")
        return Finding("host", value, "fail", advice or "give it what this host has", host.name)
    facts = surveyed.answers[host.name]
    cores, free = facts["cores"], facts["memory"] / 2**20
    value = f"{facts['hostname']}, Python {facts['python']}, {cores} cores, {free:,.0f} MiB free, slots {host.slots}"
    if clock := clock_is_off(facts):
        advice = "logs and file times will mislead: set its clock by NTP"
        return Finding("host", f"{value}, its clock is {clock}", "warn", advice, host.name)
    return Finding("host", value, host=host.name)


def _cluster(cluster: Cluster) -> list[Finding]:
    """What holds for all hosts together."""
    network = " and ".join(cluster.subnets) or "not needed"
    found = [Finding("network", f"{cluster.interface}, {network}" if cluster.interface else network)]
    return [*found, *(Finding("cores shared", advice, "warn", "fewer ranks are as fast") for advice in cluster.crowded)]
