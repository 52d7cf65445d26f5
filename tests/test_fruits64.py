"""The embedded model: small enough to come along, and as good as its card in docs/models says."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from uldm_cli import assets
from uldm_cli.core.data import open_images
from uldm_cli.core.images import to_uint8
from uldm_cli.core.quantizers import perplexity, usage
from uldm_cli.runs.models import load_autoencoder, resolve
from uldm_cli.runs.sample import run
from uldm_cli.specs.samplers import DDIM
from uldm_cli.specs.sampling import Sampling

SHARED = os.environ.get("ULDM_TEST_ASSETS")
LARGEST = 24_000_000  # bytes
IMAGES = 48


def test_size():
    assert assets.path("fruits64.safetensors").stat().st_size <= LARGEST


def test_header_needs_no_torch():
    code = (
        "import sys; from uldm_cli.runs.models import resolve; header = resolve(None).header; "
        "print(header.kind, header.weights, header.config['scale_factor'] > 0, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[0] == "latent-diffusion ('ema',) True False"


def test_header_names_no_machine():
    header = resolve(None).header
    assert header.training["data"]["root"] == "../shared/data/fruits64/training.tar"
    assert header.training["autoencoder"] == "outputs/vqvae-fruits64"


@pytest.fixture(scope="module")
def reconstruction():
    """Test images and their reconstructions, uint8 `[N, H, W, 3]`, and the codes used, `[N, h, w]`."""
    if SHARED is None:
        pytest.skip("ULDM_TEST_ASSETS is not set: the photographs are needed")
    photographs = open_images(Path(SHARED) / "data/fruits64/test.tar", size=64)
    chosen = np.linspace(0, len(photographs) - 1, IMAGES).round().astype(int)
    images = torch.stack([photographs[i][0] for i in chosen])
    model = load_autoencoder(resolve(None))
    with torch.inference_mode():
        z, _, codes = model.encode_with_indices(images / 127.5 - 1)
        again = to_uint8(model.decode(z))
    return images.permute(0, 2, 3, 1).numpy(), again, codes


def test_reconstructs_photographs_it_has_not_seen(reconstruction):
    images, again, _ = reconstruction
    error = np.square(images.astype(float) - again).mean((1, 2, 3))
    assert np.mean(10 * np.log10(255**2 / error)) >= 31


def test_the_codebook_is_in_use(reconstruction):
    _, _, codes = reconstruction
    counts = torch.bincount(codes.flatten(), minlength=1024)
    assert perplexity(counts) > 400
    assert usage(counts) > 0.9


def test_samples_are_fruits_on_white(tmp_path):
    spec = Sampling(sampler=DDIM(steps=20, eta=0), step_size=0, num=8, save=("npz",), device="cpu")
    images = np.load(run(spec, tmp_path).plan.archive)["arr_0"].astype(float)
    corners = images[:, [0, 1, 62, 63]][:, :, [0, 1, 62, 63]]  # a fruit may touch the middle of an edge
    fruit = images[:, 20:44, 20:44]
    white = corners.mean((1, 2, 3)) > 240
    coloured = (255 - fruit.min(-1)).mean((1, 2)) > 60
    assert (white & coloured).sum() >= 7
