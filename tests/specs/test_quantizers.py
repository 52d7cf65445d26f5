"""Quantizers in a config: what is built of them, and which do not go with an autoencoder."""

import pytest

from uldm_cli.core import quantizers
from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.autoencoders import VQ, VQVAE
from uldm_cli.specs.load import load_config
from uldm_cli.specs.quantizers import EMA, FSQ, Cosine, Nearest


def test_fields_reach_the_quantizer() -> None:
    nearest = Nearest(legacy=True, revive_below=0.5, seed=3).build(16, 3)
    assert type(nearest) is quantizers.NearestQuantizer
    assert (nearest.legacy, nearest.revive_below, nearest.seed) == (True, 0.5, 3)
    cosine = Cosine(code_dim=2, revive_below=0.25, seed=4).build(16, 3)
    assert (cosine.embedding.shape, cosine.codes.shape) == ((16, 2), (16, 3))
    assert (cosine.revive_below, cosine.seed) == (0.25, 4)
    ema = EMA(decay=0.5, revive_below=0.25, seed=5).build(16, 3)
    assert (ema.decay, ema.revive_below, ema.seed) == (0.5, 0.25, 5)
    fsq = FSQ(levels=(5, 4)).build(20, 2)
    assert (fsq.levels, fsq.codebook_size, fsq.dim) == ((5, 4), 20, 2)


def test_each_goes_with_the_default_autoencoder_by_its_name() -> None:
    for kind in ("nearest", "ema", "cosine", "fsq"):
        module = VQVAE(quantizer=kind).build().quantize
        assert (module.codebook_size, module.dim) == (1024, 4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["autoencoder=vqvae", "autoencoder.codebook_size=256", "autoencoder.quantizer=fsq"],
            r"autoencoder\.codebook_size=256 .*expected 1024, which is 8 x 8 x 4 x 4 of quantizer\.levels, got 256\. "
            r"Set it to 1024, or take other levels",
        ),
        (
            ["autoencoder=vq", "autoencoder.quantizer=fsq"],
            r"autoencoder\.quantizer.*expected a number for each of the latent's 3 channels, got 4\. "
            r"Change it, or set embed_dim=4",
        ),
        (
            ["autoencoder.quantizer.kind=fsq", "autoencoder.quantizer.levels=[8,2]"],
            "levels.*expected a number of at least 3",
        ),
        (["autoencoder.quantizer.kind=fsq", "autoencoder.quantizer.levels=[]"], "levels.*at least 1"),
        (["autoencoder.quantizer.kind=cosine", "autoencoder.quantizer.code_dim=0"], "code_dim.*greater than 0"),
        (["autoencoder.quantizer.kind=nearest", "autoencoder.quantizer.revive_below=1"], "revive_below.*less than 1"),
        (["autoencoder.quantizer=fqs"], "Did you mean 'fsq'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(AutoencoderTraining, None, overrides)
    assert "\n" not in str(caught.value)


def test_levels_of_fewer_channels() -> None:
    assert VQ(embed_dim=2, codebook_size=35, quantizer=FSQ(levels=(7, 5))).build().quantize.codes.shape == (35, 2)
