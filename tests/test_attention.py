"""Attention and the transformer's encoder layer, held against finite differences and PyTorch."""

import sys

import numpy as np
import pytest

import distprop.random
import test_functional as table
from distprop import functional as F
from distprop import nn
from distprop.tensor import Tensor
from distprop.testing import check_grads
from test_functional import Operation, masked

attention = F.scaled_dot_product_attention


def booleans(*shape):
    """A mask in which the first query may look nowhere."""

    def make(rng, *arrays):
        mask = rng.uniform(size=shape) < 0.6
        mask[..., 0, :] = False
        return (mask,)

    return make


def broadcasting(torch, q, k, v, mask):
    """PyTorch's does not take masks of fewer than two axes."""
    whole = mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, whole)


SELF = ((2, 4, 3),) * 3
CROSS = ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 2))
NO_KEYS = ((2, 3, 4), (2, 0, 4), (2, 0, 5))
OPERATIONS = [
    Operation(
        attention,
        [SELF, CROSS, ((3, 2), (4, 2), (4, 2)), ((1, 1, 1),) * 3, ((0, 3, 4), (0, 2, 4), (0, 2, 4)), NO_KEYS],
        [{}, {"is_causal": True}, {"scale": 0.3}, {"scale": -1.5, "is_causal": True}],
        name="attention",
        loosen=4,  # the gradient of a score is the difference of two sums, which cancel where one key wins
    ),
    Operation(
        attention,
        [((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 3)), ((6, 3, 5), (2, 4, 5), (3, 4, 2)), ((1, 2, 3),) * 3],
        [{"enable_gqa": True}, {"enable_gqa": True, "scale": 0.4}],
        name="attention of grouped queries",
        loosen=4,  # as above
    ),
    Operation(attention, [SELF], [{}, {"scale": 12.0}], name="attention masked", constants=booleans(2, 4, 4)),
    Operation(attention, [CROSS], [{}, {"scale": 9.0}], name="attention masked for all", constants=booleans(3, 5)),
    Operation(attention, [CROSS], name="attention masked for all heads", constants=booleans(2, 1, 3, 5)),
    Operation(
        attention,
        [CROSS],
        name="attention masked keys",
        torch=lambda torch, *inputs: broadcasting(torch, *inputs),
        constants=lambda *_: (np.array([1, 0, 1, 1, 0]) > 0,),
    ),
    Operation(
        attention,
        [(*CROSS, (3, 5)), (*CROSS, (2, 2, 3, 5)), (*CROSS, (2, 1, 1, 5)), (*SELF, (1, 4, 4)), (*SELF, (4,))],
        name="attention with scores added",
        torch=lambda torch, *inputs: broadcasting(torch, *inputs),
    ),
    Operation(
        lambda q, k, v, m: attention(q, k, v, m, is_causal=True),
        [SELF],
        name="attention masked and causal",
        torch=lambda torch, q, k, v, m: torch.nn.functional.scaled_dot_product_attention(q, k, v, m.tril()),
        constants=booleans(4, 4),
    ),
    Operation(
        lambda q, k, v, m: attention(q, k, v, m, is_causal=True),
        [(*SELF, (4, 4))],
        name="attention with scores added and causal",
        torch=lambda torch, q, k, v, m: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, m + torch.zeros_like(m).masked_fill(~torch.ones(4, 4, dtype=bool).tril(), -torch.inf)
        ),
    ),
    Operation(attention, [CROSS], [{"dropout_p": 0.4}], name="attention dropout", torch=None, constants=masked),
    Operation(
        attention,
        [SELF],
        [{"dropout_p": 0.5, "is_causal": True}],
        name="attention dropout causal",
        torch=None,
        constants=masked,
    ),
]
CASES = [table.Case(o, shapes, options) for o in OPERATIONS for shapes in o.shapes for options in o.options]


@pytest.fixture(params=[None, 1], ids=["", "block by block"])
def block(request, monkeypatch):
    """The whole at once, and each entry of the first axis by itself."""
    if request.param is not None:
        monkeypatch.setattr(sys.modules["distprop.functional.attention"], "_BLOCK", request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("check", table.CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
def test_operation(check, case, block):
    check(case)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", [case for case in CASES if case.operation.torch is not None], ids=str)
def test_values_and_gradients_agree_with_pytorch(case, dtype, torch, block):
    table.test_values_and_gradients_agree_with_pytorch(case, dtype, torch)


def test_huge_scores_do_not_overflow(torch, rng):
    q, k, v = (rng.normal(size=(2, 5, 4)) * 1e3 for _ in range(3))
    for options in ({}, {"is_causal": True}):
        ours = [Tensor(x, requires_grad=True) for x in (q, k, v)]
        theirs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
        value = attention(*ours, **options)
        expected = torch.nn.functional.scaled_dot_product_attention(*theirs, **options)
        (value * value).sum().backward()
        (expected * expected).sum().backward()
        np.testing.assert_allclose(value.data, expected.detach().numpy(), rtol=1e-12)
        # Where one score wins, the gradient of q and k is the difference of two equal sums over 4 products
        # 2 v v', times a key or a query: zero but for their rounding, which depends on the processor's kernels.
        rounding = np.finfo(float).eps * 4 * 2 * np.abs(v).max() ** 2 * max(np.abs(q).max(), np.abs(k).max())
        for our, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(our.grad, their.grad.numpy(), rtol=1e-9, atol=rounding)


def test_forbidden_scores_may_be_larger_than_any_number():
    """Neither exp of a score that is masked out nor the largest score comes from there."""
    q, v = np.ones((1, 2, 1), np.float32), np.array([[[2.0], [7.0]]], np.float32)
    for size in (1.0, 1e3, 1e30):
        k = np.array([[[1.0], [size]]], np.float32)
        for options in ({"attn_mask": [[True, False]]}, {"is_causal": True}):
            value = attention(q, k, v, **options)
            assert value.data[0, 0, 0] == 2


def test_the_output_lies_in_memory_as_the_queries_do():
    """Heads made by reshape and transpose go back to (batch, steps, width) without a copy."""
    projected = np.random.default_rng(0).normal(size=(2, 5, 24))
    q, k, v = (part.reshape(2, 5, 4, 2).transpose(0, 2, 1, 3) for part in np.split(projected, 3, axis=-1))
    value = attention(q, k, v)
    merged = value.transpose(1, 2).flatten(2)
    assert np.shares_memory(merged.data, value.data)
    contiguous = [np.ascontiguousarray(x) for x in (q, k, v)]
    np.testing.assert_allclose(value.data, attention(*contiguous).data, rtol=1e-14)


def test_dropout_masks_belong_to_the_rows_of_the_global_batch(rng):
    q, k, v = (rng.normal(size=(5, 2, 3, 4)) for _ in range(3))

    def run(rows):
        distprop.random.at(7, step=3, first_row=rows.start)
        return attention(q[rows], k[rows], v[rows], dropout_p=0.5).data

    whole = run(slice(0, 5))
    np.testing.assert_array_equal(np.concatenate([run(slice(0, 2)), run(slice(2, 5))]), whole)
    assert not np.allclose(whole, attention(q, k, v).data)


def test_dropout_keeps_the_mean(rng):
    v = np.ones((300, 1, 20, 8))
    mixed = attention(rng.normal(size=(300, 1, 20, 8)), rng.normal(size=(300, 1, 20, 8)), v, dropout_p=0.3).data
    assert mixed.mean() == pytest.approx(1, abs=0.01)
    assert mixed.std() > 0.1
    np.testing.assert_array_equal(attention(v, v, v, dropout_p=1.0).data, np.zeros_like(v))


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((2, 3, 4), (2, 3, 5), (2, 3, 5)), {}, ValueError, r"query \(2, 3, 4\), key \(2, 3, 5\), value \(2, 3, 5\)"),
        (((2, 3, 4), (2, 3, 4), (2, 2, 4)), {}, ValueError, r"needs \(..., L, E\), \(..., S, E\) and \(..., S, Ev\)"),
        (((2, 3, 4), (1, 3, 4), (2, 3, 4)), {}, ValueError, "key"),
        (((4,), (4,), (4,)), {}, ValueError, r"query \(4,\)"),
        (
            ((2, 3, 4),) * 3,
            {"attn_mask": np.ones((3, 2), bool)},
            ValueError,
            r"mask of shape \(3, 2\).*here \(2, 3, 3\)",
        ),
        (((2, 3, 4),) * 3, {"attn_mask": np.ones((3, 1, 1, 1), bool)}, ValueError, "mask of shape"),
        (((2, 3, 4),) * 3, {"attn_mask": np.ones((3, 3), int)}, TypeError, "mask of dtype int64.* boolean, or float64"),
        (((2, 3, 4),) * 3, {"attn_mask": np.ones((3, 3), "f")}, TypeError, "mask of dtype float32"),
        (((2, 3, 4),) * 3, {"dropout_p": 1.5}, ValueError, "probability between 0 and 1, got 1.5"),
        ([(3, 4, 2), (2, 4, 2), (3, 4, 2)], {"enable_gqa": True}, ValueError, "several for each one of the keys"),
        ([(4, 2), (4, 2), (4, 2)], {"enable_gqa": True}, ValueError, "several for each one of the keys"),
        ([(4, 4, 2), (2, 4, 2), (2, 5, 2)], {"enable_gqa": True}, ValueError, "it needs"),
    ],
)
def test_attention_says_what_does_not_fit(shapes, options, error, message):
    with pytest.raises(error, match=f"scaled_dot_product_attention .*{message}"):
        attention(*(np.ones(shape) for shape in shapes), **options)


def test_attention_wants_one_dtype():
    x = np.ones((2, 3, 4))
    with pytest.raises(TypeError, match="one floating-point dtype, got query float64, key float32"):
        attention(x, x.astype(np.float32), x)


# the modules


def into(theirs, module):
    """PyTorch's parameters in our module."""
    module.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    assert list(module.state_dict()) == list(theirs.state_dict())


def back(torch, module, theirs):
    """Ours in PyTorch's, and different from before."""
    rng = np.random.default_rng(8)
    for parameter in module.parameters():
        parameter.data = rng.normal(0, 0.4, parameter.shape)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in module.state_dict().items()})


def assert_same_gradients(module, theirs):
    for (name, ours), other in zip(module.named_parameters(), theirs.parameters(), strict=True):
        scale = max(1, abs(other.grad.numpy()).max())
        np.testing.assert_allclose(ours.grad, other.grad.numpy(), rtol=0, atol=1e-12 * scale, err_msg=name)


def inputs_for(kind, batch_first, rng):
    """Query, key and value: one tensor, two, or three."""

    def sequence(steps):
        shape = (steps, 6) if "alone" in kind else (2, steps, 6) if batch_first else (steps, 2, 6)
        return rng.normal(size=shape)

    q = sequence(4)
    if "self" in kind:
        return [q, q, q], 4
    k = sequence(5)
    return [q, k, k if "memory" in kind else sequence(5)], 5


MASKS = {
    "no mask": lambda rng, keys: {},
    "padding": lambda rng, keys: {"key_padding_mask": np.arange(keys)[None] >= np.array([[keys - 2], [keys]])},
    "booleans": lambda rng, keys: {"attn_mask": np.triu(np.ones((4, keys), bool), 2)},
    "numbers": lambda rng, keys: {"attn_mask": rng.normal(size=(4, keys))},
    "each head": lambda rng, keys: {"attn_mask": rng.normal(size=(2 * 3, 4, keys))},
    "both": lambda rng, keys: {
        "attn_mask": np.triu(np.ones((4, keys), bool), 1),
        "key_padding_mask": np.arange(keys)[None] >= np.array([[keys], [keys - 1]]),
    },
    "both as numbers": lambda rng, keys: {
        "attn_mask": rng.normal(size=(4, keys)),
        "key_padding_mask": np.where(np.arange(keys)[None] >= np.array([[keys], [keys - 1]]), -np.inf, 0.0),
    },
    "booleans and numbers": lambda rng, keys: {
        "attn_mask": rng.normal(size=(4, keys)),
        "key_padding_mask": np.arange(keys)[None] >= np.array([[keys], [keys - 1]]),
    },
}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ["self", "memory", "three"])
@pytest.mark.parametrize(("batch_first", "bias", "need_weights"), [(True, True, False), (False, False, True)])
def test_multihead_attention_is_pytorchs(masks, kind, batch_first, bias, need_weights, torch, rng):
    theirs = torch.nn.MultiheadAttention(6, 3, bias=bias, batch_first=batch_first).double()
    module = nn.MultiheadAttention(6, 3, bias=bias, batch_first=batch_first).double()
    into(theirs, module)
    back(torch, module, theirs)
    arrays, keys = inputs_for(kind, batch_first, rng)
    options = MASKS[masks](rng, keys)
    unique = {id(a): (Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)) for a in arrays}
    ours, others = zip(*(unique[id(a)] for a in arrays), strict=True)
    output, weights = module(*ours, need_weights=need_weights, **options)
    converted = {name: torch.tensor(mask) for name, mask in options.items()}
    expected, expected_weights = theirs(*others, need_weights=need_weights, **converted)
    np.testing.assert_allclose(output.data, expected.detach().numpy(), rtol=1e-11, atol=1e-13)
    loss, expected_loss = (output * output).sum(), (expected * expected).sum()
    if need_weights:
        np.testing.assert_allclose(weights.data, expected_weights.detach().numpy(), rtol=1e-11, atol=1e-13)
        loss, expected_loss = loss + (weights**3).sum(), expected_loss + (expected_weights**3).sum()
    else:
        assert weights is None
    loss.backward()
    expected_loss.backward()
    assert_same_gradients(module, theirs)
    for our, other in unique.values():
        np.testing.assert_allclose(our.grad, other.grad.numpy(), rtol=1e-10, atol=1e-12)


MORE = [
    {"kdim": 5, "vdim": 4},
    {"vdim": 2, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "bias": False},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 3},
]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("masks", [*MASKS, "causal"])
@pytest.mark.parametrize("more", MORE, ids=str)
@pytest.mark.parametrize(("batch_first", "need_weights"), [(True, False), (False, True)])
def test_widths_of_their_own_and_keys_that_no_mask_hides(more, masks, batch_first, need_weights, torch, rng):
    theirs = torch.nn.MultiheadAttention(6, 3, batch_first=batch_first, **more).double()
    module = nn.MultiheadAttention(6, 3, batch_first=batch_first, **more).double()
    into(theirs, module)
    back(torch, module, theirs)
    widths = 6, more.get("kdim", 6), more.get("vdim", 6)
    arrays = [rng.normal(size=(2, n, w) if batch_first else (n, 2, w)) for n, w in zip((4, 5, 5), widths, strict=True)]
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    others = [torch.tensor(a, requires_grad=True) for a in arrays]
    if masks == "causal":
        padding = MASKS["padding"](rng, 5)["key_padding_mask"] & (np.arange(5) > 0)
        future = torch.tensor(np.triu(np.ones((4, 5), bool), 1))
        options, converted = {"is_causal": True, "key_padding_mask": padding}, {"attn_mask": future}
        converted["key_padding_mask"] = torch.tensor(padding)
    else:
        options = MASKS[masks](rng, 5)
        converted = {name: torch.tensor(mask) for name, mask in options.items()}
    output, weights = module(*ours, need_weights=need_weights, **options)
    expected, expected_weights = theirs(*others, need_weights=need_weights, **converted)
    np.testing.assert_allclose(output.data, expected.detach().numpy(), rtol=1e-11, atol=1e-13)
    if need_weights:
        np.testing.assert_allclose(weights.data, expected_weights.detach().numpy(), rtol=1e-11, atol=1e-13)
    (output * output).sum().backward()
    (expected * expected).sum().backward()
    assert_same_gradients(module, theirs)
    for our, other in zip(ours, others, strict=True):
        np.testing.assert_allclose(our.grad, other.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_causal_numbers_with_keys_that_no_mask_hides(rng):
    module = nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True).double()
    x, scores = rng.normal(size=(2, 4, 6)), rng.normal(size=(4, 4))
    output, _ = module(x, x, x, attn_mask=scores, is_causal=True)
    expected, _ = module(x, x, x, attn_mask=np.where(np.tri(4), scores, -np.inf))
    np.testing.assert_allclose(output.data, expected.data, rtol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_of_one_sequence(batch_first, torch, rng):
    theirs = torch.nn.MultiheadAttention(6, 2, batch_first=batch_first).double()
    module = nn.MultiheadAttention(6, 2, batch_first=batch_first).double()
    into(theirs, module)
    q, k, v = inputs_for("alone", batch_first, rng)[0]
    padding = np.arange(5) > 3
    output, weights = module(q, k, v, padding, need_weights=True, average_attn_weights=False)
    expected = theirs(*map(torch.tensor, (q, k, v)), torch.tensor(padding), average_attn_weights=False)
    np.testing.assert_allclose(output.data, expected[0].detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(weights.data, expected[1].detach().numpy(), rtol=1e-12)


def test_causal_needs_no_mask_and_goes_with_padding(torch, rng):
    module = nn.MultiheadAttention(6, 2, batch_first=True).double()
    x = rng.normal(size=(2, 4, 6))
    future = np.triu(np.ones((4, 4), bool), 1)
    padding = np.arange(4)[None] >= np.array([[4], [3]])
    for need_weights in (False, True):
        output, _ = module(x, x, x, padding, is_causal=True, need_weights=need_weights)
        expected, _ = module(x, x, x, padding, attn_mask=future)
        np.testing.assert_allclose(output.data, expected.data, rtol=1e-12)
        moved = x.copy()
        moved[:, 2:] += 1  # the future
        before, after = (module(y, y, y, is_causal=True, need_weights=need_weights)[0].data for y in (x, moved))
        np.testing.assert_array_equal(before[:, :2], after[:, :2])


def test_weights_are_given_unless_they_are_declined_as_in_pytorch(rng):
    x = rng.normal(size=(3, 2, 4)).astype(np.float32)
    module = nn.MultiheadAttention(4, 2)
    assert module(x, x, x)[1].shape == (2, 3, 3)
    assert module(x, x, x, need_weights=False)[1] is None


def test_attention_weights_with_dropout_are_those_that_were_used(rng):
    module = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True).double()
    x = rng.normal(size=(2, 6, 4))
    distprop.random.manual_seed(1)
    expected, _ = module(x, x, x)
    distprop.random.manual_seed(1)
    output, weights = module(x, x, x, need_weights=True)
    np.testing.assert_allclose(output.data, expected.data, rtol=1e-12)
    assert (weights.data == 0).any()
    module.eval()
    np.testing.assert_allclose(module(x, x, x, need_weights=True)[1].data.sum(-1), np.ones((2, 6)))


def test_first_weights_are_scaled_as_pytorchs(torch):
    for module in (nn.MultiheadAttention(64, 4), torch.nn.MultiheadAttention(64, 4)):
        bound = np.sqrt(6 / (64 + 3 * 64))
        weight = module.in_proj_weight.detach()
        assert 0.97 * bound < abs(np.asarray(weight.data)).max() <= bound
        assert 0.12 < abs(np.asarray(module.out_proj.weight.detach().data)).max() <= 1 / 8
        for bias in (module.in_proj_bias, module.out_proj.bias):
            assert not np.asarray(bias.detach().data).any()


ENCODERS = [
    {"norm_first": norm_first, "activation": activation, "batch_first": batch_first, "bias": bias}
    for norm_first, activation, batch_first, bias in [
        (False, "relu", False, True),
        (True, "gelu", True, True),
        (True, "relu", False, False),
        (False, "gelu", True, False),
    ]
]


@pytest.mark.filterwarnings("ignore:Support for mismatched|enable_nested_tensor")
@pytest.mark.parametrize("masks", ["no mask", "padding", "booleans", "both"])
@pytest.mark.parametrize("options", ENCODERS, ids=str)
def test_encoder_layer_is_pytorchs(options, masks, torch, rng):
    theirs = torch.nn.TransformerEncoderLayer(6, 3, 10, dropout=0.0, layer_norm_eps=1e-3, **options).double()
    module = nn.TransformerEncoderLayer(6, 3, 10, dropout=0.0, layer_norm_eps=1e-3, **options).double()
    into(theirs, module)
    back(torch, module, theirs)
    x = rng.normal(size=(2, 4, 6) if options["batch_first"] else (4, 2, 6))
    names = {"attn_mask": "src_mask", "key_padding_mask": "src_key_padding_mask"}
    given = {names[name]: mask for name, mask in MASKS[masks](rng, 4).items()}
    ours, other = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    output, expected = module(ours, **given), theirs(other, **{n: torch.tensor(m) for n, m in given.items()})
    np.testing.assert_allclose(output.data, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    (output**3).sum().backward()
    (expected**3).sum().backward()
    assert_same_gradients(module, theirs)
    np.testing.assert_allclose(ours.grad, other.grad.numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", ENCODERS, ids=str)
def test_a_causal_encoder_layer_is_pytorchs_and_that_with_an_upper_triangular_mask(options, padded, torch, rng):
    theirs = torch.nn.TransformerEncoderLayer(6, 3, 10, dropout=0.0, **options).double()
    module = nn.TransformerEncoderLayer(6, 3, 10, dropout=0.0, **options).double()
    into(theirs, module)
    back(torch, module, theirs)
    x, future = rng.normal(size=(2, 4, 6) if options["batch_first"] else (4, 2, 6)), np.triu(np.ones((4, 4), bool), 1)
    padding = np.arange(4)[None] >= np.array([[4], [3]]) if padded else None
    ours, other = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    output = module(ours, None, padding, is_causal=True)
    expected = theirs(other, torch.tensor(future), torch.tensor(padding) if padded else None, is_causal=True)
    np.testing.assert_allclose(output.data, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(output.data, module(x, future, padding).data, rtol=1e-12, atol=1e-14)
    first = 0 if options["batch_first"] else (slice(None), 0)  # a sequence without padding, without a batch
    np.testing.assert_allclose(module(x[first], is_causal=True).data, output.data[first], rtol=1e-12, atol=1e-14)
    (output**3).sum().backward()
    (expected**3).sum().backward()
    assert_same_gradients(module, theirs)
    np.testing.assert_allclose(ours.grad, other.grad.numpy(), rtol=1e-9, atol=1e-11)


def test_encoder_layer_of_one_sequence_and_with_a_function(torch, rng):
    theirs = torch.nn.TransformerEncoderLayer(6, 3, 10, activation=torch.nn.functional.silu).double().eval()
    module = nn.TransformerEncoderLayer(6, 3, 10, activation=F.silu).double().eval()
    into(theirs, module)
    x, padding = rng.normal(size=(4, 6)), np.array([False, False, False, True])
    expected = theirs(torch.tensor(x), src_key_padding_mask=torch.tensor(padding)).detach().numpy()
    np.testing.assert_allclose(module(x, src_key_padding_mask=padding).data, expected, rtol=1e-11)


DROPOUTS = ("self_attn", "dropout", "dropout1", "dropout2")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_of_an_encoder_layer_stands_where_pytorchs_does(name, norm_first, torch, rng):
    """One of them drops everything and the others nothing, in training mode."""
    theirs = torch.nn.TransformerEncoderLayer(6, 3, 10, dropout=0.0, norm_first=norm_first).double()
    module = nn.TransformerEncoderLayer(6, 3, 10, dropout=0.0, norm_first=norm_first).double()
    into(theirs, module)
    back(torch, module, theirs)
    x = rng.normal(size=(4, 2, 6))
    whole = module(x).data
    for layer in (module, theirs):
        setattr(getattr(layer, name), "dropout" if name == "self_attn" else "p", 1.0)
    output, expected = module(x), theirs(torch.tensor(x))
    np.testing.assert_allclose(output.data, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    assert not np.allclose(output.data, whole)
    (output**3).sum().backward()
    (expected**3).sum().backward()
    assert_same_gradients(module, theirs)


def test_all_dropouts_of_an_encoder_layer_have_the_probability_it_was_given():
    module = nn.TransformerEncoderLayer(6, 3, 10, dropout=0.3)
    assert [getattr(module, name).p for name in DROPOUTS[1:]] == [0.3] * 3
    assert module.self_attn.dropout == 0.3
    assert nn.TransformerEncoderLayer(6, 3).self_attn.dropout == 0.1


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_in_an_encoder_layer_belongs_to_the_examples(batch_first, rng):
    module = nn.TransformerEncoderLayer(6, 3, 10, dropout=0.5, batch_first=batch_first).double()
    x = rng.normal(size=(5, 4, 6))

    def run(rows):
        distprop.random.at(7, step=3, first_row=rows.start)
        part = x[rows] if batch_first else x[rows].transpose(1, 0, 2)
        output = module(part).data
        return output if batch_first else output.transpose(1, 0, 2)

    whole = run(slice(0, 5))
    np.testing.assert_allclose(np.concatenate([run(slice(0, 2)), run(slice(2, 5))]), whole, rtol=1e-12)
    module.eval()
    assert not np.allclose(whole, run(slice(0, 5)))


PADDING = np.array([[False, False, False], [False, False, True]])


@pytest.mark.parametrize("masks", [{"is_causal": True}, {"src_key_padding_mask": PADDING}], ids=["causal", "padding"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_gradients_agree_with_finite_differences(norm_first, masks, rng):
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
    module = nn.TransformerEncoderLayer(4, 2, 5, **options).double()
    check_grads(lambda x: module(x, **masks), rng.normal(size=(2, 3, 4)), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    "masks", [{}, {"is_causal": True}, {"key_padding_mask": PADDING}], ids=["none", "causal", "padding"]
)
def test_multihead_attention_gradients_agree_with_finite_differences(masks, rng):
    module = nn.MultiheadAttention(4, 2, batch_first=True).double()
    inputs = [rng.normal(size=(2, 3, 4)) for _ in range(3)]
    check_grads(lambda q, k, v: module(q, k, v, **masks)[0], inputs, atol=1e-7, rtol=1e-6)


def test_an_empty_batch_passes_through():
    module = nn.TransformerEncoderLayer(6, 3, 10, batch_first=True)
    x = Tensor(np.empty((0, 4, 6), np.float32), requires_grad=True)
    module(x, is_causal=True).sum().backward()
    assert x.grad.shape == (0, 4, 6)
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(parameter.grad, np.zeros(parameter.shape), err_msg=name)


def test_the_modules_say_what_does_not_fit():
    with pytest.raises(ValueError, match="embed_dim 6; 4 heads do not divide it"):
        nn.MultiheadAttention(6, 4)
    with pytest.raises(ValueError, match="dropout between 0 and 1, got 2"):
        nn.MultiheadAttention(6, 3, 2)
    with pytest.raises(ValueError, match='"relu", "gelu" or a function, got \'tanh\''):
        nn.TransformerEncoderLayer(6, 3, activation="tanh")
    module, x = nn.MultiheadAttention(6, 3, batch_first=True), np.ones((2, 4, 6), np.float32)
    with pytest.raises(ValueError, match=r"MultiheadAttention\(6, 3\) got query \(2, 4, 5\).*\(batch, steps, 6\)"):
        module(x[..., :5], x, x)
    with pytest.raises(ValueError, match=r"\(batch, steps, one of \(6, 5, 6\)\)"):
        nn.MultiheadAttention(6, 3, kdim=5, batch_first=True)(x, x, x)
    with pytest.raises(ValueError, match="a kdim and a vdim of at least 1, got 0 and None"):
        nn.MultiheadAttention(6, 3, kdim=0)
    with pytest.raises(ValueError, match=r"key \(1, 4, 6\)"):
        module(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="key and value alike"):
        module(x, x, x[:, :3])
    with pytest.raises(ValueError, match=r"attn_mask of shape \(4, 3\).*= \(4, 4\) or .* = \(6, 4, 4\)"):
        module(x, x, x, attn_mask=np.ones((4, 3), bool))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \(4, 2\).*\(batch, keys\) = \(2, 4\)"):
        module(x, x, x, np.ones((4, 2), bool))
    with pytest.raises(ValueError, match=r"key_padding_mask of shape \(1, 4\).*must be \(keys,\) = \(4,\)"):
        module(x[0], x[0], x[0], np.ones((1, 4), bool))
    with pytest.raises(TypeError, match="mask of dtype float64; it must be boolean or float32"):
        module(x, x, x, attn_mask=np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"src of shape \(2, 4, 5\); it must be \(steps, batch, 6\)"):
        nn.TransformerEncoderLayer(6, 3)(x[..., :5])
    message = r"src_key_padding_mask of shape \(5,\) for src of shape \(4, 6\); it must be \(steps,\) = \(4,\)"
    with pytest.raises(ValueError, match=message):
        nn.TransformerEncoderLayer(6, 3)(x[0], src_key_padding_mask=np.ones(5, bool))
