"""The same bits under real MPI, on every number of ranks, as one process makes."""

import pytest

from deterministic_suite import MODELS, SETTINGS, fingerprint
from distprop.comm import SoloCommunicator

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_the_bits_of_one_process(model: str, setting: str, comm) -> None:
    assert fingerprint(comm, model, setting) == fingerprint(SoloCommunicator(), model, setting)
