"""Configs of the published autoencoders: what they say of their latents, and what is refused."""

import pytest

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.autoencoders import KL, VQ, Published
from uldm_cli.specs.load import load_config
from uldm_cli.specs.quantizers import EMA, Nearest


@pytest.mark.parametrize(
    ("spec", "factor", "channels"),
    [
        (VQ(), 4, 3),
        (VQ(ch_mult=(1, 1, 2, 2, 4), z_channels=8), 16, 8),
        (VQ(ch_mult=(1,), z_channels=8, embed_dim=5), 1, 5),
        (KL(), 8, 4),
        (KL(ch_mult=(1, 1, 2, 2, 4, 4), z_channels=64), 32, 64),
    ],
)
def test_size_and_channels_of_the_latents(spec: Published, factor: int, channels: int) -> None:
    assert spec.factor == factor
    assert spec.latent_channels == channels


@pytest.mark.parametrize("kind", [VQ, KL])
def test_configs_go_round(kind: type[Published]) -> None:
    spec = kind(ch=32, attn_resolutions=(64,), attn_type="none", in_channels=1)
    assert spec.out_ch == 1
    again = kind.model_validate(spec.model_dump(mode="json"))
    assert again == spec
    assert again.shape == spec.shape


def test_quantizers_by_name() -> None:
    assert VQ().quantizer == Nearest(legacy=False)
    assert VQ(quantizer={"kind": "nearest", "legacy": True}).quantizer == Nearest(legacy=True)
    assert VQ(quantizer="ema").quantizer == EMA()


@pytest.mark.parametrize("kind", [VQ, KL])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("ch=48", ["ch", "multiple of 32"]),
        ("ch_mult=[]", ["ch_mult", "at least 1"]),
        ("ch_mult=[1,0]", ["ch_mult", "greater than 0"]),
        ("attn_resolutions=[64,16]", ["attn_resolutions", "expected some of the levels' sizes, [256, 128, 64"]),
        ("attn_type=linear", ["attn_type", "'vanilla' or 'none'"]),
        ("out_ch=1", ["out_ch", "expected 3, as in_channels"]),
        ("dropout=1", ["dropout", "less than 1"]),
        ("embed_dims=3", ["embed_dims", "Did you mean 'embed_dim'?"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(kind: type[Published], override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(kind, None, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("kind", "autoencoder"), [("vq", VQ), ("kl", KL)])
def test_published_kinds_are_trained(kind: str, autoencoder: type) -> None:
    spec = load_config(AutoencoderTraining, None, [f"autoencoder={kind}", "autoencoder.in_channels=1"])
    assert spec.autoencoder == autoencoder(in_channels=1)
