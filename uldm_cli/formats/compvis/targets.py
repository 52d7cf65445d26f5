"""Everything that a config of the reference may name after `target:`. A name outside this table is refused, and none
is ever imported.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uldm_cli.errors import ConfigError, nearest
from uldm_cli.specs.yamlfile import KeyPath

_DATA = (
    "ldm.data.faceshq.CelebAHQ",
    "ldm.data.faceshq.FFHQ",
    "ldm.data.imagenet.ImageNet",
    "ldm.data.imagenet.ImageNetSR",
    "ldm.data.landscapes.RFW",
    "ldm.data.lsun.LSUNBedrooms",
    "ldm.data.lsun.LSUNChurches",
    "ldm.data.openimages.FullOpenImages",
    "ldm.data.openimages.OpenImagesBBox",
    "ldm.data.openimages.SuperresOpenImagesAdvanced",
    "ldm.data.previews.pytorch_dataset.Previews",
    "taming.data.faceshq.CelebAHQ",
    "taming.data.faceshq.FFHQ",
)

TARGETS: dict[str, str] = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": "latent diffusion model",
    "ldm.models.autoencoder.VQModel": "VQ autoencoder",
    "ldm.models.autoencoder.VQModelInterface": "VQ autoencoder",
    "ldm.models.autoencoder.AutoencoderKL": "KL autoencoder",
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": "U-Net",
    "ldm.modules.encoders.modules.ClassEmbedder": "class embedder",
    "ldm.modules.encoders.modules.BERTEmbedder": "token encoder",
    "ldm.modules.encoders.modules.SpatialRescaler": "rescaler",
    "torch.nn.Identity": "identity",
    # What follows matters to training only.
    "ldm.modules.losses.LPIPSWithDiscriminator": "loss",
    "ldm.modules.losses.contperceptual.DummyLoss": "loss",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": "loss",
    "ldm.lr_scheduler.LambdaLinearScheduler": "learning rate",
    "ldm.lr_scheduler.LambdaWarmUpCosineScheduler": "learning rate",
    "main.DataModuleFromConfig": "data",
    "main.ImageLogger": "logger",
    **{f"{name}{part}": "data" for name in _DATA for part in ("Train", "Validation")},
}
"""Each name, and what it is."""

AUTOENCODERS = ("VQ autoencoder", "KL autoencoder")
CONDITIONERS = ("class embedder", "token encoder", "rescaler", "identity")


def check_targets(data: Mapping[str, Any], lines: Mapping[KeyPath, int], path: Path) -> None:
    """Makes sure that every `target:` of a file, whatever section it stands in, is in the table.

    Raises:
        ConfigError: one is not; with its line, and the name that was probably meant.
    """
    for at, name in _targets(data, ()):
        if not isinstance(name, str) or name not in TARGETS:
            where = f"{path}:{lines.get(at, 1)}: {'.'.join(at)}"
            raise ConfigError(f"{where}: {_shown(name)} is not known, and nothing is imported by name", _hint(at, name))


def _targets(node: Any, at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == "target":
            yield (*at, "target"), value
        yield from _targets(value, (*at, str(key)))


def _shown(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 100 else text[:97] + "..."


def _hint(at: KeyPath, name: Any) -> str:
    if at[0] != "model":
        return f"Remove the section `{at[0]}:`; only `model:` is needed here"
    near = nearest(name, TARGETS) if isinstance(name, str) else None
    if near:
        return f"Did you mean '{near}'?"
    models = sorted(known for known, what in TARGETS.items() if known.startswith("ldm.mod") and what != "loss")
    return f"Known are: {', '.join(models)}"
