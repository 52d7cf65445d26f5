"""Makes `uldm_cli/assets/lpips-*.safetensors`: LPIPS's linear weights of each network, and AlexNet's features.

usage: python scripts/make_lpips.py ALEXNET_FEATURES.safetensors

The features (float16, torchvision's keys `features.*`) are torchvision's AlexNet, trained on ImageNet. The linear
weights are version 0.1 of the `lpips` package, which must be installed. The other networks' features are too large to
embed: `lpips-vgg` and `lpips-squeeze` hold the linear weights alone.
"""

import sys
from pathlib import Path

import lpips
import torch
from safetensors.torch import load_file, save_file

ASSETS = Path(__file__).parents[1] / "uldm_cli" / "assets"
WEIGHTS = Path(lpips.__file__).parent / "weights" / "v0.1"


def main() -> None:
    features = {key: value.half() for key, value in load_file(sys.argv[1]).items()}
    for net in ("alex", "vgg", "squeeze"):
        linear = torch.load(WEIGHTS / f"{net}.pth", map_location="cpu", weights_only=True)
        save_file((features if net == "alex" else {}) | linear, ASSETS / f"lpips-{net}.safetensors")


if __name__ == "__main__":
    main()
