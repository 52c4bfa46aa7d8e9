import pytest

from scenario import run
from sharded_suite import suite


@pytest.mark.parametrize(("scenario", "size"), suite.in_threads([1, 2, 3, 4]))
def test_a_sharded_update(scenario, size):
    run(scenario, size)
