"""Data parallelism: every rank differentiates its share of the batch, one Allreduce makes the mean over all examples.

The mean of the ranks' means is wrong when their shares differ. So each rank's backward pass is weighed with its number
of examples over that of all ranks in the step before; the counts travel behind the gradients in the same Allreduce, and
the sum is corrected by the summed count where it differs. A rank without examples sends zeros and takes part like any
other.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np

from distprop import random
from distprop.buffer import FlatBuffer, fill_missing
from distprop.comm import Communicator, recorder, world
from distprop.comm.base import allgather_for, allgather_json, odd_ranks
from distprop.comm.recorder import here
from distprop.fixed_tree import FixedTree
from distprop.lane import MESSAGE_NUMBERS, ScheduleError, read_lane, write_lane
from distprop.message_sum import MessageSum
from distprop.nn.module import IncompatibleKeys, Module
from distprop.nn.norm import SyncBatchNorm
from distprop.nn.watch import parts_of
from distprop.pace import Pace
from distprop.replicas import compare_layout, compare_values
from distprop.running import RunningStatistics
from distprop.tape import Array, BackwardPass, gradients_needed, recording, take_part
from distprop.tensor import Parameter, Tensor, clear_gradients

VERIFY_SECONDS = 5.0  # between two comparisons of the parameters, if `verify_every` reductions take longer


class NonFiniteGradientError(FloatingPointError):
    """A gradient is NaN or infinite; raised on every rank before anything is updated. `culprits` are the ranks."""

    def __init__(self, message: str, culprits: tuple[int, ...]) -> None:
        super().__init__(message)
        self.culprits = culprits


class Extra(Protocol):
    """Someone else's numbers, `size` of them every time, that travel behind the gradients and are summed with them."""

    size: int

    def after_backward(self, examples: float, weight: float) -> None:
        """The first backward pass since the last message has left `weight` times its mean gradient on this rank."""

    def before_sum(self, numbers: Array) -> None:
        """Write into `numbers`, `(size,)`, which are zero; the message is about to be summed."""

    def after_sum(self, numbers: Array) -> None:
        """Read the sums over all senders."""


class DataParallel:
    """Wraps `module` so that `loss.backward()` leaves the mean gradient over the examples of all ranks.

    >>> from distprop.nn import Linear
    >>> parallel = DataParallel(Linear(3, 1))
    >>> parallel(np.ones((4, 3), np.float32)).mean().backward()    # on each rank with its own share of the batch

    The number of examples is the length of the leading axis of the first argument; the loss is the mean over them.
    Where that does not fit, call `parallel.backward(loss, examples=n)` instead of `loss.backward()`. Inside `no_sync()`
    gradients add up locally; the next backward pass outside sends them. As in PyTorch, gradients of several backward
    passes are summed: divide each loss by their number k, and the result is the exact mean over all their examples,
    even if the passes differ in size.

    At the start the layout of the parameters is compared between the ranks, the values of rank 0 are broadcast, and a
    checksum is compared, then again every `verify_every` reductions or 5 seconds. A gradient that is not finite on any
    rank is an error on all of them.

    Args:
        module: the model; its trainable parameters move into one `FlatBuffer`.
        comm: the ranks; `world()` by default.
        verify_every: reductions between two comparisons of parameters, if they take less than 5 seconds; 0 for none
            after the start.
        shards: cut every global batch into so many shards and add their gradients in a `FixedTree`, for the same bits
            on any number of ranks; `Trainer(deterministic=True)` drives it: see `end_shard`.
        wire: "bf16" or "fp16" for gradients that cross the network in 16 bits, half the bytes, with error feedback (see
            `distprop.comm.wire`); None for float32. Within a node nothing is rounded. Not with `shards`.
        sharded_update: the ranks of a node have one copy of the parameters and of the optimizer's state between them,
            each updates its slice, and `optimizer.step()` is collective. Whatever else changes a parameter does so on
            one rank of the node, between two barriers.
        extra: what else travels with the gradients; `send` is for a few numbers, this for hundreds.

    Raises:
        ValueError: the ranks' models differ in names, shapes or dtypes, or there is nothing to train.
        TypeError: what is wrapped is no module, or its parameters have 16 bits; by a call, when there is no array in
            the arguments or no tensor in the output.
        DivergenceError: parameters differ between ranks; names the first one and the ranks.
        ScheduleError: a rank is at another step.
        NonFiniteGradientError: by a backward pass; names the ranks and the first parameter on each.
    """

    def __init__(
        self,
        module: Module,
        comm: Communicator | None = None,
        *,
        verify_every: int = 100,
        shards: int | None = None,
        wire: Literal["bf16", "fp16"] | None = None,
        sharded_update: bool = False,
        extra: Extra | None = None,
    ) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"DataParallel wraps a Module of distprop.nn, got {module!r}")
        if shards is not None and shards < 1:
            raise ValueError(f"shards is the number of pieces of a global batch, 1 or more; got {shards}")
        if wire is not None and shards is not None:
            raise ValueError(
                f"wire={wire!r} rounds what crosses the network, so the bits depend on the number of ranks; "
                "use it without deterministic=True, without shards"
            )
        self.module = module
        self.comm = comm if comm is not None else world()
        self.verify_every = verify_every
        self.received: dict[str, float] = {}
        named = list(module.named_parameters())
        self._names = {id(parameter): name for name, parameter in named}
        self._trained = [parameter for _, parameter in named if parameter.requires_grad]
        self._frozen = [parameter for _, parameter in named if not parameter.requires_grad]
        if not self._trained:
            raise ValueError(f"{type(module).__name__} has no parameter to train")
        synchronised = [name for name, part in module.named_modules() if isinstance(part, SyncBatchNorm)]
        if shards is not None and synchronised:
            raise ValueError(
                f"{synchronised[0]} is a SyncBatchNorm, which needs the whole global batch in one forward pass; "
                "shards cut it into several. Use BatchNorm, or no shards"
            )
        compare_layout(module, self.comm)
        self._statistics = RunningStatistics(module)
        self._extra = extra
        self.wire, self.shards, self.sharded_update = wire, shards, sharded_update
        self._place_parameters()
        self._pace = Pace()
        self.reductions = 0  # made so far; after a resume those before it count as well
        self.verified_at = 0  # after so many reductions the parameters were compared
        self._broadcast()
        self._share_parameters()
        self.verify()
        self._complete = False  # until the first reduction, parameters may be added
        self._sending: dict[str, float] = {}
        self._syncing = True
        self._forward_pass: _ForwardPass | None = None
        self._examples_given: float | None = None
        self._walking = False  # a backward pass is under way
        self._examples = 0.0  # since the last reduction, on this rank
        # Of all ranks in one backward pass; gradients start from a rank's share of them. A resumed run goes on with it,
        # or its gradients would be rounded otherwise.
        self.expected_examples = 1.0
        self._divisor: float | None = None  # of this rank's passes since the last message, if it is another model's
        self._backwards = 0
        self._verify_due = False
        self.reduced = (0, 0)  # when the last sum over the ranks began and ended, in ns of time.perf_counter_ns
        self._kept: Array | None = None  # mean gradients from before, if they were not zeroed
        self._warned = self._warned_of_masks = False

    @property
    def reduce_seconds(self) -> float:
        """How long the last sum over the ranks took, waiting for slower ranks included."""
        return (self.reduced[1] - self.reduced[0]) / 1e9

    @property
    def reduction(self) -> str:
        """How gradients are summed over the ranks, in words; it follows from where these are and what is asked for."""
        node, how = self.comm.node, "one message"
        one_node = self.comm.size == (1 if node is None else node.size)
        if self.comm.size == 1:
            how = "nothing to sum"
        elif self._in_shared_memory and one_node:
            how = "shared memory"
        elif node is not None and self._in_shared_memory and self._tree is None:
            how = "shared memory on each node, one message between nodes"
        parts = [how, None if one_node else self.wire, self._tree and f"a fixed tree of {self._tree.shards} shards"]
        return ", ".join(part for part in parts if part)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for this rank's share of the batch."""
        if self._walking:  # the last backward pass raised; what it put aside belongs to that step
            self._walking, self._kept = False, None
        examples = _leading_axis(args, kwargs)
        here.at(recorder.FORWARD, self.reductions + 1)
        place = random.place()
        draws = place.draws
        output = self._forward(examples, args, kwargs)
        if place.draws > draws and not place.said and self.comm.size > 1:
            self._warn_of_equal_masks()
        if self._forward_pass is None or self._forward_pass.examples != examples:
            self._forward_pass = _ForwardPass(self, examples)
        if not _mark(output, self._forward_pass) and gradients_needed(tuple(self._trained)):
            raise TypeError(
                f"DataParallel finds no tensor in what {type(self.module).__name__} returned, "
                f"a {type(output).__name__}, so it could not see the backward pass; "
                "return tensors, or a list, tuple, mapping or dataclass of them"
            )
        return output

    def _forward(self, examples: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the module; what it does to its running statistics is kept back for the reduction.

        Also if all is frozen: there may be gradients for what is before the model.
        """
        if not (self._statistics.size and self._statistics.training and recording()):
            return self.module(*args, **kwargs)
        with self._statistics.kept_back(examples, self._buffer.extra[: self._statistics.size]):
            return self.module(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; the next backward pass overwrites them. With `set_to_none` False they become zeros."""
        clear_gradients(self._trained, set_to_none)

    def begin_step(self) -> None:
        """`zero_grad()`, and forget all else that a step which raised may have left, such as changes of statistics."""
        self.zero_grad()
        if self._tree is not None:
            self._tree.clear()
        self._buffer.extra[:] = 0
        self._forget_passes()

    def backward(self, loss: Tensor, *, examples: float) -> None:
        """`loss.backward()` for a loss that is the mean over `examples` things, be they rows, tokens or weights.

        The loss need not come from this model, or from anything: a rank without data passes a constant and 0. But a
        model whose operations are collectives, such as `SyncBatchNorm`, is called with an empty batch there.
        """
        if not 0 <= examples < math.inf:
            raise ValueError(f"examples must be 0 or more, got {examples}")
        passes = loss.node.passes if loss.node is not None else ()
        if any(isinstance(p, _ForwardPass) and p.parallel is self for p in passes):
            self._examples_given = examples
            try:
                loss.backward()
            finally:
                self._examples_given = None
        else:
            weight = self._begin(examples)
            if weight and loss.requires_grad:
                loss.backward(np.full(loss.shape, weight))
            elif loss.node is not None:
                take_part(loss.node)
            self._end(examples)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward passes add up gradients on this rank without sending them."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def send(self, **numbers: float) -> None:
        """Let a few numbers travel with the next reduction; afterwards `received` has their sums over the ranks."""
        if len(numbers) > MESSAGE_NUMBERS:
            raise ValueError(f"at most {MESSAGE_NUMBERS} numbers travel with the gradients, got {len(numbers)}")
        self._sending = numbers

    def verify(self) -> None:
        """Compare all parameters across the ranks, bit for bit. Collective. A rank that is slow is reported as well.

        Raises:
            DivergenceError: names the first parameter that differs, and the ranks.
            RuntimeError: the module has other parameters than when this was made.
        """
        self._refuse_other_parameters()
        parameters = [*reversed(self._buffer.parameters), *self._frozen]
        named = [(self._names[id(parameter)], parameter) for parameter in parameters]
        seconds = compare_values(named, self.comm, self._pace.own_seconds(self.reductions))
        self._verify_due, self._verified, self.verified_at = False, time.monotonic(), self.reductions
        for line in self._pace.compare(seconds):
            self._say(line)

    def _refuse_other_parameters(self) -> None:
        now = {id(parameter): name for name, parameter in self.module.named_parameters()}
        if now.keys() != self._names.keys():
            added = [name for key, name in now.items() if key not in self._names]
            gone = [name for key, name in self._names.items() if key not in now]
            what = [f"{' and '.join(names)} {verb}" for names, verb in ((added, "came"), (gone, "went")) if names]
            raise RuntimeError(f"{', '.join(what)} after DataParallel was made; make it anew, it does not sum others")

    def parameters(self) -> Iterator[Parameter]:
        """The module's parameters."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, Array]:
        """The module's state, without a prefix."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Load on every rank; each must load the same. Returns what `Module.load_state_dict` does."""
        return self.module.load_state_dict(state, strict)

    def train(self, mode: bool = True) -> None:
        """Switch the module to training."""
        self.module.train(mode)

    def eval(self) -> None:
        """Switch the module to evaluation."""
        self.module.eval()

    def _begin(self, examples: float) -> float:
        """The weight of a backward pass over `examples` that is about to start."""
        self._follow_parameters()
        thawed = [self._names[id(parameter)] for parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise RuntimeError(f"{', '.join(thawed)} was frozen when DataParallel was made; make it anew to train it")
        self._forget_zeroed()
        fresh = self._backwards == 0 and self._kept is None
        if fresh and any(parameter.has_grad for parameter in self._trained):
            fill_missing(self._trained)
            self._kept = self._buffer.grad.copy()
            self.zero_grad()
        self._walking = True
        here.at(recorder.BACKWARD)
        return examples / (self._divisor or self.expected_examples)

    def _weigh_as(self, other: DataParallel) -> None:
        """One backward pass, with one weight, goes through this model and another one, such as those of a GAN."""
        self._forget_zeroed()
        if self._backwards == 0:
            self._divisor = other._divisor or other.expected_examples

    def _forget_zeroed(self) -> None:
        """`zero_grad()` may have thrown away what the passes since the last message have left."""
        if self._backwards and self._untouched():
            self._forget_passes()

    def _forget_passes(self) -> None:
        self._examples, self._backwards, self._kept, self._divisor = 0.0, 0, None, None

    def _end(self, examples: float) -> None:
        if not self._walking:  # two forward passes went into one backward pass; it counts once
            return
        self._walking = False
        self._examples += examples
        self._backwards += 1
        if self._extra is not None and self._backwards == 1:
            self._extra.after_backward(examples, examples / (self._divisor or self.expected_examples))
        if self._syncing and self._tree is None:
            self._reduce()
        elif self._untouched():
            fill_missing(self._trained)  # no examples here; None is what zero_grad() leaves

    def _untouched(self) -> bool:
        """Whether no gradient has come since `zero_grad()`, or ever."""
        return not any(parameter.has_grad and not parameter.zeroed for parameter in self._trained)

    def end_shard(self) -> None:
        """With `shards`: the backward passes since the last call were those of this rank's next shard."""
        if self._tree is None:
            raise RuntimeError("end_shard() is for DataParallel(..., shards=n)")
        self._fill_missing()
        self._prepare()
        self._tree.add(self._buffer.message)
        self._buffer.extra[:] = 0
        self.zero_grad()
        self._examples, self._backwards, self._sending = 0.0, 0, dict.fromkeys(self._sending, 0.0)

    def reduce_shards(self) -> None:
        """With `shards`: sum over the shards of all ranks. Collective, after `end_shard` for each of this rank's."""
        if self._tree is None:
            raise RuntimeError("reduce_shards() is for DataParallel(..., shards=n)")
        self._follow_parameters()  # a rank without shards has had no occasion to
        fill_missing(self._trained)  # the gradients are about to be written
        here.at(recorder.REDUCTION)
        self._verify_every_so_often()
        began = time.perf_counter_ns()
        self._tree.total(self._buffer.message)
        self.reduced = (began, time.perf_counter_ns())
        self._finish(self._tree.shards)

    def _reduce(self) -> None:
        """One Allreduce of gradients, statistics and lane."""
        self._fill_missing()
        here.at(recorder.REDUCTION)
        self._verify_every_so_often()
        self._prepare()
        began = time.perf_counter_ns()
        bad = self._sum.allreduce()
        self.reduced = (began, time.perf_counter_ns())
        self._finish(self.comm.size, bad)

    def _prepare(self) -> None:
        """Complete the message that is about to be summed: what lies behind the gradients, and their weight."""
        if self._divisor not in (None, self.expected_examples):  # not that of the others' gradients
            self._buffer.grad *= self._buffer.grad.dtype.type(self._divisor / self.expected_examples)
        self._divisor = None
        bad = self._sum.look()
        verify = bool(self.verify_every) and time.monotonic() - self._verified > VERIFY_SECONDS
        senders = self.comm.size if self.shards is None else self.shards
        numbers = self._examples, self._backwards, self.reductions, senders, self._sending
        write_lane(self._buffer.lane, *numbers, bad=bad, verify=verify)
        if self._extra is not None:
            self._extra.before_sum(self._buffer.extra[self._statistics.size :])

    def _finish(self, senders: int, bad: bool = False) -> None:
        """Turn the summed message into means."""
        try:
            received = read_lane(self._buffer.lane, senders, self._sending)
        except ScheduleError as error:  # on all ranks
            raise self._with_places(error) from None
        self.received = {"examples": received.examples, **received.numbers}
        scale = self.expected_examples * received.backwards / received.examples if received.examples else 0
        if scale != 1:
            self._buffer.grad *= self._buffer.grad.dtype.type(scale)
            self._sum.rescale(scale)
        if self._tree is None and received.examples:  # with shards no step may depend on the one before: see `resume`
            self.expected_examples = received.examples / received.backwards
        if self._kept is not None:
            self._buffer.grad += self._kept
        refused = self._sum.first_bad_parameters() if received.bad or bad else None
        if self._statistics.size and refused is None:
            self._statistics.apply(self._buffer.extra[: self._statistics.size])
        if self._extra is not None:
            self._extra.after_sum(self._buffer.extra[self._statistics.size :])
        self._buffer.extra[:] = 0
        self._examples, self._backwards, self._kept, self._sending = 0.0, 0, None, {}
        self.reductions += 1
        if self._buffer.sums is not None:
            self._buffer.sums += 1
        self._verify_due = bool(received.verify)
        if refused is not None:
            self._refuse_bad_gradients(refused)
        here.at(recorder.UPDATE)

    def _with_places(self, error: ScheduleError) -> ScheduleError:
        """`error`, completed by what each rank says. Collective."""
        place = f"at reduction {self.reductions} after {self._backwards} backward pass{'es' * (self._backwards != 1)}"
        places = allgather_json("the schedule of a reduction", self.comm, place)
        said = "; ".join(f"rank {places.index(other)} is {other}" for other in dict.fromkeys(places))
        if len(set(places)) == 1:  # ranks have added up the gradients of different models
            said = f"all ranks are {place}, but not with the same gradients"
        located = ScheduleError(f"{said}: {error}")
        located.culprits = odd_ranks(dict(enumerate(places))) or tuple(range(self.comm.size))
        return located

    def _refuse_bad_gradients(self, found: list[str]) -> None:
        """By the first bad parameter of each rank; if there is none, their sum is not finite."""
        culprits = tuple(rank for rank, name in enumerate(found) if name)
        what = "the sum of all gradients is not finite, though they are"
        if culprits:
            where = "; ".join(f"{here.name(rank)}, parameter {found[rank]} first" for rank in culprits[:8])
            what = f"a gradient is not finite on {where}"
        raise NonFiniteGradientError(
            f"reduction {self.reductions}: {what}; the gradients of this step are of no "
            "use, nothing was updated. Look for an overflow, a division by 0, a square root at 0 or bad data",
            culprits,
        )

    def _verify_every_so_often(self) -> None:
        if not self._complete:
            self._refuse_other_parameters()
            self._complete = True
        if self._verify_due or (self.verify_every and self.reductions % self.verify_every == self.verify_every - 1):
            self.verify()

    def _fill_missing(self) -> None:
        missing = fill_missing(self._trained)
        for parameter in self._trained:
            if not parameter.requires_grad:  # frozen since; its place is summed all the same and must not grow
                self._buffer.grad[slice(*self._buffer.span(parameter))] = 0
        if missing and self._examples and not self._warned and self.comm.rank == 0:
            self._warned = True
            names = ", ".join(self._names[id(parameter)] for parameter in missing)
            warnings.warn(f"no gradient reached {names}; it counts as zero (said once)", stacklevel=2)

    def _warn_of_equal_masks(self) -> None:
        if not self._warned_of_masks and self.comm.rank == 0:
            warnings.warn(
                "every rank drops out as if its rows were the first of the global batch, because nobody said where "
                "they are: take batches from data.Loader, or call distprop.random.at(seed, step, first_row) before "
                "each forward pass (said once)",
                stacklevel=3,
            )
        self._warned_of_masks = True

    def _place_parameters(self) -> None:
        """Move the parameters into one buffer, and say how its message is summed."""
        for parameter in self._trained:
            if parameter.dtype not in (np.float32, np.float64):
                raise TypeError(
                    f"{self._names[id(parameter)]} is {parameter.dtype}; gradients are summed in float32 or float64, "
                    "and counts travel with them, for which 16 bits are too few: model.float()"
                )
        extra = self._statistics.size + (self._extra.size if self._extra is not None else 0)
        self._buffer = FlatBuffer(self._trained, extra, self.comm.allocate)
        if self.comm.size > 1 and self.comm.rank == 0:
            self._buffer.sums = 0  # so that an optimizer's warning is said once
        node = self.comm.node
        self._in_shared_memory = node is not None and node.arrays(self._buffer.message) is not None
        if node is not None and not self._in_shared_memory:
            self._say(
                "there is no room for the gradients in shared memory; they are summed by messages, which takes longer"
            )
        self._sum = MessageSum(
            self.comm, self._buffer, self._names, wire=self.wire, shard_by_shard=self.shards is not None
        )
        self._tree: FixedTree | None = None
        if self.shards is not None:
            self._tree = FixedTree(self.comm, self.shards, self._buffer.message.size, self._buffer.message.dtype)

    def _follow_parameters(self) -> None:
        """Make the buffer anew if the model has changed what its parameters are, such as their dtype. Collective."""
        if not self._buffer.holds(self._trained):
            extra = self._buffer.extra
            self._place_parameters()
            self._share_parameters()
            self._buffer.extra[:] = extra  # what the forward pass has left there

    def _share_parameters(self) -> None:
        """The values are the same on all ranks: one copy a node will do, if it is wanted. On all nodes or on none."""
        node, buffer = self.comm.node, self._buffer
        if not self.sharded_update or node is None:
            return
        # Where there was no room for the gradients, there would be none for the optimizer's state
        common = node.allocate_common(buffer.data.size, buffer.data.dtype) if self._in_shared_memory else None
        if b"" in allgather_for("DataParallel() or Trainer()", self.comm, b"" if common is None else b"shared"):
            self._say("there is no shared memory for one copy of the parameters; each rank keeps its own")
        elif common is not None:
            buffer.share(node, common)

    def _say(self, what: str) -> None:
        """For all ranks."""
        if self.comm.rank == 0:
            print(f"distprop: {what}", file=sys.stderr, flush=True)

    def _broadcast(self) -> None:
        self.comm.broadcast(self._buffer.data)
        for array in [*(parameter.data for parameter in self._frozen), *self.module.buffers()]:
            copy = np.array(array, order="C")
            array[...] = self.comm.broadcast(copy)


class _ForwardPass:
    """Marks the outputs of a forward pass, so that the backward pass through them is weighed and reduced."""

    def __init__(self, parallel: DataParallel, examples: int) -> None:
        self.parallel = parallel
        self.examples = examples

    def begin(self, first: BackwardPass | None) -> float:
        if isinstance(first, _ForwardPass) and first.examples == self.examples:
            self.parallel._weigh_as(first.parallel)
        return self.parallel._begin(self._counted())

    def end(self) -> None:
        self.parallel._end(self._counted())

    def _counted(self) -> float:
        given = self.parallel._examples_given
        return self.examples if given is None else given


def _mark(output: Any, forward_pass: _ForwardPass) -> bool:
    """Attach `forward_pass` to every tensor in the output; tells whether there is any."""
    tensors = [part for _, part in parts_of(output) if isinstance(part, Tensor)]
    for tensor in tensors:
        if tensor.node is not None and forward_pass not in tensor.node.passes:
            tensor.node.passes = (*tensor.node.passes, forward_pass)
    return bool(tensors)


def _leading_axis(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The number of examples: the length of the first array among the arguments."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor | np.ndarray) and value.ndim:
            return int(value.shape[0])
    raise TypeError("DataParallel finds no array among the arguments whose first axis could be the batch")
