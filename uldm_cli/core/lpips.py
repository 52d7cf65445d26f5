"""LPIPS: learned perceptual image patch similarity (Zhang et al. 2018), version 0.1, over one of three networks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import alexnet, squeezenet1_1, vgg16

from uldm_cli.errors import UldmError, UsageError

Net = Literal["alex", "vgg", "squeeze"]
NETS: tuple[Net, ...] = get_args(Net)


@dataclass(frozen=True)
class Backbone:
    """A network of torchvision, and what LPIPS takes of it."""

    title: str
    build: Callable[..., Any]
    cuts: tuple[int, ...]
    """Ends of the slices of its `features`: what comes out of each is compared."""
    widths: tuple[int, ...]
    """Channels that come out of each slice."""
    smallest: int
    """Side of the smallest image that something comes out of every slice for."""


BACKBONES: dict[Net, Backbone] = {
    "alex": Backbone("AlexNet", alexnet, (2, 5, 8, 10, 12), (64, 192, 384, 256, 256), 31),
    "vgg": Backbone("VGG16", vgg16, (4, 9, 16, 23, 30), (64, 128, 256, 512, 512), 16),
    "squeeze": Backbone(
        "SqueezeNet 1.1", squeezenet1_1, (2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512), 17
    ),
}

_SLACK = 1e-3  # of a range, for what rounding adds


class LPIPS(nn.Module):
    """Perceptual distance of image pairs: 0 for equal ones, about 0.7 for very different ones.

    Args:
        weights: `features.*` as torchvision names them and `lin{i}.model.1.weight` as the authors do.
        net: whose features are compared.
        checked: refuse images whose values are outside of the range. A loss in training takes what a decoder
            overshoots, and does not wait for the device to tell.
        sha256: of the file that the features come from, hexadecimal; kept to tell weights apart.

    Raises:
        UldmError: a weight is missing or has the wrong shape.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], net: Net = "vgg", *, checked: bool = True, sha256: str | None = None
    ) -> None:
        super().__init__()
        self.net: Net = net
        self.backbone = BACKBONES[net]
        self.checked, self.sha256 = checked, sha256
        self.features = _empty_features(net).to_empty(device="cpu")
        for layer in self.features.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the slices' outputs are kept
        self.scaling_layer = ScalingLayer()
        for i, width in enumerate(self.backbone.widths):
            self.add_module(f"lin{i}", NetLinLayer(width))
        try:
            self.load_state_dict({key: value.float() for key, value in weights.items()})
        except RuntimeError as e:
            raise UldmError(f"the LPIPS weights do not fit: {str(e).splitlines()[-1].strip()}") from e
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where it is, and so where images must be."""
        return self.scaling_layer.shift.device

    def forward(self, x0: Tensor, x1: Tensor, *, normalize: bool = False, spatial: bool = False) -> Tensor:
        """Distance of each pair, `[N, 1, 1, 1]`.

        Args:
            x0: images `[N, 3 or 1, H, W]` in [-1, 1]; H and W at least `backbone.smallest`.
            x1: those to compare them with.
            normalize: the images are in [0, 1] instead.
            spatial: give a map `[N, 1, H, W]` instead, of how much each place differs.

        Raises:
            UsageError: the images are too small, of other shapes, or outside of the range.
        """
        differences = self.differences(x0, x1, normalize=normalize)
        return spatial_map(differences, x0.shape[2:]) if spatial else total(differences)

    def differences(self, x0: Tensor, x1: Tensor, *, normalize: bool = False) -> list[Tensor]:
        """What `forward` sums up: `[N, 1, h, w]` of each slice."""
        if x0.shape != x1.shape:
            raise UsageError(f"LPIPS compares images of one shape, not {list(x0.shape)} with {list(x1.shape)}")
        pairs = zip(self._slices(x0, normalize), self._slices(x1, normalize), strict=True)
        return [self.get_submodule(f"lin{i}")((_unit(f0) - _unit(f1)).square()) for i, (f0, f1) in enumerate(pairs)]

    def embed(self, x: Tensor, *, normalize: bool = False) -> Tensor:
        """Vectors `[N, D]` whose squared distances are the LPIPS of the images, for searches among many."""
        parts = []
        for i, features in enumerate(self._slices(x, normalize)):
            weight = getattr(self, f"lin{i}").weight / (features.shape[2] * features.shape[3])
            parts.append((_unit(features) * weight.sqrt()).flatten(1))
        return torch.cat(parts, 1)

    def _slices(self, x: Tensor, normalize: bool) -> Iterator[Tensor]:
        self._check(x, normalize)
        h = self.scaling_layer((2 * x - 1 if normalize else x).expand(-1, 3, -1, -1))
        for start, end in pairwise((0, *self.backbone.cuts)):
            h = self.features[start:end](h)
            yield h

    def _check(self, x: Tensor, normalize: bool) -> None:
        least = self.backbone.smallest
        if min(x.shape[2:]) < least:
            size = f"{x.shape[3]}x{x.shape[2]}"
            raise UsageError(
                f"LPIPS by {self.backbone.title} takes images of {least} pixels a side or more, not {size}"
            )
        if self.checked:
            low, high = (float(value) for value in x.detach().aminmax())
            bottom = 0 if normalize else -1
            if not (low >= bottom - _SLACK and high <= 1 + _SLACK):  # so that NaN is refused, too
                raise UsageError(f"LPIPS was given values from {low:g} to {high:g}, and takes {bottom} to 1")


class ScalingLayer(nn.Module):
    """Images in [-1, 1] with ImageNet's mean and deviation taken out."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> the same
        return (x - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """Weighted sum of squared differences over the channels. Its weight has the authors' name, `model.1.weight`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.Conv2d(width, 1, 1, bias=False, device="meta").to_empty(device="cpu")
        self.model = nn.Sequential(nn.Identity(), layer)  # where the authors have dropout, in training this layer

    @property
    def weight(self) -> Tensor:
        """`[1, C, 1, 1]`, none below 0."""
        return self.get_parameter("model.1.weight")

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, 1, h, w)
        return (x * self.weight).sum(1, keepdim=True)


def full_precision() -> AbstractContextManager[None]:
    """For distances that are reported: convolutions on CUDA would else round their input to TF32's 10 bits."""
    now = torch.backends.cudnn
    return now.flags(enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False)


def total(differences: list[Tensor]) -> Tensor:
    """The distance `[N, 1, 1, 1]`: the mean over the places, summed over the slices."""
    distance = torch.zeros_like(spatial_average(differences[0]))
    for difference in differences:
        distance = distance + spatial_average(difference)
    return distance


def spatial_average(x: Tensor) -> Tensor:
    """The mean over all places: `[N, C, 1, 1]` of `[N, C, H, W]`."""
    return x.mean((2, 3), keepdim=True)


def spatial_map(differences: list[Tensor], size: tuple[int, ...]) -> Tensor:
    """How much each place differs, `[N, 1, *size]`: the slices' maps, bilinearly enlarged and summed."""
    enlarged = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in differences]
    return torch.stack(enlarged).sum(0)


def drawn_features(net: Net) -> dict[str, Tensor]:
    """Stand-ins for trained `features.*`, the same every time: He's normal weights, and biases of zero.

    What is computed with them shows how a program behaves, and says nothing about how images look.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, like in _empty_features(net).state_dict().items():
        drawn[f"features.{name}"] = torch.zeros(like.shape)
        if name.endswith("weight"):
            deviation = (2 / like[0].numel()) ** 0.5
            drawn[f"features.{name}"] = torch.randn(like.shape, generator=generator) * deviation
    return drawn


def _empty_features(net: Net) -> nn.Sequential:
    """On the meta device: else the classifier's weights, up to 124 M, would be drawn too."""
    with torch.device("meta"):
        return BACKBONES[net].build(weights=None).features[: BACKBONES[net].cuts[-1]]


def _unit(features: Tensor) -> Tensor:
    """Features of unit length at each position; epsilon outside the root, as the authors have it.

    The length is computed in float32 or better, and the root of 0, whose slope is infinite, is not taken: where a ReLU
    leaves nothing of all features, as on an even background, the gradient would be NaN.
    """
    squares = features.square().sum(1, keepdim=True, dtype=torch.promote_types(features.dtype, torch.float32))
    return features / (squares.clamp(min=1e-38).sqrt() + 1e-10)
