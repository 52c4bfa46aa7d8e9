"""Padding: through the table of operations, and what only it does."""

import numpy as np
import pytest

import test_functional as table
from distprop import functional as F
from test_functional import Operation

MODES = ("reflect", "replicate", "circular")
WIDTHS = ((1, 2), (2, 0, 0, 1), (0, 2, 2, 2), (-1, 2, 1, -2), (2, -2), (0, -1))

OPERATIONS = [
    Operation(
        F.pad,
        [((2, 3, 4),), ((5, 4, 5),), ((0, 3, 4),)],
        [{"pad": (1, 2)}, {"pad": (1, 0, 0, 3), "value": 2.5}, {"pad": (-1, 2, 1, -2)}, {"pad": (0, -1)}, {"pad": ()}],
    ),
    Operation(F.pad, [((2, 3),)], [{"pad": (0, 1, -1, 2), "value": -1.0}], name="pad all axes"),
    Operation(
        F.pad,
        [((2, 2, 5, 5),), ((0, 2, 5, 6),)],
        [{"pad": pad, "mode": mode} for mode in MODES for pad in WIDTHS if len(pad) == 4],
        name="pad two axes in other modes",
    ),
    Operation(
        F.pad,
        [((2, 3, 5),)],
        [{"pad": pad, "mode": mode} for mode in MODES for pad in WIDTHS if len(pad) == 2],
        name="pad one axis in other modes",
    ),
    Operation(
        F.pad,
        [((1, 2, 4),)],
        [{"pad": (3, 3), "mode": mode} for mode in MODES] + [{"pad": (9, 6), "mode": "replicate"}],
        name="pad widely",
    ),
    Operation(F.pad, [((4, 3),)], [{"pad": (1, 1, 2, 3), "mode": m} for m in MODES], name="pad all", torch=None),
]
CASES = [table.Case(o, shapes, options) for o in OPERATIONS for shapes in o.shapes for options in o.options]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", table.CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
def test_operation(check, case):
    check(case)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", [case for case in CASES if case.operation.torch is not None], ids=str)
def test_values_and_gradients_agree_with_pytorch(case, dtype, torch):
    table.test_values_and_gradients_agree_with_pytorch(case, dtype, torch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.pad(np.ones((2, 3)), (1,)), r"two widths for each axis, .* \(1,\) for shape \(2, 3\)"),
        (lambda: F.pad(np.ones(3), (1, 1, 1, 1)), "two widths"),
        (lambda: F.pad(np.ones((2, 3)), (-2, -2)), r"would make shape \(2, -1\) of \(2, 3\)"),
        (lambda: F.pad(np.ones(3), (-5, 6)), r"would make shape \(4,\) of \(3,\)"),
        (lambda: F.pad(np.ones(3), (1, 1), "mirror"), "constant, reflect, replicate, circular; got 'mirror'"),
        (lambda: F.pad(np.ones(3), (1, 1), "reflect", 0.5), "'reflect' takes no value, got 0.5"),
        (lambda: F.pad(np.ones((2, 3)), (1, 3), "reflect"), r"needs 3 entries to copy where shape \(2, 3\) has 2"),
        (lambda: F.pad(np.ones((2, 3)), (4, 1), "circular"), r"needs 4 entries to copy where shape \(2, 3\) has 3"),
        (lambda: F.pad(np.ones((2, 0)), (1, 0), "replicate"), r"needs 1 entries .* has 0"),
        (lambda: F.pad(np.ones((2, 3)), (2, -2), "reflect"), r"has 0"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("widths", [1, (1.5, 1), "no"])
def test_widths_that_are_no_integers_are_refused(widths):
    with pytest.raises(TypeError, match=r"pad takes integers, two widths for each axis, last axis first; got"):
        F.pad(np.ones(3), widths)
