"""The same bits on any number of ranks."""

import numpy as np
import pytest

import distprop as dp
from deterministic_suite import MODELS, OPTIMIZERS, SETTINGS, fingerprint
from distprop import functional as F
from distprop import nn, optim
from distprop.comm import SoloCommunicator, run_threads


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_leaves_the_same_bits_on_any_number_of_ranks(model: str, setting: str) -> None:
    expected = fingerprint(SoloCommunicator(), model, setting)
    for ranks in (2, 3, 4, 5, 8, 11):
        found = run_threads(ranks, lambda comm: fingerprint(comm, model, setting), share_memory=ranks % 2 == 0)
        assert set(found) == {expected}, ranks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_leaves_the_same_bits(optimizer: str) -> None:
    expected = fingerprint(SoloCommunicator(), "dropout", "clipped", optimizer)
    for ranks in (2, 3, 8):
        assert set(run_threads(ranks, lambda comm: fingerprint(comm, "dropout", "clipped", optimizer))) == {expected}


def test_the_default_mode_does_round_differently() -> None:
    """Otherwise the test above would prove nothing."""

    def parameters(comm: dp.comm.Communicator) -> bytes:
        rng = np.random.default_rng(0)
        dataset = dp.data.ArrayDataset(rng.normal(size=(90, 16)).astype(np.float32), rng.integers(0, 5, 90))
        dp.manual_seed(1)
        model = MODELS["plain"]()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, batch_size=32, progress=False).fit(dataset, steps=8)
        return b"".join(p.data.tobytes() for p in model.parameters())

    assert parameters(SoloCommunicator()) != run_threads(3, parameters)[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_running_statistics_move_by_the_mean_over_all_examples(ranks: int) -> None:
    """Also without deterministic mode: ranks that evaluate must evaluate the same model."""

    def train(comm: dp.comm.Communicator) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(0)
        dataset = dp.data.ArrayDataset(rng.normal(size=(31, 16)), rng.integers(0, 5, 31))
        dp.manual_seed(1)
        model = MODELS["statistics"]().double()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        dp.Trainer(model, F.cross_entropy, optimizer, comm=comm, batch_size=8, progress=False).fit(dataset, epochs=2)
        return model[0].running_mean, int(model[0].batches)

    expected = np.zeros(16)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(31, 16))
    for epoch in range(2):
        order = dp.data.loader.order(0, epoch, 31)
        for start in range(0, 31, 8):
            expected = 0.9 * expected + 0.1 * x[order[start : start + 8]].mean(axis=0)
    for mean, batches in run_threads(ranks, train):
        np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-14)
        assert batches == 8


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
