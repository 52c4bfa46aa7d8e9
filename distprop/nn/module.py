"""Modules: layers with parameters, and containers of layers, found by the names of their attributes.

There is no registry: a parameter is an attribute that is a `Parameter`, a submodule is an attribute that is a `Module`,
in the order in which they were assigned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple, Self, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from distprop.tape import Array
from distprop.tensor import Parameter, clear_gradients, values_changed


class IncompatibleKeys(NamedTuple):
    """The names that `load_state_dict` has passed over: of the model alone, and of the state alone."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module:
    """A part of a network. Subclasses assign parameters and submodules as attributes and define `forward`.

    >>> class Residual(Module):
    ...     def __init__(self, inner):
    ...         self.inner = inner
    ...     def forward(self, x):
    ...         return x + self.inner(x)
    """

    training = True
    _buffer_names: tuple[str, ...] = ()
    _not_saved: frozenset[str] = frozenset()  # of the buffers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; every subclass defines it."""
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def __setattr__(self, name: str, value: Any) -> None:
        before = vars(self).get(name)
        kind = Parameter if isinstance(before, Parameter) else Module if isinstance(before, Module) else None
        if kind is not None and not (value is None or isinstance(value, kind)):
            raise TypeError(
                f"{type(self).__name__}.{name} is a {kind.__name__}; assigning a {type(value).__name__} would take it "
                f"out of the model. Assign a {kind.__name__} or None{', or to .data' * (kind is Parameter)}"
            )
        object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of `forward`."""
        return self.forward(*args, **kwargs)

    def register_buffer(self, name: str, value: ArrayLike | None, persistent: bool = True) -> None:
        """An array that is not trained, such as a running mean; read it as an attribute.

        It is saved with the model unless `persistent` is False, as for a mask that the constructor makes. None stays
        None and is no buffer until an array is assigned.
        """
        if name not in self._buffer_names:
            self._buffer_names = (*self._buffer_names, name)
        self._not_saved = self._not_saved - {name} if persistent else self._not_saved | {name}
        setattr(self, name, None if value is None else np.array(value))

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        """The same as assigning it to an attribute."""
        setattr(self, name, parameter)

    def add_module(self, name: str, module: Module | None) -> None:
        """The same as assigning it to an attribute."""
        setattr(self, name, module)

    def apply(self, function: Callable[[Module], object]) -> Self:
        """Call `function` with every module below this one and at last with this one, such as to initialise weights."""
        for child in self.children():
            child.apply(function)
        function(self)
        return self

    def children(self) -> Iterator[Module]:
        """The direct submodules."""
        return (value for value in vars(self).values() if isinstance(value, Module))

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The direct submodules with their attribute names."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it once, with dotted names, parents first; a shared one keeps its first name."""
        seen: set[int] = set()
        for name, module in self._all_modules(prefix):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """Each parameter once, with its dotted name; one that is shared keeps its first name.

        `prefix` is a name of this module to begin with; without `recurse` those of submodules are left out.
        """
        seen: set[int] = set()
        for place, module in self._all_modules(prefix) if recurse else [(prefix, self)]:
            for name, parameter in module._own_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield _join(place, name), parameter

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Each parameter once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, Array]]:
        """The arrays that are not trained, with dotted names; the arguments are those of `named_parameters`."""
        for place, module in self.named_modules(prefix) if recurse else [(prefix, self)]:
            for name, buffer in module._own_buffers():
                yield _join(place, name), buffer

    def buffers(self, recurse: bool = True) -> Iterator[Array]:
        """The arrays that are not trained."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def state_dict(self) -> dict[str, Array]:
        """All parameters and persistent buffers by name; the arrays themselves, not copies."""
        state: dict[str, Array] = {}
        for prefix, module in self._all_modules():
            state.update((_join(prefix, name), p.data) for name, p in module._own_parameters())
            buffers = module._own_buffers()
            state.update((_join(prefix, name), buffer) for name, buffer in buffers if name not in module._not_saved)
        return state

    def load_state_dict(self, state: Mapping[str, ArrayLike], strict: bool = True) -> IncompatibleKeys:
        """Copy values by name. With `strict` False, missing and unexpected names are passed over and returned.

        Raises:
            ValueError: names that are missing or unexpected, or shapes that differ; lists them all. Nothing has been
                changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"a state is a dictionary of arrays by name, got a {type(state).__name__}")
        own = self.state_dict()
        arrays = {str(name): np.asarray(value) for name, value in state.items()}
        problems = [
            f"{name}: {array.dtype}, not numbers" for name, array in arrays.items() if array.dtype.kind not in "biuf"
        ]
        problems += [
            f"{name}: shape {arrays[name].shape}, expected {value.shape}"
            for name, value in own.items()
            if name in arrays and arrays[name].shape != value.shape
        ]
        keys = IncompatibleKeys([n for n in own if n not in arrays], [n for n in arrays if n not in own])
        if strict:
            problems += [f"{name}: missing" for name in keys.missing_keys]
            problems += [_unexpected(name, own) for name in keys.unexpected_keys]
        if problems:
            raise ValueError(f"the state does not fit this {type(self).__name__}:\n  " + "\n  ".join(problems))
        for name, value in own.items():
            if name in arrays:
                value[...] = arrays[name]
        values_changed(parameter for name, parameter in self.named_parameters() if name in arrays)
        return keys

    def train(self, mode: bool = True) -> Self:
        """Switch dropout and batch statistics on (or off) here and below."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """The opposite of `train`."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; the next backward pass overwrites them. With `set_to_none` False they become zeros."""
        clear_gradients(self.parameters(), set_to_none)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train the parameters here and below, or freeze them."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def to(self, dtype: DTypeLike) -> Self:
        """Convert parameters and floating-point buffers to another dtype; gradients are dropped.

        Raises:
            TypeError: it is no floating-point dtype.
        """
        try:
            floating = np.dtype(dtype).kind == "f"
        except TypeError:  # a device, for example
            floating = False
        if not floating:
            raise TypeError(f"to() takes a floating-point dtype such as np.float64, got {dtype!r}; all is on the CPU")
        for parameter in self.parameters():
            parameter.data = parameter.data.astype(dtype)
        for module in self.modules():
            for name, value in module._own_buffers():
                if value.dtype.kind == "f":
                    setattr(module, name, value.astype(dtype))
        return self

    def double(self) -> Self:
        """Convert to float64."""
        return self.to(np.float64)

    def float(self) -> Self:
        """Convert to float32."""
        return self.to(np.float32)

    def extra_repr(self) -> str:
        """The constructor's arguments, for `repr`."""
        return ""

    def __repr__(self) -> str:
        children = list(self.named_children())
        if not children:
            return f"{type(self).__name__}({self.extra_repr()})"
        lines = [f"({name}): {child!r}".replace("\n", "\n  ") for name, child in children]
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"

    def _own_buffers(self) -> Iterator[tuple[str, Array]]:
        for name in self._buffer_names:
            value = getattr(self, name)
            if value is not None:
                array = np.asarray(value)
                setattr(self, name, array)  # `self.count = self.count + 1` leaves a scalar, which nothing can load into
                yield name, array

    def _own_parameters(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Parameter))

    def _all_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """A module in several places under each of its names, as in PyTorch's `state_dict`."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child._all_modules(_join(prefix, name))


class _Modules(Module):
    """What `Sequential` and `ModuleList` share: they are lists of modules, and change as lists do.

    `insert`, `pop`, `del` and `+=` number the modules anew where it is needed, as PyTorch does.
    """

    def append(self, module: Module) -> Self:
        """One more at the end, named by the number of those before it, or the next number that is free."""
        self._set(next(name for number in count(len(self)) if (name := str(number)) not in vars(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Several more at the end."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """One more before number `index`."""
        modules = list(self)
        modules.insert(index, module)
        return self._become(modules)

    def pop(self, index: int = -1) -> Module:
        """Take one out and return it."""
        modules = list(self)
        module = modules.pop(index)
        self._become(modules)
        return module

    def __len__(self) -> int:
        return sum(1 for _ in self.children())

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    def __setitem__(self, index: int, module: Module) -> None:
        self._set([name for name, _ in self.named_children()][index], module)

    def __delitem__(self, index: int | slice) -> None:
        modules = list(self)
        del modules[index]
        self._become(modules)

    def __iadd__(self, modules: Iterable[Module]) -> Self:
        return self.extend(modules)

    def _become(self, modules: Sequence[Module]) -> Self:
        for number, module in enumerate(modules):
            self._check(str(number), module)
        for name in [name for name, _ in self.named_children()]:
            del vars(self)[name]
        return self.extend(modules)

    def _set(self, name: str, module: Module) -> None:
        self._check(name, module)
        vars(self)[name] = module

    def _check(self, name: str, module: Any) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__} takes modules; argument {name} is a {type(module).__name__}")


class Sequential(_Modules):
    """Modules one after the other; their names are "0", "1", and so on, or those of a mapping that is given instead.

    >>> from distprop.nn import Linear, ReLU
    >>> model = Sequential(Linear(784, 100), ReLU(), Linear(100, 10))
    >>> [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    >>> [name for name, _ in Sequential({"hidden": model[0], "act": model[1]}).named_parameters()]
    ['hidden.weight', 'hidden.bias']

    A slice is a Sequential of the same modules under the same names, as in PyTorch: `model[1:]` has "1" and "2".

    Raises:
        TypeError: something that is no module.
        ValueError: a name with a dot, an empty one, or that of an attribute such as "forward".
    """

    def __init__(self, *modules: Module | Mapping[str, Module]) -> None:
        named: Mapping[str, Any] = {str(number): module for number, module in enumerate(modules)}
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named = modules[0]
        for name, module in named.items():
            if not name or "." in name or hasattr(type(self), name):
                raise ValueError(f"Sequential got a module named {name!r}; a name has no dot and is not an attribute's")
            self._set(name, module)

    def forward(self, input: Any) -> Any:
        """Each module's output is the next one's input."""
        for module in self.children():
            input = module(input)
        return input

    @overload
    def __getitem__(self, index: int) -> Module: ...

    @overload
    def __getitem__(self, index: slice) -> Sequential: ...

    def __getitem__(self, index: int | slice) -> Module:
        if isinstance(index, slice):
            return Sequential(dict(list(self.named_children())[index]))
        return list(self.children())[index]


class ModuleList(_Modules):
    """Modules in a list, named "0", "1", and so on; it computes nothing by itself.

    >>> from distprop.nn import Linear
    >>> layers = ModuleList(Linear(8, 8) for _ in range(3))
    >>> [name for name, _ in layers.append(Linear(8, 1)).named_children()]
    ['0', '1', '2', '3']
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        self.extend(modules)

    @overload
    def __getitem__(self, index: int) -> Module: ...

    @overload
    def __getitem__(self, index: slice) -> ModuleList: ...

    def __getitem__(self, index: int | slice) -> Module:
        chosen = list(self.children())[index]
        return chosen if isinstance(chosen, Module) else ModuleList(chosen)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _unexpected(name: str, own: Mapping[str, Array]) -> str:
    import difflib

    near = difflib.get_close_matches(name, own, n=1)
    return f"{name}: unexpected" + (f" (did you mean {near[0]}?)" if near else "")
