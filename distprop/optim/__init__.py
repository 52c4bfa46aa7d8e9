"""Optimizers over flat buffers, schedules as functions of the step, gradient clipping, averaged weights."""

from distprop.optim import schedule
from distprop.optim.adagrad import Adagrad
from distprop.optim.adam import Adam, AdamW
from distprop.optim.average import ExponentialMovingAverage
from distprop.optim.clip import clip_grad_norm_, clip_grad_value_
from distprop.optim.groups import decay_groups
from distprop.optim.layerwise import LAMB, LARS
from distprop.optim.optimizer import Optimizer, Schedule
from distprop.optim.plateau import ReduceOnPlateau
from distprop.optim.rmsprop import RMSprop
from distprop.optim.sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "ExponentialMovingAverage",
    "Optimizer",
    "RMSprop",
    "ReduceOnPlateau",
    "Schedule",
    "clip_grad_norm_",
    "clip_grad_value_",
    "decay_groups",
    "schedule",
]
