import pytest

import health_suite

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", health_suite.suite.under_mpi())
def test_health(scenario, comm):
    scenario(comm)
