"""Where examples come from and which rank gets which of them.

A dataset answers "these rows, please"; a `Loader` deals the rows of every global batch out to the ranks. Two datasets
come with the package: `load_digits`, embedded, and `load_mnist`, read from disk or downloaded once a machine.
"""

from distprop.data.dataset import ArrayDataset, Dataset
from distprop.data.digits import load_digits
from distprop.data.loader import Loader
from distprop.data.mnist import load_mnist, read_idx

__all__ = ["ArrayDataset", "Dataset", "Loader", "load_digits", "load_mnist", "read_idx"]
