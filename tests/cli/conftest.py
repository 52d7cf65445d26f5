"""What the tests of commands share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def photos(empty_folder: Path) -> Path:
    """Ten small colour photographs in `photos`."""
    Path("photos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(f"photos/{number}.png")
    return Path("photos")
