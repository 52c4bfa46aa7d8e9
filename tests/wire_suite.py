"""What sums with 16 bits on the wire promise, on any number of ranks."""

import numpy as np
import pytest

from distprop import functional as F
from distprop import manual_seed, nn
from distprop.comm import Communicator
from distprop.comm.wire import WIRES, WireSum
from distprop.parallel import DataParallel
from scenario import Suite

suite = Suite()
ERROR = {"bf16": 2**-7, "fp16": 2**-10}  # relative, of two roundings
EXACT = 3  # numbers at the end


def brought(rank: int, length: int) -> np.ndarray:
    message = np.random.default_rng(rank).standard_normal(length).astype(np.float32)
    message[-EXACT:] = 2**20 + rank  # would not survive 16 bits
    return message


def crosses(comm: Communicator) -> bool:
    """Whether anything is rounded: not on a single node that shares its memory."""
    return comm.size > 1 and (comm.node is None or comm.node.size < comm.size)


@suite.scenario()
def sums_are_within_the_rounding_of_the_format_and_the_same_on_all_ranks(comm: Communicator) -> None:
    for wire in WIRES:
        for length in (EXACT, 5, 1000, 200_001):
            message = comm.allocate(length, np.float32)
            message[:] = brought(comm.rank, length)
            assert WireSum(comm, wire, length - EXACT).allreduce(message) is message
            every = [brought(rank, length) for rank in range(comm.size)]
            total, sizes = np.sum(every, axis=0, dtype=np.float64), np.sum(np.abs(every), axis=0, dtype=np.float64)
            difference = np.abs(message - total)[:-EXACT]
            np.testing.assert_array_less(difference, ERROR[wire] * sizes[:-EXACT] + 1e-6)
            np.testing.assert_array_equal(message[-EXACT:], np.sum(every, axis=0, dtype=np.float32)[-EXACT:])
            assert len(set(comm.allgather(message.tobytes()))) == 1
            if length == 200_001:
                assert (difference.max() > ERROR[wire] / 8) == crosses(comm)


@suite.scenario()
def over_the_steps_nothing_is_lost(comm: Communicator) -> None:
    """0.1 is in no binary format, and 1e-9 is too small for fp16: each single sum is wrong, their mean is not."""
    steps, value = 64, np.array([0.1, 0.3, 1e-3, 1e-9], np.float32).repeat(8)
    for wire in WIRES:
        message, total = comm.allocate(len(value), np.float32), np.zeros(len(value))
        reduce = WireSum(comm, wire, len(value)).allreduce
        for _ in range(steps):
            message[:] = value
            total += reduce(message)
        wanted = steps * comm.size * value.astype(np.float64)
        left_over = 2 * comm.size * (ERROR[wire] * value + 6e-8)  # of one step, however many there were
        np.testing.assert_array_less(np.abs(total - wanted), left_over + 1e-6 * wanted)


@suite.scenario()
def a_step_that_is_not_finite_does_not_spoil_the_next(comm: Communicator) -> None:
    for wire in WIRES:
        reduce, message = WireSum(comm, wire, 4).allreduce, comm.allocate(4, np.float32)
        message[:] = [np.nan, np.inf, -np.inf, 1] if comm.rank == comm.size - 1 else 1
        reduce(message)
        assert not np.isfinite(message[0])
        message[:] = 1
        np.testing.assert_allclose(reduce(message)[3], comm.size, rtol=2 * ERROR[wire])
        message[:] = 1
        assert np.isfinite(reduce(message)).all()


@suite.scenario()
def only_float32_is_rounded(comm: Communicator) -> None:
    with pytest.raises(TypeError, match="float32 parameters, not for float64"):
        WireSum(comm, "bf16", 3).allreduce(np.zeros(3))
    with pytest.raises(ValueError, match="'bf16', 'fp16'; got 'int8'"):
        WireSum(comm, "int8", 3)  # type: ignore[arg-type]


@suite.scenario()
def training_goes_on_as_with_float32(comm: Communicator) -> None:
    """A few steps of both stay together, though the first has another scale; the parameters are equal on all ranks."""
    x = np.random.default_rng(comm.rank).standard_normal((8, 4)).astype(np.float32)
    models = {}
    for wire in (None, *WIRES):
        manual_seed(0)
        model = models[wire] = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        parallel = DataParallel(model, comm, wire=wire)
        for _ in range(20):
            F.mse_loss(parallel(x), x[:, :2]).backward()
            assert parallel.received["examples"] == 8 * comm.size
            for parameter in model.parameters():
                parameter.data -= 0.1 * parameter.grad
                parameter.grad = None
        parallel.verify()
    for wire in WIRES:
        for one, other in zip(models[None].parameters(), models[wire].parameters(), strict=True):
            # the rounding of one step remains, of gradients below 0.5
            np.testing.assert_allclose(other.data, one.data, rtol=0, atol=0.1 * ERROR[wire] * 0.5)


@suite.scenario()
def deterministic_mode_refuses_it(comm: Communicator) -> None:
    with pytest.raises(ValueError, match=r"wire='bf16' rounds what crosses the network.*deterministic"):
        DataParallel(nn.Linear(2, 1), comm, shards=8, wire="bf16")
