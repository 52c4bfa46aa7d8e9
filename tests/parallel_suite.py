"""What `DataParallel` promises, on any number of ranks."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import pytest

from distprop import functional as F
from distprop import manual_seed, nn, no_grad, optim, tensor
from distprop.comm import Communicator
from distprop.data.loader import share
from distprop.lane import MESSAGE_NUMBERS, ScheduleError
from distprop.parallel import VERIFY_SECONDS, DataParallel, NonFiniteGradientError
from distprop.replicas import DivergenceError
from distprop.tensor import Parameter, Tensor
from scenario import Suite

suite = Suite()


class Counting:
    """A communicator that counts its collectives."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.calls: list[str] = []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.comm, name)

    def take(self) -> list[str]:
        """The collectives since the last call."""
        calls, self.calls = self.calls, []
        return calls


def make_model(seed: int = 0) -> nn.Module:
    manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def rows(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples, each a function of its number."""
    every = [np.random.default_rng(first + number).standard_normal(6) for number in range(count)]
    both = np.array(every).reshape(count, 6)
    return both[:, :4], both[:, 4:]


def uneven(comm: Communicator) -> tuple[slice, int]:
    """This rank's rows of a batch in which rank r has 2r, so rank 0 has none unless alone; and how many there are."""
    lengths = [2 * rank for rank in range(comm.size)] if comm.size > 1 else [3]
    start = sum(lengths[: comm.rank])
    return slice(start, start + lengths[comm.rank]), sum(lengths)


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: None if p.grad is None else p.grad.copy() for name, p in model.named_parameters()}


def expected_gradients(x: np.ndarray, y: np.ndarray, factor: float = 1.0) -> dict[str, np.ndarray]:
    """Of the mean over all rows, in one process."""
    model = make_model()
    (F.mse_loss(model(x), y) * factor).backward()
    return gradients(model)


def assert_gradients(model: nn.Module, expected: dict[str, np.ndarray]) -> None:
    for name, gradient in gradients(model).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-12, atol=1e-14, err_msg=name)


# --- the mean over the examples


@suite.scenario()
def the_gradient_is_the_mean_over_the_examples_of_all_ranks(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    F.mse_loss(DataParallel(model, comm)(x[mine]), y[mine]).backward()
    assert_gradients(model, expected_gradients(x, y))


@suite.scenario()
def parameters_of_rank_0_count(comm: Communicator) -> None:
    model = make_model(seed=10 + comm.rank)
    DataParallel(model, comm)
    for parameter, expected in zip(model.parameters(), make_model(seed=10).parameters(), strict=True):
        np.testing.assert_array_equal(parameter.data, expected.data)


@suite.scenario()
def buffers_of_rank_0_count(comm: Communicator) -> None:
    model = make_model()
    model.register_buffer("mean", np.full((2, 3), float(comm.rank)))
    model.register_buffer("batches", np.array(comm.rank))
    model.register_buffer("turned", np.full((3, 2), comm.rank).T)
    DataParallel(model, comm)
    for buffer in model.buffers():
        np.testing.assert_array_equal(buffer, np.zeros_like(buffer))
    assert model.batches.shape == ()


class Buffered(nn.Module):
    """Moves some of its buffers in every forward pass, and has others that stay as they are."""

    def __init__(self) -> None:
        self.linear = nn.Linear(4, 2, dtype=np.float64)
        self.register_buffer("mask", np.where(np.tri(3) == 1, 0, -np.inf))
        self.register_buffer("flags", np.array([True, False]))
        self.register_buffer("count", np.array(250, np.uint8))
        self.register_buffer("lowest", np.array([5.0, 0.0]))
        self.fails = False

    def forward(self, x: np.ndarray) -> Tensor:
        self.count = self.count + np.uint8(2)
        self.lowest[0] = 1.0
        if self.fails:
            raise RuntimeError("in the middle")
        return self.linear(x)


@suite.scenario()
def buffers_of_any_kind_stay_or_move_as_in_one_process(comm: Communicator) -> None:
    model = Buffered()
    parallel = DataParallel(model, comm)
    x, _ = rows(300)
    for step in range(2):
        parallel(x).mean().backward()
        assert (int(model.count), model.lowest.tolist()) == (252 + 2 * step, [1.0, 0.0])
        np.testing.assert_array_equal(model.mask, np.where(np.tri(3) == 1, 0, -np.inf))
        assert model.flags.tolist() == [True, False]


@suite.scenario()
def a_forward_pass_that_raises_moves_no_buffer(comm: Communicator) -> None:
    model = Buffered()
    parallel = DataParallel(model, comm)
    model.fails = True
    with pytest.raises(RuntimeError, match="in the middle"):
        parallel(np.ones((2, 4)))
    assert (int(model.count), model.lowest.tolist()) == (250, [5.0, 0.0])
    model.fails = False
    parallel(np.ones((2, 4))).mean().backward()
    assert int(model.count) == 252


class Centred(nn.Module):
    """Keeps the mean of what it has seen, in a way that says nothing of no rows."""

    def __init__(self) -> None:
        self.linear = nn.Linear(4, 2, dtype=np.float64)
        self.register_buffer("mean", np.zeros(4))

    def forward(self, x: np.ndarray) -> Tensor:
        if self.training:
            self.mean[...] = 0.9 * self.mean + 0.1 * x.mean(axis=0)
        return self.linear(x - self.mean)


@suite.scenario(min_size=2, ignore=("Mean of empty slice", "invalid value"))
def a_rank_without_examples_moves_no_buffer(comm: Communicator) -> None:
    mine, total = uneven(comm)
    model = Centred()
    DataParallel(model, comm)(rows(total)[0][mine]).mean().backward()
    np.testing.assert_allclose(model.mean, 0.1 * rows(total)[0].mean(axis=0), rtol=1e-12)


@suite.scenario()
def statistics_survive_a_change_of_dtype_and_follow_any_module_that_trains(comm: Communicator) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    parallel = DataParallel(model, comm)
    model.double()
    parallel(rows(4 + comm.rank)[0]).mean().backward()
    assert int(model[1].num_batches_tracked) == 1
    model.eval()
    model[1].train()
    parallel(rows(4 + comm.rank)[0]).mean().backward()
    assert int(model[1].num_batches_tracked) == 2
    assert len(set(comm.allgather(model[1].running_mean.tobytes()))) == 1


@suite.scenario()
def statistics_do_not_move_with_a_gradient_that_is_not_finite(comm: Communicator) -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=np.float64), nn.BatchNorm1d(4, dtype=np.float64))
    parallel = DataParallel(model, comm)
    x = np.full((4, 4), np.nan if comm.rank == 0 else 1.0)
    with np.errstate(all="ignore"), pytest.raises(NonFiniteGradientError):
        parallel(x).mean().backward()
    assert int(model[1].num_batches_tracked) == 0
    np.testing.assert_array_equal(model[1].running_mean, np.zeros(4))


@suite.scenario()
def statistics_of_a_frozen_model_move_with_the_next_sum_on_all_ranks_alike(comm: Communicator) -> None:
    """Also if that is made for another model, as where a GAN's generator learns through its discriminator."""
    other, model = make_model(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    before, after = DataParallel(other, comm), DataParallel(model, comm)
    x = rows(4, first=10 * comm.rank)[0]
    for parameter in model.parameters():
        parameter.requires_grad = False
    after(x[:, :2])  # needs no gradient, and nothing is summed
    np.testing.assert_array_equal(model[1].running_mean, np.zeros(2))
    after(before(x)).mean().backward()
    assert model[1].running_mean.any()
    assert len(set(comm.allgather(model[1].running_mean.tobytes()))) == 1


@suite.scenario()
def one_backward_pass_goes_through_two_models(comm: Communicator) -> None:
    """As in a GAN; one of them has made reductions of its own before, so its expectation is another one."""
    first, second = make_model(), nn.Linear(make_model()(rows(1)[0]).shape[1], 1, dtype=np.float64)
    mine, total = uneven(comm)
    x, _ = rows(total)
    inner, outer = DataParallel(first, comm), DataParallel(second, comm)
    outer(first(x[mine]).detach()).mean().backward()
    for model in (first, second):
        model.zero_grad()
    outer(inner(x[mine])).mean().backward()
    expected, last = make_model(), nn.Linear(second.in_features, 1, dtype=np.float64)
    last.load_state_dict(second.state_dict())
    last(expected(x)).mean().backward()
    assert_gradients(first, gradients(expected))
    assert_gradients(second, gradients(last))


@suite.scenario()
def one_backward_pass_goes_through_two_models_and_a_rank_without_data_has_none(comm: Communicator) -> None:
    """The models expect different numbers of examples; only ranks with data know which of them they are weighed by."""
    first, second = make_model(), nn.Linear(2, 1, dtype=np.float64)
    inner, outer = DataParallel(first, comm), DataParallel(second, comm)
    (x, _), (z, _) = rows(4), (np.random.default_rng(0).normal(size=(7, 2)), None)

    def backward(model: DataParallel, loss: Tensor | None, examples: int) -> None:
        model.backward(loss if loss is not None else Tensor(np.zeros(())), examples=examples)

    for _ in range(3):
        for model in (first, second):
            model.zero_grad()
        backward(outer, outer(z).mean() if comm.rank == 0 else None, 7 if comm.rank == 0 else 0)
        for model in (first, second):
            model.zero_grad()
        if comm.rank == 0:
            outer(inner(x)).mean().backward()
        else:
            for wrapped in (inner, outer):  # as they were called
                backward(wrapped, None, 0)
        expected, last = make_model(), nn.Linear(2, 1, dtype=np.float64)
        last.load_state_dict(second.state_dict())
        last(expected(x)).mean().backward()
        assert_gradients(first, gradients(expected))
        assert_gradients(second, gradients(last))


@suite.scenario()
def zero_grad_throws_away_passes_through_two_models_too(comm: Communicator) -> None:
    first, second = make_model(), nn.Linear(2, 1, dtype=np.float64)
    mine, total = uneven(comm)
    x, _ = rows(total)
    inner, outer = DataParallel(first, comm), DataParallel(second, comm)
    outer(first(x[mine]).detach()).mean().backward()  # now they expect different numbers of examples
    for synchronised in (False, True):
        for model in (first, second):
            model.zero_grad()
        with ExitStack() as contexts:
            for parallel in (inner, outer):
                contexts.enter_context(nullcontext() if synchronised else parallel.no_sync())
            outer(inner(x[mine])).mean().backward()
    expected, last = make_model(), nn.Linear(2, 1, dtype=np.float64)
    last.load_state_dict(second.state_dict())
    last(expected(x)).mean().backward()
    assert_gradients(first, gradients(expected))
    assert_gradients(second, gradients(last))


@suite.scenario()
def one_collective_carries_a_step(comm: Communicator) -> None:
    counting = Counting(comm)
    model = make_model()
    parallel = DataParallel(model, counting, verify_every=3)
    counting.take()
    x, y = rows(2, comm.rank)
    expected = [["allreduce"], ["allreduce"], ["allgather", "allreduce"]] * 2
    found = []
    for _ in expected:
        model.zero_grad()
        F.mse_loss(parallel(x), y).backward()
        found.append(counting.take())
    assert found == expected


@suite.scenario()
def nothing_is_compared_after_the_start_if_verify_every_is_0(comm: Communicator) -> None:
    counting = Counting(comm)
    parallel = DataParallel(make_model(), counting, verify_every=0)
    counting.take()
    x, y = rows(2)
    for _ in range(5):
        F.mse_loss(parallel(x), y).backward()
    assert counting.take() == ["allreduce"] * 5


@suite.scenario()
def no_batch_anywhere_is_a_gradient_of_zero(comm: Communicator) -> None:
    model = make_model()
    parallel = DataParallel(model, comm)
    x, y = rows(0)
    F.mse_loss(parallel(x), y).backward()
    assert parallel.received == {"examples": 0}
    for parameter in model.parameters():
        np.testing.assert_array_equal(parameter.grad, np.zeros(parameter.shape))


@suite.scenario()
def what_an_empty_rank_computes_does_not_count(comm: Communicator) -> None:
    """A mean over nothing is NaN in most code."""
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    output = DataParallel(model, comm)(x[mine])
    difference = output - y[mine]
    with np.errstate(invalid="ignore"):
        ((difference * difference).sum() / np.float64(difference.data.size)).backward()
    assert_gradients(model, expected_gradients(x, y))


# --- accumulation


def accumulate(parallel: DataParallel, x: np.ndarray, y: np.ndarray, pieces: list[slice], factor: float) -> None:
    for number, piece in enumerate(pieces):
        with nullcontext() if number == len(pieces) - 1 else parallel.no_sync():
            (F.mse_loss(parallel(x[piece]), y[piece]) * factor).backward()


@suite.scenario()
def losses_divided_by_their_number_give_the_mean_over_all_examples_even_of_unequal_pieces(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    pieces = [slice(0, 0), slice(0, 1), slice(1, None)]
    model = make_model()
    accumulate(DataParallel(model, comm), x[mine], y[mine], pieces, 1 / 3)
    assert_gradients(model, expected_gradients(x, y))


@suite.scenario()
def gradients_of_passes_add_up(comm: Communicator) -> None:
    """As in PyTorch: k losses that nobody divides give k times the mean."""
    x, y = rows(6 * comm.size)
    mine = share(len(x), comm.rank, comm.size)
    model = make_model()
    accumulate(DataParallel(model, comm), x[mine], y[mine], [slice(0, 2), slice(2, 4), slice(4, 6)], 1.0)
    assert_gradients(model, expected_gradients(x, y, factor=3))


@suite.scenario()
def no_sync_sends_nothing_and_ends_with_its_block(comm: Communicator) -> None:
    counting = Counting(comm)
    model = make_model()
    parallel = DataParallel(model, counting)
    counting.take()
    x, y = rows(3, first=100 * comm.rank)
    with parallel.no_sync():
        F.mse_loss(parallel(x), y).backward()
        with parallel.no_sync():
            F.mse_loss(parallel(x), y).backward()
        F.mse_loss(parallel(x), y).backward()
    assert counting.take() == []
    F.mse_loss(parallel(x), y).backward()
    assert counting.take() == ["allreduce"]
    assert parallel.received["examples"] == 4 * 3 * comm.size
    with pytest.raises(KeyError), parallel.no_sync():
        raise KeyError
    F.mse_loss(parallel(x), y).backward()
    assert counting.take() == ["allreduce"]


@suite.scenario()
def gradients_that_nobody_zeroed_are_added_to(comm: Communicator) -> None:
    """As in PyTorch, and across any number of synchronised passes."""
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    for times in (1, 2, 3):
        F.mse_loss(parallel(x[mine]), y[mine]).backward()
        assert_gradients(model, expected_gradients(x, y, factor=times))
    accumulate(parallel, x[mine], y[mine], [slice(0, 1), slice(1, None)], 1 / 2)
    assert_gradients(model, expected_gradients(x, y, factor=4))
    model.zero_grad()
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    assert_gradients(model, expected_gradients(x, y))


def assert_thrown_away(comm: Communicator, forget: Callable[[DataParallel], None]) -> None:
    """What was accumulated before `forget` counts in no later step."""
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    with parallel.no_sync():
        F.mse_loss(parallel(x[mine]) * 7, y[mine]).backward()
    forget(parallel)
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    assert parallel.received["examples"] == total
    assert_gradients(model, expected_gradients(x, y))


ZERO_GRAD = {  # whose
    "DataParallel": lambda parallel: parallel.zero_grad,
    "the module": lambda parallel: parallel.module.zero_grad,
    "an optimizer": lambda parallel: optim.SGD(parallel.parameters(), lr=0.1).zero_grad,
}


@suite.scenario()
def zero_grad_throws_away_what_was_accumulated(comm: Communicator) -> None:
    for of in ZERO_GRAD.values():
        assert_thrown_away(comm, lambda parallel, of=of: of(parallel)())


@suite.scenario()
def zero_grad_to_zeros_throws_away_what_was_accumulated(comm: Communicator) -> None:
    def forget(parallel: DataParallel, of: Callable[[DataParallel], Callable[..., None]]) -> None:
        of(parallel)(set_to_none=False)
        assert not any(parameter.grad is None or parameter.grad.any() for parameter in parallel.parameters())

    for of in ZERO_GRAD.values():
        assert_thrown_away(comm, lambda parallel, of=of: forget(parallel, of))


@suite.scenario()
def a_rank_without_examples_counts_its_passes_after_zero_grad_to_zeros_too(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    model.zero_grad(set_to_none=False)
    for context in (parallel.no_sync(), nullcontext()):
        with context:
            loss = F.mse_loss(parallel(x[mine]), y[mine]) / 2 if len(x[mine]) else tensor(0.0)
            parallel.backward(loss, examples=len(x[mine]))
    assert parallel.received["examples"] == 2 * total
    assert_gradients(model, expected_gradients(x, y))


@suite.scenario()
def a_backward_pass_that_raised_leaves_no_trace_in_the_next_step(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    nothing = np.zeros((1, 4)), np.zeros((1, 2))  # a rank without examples has nothing to walk back through
    x_here, y_here = (x[mine], y[mine]) if len(x[mine]) else nothing
    loss = F.mse_loss(parallel(x_here), y_here)
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    model.zero_grad()
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    assert_gradients(model, expected_gradients(x, y))


# --- parallel.backward


@suite.scenario()
def backward_takes_the_number_of_examples(comm: Communicator) -> None:
    """Rows that are padded: rank r's loss is a mean over r + 1 of its 8 rows."""
    counted = comm.rank + 1
    x, y = rows(8, first=100 * comm.rank)
    model = make_model()
    parallel = DataParallel(model, comm)
    parallel.backward(F.mse_loss(parallel(x)[:counted], y[:counted]), examples=counted)
    assert parallel.received["examples"] == comm.size * (comm.size + 1) / 2
    every = [rows(rank + 1, first=100 * rank) for rank in range(comm.size)]
    assert_gradients(model, expected_gradients(*(np.concatenate(arrays) for arrays in zip(*every, strict=True))))


@suite.scenario()
def the_number_given_to_backward_holds_for_that_pass_only(comm: Communicator) -> None:
    x, y = rows(4)
    parallel = DataParallel(make_model(), comm)
    parallel.backward(F.mse_loss(parallel(x), y), examples=1.5)
    assert parallel.received["examples"] == 1.5 * comm.size
    with pytest.raises(RuntimeError, match="starts from a single number"):
        parallel.backward(parallel(x), examples=9)
    F.mse_loss(parallel(x), y).backward()
    assert parallel.received["examples"] == 4 * comm.size


@suite.scenario()
def a_rank_without_data_passes_a_constant(comm: Communicator) -> None:
    x, y = rows(5)
    model = make_model()
    parallel = DataParallel(model, comm)
    for _ in range(2):
        model.zero_grad()
        if comm.rank == comm.size - 1:
            parallel.backward(F.mse_loss(parallel(x), y), examples=5)
        else:
            parallel.backward(tensor(0.0), examples=0)
        assert parallel.received["examples"] == 5
        assert_gradients(model, expected_gradients(x, y))


@suite.scenario()
def a_loss_that_did_not_come_through_parallel_is_weighed_too(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    parallel.backward(F.mse_loss(model(x[mine]), y[mine]), examples=len(x[mine]))
    assert parallel.received["examples"] == total
    assert_gradients(model, expected_gradients(x, y))


@suite.scenario()
def a_penalty_on_the_parameters_counts_once(comm: Communicator) -> None:
    def penalised(model: nn.Module, output: Tensor, y: np.ndarray) -> Tensor:
        return F.mse_loss(output, y) + 0.1 * (model[0].weight * model[0].weight).sum()

    mine, total = uneven(comm)
    x, y = rows(total)
    model, alone = make_model(), make_model()
    penalised(model, DataParallel(model, comm)(x[mine]), y[mine]).backward()
    penalised(alone, alone(x), y).backward()
    assert_gradients(model, gradients(alone))


@suite.scenario()
def fewer_than_no_examples_are_refused(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="0 or more, got -1"):
        DataParallel(make_model(), comm).backward(tensor(0.0), examples=-1)


# --- several forward passes


@suite.scenario()
def two_forward_passes_in_one_backward_pass_are_one_step(comm: Communicator) -> None:
    mine, total = uneven(comm)
    (x, y), (other, _) = rows(total), rows(total, first=500)
    counting = Counting(comm)
    model, alone = make_model(), make_model()
    parallel = DataParallel(model, counting)
    counting.take()
    F.mse_loss(parallel(x[mine]) * parallel(other[mine]), y[mine]).backward()
    F.mse_loss(alone(x) * alone(other), y).backward()
    assert counting.take() == ["allreduce"]
    assert parallel.received["examples"] == total
    assert_gradients(model, gradients(alone))


@suite.scenario()
def forward_passes_over_different_numbers_of_examples_need_to_be_told(comm: Communicator) -> None:
    (x, y), (many, _) = rows(4), rows(12)
    model, alone = make_model(), make_model()
    parallel = DataParallel(model, comm)
    with pytest.raises(
        RuntimeError, match=r"examples, in the proportion 4 : 12;.*parallel\.backward\(loss, examples=n\)"
    ):
        (F.mse_loss(parallel(x), y) + parallel(many).mean()).backward()
    model.zero_grad()
    parallel(x), parallel(many)  # two passes over 4 examples with one over 12 between them
    parallel.backward(F.mse_loss(parallel(x), y) + parallel(many).mean() + parallel(x).mean(), examples=4)
    (F.mse_loss(alone(x), y) + alone(many).mean() + alone(x).mean()).backward()
    assert parallel.received["examples"] == 4 * comm.size
    assert_gradients(model, gradients(alone))


@suite.scenario()
def a_forward_pass_without_a_backward_pass_changes_nothing(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    parallel(x)
    with no_grad():
        assert not parallel(x).requires_grad
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    assert parallel.received["examples"] == total
    assert_gradients(model, expected_gradients(x, y))


# --- what goes in and comes out


@dataclass
class Answer:
    score: Tensor
    note: str = "kept"


class Wrapped(nn.Module):
    """The small model, with its output in a container."""

    def __init__(self, wrap) -> None:
        self.inner, self.wrap = make_model(), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.inner(x))


@suite.scenario()
def outputs_may_be_in_containers(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    for wrap, unwrap in (
        (lambda t: (t, None), lambda o: o[0]),
        (lambda t: [1, t], lambda o: o[1]),
        (lambda t: {"a": 3, "b": (t,)}, lambda o: o["b"][0]),
        (Answer, lambda o: o.score),
    ):
        model = Wrapped(wrap)
        F.mse_loss(unwrap(DataParallel(model, comm)(x[mine])), y[mine]).backward()
        assert_gradients(model.inner, expected_gradients(x, y))


@suite.scenario()
def an_output_whose_backward_pass_would_go_unseen_is_refused(comm: Communicator) -> None:
    class Opaque:
        def __init__(self, score: Tensor) -> None:
            self.score = score

    parallel = DataParallel(Wrapped(Opaque), comm)
    with pytest.raises(TypeError, match="no tensor in what Wrapped returned, a Opaque"):
        parallel(rows(2)[0])
    with no_grad():
        assert isinstance(parallel(rows(2)[0]).score, Tensor)  # where there is no backward pass, anything goes


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        self.inner = make_model()

    def forward(self, scale: float, x: Tensor, *, shift: Tensor | None = None) -> Tensor:
        return self.inner(x) * scale if shift is None else self.inner(x) * scale + shift


@suite.scenario()
def the_first_array_among_the_arguments_is_the_batch(comm: Communicator) -> None:
    x, y = rows(3)
    parallel = DataParallel(TwoInputs(), comm)
    for output in (
        parallel(2.0, x),
        parallel(2.0, tensor(x)),
        parallel(2.0, x=x, shift=np.zeros(2)),
        parallel(2.0, x, shift=np.zeros((1, 2))),
    ):
        F.mse_loss(output, y).backward()
        assert parallel.received["examples"] == 3 * comm.size
    with pytest.raises(TypeError, match="no array among the arguments"):
        parallel(2.0, [[1.0] * 4])


@suite.scenario()
def state_and_modes_are_the_modules(comm: Communicator) -> None:
    model = make_model()
    parallel = DataParallel(model, comm)
    assert list(parallel.state_dict()) == list(model.state_dict())
    assert list(parallel.parameters()) == list(model.parameters())
    parallel.eval()
    assert not any(module.training for module in model.modules())
    parallel.train()
    assert all(module.training for module in model.modules())
    parallel.load_state_dict(make_model(seed=5).state_dict())
    np.testing.assert_array_equal(model[0].weight.data, make_model(seed=5)[0].weight.data)
    parallel.verify()


@suite.scenario()
def the_model_may_change_its_dtype(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    model.float()
    F.mse_loss(parallel(x[mine].astype(np.float32)), y[mine]).backward()
    model.double()
    for parameter, other in zip(model.parameters(), make_model().parameters(), strict=True):
        parameter.data = other.data
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    assert_gradients(model, expected_gradients(x, y))


# --- frozen parameters


@suite.scenario()
def frozen_parameters_are_broadcast_and_stay(comm: Communicator) -> None:
    model = make_model(seed=comm.rank)
    model[0].requires_grad_(False)
    parallel = DataParallel(model, comm)
    x, y = rows(3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(parallel(x), y).backward()
        optimizer.step()
    np.testing.assert_array_equal(model[0].weight.data, make_model()[0].weight.data)
    assert model[0].weight.grad is None
    assert not np.array_equal(model[2].weight.data, make_model()[2].weight.data)


@suite.scenario()
def a_thawed_parameter_is_an_error_that_names_it(comm: Communicator) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    parallel = DataParallel(model, comm)
    model[0].requires_grad_(True)
    x, y = rows(3)
    with pytest.raises(RuntimeError, match=r"0\.weight, 0\.bias was frozen when DataParallel was made"):
        F.mse_loss(parallel(x), y).backward()


@suite.scenario()
def a_parameter_may_be_frozen_later_and_thawed_again(comm: Communicator) -> None:
    mine, total = uneven(comm)
    x, y = rows(total)
    model = make_model()
    parallel = DataParallel(model, comm)
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    model[0].requires_grad_(False)
    for _ in range(3):
        model.zero_grad()
        F.mse_loss(parallel(x[mine]), y[mine]).backward()
        assert model[0].weight.grad is None
        np.testing.assert_allclose(model[2].weight.grad, expected_gradients(x, y)["2.weight"], rtol=1e-12)
    model[0].requires_grad_(True)
    model.zero_grad()
    F.mse_loss(parallel(x[mine]), y[mine]).backward()
    assert_gradients(model, expected_gradients(x, y))


@suite.scenario(min_size=2)
def the_place_of_a_parameter_frozen_later_does_not_grow(comm: Communicator) -> None:
    """One example a step, so nothing divides the sum over the ranks: float32 would overflow after 128 doublings."""
    model = make_model().float()
    parallel = DataParallel(model, comm)
    x, y = rows(1)
    x, y = x.astype(np.float32), y.astype(np.float32)
    F.mse_loss(parallel(x), y).backward()
    model[0].requires_grad_(False)
    mine = slice(0, int(comm.rank == 0))
    for _ in range(150):
        model.zero_grad()
        F.mse_loss(parallel(x[mine]), y[mine]).backward()
    model[0].weight.requires_grad = True
    assert np.isfinite(model[0].weight._grad).all()


@suite.scenario()
def a_model_with_nothing_to_train_is_refused(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="Sequential has no parameter to train"):
        DataParallel(make_model().requires_grad_(False), comm)
    with pytest.raises(ValueError, match="Tanh has no parameter to train"):
        DataParallel(nn.Tanh(), comm)


@suite.scenario()
def what_is_no_module_and_what_is_no_number_of_examples_is_refused(comm: Communicator) -> None:
    for wrong in (nn.ReLU, lambda x: x, DataParallel(make_model(), comm)):
        with pytest.raises(TypeError, match=r"DataParallel wraps a Module of distprop\.nn, got <"):
            DataParallel(wrong, comm)
    parallel = DataParallel(make_model(), comm)
    loss = parallel(rows(2)[0]).mean()
    for examples in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"examples must be 0 or more, got {examples}"):
            parallel.backward(loss, examples=examples)


@suite.scenario()
def parameters_of_several_dtypes_are_refused(comm: Communicator) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).double())
    with pytest.raises(TypeError, match="one dtype, got float32, float64"):
        DataParallel(model, comm)


# --- ranks that do not agree


@suite.scenario(min_size=2)
def models_that_differ_between_ranks_are_refused_on_all(comm: Communicator) -> None:
    odd = comm.rank == comm.size - 1
    linear = nn.Linear
    with_buffer, frozen = linear(3, 2), linear(3, 2)
    with_buffer.register_buffer("seen", np.zeros(3))
    frozen.weight.requires_grad = False
    last = comm.size - 1
    for usual, other, message in (
        (linear(3, 2), linear(3, 4), rf"rank 0 has weight \(2, 3\) float32 where rank {last} has weight \(4, 3\)"),
        (
            linear(3, 2),
            linear(3, 2).double(),
            rf"weight \(2, 3\) float32 where rank {last} has weight \(2, 3\) float64",
        ),
        (linear(3, 2), linear(3, 2, bias=False), rf"bias \(2,\) float32 where rank {last} has nothing"),
        (linear(3, 2, bias=False), linear(3, 2), rf"rank 0 has nothing where rank {last} has bias"),
        (linear(3, 2), nn.Sequential(linear(3, 2)), rf"weight .* where rank {last} has 0\.weight"),
        (linear(3, 2), frozen, rf"weight \(2, 3\) float32 where rank {last} has weight \(2, 3\) float32 frozen"),
        (linear(3, 2), with_buffer, rf"rank 0 has nothing where rank {last} has seen \(3,\) float64 buffer"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            DataParallel(other if odd else usual, comm)
        assert caught.value.culprits == ((last,) if comm.size > 2 else (0, 1))  # type: ignore[attr-defined]
    comm.barrier()


def train_steps(parallel: DataParallel, optimizer: optim.Optimizer, count: int) -> None:
    x, y = rows(3)
    for _ in range(count):
        optimizer.zero_grad()
        F.mse_loss(parallel(x), y).backward()
        optimizer.step()


@suite.scenario(min_size=2)
def a_parameter_changed_on_one_rank_is_found_and_named(comm: Communicator) -> None:
    culprit = comm.size - 1
    for verify_every in (1, 4):
        model = make_model()
        parallel = DataParallel(model, comm, verify_every=verify_every)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        train_steps(parallel, optimizer, 2)
        if comm.rank == culprit:
            model[2].bias.data[1] = np.nextafter(model[2].bias.data[1], 9)
        others = ", ".join(map(str, range(culprit)))
        who = "rank 0 against rank 1" if comm.size == 2 else f"rank {culprit} against ranks {others}"
        with pytest.raises(DivergenceError, match=rf"parameter 2\.bias of shape \(2,\) differs between ranks: {who}$"):
            train_steps(parallel, optimizer, verify_every)
    comm.barrier()


@suite.scenario(min_size=2)
def a_frozen_parameter_changed_on_one_rank_is_found_too(comm: Communicator) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    parallel = DataParallel(model, comm)
    model[0].weight.data[0, 0] += comm.rank == 0
    with pytest.raises(DivergenceError, match=r"parameter 0\.weight of shape \(6, 4\) differs between ranks: rank 0"):
        parallel.verify()


@suite.scenario()
def equal_parameters_are_not_reported_whatever_is_in_them(comm: Communicator) -> None:
    model = nn.Sequential(make_model(), nn.Module())
    model[1].nothing = Parameter(np.empty((0, 3)))
    model[1].number = Parameter(np.array(np.nan))
    DataParallel(model, comm).verify()


@suite.scenario(min_size=2)
def ranks_with_different_numbers_of_passes_are_told_so_on_all(comm: Communicator) -> None:
    """In the second round rank r makes r + 1 passes, so the middle one makes as many as the ranks do on average."""
    x, y = rows(2)
    everyone = tuple(range(comm.size))
    for passes, of_rank_1, culprits in (
        (2 if comm.rank == 0 else 1, 1, (0,)),
        (comm.rank + 1, 2, everyone),
        (65 if comm.rank == 0 else 1, 1, (0,)),
    ):
        parallel = DataParallel(make_model(), comm)
        F.mse_loss(parallel(x), y).backward()
        with pytest.raises(ScheduleError, match=r"same number of steps and of no_sync\(\) passes") as caught:
            accumulate(parallel, x, y, [slice(None)] * passes, 1 / passes)
        assert f"rank 1 is at reduction 1 after {of_rank_1} backward" in str(caught.value)
        assert caught.value.culprits == (culprits if comm.size > 2 else everyone)  # of two nobody knows
    comm.barrier()


@suite.scenario(min_size=2)
def a_gradient_that_is_not_finite_is_said_of_its_own_step_only(comm: Communicator) -> None:
    """One model, one bad rank after the other, and in between a step that is good."""
    x, y = rows(2)
    model = make_model()
    parallel = DataParallel(model, comm)
    for bad_rank in (comm.size - 1, 0):
        model.zero_grad()
        wrong = y * np.where(comm.rank == bad_rank, np.nan, 1)
        with np.errstate(all="ignore"), pytest.raises(NonFiniteGradientError) as caught:
            F.mse_loss(parallel(x), wrong).backward()
        assert caught.value.culprits == (bad_rank,)
        model.zero_grad()
        F.mse_loss(parallel(x), y).backward()
        assert_gradients(model, expected_gradients(x, y))


@suite.scenario()
def the_parameter_whose_gradient_is_not_finite_is_named_wherever_the_number_lies(comm: Communicator) -> None:
    model = make_model()
    parallel = DataParallel(model, comm)
    for name, parameter in model.named_parameters():
        for place in (0, -1):
            factor = np.zeros(parameter.shape)
            factor.flat[place] = np.inf
            model.zero_grad()
            with pytest.raises(NonFiniteGradientError, match=rf"parameter {name} first"):
                (parallel(rows(2)[0]).mean() + (parameter * factor).sum()).backward()


@suite.scenario(min_size=2)
def when_one_rank_finds_that_the_last_comparison_was_long_ago_all_compare(comm: Communicator) -> None:
    counting = Counting(comm)
    model = make_model()
    parallel = DataParallel(model, counting, verify_every=1000)
    x, y = rows(2)
    found = []
    for step in range(4):
        if step == 1 and comm.rank == comm.size - 1:
            parallel._verified -= 2 * VERIFY_SECONDS
        counting.take()
        F.mse_loss(parallel(x), y).backward()
        found.append(counting.take())
    assert found == [["allreduce"], ["allreduce"], ["allgather", "allreduce"], ["allreduce"]]


# --- numbers that travel with the gradients


@suite.scenario()
def numbers_that_are_sent_come_back_as_their_sums(comm: Communicator) -> None:
    parallel = DataParallel(make_model(), comm)
    x, y = rows(2)
    assert parallel.received == {}
    names = [f"number_{i}" for i in range(MESSAGE_NUMBERS)]
    parallel.send(**{name: 10 * comm.rank + i for i, name in enumerate(names)})
    with parallel.no_sync():
        F.mse_loss(parallel(x), y).backward()
    assert parallel.received == {}
    F.mse_loss(parallel(x), y).backward()
    ranks = comm.size * (comm.size - 1) / 2
    sums = {name: 10 * ranks + i * comm.size for i, name in enumerate(names)}
    assert parallel.received == {"examples": 4 * comm.size, **sums}
    F.mse_loss(parallel(x), y).backward()
    assert parallel.received == {"examples": 2 * comm.size}
    parallel.send(bad=comm.rank == 0, loss=np.nan if comm.rank == 0 else 1.0)
    F.mse_loss(parallel(x), y).backward()
    assert parallel.received["bad"] == 1
    assert np.isnan(parallel.received["loss"])
    with pytest.raises(ValueError, match=f"at most {MESSAGE_NUMBERS} numbers travel with the gradients"):
        parallel.send(**{f"number_{i}": 0 for i in range(MESSAGE_NUMBERS + 1)})


@suite.scenario()
def counts_are_exact_in_float32_beyond_what_it_can_hold(comm: Communicator) -> None:
    parallel = DataParallel(make_model().float(), comm)
    x = rows(1)[0].astype(np.float32)
    for examples in (2**24 + 1, 2**30 + 4095, 4095, 4096):
        parallel.backward(parallel(x).sum() * 0, examples=examples + comm.rank)
        assert parallel.received["examples"] == examples * comm.size + comm.size * (comm.size - 1) // 2


@suite.scenario()
def gradients_have_the_parameters_dtype(comm: Communicator) -> None:
    model = make_model().float()
    x, y = rows(3)
    F.mse_loss(DataParallel(model, comm)(x.astype(np.float32)), y).backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {np.dtype(np.float32)}
