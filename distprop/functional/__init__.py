"""Differentiable operations as plain functions, with PyTorch's names, arguments and defaults.

    from distprop import functional as F
    loss = F.cross_entropy(F.linear(x, weight, bias), labels)

Each accepts tensors or NumPy arrays and returns a tensor.
"""

from distprop.functional.activation import (
    elu,
    gelu,
    leaky_relu,
    log_softmax,
    relu,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)
from distprop.functional.attention import scaled_dot_product_attention
from distprop.functional.batch_norm import batch_norm
from distprop.functional.conv import conv1d, conv2d, conv_transpose2d
from distprop.functional.dropout import dropout
from distprop.functional.embedding import embedding, take
from distprop.functional.group_norm import group_norm
from distprop.functional.join import concatenate, split, stack, where
from distprop.functional.linear import linear
from distprop.functional.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
)
from distprop.functional.norm import layer_norm, rms_norm
from distprop.functional.pad import pad
from distprop.functional.pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from distprop.functional.recurrent import gru, lstm, rnn

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "binary_cross_entropy_with_logits",
    "concatenate",
    "conv1d",
    "conv2d",
    "conv_transpose2d",
    "cross_entropy",
    "dropout",
    "elu",
    "embedding",
    "gelu",
    "group_norm",
    "gru",
    "huber_loss",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "lstm",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "pad",
    "relu",
    "rms_norm",
    "rnn",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "split",
    "stack",
    "take",
    "tanh",
    "where",
]
