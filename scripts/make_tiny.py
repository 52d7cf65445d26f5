"""Makes uldm_cli/assets/tiny-fashion-mnist.png: python scripts/make_tiny.py FOLDER

FOLDER holds the four gzipped IDX files of Fashion-MNIST. The picture has a row for each of the ten classes, of 360
images of 28x28 pixels: the first 320 of the class in the training set, then the first 40 of it in the test set.
"""

import sys
from pathlib import Path

ROW = {"train": 320, "t10k": 40}


def main(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    from uldm_cli.core.data import read_idx

    blocks = []
    for part, count in ROW.items():
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        first = np.stack([images[labels == label][:count] for label in range(10)])  # [10, count, 28, 28]
        blocks.append(first.transpose(0, 2, 1, 3).reshape(10 * 28, count * 28))
    target = Path(__file__).parents[1] / "uldm_cli/assets/tiny-fashion-mnist.png"
    Image.fromarray(np.hstack(blocks)).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
