"""An epoch of latent diffusion from images against one from their cached latents.

usage: python benchmarks/latents.py [--autoencoder KIND] [--size N] [--images N] [--batch-size N] [--device NAME]
                                    [--check] [KEY=VALUE]...

The images are JPEGs of noise at twice the size. The autoencoder has the architecture of a published one and random
weights, which changes nothing about the time. KEY=VALUE are settings of `uldm ldm train`, as in train.precision=bf16 or
backbone.model_channels=224; by default it is the command's own network. Rates are those that training itself prints,
over all steps but the reading of the first batch. `--check` exits with 1 where the cache is not 3 times as fast.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from uldm_cli import console
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import save
from uldm_cli.runs import ldm_train, vqvae_encode
from uldm_cli.runs.train import Result
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.encoding import Encoding
from uldm_cli.specs.load import load_config
from uldm_cli.specs.models import AutoencoderModel

AUTOENCODERS = {
    "kl-f8": {"kind": "kl"},
    "vq-f4": {"kind": "vq"},
}
"""The published architectures at their full width; both are the defaults of their kind."""
LEAST = 3.0


def make_images(folder: Path, count: int, size: int) -> None:
    """Noise of a low frequency, which JPEG neither drops nor finds hard."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((2 * size, 2 * size)).save(folder / f"{number:05}.jpg", quality=90)


def make_autoencoder(path: Path, kind: str, size: int) -> None:
    """A checkpoint with random weights."""
    model = AutoencoderModel.model_validate({"autoencoder": AUTOENCODERS[kind], "image_size": size})
    torch.manual_seed(0)
    save(path, Header("autoencoder", model.model_dump(mode="json")), {"model": model.build().state_dict()})


def rate(result: Result) -> float:
    """Images a second, as the run says."""
    return result.line["images_per_second"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", choices=AUTOENCODERS, default="kl-f8")
    parser.add_argument("--size", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--check", action="store_true", help=f"exit 1 where the cache is not {LEAST:g} times as fast")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return _measure(Path(temporary), options)


def _measure(folder: Path, options: argparse.Namespace) -> int:
    make_images(folder / "images", options.images, options.size)
    autoencoder = folder / "autoencoder.safetensors"
    make_autoencoder(autoencoder, options.autoencoder, options.size)
    images = {"kind": "images", "root": str(folder / "images"), "size": options.size}
    named = {"autoencoder": str(autoencoder), "data": images}
    machine = {"batch_size": options.batch_size, "device": options.device}
    encoding = vqvae_encode.plan(Encoding.model_validate({**named, **machine}), folder / "latents")
    encoded = vqvae_encode.run(encoding)

    steps = max(options.images // options.batch_size, 1)
    every = {"log_every": steps, "save_every": steps, "picture_every": steps}
    base = {**named, "scale_factor": encoded.index.scale_factor, "train": {"steps": steps, **machine, **every}}
    spec = load_config(DiffusionTraining, None, options.settings, base=base)
    # It was measured on these very latents; measuring it again on 128 images would take longer than all else here.
    rates = {}
    with patch.object(ldm_train.Measuring, "check"):
        for name, changed in (("images", {}), ("latents", {"latents": str(folder / "latents")})):
            run = ldm_train.plan(spec.model_copy(update=changed), folder / name, None)
            rates[name] = rate(ldm_train.run(run))
    ratio = rates["latents"] / rates["images"]
    saved = 1 / rates["images"] - 1 / rates["latents"]
    pays = encoded.seconds / options.images / saved
    console.result(
        {"images_per_second": rates, "ratio": ratio, "encoding_seconds": encoded.seconds, "epochs_until_it_pays": pays},
        title=f"{options.autoencoder}, {options.images} images of {options.size} pixels",
        columns=("training from", "images/s"),
        rows=list(rates.items()),
        summary=f"{ratio:.1f} times as fast; encoding once pays from the epoch {pays:.1f} on",
    )
    return int(options.check and ratio < LEAST)


if __name__ == "__main__":
    sys.exit(main())
