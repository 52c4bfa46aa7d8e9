"""Embedding, and the sum of rows by number that is its derivative."""

import numpy as np
import pytest

import test_functional as table
from distprop import functional as F
from distprop import nn
from distprop.tensor import Parameter, Tensor
from test_functional import Operation


def ids(*shape, dtype=np.int64):
    return lambda rng, table: (rng.integers(0, len(table), shape).astype(dtype),)


def ours(table, numbers, padding_idx=None):
    return F.embedding(numbers, table, padding_idx)


def pytorchs(torch, table, numbers, padding_idx=None):
    return torch.nn.functional.embedding(numbers.long(), table, padding_idx)


OPERATIONS = [
    Operation(ours, [((3, 4),), ((50, 2),), ((1, 1),)], name="embedding", torch=pytorchs, constants=ids(2, 13)),
    Operation(ours, [((3, 4),)], name="embedding of one id", torch=pytorchs, constants=ids()),
    Operation(ours, [((3, 4),)], name="embedding of nothing", torch=pytorchs, constants=ids(0, 5)),
    Operation(ours, [((4, 3),)], name="embedding uint8", torch=pytorchs, constants=ids(9, dtype=np.uint8)),
    Operation(ours, [((4, 3),)], name="embedding uint64", torch=pytorchs, constants=ids(9, dtype=np.uint64)),
    Operation(
        ours,
        [((3, 4),), ((20, 2),)],
        [{"padding_idx": 0}, {"padding_idx": -1}],
        name="embedding with padding",
        torch=lambda torch, table, numbers, padding_idx: pytorchs(torch, table, numbers, padding_idx % len(table)),
        constants=ids(4, 5),
    ),
]
CASES = [table.Case(o, shapes, options) for o in OPERATIONS for shapes in o.shapes for options in o.options]


@pytest.mark.parametrize(
    "check",
    [
        table.test_only_the_inputs_that_need_a_gradient_get_one,
        table.test_the_gradient_of_a_parameter_lands_in_the_flat_buffer,
        table.test_arrays_give_a_constant_with_the_same_value,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation(check, case):
    check(case)


@pytest.mark.parametrize("case", [case for case in CASES if "padding_idx" not in case.options], ids=str)
def test_gradients_agree_with_finite_differences(case):
    table.test_gradients_agree_with_finite_differences(case)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_agree_with_pytorch(case, dtype, torch):
    table.test_values_and_gradients_agree_with_pytorch(case, dtype, torch)


def test_the_layer_is_pytorchs(torch, rng):
    layer, theirs = nn.Embedding(10, 4, padding_idx=-2), torch.nn.Embedding(10, 4, padding_idx=-2)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    assert layer.padding_idx == theirs.padding_idx == 8
    np.testing.assert_array_equal(layer.weight.data[8], np.zeros(4))
    assert abs(np.delete(layer.weight.data, 8, 0).mean()) < 0.6
    assert 0.6 < np.delete(layer.weight.data, 8, 0).std() < 1.4
    layer.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    numbers = rng.integers(0, 10, (3, 7))
    ours, expected = layer(numbers), theirs(torch.tensor(numbers))
    np.testing.assert_array_equal(ours.data, expected.detach().numpy())
    (ours * ours).sum().backward()
    (expected * expected).sum().backward()
    np.testing.assert_allclose(layer.weight.grad, theirs.weight.grad.numpy(), rtol=1e-6)
    assert repr(layer) == "Embedding(10, 4, padding_idx=8)"


def test_a_weight_shared_with_the_last_layer_gets_both_gradients(torch, rng):
    """GPT's output is a product with the embedding's own table."""
    values, numbers = rng.normal(size=(6, 3)), rng.integers(0, 6, (2, 5))
    ours, theirs = Parameter(values), torch.tensor(values, requires_grad=True)
    F.linear(F.embedding(numbers, ours).tanh(), ours).exp().sum().backward()
    embedded = torch.nn.functional.embedding(torch.tensor(numbers), theirs)
    torch.nn.functional.linear(embedded.tanh(), theirs).exp().sum().backward()
    np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ([[0, 4], [5, 1]], IndexError, r"embedding got index 5 at position 1, 0 of shape \(2, 2\); .* from 0 to 4"),
        ([0, -1], IndexError, "index -1 at position 1"),
        ([0.0], TypeError, "integer indices, got dtype float"),
        ([True], TypeError, "integer indices, got dtype bool"),
    ],
)
def test_ids_outside_the_table_are_named(numbers, error, message):
    with pytest.raises(error, match=message):
        nn.Embedding(5, 2)(np.array(numbers))


@pytest.mark.parametrize(("count", "dtype"), [(256, "uint8"), (300, "int8"), (128, "int8"), (70000, "uint16")])
def test_take_with_numbers_whose_type_is_too_small_for_the_length(count, dtype):
    x = Tensor(np.arange(2.0 * count).reshape(count, 2), requires_grad=True)
    numbers = np.array([0, 5, np.iinfo(dtype).max], dtype) if dtype[0] == "u" else np.array([-100, 5, 127], dtype)
    taken = F.take(x, numbers, 0)
    np.testing.assert_array_equal(taken.data, x.data[numbers])
    taken.sum().backward()
    np.testing.assert_array_equal(np.flatnonzero(x.grad[:, 0]), np.sort(numbers.astype(int) % count))


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\(num_embeddings, embedding_dim\), got \(3,\)"):
        F.embedding([0], np.ones(3))
    with pytest.raises(TypeError, match=r"embedding .*floating"):
        F.embedding([0], np.ones((3, 2), int))
    with pytest.raises(IndexError, match="padding_idx 3 for a table of 3 rows"):
        F.embedding([0], np.ones((3, 2)), 3)
    with pytest.raises(ValueError, match="padding_idx -4 for a table of 3 rows"):
        nn.Embedding(3, 2, -4)
    with pytest.raises(ValueError, match=r"at least one row and column, got \(0, 2\)"):
        nn.Embedding(0, 2)


def test_the_gradient_has_the_tables_dtype():
    weight = Tensor(np.ones((3, 2), np.float32), requires_grad=True)
    F.embedding([0, 0, 2], weight).sum().backward()
    assert weight.grad.dtype == np.float32
    np.testing.assert_array_equal(weight.grad, [[2, 2], [0, 0], [1, 1]])
