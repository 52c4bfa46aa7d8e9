import pytest

import train_suite

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", train_suite.suite.under_mpi())
def test_trainer(scenario, comm):
    scenario(comm)
