import pytest

import parallel_suite
import split_invariance

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", split_invariance.suite.under_mpi())
def test_any_split_makes_the_parameters_of_one_process(scenario, comm):
    scenario(comm)


@pytest.mark.parametrize("scenario", parallel_suite.suite.under_mpi())
def test_parallel(scenario, comm):
    scenario(comm)
