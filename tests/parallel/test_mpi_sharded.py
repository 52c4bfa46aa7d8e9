import pytest

from distprop.comm import mpi
from sharded_suite import suite

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", suite.under_mpi())
def test_a_sharded_update(scenario, comm):
    scenario(comm)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
def test_a_sharded_update_on_several_nodes(ranks_per_node):
    comm = mpi.MPICommunicator(ranks_per_node=ranks_per_node)
    suite.run_all(comm)
