"""The patch discriminator of adversarial training (Isola et al. 2017), with batch statistics over all processes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uldm_cli.core import collectives
from uldm_cli.core.device import at_least_float32
from uldm_cli.errors import UsageError


class PatchGAN(nn.Module):
    """Tells real images from reconstructions patch by patch: images `[N, C, H, W]` to logits `[N, 1, h, w]`.

    Each logit sees a square of `receptive_field` pixels. The defaults see 46 pixels and make 7x7 logits of 64x64
    pixels. The published autoencoders were trained against one convolution more, which sees 70: channels
    (64, 128, 256, 512), kernels all 4, strides (2, 2, 2, 1, 1), paddings all 1. Modules carry the published names.

    Args:
        in_channels: of the images.
        channels: widths of the layers between image and logits.
        kernels: side of each convolution's kernel; one more than there are channels, as in the other two lists.
        strides: of each convolution.
        paddings: zeros around the input of each convolution.

    Raises:
        UsageError: the lists are of different lengths.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (64, 128, 256),
        kernels: Sequence[int] = (4, 4, 4, 4),
        strides: Sequence[int] = (2, 2, 2, 1),
        paddings: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        for name, given in (("kernels", kernels), ("strides", strides), ("paddings", paddings)):
            if len(given) != len(channels) + 1:
                what = f"the discriminator's {name} have {len(given)} entries"
                raise UsageError(what, f"Its {len(channels)} channels need {len(channels) + 1}: one a convolution")
        self.receptive_field = receptive_field(kernels, strides)
        layers: list[nn.Module] = []
        widths = [in_channels, *channels, 1]
        for i, (kernel, stride, padding) in enumerate(zip(kernels, strides, paddings, strict=True)):
            inner = 0 < i < len(channels)
            # What a bias inside would add, the normalisation takes away.
            layers.append(nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding, bias=not inner))
            if inner:
                layers.append(BatchNorm2d(widths[i + 1]))
            if i < len(channels):
                layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.main = nn.Sequential(*layers)
        self.main.apply(_draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Side, in pixels, of the square that one output of stacked convolutions depends on."""
    side = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        side = (side - 1) * stride + kernel
    return side


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of the batches of all processes together.

    With one process, and in evaluation, it is torch's. Torch's own for several processes refuses CPUs.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> the same
        if not self.training or collectives.world() == 1:
            return super().forward(x)
        h = at_least_float32(x)
        sums = torch.cat([h.sum((0, 2, 3)), h.new_tensor([h.numel() / h.shape[1]])])
        sums = collectives.differentiable_total(sums)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        # The mean first: as the difference of two large numbers a small variance would be lost.
        centred = h - mean[:, None, None]
        variance = collectives.differentiable_total(centred.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var), self.momentum)


def _draw(module: nn.Module) -> None:
    """The published start values (Radford et al. 2016, section 3)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
