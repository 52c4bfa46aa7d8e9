"""The same bits on any number of ranks."""

from functools import cache

import numpy as np
import pytest

import distprop as dp
from deterministic_suite import CASES, MODELS, WIDTH, dataset, fingerprint, missing
from distprop import functional as F
from distprop import nn, optim
from distprop.comm import SoloCommunicator, run_threads


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_run_leaves_the_same_bits_on_any_number_of_ranks(case: tuple[str, str, str]) -> None:
    expected = of_one_process(*case)
    for ranks in (2, 3, 4, 5, 8, 11):
        found = run_threads(ranks, lambda comm: fingerprint(comm, *case), share_memory=ranks % 2 == 0)
        assert set(found) == {expected}, ranks


def test_no_layer_and_no_optimizer_is_forgotten() -> None:
    assert not missing(), "add them to MODELS or OPTIMIZERS, and to CASES, in deterministic_suite.py"


def test_every_case_is_another_run() -> None:
    """A setting that has no effect would prove nothing."""
    assert len({of_one_process(*case) for case in CASES}) == len(CASES)


@cache
def of_one_process(*case: str) -> str:
    return fingerprint(SoloCommunicator(), *case)


def test_the_default_mode_does_round_differently() -> None:
    """Otherwise the test above would prove nothing."""

    def parameters(comm: dp.comm.Communicator) -> bytes:
        dp.manual_seed(1)
        model = MODELS["plain"]()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, batch_size=32, progress=False).fit(dataset(), steps=8)
        return b"".join(p.data.tobytes() for p in model.parameters())

    assert parameters(SoloCommunicator()) != run_threads(3, parameters)[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_running_statistics_move_by_the_mean_over_all_examples(ranks: int) -> None:
    """Also without deterministic mode: ranks that evaluate must evaluate the same model."""

    def train(comm: dp.comm.Communicator) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(0)
        examples = dp.data.ArrayDataset(rng.normal(size=(31, WIDTH)), rng.integers(0, 5, 31))
        dp.manual_seed(1)
        model = MODELS["statistics"]().double()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, batch_size=8, progress=False).fit(examples, epochs=2)
        return model[0].running_mean, int(model[0].batches)

    expected = np.zeros(WIDTH)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(31, WIDTH))
    for epoch in range(2):
        order = dp.data.loader.order(0, epoch, 31)
        for start in range(0, 31, 8):
            expected = 0.9 * expected + 0.1 * x[order[start : start + 8]].mean(axis=0)
    for mean, batches in run_threads(ranks, train):
        np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-14)
        assert batches == 8


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_model_that_becomes_float64_has_gradients_of_float64(ranks: int) -> None:
    """With more ranks than shards as well, where one has no backward pass."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4))

    def train(comm: dp.comm.Communicator) -> np.ndarray:
        dp.manual_seed(1)
        parallel = dp.DataParallel(nn.Linear(4, 3), comm, shards=2)
        parallel.module.double()
        parallel.zero_grad()
        for shard in range(2)[dp.data.loader.share(2, comm.rank, comm.size)]:
            parallel(x[3 * shard : 3 * shard + 3]).sum(dim=1).mean().backward()
            parallel.end_shard()
        parallel.reduce_shards()
        return parallel.module.weight.grad.copy()

    for gradient in run_threads(ranks, train, share_memory=True):
        np.testing.assert_allclose(gradient, np.broadcast_to(x.mean(axis=0), (3, 4)), rtol=1e-14)


def test_layers_whose_statistics_are_those_of_the_ranks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3, comm=SoloCommunicator()))
    with pytest.raises(
        ValueError, match="1 is a SyncBatchNorm, which needs the whole global batch in one forward pass"
    ):
        dp.DataParallel(model, shards=4)


def test_a_shard_outside_its_mode_is_an_error() -> None:
    parallel = dp.DataParallel(nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match="shards=n"):
        parallel.end_shard()
    with pytest.raises(RuntimeError, match="shards=n"):
        parallel.reduce_shards()
    with pytest.raises(ValueError, match="1 or more; got 0"):
        dp.DataParallel(nn.Linear(2, 1), shards=0)
