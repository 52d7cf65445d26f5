"""Sets of images, and the streams of batches that training and evaluation read from them."""

from uldm_cli.core.data.arrays import ArrayImages, read_cifar, read_idx, read_mosaic
from uldm_cli.core.data.files import FileImages, open_files, open_images, read_list
from uldm_cli.core.data.preparing import Preparation
from uldm_cli.core.data.streams import Batch, Draws, ImageSet, filled, sequential, stream

__all__ = [
    "ArrayImages",
    "Batch",
    "Draws",
    "FileImages",
    "ImageSet",
    "Preparation",
    "filled",
    "open_files",
    "open_images",
    "read_cifar",
    "read_idx",
    "read_list",
    "read_mosaic",
    "sequential",
    "stream",
]
