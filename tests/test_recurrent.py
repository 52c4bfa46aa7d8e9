"""Recurrent layers, held against finite differences and against PyTorch's, in every combination of arguments."""

import itertools

import numpy as np
import pytest

import distprop.random
from distprop import functional as F
from distprop import nn
from distprop.buffer import FlatBuffer
from distprop.comm import run_threads
from distprop.data.loader import share
from distprop.functional.join import concatenate
from distprop.parallel import DataParallel
from distprop.tape import no_grad
from distprop.tensor import Parameter, Tensor
from distprop.testing import check_grads

# Relative to the largest number in an array: 6e-8 of float32 over some steps, sums in another order, σ made of tanh.
TOLERANCE = {"float64": 1e-13, "float32": 5e-6}
INPUT, HIDDEN, STEPS, BATCH = 3, 4, 5, 2

# The operation, how many gates, how many states, its options.
OPERATIONS = [
    pytest.param(F.rnn, 1, 1, {"nonlinearity": "tanh"}, id="tanh"),
    pytest.param(F.rnn, 1, 1, {"nonlinearity": "relu"}, id="relu"),
    pytest.param(F.lstm, 4, 2, {}, id="lstm"),
    pytest.param(F.gru, 3, 1, {}, id="gru"),
]
LAYERS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {})]


def arrays(gates, states, steps=STEPS, batch=BATCH, bias=True, input=INPUT, hidden=HIDDEN):
    """x, the states, both weights, both biases."""
    rng = np.random.default_rng(gates + steps + batch)
    rows = gates * hidden
    shapes = [(steps, batch, input), *[(batch, hidden)] * states, (rows, input), (rows, hidden), *[(rows,)] * 2 * bias]
    made = [rng.normal(0, 0.8, shape) for shape in shapes]
    for array in made:
        array.setflags(write=False)
    return made


def result(value):
    """One tensor of what an operation returns, so that everything in it has a gradient."""
    return value if isinstance(value, Tensor) else concatenate(value, 0)


def assert_close(found, expected, dtype):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(expected).max(initial=0)))


# the operations


@pytest.mark.parametrize(("operation", "gates", "states", "options"), OPERATIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("steps", "batch", "bias"), [(4, 2, True), (3, 1, False), (1, 2, True), (2, 0, True)])
def test_gradients_agree_with_finite_differences(operation, gates, states, options, reverse, steps, batch, bias):
    inputs = arrays(gates, states, steps, batch, bias, input=2, hidden=3)
    check_grads(lambda *t: result(operation(*t, **options, reverse=reverse)), inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("operation", "gates", "states", "options"), OPERATIONS)
def test_only_the_inputs_that_need_a_gradient_get_one(operation, gates, states, options):
    inputs = arrays(gates, states)
    everything = [Tensor(a, requires_grad=True) for a in inputs]
    result(operation(*everything, **options)).sum().backward()
    for chosen in range(len(inputs)):
        some = [Tensor(a, requires_grad=i == chosen) for i, a in enumerate(inputs)]
        value = operation(*some, **options)
        node = value.node if isinstance(value, Tensor) else value[0].node.inputs[0].node
        assert len(node.inputs) == len(inputs)
        whole = np.ones((STEPS + (states == 2), BATCH, HIDDEN))
        whole.setflags(write=False)
        gradients = node.vjp(whole, [None] * len(inputs))
        for tensor, gradient in zip(some, gradients, strict=True):
            assert (gradient is not None) == tensor.requires_grad
        np.testing.assert_allclose(gradients[chosen], everything[chosen].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("operation", "gates", "states", "options"), OPERATIONS)
def test_the_gradient_of_a_parameter_lands_in_the_flat_buffer(operation, gates, states, options):
    inputs = arrays(gates, states)
    tensors, parameters = [Tensor(a, requires_grad=True) for a in inputs], [Parameter(a) for a in inputs]
    buffer = FlatBuffer(parameters)
    buffer.message[:] = np.nan
    result(operation(*tensors, **options)).sum().backward()
    for factor in (1, 2):
        result(operation(*parameters, **options)).sum().backward()
        for parameter, tensor in zip(parameters, tensors, strict=True):
            assert np.shares_memory(parameter.grad, buffer.message)
            np.testing.assert_allclose(parameter.grad, factor * tensor.grad, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("operation", "gates", "states", "options"), OPERATIONS)
def test_weights_are_written_in_place_as_one_product(operation, gates, states, options):
    inputs = [Tensor(a, requires_grad=True) for a in arrays(gates, states)]
    value = operation(*inputs, **options)
    node = value.node if isinstance(value, Tensor) else value[0].node.inputs[0].node
    targets = [None] * (1 + states) + [np.full(t.shape, np.nan) for t in inputs[1 + states :]]
    gradients = node.vjp(np.ones((STEPS + (states == 2), BATCH, HIDDEN)), targets)
    for gradient, target in zip(gradients[1 + states :], targets[1 + states :], strict=True):
        assert gradient is target


@pytest.mark.parametrize(("operation", "gates", "states", "options"), OPERATIONS)
def test_extreme_sums_neither_overflow_nor_give_nan(operation, gates, states, options):
    x, *others = arrays(gates, states, steps=1)
    for factor in (1e4, -1e4):
        tensors = [Tensor(np.float32(factor) * x.astype("f"), requires_grad=True), *(a.astype("f") for a in others)]
        result(operation(*tensors, **options)).sum().backward()
        assert np.isfinite(tensors[0].grad).all()


X, H, W, B = np.zeros((5, 2, 3)), np.zeros((2, 4)), np.zeros((16, 3)), np.zeros(16)
R = np.zeros((16, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], H, H, W, R), ValueError, r"lstm got x of shape \(2, 3\); it needs \(steps, batch, input\)"),
        ((X[:0], H, H, W, R), ValueError, r"x of shape \(0, 2, 3\); .* at least one step"),
        ((X, H[:1], H, W, R), ValueError, r"x of shape \(5, 2, 3\) .* h0 of shape \(1, 4\); expected \(2, 4\)"),
        ((X, H, H[:, :3], W, R), ValueError, r"c0 of shape \(2, 3\); expected \(2, 4\)"),
        ((X, H, H, W[:, :2], R), ValueError, r"weight_ih of shape \(16, 2\); expected \(16, 3\)"),
        ((X, H, H, W, R[:12]), ValueError, r"weight_hh of shape \(12, 4\); expected \(16, 4\)"),
        ((X, H, H, W, R, B, B[:4]), ValueError, r"bias_hh of shape \(4,\); expected \(16,\)"),
        ((X, H, H, W, R, B), ValueError, "both biases or none, got only one"),
        ((X, H, H, W, R.astype("f")), TypeError, "lstm needs one floating-point dtype, got .* weight_hh float32"),
        ((X.astype(int), H, H, W, R), TypeError, "lstm got a tensor of dtype int64; it needs floating point"),
    ],
)
def test_the_operation_says_what_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        F.lstm(*arguments)


# the layers, beside PyTorch's


def pair(torch, kind, options, dtype, input=INPUT, hidden=HIDDEN):
    """Our layer and PyTorch's, with the same numbers."""
    ours = getattr(nn, kind)(input, hidden, **options, dtype=dtype)
    theirs = getattr(torch.nn, kind)(input, hidden, **options, dtype=getattr(torch, dtype))
    ours.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    return ours, theirs


def flat(returned):
    """(output, h_n) or (output, (h_n, c_n)) as a list."""
    output, state = returned
    return [output, *(state if isinstance(state, tuple) else [state])]


def compare(torch, kind, options, dtype, shape, with_state):
    """Values and gradients of a layer and PyTorch's, for an x of `shape`, through everything that is returned."""
    rng = np.random.default_rng(3)
    ours, theirs = pair(torch, kind, options, dtype)
    x = rng.normal(size=shape).astype(dtype)
    rows = options["num_layers"] * (1 + options["bidirectional"])
    batch = shape[0] if options["batch_first"] else shape[-2]
    state_shape = (rows, batch, HIDDEN) if len(shape) == 3 else (rows, HIDDEN)
    states = [rng.normal(size=state_shape).astype(dtype) for _ in range(1 + (kind == "LSTM"))] * with_state
    our_inputs = [Tensor(a, requires_grad=True) for a in (x, *states)]
    their_inputs = [torch.tensor(a, requires_grad=True) for a in (x, *states)]
    found, expected = (
        flat(layer(i[0], tuple(i[1:]) if len(i) == 3 else i[1]) if with_state else layer(i[0]))
        for layer, i in ((ours, our_inputs), (theirs, their_inputs))
    )
    seeds = [rng.normal(size=tuple(e.shape)).astype(dtype) for e in expected]
    sum((f * s).sum() for f, s in zip(found, seeds, strict=True)).backward()
    sum((e * torch.tensor(s)).sum() for e, s in zip(expected, seeds, strict=True)).backward()
    for our, their in zip(found, expected, strict=True):
        assert_close(our.data, their.detach().numpy(), dtype)
    for our, their in zip(our_inputs, their_inputs, strict=True):
        assert_close(our.grad, their.grad.numpy(), dtype)
    for (name, our), (their_name, their) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name
        assert_close(our.grad, their.grad.numpy(), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("num_layers", "bias", "batch_first", "bidirectional"), list(itertools.product([1, 3], *[[False, True]] * 3))
)
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_every_combination_agrees_with_pytorch(
    kind, options, num_layers, bias, batch_first, bidirectional, with_state, dtype, torch
):
    options = {
        **options,
        "num_layers": num_layers,
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": bidirectional,
    }
    shape = (BATCH, STEPS, INPUT) if batch_first else (STEPS, BATCH, INPUT)
    compare(torch, kind, options, dtype, shape, with_state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(5, INPUT), (1, INPUT), (1, 1, INPUT), (7, 1, INPUT), (1, 6, INPUT)])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_single_sequences_and_single_steps_agree_with_pytorch(kind, options, shape, batch_first, with_state, torch):
    options = {**options, "num_layers": 2, "batch_first": batch_first, "bidirectional": True}
    compare(torch, kind, options, "float64", shape, with_state)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_dropout_of_everything_between_layers_agrees_with_pytorch(kind, options, torch):
    options = {**options, "num_layers": 3, "batch_first": True, "bidirectional": True, "dropout": 1.0}
    compare(torch, kind, options, "float64", (BATCH, STEPS, INPUT), True)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_an_empty_batch_gives_empty_results_and_zero_gradients(kind, options, bidirectional):
    layer = getattr(nn, kind)(INPUT, HIDDEN, 2, **options, batch_first=True, bidirectional=bidirectional)
    output, h, *_ = flat(layer(np.zeros((0, STEPS, INPUT), np.float32)))
    assert output.shape == (0, STEPS, HIDDEN * (1 + bidirectional))
    assert h.shape == (2 * (1 + bidirectional), 0, HIDDEN)
    output.sum().backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_truncated_backpropagation_stops_at_a_detached_state(kind, options, torch):
    ours, theirs = pair(torch, kind, {**options, "num_layers": 2}, "float64")
    x = np.random.default_rng(0).normal(size=(6, BATCH, INPUT))
    first, second = Tensor(x[:3], requires_grad=True), Tensor(x[3:], requires_grad=True)
    _, *state = flat(ours(first))
    detached = tuple(s.detach() for s in state)
    output, _ = ours(second, detached if len(detached) == 2 else detached[0])
    output.sum().backward()
    assert first.grad is None
    _, *state = flat(theirs(torch.tensor(x[:3])))
    detached = tuple(s.detach() for s in state)
    theirs(torch.tensor(x[3:]), detached if len(detached) == 2 else detached[0])[0].sum().backward()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(our.grad, their.grad.numpy(), "float64")
    np.testing.assert_allclose(output.data, ours(x)[0].data[3:], rtol=1e-12)  # the values do not notice the cut


@pytest.mark.parametrize("of", [0, 1, 2])
def test_a_loss_on_one_of_the_results_is_enough(of, torch):
    ours, theirs = pair(torch, "LSTM", {"num_layers": 2, "bidirectional": True}, "float64")
    x = np.random.default_rng(1).normal(size=(STEPS, BATCH, INPUT))
    flat(ours(x))[of].sum().backward()
    flat(theirs(torch.tensor(x)))[of].sum().backward()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(our.grad, their.grad.numpy() if their.grad is not None else np.zeros(our.shape), "float64")


# what is ours alone


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_a_layer_and_direction_is_one_operation_however_long_the_sequence(kind, options):
    layer = getattr(nn, kind)(INPUT, HIDDEN, 2, **options, bidirectional=True)

    def nodes(steps):
        output, _ = layer(np.zeros((steps, BATCH, INPUT), np.float32))
        seen, stack = set(), [output.node]
        while stack:
            node = stack.pop()
            seen.add(node.number)
            stack += [t.node for t in node.inputs if t.node is not None and t.node.number not in seen]
        return len(seen)

    assert nodes(2) == nodes(50) <= 10


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_uneven_ranks_make_the_gradient_of_one_process(kind, size):
    """Dropout included: its masks belong to the rows of the global batch."""
    x = np.random.default_rng(2).normal(size=(5, STEPS, INPUT))

    def gradients(comm):
        distprop.random.manual_seed(0)
        layer = getattr(nn, kind)(INPUT, HIDDEN, 2, batch_first=True, dropout=0.5, bidirectional=True, dtype="float64")
        rows = share(len(x), comm.rank, comm.size) if comm else slice(0, len(x))
        parallel = DataParallel(layer, comm) if comm else layer
        distprop.random.at(seed=1, step=3, first_row=rows.start)
        output, _ = parallel(x[rows])
        (output * output).sum((1, 2)).mean().backward()
        return [p.grad.copy() for p in layer.parameters()]

    alone = gradients(None)
    for of_rank in run_threads(size, gradients, 20):
        for found, expected in zip(of_rank, alone, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_dropout_is_between_layers_only_and_only_in_training():
    x = np.ones((STEPS, 200, INPUT), np.float32)
    layer = nn.RNN(INPUT, HIDDEN, 2, dropout=0.5)
    outputs = [layer(x)[0].data for _ in range(2)]
    assert not np.array_equal(*outputs)
    assert (outputs[0] != 0).all()  # nothing of the last layer is dropped
    first_layers = [layer(x)[1].data[0] for _ in range(2)]
    np.testing.assert_array_equal(*first_layers)
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0].data, layer(x)[0].data)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_the_start_is_uniform_on_one_over_the_root_of_hidden(kind, options):
    layer = getattr(nn, kind)(30, 100, **options)
    numbers = np.concatenate([p.data.ravel() for p in layer.parameters()])
    assert numbers.dtype == np.float32
    assert 0.0999 < abs(numbers).max() <= 0.1
    assert abs(numbers.std() - 0.1 / np.sqrt(3)) < 0.001


def test_without_gradients_nothing_is_recorded():
    layer = nn.LSTM(INPUT, HIDDEN)
    with no_grad():
        output, (h, c) = layer(np.zeros((STEPS, BATCH, INPUT), np.float32))
    assert output.node is None
    assert [t.requires_grad for t in (output, h, c)] == [False] * 3


def test_repr_shows_the_arguments_that_are_not_usual():
    assert repr(nn.GRU(3, 4)) == "GRU(3, 4)"
    assert repr(nn.LSTM(3, 4, 2, bias=False, batch_first=True)) == (
        "LSTM(3, 4, num_layers=2, bias=False, batch_first=True)"
    )
    assert repr(nn.RNN(3, 4, nonlinearity="relu")) == "RNN(3, 4, nonlinearity='relu')"


LSTM = {"batch_first": True, "num_layers": 2}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.LSTM(0, 4), ValueError, "LSTM needs .* at least 1, got 0, 4 and 1"),
        (lambda: nn.GRU(3, 4, num_layers=0), ValueError, "GRU needs .* got 3, 4 and 0"),
        (lambda: nn.GRU(3, 4, 2, dropout=1.5), ValueError, "probability between 0 and 1, got 1.5"),
        (lambda: nn.RNN(3, 4, nonlinearity="elu"), ValueError, '"tanh" or "relu", got \'elu\''),
        (lambda: nn.RNN(3, 4)(np.zeros((5, 2, 2))), ValueError, r"RNN\(3, 4\) got x of shape \(5, 2, 2\).* 3 inputs"),
        (lambda: nn.RNN(3, 4)(np.zeros(3)), ValueError, r"got x of shape \(3,\); it needs \(steps, batch, input\) or"),
        (
            lambda: nn.LSTM(3, 4, **LSTM)(np.zeros((2, 0, 3))),
            ValueError,
            r"x of shape \(2, 0, 3\); it needs \(batch, steps, input\).* at least one step",
        ),
        (
            lambda: nn.GRU(3, 4, batch_first=True)(np.zeros((0, 3))),
            ValueError,
            r"got x of shape \(0, 3\); it needs \(batch",
        ),
        (
            lambda: nn.GRU(3, 4, **LSTM)(np.zeros((2, 5, 3)), np.zeros((2, 5, 4))),
            ValueError,
            r"a state h of shape \(2, 5, 4\); it needs \(2, 2, 4\): layers × directions, batch, hidden",
        ),
        (
            lambda: nn.GRU(3, 4)(np.zeros((5, 3)), np.zeros((1, 1, 4))),
            ValueError,
            r"h of shape \(1, 1, 4\); it needs \(1, 4\): layers × directions, hidden",
        ),
        (
            lambda: nn.LSTM(3, 4)(np.zeros((5, 2, 3)), (np.zeros((1, 2, 4)), np.zeros((2, 2, 4)))),
            ValueError,
            r"a state c of shape \(2, 2, 4\); it needs \(1, 2, 4\)",
        ),
        (lambda: nn.LSTM(3, 4)(np.zeros((5, 2, 3)), np.zeros((1, 2, 4))), TypeError, r"a pair \(h, c\), got an array"),
        (lambda: nn.LSTM(3, 4)(np.zeros((5, 2, 3))), TypeError, "lstm needs one floating-point dtype, got x float64"),
    ],
)
def test_a_layer_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_dropout_with_one_layer_warns_as_pytorch_does(layer):
    message = f"{layer.__name__}: dropout is applied between layers, and there is only one"
    with pytest.warns(UserWarning, match=message) as caught:
        layer(3, 4, dropout=0.5)
    assert caught[0].filename == __file__  # the line that made the layer
