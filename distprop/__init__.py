"""Distributed data-parallel training on CPUs: backpropagation in NumPy, gradients averaged over MPI.

>>> import distprop as dp
>>> from distprop import functional as F
>>> model = dp.nn.Sequential(dp.nn.Linear(64, 32), dp.nn.ReLU(), dp.nn.Linear(32, 10))
>>> optimizer = dp.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> trainer = dp.Trainer(model, F.cross_entropy, optimizer, batch_size=128)

The same script runs on one process with `python script.py` and on N with `distprop run -n N script.py`.
"""

from typing import TYPE_CHECKING, Any

from distprop import comm, data, functional, nn, optim, testing
from distprop.comm import world
from distprop.metrics import StepResult
from distprop.parallel import DataParallel
from distprop.random import manual_seed
from distprop.tape import no_grad
from distprop.tensor import Parameter, Tensor, record, tensor
from distprop.weights import load_state, save_state

if TYPE_CHECKING:
    from distprop.train import Trainer

__version__ = "0.1.0"

__all__ = [
    "DataParallel",
    "Parameter",
    "StepResult",
    "Tensor",
    "Trainer",
    "__version__",
    "comm",
    "data",
    "functional",
    "load_state",
    "manual_seed",
    "nn",
    "no_grad",
    "optim",
    "record",
    "save_state",
    "tensor",
    "testing",
    "world",
]


def __getattr__(name: str) -> Any:
    """`Trainer` is loaded when it is first asked for: with what it writes and watches it is a fifth of the import."""
    if name == "Trainer":
        from distprop.train import Trainer

        globals()["Trainer"] = Trainer
        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
