"""Modules, layers and their initialisation, with PyTorch's names, arguments and parameter layouts."""

from distprop.nn import init
from distprop.nn.conv import Conv1d, Conv2d, ConvTranspose2d
from distprop.nn.embedding import Embedding
from distprop.nn.layers import (
    ELU,
    GELU,
    Dropout,
    Flatten,
    Identity,
    LeakyReLU,
    Linear,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from distprop.nn.module import Module, ModuleList, Sequential
from distprop.nn.norm import BatchNorm1d, BatchNorm2d, GroupNorm, LayerNorm, RMSNorm, SyncBatchNorm
from distprop.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from distprop.nn.recurrent import GRU, LSTM, RNN
from distprop.nn.transformer import MultiheadAttention, TransformerEncoderLayer
from distprop.tensor import Parameter

__all__ = [
    "ELU",
    "GELU",
    "GRU",
    "LSTM",
    "RNN",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "Dropout",
    "Embedding",
    "Flatten",
    "GroupNorm",
    "Identity",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "Module",
    "ModuleList",
    "MultiheadAttention",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "SyncBatchNorm",
    "Tanh",
    "TransformerEncoderLayer",
    "init",
]
