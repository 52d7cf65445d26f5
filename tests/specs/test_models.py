"""What a checkpoint's header says of its model, and the parts of it that a config can describe."""

import pytest
import torch
from pydantic import ValidationError

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoders import VQVAE
from uldm_cli.specs.backbones import UNet
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model
from uldm_cli.testing import check_spec

SMALL = {"down_channels": (8, 8, 16), "mid_channels": (16, 16), "norm_channels": 4, "num_heads": 2}


def refusal(model, **fields):
    """Where the error points, and its text."""
    with pytest.raises(ValidationError) as caught:
        model(**fields)
    context = caught.value.errors()[0]["ctx"]
    return context["path"], context["message"]


def test_vqvae_keeps_the_rules_of_a_spec():
    module = check_spec(VQVAE(**SMALL, codebook_size=8, z_channels=3, down_sample=(True, False)))
    images = torch.zeros(1, 3, 8, 8)
    assert module(images)[0].shape == images.shape
    assert module.to_latent(images).shape == (1, 3, 4, 4)


def test_unet_keeps_the_rules_of_a_spec():
    module = check_spec(
        UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,)), 4, 4
    )
    x = torch.zeros(2, 4, 6, 6)
    assert module(x, torch.tensor([1, 5])).shape == x.shape


@pytest.mark.parametrize(
    ("fields", "path", "says"),
    [
        ({"mid_channels": (128, 64)}, "mid_channels", "begins and ends with 128, the last of down_channels"),
        ({"mid_channels": (64, 128)}, "mid_channels", "begins and ends with 128, the last of down_channels"),
        ({"down_sample": (True,)}, "down_sample", "expected 2 entries, one for each step from a width"),
        ({"attn_down": (True,) * 3}, "attn_down", "expected 2 entries, one for each step from a width"),
        (
            {"down_channels": (32, 64), "mid_channels": (64, 64)},
            "down_sample",
            "expected 1 entry, one for each step from a width",
        ),
        ({"norm_channels": 24}, "norm_channels", "expected a divisor of every width, so of 32 too"),
        ({"mid_channels": (128, 40, 128)}, "norm_channels", "expected a divisor of every width, so of 40 too"),
        ({"num_heads": 3}, "num_heads", "expected a divisor of every width that has attention, so of 128 too"),
        ({"num_heads": 64, "attn_down": (True, False)}, "num_heads", "so of 32 too"),
    ],
)
def test_lists_of_the_vqvae_that_do_not_fit_are_refused(fields, path, says):
    where, message = refusal(VQVAE, **fields)
    assert where == path
    assert says in message


@pytest.mark.parametrize("field", ["down_channels", "mid_channels"])
def test_lists_of_the_vqvae_have_two_entries_or_more(field):
    with pytest.raises(ValidationError, match="at least 2 items"):
        VQVAE(**{field: (128,)})


def test_heads_need_to_divide_only_what_has_attention():
    assert VQVAE(num_heads=64).num_heads == 64


@pytest.mark.parametrize(
    ("fields", "path", "says"),
    [
        ({"num_heads": 2, "num_head_channels": 32}, "num_head_channels", "num_heads is given too"),
        ({"context_dim": 8}, "context_dim", "only use_spatial_transformer has a use for it"),
        ({"use_spatial_transformer": True}, "context_dim", "use_spatial_transformer needs a number here"),
        ({"num_heads": 3}, "num_heads", "3 does not divide the width 128"),
        ({"num_head_channels": 48}, "num_head_channels", "48 does not divide the width 128"),
    ],
)
def test_fields_of_the_unet_that_do_not_fit_are_refused(fields, path, says):
    where, message = refusal(UNet, **fields)
    assert where == path
    assert says in message


def test_factors():
    assert VQVAE(down_sample=(True, False)).factor == 2
    assert UNet().factors == (1, 2, 4)
    assert UNet().factor == 4


def test_shapes_and_building():
    model = LatentDiffusionModel.model_validate(
        {
            "autoencoder": {"kind": "vqvae", **SMALL, "codebook_size": 8},
            "image_size": 32,
            "backbone": {"kind": "unet", "model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]},
            "schedule": "cosine",
            "target": "v",
            "scale_factor": 0.5,
        }
    )
    assert (model.image_shape, model.latent_shape) == ((3, 32, 32), (4, 8, 8))
    module = model.build()
    assert (module.scale_factor, module.latent_shape) == (0.5, (4, 8, 8))
    assert module.denoiser.target == "v"
    assert LatentDiffusionModel.model_validate(model.model_dump(mode="json")) == model


def described(**fields):
    """The header of a model of 32x32 images."""
    unet = {"kind": "unet", "model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
    return {
        "autoencoder": {"kind": "vqvae", **SMALL, "codebook_size": 8},
        "image_size": 32,
        "schedule": "cosine",
        "target": "eps",
        "scale_factor": 1.0,
        **fields,
        "backbone": {**unet, **fields.get("backbone", {})},
    }


READS = {"use_spatial_transformer": True, "context_dim": 8}
CLASS = {"kind": "class", "n_classes": 3, "embed_dim": 8}


@pytest.mark.parametrize(
    ("fields", "value", "parts"),
    [
        ({"conditioner": CLASS, "conditioning": "crossattn", "backbone": READS}, torch.tensor([2]), {"context"}),
        (
            {"conditioner": "identity", "conditioning": "concat", "concat_channels": 3},
            torch.zeros(1, 3, 8, 8),
            {"concat"},
        ),
        (
            {"conditioner": "first-stage", "conditioning": "concat", "concat_channels": 4},
            torch.zeros(1, 3, 32, 32),
            {"concat"},
        ),
        (
            {"conditioner": "identity", "conditioning": "adm", "backbone": {"num_classes": 3}},
            torch.tensor([2]),
            {"label"},
        ),
    ],
)
def test_conditional_models(fields, value, parts):
    model = LatentDiffusionModel.model_validate(described(**fields))
    assert LatentDiffusionModel.model_validate(model.model_dump(mode="json")) == model
    module = model.build()
    condition = module.condition(value)
    assert {name for name, part in vars(condition).items() if part is not None} == parts
    assert module(torch.zeros(1, *module.latent_shape), 5, condition).eps.shape == (1, 4, 8, 8)


def test_a_hybrid_model():
    fields = {"conditioner": CLASS, "conditioning": "hybrid", "concat_channels": 1, "backbone": READS}
    module = LatentDiffusionModel.model_validate(described(**fields)).build()
    condition = module.condition(torch.tensor([0]), concat=torch.zeros(1, 1, 8, 8))
    assert module(torch.zeros(1, 4, 8, 8), 5, condition).eps.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("fields", "path", "says"),
    [
        ({"conditioner": CLASS}, "conditioner", "does not go with no conditioning"),
        ({"conditioning": "concat", "concat_channels": 3}, "conditioner", "does not go with concat conditioning"),
        ({"concat_channels": 3}, "concat_channels", "3 does not go with no conditioning"),
        ({"conditioner": "identity", "conditioning": "concat"}, "concat_channels", "0 does not go with concat"),
        (
            {"conditioner": CLASS, "conditioning": "crossattn"},
            "backbone",
            "with crossattn conditioning it cannot be one that takes neither a context nor a label",
        ),
        ({"backbone": READS}, "backbone", "with no conditioning it cannot be one that takes a context"),
    ],
)
def test_conditions_that_do_not_fit_the_model_are_refused(fields, path, says):
    where, message = refusal(LatentDiffusionModel, **described(**fields))
    assert where == path
    assert says in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"autoencoder": "vqvae", "image_size": 0}, "image_size: expected a number greater than 0, got 0"),
        ({"autoencoder": "vqave", "image_size": 8}, "autoencoder: unknown autoencoder 'vqave'"),
        ({"autoencoder": "vqvae"}, "image_size: missing"),
    ],
)
def test_a_header_that_describes_no_model_is_one_error(config, says):
    with pytest.raises(ConfigError) as caught:
        read_model(AutoencoderModel, config, "a.safetensors")
    assert caught.value.message.startswith("a.safetensors describes a model that cannot be built: ")
    assert says in caught.value.message
