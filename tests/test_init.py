"""First weights: ranges and spreads as the formulas say, gains as in PyTorch's table, the same for the same seed."""

import math

import numpy as np
import pytest

from distprop import manual_seed, nn
from distprop.nn import init
from distprop.tensor import Parameter

SHAPE = (300, 200)  # fan_in 200, fan_out 300; 60,000 numbers: a standard deviation is off by 0.3 %, a bound by 1e-4
IMAGE = (30, 20, 5, 5)  # fan_in 500, fan_out 750


def empty(shape, dtype=np.float32):
    return Parameter(np.full(shape, np.nan, dtype))


UNIFORM = [
    ("xavier_uniform_", {}, SHAPE, math.sqrt(6 / 500)),
    ("xavier_uniform_", {"gain": 2.0}, SHAPE, 2 * math.sqrt(6 / 500)),
    ("xavier_uniform_", {}, IMAGE, math.sqrt(6 / 1250)),
    ("kaiming_uniform_", {}, SHAPE, math.sqrt(6 / 200)),
    ("kaiming_uniform_", {"a": math.sqrt(5)}, SHAPE, 1 / math.sqrt(200)),
    ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "relu"}, SHAPE, math.sqrt(6 / 300)),
    ("kaiming_uniform_", {"nonlinearity": "tanh"}, IMAGE, 5 / 3 * math.sqrt(3 / 500)),
    ("uniform_", {"a": -0.25, "b": 0.25}, SHAPE, 0.25),
]
NORMAL = [
    ("xavier_normal_", {}, SHAPE, math.sqrt(2 / 500)),
    ("xavier_normal_", {"gain": 3.0}, IMAGE, 3 * math.sqrt(2 / 1250)),
    ("kaiming_normal_", {"nonlinearity": "relu"}, SHAPE, math.sqrt(2 / 200)),
    ("kaiming_normal_", {"a": 0.5, "mode": "fan_out"}, SHAPE, math.sqrt(2 / 1.25 / 300)),
    ("kaiming_normal_", {"nonlinearity": "linear"}, IMAGE, math.sqrt(1 / 500)),
    ("normal_", {"std": 0.3}, SHAPE, 0.3),
]


@pytest.mark.parametrize(("name", "options", "shape", "bound"), UNIFORM)
def test_uniform_on_the_bounds_of_the_formula(name, options, shape, bound):
    parameter = empty(shape)
    assert getattr(init, name)(parameter, **options) is parameter
    data = parameter.data
    count = data.size
    assert parameter.dtype == np.float32
    assert abs(data).max() <= bound * (1 + 1e-6)
    assert abs(data).max() > bound * (1 - 20 / count)  # probability of missing this: e^−20
    assert abs(data.mean()) < 5 * bound / math.sqrt(3 * count)
    assert data.std() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(count))


@pytest.mark.parametrize(("name", "options", "shape", "std"), NORMAL)
def test_normal_with_the_spread_of_the_formula(name, options, shape, std):
    parameter = empty(shape)
    assert getattr(init, name)(parameter, **options) is parameter
    data = parameter.data
    assert data.std() == pytest.approx(std, rel=5 / math.sqrt(2 * data.size))
    assert abs(data.mean()) < 5 * std / math.sqrt(data.size)
    assert (abs(data) > 3 * std).mean() == pytest.approx(0.0027, abs=0.0015)  # tails of a normal


@pytest.mark.parametrize(("name", "options", "shape", "size"), UNIFORM + NORMAL)
def test_ranges_and_spreads_are_pytorchs(name, options, shape, size, torch):
    theirs = getattr(torch.nn.init, name)(torch.empty(shape), **options).numpy()
    ours = getattr(init, name)(empty(shape), **options).data
    assert ours.std() == pytest.approx(theirs.std(), rel=10 / math.sqrt(ours.size))


def test_the_layout_decides_which_fan_is_in(torch):
    parameter = empty(IMAGE)
    assert init.fans(parameter) == (500, 750)
    assert init.fans(empty(SHAPE)) == (200, 300)
    theirs = torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(IMAGE))
    assert init.fans(parameter) == tuple(theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        ("linear",),
        ("conv1d",),
        ("conv2d",),
        ("conv_transpose2d",),
        ("sigmoid",),
        ("tanh",),
        ("relu",),
        ("leaky_relu",),
        ("leaky_relu", 0.3),
        ("selu",),
    ],
    ids=str,
)
def test_gains_are_pytorchs(arguments, torch):
    assert init.calculate_gain(*arguments) == pytest.approx(torch.nn.init.calculate_gain(*arguments), rel=1e-15)


def test_constants_and_offsets():
    assert (init.zeros_(empty((2, 3))).data == 0).all()
    assert (init.ones_(empty((2, 3))).data == 1).all()
    assert (init.constant_(empty(4), 2.5).data == 2.5).all()
    assert init.normal_(empty(SHAPE), mean=10.0, std=0.1).data.mean() == pytest.approx(10, abs=0.01)
    data = init.uniform_(empty(SHAPE)).data
    assert 0 <= data.min() < 0.001
    assert 0.999 < data.max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_keep_the_dtype_and_the_place(dtype):
    parameter = empty((3, 2), dtype)
    place = parameter.data
    for function in (init.uniform_, init.xavier_normal_, init.kaiming_uniform_, init.ones_):
        function(parameter)
        assert parameter.data is place
        assert parameter.dtype == dtype
        assert np.isfinite(parameter.data).all()


def test_a_part_of_a_parameter_is_filled_in_place(torch):
    ours, theirs = nn.LSTM(3, 4), torch.nn.LSTM(3, 4)
    for library, bias in ((nn, ours.bias_ih_l0), (torch.nn, theirs.bias_ih_l0)):
        library.init.zeros_(bias)
        library.init.constant_(bias[4:8], 7.0)  # the forget gate's
    np.testing.assert_array_equal(ours.bias_ih_l0.data, theirs.bias_ih_l0.detach().numpy())
    for function in (init.uniform_, init.normal_, init.xavier_uniform_, init.kaiming_normal_, init.orthogonal_):
        for weight in (empty((4, 6)), empty((4, 6)).data):
            function(weight[1:3])
            assert np.isfinite(np.asarray(weight)[1:3]).all()
            assert np.isnan(np.asarray(weight)[[0, 3]]).all()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def draw(seed):
        manual_seed(seed)
        return [init.kaiming_normal_(empty((3, 2))).data, init.xavier_uniform_(empty((3, 2))).data]

    for first, second, other in zip(draw(5), draw(5), draw(6), strict=True):
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)


def test_float32_and_float64_weights_are_the_same_numbers():
    """Promise 2 apart, a run in float64 can be held beside the one in float32."""
    narrow = nn.Linear(20, 10)
    manual_seed(0)
    wide = nn.Linear(20, 10, dtype=np.float64)
    np.testing.assert_array_equal(narrow.weight.data, wide.weight.data.astype(np.float32))
    np.testing.assert_array_equal(narrow.bias.data, wide.bias.data.astype(np.float32))


def test_linear_starts_as_in_pytorch(torch):
    ours, theirs = nn.Linear(200, 300), torch.nn.Linear(200, 300)
    bound = 1 / math.sqrt(200)
    for name, share in (("weight", 1e-3), ("bias", 0.1)):
        values = getattr(ours, name).data
        assert bound * (1 - share) < abs(values).max() <= bound * (1 + 1e-6)
        assert values.std() == pytest.approx(getattr(theirs, name).detach().numpy().std(), rel=20 * share)


def test_kaiming_keeps_the_variance_through_twenty_rectified_layers_and_smaller_weights_lose_it(rng):
    def last_spread(scale):
        h = rng.normal(size=(200, 100)).astype(np.float32)
        for _ in range(20):
            weight = init.kaiming_normal_(empty((100, 100)), nonlinearity="relu")
            h = np.maximum(h @ (scale * weight.data).T, 0)
        return float((h**2).mean())

    assert 0.1 < last_spread(1.0) < 10
    assert last_spread(0.5) < 1e-9
    assert last_spread(2.0) > 1e9


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"no gain is known for 'swish'; known: linear, .*selu"):
        init.calculate_gain("swish")
    with pytest.raises(ValueError, match=r"need a weight of two or more axes, got shape \(3,\)"):
        init.xavier_uniform_(empty(3))
    with pytest.raises(ValueError, match='mode must be "fan_in" or "fan_out", got \'fan\''):
        init.kaiming_normal_(empty((2, 2)), mode="fan")


@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (12, 30), (8, 3, 2, 2), (1, 5), (5, 1)])
def test_orthogonal_rows_or_columns_whichever_are_fewer(shape):
    parameter = empty(shape, np.float64)
    assert init.orthogonal_(parameter, gain=1.5) is parameter
    matrix = parameter.data.reshape(shape[0], -1) / 1.5
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    np.testing.assert_allclose(product, np.eye(min(matrix.shape)), atol=1e-13)
    assert init.orthogonal_(empty(shape)).dtype == np.float32


def test_orthogonal_matrices_are_spread_evenly():
    """Without the signs, the QR of LAPACK prefers one half: the diagonal would have a mean."""
    manual_seed(5)
    corner = [init.orthogonal_(empty((2, 2), np.float64)).data[0, 0] for _ in range(2000)]
    assert abs(np.mean(corner)) < 0.06  # a standard deviation of 0.7/√2000 = 0.016
    with pytest.raises(ValueError, match=r"two or more axes with entries, got shape \(3,\)"):
        init.orthogonal_(empty(3))


def test_lecun_keeps_the_variance_of_the_inputs():
    bound = math.sqrt(3 / 200)
    data = init.lecun_uniform_(empty(SHAPE)).data
    assert 0.999 * bound < abs(data).max() <= bound * (1 + 1e-6)
    assert data.std() == pytest.approx(1 / math.sqrt(200), rel=0.02)
    image = init.lecun_normal_(empty(IMAGE)).data
    assert image.std() == pytest.approx(1 / math.sqrt(500), rel=0.03)
    for array in (data, image):
        assert abs(array.mean()) < 5 * array.std() / math.sqrt(array.size)
    assert abs(init.lecun_normal_(empty(SHAPE)).data).max() > 0.2  # not cut off, as a uniform one is at 0.12
