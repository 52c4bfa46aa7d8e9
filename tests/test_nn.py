"""Modules and layers: names and order as in PyTorch, saving and loading, modes, and what the errors say."""

import copy
import inspect
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest

import distprop
from distprop import data, functional, manual_seed, nn, optim
from distprop.comm import SoloCommunicator
from distprop.nn import Module, Parameter, Sequential
from distprop.parallel import DataParallel
from distprop.tensor import Tensor


class Block(Module):
    """Parameters, modules and a buffer, assigned in a mixed order."""

    def __init__(self, width):
        self.inner = nn.Linear(width, width)
        self.scale = Parameter(np.ones(width, np.float32))
        self.register_buffer("mean", np.zeros(width, np.float32))
        self.outer = nn.Sequential(nn.Linear(width, width, bias=False), nn.Sequential(nn.ReLU(), nn.Linear(width, 1)))
        self.width = width

    def forward(self, x):
        return self.outer(self.inner(x) * self.scale - self.mean)


class Net(Module):
    def __init__(self):
        self.first = Block(3)
        self.offset = Parameter(np.zeros(1, np.float32))
        self.second = Block(2)
        self.register_buffer("count", 0)

    def forward(self, x):
        return self.first(x) + self.offset


@pytest.fixture
def torch_net(torch):
    class TorchBlock(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inner = torch.nn.Linear(width, width)
            self.scale = torch.nn.Parameter(torch.ones(width))
            self.register_buffer("mean", torch.zeros(width))
            self.outer = torch.nn.Sequential(
                torch.nn.Linear(width, width, bias=False),
                torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(width, 1)),
            )

        def forward(self, x):
            return self.outer(self.inner(x) * self.scale - self.mean)

    class TorchNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = TorchBlock(3)
            self.offset = torch.nn.Parameter(torch.zeros(1))
            self.second = TorchBlock(2)
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x):
            return self.first(x) + self.offset

    return TorchNet()


# names


def test_names_order_and_shapes_are_pytorchs(torch_net):
    net = Net()
    for ours, theirs in [
        (net.named_parameters(), torch_net.named_parameters()),
        (net.named_buffers(), torch_net.named_buffers()),
        (net.state_dict().items(), torch_net.state_dict().items()),
    ]:
        assert [(name, value.shape) for name, value in ours] == [(name, tuple(value.shape)) for name, value in theirs]
    assert [name for name, _ in net.named_modules()] == [name for name, _ in torch_net.named_modules()]
    assert [name for name, _ in net.named_children()] == [name for name, _ in torch_net.named_children()]
    assert len(list(net.modules())) == len(list(torch_net.modules()))
    assert [p.shape for p in net.parameters()] == [tuple(p.shape) for p in torch_net.parameters()]
    assert [b.shape for b in net.buffers()] == [tuple(b.shape) for b in torch_net.buffers()]


def test_a_module_in_two_places_is_one_module_with_two_names_in_the_state(torch):
    def twice(library):
        shared = library.Linear(2, 2)
        return library.Sequential(shared, library.ReLU(), shared)

    ours, theirs = twice(nn), twice(torch.nn)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))


def test_a_state_that_is_not_numbers_changes_nothing(rng):
    layer = nn.Linear(2, 1)
    before = layer.weight.data.copy()
    with pytest.raises(ValueError, match="bias: <U1, not numbers"):
        layer.load_state_dict({"weight": np.zeros((1, 2)), "bias": ["a"]})
    np.testing.assert_array_equal(layer.weight.data, before)


def test_weights_from_pytorch_give_pytorchs_output_and_gradients(torch_net, torch, rng):
    net = Net()
    net.load_state_dict({name: value.numpy() for name, value in torch_net.state_dict().items()})
    x = rng.normal(size=(5, 3)).astype(np.float32)
    ours, theirs = net(x), torch_net(torch.tensor(x))
    np.testing.assert_allclose(ours.data, theirs.detach().numpy(), rtol=2e-6, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    for (name, p), q in zip(net.named_parameters(), torch_net.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=5e-6, atol=1e-6, err_msg=name)


def test_a_shared_parameter_is_counted_once_under_its_first_name():
    class Tied(Module):
        def __init__(self):
            self.encode = nn.Linear(3, 3)
            self.decode = nn.Linear(3, 3)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    tied = Tied()
    assert [name for name, _ in tied.named_parameters()] == ["encode.weight", "encode.bias", "decode.bias"]
    assert len(tied.state_dict()) == 4  # as in PyTorch, both names are saved
    optim.SGD(tied.parameters(), lr=0.1)  # which would refuse one given twice


def test_one_module_in_two_places(torch):
    def build(nn):
        linear, relu = nn.Linear(2, 2), nn.ReLU()
        return nn.Sequential(linear, relu, linear, relu)

    ours, theirs = build(nn), build(torch.nn)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(ours) == 4
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    linear = ours[0]
    np.testing.assert_array_equal(ours(x).data, linear(linear(x).relu()).relu().data)


def test_attributes_can_be_replaced_and_removed():
    net = nn.Linear(2, 2)
    net.weight = Parameter(np.zeros((2, 2)))
    net.bias = None
    assert [(name, p.dtype) for name, p in net.named_parameters()] == [("weight", np.float64)]
    assert list(net.state_dict()) == ["weight"]


# state


def test_state_is_the_arrays_themselves():
    net = Net()
    state = net.state_dict()
    assert state["first.inner.weight"] is net.first.inner.weight.data
    assert state["second.mean"] is net.second.mean


def test_loading_copies_values():
    source, target = Net(), Net()
    state = {name: value + 1 for name, value in source.state_dict().items()}
    place = target.first.inner.weight.data
    target.load_state_dict(state)
    for name, value in target.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
    assert target.first.inner.weight.data is place
    state["offset"][:] = 99
    assert target.offset.data[0] == 1
    assert target.count == 1


def test_loading_lists_everything_that_does_not_fit_and_changes_nothing():
    net = Net()
    before = {name: value.copy() for name, value in net.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["first.inner.wieght"] = state.pop("first.inner.weight")
    state["nonsense"] = np.zeros(1)
    del state["count"]
    state["second.scale"] = np.zeros((2, 1))
    with pytest.raises(ValueError, match="does not fit this Net") as info:
        net.load_state_dict(state)
    assert set(str(info.value).splitlines()[1:]) == {
        "  second.scale: shape (2, 1), expected (2,)",
        "  first.inner.weight: missing",
        "  count: missing",
        "  first.inner.wieght: unexpected (did you mean first.inner.weight?)",
        "  nonsense: unexpected",
    }
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_loading_part_of_a_state():
    net = Net()
    net.load_state_dict({"offset": [5.0], "elsewhere": [1.0]}, strict=False)
    assert net.offset.data[0] == 5
    with pytest.raises(ValueError, match=r"offset: shape \(2,\), expected \(1,\)"):
        net.load_state_dict({"offset": [5.0, 6.0], "count": 3}, strict=False)
    assert net.count == 0


def test_loading_returns_the_names_that_do_not_fit_as_pytorch_does(torch_net, torch):
    net = Net()
    for without in (None, "first.scale", "second.outer.0.weight"):
        state = {name: value for name, value in torch_net.state_dict().items() if name != without}
        extra = {"else.where": torch.zeros(1), "stray": torch.zeros(1)} if without else {}
        theirs = torch_net.load_state_dict(state | extra, strict=without is None)
        for loads in (net, DataParallel(net, SoloCommunicator())):
            ours = loads.load_state_dict({k: v.numpy() for k, v in (state | extra).items()}, strict=without is None)
            assert ours == theirs
            assert ours.missing_keys == theirs.missing_keys == ([without] if without else [])
            assert ours.unexpected_keys == theirs.unexpected_keys == list(extra)


def test_loading_converts_to_the_dtype_of_the_model():
    net = nn.Linear(2, 1)
    net.load_state_dict({"weight": np.full((1, 2), 0.5), "bias": [1]})
    assert net.weight.dtype == net.bias.dtype == np.float32
    np.testing.assert_array_equal(net.weight.data, [[0.5, 0.5]])


def test_buffers_are_saved_and_not_trained():
    net = Net()
    assert "count" in net.state_dict()
    assert not any("count" in name for name, _ in net.named_parameters())
    net.count = net.count + 1  # leaves a NumPy scalar behind, which cannot be written into
    assert net.state_dict()["count"] == 1
    net.load_state_dict({**net.state_dict(), "count": 7})
    assert net.count == 7
    net.count += 1
    assert net.state_dict()["count"] == 8
    array = np.zeros(2)
    net.register_buffer("extra", array)
    assert net.extra is not array
    net.register_buffer("extra", np.ones(2))
    assert [name for name, _ in net.named_buffers()].count("extra") == 1
    assert "extra" not in Net().state_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_model_in_training_trains_on_its_own(clone):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model[2].weight = model[2].weight
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = np.ones((2, 3), np.float32)

    def train(net, sgd):
        sgd.zero_grad()
        (net(x) ** 2).mean().backward()
        sgd.step()

    train(model, optimizer)  # the parameters live in a flat buffer now
    other = clone(model)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(p.data, q.data)
        assert not np.shares_memory(p.data, q.data)
    before = [p.data.copy() for p in model.parameters()]
    train(other, optim.SGD(other.parameters(), lr=0.1))
    for p, q, b in zip(model.parameters(), other.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.data, b)
        assert not np.array_equal(p.data, q.data)


# modes, dtypes, gradients


def test_train_and_eval_reach_everything_below():
    net = Sequential(nn.Dropout(0.5), Sequential(nn.Dropout(0.5), Block(2)))
    assert all(module.training for module in net.modules())
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(net[0](x).data, x)
    net.train()
    assert all(module.training for module in net.modules())
    assert not np.array_equal(net[0](x).data, x)
    assert nn.Dropout(0.5).training  # the class was not touched


def test_conversion_reaches_parameters_and_floating_buffers():
    net = Net()
    x = np.ones((2, 3))
    net(x.astype(np.float32)).sum().backward()
    assert net.double() is net
    assert all(p.dtype == np.float64 for p in net.parameters())
    assert net.first.mean.dtype == np.float64
    assert net.count.dtype == np.int64
    assert all(p.grad is None for p in net.parameters())
    assert net(x).dtype == np.float64
    assert net.float()(x.astype(np.float32)).dtype == np.float32
    assert net.to(np.float16).offset.dtype == np.float16


@pytest.mark.parametrize("dtype", [np.int64, bool, np.complex64, "cpu", "cuda:0"])
def test_conversion_is_to_floating_point_only(dtype):
    net = Net()
    with pytest.raises(TypeError, match=r"to\(\) takes a floating-point dtype .*, got .*; all is on the CPU"):
        net.to(dtype)
    assert {p.dtype for p in net.parameters()} == {np.dtype(np.float32)}


def test_zero_grad_and_requires_grad():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = np.ones((1, 2), np.float32)
    net[0].requires_grad_(False)
    net(x).sum().backward()
    assert [p.grad is not None for p in net.parameters()] == [False, False, True, True]
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    assert net.requires_grad_() is net
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_none_or_zeros_as_pytorch_does(set_to_none, torch):
    def gradients(library, ones, **options):
        net = library.nn.Sequential(library.nn.Linear(2, 2), library.nn.Linear(2, 2))
        net[0].requires_grad_(False)
        optimizer = library.optim.SGD(net.parameters(), lr=0.1)
        found = []
        for owner in (net, optimizer):
            net(ones).sum().backward()
            owner.zero_grad(**options)
            found += [None if p.grad is None else p.grad.tolist() for p in net.parameters()]
        return found

    ours = gradients(distprop, np.ones((1, 2), np.float32), set_to_none=set_to_none)
    assert ours == gradients(torch, torch.ones(1, 2), set_to_none=set_to_none)
    assert ours.count(None) == (8 if set_to_none else 4)


def test_a_module_without_forward_says_so():
    class Unfinished(Module):
        pass

    with pytest.raises(TypeError, match=r"Unfinished does not define forward\(\)"):
        Unfinished()(1)


def test_call_passes_all_arguments_on():
    class Three(Module):
        def forward(self, a, b, *, c):
            return a, b, c

    assert Three()(1, b=2, c=3) == (1, 2, 3)


# Sequential, repr


def test_sequential():
    modules = [nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)]
    model = Sequential(*modules)
    assert len(model) == 3
    assert list(model) == modules
    assert model[1] is modules[1]
    assert model[-1] is modules[2]
    with pytest.raises(IndexError):
        model[3]
    x = Tensor(np.ones((4, 2), np.float32))
    np.testing.assert_array_equal(model(x).data, modules[2](modules[1](modules[0](x))).data)
    assert Sequential()(x) is x
    with pytest.raises(TypeError, match="argument 1 is a function"):
        Sequential(modules[0], functional.relu)
    many = Sequential(*(nn.Linear(1, 1) for _ in range(12)))
    assert [name for name, _ in many.named_parameters()][::2] == [f"{i}.weight" for i in range(12)]


def test_a_sequential_of_names_its_slices_and_what_is_appended_are_pytorchs(torch):
    def build(library):
        parts = OrderedDict(conv=library.Linear(2, 3), act=library.ReLU())
        parts["2"] = library.Linear(3, 4)
        named = library.Sequential(parts).append(library.Linear(4, 5))
        plain = library.Sequential(*named, library.Tanh())
        return [named, named[1:], named[:1], named[::2], named[1:1], plain[1:3], plain[-2:], plain[:2].append(plain[2])]

    for ours, theirs in zip(build(nn), build(torch.nn), strict=True):
        assert isinstance(ours, Sequential)
        assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: tuple(v.shape) for k, v in theirs.state_dict().items()
        }


def test_the_parts_of_a_sequential_are_the_same_modules():
    first, second, third = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)
    model = Sequential({"first": first, "second": second})
    assert model.first is first
    assert list(model.append(third)) == [first, second, third]
    assert list(model[1:]) == [second, third]
    assert list(model[1:].append(first)) == [second, third, first]  # "2" is taken, so it becomes "3"
    x = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(model(x).data, model[1:](model[:1](x)).data)
    for name in ("a.b", "", "forward", "training"):
        with pytest.raises(ValueError, match=f"Sequential got a module named '{name}'; a name has no dot"):
            Sequential({name: first})
    with pytest.raises(TypeError, match="argument act is a function"):
        Sequential({"first": first, "act": functional.relu})
    with pytest.raises(TypeError, match="argument 3 is a function"):
        model.append(functional.relu)
    assert len(model) == 3


def test_repr_shows_the_structure():
    model = Sequential(nn.Linear(2, 3), Sequential(nn.ReLU(), nn.Linear(3, 1, bias=False)), nn.Dropout(0.25))
    assert repr(model).splitlines() == [
        "Sequential(",
        "  (0): Linear(2, 3)",
        "  (1): Sequential(",
        "    (0): ReLU()",
        "    (1): Linear(3, 1, bias=False)",
        "  )",
        "  (2): Dropout(p=0.25)",
        ")",
    ]


# layers

LAYERS = [
    ("ReLU", {}, "relu"),
    ("LeakyReLU", {"negative_slope": 0.2}, "leaky_relu"),
    ("ELU", {"alpha": 0.5}, "elu"),
    ("GELU", {}, "gelu"),
    ("GELU", {"approximate": "tanh"}, "gelu"),
    ("SiLU", {}, "silu"),
    ("Sigmoid", {}, "sigmoid"),
    ("Tanh", {}, "tanh"),
    ("Softplus", {"beta": 2.0, "threshold": 1.0}, "softplus"),
    ("Softmax", {"dim": 1}, "softmax"),
    ("LogSoftmax", {"dim": 0}, "log_softmax"),
]


@pytest.mark.parametrize(("name", "options", "function"), LAYERS)
def test_activation_modules_are_their_functions(name, options, function, rng):
    x = rng.normal(size=(3, 4, 2))
    expected = getattr(functional, function)(x, **options)
    np.testing.assert_array_equal(getattr(nn, name)(**options)(x).data, expected.data)


def test_gelu_refuses_an_approximation_that_there_is_not():
    with pytest.raises(ValueError, match='GELU: approximate must be "none" or "tanh", got \'sigmoid\''):
        nn.GELU("sigmoid")


@pytest.mark.parametrize(("name", "options", "function"), [*LAYERS, ("Flatten", {}, ""), ("Identity", {}, "")])
def test_layers_agree_with_pytorch_with_given_and_with_default_arguments(name, options, function, rng, torch):
    x = rng.normal(size=(3, 4, 2))
    for arguments in (options, {}):
        if name in ("Softmax", "LogSoftmax") and not arguments:
            continue  # x has 3 axes, of which one must be named
        theirs = getattr(torch.nn, name)(**arguments)(torch.tensor(x)).numpy()
        ours = getattr(nn, name)(**arguments)(Tensor(x)).data
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "before"), [("ReLU", ()), ("LeakyReLU", (0.2,)), ("ELU", (0.5,)), ("SiLU", ()), ("Dropout", (0.3,))]
)
def test_inplace_is_taken_where_pytorch_takes_it_and_leaves_the_input_alone(name, before, rng, torch):
    assert getattr(torch.nn, name)(*before, True).inplace
    x = Tensor(rng.normal(size=(30, 4)), requires_grad=True)
    copy_of_x = x.data.copy()
    results = []
    for layer in (
        getattr(nn, name)(*before),
        getattr(nn, name)(*before, True),
        getattr(nn, name)(*before, inplace=True),
    ):
        manual_seed(1)  # for the mask of dropout
        results.append(layer(x).data)
        np.testing.assert_array_equal(x.data, copy_of_x)
        np.testing.assert_array_equal(results[-1], results[0])
        assert "inplace" not in repr(layer)


# Where the names of arguments are others than PyTorch's, and why.
OTHER_ARGUMENTS = {
    "ConvTranspose2d.forward": "no output_size; output_padding says the same",
    "Embedding.__init__": "no max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze",
    "GRU.__init__": "PyTorch's is written as *args, **kwargs",
    "LSTM.__init__": "PyTorch's is written as *args, **kwargs",
    "MaxPool2d.__init__": "no return_indices",
    "ModuleList.forward": "computes nothing",
    "Module.forward": "a subclass defines it",
    "RNN.__init__": "PyTorch's is written as *args, **kwargs",
    "Sequential.__init__": "only positional",
    "SyncBatchNorm.__init__": "comm in place of process_group",
}


def test_the_arguments_have_pytorchs_names(torch):
    def names(library, layer, method):
        parameters = inspect.signature(getattr(getattr(library, layer), method)).parameters
        return [name for name in parameters if name not in ("device", "dtype")]

    layers = [name for name in nn.__all__ if isinstance(kind := getattr(nn, name), type) and issubclass(kind, Module)]
    found = {
        f"{layer}.{method}"
        for layer in layers
        for method in ("__init__", "forward")
        if names(nn, layer, method) != names(torch.nn, layer, method)
    }
    assert found == set(OTHER_ARGUMENTS)


def test_linear_says_what_it_got():
    layer = nn.Linear(784, 100)
    with pytest.raises(ValueError, match=r"Linear\(784, 100\) got x of shape \(32, 783\); its last axis must be 784"):
        layer(np.zeros((32, 783), np.float32))
    with pytest.raises(ValueError, match=r"got x of shape \(\)"):
        layer(np.float32(1))
    for features in ("a", 2.5, None):
        with pytest.raises(TypeError, match=f"Linear: in_features must be an integer, got {features!r}"):
            nn.Linear(features, 3)
    with pytest.raises(TypeError, match="x float64, weight float32"):
        layer(np.zeros((32, 784)))
    for wrong in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="at least one feature on each side"):
            nn.Linear(*wrong)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.LSTM(3, 4.0), "LSTM: hidden_size must be an integer, got 4.0"),
        (lambda: nn.Embedding(4.0, 3), "Embedding: num_embeddings must be an integer, got 4.0"),
        (lambda: nn.Embedding(4, 3, 1.5), "Embedding: padding_idx must be an integer, got 1.5"),
        (lambda: nn.BatchNorm1d("4"), "BatchNorm1d: num_features must be an integer, got '4'"),
        (lambda: nn.GroupNorm(2.0, 4), "GroupNorm: num_groups must be an integer, got 2.0"),
        (lambda: nn.MultiheadAttention(8.0, 2), "MultiheadAttention: embed_dim must be an integer, got 8.0"),
    ],
)
def test_sizes_that_are_no_integers_are_named(make, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        make()


def test_linear_without_bias_and_with_more_axes():
    layer = nn.Linear(3, 2, bias=False, dtype=np.float64)
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x = np.ones((4, 5, 3))
    np.testing.assert_allclose(layer(x).data, x @ layer.weight.data.T, rtol=1e-15)
    assert layer(np.ones((0, 5, 3))).shape == (0, 5, 2)
    assert layer(np.ones(3)).shape == (2,)


@pytest.mark.parametrize(("start", "end"), [(1, -1), (0, -1), (2, 3), (1, 2), (-2, -1)])
def test_flatten(start, end, torch):
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    expected = torch.nn.Flatten(start, end)(torch.tensor(x)).numpy()
    np.testing.assert_array_equal(nn.Flatten(start, end)(x).data, expected)


def test_dropout_module():
    layer = nn.Dropout(0.25)
    x = Tensor(np.ones((50, 40), np.float32), requires_grad=True)
    y = layer(x)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, y.data)  # the same mask both ways
    assert layer.eval()(x) is x
    assert (nn.Dropout(1.0)(x).data == 0).all()
    assert nn.Dropout(0.0)(x) is x
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        nn.Dropout(1.5)


def test_a_small_network_learns_the_digits():
    train, _ = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x, y = train[np.arange(len(train))]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.reshape(len(x), -1)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (model(x.reshape(len(x), -1)).argmax(1) == y).mean() > 0.9


# ModuleList


def test_a_module_list_is_pytorchs_list(torch):
    ours = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 4)])
    theirs = torch.nn.ModuleList([torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)])
    ours.append(nn.Linear(4, 5)).extend(nn.Linear(5, 5) for _ in range(2))
    theirs.append(torch.nn.Linear(4, 5)).extend(torch.nn.Linear(5, 5) for _ in range(2))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(ours) == len(theirs) == 5
    assert [layer.out_features for layer in ours[1:4]] == [layer.out_features for layer in theirs[1:4]]
    assert isinstance(ours[1:4], nn.ModuleList)
    assert list(ours[1:4].state_dict()) == list(theirs[1:4].state_dict())
    assert ours[-1] is list(ours)[4]
    replacement = nn.Linear(5, 7)
    ours[-1] = replacement
    assert ours[4] is replacement
    assert list(ours.state_dict()) == list(theirs.state_dict())


CHANGES = {
    "insert": lambda layers, make: layers.insert(1, make(7, 3)),
    "pop": lambda layers, make: layers.pop(1),
    "pop the last": lambda layers, make: layers.pop(-1),
    "del": lambda layers, make: layers.__delitem__(-2),
    "del several": lambda layers, make: layers.__delitem__(slice(0, 2)),
    "+=": lambda layers, make: layers.__iadd__(type(layers)().extend([make(3, 8), make(8, 9)])),
    "extend": lambda layers, make: layers.extend([make(3, 8), make(8, 9)]),
    "replace": lambda layers, make: layers.__setitem__(-1, make(4, 9)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["ModuleList", "Sequential"])
def test_lists_of_modules_change_as_pytorchs(name, change, torch):
    layers = []
    for library in (nn, torch.nn):
        modules = [library.Linear(2, 3), library.Linear(3, 4), library.Linear(4, 5)]
        layers.append(library.ModuleList(modules) if name == "ModuleList" else library.Sequential(*modules))
        CHANGES[change](layers[-1], library.Linear)
    ours, theirs = layers
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    assert {n: a.shape for n, a in ours.state_dict().items()} == {
        n: tuple(a.shape) for n, a in theirs.state_dict().items()
    }


def test_a_change_that_is_refused_changes_no_list():
    layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    for change in (lambda: layers.insert(0, functional.relu), lambda: layers.__setitem__(0, 3)):
        with pytest.raises(TypeError, match=r"Sequential takes modules; argument 0 is a (function|int)"):
            change()
    with pytest.raises(IndexError):
        layers[2] = nn.ReLU()
    assert [name for name, _ in layers.named_children()] == ["0", "1"]


def test_apply_register_and_add_as_pytorch(torch):
    orders = []
    for library in (nn, torch.nn):
        seen = []
        model = library.Sequential(library.Linear(2, 3), library.Sequential(library.ReLU(), library.Linear(3, 1)))
        assert model.apply(lambda module, seen=seen: seen.append(type(module).__name__)) is model
        orders.append(seen)
    assert orders[0] == orders[1]
    module = Module()
    module.register_parameter("scale", Parameter(np.ones(2)))
    module.add_module("inner", nn.Linear(1, 1))
    assert [name for name, _ in module.named_parameters()] == ["scale", "inner.weight", "inner.bias"]


@pytest.mark.parametrize("state", [None, 3, ["0.weight"]])
def test_a_state_that_is_no_dictionary_is_refused(state):
    with pytest.raises(TypeError, match=r"a state is a dictionary of arrays by name, got a (NoneType|int|list)"):
        nn.Linear(2, 2).load_state_dict(state)


def test_a_module_list_inside_a_module_is_trained_and_saved_but_computes_nothing():
    class Stack(Module):
        def __init__(self):
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    stack = Stack()
    assert [name for name, _ in stack.named_parameters()][-1] == "layers.11.bias"  # not sorted as text
    stack(np.ones((1, 2), np.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())
    with pytest.raises(TypeError, match=r"ModuleList does not define forward"):
        stack.layers(np.ones((1, 2)))


def test_a_module_list_takes_modules_only():
    layers = nn.ModuleList()
    with pytest.raises(TypeError, match="ModuleList takes modules; argument 0 is a function"):
        layers.append(functional.relu)
    with pytest.raises(IndexError):
        layers[0] = nn.ReLU()
    layers.append(nn.ReLU())
    with pytest.raises(TypeError, match="argument 0 is a int"):
        layers[0] = 3
    assert len(layers) == 1


def test_a_state_of_what_is_no_number_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: array.copy() for name, array in model.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    state["1.weight"] = np.zeros((1, 3), "V2")
    with pytest.raises(ValueError, match=r"1\.weight: \|V2, not numbers"):
        model.load_state_dict(state)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_buffer_of_none_is_none_until_an_array_is_assigned(torch):
    for library, ones in ((nn, np.ones), (torch.nn, torch.ones)):
        module = library.Module()
        module.register_buffer("mask", None)
        assert module.mask is None
        assert list(module.named_buffers()) == list(module.state_dict()) == []
        assert module.double().mask is None
        module.mask = ones(3)
        assert [name for name, _ in module.named_buffers()] == list(module.state_dict()) == ["mask"]


def with_buffers(library, array):
    """The same module in both libraries; one linear layer is in two places."""

    class Net(library.Module):
        def __init__(self):
            super().__init__()
            self.inner = library.Sequential(library.Linear(3, 2), library.BatchNorm1d(2))
            self.again = self.inner[0]
            self.register_parameter("scale", library.Parameter(array([1.0])))
            self.register_buffer("seen", array([0.0]))
            self.register_buffer("mask", array([1.0, 0.0]), persistent=False)
            self.register_buffer("kept", array([2.0]), persistent=False)
            self.register_buffer("kept", array([3.0]))

    return Net()


def test_parameters_and_buffers_are_listed_as_pytorch_lists_them(torch):
    ours = with_buffers(nn, lambda values: np.array(values, np.float32))
    theirs = with_buffers(torch.nn, torch.tensor)
    for options in ({}, {"prefix": "net"}, {"recurse": False}, {"prefix": "a.b", "recurse": False}):
        for what in ("named_parameters", "named_buffers"):
            names = [{name for name, _ in getattr(model, what)(**options)} for model in (ours, theirs)]
            assert names[0] == names[1], (what, options)
    assert len(list(ours.parameters(recurse=False))) == len(list(ours.buffers(recurse=False))) - 2 == 1
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert "mask" not in ours.state_dict()
    assert ours.double().mask.dtype == np.float64


@pytest.mark.parametrize("value", [np.eye(2, dtype=np.float32), Tensor(np.eye(2, dtype=np.float32)), 1.0])
def test_what_is_no_parameter_does_not_take_the_place_of_one(value, torch):
    """It would leave the parameters and the state without a word; PyTorch refuses it as well."""
    layer, theirs = nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="cannot assign"):
        theirs.weight = value if isinstance(value, float) else torch.eye(2)
    with pytest.raises(TypeError, match=r"Linear\.weight is a Parameter; .*Assign a Parameter or None, or to \.data"):
        layer.weight = value
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer.weight, layer.bias = Parameter(np.eye(2)), None
    layer.weight.data = np.ones((2, 2))
    layer.bias = Parameter(np.ones(2))
    assert len(layer.state_dict()) == 2


def test_what_is_no_module_does_not_take_the_place_of_one():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"Sequential\.0 is a Module; assigning a function would take it out"):
        setattr(model, "0", functional.relu)
    setattr(model, "0", nn.ReLU())
    assert list(model.parameters()) == []
