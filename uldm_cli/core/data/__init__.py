"""Sets of images, and the streams of batches that training and evaluation read from them."""

from uldm_cli.core.data.arrays import ArrayImages, read_idx, read_mosaic
from uldm_cli.core.data.files import FileImages, open_images
from uldm_cli.core.data.streams import Batch, Draws, ImageSet, sequential, stream

__all__ = [
    "ArrayImages",
    "Batch",
    "Draws",
    "FileImages",
    "ImageSet",
    "open_images",
    "read_idx",
    "read_mosaic",
    "sequential",
    "stream",
]
