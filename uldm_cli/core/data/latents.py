"""Latents that were computed before training: making them, measuring them, and a set that reads them from files."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.autoencoders import has_posterior
from uldm_cli.core.data.streams import Draws

LABEL = "label"
FLIPPED = "_flipped"
"""Ending of the name of a tensor of mirrored images' latents."""


@torch.no_grad()
def latents_of(autoencoder: Any, images: Tensor) -> dict[str, Tensor]:
    """All that training needs to know of images `[N, C, H, W]` in [-1, 1], unscaled, each `[N, z, h, w]`.

    Returns:
        `mean` and `logvar` of an autoencoder with a posterior, so that each epoch draws anew; else `z`.
    """
    if has_posterior(autoencoder):
        mean, logvar = autoencoder.moments(images)
        return {"mean": mean, "logvar": logvar}
    return {"z": autoencoder.to_latent(images)}


@torch.no_grad()
def fingerprint(config: str, module: nn.Module) -> str:
    """SHA-256 of a network: of the text of its config, and of its tensors, by name, floating point as float32.

    It does not depend on the file that the network was loaded from, nor on what else lies there.
    """
    digest = hashlib.sha256(config.encode())
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor.long()
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bytes of tensors on the CPU, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """What the deviation of latents follows from: how many numbers, their sum and sum of squares, that of variances.

    Of posteriors, the numbers are the means; both orientations count.
    """
    means = [value for name, value in tensors.items() if name.removesuffix(FLIPPED) in ("z", "mean")]
    logvars = [value for name, value in tensors.items() if name.removesuffix(FLIPPED) == "logvar"]
    return {
        "count": sum(value.numel() for value in means),
        "total": math.fsum(float(value.sum(dtype=torch.float64)) for value in means),
        "squares": math.fsum(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in means),
        "variance": math.fsum(float(value.double().exp().sum()) for value in logvars),
    }


def deviation_of(sums: Sequence[Mapping[str, float]]) -> float:
    """The standard deviation of all latents, from the `sums_of` their parts.

    Of drawn latents it is exact, too: the variance of a draw is that of the means plus the mean variance.
    """
    count, total, squares, variance = (
        math.fsum(part[name] for part in sums) for name in ("count", "total", "squares", "variance")
    )
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0) + variance / count)


class LatentSet:
    """A set of latents in place of the images, in files that are mapped into memory: only what is asked for is read.

    Args:
        files: safetensors files with `label`, int64 `[M]`, and `parts`, each `[M, z, h, w]`; and, where `flip`, the
            same of the mirrored images, whose names end in `_flipped`. M is the same in all but the last.
        parts: names of the tensors that make a latent: `z`, or `mean` and `logvar`.
        flip: take the mirrored image's latents for the samples that training mirrors.
        classes: names of the labels.
        channels: of the images that were encoded.
        size: of those images, in pixels.
    """

    def __init__(
        self,
        files: Sequence[Path],
        parts: Sequence[str],
        *,
        flip: bool,
        classes: Sequence[str],
        channels: int,
        size: int,
    ) -> None:
        self.classes, self.channels, self.size = tuple(classes), channels, size
        self.skipped: list[tuple[str, str]] = []  # whoever encoded the images was told
        self._parts, self._flip = tuple(parts), flip
        self._files = [_mapped(path) for path in files]
        self._rows = len(self._files[0][LABEL])
        self._length = sum(len(file[LABEL]) for file in self._files)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        latents, labels = self.gather(torch.tensor([index]))
        return latents[0], int(labels[0])

    def gather(self, indices: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Latents, unscaled, float32 `[N, z, h, w]`, and labels, int64 `[N]`, of the given indices, int64 `[N]`.

        Of posteriors, mean and logarithm of the variance stand one after the other: `[N, 2z, h, w]`. `draws` decides
        which samples are mirrored, as it does for images; without it none is.
        """
        flips = [False] * len(indices)
        if self._flip and draws is not None:
            flips = rng.coin(draws.seed, rng.STREAM_FLIP, draws.numbers).tolist()
        places = [(self._files[index // self._rows], index % self._rows) for index in indices.tolist()]
        parts = [
            torch.stack([file[part + FLIPPED * flip][row] for (file, row), flip in zip(places, flips, strict=True)])
            for part in self._parts
        ]
        labels = torch.stack([file[LABEL][row] for file, row in places])
        return torch.cat(parts, dim=1).to(torch.float32), labels


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which stay in it. The file is closed: thousands of them may be mapped at a time."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
