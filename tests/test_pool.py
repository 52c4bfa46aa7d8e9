"""Pooling against finite differences and PyTorch: equal maxima, borders, blocks of every size, both memory orders."""

import numpy as np
import pytest

from distprop import functional as F
from distprop import nn
from distprop.functional import maxima, pool, sliding, tiles
from distprop.functional.geometry import pooling_window
from distprop.tape import no_grad
from distprop.tensor import Tensor
from distprop.testing import check_grads
from test_conv import channels_last
from test_functional import TOLERANCE, Case, Operation, assert_close, cotangent, frozen

SHAPES = [((2, 3, 6, 8),), ((1, 1, 5, 7),), ((0, 2, 6, 6),), ((2, 1, 4, 4),)]
WINDOWS = [
    {"kernel_size": 2},
    {"kernel_size": (2, 3)},
    {"kernel_size": 3, "stride": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (4, 3), "stride": (1, 2), "padding": (2, 1)},
    {"kernel_size": 1, "stride": 2},  # pixels that nobody sees
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    {"kernel_size": (4, 4)},  # the image, for the last shape
]
OPERATIONS = [
    Operation(
        F.max_pool2d,
        SHAPES,
        [
            *WINDOWS,
            {"kernel_size": 2, "dilation": 2},
            {"kernel_size": 3, "stride": (1, 2), "padding": 1, "dilation": (1, 2)},
        ],
    ),
    Operation(
        F.max_pool2d, [((1, 2, 6, 6),)], [{"kernel_size": 2, "stride": 3, "dilation": 2}], name="max_pool2d apart"
    ),
    Operation(
        F.avg_pool2d,
        SHAPES,
        [
            *WINDOWS,
            *({**window, "count_include_pad": False} for window in WINDOWS if "padding" in window),
            {"kernel_size": 2, "divisor_override": 3},
            {"kernel_size": 3, "padding": 1, "divisor_override": -2},
        ],
    ),
    Operation(
        F.adaptive_avg_pool2d,
        [*SHAPES, ((2, 3, 1, 1),)],
        [{"output_size": size} for size in (1, 3, (2, 4), (None, 2), (5, None), (9, 10))],
    ),
]
CASES = [Case(op, shapes, options) for op in OPERATIONS for shapes in op.shapes for options in op.options]


@pytest.fixture(params=[1, 200, 1 << 18], ids="block {}".format)
def block(request, monkeypatch):
    for module in (maxima, pool, tiles):
        monkeypatch.setattr(module, "BLOCK_BYTES", request.param)


def on_both(case, x, torch):
    """((our value, our gradient), (PyTorch's value, its gradient))."""
    function, options = case.operation.function, case.options
    ours, theirs = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    value = function(ours, **options)
    seed = cotangent(value.shape, str(x.dtype))
    value.backward(seed)
    expected = getattr(torch.nn.functional, function.__name__)(theirs, **options)
    expected.backward(torch.tensor(seed))
    assert np.moveaxis(value.data, 1, -1).flags.c_contiguous
    return (value.data, ours.grad), (expected.detach().numpy(), theirs.grad.numpy())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_agree_with_finite_differences(case):
    inputs, _, _ = case.arguments("float64")
    check_grads(lambda *tensors: case.run(tensors), inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_agree_with_pytorch_whatever_the_block(case, dtype, torch, block):
    inputs, _, _ = case.arguments(dtype)
    for x in (inputs[0], channels_last(inputs[0])):
        for found, expected in zip(*on_both(case, x, torch), strict=True):
            assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("case", [case for case in CASES if case.operation.function is F.max_pool2d], ids=str)
def test_among_equal_maxima_the_first_gets_the_whole_gradient_as_in_pytorch(case, torch, block):
    for values in ([0.0], [-1.0, 0.0], [-2.0, -1.0, -3.0], [0.0, -0.0], [-np.inf], [-np.inf, -1.0]):
        x = frozen(np.random.default_rng(3).choice(values, case.shapes[0]))
        for found, expected in zip(*on_both(case, x, torch), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.operation.function is F.max_pool2d], ids=str)
def test_a_nan_spreads_to_every_window_that_sees_it_as_in_pytorch(case, torch, block):
    x = frozen(np.random.default_rng(4).choice([0.0, 1.0, -np.inf, np.nan], case.shapes[0], p=[0.3, 0.3, 0.3, 0.1]))
    (value, _), (expected, _) = on_both(case, x, torch)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_finite_in_a_gradient_goes_to_the_winner_alone(stride):
    x = Tensor(np.array([[[[1.0, 4.0], [3.0, 2.0]]]]), requires_grad=True)
    F.max_pool2d(x, 2, stride).backward(np.array([[[[np.inf]]]]))
    assert x.grad.tolist() == [[[[0, np.inf], [0, 0]]]]


def test_a_dilated_window_that_straddles_the_image_gives_no_gradient():
    x = Tensor(np.array([[[[1.0, 2.0]]]]), requires_grad=True)  # the window sees the pixels -1 and 2
    value = F.max_pool2d(x, (1, 2), padding=(0, 1), dilation=(1, 3), stride=1)
    assert value.data.tolist() == [[[[-np.inf]]]]
    value.backward(np.ones((1, 1, 1, 1)))
    assert x.grad.tolist() == [[[[0, 0]]]]


@pytest.mark.parametrize("kernel", [16, 17])
def test_a_window_of_more_pixels_than_a_byte_can_count(kernel, torch, rng):
    case = Case(OPERATIONS[0], ((2, 3, 34, 34),), {"kernel_size": kernel})
    x = np.zeros((2, 3, 34, 34))
    x[:, :, kernel - 1 :: kernel, kernel - 1 :: kernel] = 1  # the last pixel of each window wins
    for found, expected in zip(*on_both(case, x, torch), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 32, 28, 28), (3, 64, 57, 56)])
@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}])
@pytest.mark.parametrize("operation", [OPERATIONS[0], OPERATIONS[2]], ids=str)
def test_sizes_of_real_networks(operation, window, shape, torch, rng):
    x = rng.normal(size=shape).astype(np.float32)
    for found, expected in zip(*on_both(Case(operation, (shape,), window), x, torch), strict=True):
        assert_close(found, expected, TOLERANCE["float32"])


@pytest.mark.parametrize("window", [(3, 2, 1), (2,), (3,)], ids=str)
def test_without_a_gradient_nothing_is_remembered_but_the_value_is_the_same(window, rng):
    x = rng.normal(size=(2, 3, 6, 6))
    expected = F.max_pool2d(Tensor(x, requires_grad=True), *window).data
    with no_grad():
        value = F.max_pool2d(Tensor(x, requires_grad=True), *window)
    assert value.node is None
    np.testing.assert_array_equal(value.data, expected)
    np.testing.assert_array_equal(F.max_pool2d(x, *window).data, expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("shape", "kernel"), [((3, 6, 8, 5), (2, 2)), ((2, 7, 9, 1), (3, 2)), ((0, 4, 4, 2), (4, 4))])
def test_windows_side_by_side_give_the_bits_that_any_windows_give(shape, kernel, dtype, block, rng):
    images = rng.integers(-3, 4, shape).astype(dtype)  # with equal maxima
    window = pooling_window("max_pool2d", (shape[0], shape[3], *shape[1:3]), kernel, None, 0, 1, False)
    assert tiles.suits(images, window)
    value, winner = tiles.forward(images, window, True)
    for found, expected in zip((value, winner), maxima.forward(images, window, True), strict=True):
        np.testing.assert_array_equal(found, expected)
    grad = rng.normal(size=value.shape).astype(dtype)
    expected = maxima.backward(grad, winner, shape, window)
    np.testing.assert_array_equal(tiles.backward(grad, winner, shape, window), expected)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), ((2, 5), (3, 2), (0, 2)), (4, 4, 2)])
def test_pixels_brought_together_give_the_bits_that_strided_ones_give(kernel, stride, padding, monkeypatch, block, rng):
    x = rng.normal(size=(2, 3, 9, 11))
    found = []
    for long_run in (1 << 20, 0):
        monkeypatch.setattr(sliding, "LONG_RUN", long_run)
        tensor = Tensor(x, requires_grad=True)
        value = F.avg_pool2d(tensor, kernel, stride, padding)
        value.backward(cotangent(value.shape, "float64"))
        found.append((value.data, tensor.grad))
    for together, strided in zip(*found, strict=True):
        np.testing.assert_array_equal(together, strided)


def test_numbers_of_more_than_eight_bytes(rng):
    x = Tensor(rng.normal(size=(2, 3, 4, 4)).astype(np.longdouble), requires_grad=True)
    value = F.max_pool2d(x, 2)
    value.sum().backward()
    assert x.grad.sum() == value.data.size


@pytest.mark.parametrize("function", [F.max_pool2d, F.avg_pool2d])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 6}, r"x of shape \(2, 3, 4, 5\).* 4 by 5, less than the 6 by 6 of the kernel \(6, 6\)"),
        ({"kernel_size": (5, 1)}, r"less than the 5 by 1"),
    ],
)
def test_poolings_say_what_does_not_fit_the_image(function, options, message):
    with pytest.raises(ValueError, match=f"{function.__name__}.*{message}"):
        function(np.zeros((2, 3, 4, 5)), **options)


NEVER = [
    ({"kernel_size": 0}, ValueError, r"kernel_size must be one integer or two, 1 or more, got 0"),
    ({"kernel_size": (2, 2, 2)}, ValueError, r"kernel_size must be .* got \(2, 2, 2\)"),
    ({"kernel_size": 2, "stride": 0}, ValueError, r"stride must be .* got 0"),
    ({"kernel_size": 2, "padding": -1}, ValueError, r"padding must be .* 0 or more, got -1"),
    ({"kernel_size": 3, "padding": 2}, ValueError, r"half of the kernel at most, got padding 2 for kernel \(3, 3\)"),
    ({"kernel_size": 2.0}, TypeError, r"kernel_size must be one integer or two, got 2.0"),
]


@pytest.mark.parametrize(
    ("function", "layer", "options", "error", "message"),
    [
        *((F.max_pool2d, nn.MaxPool2d, *row) for row in NEVER),
        *((F.avg_pool2d, nn.AvgPool2d, *row) for row in NEVER),
        (F.max_pool2d, nn.MaxPool2d, {"kernel_size": 2, "dilation": 0}, ValueError, "dilation must be .* got 0"),
        (F.avg_pool2d, nn.AvgPool2d, {"kernel_size": 2, "divisor_override": 0}, ValueError, "override must not be 0"),
        *(
            (
                F.adaptive_avg_pool2d,
                nn.AdaptiveAvgPool2d,
                {"output_size": size},
                error,
                "output_size must be one integer or two",
            )
            for size, error in ((0, ValueError), ((1, 2, 3), ValueError), ((None,), TypeError), ([None, 0], ValueError))
        ),
    ],
)
def test_what_no_image_can_be_pooled_with_is_refused_when_a_layer_is_made(function, layer, options, error, message):
    with pytest.raises(error, match=f"{function.__name__}: .*{message}") as of_function:
        function(np.zeros((2, 3, 4, 5)), **options)
    with pytest.raises(error, match=f"{layer.__name__}: .*{message}") as of_layer:
        layer(**options)
    assert str(of_layer.value).partition(": ")[2] == str(of_function.value).partition(": ")[2]


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)], ids=repr)
def test_layers_refuse_what_is_not_a_batch_of_images(layer):
    for shape in ((3, 4, 4), (2, 3, 4, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)):
        with pytest.raises(ValueError, match=r"got x of shape \(.*\); it must be \(batch, channels, height, width\)"):
            layer(np.zeros(shape))
    with pytest.raises(TypeError, match="int64; it needs floating point"):
        layer(np.zeros((2, 3, 4, 4), np.int64))


def test_dilation_makes_a_kernel_larger():
    with pytest.raises(ValueError, match="less than the 7 by 7 of the kernel"):
        F.max_pool2d(np.zeros((2, 3, 4, 4)), 3, dilation=3)


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("MaxPool2d", (3, 2, 1), {}),
        ("MaxPool2d", (2,), {}),
        ("MaxPool2d", ((2, 3), 2, 1, 2), {"ceil_mode": True}),
        ("AvgPool2d", (3, 2, 1), {}),
        ("AvgPool2d", (3, None, 1, True, False), {}),
        ("AvgPool2d", (3, None, 1, True, False, 5), {}),
        ("AdaptiveAvgPool2d", (1,), {}),
        ("AdaptiveAvgPool2d", ((3, None),), {}),
    ],
)
def test_layers_are_pytorchs(name, arguments, options, torch, rng):
    ours, theirs = getattr(nn, name)(*arguments, **options), getattr(torch.nn, name)(*arguments, **options)
    x = rng.normal(size=(2, 3, 8, 9)).astype(np.float32)
    assert_close(ours(x).data, theirs(torch.tensor(x)).numpy(), TOLERANCE["float32"])
    assert repr(ours) == repr(theirs)
    assert list(ours.parameters()) == []
