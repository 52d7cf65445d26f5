"""LPIPS: learned perceptual image patch similarity (Zhang et al. 2018), version 0.1 weights, AlexNet features."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import alexnet

from uldm_cli.errors import UldmError

CUTS = (2, 5, 8, 10, 12)
"""Ends of the five slices of AlexNet's feature layers: after each activation."""
WIDTHS = (64, 192, 384, 256, 256)


class LPIPS(nn.Module):
    """Perceptual distance of image pairs: 0 for equal ones, about 0.7 for very different ones.

    Args:
        weights: `features.*` as torchvision names them and `lin{0..4}.model.1.weight` as the authors do.

    Raises:
        UldmError: a weight is missing or has the wrong shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):  # else the classifier's 58 M weights would be drawn too
            features = alexnet(weights=None).features[: CUTS[-1]]
        self.features = features.to_empty(device="cpu")
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the slices' outputs are kept
        for i, width in enumerate(WIDTHS):
            self.register_buffer(f"lin{i}", torch.zeros(1, width, 1, 1))
        # ImageNet's mean and deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        renamed = {key.replace(".model.1.weight", ""): value.float() for key, value in weights.items()}
        try:
            self.load_state_dict(renamed)
        except RuntimeError as e:
            raise UldmError(f"the LPIPS weights do not fit: {str(e).splitlines()[-1].strip()}") from e
        self.requires_grad_(False).eval()

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Distance of each pair, `[N, 1, 1, 1]`, for images `[N, 3 or 1, H, W]` in [-1, 1], H and W at least 31."""
        distance = x0.new_zeros(len(x0), 1, 1, 1)
        f0, f1 = self._input(x0), self._input(x1)
        for i, (start, end) in enumerate(pairwise((0, *CUTS))):
            f0, f1 = self.features[start:end](f0), self.features[start:end](f1)
            difference = (_unit(f0) - _unit(f1)).square() * getattr(self, f"lin{i}")
            distance = distance + difference.sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return distance

    def _input(self, x: Tensor) -> Tensor:
        return (x.expand(-1, 3, -1, -1) - self.shift) / self.scale


def _unit(features: Tensor) -> Tensor:
    """Features of unit length at each position; epsilon outside the root, as the authors have it."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
