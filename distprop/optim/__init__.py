"""Optimizers over flat buffers, schedules as functions of the step, and gradient clipping."""

from distprop.optim import schedule
from distprop.optim.clip import clip_grad_norm_, clip_grad_value_
from distprop.optim.optimizer import Optimizer, Schedule
from distprop.optim.sgd import SGD

__all__ = ["SGD", "Optimizer", "Schedule", "clip_grad_norm_", "clip_grad_value_", "schedule"]
