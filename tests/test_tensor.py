"""Tensors and the tape: operators against PyTorch and finite differences, and the rules of the walk backwards."""

import copy
import gc
import operator
import pickle
import re
import weakref
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

import distprop as dp
from distprop import functional as F
from distprop import nn, optim
from distprop.buffer import FlatBuffer
from distprop.tensor import Parameter, Tensor, as_tensor, record, tensor
from distprop.testing import check_grads


def positive(rng, shape):
    return rng.uniform(0.5, 2.0, shape)


def normal(rng, shape):
    return rng.normal(size=shape)


def distinct(rng, shape):
    """No two equal numbers, so that a largest one stays the largest under finite differences."""
    return rng.permutation(np.prod(shape, dtype=int)).reshape(shape) / 4 - 1.1


# One row an expression: name, function of tensors that PyTorch understands too, shapes of its inputs, their maker.
EXPRESSIONS = [
    *[
        (f"{name} {a} {b}", function, [a, b], positive)
        for name, function in [
            ("+", lambda x, y: x + y),
            ("-", lambda x, y: x - y),
            ("*", lambda x, y: x * y),
            ("/", lambda x, y: x / y),
            ("**", lambda x, y: x**y),
        ]
        for a, b in [
            ((3, 4), (3, 4)),
            ((3, 4), (4,)),
            ((4,), (3, 4)),
            ((3, 1), (1, 4)),
            ((2, 1, 3), (4, 1)),
            ((3, 4), ()),
            ((), (2,)),
            ((), ()),
            ((1,), (1, 1)),
            ((0, 4), (1, 4)),
            ((0, 4), (4,)),
            ((1, 3), (0, 3)),
        ]
    ],
    *[
        (f"@ {a} {b}", lambda x, y: x @ y, [a, b], normal)
        for a, b in [
            ((3, 4), (4, 2)),
            ((4,), (4,)),
            ((4,), (4, 2)),
            ((3, 4), (4,)),
            ((5, 3, 4), (5, 4, 2)),
            ((5, 3, 4), (4, 2)),
            ((3, 4), (5, 4, 2)),
            ((5, 3, 4), (4,)),
            ((4,), (5, 4, 2)),
            ((2, 5, 3, 4), (5, 4, 2)),
            ((2, 1, 3, 4), (5, 4, 2)),
            ((5, 3, 4), (2, 1, 4, 2)),
            ((1, 3, 4), (5, 4, 2)),
            ((1, 1), (1, 1)),
            ((0, 4), (4, 2)),
            ((0, 3, 4), (4, 2)),
            ((2, 0), (0, 3)),
        ]
    ],
    ("scalar + x", lambda x: 2 + x, [(3,)], normal),
    ("scalar - x", lambda x: 2.5 - x, [(3,)], normal),
    ("scalar * x", lambda x: 3 * x * 2.0, [(3,)], normal),
    ("scalar / x", lambda x: 2 / x + x / 4, [(3,)], positive),
    ("scalar ** x", lambda x: 2**x, [(3,)], normal),
    ("x ** 2", lambda x: x**2, [(2, 3)], normal),
    ("x ** 1", lambda x: x**1, [(3,)], normal),
    ("x ** 0", lambda x: x**0, [(3,)], normal),
    ("x ** -2", lambda x: x**-2, [(3,)], positive),
    ("x ** 0.5", lambda x: x**0.5, [(3,)], positive),
    ("-x", lambda x: -x, [(3,)], normal),
    ("abs", lambda x: abs(x) + x.abs(), [(3,)], normal),
    ("exp", lambda x: x.exp(), [(2, 3)], normal),
    ("log", lambda x: x.log(), [(2, 3)], positive),
    ("sqrt", lambda x: x.sqrt(), [(2, 3)], positive),
    ("tanh", lambda x: x.tanh(), [(2, 3)], normal),
    ("sigmoid", lambda x: x.sigmoid(), [(2, 3)], normal),
    ("relu", lambda x: x.relu(), [(2, 3)], normal),
    # reductions
    *[
        (f"{method} {options} of {shape}", lambda x, m=method, o=options: getattr(x, m)(**o), [shape], normal)
        for method in ("sum", "mean", "var")
        for shape, options in [
            ((3, 4), {}),
            ((3, 4), {"dim": 0}),
            ((3, 4), {"dim": -1}),
            ((3, 4), {"dim": 1, "keepdim": True}),
            ((2, 3, 4), {"dim": (0, 2)}),
            ((2, 3, 4), {"dim": (-1, 0), "keepdim": True}),
            ((2, 3, 4), {"dim": [1]}),
            ((5,), {}),
        ]
    ],
    *[
        (f"{method} of one", lambda x, m=method: getattr(x, m)(), [shape], normal)
        for method in ("sum", "mean")
        for shape in [(), (1,), (1, 1)]
    ],
    ("sum of nothing", lambda x: x.sum(), [(0, 3)], normal),
    ("sum over nothing", lambda x: x.sum(dim=0), [(0, 3)], normal),
    ("sum beside nothing", lambda x: x.sum(dim=1), [(0, 3)], normal),
    ("var correction 0", lambda x: x.var(dim=1, correction=0), [(3, 4)], normal),
    ("var correction 2", lambda x: x.var(dim=(0, 1), correction=2, keepdim=True), [(3, 4)], normal),
    ("var of one, correction 0", lambda x: x.var(correction=0), [(1,)], normal),
    ("max", lambda x: x.max(), [(3, 4)], distinct),
    ("min", lambda x: x.min(), [(3, 4)], distinct),
    ("max of a scalar", lambda x: x.max(), [()], distinct),
    # shape
    ("reshape", lambda x: x.reshape(4, 3), [(3, 4)], normal),
    ("reshape -1", lambda x: x.reshape(2, -1), [(3, 4)], normal),
    ("reshape tuple", lambda x: x.reshape((2, 6)), [(3, 4)], normal),
    ("reshape to scalar", lambda x: x.reshape(()), [(1,)], normal),
    ("reshape of nothing", lambda x: x.reshape(0, 6), [(0, 2, 3)], normal),
    ("flatten", lambda x: x.flatten(), [(2, 3, 4)], normal),
    ("flatten 1", lambda x: x.flatten(1), [(2, 3, 4)], normal),
    ("flatten 1 of nothing", lambda x: x.flatten(1), [(0, 3, 4)], normal),
    ("flatten middle", lambda x: x.flatten(1, 2), [(2, 3, 4, 2)], normal),
    ("flatten -2", lambda x: x.flatten(-2), [(2, 3, 4)], normal),
    ("flatten 0 0", lambda x: x.flatten(0, 0), [(2, 3)], normal),
    ("flatten of a scalar", lambda x: x.flatten(), [()], normal),
    ("T", lambda x: x.T, [(3, 4)], normal),
    ("transpose", lambda x: x.transpose(0, 2), [(2, 3, 4)], normal),
    ("transpose negative", lambda x: x.transpose(-1, -2), [(2, 3, 4)], normal),
    ("permute", lambda x: x.permute(2, 0, 1), [(2, 3, 4)], normal),
    ("permute negative", lambda x: x.permute(-1, 0, -2), [(2, 3, 4)], normal),
    ("permute tuple", lambda x: x.permute((1, 2, 0)), [(2, 3, 4)], normal),
    # indexing
    ("[1]", lambda x: x[1], [(3, 4)], normal),
    ("[-1]", lambda x: x[-1], [(3,)], normal),
    ("[0, 1]", lambda x: x[0, 1], [(3, 4)], normal),
    ("[1:, ::2]", lambda x: x[1:, ::2], [(3, 4)], normal),
    ("[..., 0]", lambda x: x[..., 0], [(2, 3, 4)], normal),
    ("[:, None]", lambda x: x[:, None], [(3,)], normal),
    ("[0:0]", lambda x: x[0:0], [(3,)], normal),
    ("[list]", lambda x: x[[2, 0]], [(3, 4)], normal),
    ("[list with repeats]", lambda x: x[[1, 1, 0, 1]], [(3, 4)], normal),
    ("[rows, columns] with repeats", lambda x: x[[0, 2, 0], [1, 3, 1]], [(3, 4)], normal),
    ("[:, list]", lambda x: x[:, [3, 3, 0]], [(3, 4)], normal),
    # micrograd's expressions: nodes used several times
    ("diamond", lambda a: (a * 2 + 1) * (a * 2 - 1), [()], normal),
    ("shared subexpression", lambda a, b: (c := a * b) * c + c.tanh() / (c * c + 1), [(), ()], normal),
    ("x + x", lambda x: x + x, [(3,)], normal),
    ("x * x", lambda x: x * x, [(3,)], normal),
    ("x - x", lambda x: (x - x) * x, [(3,)], normal),
    ("x @ x", lambda x: x @ x, [(3, 3)], normal),
    ("x @ x.T", lambda x: x @ x.T, [(3, 2)], normal),
    ("x / x", lambda x: x / x + x, [(3,)], positive),
    ("x ** x", lambda x: x**x, [(3,)], positive),
    ("softmax by hand", lambda x: (e := (x - x.max()).exp()) / e.sum(dim=1, keepdim=True), [(3, 4)], distinct),
    ("normalised by hand", lambda x: (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt(), [(5, 3)], normal),
]
NAMES = [row[0] for row in EXPRESSIONS]


@pytest.mark.parametrize(("name", "function", "shapes", "maker"), EXPRESSIONS, ids=NAMES)
def test_gradients_agree_with_finite_differences(name, function, shapes, maker, rng):
    check_grads(function, [maker(rng, shape) for shape in shapes], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "function", "shapes", "maker"), EXPRESSIONS, ids=NAMES)
def test_values_and_gradients_agree_with_pytorch(name, function, shapes, maker, dtype, rng, torch):
    arrays = [maker(rng, shape).astype(dtype) for shape in shapes]
    for array in arrays:
        array.setflags(write=False)
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    value, expected = function(*ours), function(*theirs)
    seed = np.asarray(rng.uniform(0.5, 1.5, value.shape), dtype)
    seed.setflags(write=False)
    value.backward(seed)
    expected.backward(torch.tensor(seed))
    tolerance = {"float64": 1e-13, "float32": 4e-6}[dtype]
    pairs = [(value.data, expected.detach()), *((o.grad, t.grad) for o, t in zip(ours, theirs, strict=True))]
    for found, wanted in pairs:
        wanted = wanted.numpy()
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(initial=1e-3))


@pytest.mark.parametrize(("name", "function", "shapes", "maker"), EXPRESSIONS, ids=NAMES)
def test_parameters_in_a_flat_buffer_get_the_same_gradients(name, function, shapes, maker, rng):
    arrays = [maker(rng, shape) for shape in shapes]
    tensors, parameters = [Tensor(a, requires_grad=True) for a in arrays], [Parameter(a) for a in arrays]
    buffer = FlatBuffer(parameters)
    buffer.message[:] = np.nan  # a past step's rubbish must not matter
    for leaves in (tensors, parameters):
        value = function(*leaves)
        value.backward(np.ones(value.shape))
    for t, p in zip(tensors, parameters, strict=True):
        np.testing.assert_array_equal(p.grad, t.grad)
        assert p.grad.size == 0 or np.shares_memory(p.grad, buffer.message)


# operators


def test_arrays_and_numpy_numbers_on_either_side():
    x, a = tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True), np.array([2.0, 4.0], np.float32)
    for value, expected in [
        (a + x, a + x.data),
        (a - x, a - x.data),
        (a * x, a * x.data),
        (a / x, a / x.data),
        (a**x, a**x.data),
        (a @ x, a @ x.data),
        (x + a, x.data + a),
        (x - a, x.data - a),
        (x * a, x.data * a),
        (x / a, x.data / a),
        (x**a, x.data**a),
        (x @ a, x.data @ a),
        (np.float32(2) * x, 2 * x.data),
        (x - np.float64(2), x.data - 2),
        (np.float64(2) - x, 2 - x.data),
        (np.float64(2) ** x, 2**x.data),
        ([1.0, 2.0] * x, np.float32([1, 2]) * x.data),
    ]:
        assert isinstance(value, Tensor)
        assert value.requires_grad
        np.testing.assert_array_equal(value.data, expected)


def test_numpy_functions_refuse_tensors_instead_of_losing_the_graph():
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(tensor([1.0]))


@pytest.mark.parametrize("number", [2, 2.5, True, np.float64(2.5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numbers_do_not_widen_a_tensor(number, dtype):
    x = Tensor(np.ones(3, dtype), requires_grad=True)
    for value in (x + number, number - x, x * number, number / x, x**number, x / number, number**x):
        assert value.dtype == dtype
        value.sum().backward()
    assert x.grad.dtype == dtype
    for value in (x.mean(), x.var(), x.sum(0), x.max(0), x.relu(), x.exp(), x.sigmoid(), abs(x), x.sqrt()):
        assert value.dtype == dtype


def test_functions_of_integers_are_float64():
    for value in (tensor([0, 1]).exp(), tensor([0, 1]).sigmoid()):
        assert value.dtype == np.float64
    np.testing.assert_allclose(tensor([0, 1]).sigmoid().data, [0.5, 1 / (1 + np.exp(-1))], rtol=1e-15)


def test_a_gradient_has_the_dtype_of_its_leaf():
    narrow, wide = Tensor(np.ones(2, np.float32), True), Tensor(np.ones(2), True)
    product = narrow * wide
    assert product.dtype == np.float64
    product.sum().backward()
    assert narrow.grad.dtype == np.float32
    assert wide.grad.dtype == np.float64
    parameter = Parameter(np.ones(2, np.float32))
    (parameter * wide).sum().backward()
    assert parameter.grad.dtype == np.float32


def test_what_tensor_makes_of_its_argument():
    assert tensor(1.0).dtype == np.float32
    assert tensor([1.0, 2.0]).dtype == np.float32
    assert tensor([1, 2]).dtype == np.int64
    assert tensor(np.zeros(2)).dtype == np.float64
    assert tensor(np.float64(1)).dtype == np.float64
    assert tensor([1, 2], dtype=np.float64).dtype == np.float64
    array = np.zeros(2)
    assert not np.shares_memory(tensor(array).data, array)
    assert np.shares_memory(as_tensor(array).data, array)
    original = tensor([1.0])
    assert as_tensor(original) is original
    assert not np.shares_memory(tensor(original).data, original.data)


@pytest.mark.parametrize("data", [[1, 2], [True], np.array([1], np.uint8), np.array([1j])])
def test_only_floating_point_can_require_a_gradient(data):
    with pytest.raises(TypeError, match="only floating-point tensors can require gradients; got dtype"):
        tensor(data, requires_grad=True)
    with pytest.raises(TypeError, match="only floating-point"):
        Parameter(data)


@pytest.mark.parametrize("dtype", [np.int64, bool])
def test_mean_and_var_of_integers_are_refused(dtype):
    """Scaled in their own dtype the mean would be 0, or the sum."""
    for method in ("mean", "var"):
        with pytest.raises(TypeError, match=rf"{method}\(\) needs floating point, got dtype"):
            getattr(Tensor(np.ones(3, dtype)), method)()


def test_matmul_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 4\) @ \(3, 4\): 4 columns meet 3 rows"):
        Tensor(np.ones((3, 4))) @ Tensor(np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"\(4,\) @ \(3,\): 4 columns meet 3 rows"):
        Tensor(np.ones(4)) @ np.ones(3)
    with pytest.raises(ValueError, match="at least one axis on each side"):
        Tensor(np.ones(3)) @ 2


def test_the_power_of_numbers_that_are_not_positive():
    """The exponent's derivative needs a logarithm; where there is none it counts as 0."""
    base, exponent = Tensor(np.array([0.0, -2.0, 0.0]), True), Tensor(np.array([2.0, 3.0, 0.0]), True)
    (base**exponent).sum().backward()
    np.testing.assert_array_equal(base.grad, [0, 12, 0])
    np.testing.assert_array_equal(exponent.grad, [0, 0, 0])


def test_comparisons_give_arrays_of_booleans():
    x = tensor([1.0, 2.0, 3.0])
    for found, expected in [
        (x == 2, [False, True, False]),
        (x != tensor([1.0, 0.0, 3.0]), [False, True, False]),
        (x < 2, [True, False, False]),
        (x <= 2, [True, True, False]),
        (x > np.array([0.0, 5.0, 0.0]), [True, False, True]),
        (np.array([0.0, 5.0, 0.0]) > x, [False, True, False]),
        (x >= 2, [False, True, True]),
    ]:
        assert isinstance(found, np.ndarray)
        assert found.tolist() == expected
    assert len({x, x, tensor([1.0, 2.0, 3.0])}) == 2  # hashed by identity


def test_a_tensor_behaves_like_a_sequence_and_like_a_number():
    x = tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert len(x) == 2
    assert x.shape == (2, 2)
    assert x.ndim == 2
    first, second = x
    (first * second).sum().backward()
    np.testing.assert_array_equal(x.grad, [[3, 4], [1, 2]])
    assert np.asarray(x).tolist() == [[1, 2], [3, 4]]
    assert x.numpy() is x.data
    assert np.array(x, dtype=np.float64).dtype == np.float64
    assert float(tensor(2.5)) == 2.5
    assert float(tensor([[2.5]])) == 2.5
    assert int(tensor([2.5])) == 2
    assert bool(tensor(0.0)) is False
    assert tensor([2.5]).item() == 2.5
    with pytest.raises(ValueError, match="size 1"):
        float(x)
    with pytest.raises(TypeError):
        len(tensor(1.0))
    with pytest.raises(TypeError):
        iter(tensor(1.0))


def test_repr():
    assert repr(tensor([1.0, 2.5])) == "tensor([1. , 2.5], dtype=float32)"
    assert repr(tensor(1.0, requires_grad=True)) == "tensor(1., dtype=float32, requires_grad=True)"
    assert repr(Parameter(np.ones(1))) == "Parameter([1.], dtype=float64, requires_grad=True)"


# indexing


@pytest.mark.parametrize(
    "index",
    [
        np.array([1, 1, 0]),
        np.array([[0, 2], [2, 2]]),
        np.array([True, False, True]),
        np.array([[True, False], [False, True], [True, True]]),
        (np.array([0, 0, 2]), np.array([1, 1, 0])),
        (slice(None), np.array([1, 1])),
        (np.array([True, True, False]), 1),
        tensor([2, 0, 2]),
        (tensor([2, 0, 2]), tensor([1, 0, 1])),
        (tensor([True, False, True]), slice(0, 1)),
        tensor(1),
        np.int64(2),
        (None, 1, ...),
    ],
    ids=str,
)
def test_fancy_boolean_and_tensor_indices(index, rng):
    x = rng.normal(size=(3, 2))
    plain = tuple(np.asarray(i) if isinstance(i, Tensor) else i for i in index) if isinstance(index, tuple) else index
    plain = np.asarray(plain) if isinstance(plain, Tensor) else plain
    np.testing.assert_array_equal(Tensor(x)[index].data, x[plain])
    check_grads(lambda t: t[index] * 2, [x], atol=1e-7)


def test_a_place_taken_twice_gets_both_gradients():
    x = tensor([1.0, 2.0, 3.0], requires_grad=True)
    x[[0, 2, 0]].backward([1, 10, 100])
    np.testing.assert_array_equal(x.grad, [101, 0, 10])


# reductions


@pytest.mark.parametrize("method", ["sum", "mean", "var", "max", "min"])
def test_axis_and_keepdims_are_accepted_for_dim_and_keepdim(method, rng):
    x = Tensor(rng.normal(size=(2, 3, 4)))
    for dim in (0, -1, (0, 2), None):
        for keep in (False, True):
            expected = getattr(x, method)(dim=dim, keepdim=keep)
            np.testing.assert_array_equal(getattr(x, method)(axis=dim, keepdims=keep).data, expected.data)
    assert getattr(x, method)(np.int64(1)).shape == (2, 4)


@pytest.mark.parametrize(("method", "theirs"), [("max", "amax"), ("min", "amin")])
@pytest.mark.parametrize("options", [{}, {"dim": 0}, {"dim": 1, "keepdim": True}, {"dim": (0, 1)}, {"dim": -1}])
def test_equal_extremes_share_the_gradient_as_in_pytorch(method, theirs, options, torch):
    data = np.array([[1.0, 3.0, 3.0], [3.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    ours, their = Tensor(data, requires_grad=True), torch.tensor(data, requires_grad=True)
    value, expected = getattr(ours, method)(**options), getattr(their, theirs)(**options)
    seed = 1.0 + np.arange(value.data.size).reshape(value.shape)
    value.backward(seed)
    expected.backward(torch.tensor(seed))
    np.testing.assert_array_equal(value.data, expected.detach().numpy())
    np.testing.assert_allclose(ours.grad, their.grad.numpy(), rtol=1e-15)


def test_a_dim_that_is_not_there():
    x = Tensor(np.ones((2, 3)))
    for call in (
        lambda: x.sum(2),
        lambda: x.mean(-3),
        lambda: x.max((0, 2)),
        lambda: x.flatten(2),
        lambda: x.permute(0, 2),
    ):
        with pytest.raises(IndexError, match=r"dim .* is out of range for a tensor of shape \(2, 3\)"):
            call()
    with pytest.raises(IndexError, match="dim 1"):
        Tensor(np.ones(2)).flatten(1)
    with pytest.raises(ValueError, match="from dim 1 on to a later one, got 0"):
        x.flatten(1, 0)
    with pytest.raises(TypeError, match="takes two axes or none"):
        x.transpose(0)
    with pytest.raises(IndexError, match=r"transpose\(\) got axes \(0, 5\) for a tensor of shape \(2, 3\)"):
        x.transpose(0, 5)
    with pytest.raises(ValueError, match="axes don't match"):
        x.permute(0)


@pytest.mark.parametrize("wanted", [(-1,), (-1, 16), (4, -1, 2), (-1, 8, 8)])
def test_an_empty_batch_is_reshaped_as_a_batch_of_one(wanted):
    x = tensor(np.zeros((0, 8, 8)), requires_grad=True)
    y = x.reshape(len(x), *wanted)
    assert y.shape == (0, *np.zeros((1, 8, 8)).reshape(1, *wanted).shape[1:])
    y.sum().backward()
    assert x.grad.shape == (0, 8, 8)
    for impossible in ((0, 5, -1), (0, -1, -1)):
        with pytest.raises(ValueError, match=r"reshape|only specify one"):
            x.reshape(impossible)


@pytest.mark.parametrize("dim", [(), []], ids=str)
def test_no_axes_are_all_axes_as_in_pytorch(dim, torch):
    values = np.arange(6.0).reshape(2, 3)
    for name, theirs in (("sum", "sum"), ("mean", "mean"), ("var", "var"), ("max", "amax"), ("min", "amin")):
        for keep in (False, True):
            ours = getattr(tensor(values), name)(dim, keepdim=keep).data
            expected = getattr(torch.tensor(values), theirs)(dim, keepdim=keep).numpy()
            np.testing.assert_allclose(ours, expected, rtol=1e-15, strict=True)
    with pytest.raises(ValueError, match="axes"):
        tensor(values).permute()


@pytest.mark.parametrize("shapes", [((2, 1, 0), (0, 2)), ((2, 3, 4), (4, 0)), ((0, 3, 4), (4, 2))], ids=str)
def test_products_with_empty_matrices_have_pytorchs_gradients(shapes, torch):
    grads = []
    for library, options in ((dp, {}), (torch, {"dtype": torch.float64})):
        x, y = (library.tensor(np.ones(shape), requires_grad=True, **options) for shape in shapes)
        (x @ y).sum().backward()
        grads.append([np.asarray(x.grad), np.asarray(y.grad)])
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_mean_and_var_over_nothing_are_zero_with_zero_gradients():
    for method in ("mean", "var"):
        x = Tensor(np.ones((0, 3)), requires_grad=True)
        for value in (getattr(x, method)(), getattr(x, method)(dim=0).sum()):
            assert value.item() == 0
            value.backward()
        assert x.grad.shape == (0, 3)


def test_var_over_too_few_values_is_refused():
    with pytest.raises(ValueError, match=r"var\(\) over 1 value needs a smaller correction than 1"):
        Tensor(np.ones((3, 1))).var(dim=1)


def test_argmax():
    x = tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0]])
    assert x.argmax() == 3
    assert x.argmax(1).tolist() == [1, 0]
    assert isinstance(x.argmax(), np.ndarray)


# backward


def test_gradients_accumulate_until_they_are_cleared():
    for leaf in (tensor([1.0, 2.0], requires_grad=True), Parameter(np.array([1.0, 2.0]))):
        for times in (1, 2, 3):
            (leaf * leaf).sum().backward()
            np.testing.assert_array_equal(leaf.grad, times * np.array([2.0, 4.0]))
        leaf.grad = None
        assert leaf.grad is None
        (leaf * 3).sum().backward()
        np.testing.assert_array_equal(leaf.grad, [3, 3])


def test_backward_on_a_leaf_and_with_a_seed():
    x = tensor([1.0, 2.0], requires_grad=True)
    x.backward([3, 4])
    x.backward(tensor([1.0, 1.0]))
    np.testing.assert_array_equal(x.grad, [4, 5])
    (x[:1] * 2).backward()  # one number of shape (1,) needs no seed
    np.testing.assert_array_equal(x.grad, [6, 5])


def test_only_leaves_keep_a_gradient():
    x = tensor([1.0], requires_grad=True)
    y = x * 2
    (y * y).sum().backward()
    assert y.grad is None
    assert x.grad is not None


def test_gradients_handed_on_unchanged_do_not_share_memory_between_leaves():
    x, y = tensor([1.0, 2.0], requires_grad=True), tensor([1.0, 2.0], requires_grad=True)
    seed = np.ones(2, np.float32)
    (x + y).backward(seed)
    x.grad += 1
    seed += 5
    np.testing.assert_array_equal(y.grad, [1, 1])
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_branches_that_receive_the_same_array_do_not_disturb_each_other():
    """g reaches both sides of + as one array; each side adds another gradient to it afterwards."""
    x, y = tensor([1.0], requires_grad=True), tensor([1.0], requires_grad=True)
    a, b = x * 2, y * 3
    c = a + b  # hands one array to a and b
    (c + a * 10 + b * 100).sum().backward()  # a and b both get more
    np.testing.assert_array_equal(x.grad, [2 * 11])
    np.testing.assert_array_equal(y.grad, [3 * 101])


def test_nodes_reached_three_times_sum_all():
    x = tensor([1.0, -2.0], requires_grad=True)
    a = x * 2
    (a + a + a + a * a).sum().backward()
    np.testing.assert_array_equal(x.grad, 2 * (3 + 2 * a.data))


def test_backward_needs_a_single_number_or_a_seed_of_the_right_shape():
    x = tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match=r"starts from a single number; got shape \(2,\)"):
        (x * 2).backward()
    with pytest.raises(ValueError, match=r"gradient of shape \(3,\) for a tensor of shape \(2,\)"):
        (x * 2).backward(np.ones(3))
    with pytest.raises(ValueError, match=r"gradient of shape \(\)"):  # not broadcast
        (x * 2).backward(1.0)
    assert x.grad is None


def test_backward_without_anything_to_differentiate():
    x = tensor(1.0)
    for value in (x, x * 2, tensor(1.0, requires_grad=True).detach()):
        with pytest.raises(RuntimeError, match="does not depend on anything with requires_grad"):
            value.backward()


def test_a_second_backward_is_refused():
    x = tensor(2.0, requires_grad=True)
    y = x * x
    y.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()
    np.testing.assert_array_equal(x.grad, 4)


def test_a_part_of_the_graph_that_was_released_is_refused():
    x = tensor(2.0, requires_grad=True)
    shared = x * x
    (shared * 2).backward()
    with pytest.raises(RuntimeError, match="a part of the graph a second time"):
        (shared * 3).backward()
    assert shared.data == 4  # values stay


def test_a_failed_walk_leaves_nothing_behind_for_the_next():
    x, y = tensor(2.0, requires_grad=True), tensor(3.0, requires_grad=True)
    good = (y * y) * 1
    released = x * x
    released.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        (good + released).backward()  # `good` is older: it has its gradient by then, but was not visited
    y.grad = None
    good.backward()
    np.testing.assert_array_equal(y.grad, 6)


def test_graphs_that_share_only_leaves_are_independent():
    x = tensor(2.0, requires_grad=True)
    first, second = x * 3, x * 4
    first.backward()
    second.backward()
    assert x.grad == 7


def test_nodes_are_visited_newest_first_whatever_the_shape_of_the_graph():
    """The longest way round must not be overtaken: a depth-first walk without order would visit x's node too early."""
    order = []

    def step(name, *inputs):
        def vjp(grad, out):
            order.append(name)
            return [grad for _ in inputs]

        return record(sum(t.data for t in inputs), inputs, vjp)

    x = tensor(1.0, requires_grad=True)
    a = step("a", x)
    b = step("b", a)
    c = step("c", b)
    d = step("d", a, c)
    step("e", a, d, b).backward()
    assert order == ["e", "d", "c", "b", "a"]
    assert x.grad == 4  # the paths e-a, e-d-a, e-b-a and e-d-c-b-a


# no_grad, detach


def test_no_grad_records_nothing():
    x = tensor([1.0], requires_grad=True)
    with dp.no_grad():
        y = x * 2
        with dp.no_grad():
            pass
        assert not (x * 3).requires_grad  # the inner one did not switch recording on again
    assert not y.requires_grad
    assert y.node is None
    assert (x * 2).requires_grad


@pytest.mark.parametrize("decorate", [dp.no_grad, dp.no_grad()], ids=["no_grad", "no_grad()"])
def test_no_grad_ends_with_an_error_too_and_decorates(decorate):
    x = tensor([1.0], requires_grad=True)
    with pytest.raises(KeyError), dp.no_grad():
        raise KeyError
    assert (x * 2).requires_grad

    @decorate
    def double(t):
        return t * 2

    for _ in range(2):
        assert not double(x).requires_grad
        assert (x * 2).requires_grad


def test_backward_works_inside_no_grad():
    x = tensor([2.0], requires_grad=True)
    y = (x * x).sum()
    with dp.no_grad():
        y.backward()
    assert x.grad == 4


def test_detach_cuts_the_graph_and_shares_the_values():
    x = tensor([2.0], requires_grad=True)
    y = x * x
    assert np.shares_memory(y.detach().data, y.data)
    (y.detach() * x).sum().backward()
    assert x.grad == 4


def change_by_step(model):
    for parameter in model.parameters():
        parameter.grad = 1
    optim.SGD(model.parameters(), lr=0.1).step()


def change_in_place(model):
    with dp.no_grad():
        model[0].weight -= 1  # the augmented assignment also goes through Module's __setattr__


@pytest.mark.parametrize(
    "change",
    [
        change_by_step,
        change_in_place,
        lambda model: model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}),
        lambda model: setattr(model[1].weight, "data", np.zeros((1, 3), np.float32)),
        lambda model: optim.ExponentialMovingAverage(model.parameters(), 0.9).averaged().__enter__(),
    ],
    ids=["step", "in place", "load_state_dict", "data", "averaged"],
)
def test_values_changed_between_forward_and_backward_are_an_error(change):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    x = tensor([[1.0, 2.0]], requires_grad=True)
    loss = model(x).sum()
    change(model)
    with pytest.raises(RuntimeError, match=r"a Parameter of shape .* was changed between the forward and the backward"):
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    model(x).sum().backward()  # with the new values
    np.testing.assert_allclose(x.grad, model[1].weight.data @ model[0].weight.data, rtol=1e-6)


def test_a_change_of_what_is_frozen_or_constant_is_an_error_where_a_gradient_goes_through_it():
    w = Parameter(np.ones((2, 2), np.float32), requires_grad=False)
    x = tensor([[1.0, 2.0]], requires_grad=True)
    loss = F.linear(x, w).sum()
    w.data = np.zeros((2, 2))
    with pytest.raises(RuntimeError, match=r"a Parameter of shape \(2, 2\) was changed"):
        loss.backward()
    constant = tensor([2.0, 3.0])
    loss = (x * constant).sum()
    constant.data = np.zeros(2)
    with pytest.raises(RuntimeError, match=r"a Tensor of shape \(2,\) was changed"):
        loss.backward()


def test_functions_of_numpy_take_the_values_and_those_that_would_cut_the_graph_are_refused():
    x = tensor([[1.0, 3.0], [2.0, 0.0]], requires_grad=True)
    y = x * 2
    for cut in (
        lambda: np.concatenate([y, y], axis=1),
        lambda: np.concatenate((np.ones((1, 2)), y)),
        lambda: np.split(y, 2),
        lambda: np.where(x.data > 1, y, 0),
        lambda: np.mean(a=y),
    ):
        with pytest.raises(TypeError, match=r"numpy\.\w+\(\) gives an array, behind which the gradient would be lost"):
            cut()
    np.testing.assert_array_equal(np.argmax(y, axis=1), [1, 0])
    assert np.allclose(y, 2 * x.data)
    np.testing.assert_array_equal(np.asarray(y), [[2, 6], [4, 0]])
    with dp.no_grad():
        assert np.concatenate([y, x]).shape == (4, 2)
    for leaf in (x, y.detach(), Parameter(x.data)):  # where nothing was computed, nothing is cut
        assert np.linalg.norm(leaf) > 0


def test_a_change_that_nothing_is_computed_from_is_none():
    """Two models on one input, each updated after its own backward pass; and x changes before the forward pass."""
    x, a, b = tensor([[1.0, 2.0]]), nn.Linear(2, 1), nn.Linear(2, 1)
    x.data = np.array([[3.0, 4.0]], np.float32)
    losses = [a(x).sum(), b(x).sum()]
    for model, loss in zip((a, b), losses, strict=True):
        loss.backward()
        np.testing.assert_array_equal(model.weight.grad, x.data)
        optim.SGD(model.parameters(), lr=0.1).step()


# parameters


def test_a_parameters_gradient_is_written_straight_into_its_place():
    weight, bias = Parameter(np.ones((4, 3), np.float32)), Parameter(np.ones(4, np.float32))
    buffer = FlatBuffer([weight, bias])
    x = np.ones((2, 3), np.float32)
    targets = []
    value = F.linear(x, weight, bias)
    inner = value.node.vjp

    def spy(grad, out):
        gradients = inner(grad, out)
        targets.extend(zip(gradients, out, strict=True))
        return gradients

    value.node.vjp = spy
    value.sum().backward()
    assert targets[0] == (None, None)  # x needs nothing
    for gradient, target in targets[1:]:
        assert gradient is target
        assert np.shares_memory(gradient, buffer.grad)
    assert weight.grad is targets[1][0]
    assert np.shares_memory(weight.data, buffer.data)


def test_only_the_first_use_is_offered_the_place():
    w = Parameter(np.full((2, 2), 2.0))
    offers = []

    def offered(*inputs):
        def vjp(grad, out):
            offers.append([o is not None for o in out])
            return [grad if o is None else np.multiply(grad, 1, out=o) for o in out]

        return record(sum(t.data for t in inputs), inputs, vjp)

    (offered(w, w, w) + offered(w)).sum().backward()
    assert offers == [[True], [False, False, False]]
    np.testing.assert_array_equal(w.grad, np.full((2, 2), 4.0))
    w.grad = None
    offered(w, w, w).sum().backward()
    assert offers[-1] == [True, False, False]
    np.testing.assert_array_equal(w.grad, np.full((2, 2), 3.0))


def test_a_parameter_used_in_several_operations_and_in_one(rng):
    data = rng.normal(size=(3, 3))

    def network(w, x):
        h = F.linear(x, w).tanh()
        h = F.linear(h, w).tanh() @ w
        return (F.linear(h, w, w[0]) * w + w @ w).sum()

    x = rng.normal(size=(3, 3))
    plain, parameter = Tensor(data, requires_grad=True), Parameter(data.copy())
    FlatBuffer([parameter]).message[:] = np.nan
    network(plain, x).backward()
    for times in (1, 2):
        network(parameter, x).backward()
        np.testing.assert_allclose(parameter.grad, times * plain.grad, rtol=1e-13)
    check_grads(lambda w: network(w, x), [data], atol=1e-7, rtol=1e-6)


def test_zeroing_a_gradient_costs_nothing_and_the_next_overwrites_it():
    w = Parameter(np.ones(3))
    (w * 2).sum().backward()
    place = w.grad
    w.grad = None
    assert w.grad is None
    np.testing.assert_array_equal(place, [2, 2, 2])  # untouched
    (w * 3).sum().backward()
    assert w.grad is place
    np.testing.assert_array_equal(place, [3, 3, 3])


def test_a_gradient_of_another_shape_is_refused(torch):
    ours, theirs = Parameter(np.zeros((2, 3))), torch.nn.Parameter(torch.zeros(2, 3))
    for shape in ((3,), (1, 3), (2, 1), (1,), (3, 2)):
        with pytest.raises(RuntimeError):
            theirs.grad = torch.ones(shape)
        with pytest.raises(ValueError, match=rf"shape {re.escape(str(shape))} for a parameter of shape \(2, 3\)"):
            ours.grad = np.ones(shape)
        assert ours.grad is None
    ours.grad = 2
    np.testing.assert_array_equal(ours.grad, np.full((2, 3), 2))


def test_assigning_a_gradient_copies_it_into_its_place():
    w = Parameter(np.ones(3))
    buffer = FlatBuffer([w])
    mine = np.array([1.0, 2.0, 3.0])
    w.grad = mine
    mine[:] = 0
    np.testing.assert_array_equal(buffer.grad, [1, 2, 3])
    w.grad = None
    with pytest.raises(ValueError, match=r"a gradient of shape \(2,\)"):
        w.grad = [1.0, 2.0]
    assert w.grad is None


def test_assigning_values_writes_in_place_unless_shape_or_dtype_change():
    w = Parameter(np.ones(3))
    buffer = FlatBuffer([w])
    w.data = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(buffer.data, [1, 2, 3])
    assert w.buffer is buffer
    for value in (np.ones(3, np.float32), np.ones(4)):
        w.data = value
        assert w.buffer is None
        assert w.data is not value
        assert (w.shape, w.dtype) == (value.shape, value.dtype)
        assert w.grad is None


def test_a_frozen_parameter_gets_no_gradient():
    w = Parameter(np.ones((2, 2)), requires_grad=False)
    x = tensor(np.ones((1, 2)), requires_grad=True)
    F.linear(x, w).sum().backward()
    assert w.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_of_a_parameter_is_in_no_buffer(clone):
    frozen, w = Parameter(np.ones(2), requires_grad=False), Parameter(np.arange(3.0))
    FlatBuffer([w, frozen])
    w.grad = 1
    other = clone(w)
    assert isinstance(other, Parameter)
    assert other.buffer is None
    assert other.grad is None
    np.testing.assert_array_equal(other.data, w.data)
    assert clone(frozen).requires_grad is False


# what is not computed, what is freed


class Counted(np.ndarray):
    """Counts the operations that NumPy does with it and with what comes out of it."""

    operations: ClassVar[Counter[str]] = Counter()

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        Counted.operations[ufunc.__name__] += 1
        result = getattr(ufunc, method)(*(np.asarray(i) for i in inputs), **kwargs)
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def dot(self, *arguments):
        Counted.operations["dot"] += 1
        return np.asarray(self).dot(*arguments)


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("operation", "product"),
    [
        (lambda x, y: x @ y, "matmul"),
        (lambda x, y: x @ y[0], "matmul"),
        (F.linear, "dot"),
        (lambda x, y: x * y, "multiply"),
        (lambda x, y: x / y, "divide"),
    ],
    ids=["x @ y", "x @ vector", "linear", "x * y", "x / y"],
)
def test_no_product_is_made_for_a_gradient_that_nobody_wants(operation, product, first, second):
    x, y = Tensor(np.ones((3, 3)), first), Tensor(np.ones((3, 3)), second)
    value = operation(x, y)
    Counted.operations.clear()
    gradients = value.node.vjp(np.ones(value.shape).view(Counted), [None, None])
    assert Counted.operations[product] == first + second
    assert [gradient is not None for gradient in gradients] == [first, second]


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_graph_is_freed_by_reference_counts(no_garbage_collection):
    x = tensor(np.ones((3, 3)), requires_grad=True)

    def build():
        h = F.linear(x, x).tanh()
        return (F.relu(h @ x) + h[0] - h.max(dim=1) * x.mean()).sum() + F.cross_entropy(h, [0, 1, 2])

    dropped = build()
    nodes = [weakref.ref(dropped.node)]
    for node in nodes:  # grows meanwhile
        nodes.extend(weakref.ref(t.node) for t in node().inputs if t.node is not None)
    assert len(nodes) > 10
    del dropped
    assert not any(node() for node in nodes)

    walked = build()
    inside = weakref.ref(walked.node.inputs[0].node)
    assert inside() is not None
    walked.backward()
    assert inside() is None  # released by the walk, though the loss is still held


def test_a_chain_of_fifty_thousand_nodes(no_garbage_collection):
    x = tensor(1.0, requires_grad=True)
    y = x
    for _ in range(50_000):
        y = y + x
    y.backward()
    assert x.grad == 50_001


@pytest.mark.parametrize(
    ("length", "step"),
    [(1_000_000, lambda y: record(y.data, (y,), None)), (100_000, lambda y: y * 1.0), (100_000, lambda y: y.sum())],
    ids=["record", "product", "sum"],
)
def test_dropping_a_long_graph_does_not_recurse(length, step, no_garbage_collection):
    x = tensor(1.0, requires_grad=True)
    y = step(x)
    first = weakref.ref(y.node)
    for _ in range(length):
        y = step(y)
    del y
    assert first() is None


# record


def test_an_operation_of_ones_own():
    def cube(x):
        return record(x.data**3, (x,), lambda grad, out: [3 * x.data**2 * grad])

    check_grads(cube, [np.array([0.5, -1.0])], atol=1e-7)
    assert not cube(tensor([1.0])).requires_grad


def test_a_vjp_that_forgets_an_input_is_noticed():
    x = tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="2 inputs gave 1 gradients"):
        record(np.ones(()), (x, x), lambda grad, out: [grad]).backward()


def test_a_parameter_is_updated_in_place_under_no_grad():
    w = Parameter(np.array([1.0, 2.0]))
    before = w
    (w * w).sum().backward()
    with dp.no_grad():
        w -= 0.25 * w.grad
        w += 1.0
        w *= 2.0
    assert w is before
    assert np.array_equal(w.data, [3.0, 4.0])
    for change in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        with pytest.raises(
            RuntimeError, match=r"does not change in place, except inside no_grad\(\); .*w = w \+ \.\.\."
        ):
            change(w, 1.0)
    assert np.array_equal(w.data, [3.0, 4.0])


def test_frozen_parameters_change_in_place_under_no_grad_and_constants_never(torch):
    """As a mean teacher's do; a constant may be the array that somebody gave to a model."""
    teacher, theirs = Parameter(np.array([1.0]), requires_grad=False), torch.ones(1)
    array = np.ones(1)
    constant = Tensor(array)
    with dp.no_grad():
        for q in (teacher,):
            q *= 0.9
            q += 0.1 * Tensor(np.array([3.0]))
        theirs *= 0.9
        theirs += 0.3
        constant += 1.0
    assert teacher.data == pytest.approx(theirs.numpy())
    assert (array[0], constant.data[0]) == (1.0, 2.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: ((y - np.zeros((3, 1))) ** 2).mean(),
        lambda y: (y**2 * np.array([[1], [0], [1]])).sum(),
        lambda y: (y**2).sum() / np.int64(5),
        lambda y: (y * np.array([[True], [False], [True]])).sum(),
        lambda y: (np.ones((2, 3)) @ y).sum(),
        lambda y: (y.transpose(0, 1) @ np.ones((3, 2))).sum(),
        lambda y: y.to(np.float64).exp().sum(),
    ],
)
def test_a_gradient_that_comes_back_from_a_wider_result_has_the_tensors_dtype(loss, rng):
    """Every operation in front may rely on it."""
    layer, x = nn.Linear(2, 1), Tensor(rng.normal(size=(3, 2)).astype(np.float32), requires_grad=True)
    layer.double()
    loss(layer(x.to(np.float64))).backward()
    expected = layer.weight.grad.copy(), x.grad.copy()
    layer.float()
    x.grad = None
    loss(layer(x)).backward()
    assert x.grad.dtype == layer.weight.grad.dtype == np.float32
    np.testing.assert_allclose(layer.weight.grad, expected[0], rtol=1e-6)
    np.testing.assert_allclose(x.grad, expected[1], rtol=1e-6)


@pytest.mark.parametrize("other", [np.int64(3), np.float64(3), np.array([3, 2]), np.array([True, True]), np.float32(3)])
@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow])
def test_numbers_and_whole_numbers_do_not_widen_a_tensor_as_in_pytorch(operation, other, torch):
    x = np.array([2.0, 4.0], np.float32)
    theirs = torch.tensor(other) if isinstance(other, np.ndarray) else other
    if operation is operator.sub and other.dtype == bool:
        theirs = theirs.float()  # PyTorch subtracts no booleans
    expected = operation(torch.tensor(x), theirs)
    for given in (other, Tensor(np.asarray(other))) if isinstance(other, np.ndarray) else (other,):
        found = operation(Tensor(x), given)
        assert found.dtype == operation(given, Tensor(x)).dtype == np.float32
        np.testing.assert_allclose(found.data, expected.numpy(), rtol=1e-6)


def test_to_changes_the_dtype_and_brings_the_gradient_back(rng):
    x = Tensor(rng.normal(size=3).astype(np.float32), requires_grad=True)
    assert x.to(np.float32) is x
    y = x.to("float64")
    (y * y).sum().backward()
    assert (y.dtype, x.grad.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(x.grad, 2 * x.data, rtol=1e-6)
    with pytest.raises(TypeError, match=r"to\(\) takes a floating-point dtype, got int64"):
        x.to(int)


def test_format_of_a_number_and_of_an_array():
    assert f"{tensor(1.23456):.2f}" == "1.23"
    assert f"{tensor([1.0, 2.0])}" == "tensor([1., 2.], dtype=float32)"


KEPT = []  # what a vjp holds on to


GRADIENTS = pytest.mark.parametrize(
    ("vjp", "copied"),
    [
        (lambda g: [KEPT.append(1) or g * 2], False),
        (lambda g: [np.full(g.shape[::-1], 2.0).T], False),
        (lambda g: [KEPT.append(g * 2) or KEPT[-1]], True),
        (lambda g: [KEPT.append(g * 2) or KEPT[-1].T.T], True),
        (lambda g: [np.full((3, 5), 2.0)[:, :4]], True),  # would keep the rest, too
        (lambda g: [np.broadcast_to(2.0, g.shape)], True),
        (lambda g: [np.broadcast_to(g * 2, g.shape)], True),  # all of its memory, but not to be written
        (lambda g: [np.frombuffer(np.full(g.shape, 2.0).tobytes()).reshape(g.shape)], True),
    ],
)


@GRADIENTS
def test_a_leaf_takes_a_gradient_that_nobody_else_holds_and_copies_any_other(vjp, copied):
    x, made = tensor(np.ones((3, 4)), requires_grad=True), []

    def noted(grad, out):
        gradients = vjp(grad)
        made.append(gradients[0].ctypes.data)
        return gradients

    record(x.data, (x,), noted).backward(np.ones((3, 4)))
    np.testing.assert_array_equal(x.grad, np.full((3, 4), 2.0))
    assert (x.grad.ctypes.data != made[0]) == copied
    assert x.grad.flags.writeable
    KEPT.clear()


@GRADIENTS
def test_gradients_that_meet_are_added_up_and_what_others_hold_stays_as_it_is(vjp, copied):
    x = tensor(np.ones((3, 4)), requires_grad=True)
    met = x * 1.0
    later = met * 3.0
    (record(met.data, (met,), lambda grad, out: vjp(grad)) + later).backward(np.ones((3, 4)))
    np.testing.assert_array_equal(x.grad, np.full((3, 4), 5.0))
    for array in KEPT:
        assert np.all(array == (2.0 if isinstance(array, np.ndarray) else 1))
    KEPT.clear()


def test_two_leaves_and_the_caller_never_share_a_gradient():
    x, y, seed = tensor(np.ones(3), requires_grad=True), tensor(np.ones(3), requires_grad=True), np.ones(3)
    (x + y).backward(seed)
    record(x.data, (x, y), lambda g, out: [KEPT.append(g * 1) or KEPT[-1][::-1][::-1], KEPT.pop()]).backward(seed)
    x.grad += 10
    assert (seed.sum(), y.grad.sum()) == (3, 6)


@pytest.mark.parametrize("index", [(slice(None), (0, 0)), ((0, 0),), ([0, 0], 1), (np.array([0, 0]),), (0, (1, 1))])
def test_a_place_that_an_index_takes_twice_gets_both_gradients(index):
    x = tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    x[index].sum().backward()
    expected = np.zeros((2, 3))
    np.add.at(expected, index, 1)
    np.testing.assert_array_equal(x.grad, expected)


def test_division_in_place_under_no_grad():
    w = Parameter(np.array([2.0, 4.0]))
    before = w
    with dp.no_grad():
        w /= 2
    assert w is before
    assert w.data.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "same_as"),
    [
        (operator.iadd, operator.add),
        (operator.isub, operator.sub),
        (operator.imul, operator.mul),
        (operator.itruediv, operator.truediv),
    ],
)
def test_an_augmented_assignment_of_a_result_makes_a_new_one_with_its_gradient(change, same_as):
    def gradient(operation):
        x = tensor([2.0, 3.0], requires_grad=True)
        y = x * x
        z = operation(y, 4.0)
        (z * z).sum().backward()
        return z.data.tolist(), y.data.tolist(), x.grad.tolist()

    assert gradient(change) == gradient(same_as)
