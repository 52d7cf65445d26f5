"""Makes `uldm_cli/assets/lpips-alex.safetensors`: AlexNet's features and LPIPS's linear weights, in one file.

usage: python scripts/make_lpips.py ALEXNET_FEATURES.safetensors

The features (float16, torchvision's keys `features.*`) are torchvision's AlexNet, trained on ImageNet. The linear
weights are version 0.1 of the `lpips` package, which must be installed.
"""

import sys
from pathlib import Path

import lpips
import torch
from safetensors.torch import load_file, save_file

OUT = Path(__file__).parents[1] / "uldm_cli" / "assets" / "lpips-alex.safetensors"


def main() -> None:
    features = {key: value.half() for key, value in load_file(sys.argv[1]).items()}
    linear = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu", weights_only=True
    )
    save_file(features | linear, OUT)


if __name__ == "__main__":
    main()
