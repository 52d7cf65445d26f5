"""Sets of images to train on and to measure with, one file a family; what several parts of uldm name is here."""

from uldm_cli.specs.datasets.base import Dataset
from uldm_cli.specs.datasets.files import Images
from uldm_cli.specs.datasets.mnist import MNIST, FashionMNIST, Tiny

__all__ = ["MNIST", "Dataset", "FashionMNIST", "Images", "Tiny"]
