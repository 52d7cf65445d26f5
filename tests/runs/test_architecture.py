"""What is said of networks, held against the networks."""

from itertools import product
from typing import Any

import pytest
import torch

from uldm_cli.errors import ConfigError
from uldm_cli.runs import zoo
from uldm_cli.runs.architecture import Architecture, Skip, UnknownKind, autoencoder_of, backbone_of
from uldm_cli.runs.diagram import read
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.backbones import Backbone
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel

VQVAE = {"kind": "vqvae", "down_channels": [32, 64, 96, 64], "mid_channels": [64, 128, 64], "down_sample": [1, 0, 1],
         "attn_down": [0, 1, 1], "num_down_layers": 2, "num_mid_layers": 2, "num_up_layers": 3, "z_channels": 5,
         "codebook_size": 100}  # fmt: skip
PUBLISHED = {"resolution": 32, "ch": 32, "ch_mult": [1, 2, 3], "num_res_blocks": 1, "attn_resolutions": [16],
             "z_channels": 6, "embed_dim": 3}  # fmt: skip
UNET = {"kind": "unet", "model_channels": 32, "channel_mult": [1, 3, 2], "num_res_blocks": 2,
        "attention_resolutions": [2]}  # fmt: skip
UNETS = {
    "plain": {},
    "one level": {"channel_mult": [2], "attention_resolutions": []},
    "heads": {"num_heads": 4, "attention_resolutions": [1, 4]},
    "scale and shift": {"use_scale_shift_norm": True, "resblock_updown": True},
    "pooled": {"conv_resample": False},
    "context": {"use_spatial_transformer": True, "context_dim": 20, "transformer_depth": 2},
    "classes": {"num_classes": 7},
}
CONDITIONED: dict[str, dict[str, Any]] = {
    "context": {"conditioner": {"kind": "class", "embed_dim": 20}, "conditioning": "crossattn"},
    "classes": {"conditioner": {"kind": "identity"}, "conditioning": "adm"},
}


def model(autoencoder: object = None, backbone: dict[str, Any] | None = None, **more: Any) -> LatentDiffusionModel:
    config = {"schedule": {"kind": "scaled_linear"}, "target": "eps", "scale_factor": 1.0, "image_size": 64, **more}
    config |= {"autoencoder": autoencoder or "vqvae", "backbone": UNET | (backbone or {})}
    return LatentDiffusionModel.model_validate(config)


def numbers(module: torch.nn.Module) -> int:
    """Parameters, and the codes of a codebook, whether they are trained by gradient or not."""
    codes = [value for name, value in module.named_buffers() if name == "quantize.embedding"]
    return sum(value.numel() for value in (*module.parameters(), *codes))


def stages(architecture: Architecture) -> list[tuple[str, int, int, int, int | None]]:
    return [(s.part, s.channels, s.side, s.blocks, s.heads) for s in architecture.stages]


@pytest.mark.parametrize(
    "spec",
    [
        "vqvae",
        VQVAE,
        {"kind": "vqvae", "quantizer": "fsq"},
        {"kind": "vqvae", "quantizer": "cosine"},
        {"kind": "vq", "quantizer": {"kind": "cosine", "code_dim": 2}, **PUBLISHED},
        *({"kind": kind, "attn_type": how, **PUBLISHED} for kind, how in product(("vq", "kl"), ("vanilla", "none"))),
    ],
    ids=str,
)
def test_an_autoencoders_parameters_are_those_of_its_module(spec: object) -> None:
    described = model(spec)
    with torch.device("meta"):
        module = described.autoencoder.build()
    assert autoencoder_of(described, "").parameters == numbers(module)


@pytest.mark.parametrize("name", UNETS)
def test_a_unets_parameters_are_those_of_its_module(name: str) -> None:
    described = model(backbone=UNETS[name], **CONDITIONED.get(name, {}))
    with torch.device("meta"):
        module = described.backbone.build(4, 4)
    assert backbone_of(described, "").parameters == numbers(module)


@pytest.mark.parametrize("name", [entry.name for entry in zoo.entries()])
def test_published_models_have_their_parameters(name: str) -> None:
    described = read(None, model=f"zoo:{name}").model
    with torch.device("meta"):
        assert autoencoder_of(described, "").parameters == numbers(described.autoencoder.build())
        if isinstance(described, LatentDiffusionModel):
            channels = described.latent_shape[0]
            module = described.backbone.build(channels + described.concat_channels, channels)
            assert backbone_of(described, "").parameters == numbers(module)


def test_the_stages_of_a_vqvae() -> None:
    described = autoencoder_of(model(VQVAE), "x")
    assert stages(described) == [
        ("image", 3, 64, 0, None),
        ("encoder", 64, 64, 2, None),
        ("encoder", 96, 32, 2, 4),
        ("encoder", 64, 32, 2, 4),
        ("encoder", 128, 16, 3, 4),
        ("encoder", 64, 16, 3, 4),
        ("latent", 5, 16, 0, None),
        ("codebook", 5, 16, 0, None),
        ("decoder", 128, 16, 3, 4),
        ("decoder", 64, 16, 3, 4),
        ("decoder", 96, 32, 3, 4),
        ("decoder", 64, 32, 3, 4),
        ("decoder", 32, 64, 3, None),
        ("image", 3, 64, 0, None),
    ]
    assert described.facts == ("VQ-VAE", "images 3×64×64", "latents 5×16×16", "100 codes")  # noqa: RUF001


def test_a_stages_size_is_that_of_the_maps_in_the_module() -> None:
    """Width and side after each level of the decoder, as the network itself computes them."""
    described = model(VQVAE, image_size=16)
    module = described.autoencoder.build()
    seen = []
    for layer in module.decoder.up:
        layer.register_forward_hook(lambda _module, _input, out: seen.append((out.shape[1], out.shape[2])))
    module.decoder(torch.zeros(1, 5, 4, 4))
    levels = [(s.channels, s.side) for s in autoencoder_of(described, "").stages if s.part == "decoder"][2:]
    assert list(dict.fromkeys(seen))[-1] == levels[-1]
    assert set(levels) <= set(seen)


def test_the_posterior_comes_before_the_latent_and_the_codebook_after_it() -> None:
    parts = {
        kind: [s.part for s in autoencoder_of(model({"kind": kind, **PUBLISHED}), "").stages] for kind in ("kl", "vq")
    }
    assert parts["kl"][5:7] == ["posterior", "latent"]
    assert parts["vq"][5:7] == ["latent", "codebook"]


def test_a_unets_stages_skips_and_signals() -> None:
    described = backbone_of(model(backbone=UNETS["context"], **CONDITIONED["context"]), "x")
    assert stages(described) == [
        ("noised latent", 4, 16, 0, None),
        ("encoder", 32, 16, 2, None),
        ("encoder", 96, 8, 2, 3),
        ("encoder", 64, 4, 2, None),
        ("middle", 64, 4, 2, 2),
        ("decoder", 64, 4, 3, None),
        ("decoder", 96, 8, 3, 3),
        ("decoder", 32, 16, 3, None),
        ("noise", 4, 16, 0, None),
    ]
    assert described.skips == (Skip(1, 7, 3), Skip(2, 6, 3), Skip(3, 5, 3))
    time, context = described.signals
    assert (time.width, time.stages) == (128, (1, 2, 3, 4, 5, 6, 7))
    assert (context.width, context.stages) == (20, (2, 4, 6))
    assert described.facts == ("U-Net", "input 4×16×16", "predicts noise", "context: a class")  # noqa: RUF001


def test_the_module_has_as_many_skips() -> None:
    described = model()
    module = described.backbone.build(4, 4)
    assert sum(skip.count for skip in backbone_of(described, "").skips) == len(module.input_blocks)


def test_a_condition_beside_the_latent_is_told_apart() -> None:
    described = backbone_of(read(None, model="zoo:inpainting_big").model, "x")
    assert (described.stages[0].channels, described.stages[0].beside) == (3, 4)
    assert described.resampling == "residual block"


class Other(Autoencoder):
    kind: str = "other"

    @property
    def factor(self) -> int:
        return 4


class Strange(Backbone):
    kind: str = "strange"


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UnknownKind, match=r"autoencoders of the kind 'other'.*Known: vqvae, vq, kl"):
        autoencoder_of(AutoencoderModel.model_construct(autoencoder=Other(), image_size=64), "x")
    changed = model().model_copy(update={"backbone": Strange()})
    with pytest.raises(UnknownKind, match="backbones of the kind 'strange'"):
        backbone_of(changed, "x")


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the autoencoder needs images whose side is a multiple of 4.*66x66"):
        autoencoder_of(model(image_size=66), "x")
    with pytest.raises(ConfigError, match=r"the backbone needs latents whose side is a multiple of 4.*18x18"):
        backbone_of(model(image_size=72), "x")
