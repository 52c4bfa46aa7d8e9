"""Every operation of `distprop.functional`, as a table: a new operation is one row.

A row goes through finite differences, the comparison with PyTorch (values and gradients, float32 and float64), and the
rules that the tape lays down for every operation: the incoming gradient and the inputs are read-only, no gradient is
computed for an input that needs none, a parameter's gradient lands in its place in the flat buffer.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from distprop import functional as F
from distprop import nn, random
from distprop.buffer import FlatBuffer
from distprop.tensor import Parameter, Tensor
from distprop.testing import check_grads

# Relative to the largest number in an array, which is what cancellation in a sum leaves. float64 has 1e-16, float32
# 6e-8; the rest are the roundings of some tens of operations in another order than PyTorch's.
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


def nothing(rng: np.random.Generator, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    return ()


@dataclass(frozen=True)
class Operation:
    """One row of the table."""

    function: Callable[..., Tensor]
    shapes: Sequence[tuple[tuple[int, ...], ...]]
    """Each entry has one shape for each differentiable input."""
    options: Sequence[dict[str, Any]] = ({},)
    """Keyword arguments to try; ours and PyTorch's have the same names. Lists of floats become arrays."""
    name: str = ""
    torch: Callable[..., Any] | str | None = ""
    """PyTorch's: a name in torch.nn.functional, or a function that takes `torch` first. None if it has none."""
    constants: Callable[..., tuple[np.ndarray, ...]] = nothing
    """Positional arguments behind the inputs, made from (rng, *inputs): labels, targets."""
    kinks: tuple[float, ...] = ()
    """Where the derivative jumps: the random inputs stay away from there."""
    empty_is_nan: bool = False
    """PyTorch's mean over an empty batch is nan, ours 0: compared in `test_a_loss_over_an_empty_batch_is_zero`."""
    loosen: float = 1
    """A factor for TOLERANCE, with the reason beside it."""

    def __str__(self) -> str:
        return self.name or self.function.__name__

    def inputs(self, shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> list[np.ndarray]:
        rng = np.random.default_rng(7)
        arrays = [rng.normal(0, 1.5, shape) for shape in shapes]
        for kink in self.kinks:
            arrays = [np.where(abs(a - kink) < 1e-2, a + 0.1, a) for a in arrays]
        return arrays

    def fixed(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        return self.constants(np.random.default_rng(11), *arrays)


def labels(rng: np.random.Generator, scores: np.ndarray) -> tuple[np.ndarray]:
    return (rng.integers(0, scores.shape[1], (scores.shape[0], *scores.shape[2:])),)


def some_ignored(rng: np.random.Generator, scores: np.ndarray) -> tuple[np.ndarray]:
    (y,) = labels(rng, scores)
    y.reshape(-1)[::3] = -100
    return (y,)


def probabilities(rng: np.random.Generator, scores: np.ndarray) -> tuple[np.ndarray]:
    q = rng.uniform(0.1, 1, scores.shape)
    return (q / q.sum(axis=1, keepdims=True),)


def fractions(rng: np.random.Generator, scores: np.ndarray) -> tuple[np.ndarray]:
    return (rng.uniform(0, 1, scores.shape),)


def targets(rng: np.random.Generator, x: np.ndarray) -> tuple[np.ndarray]:
    return (x + rng.choice([-1, 1], x.shape) * rng.uniform(0.1, 3, x.shape),)  # x − y is never near 0


def masked(rng: np.random.Generator, *arrays: np.ndarray) -> tuple[()]:
    random.manual_seed(3)  # the same mask at every call
    return ()


REDUCTIONS = [{"reduction": reduction} for reduction in ("mean", "sum", "none")]
POINTWISE = [((5, 7),), ((1,),), ((),), ((0, 4),), ((2, 3, 4),), ((3, 1),)]
ALONG_AXIS = [((5, 7),), ((1, 1),), ((0, 4),), ((2, 3, 4),), ((4, 1),)]
SCORES = [((6, 4),), ((1, 2),), ((5, 1),), ((3, 4, 5),), ((2, 3, 2, 2),), ((0, 3),)]
CLASS_WEIGHTS = [0.5, 2.0, 1.5, 0.25]

OPERATIONS = [
    # activations
    Operation(F.relu, POINTWISE, kinks=(0,)),
    Operation(F.leaky_relu, POINTWISE, [{}, {"negative_slope": 0.3}], kinks=(0,)),
    Operation(F.elu, POINTWISE, [{}, {"alpha": 0.4}], kinks=(0,)),
    Operation(F.gelu, POINTWISE, [{}, {"approximate": "tanh"}]),
    Operation(F.silu, POINTWISE),
    Operation(F.sigmoid, POINTWISE),
    Operation(F.tanh, POINTWISE),
    Operation(
        F.softplus, POINTWISE, [{}, {"beta": 3.0}, {"beta": -1.5}, {"beta": 2.0, "threshold": 1.0}], kinks=(0.5,)
    ),
    Operation(F.softmax, ALONG_AXIS, [{"dim": -1}, {"dim": 1}]),
    Operation(F.softmax, [((5, 7),), ((1, 1),), ((2, 3, 4),)], [{"dim": 0}, {"dim": -2}], name="softmax over others"),
    Operation(F.log_softmax, ALONG_AXIS, [{"dim": -1}, {"dim": 1}]),
    Operation(F.log_softmax, [((5, 7),), ((2, 3, 4),)], [{"dim": 0}, {"dim": -2}], name="log_softmax over others"),
    # layers
    Operation(F.linear, [((5, 3), (4, 3)), ((1, 1), (1, 1)), ((3,), (2, 3)), ((0, 3), (2, 3)), ((2, 3, 4), (5, 4))]),
    Operation(
        F.linear,
        [
            ((5, 3), (4, 3), (4,)),
            ((1, 1), (1, 1), (1,)),
            ((3,), (2, 3), (2,)),
            ((0, 3), (2, 3), (2,)),
            ((2, 3, 4), (5, 4), (5,)),
            ((0, 3, 4), (5, 4), (5,)),
            ((2, 2, 2, 3), (1, 3), (1,)),
        ],
        name="linear with bias",
    ),
    Operation(F.dropout, POINTWISE, [{"p": 0.0}, {"p": 0.4, "training": False}, {"p": 1.0}]),
    Operation(F.dropout, POINTWISE, [{"p": 0.4}], torch=None, constants=masked, name="dropout with a mask"),
    # losses
    Operation(F.mse_loss, POINTWISE, REDUCTIONS, constants=targets, empty_is_nan=True),
    Operation(F.l1_loss, POINTWISE, REDUCTIONS, constants=targets, empty_is_nan=True),
    *(
        Operation(loss, [(shape, shape) for shape in ((5, 7), (1,), ())], REDUCTIONS, f"{loss.__name__} of two")
        for loss in (F.mse_loss, F.l1_loss, F.huber_loss)
    ),
    Operation(
        F.huber_loss,
        POINTWISE,
        [*REDUCTIONS, {"delta": 0.3}, {"delta": 2.0, "reduction": "none"}],
        constants=targets,
        empty_is_nan=True,
    ),
    Operation(
        F.binary_cross_entropy_with_logits,
        [((5, 4),), ((1, 4),), ((0, 4),), ((2, 3, 4),)],
        [
            *REDUCTIONS,
            {"weight": CLASS_WEIGHTS},
            {"pos_weight": CLASS_WEIGHTS, "reduction": "sum"},
            {"weight": CLASS_WEIGHTS, "pos_weight": [3.0]},
        ],
        constants=fractions,
        empty_is_nan=True,
    ),
    Operation(F.cross_entropy, SCORES, [*REDUCTIONS, {"label_smoothing": 0.1}], constants=labels, empty_is_nan=True),
    Operation(
        F.cross_entropy,
        [((6, 4),), ((1, 4),), ((3, 4, 5),), ((0, 4),)],
        [{"weight": CLASS_WEIGHTS, **r, "label_smoothing": e} for r in REDUCTIONS for e in (0.0, 0.3)],
        constants=labels,
        empty_is_nan=True,
        name="cross_entropy with class weights",
    ),
    Operation(
        F.cross_entropy,
        [((6, 4),), ((3, 4, 5),), ((2, 4, 2, 2),)],
        [
            *REDUCTIONS,
            {"weight": CLASS_WEIGHTS},
            {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2},
            {"label_smoothing": 0.2, "reduction": "none"},
        ],
        constants=some_ignored,
        name="cross_entropy with ignored labels",
    ),
    Operation(
        F.cross_entropy,
        [((6, 4),), ((1, 4),), ((3, 4, 5),), ((0, 4),)],
        [
            *REDUCTIONS,
            {"label_smoothing": 0.1},
            {"weight": CLASS_WEIGHTS},
            {"weight": CLASS_WEIGHTS, "label_smoothing": 1.0, "reduction": "none"},
        ],
        constants=probabilities,
        empty_is_nan=True,
        name="cross_entropy with probabilities",
    ),
    Operation(F.nll_loss, SCORES, REDUCTIONS, constants=labels, empty_is_nan=True),
    Operation(
        F.nll_loss,
        [((6, 4),), ((3, 4, 5),)],
        [{"weight": CLASS_WEIGHTS, **r} for r in REDUCTIONS],
        constants=some_ignored,
        name="nll_loss with weights and ignored labels",
    ),
]


@dataclass(frozen=True)
class Case:
    """One operation, one set of shapes, one set of options."""

    operation: Operation
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        shapes = ",".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        options = ",".join(f"{k}={'array' if isinstance(v, list) else v}" for k, v in self.options.items())
        return " ".join(filter(None, (str(self.operation), shapes, options)))

    @property
    def is_mean_over_nothing(self) -> bool:
        mean = self.options.get("reduction", "mean") == "mean"
        return self.operation.empty_is_nan and mean and 0 in self.shapes[0]

    def arguments(self, dtype: str) -> tuple[list[np.ndarray], tuple[np.ndarray, ...], dict[str, Any]]:
        """Inputs, constants, options, in `dtype` where they are floating point. The arrays are read-only."""
        arrays = self.operation.inputs(self.shapes, self.options)
        inputs = [frozen(a.astype(dtype)) for a in arrays]
        fixed = tuple(frozen(a.astype(dtype) if a.dtype.kind == "f" else a) for a in self.operation.fixed(arrays))
        options = {k: frozen(np.array(v, dtype)) if isinstance(v, list) else v for k, v in self.options.items()}
        return inputs, fixed, options

    def run(self, inputs: Sequence[Any], dtype: str = "float64") -> Tensor:
        _, fixed, options = self.arguments(dtype)
        return self.operation.function(*inputs, *fixed, **options)


def frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def cotangent(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A gradient to start from, different for each element, and read-only as the tape demands."""
    return frozen(np.asarray(np.random.default_rng(5).uniform(0.5, 1.5, shape), dtype))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


CASES = [
    Case(operation, shapes, options)
    for operation in OPERATIONS
    for shapes in operation.shapes
    for options in operation.options
]
COMPARED = [case for case in CASES if case.operation.torch is not None and not case.is_mean_over_nothing]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_agree_with_finite_differences(case):
    inputs, _, _ = case.arguments("float64")
    check_grads(lambda *tensors: case.run(tensors), inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_values_and_gradients_agree_with_pytorch(case, dtype, torch):
    operation = case.operation
    inputs, fixed, options = case.arguments(dtype)
    ours = [Tensor(a, requires_grad=True) for a in inputs]
    value = operation.function(*ours, *fixed, **options)
    seed = cotangent(value.shape, dtype)
    value.backward(seed)

    theirs = [torch.tensor(a, requires_grad=True) for a in inputs]
    function = operation.torch
    if not callable(function):
        function = getattr(torch.nn.functional, function or operation.function.__name__)
    else:
        theirs = [torch, *theirs]
    converted = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    expected = function(*theirs, *(torch.tensor(a) for a in fixed), **converted)
    expected.backward(torch.tensor(seed))

    tolerance = TOLERANCE[dtype] * operation.loosen
    assert_close(value.data, expected.detach().numpy(), tolerance)
    for our, their in zip(ours, theirs[-len(ours) :], strict=True):
        assert_close(our.grad, their.grad.numpy(), tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_inputs_that_need_a_gradient_get_one(case):
    inputs, _, _ = case.arguments("float64")
    everything = [Tensor(a, requires_grad=True) for a in inputs]
    case.run(everything).backward(seed := cotangent(case.run(inputs).shape, "float64"))
    for chosen in range(len(inputs)):
        some = [Tensor(a, requires_grad=i == chosen) for i, a in enumerate(inputs)]
        value = case.run(some)
        if value is some[chosen]:  # the operation did nothing, as dropout outside training
            continue
        gradients = value.node.vjp(seed, [None] * len(value.node.inputs))
        for tensor, gradient in zip(value.node.inputs, gradients, strict=True):
            assert (gradient is not None) == tensor.requires_grad
            if tensor is some[chosen]:
                np.testing.assert_array_equal(gradient, everything[chosen].grad)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_a_parameter_lands_in_the_flat_buffer(case):
    inputs, _, _ = case.arguments("float64")
    tensors = [Tensor(a, requires_grad=True) for a in inputs]
    parameters = [Parameter(a) for a in inputs]
    buffer = FlatBuffer(parameters)
    buffer.message[:] = np.nan  # what a past step left there must not matter
    value = case.run(parameters)
    case.run(tensors).backward(seed := cotangent(value.shape, "float64"))
    value.backward(seed)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        np.testing.assert_array_equal(parameter.grad, tensor.grad)
        assert parameter.grad.base is not None
        assert parameter.grad.size == 0 or np.shares_memory(parameter.grad, buffer.message)
    case.run(parameters).backward(seed)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        np.testing.assert_allclose(parameter.grad, 2 * tensor.grad, rtol=1e-15)


def operations_in(functions):
    """Those of `distprop.functional` that rows are about: the function itself, or what one of the tests names."""
    public = [getattr(F, name) for name in F.__all__]
    return {n for f in functions for n in ([f.__name__] if f in public else f.__code__.co_names)} & set(F.__all__)


def test_every_operation_has_a_row_that_is_checked_and_one_that_is_compared_with_pytorch():
    others = ("attention", "conv", "embedding", "join", "norm", "pad", "pool")
    tables = [OPERATIONS, *(import_module(f"test_{name}").OPERATIONS for name in others)]
    rows = [row for table in tables for row in table]
    recurrent = import_module("test_recurrent")
    checked = [row.function for row in rows] + [row.values[0] for row in recurrent.OPERATIONS]
    compared = [row.function for row in rows if row.torch is not None]
    split = {"split"}  # whose several tensors the tables do not know; test_join.py has tests of both kinds for it
    assert operations_in(checked) == set(F.__all__) - split
    assert operations_in(compared) | {kind.lower() for kind, _ in recurrent.LAYERS} == set(F.__all__) - split


@pytest.mark.parametrize("leaf", [True, False])
def test_a_parameter_that_an_operation_takes_twice_gets_both_gradients(leaf, rng):
    x, w = Tensor(rng.normal(size=(3, 4)), requires_grad=True), Parameter(rng.normal(size=4))
    FlatBuffer([w])
    weight, bias = (Tensor(w.data.copy(), requires_grad=True) for _ in range(2))
    for scale, shift in ((w, w), (weight, bias)):
        F.layer_norm(x if leaf else 2 * x, (4,), scale, shift).sum().backward()
    np.testing.assert_allclose(w.grad, weight.grad + bias.grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_give_a_constant_with_the_same_value(case):
    inputs, _, _ = case.arguments("float32")
    value = case.run(inputs, "float32")
    assert isinstance(value, Tensor)
    assert not value.requires_grad
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value.data, case.run([Tensor(a, True) for a in inputs], "float32").data)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_integers_are_refused_with_a_word_about_it(operation):
    case = Case(operation, operation.shapes[0], operation.options[0])
    inputs = [np.ones(shape, np.int64) for shape in case.shapes]
    with pytest.raises(TypeError, match=rf"{operation.function.__name__} .*floating"):
        case.run(inputs)


# losses

LOSSES = [operation for operation in OPERATIONS if operation.empty_is_nan]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_a_loss_over_an_empty_batch_is_zero(operation, reduction):
    for options in operation.options:
        x = Tensor(np.empty((0, 4), np.float32), requires_grad=True)
        case = Case(operation, ((0, 4),), {**options, "reduction": reduction})
        weight = Parameter(np.ones((4, 4), np.float32))
        loss = case.run([F.linear(x, weight)], "float32")
        assert loss.shape == ()
        assert loss.item() == 0
        loss.backward()
        np.testing.assert_array_equal(weight.grad, np.zeros((4, 4)))
        assert x.grad.shape == (0, 4)


@pytest.mark.parametrize("operation", LOSSES, ids=str)
def test_an_unknown_reduction_is_refused(operation):
    case = Case(operation, ((3, 4),), {"reduction": "average"})
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none", got \'average\''):
        case.run(case.arguments("float64")[0])


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
def test_a_batch_of_nothing_but_ignored_labels_counts_as_empty(loss, weight):
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    value = loss(x, [-100, -100], weight=weight)
    value.backward()
    assert value.item() == 0
    np.testing.assert_array_equal(x.grad, np.zeros((2, 3)))


def test_another_ignore_index(torch):
    scores, y = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 2, 1, 2])
    for loss in ("cross_entropy", "nll_loss"):
        expected = getattr(torch.nn.functional, loss)(torch.tensor(scores), torch.tensor(y), ignore_index=2)
        assert getattr(F, loss)(scores, y, ignore_index=2).item() == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64])
def test_labels_of_any_integer_type(dtype):
    scores = np.random.default_rng(0).normal(size=(4, 3))
    expected = F.cross_entropy(scores, [0, 2, 1, 2]).item()
    assert F.cross_entropy(scores, np.array([0, 2, 1, 2], dtype)).item() == expected
    assert F.cross_entropy(scores, np.array([0, 2, 1, 2], dtype), weight=[1, 1, 1]).item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
def test_the_loss_of_one_example_is_pytorchs(weight, reduction, rng, torch):
    scores, label, ignored = rng.normal(size=3), np.array(2), np.array(-100)
    cases = [("nll_loss", label, {}), ("nll_loss", ignored, {})]
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing}
        cases += [("cross_entropy", target, options) for target in (label, ignored, np.array([0.2, 0.3, 0.5]))]
    for name, target, options in cases:
        if target is ignored and reduction == "mean":
            continue  # 0 here and NaN in PyTorch, as for a batch
        ours, theirs = Tensor(scores, requires_grad=True), torch.tensor(scores, requires_grad=True)
        tensor_weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        value = getattr(F, name)(ours, target, weight, reduction=reduction, **options)
        function = getattr(torch.nn.functional, name)
        expected = function(theirs, torch.tensor(target), tensor_weight, reduction=reduction, **options)
        value.backward()
        expected.backward()
        assert value.shape == tuple(expected.shape)
        assert_close(value.data, expected.detach().numpy(), 1e-14)
        assert_close(ours.grad, theirs.grad.numpy(), 1e-14)
    for loss in (F.cross_entropy, F.nll_loss):
        with pytest.raises(ValueError, match=r"needs .* of shape \(batch, classes\), got \(3,\)"):
            loss(scores, [2])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_classes_that_are_impossible_do_not_spoil_the_others(torch, reduction):
    """Scores of −∞ mask classes out; 0 · −∞ must not turn the loss into nan."""
    scores = np.array([[1.0, -np.inf, 2.0], [0.5, 0.25, -np.inf], [1.0, 2.0, 3.0]])
    y = np.array([2, 0, -100])
    for weight in (None, [1.0, 2.0, 3.0]):
        ours, theirs = Tensor(scores, requires_grad=True), torch.tensor(scores, requires_grad=True)
        value = F.cross_entropy(ours, y, weight=weight, reduction=reduction)
        tensor_weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        expected = torch.nn.functional.cross_entropy(theirs, torch.tensor(y), tensor_weight, reduction=reduction)
        value.sum().backward()
        expected.sum().backward()
        assert_close(value.data, expected.detach().numpy(), 1e-14)
        assert_close(ours.grad, theirs.grad.numpy(), 1e-14)
    log_p = torch.log_softmax(torch.tensor(scores), 1)
    expected = torch.nn.functional.nll_loss(log_p, torch.tensor(y), reduction=reduction)
    assert_close(F.nll_loss(log_p.numpy(), y, reduction=reduction).data, expected.numpy(), 1e-14)


def test_huge_scores_do_not_overflow():
    scores = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    for loss in (F.cross_entropy(scores, [0, 0]), F.binary_cross_entropy_with_logits(scores, scores < 0)):
        assert loss.item() == 1e4
    assert F.cross_entropy(scores, [0, 0], reduction="none").data.tolist() == [0, 2e4]
    for function in (F.softmax, F.log_softmax, F.sigmoid, F.tanh, F.silu, F.gelu, F.softplus, F.elu):
        x = Tensor(scores, requires_grad=True)
        value = function(x)
        value.sum().backward()
        assert np.isfinite(value.data).all()
        assert np.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("scores", "target", "options", "error", "message"),
    [
        ((3, 4), [0, 4, 1], {}, IndexError, r"label 4 at position 1; with 4 classes labels go from 0 to 3"),
        ((3, 4), [0, 1, -1], {}, IndexError, r"label -1 at position 2"),
        ((2, 4, 2), [[0, 1], [9, 0]], {}, IndexError, r"label 9 at position 1, 0"),
        ((3, 4), [0, 1], {}, ValueError, r"labels of shape \(2,\) for scores of shape \(3, 4\); expected \(3,\)"),
        ((3, 4), [[0], [1], [2]], {}, ValueError, r"labels of shape \(3, 1\)"),
        ((3, 4), [0.0, 1.0, 2.0], {}, ValueError, r"target probabilities of shape \(3,\)"),
        ((3, 4), [True, False, True], {}, TypeError, r"integer class labels, got dtype bool"),
        ((4,), [0], {}, ValueError, r"scores of shape \(batch, classes\), got \(4,\)"),
        ((3, 4), [0, 1, 2], {"label_smoothing": 1.5}, ValueError, r"label_smoothing is between 0 and 1, got 1.5"),
        ((3, 4), [0, 1, 2], {"weight": [1.0, 2.0]}, ValueError, r"each of the 4 classes, got shape \(2,\)"),
    ],
)
def test_cross_entropy_says_what_is_wrong(scores, target, options, error, message):
    with pytest.raises(error, match=message):
        F.cross_entropy(np.zeros(scores), target, **options)


def test_nll_loss_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(batch, classes\), got \(4,\)"):
        F.nll_loss(np.zeros(4), [0])
    with pytest.raises(IndexError, match="nll_loss got label 3"):
        F.nll_loss(np.zeros((1, 3)), [3])
    with pytest.raises(TypeError, match="nll_loss needs integer class labels, got dtype float64"):
        F.nll_loss(np.zeros((1, 3)), np.zeros(1))


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits])
def test_a_target_of_another_shape_is_refused_not_broadcast(loss):
    refusal = rf"{loss.__name__} got predictions of shape \(3, 1\) and targets of shape \(3,\); they must be equal"
    with pytest.raises(ValueError, match=refusal):
        loss(np.zeros((3, 1)), np.zeros(3))


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.cross_entropy])
def test_a_target_that_wants_a_gradient_is_refused_because_it_would_get_none(loss):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: the target must be a constant"):
        loss(np.zeros((3, 2)), Tensor(np.full((3, 2), 0.5), requires_grad=True))


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_that_do_not_fit_the_predictions_are_named(name):
    x = np.zeros((2, 3))
    for shape in ((4,), (2,), (5, 2, 3)):
        with pytest.raises(ValueError, match=rf"^{name} of shape {re.escape(str(shape))} .* predictions of \(2, 3\)"):
            F.binary_cross_entropy_with_logits(x, x, **{name: np.ones(shape)})


def test_a_target_of_integers_or_float64_takes_the_dtype_of_the_prediction():
    for target in (np.array([1, 2]), np.array([1.0, 2.0])):
        loss = F.mse_loss(np.zeros(2, np.float32), target)
        assert loss.dtype == np.float32
        assert loss.item() == 2.5
    assert F.cross_entropy(np.zeros((1, 2), np.float32), np.array([[0.5, 0.5]])).dtype == np.float32
    assert F.cross_entropy(np.zeros((1, 2), np.float32), [0], weight=np.ones(2)).dtype == np.float32


# the rest: kinks, extremes and messages


def test_leaky_relu_without_a_slope_lets_infinity_through(torch):
    values = np.array([np.inf, np.nan, 2.0, 0.0, -3.0])
    ours, theirs = Tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    value, expected = F.leaky_relu(ours, 0.0), torch.nn.functional.leaky_relu(theirs, 0.0)
    np.testing.assert_array_equal(value.data, expected.detach().numpy())
    value.sum().backward()
    expected.sum().backward()
    np.testing.assert_array_equal(ours.grad, theirs.grad.numpy())


def test_derivatives_at_the_kinks_are_pytorchs(torch):
    zero = np.array([0.0, -0.0])
    for name in ("relu", "leaky_relu", "elu", "gelu", "silu", "softplus"):
        ours, theirs = Tensor(zero, requires_grad=True), torch.tensor(zero, requires_grad=True)
        getattr(F, name)(ours).sum().backward()
        getattr(torch.nn.functional, name)(theirs).sum().backward()
        np.testing.assert_array_equal(ours.grad, theirs.grad.numpy(), err_msg=name)
    same = np.array([1.0])
    for name, options in (("l1_loss", {}), ("huber_loss", {"delta": 0.5})):
        for offset in (0.0, 0.5):
            ours, theirs = Tensor(same + offset, requires_grad=True), torch.tensor(same + offset, requires_grad=True)
            getattr(F, name)(ours, same, **options).backward()
            getattr(torch.nn.functional, name)(theirs, torch.tensor(same), **options).backward()
            np.testing.assert_array_equal(ours.grad, theirs.grad.numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gelu_is_accurate_far_out_and_over_many_elements(dtype):
    x = np.linspace(-12, 12, 50_001, dtype=dtype)  # several pieces, and both tails
    expected = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])
    found = F.gelu(x).data
    assert found.dtype == dtype
    precision = np.finfo(dtype)
    if dtype == "float64":  # relative to each number: e^(−x²/2) makes the rounding of x²/2 an error of that size
        bound = precision.eps * (5 + 2 * x**2) * abs(expected) + precision.tiny
    else:  # relative to 1, as PyTorch's x (1 + erf)/2 is: the lower tail is a difference of numbers near 1
        bound = precision.eps * np.maximum(5, abs(expected))
    assert (abs(found - expected) <= bound).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gelu_of_huge_numbers_is_they_or_nothing_and_leaves_the_others_alone(dtype):
    x = np.array([-1e15, -30, -0.7, 0, 1.3, 2e4, 1e15], dtype)
    tensor, alone = Tensor(x, requires_grad=True), Tensor(x[2:5], requires_grad=True)
    value = F.gelu(tensor)
    value.sum().backward()
    F.gelu(alone).sum().backward()
    np.testing.assert_allclose(value.data[[0, 1, 5, 6]], np.maximum(x, 0)[[0, 1, 5, 6]], rtol=0, atol=1e-100)
    np.testing.assert_allclose(tensor.grad[[0, 1, 5, 6]], [0, 0, 1, 1], rtol=0, atol=1e-100)
    np.testing.assert_array_equal(value.data[2:5], F.gelu(x[2:5]).data)
    np.testing.assert_array_equal(tensor.grad[2:5], alone.grad)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_lower_tails_of_sigmoid_and_softplus_keep_their_digits(dtype):
    x = np.linspace(-80, 0, 10_001, dtype=dtype)
    exact = x.astype(np.float64)
    bound = 8 * np.finfo(dtype).eps
    for found, expected in (
        (F.sigmoid(x).data, 1 / (1 + np.exp(-exact))),
        (F.softplus(x).data, np.log1p(np.exp(exact))),
    ):
        assert found.dtype == dtype
        assert (abs(found - expected) <= bound * expected).all()


def test_silu_is_accurate_to_a_rounding_of_its_input():
    x = np.linspace(-40, 40, 100_001, dtype=np.float32)  # several pieces
    expected = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert (abs(F.silu(x).data - expected) <= np.finfo(np.float32).eps * np.maximum(abs(x), 1e-30)).all()


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_softmax_names_a_dim_that_is_not_there(function):
    with pytest.raises(IndexError, match=rf"^{function.__name__} got dim 5, .* out of range for shape \(2, 3\)"):
        function(np.ones((2, 3)), 5)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_without_dim_is_pytorchs_where_no_other_axis_can_be_meant(name, rng, torch):
    function, module = getattr(F, name), {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax}[name]()
    for shape in ((5,), (3, 4)):
        x = rng.normal(size=shape)
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            expected = getattr(torch.nn.functional, name)(torch.tensor(x)).numpy()
        assert_close(function(x).data, expected, 1e-14)
        assert_close(module(x).data, expected, 1e-14)
    for shape in ((), (2, 3, 4), (2, 3, 4, 5)):
        message = rf"^{name} got x of shape {re.escape(str(shape))} and no dim; name the axis"
        for without_dim in (function, module):
            with pytest.raises(ValueError, match=message):
                without_dim(np.zeros(shape))


def test_softmax_agrees_with_itself_however_large_the_scores():
    scores = np.random.default_rng(0).normal(size=(3, 50))  # close to 0 the largest score is not subtracted
    for function in (F.softmax, F.log_softmax):
        np.testing.assert_allclose(function(scores + 1e4).data, function(scores).data, rtol=1e-11)


def test_a_gradient_written_in_place_belongs_to_its_leaf_alone():
    x, g = Tensor(np.ones((3, 4)), requires_grad=True), np.ones((3, 4))
    for times in (1, 2):
        F.sigmoid(x).backward(g)
        slope = np.exp(1) / (1 + np.exp(1)) ** 2
        np.testing.assert_allclose(x.grad, np.full((3, 4), times * slope), rtol=1e-14)
        assert not np.shares_memory(x.grad, g)


def test_gelu_of_arrays_that_are_not_contiguous():
    x = np.random.default_rng(0).normal(size=(6, 8))
    np.testing.assert_array_equal(F.gelu(x.T).data, F.gelu(x).data.T)
    np.testing.assert_array_equal(F.gelu(x[:, ::2]).data, F.gelu(x).data[:, ::2])


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="approximate must be"):
        F.gelu(np.zeros(1), approximate="sigmoid")
    with pytest.raises(ValueError, match="huber_loss needs delta > 0, got 0"):
        F.huber_loss(np.zeros(1), np.zeros(1), delta=0)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability between 0 and 1"):
            F.dropout(np.zeros(1), p)


def test_linear_says_what_does_not_fit():
    x, weight, bias = np.zeros((2, 3)), np.zeros((5, 3)), np.zeros(5)
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) \(out, in\) got x of shape \(2, 4\).* must be 3"):
        F.linear(np.zeros((2, 4)), weight)
    with pytest.raises(ValueError, match=r"got x of shape \(\)"):
        F.linear(np.zeros(()), weight)
    with pytest.raises(ValueError, match=r"\(out, in\) got a bias of shape \(1,\)"):
        F.linear(x, weight, np.zeros(1))
    with pytest.raises(TypeError, match=r"linear needs one floating-point dtype, got x float64, weight float32"):
        F.linear(x, weight.astype(np.float32))
    with pytest.raises(TypeError, match=r"bias float32"):
        F.linear(x, weight, bias.astype(np.float32))


def test_linear_of_a_matrix_with_itself():
    check_grads(lambda w: F.linear(w, w), np.random.default_rng(0).normal(size=(3, 3)), atol=1e-7)
    check_grads(lambda w: F.linear(w, w, w[0]), np.random.default_rng(0).normal(size=(3, 3)), atol=1e-7)
    parameter = Parameter(np.random.default_rng(0).normal(size=(3, 3)))
    plain = Tensor(parameter.data.copy(), requires_grad=True)
    buffer = FlatBuffer([parameter])
    buffer.grad[:] = np.nan
    for w in (parameter, plain):
        (F.linear(w, w) * F.linear(np.ones((3, 3)), w)).sum().backward()
    np.testing.assert_allclose(parameter.grad, plain.grad, rtol=1e-14)


def test_dropout_keeps_the_mean_and_the_share(rng):
    for p in (0.1, 0.5, 0.9):
        kept = F.dropout(np.ones((400, 500), np.float32), p).data
        assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / (1 - p))}
        share = (kept > 0).mean()
        assert abs(share - (1 - p)) < 5 * np.sqrt(p * (1 - p) / kept.size)  # five standard deviations
        # every row and every column has its share: nothing is repeated along either
        assert abs((kept > 0).mean(0) - (1 - p)).max() < 6 * np.sqrt(p * (1 - p) / 400)
        assert abs((kept > 0).mean(1) - (1 - p)).max() < 6 * np.sqrt(p * (1 - p) / 500)


# What holds for every operation; files with tables of their own run these too.
CHECKS = [
    test_gradients_agree_with_finite_differences,
    test_only_the_inputs_that_need_a_gradient_get_one,
    test_the_gradient_of_a_parameter_lands_in_the_flat_buffer,
    test_arrays_give_a_constant_with_the_same_value,
]
