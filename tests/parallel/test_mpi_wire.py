import pytest

from distprop.comm import mpi
from wire_suite import suite

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("scenario", suite.under_mpi())
def test_wire(scenario, comm):
    scenario(comm)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
def test_wire_between_nodes(ranks_per_node):
    """Neighbours play the ranks of a node; the last node may have fewer than the others."""
    comm = mpi.MPICommunicator(ranks_per_node=ranks_per_node)
    suite.run_all(comm)
