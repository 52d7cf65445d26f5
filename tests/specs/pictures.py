"""Pictures whose pixels follow from a number, and files made of them: for the tests of published sets, by runpy."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from uldm_cli.core.data import ImageSet


def pixels(number: int, width: int = 16, height: int = 16) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(number: int, format: str = "PNG", width: int = 16, height: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(number, width, height)).save(
        file, format, **({"lossless": True} if format == "WEBP" else {})
    )
    return file.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def shows(data: ImageSet, *numbers: int) -> bool:
    """Whether the set has the images of these numbers, in this order."""
    return len(data) == len(numbers) and all(
        np.array_equal(data[i][0].permute(1, 2, 0), pixels(number, data.size, data.size))
        for i, number in enumerate(numbers)
    )
