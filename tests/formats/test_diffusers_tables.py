"""The configs of published models: their full-size networks, and that the tables name each tensor of both sides."""

from pathlib import Path
from typing import Any

import pytest
import torch

from uldm_cli.formats.diffusers import autoencoders, unet
from uldm_cli.formats.diffusers.fields import Fields
from uldm_cli.formats.diffusers.tables import Row, autoencoder_rows, unet_rows
from uldm_cli.formats.tensors import TensorRef
from uldm_cli.specs.autoencoders import KL, VQ
from uldm_cli.specs.backbones import UNet

diffusers = pytest.importorskip("diffusers")

CELEBA_UNET: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 64,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
VQ_F4: dict[str, Any] = {
    "_class_name": "VQModel",
    "_diffusers_version": "0.1.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 3,
    "layers_per_block": 2,
    "num_vq_embeddings": 8192,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SD_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def complete(rows: list[Row], ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """The rows name every tensor of both, once, and lead from the shapes of one to those of the other."""
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    their_shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert sorted(row.ours for row in rows) == sorted(shapes)
    assert sorted(name for row in rows for name in row.theirs) == sorted(their_shapes)
    for row in rows:
        joined = row.change.join([ref(their_shapes[name]) for name in row.theirs])
        split = row.change.split(ref(shapes[row.ours]))
        assert joined is not None
        assert split is not None
        assert joined.shape == shapes[row.ours]
        assert [part.shape for part in split] == [their_shapes[name] for name in row.theirs]


def ref(shape: tuple[int, ...]) -> TensorRef:
    return TensorRef(shape, "F32", lambda: torch.empty(shape))


def parameters(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_unet_of_celeba() -> None:
    fields = Fields(Path("config.json"), CELEBA_UNET)
    config, channels, side = unet.read_unet(fields)
    assert (channels, side, fields.unknown()) == (3, 64, ())
    with torch.device("meta"):
        ours, theirs = UNet.model_validate(config).build(3, 3), diffusers.UNet2DModel.from_config(CELEBA_UNET)
    assert parameters(ours) == 274_056_163
    complete(unet_rows(unet.unet_shape(config)), ours, theirs)
    assert CELEBA_UNET.items() <= {**unet.write_unet(full(UNet, config), 3, 64), **version(CELEBA_UNET)}.items()


def test_first_stage_of_celeba() -> None:
    fields = Fields(Path("config.json"), VQ_F4)
    config, scale = autoencoders.read_autoencoder(fields)
    assert (scale, fields.unknown()) == (1.0, ())
    with torch.device("meta"):
        ours, theirs = VQ.model_validate(config).build(), diffusers.VQModel.from_config(VQ_F4)
    assert len(ours.state_dict()) == 205
    complete(autoencoder_rows(autoencoders.autoencoder_shape(config)), ours, theirs)
    assert VQ_F4.items() <= {**autoencoders.write_autoencoder(full(VQ, config), scale), **version(VQ_F4)}.items()


def test_first_stage_of_stable_diffusion() -> None:
    fields = Fields(Path("config.json"), SD_VAE)
    config, scale = autoencoders.read_autoencoder(fields)
    assert (scale, fields.unknown()) == (0.18215, ())
    with torch.device("meta"):
        ours, theirs = KL.model_validate(config).build(), diffusers.AutoencoderKL.from_config(SD_VAE)
    assert parameters(ours) == 83_653_863
    complete(autoencoder_rows(autoencoders.autoencoder_shape(config)), ours, theirs)
    assert SD_VAE.items() <= {**autoencoders.write_autoencoder(full(KL, config), scale), **version(SD_VAE)}.items()


def full(spec: Any, config: dict[str, Any]) -> dict[str, Any]:
    return dict(spec.model_validate(config).model_dump())


def version(config: dict[str, Any]) -> dict[str, Any]:
    return {"_diffusers_version": config["_diffusers_version"]}


@pytest.mark.parametrize(
    "shapes",
    [[(3, 3), (3, 3), (3, 4)], [(3, 3), (3, 3), (3,)], [(6, 6), (6, 6), (6, 6)], [(4, 3, 1), (4, 3, 1), (4, 3, 1)]],
)
def test_misshapen_attention_is_no_match(shapes: list[tuple[int, ...]]) -> None:
    row = next(row for row in unet_rows(unet.UNetShape((64,), (True,), (4,), 1, False)) if len(row.theirs) == 3)
    assert row.change.join([ref(shape) for shape in shapes]) is None
    assert row.change.split(ref((9, 3, 1))) is None
