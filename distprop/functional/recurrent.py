"""Recurrent layers: one direction of one layer over a whole sequence is one operation.

The products with the inputs of all time steps are one matrix product; only what depends on the step before is computed
step by step. Backward goes through time in one loop that keeps the gradients of the pre-activations of every step, so
each weight's gradient is one matrix product over all steps at the end, written where Allreduce reads it. As a node for
each time step, 100 steps of an LSTM would be 2,000 operations on the tape.

Shapes everywhere: x `(steps, batch, input)`, a state `(batch, hidden)`, the output `(steps, batch, hidden)`. With
`reverse` time runs from the last step to the first: output[t] has seen x[t] and all that come after it.

Source of backpropagation through time: Werbos, 1990, Proceedings of the IEEE 78(10).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distprop.functional.check import same_dtype
from distprop.sums import sum_over
from distprop.tape import Array, Out
from distprop.tensor import Operand, Tensor, as_tensor, record


def rnn(
    input: Operand,
    h0: Operand,
    weight_ih: Operand,
    weight_hh: Operand,
    bias_ih: Operand | None = None,
    bias_hh: Operand | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
) -> Tensor:
    """h_t = φ(a_t), a_t = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh, with φ = tanh or relu; returns h of all steps.

    Shapes: W_ih `(hidden, input)`, W_hh `(hidden, hidden)`, both biases `(hidden,)` or None; the rest as above.
    Derivative: with δ_t the gradient of h_t, its own and what comes back from step t + 1, α_t = δ_t φ′(a_t) is that of
    a_t; then δ_{t−1} gets α_t W_hh, dx_t = α_t W_ih, dW_ih = Σ α_tᵀ x_t, dW_hh = Σ α_tᵀ h_{t−1}, db = Σ α_t. The
    gradient of h0 is a product of all the steps' φ′ W_hh: that is how it vanishes or explodes.
    Source: Elman, "Finding structure in time", 1990, Cognitive Science 14.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'rnn: nonlinearity must be "tanh" or "relu", got {nonlinearity!r}')
    inputs = _checked(
        "rnn", 1, input, h0=h0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh
    )
    _, initial, _, w_hh, *biases = inputs
    sums = _input_sums(inputs, 2, len(biases))
    _, before, after, order = _states(initial.data, len(sums), reverse)
    recurrent = np.ascontiguousarray(w_hh.data.T)  # a third faster than the transposed view, step after step
    for t in order:
        sums[t] += before[t] @ recurrent
        if nonlinearity == "tanh":
            np.tanh(sums[t], out=after[t])
        else:
            np.maximum(sums[t], 0, out=after[t])

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        d_sums = np.empty_like(sums)
        d_h = np.zeros_like(initial.data)
        for t in reversed(order):
            d_h += grad[t]
            slope = 1 - after[t] * after[t] if nonlinearity == "tanh" else after[t] > 0
            np.multiply(d_h, slope, out=d_sums[t])
            if t != order[0] or initial.requires_grad:
                d_h = d_sums[t] @ w_hh.data
        return _gradients(inputs, out, d_sums, d_sums, before, [d_h])

    return record(after, inputs, vjp)


def lstm(
    input: Operand,
    h0: Operand,
    c0: Operand,
    weight_ih: Operand,
    weight_hh: Operand,
    bias_ih: Operand | None = None,
    bias_hh: Operand | None = None,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Long short-term memory; returns h of all steps, and the last step's cell c as `(1, batch, hidden)`.

        i, f, o = σ(a_i), σ(a_f), σ(a_o),  g = tanh(a_g),  a = W_ih x_t + b_ih + W_hh h_{t−1} + b_hh
        c_t = f c_{t−1} + i g,  h_t = o tanh(c_t)

    Shapes: W_ih `(4·hidden, input)`, W_hh `(4·hidden, hidden)`, both biases `(4·hidden,)` or None, the gates in
    PyTorch's order i, f, g, o; the rest as above.
    Derivative: with δ_t the gradient of h_t, γ_t = δ_t o (1 − tanh² c_t) + γ_{t+1} f_{t+1} is that of c_t; then
    da_i = γ g i(1 − i), da_f = γ c_{t−1} f(1 − f), da_g = γ i (1 − g²), da_o = δ tanh(c_t) o(1 − o), and the rest is
    as for `rnn`. Along c the gradient is only multiplied with f: near 1, it does not vanish.
    Source: Hochreiter and Schmidhuber, 1997, Neural Computation 9(8); with the forget gate of Gers et al., 2000.
    """
    inputs = _checked(
        "lstm", 4, input, h0=h0, c0=c0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh
    )
    _, initial, initial_cell, _, w_hh, *biases = inputs
    gates = _input_sums(inputs, 3, len(biases))
    steps, batch, hidden = len(gates), *initial.shape
    i_f_g_o = gates.reshape(steps, batch, 4, hidden).swapaxes(1, 2)
    states, before, after, order = _states(initial.data, steps, reverse)
    _, cell_before, cell, _ = _states(initial_cell.data, steps, reverse)
    squashed = np.empty_like(after)  # tanh(c)
    recurrent = np.ascontiguousarray(w_hh.data.T)
    scale = np.repeat(np.array([0.5, 0.5, 1, 0.5], gates.dtype), hidden)  # i, f, o are sigmoids, g is a tanh
    shift = np.repeat(np.array([0.5, 0.5, 0, 0.5], gates.dtype), hidden)
    for t in order:
        gates[t] += before[t] @ recurrent
        _squash(gates[t], scale, shift)
        i, f, g, o = i_f_g_o[t]
        np.multiply(f, cell_before[t], out=cell[t])
        cell[t] += i * g
        np.tanh(cell[t], out=squashed[t])
        np.multiply(o, squashed[t], out=after[t])
    last = 0 if reverse else -1
    states[last] = cell[last]
    value = states[:-1] if reverse else states[1:]

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        d_gates = np.empty_like(gates)
        d_i_f_g_o = d_gates.reshape(steps, batch, 4, hidden).swapaxes(1, 2)
        d_h, d_c = np.zeros_like(initial.data), grad[last].copy()
        d_output = grad[1:] if reverse else grad[:-1]
        for t in reversed(order):
            i, f, g, o = i_f_g_o[t]
            d_i, d_f, d_g, d_o = d_i_f_g_o[t]
            d_h += d_output[t]
            d_c += d_h * o * (1 - squashed[t] * squashed[t])
            np.multiply(d_c * g, i - i * i, out=d_i)
            np.multiply(d_c * cell_before[t], f - f * f, out=d_f)
            np.multiply(d_c * i, 1 - g * g, out=d_g)
            np.multiply(d_h * squashed[t], o - o * o, out=d_o)
            d_c *= f
            if t != order[0] or initial.requires_grad:
                d_h = d_gates[t] @ w_hh.data
        return _gradients(inputs, out, d_gates, d_gates, before, [d_h, d_c])

    both = record(value, inputs, vjp)
    return (both[1:], both[:1]) if reverse else (both[:-1], both[-1:])


def gru(
    input: Operand,
    h0: Operand,
    weight_ih: Operand,
    weight_hh: Operand,
    bias_ih: Operand | None = None,
    bias_hh: Operand | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Gated recurrent unit; returns h of all steps.

        p = W_ih x_t + b_ih,  q = W_hh h_{t−1} + b_hh
        r, z = σ(p_r + q_r), σ(p_z + q_z),  n = tanh(p_n + r q_n),  h_t = (1 − z) n + z h_{t−1}

    Shapes: W_ih `(3·hidden, input)`, W_hh `(3·hidden, hidden)`, both biases `(3·hidden,)` or None, the gates in
    PyTorch's order r, z, n; the rest as above.
    Derivative: with δ the gradient of h_t, dp_n = δ (1 − z)(1 − n²), dq_n = r dp_n, dp_r = dq_r = dp_n q_n r(1 − r),
    dp_z = dq_z = δ (h_{t−1} − n) z(1 − z), and step t − 1 gets δ z + dq W_hh. The rest is as for `rnn`.
    Source: Cho et al., 2014, arXiv:1406.1078, in the variant that applies r after the matrix product, as PyTorch and
    cuDNN do; in the paper it is applied to h_{t−1}.
    """
    inputs = _checked(
        "gru", 3, input, h0=h0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh
    )
    _, initial, _, w_hh, *biases = inputs
    gates = _input_sums(inputs, 2, min(len(biases), 1))
    steps, batch, hidden = len(gates), *initial.shape
    r_z_n = gates.reshape(steps, batch, 3, hidden).swapaxes(1, 2)
    _, before, after, order = _states(initial.data, steps, reverse)
    q_n = np.empty_like(after)
    recurrent = np.ascontiguousarray(w_hh.data.T)
    for t in order:
        q = before[t] @ recurrent
        if biases:
            q += biases[1].data
        q_n[t] = q[:, 2 * hidden :]
        r_and_z = gates[t, :, : 2 * hidden]
        r_and_z += q[:, : 2 * hidden]
        _squash(r_and_z, 0.5, 0.5)
        r, z, n = r_z_n[t]
        n += r * q_n[t]
        np.tanh(n, out=n)
        np.multiply(z, before[t] - n, out=after[t])
        after[t] += n

    def vjp(grad: Array, out: Out) -> list[Array | None]:
        d_p, d_q = np.empty_like(gates), np.empty_like(gates)
        d_by_gate = d_q.reshape(steps, batch, 3, hidden).swapaxes(1, 2)
        d_h = np.zeros_like(initial.data)
        for t in reversed(order):
            r, z, n = r_z_n[t]
            d_r, d_z, d_q_n = d_by_gate[t]
            d_h += grad[t]
            d_n = d_h * (1 - z) * (1 - n * n)
            np.multiply(d_n, r, out=d_q_n)
            np.multiply(d_n * q_n[t], r - r * r, out=d_r)
            np.multiply(d_h * (before[t] - n), z - z * z, out=d_z)
            d_p[t] = d_q[t]
            d_p[t, :, 2 * hidden :] = d_n
            if t != order[0] or initial.requires_grad:
                d_h *= z
                d_h += d_q[t] @ w_hh.data
        return _gradients(inputs, out, d_p, d_q, before, [d_h])

    return record(after, inputs, vjp)


def _squash(a: Array, scale: Array | float, shift: Array | float) -> None:
    """In place, σ(a) = (1 + tanh(a/2))/2 where both numbers are 1/2, and tanh(a) where they are 1 and 0.

    NumPy has tanh vectorised, so this is all gates of an LSTM at once, and nothing overflows.
    """
    a *= scale
    np.tanh(a, out=a)
    a *= scale
    a += shift


def _states(initial: Array, steps: int, reverse: bool) -> tuple[Array, Array, Array, Sequence[int]]:
    """Room for the states of all steps, with `initial` in it.

    Returns all of it `(steps + 2, batch, hidden)`, the views `before` and `after` whose [t] is the state before and
    after step t, and the order of the steps. Behind the last state is room for one more, where `lstm` puts its cell.
    """
    states = np.empty((steps + 2, *initial.shape), initial.dtype)
    if reverse:
        states[-1] = initial
        return states, states[2:], states[1:-1], range(steps - 1, -1, -1)
    states[0] = initial
    return states, states[:-2], states[1:-1], range(steps)


def _input_sums(inputs: Sequence[Tensor], weight: int, biases: int) -> Array:
    """W_ih x of all steps in one product `(steps, batch, gates)`, plus the first `biases` of the biases.

    `inputs` are as `_checked` returns them, W_ih at number `weight`.
    """
    x, w_ih = inputs[0], inputs[weight]
    sums = x.data.reshape(-1, x.shape[2]) @ w_ih.data.T
    if biases:
        sums += sum(bias.data for bias in inputs[weight + 2 : weight + 2 + biases])
    return sums.reshape(*x.shape[:2], len(w_ih.data))


def _gradients(
    inputs: Sequence[Tensor], out: Out, d_input: Array, d_hidden: Array, before: Array, d_states: list[Array]
) -> list[Array | None]:
    """The gradients of all `inputs`, in the order of `_checked`, from those of W_ih x + b_ih and W_hh h + b_hh."""
    number = 1 + len(d_states)  # of W_ih
    x, w_ih, w_hh = inputs[0], inputs[number], inputs[number + 1]
    for_ih, for_hh = (d.reshape(-1, d.shape[2]) for d in (d_input, d_hidden))
    dx = (for_ih @ w_ih.data).reshape(x.shape) if x.requires_grad else None
    results = [dx, *(d if given.requires_grad else None for d, given in zip(d_states, inputs[1:], strict=False))]
    for w, d, rows in ((w_ih, for_ih, x.data), (w_hh, for_hh, before)):
        target = out[len(results)]
        results.append(np.matmul(d.T, rows.reshape(-1, rows.shape[2]), out=target) if w.requires_grad else None)
    for b, d in zip(inputs[number + 2 :], (for_ih, for_hh), strict=False):
        results.append(sum_over(d, (0,), out=out[len(results)]) if b.requires_grad else None)
    return results


def _checked(operation: str, gates: int, input: Operand, **others: Operand | None) -> tuple[Tensor, ...]:
    """(x, *others) as tensors, without the biases if they are None, after a look at all shapes and dtypes."""
    x = as_tensor(input)
    tensors = {name: as_tensor(value) for name, value in others.items() if value is not None}
    if x.ndim != 3 or len(x.data) == 0:
        raise ValueError(f"{operation} got x of shape {x.shape}; it needs (steps, batch, input) with at least one step")
    if len(others) - len(tensors) == 1:
        raise ValueError(f"{operation} takes both biases or none, got only one")
    hidden = tensors["weight_hh"].shape[-1] if tensors["weight_hh"].ndim else 0
    expected: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("h0", "c0"), (x.shape[1], hidden)),
        "weight_ih": (gates * hidden, x.shape[2]),
        "weight_hh": (gates * hidden, hidden),
        **dict.fromkeys(("bias_ih", "bias_hh"), (gates * hidden,)),
    }
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{operation} with x of shape {x.shape} and hidden size {hidden} got {name} of shape {tensor.shape}; "
                f"expected {expected[name]}"
            )
    same_dtype(operation, x=x, **tensors)
    return (x, *tensors.values())
