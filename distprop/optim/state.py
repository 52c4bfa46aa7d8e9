"""An optimizer's state as a dictionary, and the search for everything that is wrong with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distprop.optim.groups import plain
from distprop.tape import Array
from distprop.tensor import Parameter

Group = Mapping[str, Any]


def own_state(
    steps: int, missed: Sequence[int], groups: Sequence[Group], arrays: Sequence[Mapping[str, Array]]
) -> dict[str, Any]:
    """The dictionary of `Optimizer.state_dict`."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    numbers = iter(range(len(parameters)))
    return {
        "steps": steps,
        "missed": list(missed),
        "param_groups": [
            _plain_options(group) | {"params": [next(numbers) for _ in group["params"]]} for group in groups
        ],
        "arrays": {
            f"{i}.{name}": array.reshape(parameters[i].shape)
            for i, own in enumerate(arrays)
            for name, array in own.items()
        },
    }


def loaded_groups(
    state: Mapping[str, Any], groups: Sequence[Group], check: Callable[[Group], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The groups with the options of `state`, and what does not fit.

    An option that is off, False, may be missing: the state is from before there was such an option.
    """
    loaded = [dict(group) for group in groups]
    saved_groups = state["param_groups"]
    if not isinstance(saved_groups, list) or not all(isinstance(saved, Mapping) for saved in saved_groups):
        return loaded, ["param_groups is not a list of mappings"]
    problems = [f"{len(saved_groups)} groups, expected {len(groups)}"] * (len(saved_groups) != len(groups))
    all_expected = own_state(0, [], groups, [])["param_groups"]
    for number, (group, saved, expected) in enumerate(zip(loaded, saved_groups, all_expected, strict=False)):
        missing = [name for name in expected if name not in saved and name != "lr"]
        found = [f"no {name}" for name in missing if group[name] is not False]  # one that is off may be newer
        found += [f"unexpected {name}" for name in saved if name not in group]
        if saved.get("params", expected["params"]) != expected["params"]:
            found.append(f"parameters {saved['params']}, expected {expected['params']}")
        rate, own_rate = saved.get("lr"), expected.get("lr")
        if isinstance(rate, Mapping) and isinstance(own_rate, Mapping) and set(rate) != set(own_rate):
            found.append(f"the schedule has {', '.join(own_rate)}; got {', '.join(rate)}")
        if isinstance(rate, Mapping) and callable(group["lr"]) and not hasattr(group["lr"], "load_state_dict"):
            found.append(f"a schedule's state, {', '.join(rate)}, for one that has no load_state_dict()")
        kept = ("params", "lr") if callable(group["lr"]) or isinstance(rate, Mapping) else ("params",)
        group.update({name: _like(group[name], saved[name]) for name in saved if name in group and name not in kept})
        try:
            check(group)
        except (TypeError, ValueError) as error:
            found.append(str(error))
        problems += [f"group {number}: {problem}" for problem in found]
    return loaded, problems


def loaded_arrays(
    state: Mapping[str, Any], parameters: Sequence[Parameter], names: Sequence[Sequence[str]]
) -> tuple[list[dict[str, Array]], list[str]]:
    """For each parameter its arrays by name, flat copies of its dtype, and what does not fit."""
    arrays: list[dict[str, Array]] = [{} for _ in parameters]
    saved, problems = state["arrays"], counting_problems(state["steps"], state["missed"], len(parameters))
    if not isinstance(saved, Mapping):
        return arrays, [*problems, "arrays is not a mapping"]
    counted = not problems
    for i, (parameter, own_names) in enumerate(zip(parameters, names, strict=True)):
        never_updated = (
            counted and state["missed"][i] == state["steps"] and not any(f"{i}.{name}" in saved for name in own_names)
        )
        for name in () if never_updated else own_names:
            key = f"{i}.{name}"
            array = np.asarray(saved.get(key))
            if key not in saved:
                problems.append(f"{key}: missing")
            elif array.shape != parameter.shape or array.dtype.kind != "f":
                problems.append(f"{key}: {array.dtype} {array.shape}, expected {parameter.dtype} {parameter.shape}")
            else:
                arrays[i][name] = array.astype(parameter.dtype).reshape(-1)
    known = {f"{i}.{name}" for i, own_names in enumerate(names) for name in own_names}
    return arrays, problems + [f"{key}: unexpected" for key in saved if key not in known]


def key_problems(state: Mapping[str, Any]) -> list[str]:
    """Missing and unexpected parts."""
    expected = ("steps", "missed", "param_groups", "arrays")
    missing = [f"there is no {name!r}" for name in expected if name not in state]
    return missing + [f"unexpected {name!r}" for name in state if name not in expected]


def counting_problems(steps: Any, missed: Any, parameters: int) -> list[str]:
    """What is wrong with the numbers of steps."""
    if not isinstance(steps, int) or steps < 0:
        return [f"steps is {steps!r}, expected 0 or more"]
    counts = range(steps + 1)
    if not isinstance(missed, list) or len(missed) != parameters or not all(count in counts for count in missed):
        return [f"missed is {missed!r}, expected {parameters} numbers up to {steps}"]
    return []


def _plain_options(group: Group) -> dict[str, Any]:
    """The options that are not code, as JSON can say them; a schedule's own state stands for the schedule."""
    options = {name: plain(value) for name, value in group.items() if name != "params" and not callable(value)}
    if hasattr(group["lr"], "state_dict"):
        options["lr"] = plain(group["lr"].state_dict())
    return options


def _like(own: Any, loaded: Any) -> Any:
    """JSON knows no tuples."""
    return tuple(loaded) if isinstance(own, tuple) and isinstance(loaded, list) else loaded
