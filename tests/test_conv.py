"""Convolutions against finite differences and PyTorch, in blocks of every size, in both memory orders; the layers."""

import tracemalloc

import numpy as np
import pytest

from distprop import functional as F
from distprop import nn
from distprop.buffer import FlatBuffer
from distprop.functional import correlate, depthwise, groups, kernel_rows, transposed, windows
from distprop.tensor import Parameter, Tensor
from distprop.testing import check_grads
from test_functional import TOLERANCE, Case, Operation, assert_close, cotangent, frozen

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # PyTorch's

IMAGE_3X3 = ((2, 2, 5, 4), (3, 2, 3, 3), (3,))

OPERATIONS = [
    Operation(
        F.conv2d,
        [
            IMAGE_3X3,
            ((2, 2, 5, 4), (3, 2, 3, 3)),
            ((1, 1, 3, 3), (1, 1, 3, 3), (1,)),  # the kernel is the image
            ((1, 2, 1, 1), (3, 2, 1, 1), (3,)),
            ((0, 2, 5, 4), (3, 2, 3, 3), (3,)),
            ((2, 5, 4, 3), (2, 5, 2, 3), (2,)),
        ],
    ),
    Operation(
        F.conv2d,
        [
            IMAGE_3X3,
            ((1, 3, 4, 6), (2, 3, 2, 3)),
            ((1, 3, 1, 1), (2, 3, 3, 3), (2,)),
            ((0, 2, 3, 3), (1, 2, 2, 2), (1,)),
        ],
        [
            {"padding": 1},
            {"padding": (2, 1)},
            {"padding": (4, 3)},  # more than the kernel: windows that see nothing but padding
            {"padding": "same"},
            {"padding": 1, "stride": 2},
            {"padding": (1, 2), "stride": (3, 2)},
            {"padding": 2, "dilation": 2},
            {"padding": (2, 3), "stride": 2, "dilation": (1, 3)},
            {"padding": "same", "dilation": (2, 1)},
        ],
        name="conv2d with padding",
    ),
    Operation(F.conv2d, [((2, 2, 5, 6), (3, 2, 1, 1), (3,))], [{}, {"stride": 2}, {"padding": 1}], name="conv2d 1x1"),
    Operation(
        F.conv2d, [((2, 2, 5, 4), (3, 2, 2, 2), (3,))], [{"stride": (2, 3)}, {"padding": "valid"}], name="conv2d 2x2"
    ),
    Operation(
        F.conv2d,
        [((2, 4, 5, 4), (6, 2, 3, 3), (6,)), ((0, 4, 5, 4), (2, 2, 2, 1))],
        [{"groups": 2}, {"groups": 2, "stride": 2, "padding": 1, "dilation": (1, 2)}],
        name="conv2d in groups",
    ),
    Operation(
        F.conv2d,
        [((2, 3, 5, 4), (3, 1, 3, 3), (3,)), ((2, 3, 5, 4), (6, 1, 2, 3)), ((0, 3, 4, 4), (6, 1, 2, 2), (6,))],
        [{"groups": 3}, {"groups": 3, "stride": 2, "padding": 1}, {"groups": 3, "dilation": (2, 1), "padding": (2, 0)}],
        name="conv2d depthwise",
    ),
    Operation(
        F.conv1d,
        [((2, 3, 7), (4, 3, 3), (4,)), ((1, 1, 3), (2, 1, 3)), ((0, 3, 7), (4, 3, 2), (4,))],
        [{}, {"padding": "same"}, {"stride": 2, "padding": 2, "dilation": 2}, {"stride": (2,), "padding": (1,)}],
    ),
    Operation(
        F.conv1d,
        [((2, 4, 9), (4, 2, 3), (4,)), ((2, 4, 9), (6, 2, 2))],
        [{"groups": 2}, {"groups": 2, "stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "padding": 2}],
        name="conv1d in groups",
    ),
    Operation(
        F.conv1d,
        [((2, 3, 9), (6, 1, 3), (6,))],
        [{"groups": 3}, {"groups": 3, "stride": 2, "padding": 1}],
        name="conv1d depthwise",
    ),
    Operation(
        F.conv_transpose2d,
        [((2, 2, 3, 4), (2, 3, 3, 2), (3,)), ((2, 2, 1, 1), (2, 1, 3, 3)), ((0, 2, 3, 2), (2, 3, 2, 3), (3,))],
        [
            {},
            {"stride": 2, "output_padding": 1},
            {"stride": (2, 3), "padding": 1, "output_padding": (1, 2)},
            {"padding": (1, 0), "dilation": (2, 3), "output_padding": (1, 2)},
        ],
    ),
    Operation(
        F.conv_transpose2d,
        [((3, 2, 3, 4), (2, 3, 4, 6), (3,)), ((1, 2, 1, 2), (2, 1, 4, 6)), ((0, 2, 3, 2), (2, 3, 4, 6), (3,))],
        [
            {"stride": 2, "padding": 1},
            {"stride": (4, 2), "padding": (2, 1), "output_padding": (3, 1)},
            {"stride": (1, 3), "padding": (0, 4)},
        ],
        name="conv_transpose2d in tiles",
    ),
    Operation(
        F.conv2d,
        [((2, 2, 5, 7), (3, 2, 4, 2), (3,))],
        [{"stride": 2, "padding": 1}, {"stride": (4, 2), "padding": (1, 0)}, {"stride": (2, 1), "padding": (3, 2)}],
        name="conv2d in tiles",
    ),
    Operation(
        F.conv_transpose2d,
        [((1, 4, 3, 2), (4, 3, 2, 3), (6,)), ((1, 4, 3, 2), (4, 1, 2, 3), (2,))],
        [{"groups": 2}, {"groups": 2, "stride": 2, "padding": (0, 1)}],
        name="conv_transpose2d in groups",
    ),
]
CASES = [Case(op, shapes, options) for op in OPERATIONS for shapes in op.shapes for options in op.options]


def channels_last(x: np.ndarray) -> np.ndarray:
    """The same values with the channels last in memory."""
    return frozen(np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1))


@pytest.fixture
def blocks(monkeypatch):
    """Makes the blocks small: a few windows each, so that one image is several and a batch has a smaller last one.

    With `small_product` all kernels go a row at a time, in products of so many multiplications if they can.
    """

    def set_bytes(number: int, short_row: int = windows.SHORT_ROW, small_product: int = 0) -> None:
        monkeypatch.setattr(windows, "SHORT_ROW", short_row)
        monkeypatch.setattr(correlate, "SMALL_PRODUCT", 1)
        monkeypatch.setattr(kernel_rows, "suits", lambda channels, outputs, window: small_product > 0)
        monkeypatch.setattr(kernel_rows, "SMALL_PRODUCT", small_product)
        for module in (correlate, depthwise, kernel_rows, transposed):
            monkeypatch.setattr(module, "BLOCK_BYTES", number)

    return set_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_agree_with_finite_differences(case):
    inputs, _, _ = case.arguments("float64")
    check_grads(lambda *tensors: case.run(tensors), inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("block_bytes", "short_row", "small_product"),
    [(1, 12, 0), (700, 0, 0), (1 << 21, 12, 0), (1 << 21, 0, 0), (1, 12, 1), (700, 12, 100), (1 << 21, 12, 150)],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_agree_with_pytorch_whatever_the_block(
    case, dtype, block_bytes, short_row, small_product, torch, blocks
):
    blocks(block_bytes, short_row, small_product)
    inputs, _, options = case.arguments(dtype)
    if block_bytes == 700:
        inputs[0] = channels_last(inputs[0])
    compare(case.operation.function, inputs, options, torch)


def compare(function, inputs, options, torch):
    """Value, memory order and all gradients of one operation beside PyTorch's."""
    ours = [Tensor(a, requires_grad=True) for a in inputs]
    value = function(*ours, **options)
    seed = cotangent(value.shape, str(value.dtype))
    value.backward(seed)
    theirs = [torch.tensor(a, requires_grad=True) for a in inputs]
    expected = getattr(torch.nn.functional, function.__name__)(*theirs, **options)
    expected.backward(torch.tensor(seed))
    tolerance = TOLERANCE[str(value.dtype)]
    assert_close(value.data, expected.detach().numpy(), tolerance)
    assert np.moveaxis(value.data, 1, -1).flags.c_contiguous
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad.numpy(), tolerance)


@pytest.mark.parametrize("seed", range(80))
def test_any_geometry_is_pytorchs_or_is_refused_by_both(seed, torch, blocks):
    rng = np.random.default_rng(seed)
    blocks(int(rng.choice([1, 1000, 1 << 21])), int(rng.choice([0, 12])), int(rng.choice([0, 1, 100])))

    def pair(low, high):
        return tuple(int(n) for n in rng.integers(low, high, 2))

    group, inner, outer = (int(n) for n in rng.integers(1, 4, 3))
    options = {"stride": pair(1, 4), "padding": pair(0, 4), "dilation": pair(1, 3), "groups": group}
    shape, kernel = (int(rng.integers(1, 4)), group * inner, *pair(1, 9)), pair(1, 4)
    if seed % 2:
        function, weight = F.conv2d, (group * outer, inner, *kernel)
    else:
        function, weight = F.conv_transpose2d, (group * inner, outer, *kernel)
        options["output_padding"] = pair(0, 2)
    inputs = [frozen(rng.normal(size=s)) for s in (shape, weight, (group * outer,))]
    try:
        getattr(torch.nn.functional, function.__name__)(*(torch.tensor(a) for a in inputs), **options)
    except RuntimeError:
        with pytest.raises(ValueError, match=function.__name__):
            function(*inputs, **options)
    else:
        compare(function, inputs, options, torch)


@pytest.mark.parametrize(
    ("function", "shape", "weight", "options"),
    [
        (F.conv2d, (5, 16, 9, 7), (12, 16, 3, 3), {"padding": 1}),
        (F.conv2d, (5, 16, 9, 8), (12, 8, 3, 3), {"padding": 1, "groups": 2}),
        (F.conv2d, (3, 8, 11, 9), (8, 8, 5, 3), {"stride": (3, 2), "padding": 2, "dilation": (2, 1)}),
        (F.conv2d, (1, 32, 40, 30), (16, 32, 3, 3), {}),  # one image is several blocks
        # each channel alone
        (F.conv2d, (5, 16, 9, 7), (16, 1, 3, 3), {"padding": 1, "groups": 16}),
        (F.conv2d, (3, 4, 11, 9), (8, 1, 5, 3), {"stride": (3, 2), "padding": 2, "dilation": (2, 1), "groups": 4}),
        (F.conv2d, (1, 32, 40, 30), (32, 1, 3, 2), {"groups": 32}),
        # in tiles
        (F.conv_transpose2d, (5, 6, 9, 7), (6, 8, 4, 6), {"stride": (2, 3), "padding": 1, "output_padding": (1, 0)}),
        (F.conv_transpose2d, (1, 16, 20, 30), (16, 4, 4, 2), {"stride": 2, "groups": 2}),
    ],
)
def test_each_faster_way_gives_what_products_with_whole_windows_do(
    function, shape, weight, options, blocks, monkeypatch, rng
):
    outputs = weight[1] * options.get("groups", 1) if function is F.conv_transpose2d else weight[0]
    inputs = [frozen(rng.normal(size=s)) for s in (shape, weight, (outputs,))]
    found = []
    for faster in (True, False):
        blocks(20_000, small_product=3_000 if faster else 0)
        if not faster:
            monkeypatch.setattr(depthwise, "suits", lambda channels, groups: False)
            monkeypatch.setattr(correlate, "has_tiles", lambda window: False)
        tensors = [Tensor(a, requires_grad=True) for a in inputs]
        value = function(*tensors, **options)
        value.backward(cotangent(value.shape, "float64"))
        found.append([value.data, *(t.grad for t in tensors)])
    for fast, whole in zip(*found, strict=True):
        assert_close(fast, whole, 1e-13)
    assert not np.array_equal(found[0][0], found[1][0])  # the same to the bit would be the same way twice


@pytest.mark.parametrize("kernel", [(2, 4), (4, 3), (1, 2)])
def test_same_with_an_even_kernel_pads_behind_as_pytorch_does(kernel, torch, rng):
    inputs = [rng.normal(size=(2, 2, 6, 5)), rng.normal(size=(3, 2, *kernel)), rng.normal(size=3)]
    compare(F.conv2d, inputs, {"padding": "same", "dilation": (1, 2)}, torch)


@pytest.mark.parametrize(
    ("shape", "weight", "options"),
    [
        ((20, 32, 14, 14), (64, 32, 3, 3), {"padding": 1}),
        ((40, 1, 28, 28), (32, 1, 3, 3), {"padding": 1}),
        ((9, 16, 32, 32), (40, 16, 3, 3), {"padding": 1, "stride": 2}),
        ((30, 20, 12, 12), (40, 20, 5, 5), {}),
        ((1, 3, 90, 70), (64, 3, 7, 7), {"padding": 3}),
        ((1, 64, 90, 70), (64, 64, 3, 3), {"padding": 1}),  # one image is several blocks
        ((9, 128, 30, 30), (64, 128, 1, 1), {}),
    ],
)
def test_sizes_of_real_networks(shape, weight, options, torch, rng):
    inputs = [rng.normal(size=s).astype(np.float32) for s in (shape, weight, weight[:1])]
    ours = [Tensor(a, requires_grad=True) for a in inputs]
    value = F.conv2d(*ours, **options)
    seed = rng.normal(size=value.shape).astype(np.float32)
    value.backward(seed)
    theirs = [torch.tensor(a, requires_grad=True) for a in inputs]
    expected = torch.nn.functional.conv2d(*theirs, **options)
    expected.backward(torch.tensor(seed))
    assert_close(value.data, expected.detach().numpy(), 1e-5)
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad.numpy(), 1e-5)  # sums of up to 30,000 products in another order


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_inputs_that_need_a_gradient_get_one(case):
    inputs, _, _ = case.arguments("float64")
    everything = [Tensor(a, requires_grad=True) for a in inputs]
    case.run(everything).backward(seed := cotangent(case.run(inputs).shape, "float64"))
    for chosen in range(len(inputs)):
        some = [Tensor(a, requires_grad=i == chosen) for i, a in enumerate(inputs)]
        value = case.run(some)
        gradients = value.node.vjp(seed, [None] * len(inputs))
        for i, gradient in enumerate(gradients):
            assert (gradient is not None) == (i == chosen)
        assert_close(gradients[chosen], everything[chosen].grad, 1e-13)


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2}, {"groups": 2}])
def test_a_first_layer_computes_nothing_for_its_input(options, monkeypatch, rng):
    def forbidden(*args, **kwargs):
        raise AssertionError("the gradient of the input was computed")

    for module in (correlate, groups):
        monkeypatch.setattr(module, "input_gradient", forbidden)
        monkeypatch.setattr(module, "gradients", forbidden)
    weight = Parameter(rng.normal(size=(4, 4 // options.get("groups", 1), 3, 3)))
    F.conv2d(rng.normal(size=(2, 4, 6, 6)), weight, **options).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_a_parameter_lands_in_the_flat_buffer(case):
    inputs, _, _ = case.arguments("float64")
    tensors = [Tensor(a, requires_grad=True) for a in inputs]
    parameters = [Parameter(a) for a in inputs]
    buffer = FlatBuffer(parameters)
    buffer.message[:] = np.nan  # what a past step left there must not matter
    value = case.run(parameters)
    case.run(tensors).backward(seed := cotangent(value.shape, "float64"))
    gradients = value.node.vjp(seed, [p.gradient_target() for p in parameters])
    for parameter, gradient in zip(parameters[1:], gradients[1:], strict=True):
        assert gradient is parameter.gradient_target()  # written there, not copied there afterwards
    value.backward(seed)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        np.testing.assert_array_equal(parameter.grad, tensor.grad)
        assert parameter.grad.size == 0 or np.shares_memory(parameter.grad, buffer.message)


def test_a_gradient_in_either_memory_order_or_broadcast_gives_the_same(rng):
    x, weight = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(6, 3, 3, 3))
    seed = rng.normal(size=(2, 6, 5, 4))
    for grad in (seed, channels_last(seed), np.broadcast_to(np.float64(0.5), seed.shape)):
        found = F.conv2d(Tensor(x, True), Tensor(weight, True), padding=1).node.vjp(grad, [None, None])
        plain = F.conv2d(Tensor(x, True), Tensor(weight, True), padding=1).node.vjp(grad.copy(order="C"), [None, None])
        for a, b in zip(found, plain, strict=True):
            np.testing.assert_array_equal(a, b)


def test_memory_stays_channels_last_from_layer_to_layer(rng):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AvgPool2d(2)
    )
    x = rng.normal(size=(2, 1, 12, 12)).astype(np.float32)
    for module in model:
        x = module(x)
        assert x.data.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize(
    ("shape", "weight", "options"),
    [
        ((32, 16, 32, 32), (16, 16, 5, 5), {"padding": 2}),
        ((96, 16, 32, 32), (16, 16, 5, 5), {"stride": 2}),
        ((1, 16, 180, 180), (16, 16, 5, 5), {"padding": 2}),
        ((96, 1, 60, 60), (8, 1, 9, 9), {}),
    ],
)
def test_the_whole_im2col_matrix_is_never_held(shape, weight, options, rng):
    x = Tensor(rng.normal(size=shape).astype(np.float32), requires_grad=True)
    w = Parameter(rng.normal(size=weight).astype(np.float32))
    value = F.conv2d(x, w, **options)  # and once before, for whatever is made once
    matrix = value.data.nbytes // weight[0] * w.data[0].size
    assert matrix > 25e6
    seed = np.ones_like(value.data)
    tracemalloc.start()
    value = F.conv2d(x, w, **options)
    value.backward(seed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    needed = value.data.nbytes + 2 * x.data.nbytes + w.data.nbytes  # y; dx, and its copy in the leaf's grad
    assert peak < needed + 8e6


# What they take besides, in arrays of the size of x and of y: nothing where all groups are in one product; where each
# group is a convolution of its own, its pixels and its results, which are joined in the end; and where each channel
# has several kernels, the channel for each of them.
IN_ONE, EACH_ITS_OWN, FOUR_KERNELS = (0, 0), (1, 1), (4, 0)


@pytest.mark.parametrize(
    ("function", "shape", "weight", "options", "besides"),
    [
        (F.conv2d, (32, 16, 32, 32), (16, 8, 5, 5), {"padding": 2, "groups": 2}, IN_ONE),
        (F.conv2d, (96, 16, 32, 32), (16, 8, 5, 5), {"stride": 2, "groups": 2}, EACH_ITS_OWN),
        (F.conv2d, (64, 16, 32, 32), (16, 4, 5, 5), {"padding": 2, "groups": 4}, EACH_ITS_OWN),
        (F.conv2d, (32, 16, 32, 32), (16, 1, 5, 5), {"padding": 2, "groups": 16}, IN_ONE),
        (F.conv2d, (96, 16, 32, 32), (16, 1, 5, 5), {"stride": 2, "groups": 16}, IN_ONE),
        (F.conv2d, (32, 16, 32, 32), (64, 1, 5, 5), {"padding": 2, "groups": 16}, FOUR_KERNELS),
        (F.conv_transpose2d, (32, 16, 32, 32), (16, 16, 5, 5), {"padding": 2}, IN_ONE),
        (F.conv_transpose2d, (32, 16, 32, 32), (16, 16, 5, 5), {"stride": 2}, IN_ONE),
        (F.conv_transpose2d, (32, 16, 32, 32), (16, 16, 4, 4), {"stride": 2, "padding": 1}, IN_ONE),
        (F.conv_transpose2d, (32, 16, 32, 32), (16, 8, 5, 5), {"padding": 2, "groups": 2}, IN_ONE),
        (F.conv_transpose2d, (32, 16, 32, 32), (16, 4, 5, 5), {"stride": 2, "groups": 4}, EACH_ITS_OWN),
        (F.conv_transpose2d, (32, 16, 32, 32), (16, 1, 5, 5), {"stride": 2, "groups": 16}, IN_ONE),
    ],
)
def test_nor_is_that_of_groups_and_of_transposed_convolutions(function, shape, weight, options, besides, rng):
    x = Tensor(rng.normal(size=shape).astype(np.float32), requires_grad=True)
    w = Parameter(rng.normal(size=weight).astype(np.float32))
    value = function(x, w, **options)
    windows = value.data[:, 0] if function is F.conv2d else x.data[:, 0]  # a number for each
    matrix = windows.nbytes * w.data[0].size * options.get("groups", 1)
    more = 8e6 + besides[0] * x.data.nbytes + besides[1] * value.data.nbytes
    limit = value.data.nbytes + 2 * x.data.nbytes + w.data.nbytes + more  # y; dx, and its copy in the leaf's grad
    assert limit < value.data.nbytes + matrix
    seed = np.ones_like(value.data)
    tracemalloc.start()
    value = function(x, w, **options)
    value.backward(seed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize(
    ("shape", "weight", "options"),
    [
        ((1, 8, 100_000), (8, 8, 9), {"padding": 4}),
        ((2, 32, 40_000), (16, 32, 25), {"stride": 2, "dilation": 3}),
        ((1, 8, 100_000), (8, 4, 9), {"groups": 2}),
        ((1, 8, 200_000), (8, 1, 9), {"groups": 8, "padding": "same"}),
    ],
)
def test_nor_is_that_of_a_long_sequence(shape, weight, options, torch, rng):
    x = Tensor(rng.normal(size=shape).astype(np.float32), requires_grad=True)
    w, b = (Parameter(rng.normal(size=s).astype(np.float32)) for s in (weight, weight[0]))
    value = F.conv1d(x, w, b, **options)
    matrix = value.data.nbytes // weight[0] * w.data[0].size * options.get("groups", 1)
    seed = rng.normal(size=value.shape).astype(np.float32)
    tracemalloc.start()
    value = F.conv1d(x, w, b, **options)
    value.backward(seed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < value.data.nbytes + 4 * x.data.nbytes + 8e6  # y; x and g in another order, dx and its copy
    assert matrix > 20e6
    theirs = [torch.tensor(a.data, requires_grad=True) for a in (x, w, b)]
    expected = torch.nn.functional.conv1d(*theirs, **options)
    expected.backward(torch.tensor(seed))
    assert_close(value.data, expected.detach().numpy(), 1e-5)
    for our, their in zip((x, w, b), theirs, strict=True):
        assert_close(our.grad, their.grad.numpy(), 1e-5)  # sums of up to 200,000 products in another order


def test_one_tensor_as_image_and_kernel(rng):
    check_grads(lambda a: F.conv2d(a, a, padding=1), rng.normal(size=(2, 2, 3, 3)), atol=1e-7)


def test_the_geometry_is_checked_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(groups, "correlate", None)
    monkeypatch.setattr(groups, "input_gradient", None)
    for shapes, options, error, message in WRONG:
        with pytest.raises(error, match=message):
            F.conv2d(*(np.zeros(s) for s in shapes), **options)


IMAGE, KERNEL = (2, 4, 5, 6), (8, 4, 3, 3)
WRONG = [
    (((4, 5, 6), KERNEL), {}, ValueError, r"got x of shape \(4, 5, 6\); it must be \(batch, 4, height, width\)"),
    (
        ((2, 3, 5, 6), KERNEL),
        {},
        ValueError,
        r"weight of shape \(8, 4, 3, 3\).* x of shape \(2, 3, 5, 6\); .*batch, 4,",
    ),
    ((IMAGE, (8, 4, 3)), {}, ValueError, r"weight of shape \(out, channels/groups, .*; got \(8, 4, 3\)"),
    ((IMAGE, (8, 4, 0, 3)), {}, ValueError, r"none of them 0; got \(8, 4, 0, 3\)"),
    ((IMAGE, (8, 4, 6, 3)), {}, ValueError, r"x of shape \(2, 4, 5, 6\).* 5 by 6, less than the 6 by 3 of the kernel"),
    ((IMAGE, KERNEL), {"dilation": 3}, ValueError, r"less than the 7 by 7 of the kernel \(3, 3\) with dilation 3"),
    (((2, 4, 0, 6), KERNEL), {"padding": 1}, ValueError, r"x of shape \(2, 4, 0, 6\), which has no pixels"),
    (((2, 4, 0, 6), KERNEL), {"padding": 2}, ValueError, r"x of shape \(2, 4, 0, 6\), which has no pixels"),
    (((2, 4, 5, 0), KERNEL), {"padding": "same"}, ValueError, r"x of shape \(2, 4, 5, 0\), which has no pixels"),
    ((IMAGE, KERNEL, (7,)), {}, ValueError, r"8 output channels got a bias of shape \(7,\)"),
    ((IMAGE, KERNEL, (1,)), {}, ValueError, r"8 output channels got a bias of shape \(1,\)"),
    ((IMAGE, (8, 2, 3, 3)), {"groups": 3}, ValueError, r"groups=3, which does not divide 8"),
    ((IMAGE, (9, 2, 3, 3)), {"groups": 3}, ValueError, r"groups=3 got x of shape .*; it must be \(batch, 6, "),
    ((IMAGE, KERNEL), {"groups": 0}, ValueError, r"groups=0"),
    ((IMAGE, KERNEL), {"stride": 0}, ValueError, r"stride must be one integer or two, 1 or more, got 0"),
    ((IMAGE, KERNEL), {"stride": (1, -1)}, ValueError, r"stride must be .* got \(1, -1\)"),
    ((IMAGE, KERNEL), {"dilation": 0}, ValueError, r"dilation must be .* got 0"),
    ((IMAGE, KERNEL), {"padding": -1}, ValueError, r"padding must be one integer or two, 0 or more, got -1"),
    ((IMAGE, KERNEL), {"padding": (1, 1, 1)}, ValueError, r"padding must be .* got \(1, 1, 1\)"),
    ((IMAGE, KERNEL), {"padding": "full"}, ValueError, r'"same" or "valid", got \'full\''),
    ((IMAGE, KERNEL), {"padding": "same", "stride": 2}, ValueError, r'padding "same" needs stride 1, got 2'),
    ((IMAGE, KERNEL), {"stride": 1.5}, TypeError, r"stride must be one integer or two, got 1.5"),
    ((IMAGE, KERNEL), {"stride": "2"}, TypeError, r"stride must be one integer or two, got '2'"),
]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 5, 6), (4, 2, 3, 3)), {}, r"x of shape \(2, 3, 5, 6\); it must be \(batch, 4, height, width\)"),
        (((2, 4, 5), (4, 2, 3, 3)), {}, r"x of shape \(2, 4, 5\)"),
        (((2, 4, 5, 6), (4, 2, 3, 3), (3,)), {}, r"2 output channels got a bias of shape \(3,\)"),
        (((2, 4, 5, 6), (4, 2, 3, 3)), {"groups": 3}, r"groups=3, which does not divide 4"),
        (((2, 4, 5, 6), (4, 2, 3, 3)), {"output_padding": 1}, r"output_padding must be less than stride or dilation"),
        (((2, 4, 5, 6), (4, 2, 3, 3)), {"padding": 4}, r"the result would be -1 by 0 pixels"),
        (((2, 4, 0, 6), (4, 2, 3, 3)), {}, r"x of shape \(2, 4, 0, 6\)"),
        (((2, 4, 5, 6), (4, 2, 3, 3)), {"output_padding": -1}, r"output_padding must be .* 0 or more, got -1"),
    ],
)
def test_conv_transpose2d_says_what_is_wrong(shapes, options, message):
    with pytest.raises(ValueError, match=f"conv_transpose2d.*{message}"):
        F.conv_transpose2d(*(np.zeros(s) for s in shapes), **options)


def test_conv1d_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"conv1d .*x of shape \(2, 3, 5, 6\); it must be \(batch, 3, length\)"):
        F.conv1d(np.zeros((2, 3, 5, 6)), np.zeros((4, 3, 2)))
    with pytest.raises(ValueError, match=r"conv1d: stride must be one integer, 1 or more, got \(1, 2\)"):
        F.conv1d(np.zeros((2, 3, 5)), np.zeros((4, 3, 2)), stride=(1, 2))
    message = r"x of shape \(2, 3, 5\); with padding 1 that is 7, less than the 9 of the kernel 5 with dilation 2"
    with pytest.raises(ValueError, match=message):
        F.conv1d(np.zeros((2, 3, 5)), np.zeros((4, 3, 5)), padding=1, dilation=2)
    with pytest.raises(ValueError, match=r"conv1d got x of shape \(2, 3, 0\), which has no pixels"):
        F.conv1d(np.zeros((2, 3, 0)), np.zeros((4, 3, 2)), padding=2)


@pytest.mark.parametrize("padding", [2, "same"])
@pytest.mark.parametrize("shape", [(2, 4, 0, 6), (2, 4, 5, 0), (2, 4, 0)], ids=str)
def test_images_without_pixels_are_refused_as_by_pytorch(shape, padding, torch):
    name = f"conv{len(shape) - 2}d"
    arguments = np.zeros(shape), np.zeros((8, 4, 3, 3)[: len(shape)])
    with pytest.raises(RuntimeError):
        getattr(torch.nn.functional, name)(*map(torch.tensor, arguments), padding=padding)
    with pytest.raises(ValueError, match=f"{name} got x of shape .*, which has no pixels"):
        getattr(F, name)(*arguments, padding=padding)


@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_dtypes_must_be_one_and_floating(function):
    x, weight = np.zeros((2, 4, 5, 5)), np.zeros((4, 4, 3, 3))
    with pytest.raises(
        TypeError, match=rf"{function.__name__} needs one floating-point dtype, got x float64, weight fl"
    ):
        function(x, weight.astype(np.float32))
    with pytest.raises(TypeError, match="bias float32"):
        function(x, weight, np.zeros(4, np.float32))
    with pytest.raises(TypeError, match=rf"{function.__name__} .*floating"):
        function(x.astype(int), weight.astype(int))


# layers

LAYERS = [
    ("Conv2d", (3, 8, 3), {}, (2, 3, 6, 5)),
    ("Conv2d", (4, 8, (3, 2), 2, (1, 0), 1, 2, False), {}, (2, 4, 6, 5)),
    ("Conv2d", (4, 4, 3), {"groups": 4, "padding": "same", "dilation": 2}, (2, 4, 6, 5)),
    ("Conv1d", (3, 8, 3), {}, (2, 3, 6)),
    ("Conv1d", (4, 8, (3,)), {"stride": 2, "padding": 1, "groups": 2, "bias": False}, (2, 4, 6)),
    ("Conv1d", (4, 8, 3), {"padding": "same"}, (2, 4, 6)),
    ("Conv2d", (4, 4, 3, 2, (2, 1), 1, 2, False, "reflect"), {}, (2, 4, 6, 5)),
    ("Conv2d", (4, 4, (2, 4)), {"padding": "same", "dilation": (2, 1), "padding_mode": "replicate"}, (2, 4, 6, 5)),
    ("Conv2d", (4, 4, 3), {"padding": (1, 2), "padding_mode": "circular"}, (2, 4, 6, 5)),
    ("Conv2d", (4, 4, 3), {"padding": "valid", "padding_mode": "circular"}, (2, 4, 6, 5)),
    ("Conv1d", (4, 8, 4), {"padding": "same", "padding_mode": "reflect"}, (2, 4, 6)),
    ("Conv1d", (4, 8, 3), {"padding": 2, "padding_mode": "circular", "stride": 2}, (2, 4, 6)),
    ("ConvTranspose2d", (3, 8, 3), {}, (2, 3, 6, 5)),
    ("ConvTranspose2d", (4, 8, (3, 2), 2, 1, 1, 2, False), {}, (2, 4, 6, 5)),
]


@pytest.mark.parametrize(("name", "arguments", "options", "shape"), LAYERS)
def test_layers_have_pytorchs_parameters_outputs_and_gradients(name, arguments, options, shape, torch, rng):
    ours, theirs = getattr(nn, name)(*arguments, **options), getattr(torch.nn, name)(*arguments, **options)
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    ours.load_state_dict(state)
    x = rng.normal(size=shape).astype(np.float32)
    y, expected = ours(x), theirs(torch.tensor(x))
    assert_close(y.data, expected.detach().numpy(), TOLERANCE["float32"])
    grad = rng.normal(size=y.shape).astype(np.float32)
    y.backward(grad)
    expected.backward(torch.tensor(grad))
    assert_close(ours.weight.grad, theirs.weight.grad.numpy(), TOLERANCE["float32"])
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (lambda: nn.Conv2d(6, 400, (3, 5), groups=2), 45),
        (lambda: nn.Conv1d(6, 400, 3), 18),
        (lambda: nn.ConvTranspose2d(400, 50, 3, groups=2), 225),  # PyTorch's fan_in: out/groups × kernel
    ],
)
def test_first_weights_are_uniform_on_one_over_the_root_of_fan_in(layer, fan_in, torch):
    made, bound = layer(), 1 / np.sqrt(fan_in)
    for values in (made.weight.data, made.bias.data):
        assert values.dtype == np.float32
        assert 0.9 * bound < abs(values).max() <= bound * (1 + 1e-6)
        assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.2)
    theirs = getattr(torch.nn, type(made).__name__)(
        made.in_channels, made.out_channels, made.kernel_size, groups=made.groups
    )
    assert abs(made.weight.data).max() == pytest.approx(theirs.weight.abs().max().item(), rel=0.02)


def test_a_layer_says_the_shape_it_got_and_the_shape_it_wants():
    with pytest.raises(
        ValueError,
        match=r"Conv2d\(3, 8, kernel_size=\(3, 3\), stride=\(1, 1\)\) got x of shape \(2, 4, 9, 9\); "
        r"it must be \(batch, 3, height, width\)",
    ):
        nn.Conv2d(3, 8, 3)(np.zeros((2, 4, 9, 9), np.float32))
    with pytest.raises(ValueError, match=r"Conv1d\(3, 8.* got x of shape \(2, 9, 3\); it must be \(batch, 3, length\)"):
        nn.Conv1d(3, 8, 3)(np.zeros((2, 9, 3), np.float32))
    with pytest.raises(ValueError, match=r"ConvTranspose2d\(3, 8.* got x of shape \(3, 9, 9\); it must be \(batch, 3,"):
        nn.ConvTranspose2d(3, 8, 3)(np.zeros((3, 9, 9), np.float32))
    with pytest.raises(ValueError, match=r"x of shape \(1, 3, 2, 9\).* less than the 3 by 3 of the kernel"):
        nn.Conv2d(3, 8, 3)(np.zeros((1, 3, 2, 9), np.float32))


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_layers_refuse_what_can_never_work(layer):
    for arguments, message in [
        ({"groups": 2}, "in_channels=3, out_channels=8, groups=2"),
        ({"groups": 0}, "groups=0"),
        ({"stride": 0}, "stride must be one integer"),
        ({"dilation": 0}, "dilation must be"),
        ({"padding": -1}, "padding must be"),
        ({"kernel_size": 0}, "kernel_size must be"),
        ({"out_channels": 0}, "out_channels=0"),
    ]:
        with pytest.raises(ValueError, match=f"{layer.__name__}.*{message}"):
            layer(**{"in_channels": 3, "out_channels": 8, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d])
def test_layers_refuse_paddings_that_are_not_known(layer):
    with pytest.raises(ValueError, match='padding must be integers, "same" or "valid", got \'full\''):
        layer(3, 8, 3, padding="full")
    with pytest.raises(ValueError, match='padding "same" needs stride 1'):
        layer(3, 8, 3, padding="same", stride=2)
    with pytest.raises(ValueError, match=r"padding_mode must be zeros, reflect, replicate or circular, got 'constant'"):
        layer(3, 8, 3, padding_mode="constant")
    with pytest.raises(ValueError, match="needs 7 entries to copy"):
        layer(3, 8, 3, padding=7, padding_mode="reflect")(
            np.zeros((1, 3, 7, 7)[: 3 if layer is nn.Conv1d else 4], np.float32)
        )


def test_a_transposed_convolution_pads_with_zeros_only():
    with pytest.raises(ValueError, match="padding_mode can only be \"zeros\", got 'reflect'"):
        nn.ConvTranspose2d(3, 8, 3, padding_mode="reflect")


def test_a_layer_in_float64():
    layer = nn.Conv2d(1, 2, 3, dtype=np.float64)
    assert layer(np.zeros((1, 1, 3, 3))).dtype == np.float64


def test_numbers_of_channels_and_groups_that_are_no_integers_are_refused():
    image, kernel = np.ones((1, 4, 5, 5)), np.ones((4, 2, 3, 3))
    for operation in (F.conv2d, F.conv_transpose2d):
        with pytest.raises(TypeError, match=rf"{operation.__name__}: groups must be an integer, got 2\.0"):
            operation(image, kernel, groups=2.0)
    with pytest.raises(TypeError, match=r"Conv2d: in_channels must be an integer, got 4\.0"):
        nn.Conv2d(4.0, 4, 3)
    with pytest.raises(TypeError, match=r"ConvTranspose2d: out_channels must be an integer, got None"):
        nn.ConvTranspose2d(4, None, 3)
