import pytest

import norm_suite

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", norm_suite.suite.under_mpi())
def test_synchronised_batch_norm(scenario, comm):
    scenario(comm)
