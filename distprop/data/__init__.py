"""Where examples come from and which rank gets which of them.

A dataset answers "these rows, please"; a `Loader` deals the rows of every global batch out to the ranks. Two datasets
come with the package: `load_digits`, embedded, and `load_mnist`, read from disk or downloaded once a machine; CIFAR's
files are read where they are. `Augmented` changes images and `RandomWindows` cuts a text anew in every epoch.
"""

from distprop.data.augment import Augmented, RandomCrop, RandomHorizontalFlip, RandomRotation, RandomShift
from distprop.data.background import ahead
from distprop.data.cifar import load_cifar10, load_cifar100
from distprop.data.dataset import ArrayDataset, Dataset
from distprop.data.digits import load_digits
from distprop.data.loader import Loader
from distprop.data.mnist import load_mnist, read_idx
from distprop.data.text import CharVocabulary, RandomWindows, TextWindows

__all__ = [
    "ArrayDataset",
    "Augmented",
    "CharVocabulary",
    "Dataset",
    "Loader",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RandomRotation",
    "RandomShift",
    "RandomWindows",
    "TextWindows",
    "ahead",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_mnist",
    "read_idx",
]
