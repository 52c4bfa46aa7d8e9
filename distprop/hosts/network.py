"""The network by which all hosts of a job reach one another, found by trying."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from distprop.hosts.session import Session, ask_all


class Network(NamedTuple):
    """The subnets of the interfaces by which the hosts reach one another, and their name if it is the same on all."""

    subnets: tuple[str, ...] = ()
    interface: str | None = None


def find_network(
    here: Session,
    mine: Mapping[str, Any],
    sessions: Mapping[str, Session],
    found: Mapping[str, Mapping[str, Any]],
) -> tuple[Network, dict[str, str]]:
    """By what each host is reached by all others and by this one; and why a host is not, by its name.

    Each host tries every address of the others, since a subnet says little: Docker's bridge has the same one, and the
    same address, on every host, and a wire may lead nowhere.
    """
    facts = dict(found)
    asked = dict(sessions)
    if not any(session.local for session in sessions.values()):
        facts["this host"], asked["this host"] = mine, here  # mpirun's own messages go by the network as well
    if len(asked) < 2:
        return Network(), {}
    names = list(facts)
    peers = [
        {
            "addresses": [interface["address"] for interface in of_host["interfaces"]],
            "port": of_host["port"],
            "token": of_host["token"],
        }
        for of_host in facts.values()
    ]
    answers = ask_all(list(asked.values()), {"do": "connect", "peers": peers})
    failures: dict[str, str] = {}
    choices: dict[str, list[Mapping[str, Any]]] = {}
    for position, name in enumerate(names):
        ways = {interface["address"]: interface for interface in facts[name]["interfaces"]}
        for other, answer in zip(names, answers, strict=True):
            if other == name:
                continue
            if isinstance(answer, str):
                failures[other] = answer
                continue
            reached = answer[position]["reached"]
            if not reached:
                tried = "; ".join(answer[position]["refused"]) or "it has no address but loopback's"
                failures.setdefault(name, f"no route from {other} to it ({tried})")
            ways = {address: interface for address, interface in ways.items() if address in reached}
        choices[name] = list(ways.values())
        if not ways and name not in failures:
            failures[name] = "the other hosts reach it by different addresses, and by none of them all"
    return (Network(), failures) if failures else (_common(list(choices.values())), {})


def _common(choices: Sequence[Sequence[Mapping[str, Any]]]) -> Network:
    """One interface for each host: in a subnet that all share if there is one, its fastest otherwise.

    >>> lan, wide = {"name": "eth0", "subnet": "10.0.0.0/24"}, {"name": "wan0", "subnet": "192.0.2.0/24"}
    >>> _common([[wide, lan], [lan]])
    Network(subnets=('10.0.0.0/24',), interface='eth0')
    """
    shared = [way["subnet"] for way in choices[0] if all(way["subnet"] in _subnets(ways) for ways in choices)]
    chosen = [next((way for way in ways if way["subnet"] in shared[:1]), ways[0]) for ways in choices]
    names = {way["name"] for way in chosen}
    return Network(tuple(dict.fromkeys(_subnets(chosen))), names.pop() if len(names) == 1 else None)


def _subnets(ways: Iterable[Mapping[str, Any]]) -> list[str]:
    return [way["subnet"] for way in ways]
