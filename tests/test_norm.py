"""Normalising operations and layers; those of all ranks together are in norm_suite.py."""

import copy
import sys

import numpy as np
import pytest

import norm_suite
import test_functional as table
from distprop import functional as F
from distprop import nn, no_grad
from distprop.comm import SoloCommunicator, run_threads
from distprop.parallel import DataParallel
from distprop.tape import take_part
from distprop.tensor import Tensor, as_tensor, record
from scenario import run
from test_functional import Operation


def batch_norm(x, weight=None, bias=None, **options):
    return F.batch_norm(x, None, None, weight, bias, True, **options)


def torch_batch_norm(torch, x, weight=None, bias=None, **options):
    return torch.nn.functional.batch_norm(x, None, None, weight, bias, True, **options)


def estimates(rng, x, *rest):
    return rng.normal(size=x.shape[1]), rng.uniform(0.5, 2, x.shape[1])


def layer_norm(x, *parameters, shape, **options):
    return F.layer_norm(x, shape, *parameters, **options)


def torch_layer_norm(torch, x, *parameters, shape, **options):
    return torch.nn.functional.layer_norm(x, shape if isinstance(shape, tuple) else (shape,), *parameters, **options)


def rms_norm(x, *parameters, shape, **options):
    return F.rms_norm(x, shape, *parameters, **options)


def torch_rms_norm(torch, x, *parameters, shape, **options):
    return torch.nn.functional.rms_norm(x, shape if isinstance(shape, tuple) else (shape,), *parameters, **options)


def group_norm(x, *parameters, groups, **options):
    return F.group_norm(x, groups, *parameters, **options)


def torch_group_norm(torch, x, *parameters, groups, **options):
    return torch.nn.functional.group_norm(x, groups, *parameters, **options)


def channels_last(function):
    """The operation on an image whose memory holds the channels last."""
    return lambda x, *rest, **options: function(as_tensor(x).permute(0, 3, 1, 2), *rest, **options)


CHANNELS = [((5, 3), (3,), (3,)), ((2, 3, 4), (3,), (3,)), ((2, 3, 2, 2), (3,), (3,)), ((3, 1, 1, 1), (1,), (1,))]
LARGE = [((2, 2, 16, 17), (2,), (2,))]  # more pixels than the pattern of all channels is made for
LAST = [((2, 2, 2, 3), (3,), (3,)), ((3, 1, 1, 2), (2,), (2,)), ((2, 3, 1, 1), (1,), (1,))]
NOTHING = [((0, 3), (3,), (3,)), ((0, 3, 2, 2), (3,), (3,))]
ROWS = [((5, 4), (4,), (4,)), ((2, 3, 4), (4,), (4,)), ((4,), (4,), (4,)), ((0, 4), (4,), (4,))]
GROUPED = [((3, 8), (8,), (8,)), ((2, 8, 5), (8,), (8,)), ((2, 8, 2, 3), (8,), (8,)), ((0, 8, 2), (8,), (8,))]
EPS = [{}, {"eps": 0.3}]

OPERATIONS = [
    Operation(batch_norm, CHANNELS, EPS, name="batch_norm", torch=torch_batch_norm),
    Operation(batch_norm, [shapes[:1] for shapes in CHANNELS], name="batch_norm bare", torch=torch_batch_norm),
    Operation(batch_norm, NOTHING, name="batch_norm of nothing", torch=None),
    Operation(
        channels_last(batch_norm),
        LAST,
        EPS,
        name="batch_norm channels last",
        torch=lambda torch, x, *rest, **o: torch_batch_norm(torch, x.permute(0, 3, 1, 2), *rest, **o),
    ),
    Operation(
        lambda x, w, b, mean, var, **o: F.batch_norm(x, mean, var, w, b, **o),
        [*CHANNELS, *NOTHING],
        EPS,
        name="batch_norm with estimates",
        torch=lambda torch, x, w, b, mean, var, **o: torch.nn.functional.batch_norm(x, mean, var, w, b, **o),
        constants=estimates,
    ),
    Operation(
        lambda x, b: F.batch_norm(x, None, None, None, b, True),
        [((5, 3), (3,))],
        name="batch_norm with a bias only",
        torch=lambda torch, x, b: torch.nn.functional.batch_norm(x, None, None, None, b, True),
    ),
    Operation(layer_norm, ROWS, [{"shape": 4}, {"shape": (4,), "eps": 0.2}], name="layer_norm", torch=torch_layer_norm),
    Operation(
        layer_norm, [((5, 2, 3), (2, 3), (2, 3))], [{"shape": (2, 3)}], name="layer_norm axes", torch=torch_layer_norm
    ),
    Operation(layer_norm, [((5, 4),), ((5, 4), (4,))], [{"shape": 4}], name="layer_norm less", torch=torch_layer_norm),
    Operation(
        lambda x, b: F.layer_norm(x, 4, None, b),
        [((5, 4), (4,))],
        name="layer_norm with a bias only",
        torch=lambda torch, x, b: torch.nn.functional.layer_norm(x, (4,), None, b),
    ),
    Operation(
        rms_norm, [s[:2] for s in ROWS], [{"shape": 4}, {"shape": 4, "eps": 0.2}], name="rms_norm", torch=torch_rms_norm
    ),
    Operation(rms_norm, [((5, 2, 3),)], [{"shape": (2, 3)}, {"shape": 3}], name="rms_norm bare", torch=torch_rms_norm),
    Operation(
        group_norm,
        GROUPED,
        [{"groups": 2}, {"groups": 1}, {"groups": 4, "eps": 0.2}],
        name="group_norm",
        torch=torch_group_norm,
    ),
    Operation(group_norm, [((2, 8, 0), (8,), (8,))], [{"groups": 2}], name="group_norm of nothing", torch=None),
    Operation(group_norm, [((2, 6, 3),)], [{"groups": 3}], name="group_norm bare", torch=torch_group_norm),
    Operation(
        channels_last(group_norm),
        [((2, 2, 3, 4), (4,), (4,))],
        [{"groups": 2}],
        name="group_norm channels last",
        torch=lambda torch, x, *rest, **o: torch_group_norm(torch, x.permute(0, 3, 1, 2), *rest, **o),
    ),
]
CASES = [table.Case(o, shapes, options) for o in OPERATIONS for shapes in o.shapes for options in o.options]


@pytest.fixture(params=[None, 8], ids=["", "block by block"])
def block(request, monkeypatch):
    """The whole at once, and in blocks of a few numbers."""
    if request.param is not None:
        for name in ("norm", "group_norm", "batch_norm"):
            monkeypatch.setattr(sys.modules[f"distprop.functional.{name}"], "_BLOCK", request.param)


# Too many numbers for finite differences: each difference is lost in the rounding of the others' sum.
LARGE_CASES = [
    table.Case(Operation(batch_norm, LARGE, name="batch_norm", torch=torch_batch_norm), LARGE[0], {}),
    table.Case(Operation(group_norm, LARGE, name="group_norm", torch=torch_group_norm), LARGE[0], {"groups": 2}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", table.CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
def test_operation(check, case, block):
    check(case)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", [c for c in [*CASES, *LARGE_CASES] if c.operation.torch is not None], ids=str)
def test_values_and_gradients_agree_with_pytorch(case, dtype, torch, block):
    table.test_values_and_gradients_agree_with_pytorch(case, dtype, torch)


# batch norm


@pytest.mark.parametrize(("scenario", "size"), norm_suite.suite.in_threads((1, 2, 3, 5)))
def test_synchronised_batch_norm(scenario, size):
    run(scenario, size)


@pytest.mark.parametrize("channels_are_last", [False, True])
def test_the_memory_layout_is_kept(channels_are_last, rng):
    shape = (3, 6, 7, 5) if channels_are_last else (3, 5, 6, 7)
    x = rng.normal(size=shape)
    x = np.moveaxis(x, -1, 1) if channels_are_last else x
    tensor = Tensor(x, requires_grad=True)
    value = batch_norm(tensor, np.ones(5), np.zeros(5))
    gradient = value.node.vjp(np.ascontiguousarray(rng.normal(size=(3, 5, 6, 7))), [None] * 3)[0]
    for array in (value.data, gradient):
        assert array.strides == x.strides


def test_layouts_that_are_neither(rng):
    x = rng.normal(size=(7, 3, 4, 6))
    expected = batch_norm(np.ascontiguousarray(x.transpose(3, 1, 0, 2)))
    np.testing.assert_allclose(batch_norm(x.transpose(3, 1, 0, 2)).data, expected.data, rtol=1e-13)
    for function in (lambda x: F.layer_norm(x, 4), lambda x: F.group_norm(x, 3)):
        view = x[::2, :, :, 1:5].transpose(0, 1, 3, 2)
        np.testing.assert_allclose(function(view).data, function(np.ascontiguousarray(view)).data, rtol=1e-13)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        ("BatchNorm1d", [(4, 3), (5, 3), (2, 3)]),
        ("BatchNorm1d", [(4, 3, 5), (2, 3, 1)]),
        ("BatchNorm2d", [(4, 3, 2, 5), (1, 3, 2, 2)]),
    ],
)
def test_batch_norm_layers_are_pytorchs_over_several_steps_and_in_evaluation(layer, shapes, momentum, torch, rng):
    ours = getattr(nn, layer)(3, eps=1e-3, momentum=momentum).double()
    theirs = getattr(torch.nn, layer)(3, eps=1e-3, momentum=momentum).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.num_batches_tracked.dtype == np.int64
    state = {name: rng.uniform(0.5, 2, value.shape) for name, value in ours.state_dict().items()}
    state["num_batches_tracked"] = np.array(0)
    ours.load_state_dict(state)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    for mode in (True, False):
        ours.train(mode)
        theirs.train(mode)
        for shape in shapes:
            x = rng.normal(2, 3, shape)
            mine, other = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
            value, expected = ours(mine), theirs(other)
            np.testing.assert_allclose(value.data, expected.detach().numpy(), rtol=1e-11, atol=1e-12)
            (value**3).sum().backward()
            (expected**3).sum().backward()
            np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-9, atol=1e-10)
        for (name, found), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-13, err_msg=name)
    assert int(ours.num_batches_tracked) == len(shapes)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"track_running_stats": False}])
def test_what_is_switched_off_has_no_state(options, torch, rng):
    ours, theirs = nn.BatchNorm1d(3, **options), torch.nn.BatchNorm1d(3, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    x = rng.normal(size=(5, 3)).astype(np.float32)
    for mode in (True, False):
        expected = theirs.train(mode)(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(ours.train(mode)(x).data, expected, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_leaves_the_estimates_untouched():
    layer = nn.BatchNorm2d(3)
    before = copy.deepcopy(layer.state_dict())
    x = Tensor(np.empty((0, 3, 2, 2), np.float32), requires_grad=True)
    value = layer(x)
    value.sum().backward()
    assert value.shape == x.grad.shape == (0, 3, 2, 2)
    for name, found in layer.state_dict().items():
        np.testing.assert_array_equal(found, before[name], err_msg=name)
    np.testing.assert_array_equal(layer.weight.grad, np.zeros(3))


@pytest.mark.parametrize("training", [True, False])
def test_images_without_pixels_pass_through_as_in_pytorch(training, torch):
    ours, theirs = nn.BatchNorm2d(3).train(training), torch.nn.BatchNorm2d(3).train(training)
    x = Tensor(np.empty((2, 3, 0, 4), np.float32), requires_grad=True)
    ours(x).sum().backward()
    theirs(torch.empty(x.shape)).sum().backward()
    assert x.grad.shape == x.shape
    np.testing.assert_array_equal(ours.weight.grad, theirs.weight.grad.numpy(), strict=True)
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name], value.numpy())


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance():
    """The shift is the mean of the first block; here it is far from that of the others, too."""
    x = np.random.default_rng(0).normal(size=(40_000, 3)) + 3000
    x[: len(x) // 2] -= 1000
    layer = nn.BatchNorm1d(3, momentum=1.0)
    layer(x.astype(np.float32))
    exact = x.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(layer.running_var, exact.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(layer.running_mean, exact.mean(0), rtol=1e-6)


@pytest.mark.parametrize("mean", [0, 2, 2000])
@pytest.mark.parametrize(
    "function", [lambda x, w, b: F.layer_norm(x, 300, w, b), lambda x, w, b: F.group_norm(x, 60, w, b)]
)
def test_a_row_far_from_zero_costs_no_digits(function, mean, rng):
    """Values and gradients to a few roundings, whatever the mean: what float32 holds of x is all that counts."""
    x, w, b, g = (
        rng.normal(size=(64, 300)) + mean,
        rng.normal(size=300),
        rng.normal(size=300),
        rng.normal(size=(64, 300)),
    )
    single = [Tensor(a.astype(np.float32), requires_grad=True) for a in (x, w, b)]
    double = [Tensor(a.data.astype(np.float64), requires_grad=True) for a in single]
    values = [function(*tensors) for tensors in (single, double)]
    for value in values:
        value.backward(g)
    for found, expected in [(v.data, e.data) for v, e in [values]] + [
        (s.grad, d.grad) for s, d in zip(single, double, strict=True)
    ]:
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * abs(expected).max())


@pytest.mark.parametrize(
    "function", [lambda x: F.layer_norm(x, 40), lambda x: F.rms_norm(x, 40), lambda x: F.group_norm(x, 4)]
)
def test_a_row_depends_on_no_other_row(function, block, rng):
    """One row whose mean is far from zero, which is treated differently, leaves the bits of its neighbours alone."""
    x, g = rng.normal(size=(9, 40)).astype(np.float32), rng.normal(size=(9, 40)).astype(np.float32)
    other = x.copy()
    other[4] += 1000
    results = []
    for data in (x, other):
        tensor = Tensor(data, requires_grad=True)
        value = function(tensor)
        value.backward(g)
        results.append(np.delete(np.stack([value.data, tensor.grad]), 4, axis=1))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: batch_norm(np.ones(3)), ValueError, r"\(batch, channels, ...\), got \(3,\)"),
        (
            lambda: batch_norm(np.ones((4, 3)), np.ones(4)),
            ValueError,
            r"weight of shape \(4,\).*each of the 3 channels",
        ),
        (lambda: batch_norm(np.ones((4, 3)), bias=np.ones((3, 1))), ValueError, r"bias of shape \(3, 1\)"),
        (lambda: batch_norm(np.ones((4, 3)), np.ones(3, "f")), TypeError, "x float64, weight float32"),
        (lambda: F.batch_norm(np.ones((4, 3)), None, None), ValueError, "needs running_mean and running_var"),
        (lambda: F.batch_norm(np.ones((4, 3)), np.ones(3), None), ValueError, "both running_mean and running_var"),
        (lambda: F.batch_norm(np.ones((4, 3)), np.ones(3), np.ones(2)), ValueError, r"running_var of shape \(2,\)"),
        (lambda: F.batch_norm(np.ones((4, 3), int), None, None, training=True), TypeError, "batch_norm .*floating"),
        (
            lambda: nn.BatchNorm1d(3)(np.ones((4, 3, 2, 2))),
            ValueError,
            r"BatchNorm1d\(3\) got x of shape \(4, 3, 2, 2\)",
        ),
        (lambda: nn.BatchNorm1d(3)(np.ones((4, 2))), ValueError, r"\(batch, channels\) or .* with 3 channels"),
        (
            lambda: nn.BatchNorm2d(3)(np.ones((4, 3))),
            ValueError,
            r"BatchNorm2d\(3\).*\(batch, channels, height, width\)",
        ),
        (lambda: nn.BatchNorm2d(0), ValueError, "at least one channel, got 0"),
        (lambda: nn.BatchNorm1d(3, eps="a"), TypeError, "BatchNorm1d: eps must be a number, got 'a'"),
        (lambda: nn.SyncBatchNorm(3, momentum="a"), TypeError, "SyncBatchNorm: momentum must be a number, got 'a'"),
        (lambda: nn.LayerNorm(3, "a"), TypeError, "LayerNorm: eps must be a number, got 'a'"),
        (lambda: nn.RMSNorm(3, "a"), TypeError, "RMSNorm: eps must be a number, got 'a'"),
        (lambda: nn.GroupNorm(1, 3, None), TypeError, "GroupNorm: eps must be a number, got None"),
        (lambda: nn.SyncBatchNorm(3)(np.ones(3)), ValueError, r"SyncBatchNorm\(3\) got x of shape \(3,\)"),
        (lambda: F.layer_norm(np.ones((4, 3)), 4), ValueError, r"axes \(4,\) got x of shape \(4, 3\); it must end in"),
        (lambda: F.layer_norm(np.ones((4, 3)), ()), ValueError, r"axes \(\)"),
        (
            lambda: F.layer_norm(np.ones((4, 3)), 3, np.ones(4)),
            ValueError,
            r"weight of shape \(4,\); it must be \(3,\)",
        ),
        (lambda: F.layer_norm(np.ones((4, 3)), 3, np.ones(3, "f")), TypeError, "x float64, weight float32"),
        (lambda: F.layer_norm(np.ones((4, 3), int), 3), TypeError, "layer_norm .*floating"),
        (lambda: F.rms_norm(np.ones((4, 3)), (4, 4)), ValueError, r"rms_norm over the last axes \(4, 4\)"),
        (
            lambda: nn.LayerNorm(4)(np.ones((2, 3), "f")),
            ValueError,
            r"layer_norm over .*\(4,\) got x of shape \(2, 3\)",
        ),
        (lambda: nn.LayerNorm(()), ValueError, r"LayerNorm needs axes of at least one entry each, got \(\)"),
        (lambda: nn.RMSNorm((2, 0)), ValueError, r"RMSNorm needs axes .* got \(2, 0\)"),
        (lambda: F.group_norm(np.ones((2, 6)), 4), ValueError, "got 6 channels; 4 groups do not divide them"),
        (lambda: F.group_norm(np.ones((2, 6)), 0), ValueError, "0 groups do not divide"),
        (lambda: F.group_norm(np.ones(6), 2), ValueError, r"got \(6,\)"),
        (
            lambda: F.group_norm(np.ones((2, 6)), 2, np.ones(2)),
            ValueError,
            r"weight of shape \(2,\); it must be \(6,\)",
        ),
        (lambda: nn.GroupNorm(4, 6), ValueError, r"groups that divide the channels, got \(4, 6\)"),
        (lambda: nn.GroupNorm(2, 6)(np.ones((2, 4), "f")), ValueError, r"GroupNorm\(2, 6\) got x of shape \(2, 4\)"),
    ],
)
def test_what_is_wrong_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_single_value_a_channel_becomes_the_bias_and_leaves_the_estimates():
    """A rank's share of the last batch may be one example; PyTorch raises."""
    layer = nn.BatchNorm1d(3)
    layer.bias.data = np.array([1, 2, 3], np.float32)
    x = Tensor(np.full((1, 3), 9, np.float32), requires_grad=True)
    y = layer(x)
    y.backward(np.array([[1.0, -2.0, 0.5]]))
    np.testing.assert_array_equal(y.data, [[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(x.grad, np.zeros((1, 3)))
    np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))


@pytest.mark.parametrize(
    ("name", "arguments", "options", "shape"),
    [
        ("LayerNorm", (4,), {}, (3, 4)),
        ("LayerNorm", ((2, 4),), {"eps": 0.1}, (3, 2, 4)),
        ("LayerNorm", (4,), {"elementwise_affine": False}, (3, 4)),
        ("LayerNorm", (4,), {"bias": False}, (3, 4)),
        ("RMSNorm", (4,), {}, (3, 4)),
        ("RMSNorm", ([2, 4],), {"eps": 0.1}, (3, 2, 4)),
        ("RMSNorm", (4,), {"elementwise_affine": False}, (3, 4)),
        ("GroupNorm", (2, 4), {}, (3, 4, 5)),
        ("GroupNorm", (2, 4), {"affine": False, "eps": 0.1}, (3, 4, 5)),
        ("GroupNorm", (2, 4), {"bias": False}, (3, 4, 5)),
    ],
)
def test_layers_are_pytorchs(name, arguments, options, shape, torch, rng):
    ours, theirs = getattr(nn, name)(*arguments, **options), getattr(torch.nn, name)(*arguments, **options)
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_array_equal(found.data, expected.detach().numpy())
    state = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in ours.state_dict().items()}
    assert list(state) == list(theirs.state_dict())
    ours.load_state_dict(state)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    x = rng.normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(ours(x).data, theirs(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [np.prod((2, 2)), [np.int32(2), np.int64(4)], np.array([2, 4])], ids=repr)
def test_the_axes_to_normalise_may_be_given_as_integers_of_numpy(shape, rng):
    plain = np.array(shape).tolist()
    x = rng.normal(size=(3, 2, 4))
    for layer, function in ((nn.LayerNorm, F.layer_norm), (nn.RMSNorm, F.rms_norm)):
        made, expected = layer(shape, dtype=np.float64), layer(plain, dtype=np.float64)
        assert repr(made) == repr(expected)
        np.testing.assert_array_equal(made(x).data, expected(x).data)
        np.testing.assert_array_equal(function(x, shape).data, function(x, plain).data)
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            layer(2.0)


# synchronised batch norm, apart from what all ranks make together


def test_conversion_keeps_parameters_estimates_and_modes(rng):
    comm = SoloCommunicator()
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4, eps=0.1), nn.Tanh()), nn.BatchNorm1d(4))
    model[1][0].eval()
    x = rng.normal(size=(5, 3)).astype(np.float32)
    model(x)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    expected = model(x).data
    model.load_state_dict(before)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model, comm) is model
    assert [type(layer) for layer in (model[1][0], model[2])] == [nn.SyncBatchNorm] * 2
    assert model[1][0].comm is model[2].comm is comm
    assert [model[1][0].training, model[2].training, model[1][0].eps] == [False, True, 0.1]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(before)
    np.testing.assert_allclose(model(x).data, expected, rtol=1e-6)
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert isinstance(alone, nn.SyncBatchNorm)
    assert alone(np.ones((2, 3, 1, 1), np.float32)).shape == (2, 3, 1, 1)
    assert isinstance(alone.comm, SoloCommunicator)  # world(), from the first use


def test_a_batch_norm_in_two_places_is_converted_to_one():
    shared = nn.BatchNorm1d(3)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(shared, nn.Linear(3, 3), nn.Sequential(shared)))
    assert model[0] is model[2][0]
    assert isinstance(model[0], nn.SyncBatchNorm)
    assert len(list(model.buffers())) == len(list(shared.buffers()))


def test_a_copy_talks_to_the_same_ranks():
    def copied(comm):
        layer = nn.Sequential(nn.SyncBatchNorm(2, comm=comm))
        duplicate = copy.deepcopy(layer)
        assert duplicate[0].comm is comm
        assert duplicate[0].weight is not layer[0].weight
        return duplicate(np.full((2, 2), comm.rank, np.float32)).data[0, 0]

    np.testing.assert_allclose(run_threads(2, copied), [-1, 1], rtol=1e-4)


def test_what_the_ranks_exchange_is_small():
    def exchanged(comm):
        counting = norm_suite_counting(comm)
        layer = nn.SyncBatchNorm(2, comm=counting)
        x = Tensor(np.full((2, 2), float(comm.rank)), requires_grad=True)
        layer = layer.double()
        layer(x).sum().backward()
        with no_grad():
            layer(x)
        layer.eval()
        layer(x).sum().backward()
        layer.train()
        layer(x.detach()).sum().backward()  # nothing flows on to x, so nothing needs to be summed
        return counting.calls

    gather, reduce = ("allgather", len("SyncBatchNorm") + 2 + 5 * 8), ("allreduce", 4 * 8)
    assert run_threads(2, exchanged) == [[gather, reduce, gather, gather]] * 2


def norm_suite_counting(comm):
    class Counting:
        rank, size = comm.rank, comm.size

        def __init__(self):
            self.calls = []

        def allgather(self, message):
            self.calls.append(("allgather", len(message)))
            return comm.allgather(message)

        def allreduce(self, array):
            self.calls.append(("allreduce", array.nbytes))
            return comm.allreduce(array)

    return Counting()


def test_shards_of_deterministic_mode_refuse_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(ValueError, match="1 is a SyncBatchNorm, which needs the whole global batch"):
        DataParallel(model, SoloCommunicator(), shards=4)


def test_taking_part_joins_each_collective_once_and_in_the_order_of_the_walk():
    joined = []

    def collective(name, *inputs):
        result = record(sum(x.data for x in inputs), inputs, lambda grad, out: pytest.fail("a derivative was computed"))
        result.node.absent = lambda: joined.append(name)
        return result

    x = Tensor(1.0, requires_grad=True)
    first = collective("first", x)
    left = collective("left", first * 2)
    right = collective("right", first, left)
    collective("elsewhere", x)
    take_part(collective("last", left, right, right).node)
    assert joined == ["last", "right", "left", "first"]
    assert x.grad is None
