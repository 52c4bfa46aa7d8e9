"""Joining, cutting and choosing: through the table of operations, and what only these do."""

import numpy as np
import pytest

import test_functional as table
from distprop import functional as F
from distprop.tensor import Parameter, Tensor, record
from distprop.testing import check_grads
from test_functional import Operation


def chosen(rng, *arrays):
    return (rng.uniform(size=np.broadcast_shapes(*(a.shape for a in arrays))) < 0.5,)


def indices(*shape):
    return lambda rng, x: (rng.integers(-2, 2, shape),)


OPERATIONS = [
    Operation(
        lambda *xs, dim: F.concatenate(xs, dim),
        [((2, 3), (2, 3)), ((2, 3),), ((2, 3), (2, 3), (2, 3))],
        [{"dim": 0}, {"dim": 1}, {"dim": -1}],
        name="concatenate",
        torch=lambda torch, *xs, dim: torch.cat(xs, dim),
    ),
    Operation(
        lambda *xs: F.concatenate(xs, 1),
        [((2, 3, 2), (2, 1, 2), (2, 0, 2)), ((0, 2), (0, 3))],
        name="concatenate different lengths",
        torch=lambda torch, *xs: torch.cat(xs, 1),
    ),
    Operation(
        lambda *xs, dim: F.stack(xs, dim),
        [((2, 3), (2, 3)), ((0, 4), (0, 4)), ((2, 3),)],
        [{"dim": 0}, {"dim": 1}, {"dim": 2}, {"dim": -1}],
        name="stack",
        torch=lambda torch, *xs, dim: torch.stack(xs, dim),
    ),
    Operation(
        lambda x, y, c: F.where(c, x, y),
        [((3, 4), (3, 4)), ((3, 1), (4,)), ((), (2, 2)), ((0, 4), (1, 4))],
        name="where",
        torch=lambda torch, x, y, c: torch.where(c, x, y),
        constants=chosen,
    ),
    Operation(
        F.take,
        [((3, 4, 2),), ((2, 3, 5),)],
        [{"dim": 0}, {"dim": 1}, {"dim": -1}],
        torch=lambda torch, x, i, dim: torch.index_select(x, dim, i % x.shape[dim]),
        constants=indices(7),
    ),
    Operation(F.take, [((3, 4),), ((6,),)], torch=lambda torch, x, i: torch.take(x, i), constants=indices(2, 3)),
    Operation(
        F.take,
        [((3, 4, 2),)],
        [{"dim": 0}, {"dim": 1}, {"dim": 2}],
        name="take with several axes of indices",
        torch=lambda torch, x, i, dim: torch.tensor(0) + table_take(torch, x, i, dim),
        constants=indices(2, 3),
    ),
    Operation(F.take, [((3, 4),)], [{"dim": 0}, {"dim": 1}], name="take nothing", torch=None, constants=indices(0)),
]
CASES = [table.Case(o, shapes, options) for o in OPERATIONS for shapes in o.shapes for options in o.options]


def table_take(torch, x, i, dim):
    """NumPy's `take` along an axis, with an index of several axes."""
    flat = torch.index_select(x, dim, i.reshape(-1) % x.shape[dim])
    return flat.reshape(*x.shape[:dim], *i.shape, *x.shape[dim + 1 :])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", table.CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
def test_operation(check, case):
    check(case)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", [case for case in CASES if case.operation.torch is not None], ids=str)
def test_values_and_gradients_agree_with_pytorch(case, dtype, torch):
    table.test_values_and_gradients_agree_with_pytorch(case, dtype, torch)


# split gives several tensors, which the table does not know


SECTIONS = [2, np.int64(3), 7, 100, [3, 4], [0, 7], [1, 2, 0, 4], [7]]


@pytest.mark.parametrize("sections", SECTIONS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradients_of_pieces_agree_with_finite_differences(sections, dim, rng):
    check_grads(lambda x: sum((piece**2).sum() for piece in F.split(x, sections, dim)[::2]), rng.normal(size=(7, 7)))


@pytest.mark.parametrize("sections", SECTIONS)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_split_as_pytorch_with_pieces_that_lead_nowhere(sections, dim, dtype, torch, rng):
    x = rng.normal(size=(7, 7)).astype(dtype)
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    pieces, expected = (
        F.split(ours * 1.5, sections, dim),
        torch.split(theirs * 1.5, sections if isinstance(sections, list) else int(sections), dim),
    )
    assert [piece.shape for piece in pieces] == [tuple(piece.shape) for piece in expected]
    for piece, other in zip(pieces, expected, strict=True):
        np.testing.assert_array_equal(piece.data, other.detach().numpy())
    used = range(0, len(pieces), 2)
    sum((pieces[i] ** (2 + i)).sum() for i in used).backward()
    sum((expected[i] ** (2 + i)).sum() for i in used).backward()
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=10 * np.finfo(dtype).eps)


def test_split_of_a_tensor_that_is_used_elsewhere_and_between_its_pieces(torch, rng):
    x = rng.normal(size=(4, 6))

    def network(module, x):
        x = x * 2
        first, second, third = module.split(x, 2, 1)
        mixed = x * x
        return ((first + second * 3).exp() * first).sum() + (mixed * x).sum() + (third[0] * second[1]).sum()

    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    network(F, ours).backward()
    network(torch, theirs).backward()
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=1e-13)


def test_pieces_are_views_and_a_parameter_can_be_split():
    parameter = Parameter(np.arange(6.0))
    first, second = F.split(parameter, [2, 4])
    assert np.shares_memory(first.data, parameter.data)
    (first.sum() * 3 + (second * second).sum()).backward()
    np.testing.assert_array_equal(parameter.grad, [3, 3, 4, 6, 8, 10])
    F.split(parameter, 2)[1].sum().backward()
    np.testing.assert_array_equal(parameter.grad, [3, 3, 5, 7, 8, 10])
    constant = F.split(np.arange(6.0), 3)
    assert not constant[0].requires_grad


@pytest.mark.parametrize("leaf", [True, False])
def test_a_walk_through_another_piece_afterwards(leaf):
    """Behind an operation it is a second walk through that one; a leaf adds up."""
    x = Parameter(np.ones(4))
    first, second = F.split(x if leaf else x * x, 2)
    (first * 2).sum().backward()
    if leaf:
        (second * 3).sum().backward()
        np.testing.assert_array_equal(x.grad, [2, 2, 3, 3])
    else:
        with pytest.raises(RuntimeError, match="a second time"):
            (second * 3).sum().backward()


def test_the_gradient_of_a_piece_is_computed_into_one_array():
    """Attention splits its projections in three; three arrays of the whole size would cost as much again."""
    arrays = []

    def watch(x):
        return record(x.data, (x,), lambda grad, out: [arrays.append(grad) or grad])

    x = Tensor(np.ones(9), requires_grad=True)
    pieces = F.split(watch(x), 3)
    sum((piece.sum() for piece in pieces), start=Tensor(0.0)).backward()
    assert len(arrays) == 1
    np.testing.assert_array_equal(x.grad, np.ones(9))


def test_where_takes_numbers_in_the_other_ones_dtype():
    x = np.ones(3, np.float32)
    for value in (F.where(x > 0, x, -1), F.where(x < 0, 2.5, x), F.where(x > 0, Tensor(x), 0.5)):
        assert value.dtype == np.float32
    np.testing.assert_array_equal(F.where(np.array([True, False]), 1.0, 2.0).data, [1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.concatenate([]), ValueError, "at least one"),
        (lambda: F.concatenate([np.ones((2, 3)), np.ones((2, 4))]), ValueError, r"\(2, 3\) first and \(2, 4\) as numb"),
        (lambda: F.concatenate([np.ones((2, 3)), np.ones(3)]), ValueError, r"\(2, 3\) first and \(3,\) as number 1"),
        (lambda: F.concatenate([np.ones(2)], 1), IndexError, r"dim 1, which is out of range for shape \(2,\)"),
        (lambda: F.concatenate([np.ones(2), np.ones(2, np.float32)]), TypeError, "one floating-point dtype"),
        (lambda: F.concatenate([np.arange(3)]), TypeError, "concatenate .* int64"),
        (lambda: F.stack([np.ones(2), np.ones(3)]), ValueError, r"\(2,\) first and \(3,\) as number 1"),
        (lambda: F.stack([np.ones(2)], 2), IndexError, "dim 2"),
        (lambda: F.split(np.ones(4), 0), ValueError, "at least 1 entry, got 0"),
        (lambda: F.split(np.ones(4), [1, 2]), ValueError, r"lengths \[1, 2\] for dim 0 of shape \(4,\)"),
        (lambda: F.split(np.ones(4), [5, -1]), ValueError, "must add up to 4"),
        (lambda: F.split(np.ones(4), 2, 1), IndexError, "dim 1"),
        (lambda: F.split(np.ones(4), 2.0), TypeError, "which are integers; got 2.0"),
        (lambda: F.split(np.ones(4), [1.5, 2.5]), TypeError, r"which are integers; got \[1.5, 2.5\]"),
        (lambda: F.where(np.ones(3), np.ones(3), 0.0), TypeError, "boolean condition, got dtype float64"),
        (lambda: F.where(np.ones(3, bool), np.ones(2), 0.0), ValueError, r"condition \(3,\), input \(2,\), other \(\)"),
        (lambda: F.where(np.ones(3, bool), np.ones(3), np.ones(3, np.float32)), TypeError, "other float32"),
        (lambda: F.take(np.ones((2, 3)), [0, 3], 1), IndexError, r"index 3 at position 1 of .*from -3 to 2"),
        (lambda: F.take(np.ones((2, 3)), [[0], [-3]], 0), IndexError, r"index -3 at position 1, 0 of shape \(2, 1\)"),
        (lambda: F.take(np.ones((2, 3)), 6), IndexError, "index 6"),
        (lambda: F.take(np.ones(3), 1.0), TypeError, "integer indices, got dtype float"),
        (lambda: F.take(np.ones(3), 1, 1), IndexError, r"take got dim 1, which is out of range for shape \(3,\)"),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()
