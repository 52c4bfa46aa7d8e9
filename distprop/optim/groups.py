"""Parameter groups: one optimizer with other options for some of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from distprop.nn.module import Module
from distprop.nn.norm import LayerNorm, RMSNorm
from distprop.tensor import Parameter, Tensor

T = TypeVar("T", bound=Tensor)
ParameterGroups: TypeAlias = Iterable[Parameter] | Iterable[tuple[str, Parameter]] | Iterable[Mapping[str, Any]]


@runtime_checkable
class HasParameters(Protocol):
    """A module, or anything else that lists parameters."""

    def parameters(self) -> Iterable[Parameter]:
        """All of them."""


def decay_groups(
    parameters: Iterable[Parameter] | HasParameters, weight_decay: float, **others: Any
) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels, which decay, and biases and the parameters of norms, which do not.

    The latter have fewer than 2 axes; where a module is given, also those of norms over several axes, and what is
    called a bias, such as `MultiheadAttention`'s `bias_k`.

    >>> from distprop import nn
    >>> groups = decay_groups(nn.Linear(3, 2), 0.01)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(1, 0.01), (1, 0.0)]

    Args:
        parameters: a module, or its parameters.
        weight_decay: of the first group; it is 0 in the second.
        others: further options of the second group, such as `adapt=False` for `LARS` and `LAMB`.
    """
    several = list(parameters.parameters() if isinstance(parameters, HasParameters) else parameters)
    model = getattr(parameters, "module", parameters)  # of DataParallel
    spared: set[int] = set()
    if isinstance(model, Module):
        norms = (module for module in model.modules() if isinstance(module, LayerNorm | RMSNorm))
        spared.update(id(p) for norm in norms for p in norm.parameters())
        spared.update(id(p) for name, p in model.named_parameters() if name.rpartition(".")[2].startswith("bias"))
    decaying: list[Parameter] = []
    rest: list[Parameter] = []
    for parameter in several:
        (decaying if parameter.ndim >= 2 and id(parameter) not in spared else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, **others},
    ]
    return [group for group in groups if group["params"]]


def checked_parameters(parameters: Iterable[T] | T, taker: str, kind: type[T]) -> list[T]:
    """The parameters, or the one, as a list.

    Raises:
        TypeError: something is not of that kind, such as a module.
    """
    several: list[Any] = [parameters] if isinstance(parameters, Tensor | Module) else list(parameters)
    for parameter in several:
        if not isinstance(parameter, kind):
            raise TypeError(f"{taker} takes parameters, got a {type(parameter).__name__}; pass model.parameters()")
    return several


def filled_groups(params: ParameterGroups, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups with all options filled in.

    Raises:
        ValueError: no parameters, or one given twice, or a group without "params".
        TypeError: something that is not a parameter, or an unknown option.
    """
    given: list[Any] = [params] if isinstance(params, Module) else list(params)
    if given and all(isinstance(item, Mapping) for item in given):
        if unnamed := [number for number, group in enumerate(given) if "params" not in group]:
            raise ValueError(f"parameter group {unnamed[0]} has no 'params', only {', '.join(given[unnamed[0]])}")
        groups = [{**defaults, **group, "params": _without_names(group["params"])} for group in given]
    else:
        groups = [{**defaults, "params": _without_names(given)}]
    seen: set[int] = set()
    for group in groups:
        group.update({name: plain(option) for name, option in group.items() if name != "params"})
        if unknown := set(group) - set(defaults) - {"params"}:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(defaults)}")
        if not group["params"]:
            raise ValueError(
                "an optimizer needs at least one parameter "
                "(a generator that was used up, or layers in a plain list instead of nn.ModuleList?)"
            )
        for parameter in checked_parameters(group["params"], "an optimizer", Parameter):
            if id(parameter) in seen:
                raise ValueError(f"a parameter of shape {parameter.shape} was given twice")
            seen.add(id(parameter))
    return groups


def plain(value: Any) -> Any:
    """Python's numbers in place of NumPy's, which would make float64 of float32 arrays, and which JSON cannot say."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def _without_names(params: Parameter | Iterable[Any]) -> tuple[Any, ...]:
    """One parameter or several, which may be given as pairs of a name and a parameter, as by `named_parameters()`."""
    if isinstance(params, Parameter):
        return (params,)
    return tuple(item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in params)
