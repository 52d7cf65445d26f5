"""Models that diffusers makes, read by us and the other way round: the same numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from uldm_cli.core.samplers import ddim
from uldm_cli.core.spacing import uniform_timesteps
from uldm_cli.errors import ConfigError
from uldm_cli.formats import compvis
from uldm_cli.formats.checkpoint import Checkpoint, Header
from uldm_cli.formats.diffusers import read, write
from uldm_cli.formats.tensors import TensorRef
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel

diffusers = pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parent.parent / "golden" / "compvis"

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
}
UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-head": {"attention_head_dim": None},
    "attention-everywhere": {
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 2,
        "down_block_types": ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3,
    },
    "narrowing": {
        "block_out_channels": (32, 96, 64),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "resnet-updown": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}
VQ: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "num_vq_embeddings": 16,
    "sample_size": 16,
    "scaling_factor": 0.7,
}
KL = {name: value for name, value in VQ.items() if name != "num_vq_embeddings"} | {"latent_channels": 3}
ATTENTIVE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}
AUTOENCODERS = {
    "vq": ("VQModel", VQ),
    "vq-attention": ("VQModel", VQ | ATTENTIVE),
    "vq-no-attention": ("VQModel", VQ | {"mid_block_add_attention": False}),
    "vq-narrow-codes": ("VQModel", VQ | {"latent_channels": 4, "vq_embed_dim": 2}),
    "kl": ("AutoencoderKL", KL),
    "kl-attention": ("AutoencoderKL", KL | ATTENTIVE),
}


def randomized(module: nn.Module) -> nn.Module:
    """With no weight of a value that it would have by default, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_noise(step: int, draw: int) -> Tensor:
    raise AssertionError("eta is 0")


def pipeline(unet: dict[str, Any], first_stage: str = "VQModel", **changes: Any) -> Any:
    config = {"VQModel": VQ, "AutoencoderKL": KL}[first_stage] | changes
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    return diffusers.LDMPipeline(
        vqvae=randomized(getattr(diffusers, first_stage)(**config)),
        unet=randomized(diffusers.UNet2DModel(**UNET | unet)),
        scheduler=scheduler,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(model: Any) -> Path:
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def load(module: nn.Module, checkpoint: Checkpoint, part: str) -> None:
    """Every tensor of the module, and no other, from one part of a checkpoint."""
    tensors = {name: ref.read() for name, ref in checkpoint.tensors.items() if name.startswith(f"{part}.")}
    module.load_state_dict({name.removeprefix(f"{part}."): value for name, value in tensors.items()})


def latent_diffusion(checkpoint: Checkpoint) -> Any:
    model = LatentDiffusionModel.model_validate(checkpoint.header.config).build().eval()
    load(model.denoiser.backbone, checkpoint, "backbone")
    load(model.autoencoder, checkpoint, "autoencoder")
    return model


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Equal, but for so much of their size."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS)
@torch.no_grad()
def test_unet_gives_the_numbers_of_diffusers(changes: dict[str, Any], saved: Callable[[Any], Path]) -> None:
    theirs = pipeline(changes)
    checkpoint = read(saved(theirs))
    assert checkpoint.warnings == checkpoint.extra == ()
    ours = latent_diffusion(checkpoint)
    x, t = random(2, 3, 8, 8), torch.tensor([3, 900])
    same(ours.denoiser.backbone(x, t), theirs.unet(x, t).sample)


@pytest.mark.parametrize(("kind", "config"), AUTOENCODERS.values(), ids=AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_gives_the_numbers_of_diffusers(
    kind: str, config: dict[str, Any], saved: Callable[[Any], Path]
) -> None:
    theirs: Any = randomized(getattr(diffusers, kind)(**config))
    checkpoint = read(saved(theirs))
    assert checkpoint.header.kind == "autoencoder"
    assert checkpoint.warnings == checkpoint.extra == ()
    ours: Any = AutoencoderModel.model_validate(checkpoint.header.config).build().eval()
    load(ours, checkpoint, "model")
    x = random(2, 3, 16, 16)
    if kind == "VQModel":
        z = theirs.encode(x).latents
        quantized, _, (_, _, codes) = theirs.quantize(z)
        assert torch.equal(ours.encode_with_indices(x)[2].flatten(), codes)
        same(ours.encode_with_indices(x)[0], quantized)
    else:
        posterior = theirs.encode(x).latent_dist
        z = posterior.mean
        mean, logvar = ours.moments(x)
        same(mean, posterior.mean)
        same(logvar, posterior.logvar)
    same(ours.to_latent(x), z)
    same(ours.from_latent(z), theirs.decode(z).sample)


@pytest.mark.parametrize("first_stage", ["VQModel", "AutoencoderKL"])
def test_pipeline_gives_the_same_picture(first_stage: str, saved: Callable[[Any], Path]) -> None:
    theirs = pipeline({}, first_stage)
    theirs.set_progress_bar_config(disable=True)
    ours = latent_diffusion(read(saved(theirs)))
    expected = theirs(generator=torch.manual_seed(7), num_inference_steps=8, output_type="np").images
    x = torch.randn((1, 3, 8, 8), generator=torch.manual_seed(7))
    *_, last = ddim(ours, x, ours.schedule, no_noise, timesteps=uniform_timesteps(1000, 8), eta=0.0)
    picture = (ours.decode(last.x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert -10 * np.log10(np.mean((picture - expected) ** 2)) >= 60


OUR_VQ = {"kind": "vq", "resolution": 16, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "codebook_size": 16}
OUR_KL = {
    **{"kind": "kl", "resolution": 32, "ch": 32, "ch_mult": [1, 1, 2], "attn_resolutions": [16, 8], "z_channels": 4},
    "num_res_blocks": 2,
}
OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"channel_mult": [1, 2], "attention_resolutions": [2]}, OUR_VQ),
    "no-attention": ({"channel_mult": [1, 2], "attention_resolutions": []}, OUR_VQ | {"attn_type": "none"}),
    "ema-codes": ({"channel_mult": [1, 2]}, OUR_VQ | {"quantizer": {"kind": "ema"}}),
    "one-level": ({"channel_mult": [1], "attention_resolutions": [1]}, OUR_VQ),
    "heads-at-one-width": ({"channel_mult": [1, 2], "attention_resolutions": [2], "num_heads": 4}, OUR_VQ),
    "one-head": ({"channel_mult": [1, 2], "attention_resolutions": [1, 2], "num_heads": 1}, OUR_VQ),
    "new-order": ({"channel_mult": [1, 2], "use_new_attention_order": True}, OUR_VQ),
    "scale-shift": ({"channel_mult": [1, 2], "use_scale_shift_norm": True}, OUR_KL),
    "updown": ({"channel_mult": [1, 2, 2], "resblock_updown": True, "attention_resolutions": [2]}, OUR_KL),
}


def made_by_us(backbone: dict[str, Any], autoencoder: dict[str, Any]) -> tuple[Any, Checkpoint]:
    """A model of ours, and what is written of it; its EMA weights are those that it computes with."""
    backbone = {"kind": "unet", "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [1, 2]} | backbone
    config = {
        **{"autoencoder": autoencoder, "image_size": 16, "backbone": backbone, "schedule": "scaled_linear"},
        **{"target": "eps", "scale_factor": 0.7},
    }
    spec = LatentDiffusionModel.model_validate(config)
    model = randomized(spec.build())
    ema = model.denoiser.backbone.state_dict()
    parts = {"autoencoder": model.autoencoder.state_dict(), "ema": ema, "backbone": {k: 2 * v for k, v in ema.items()}}
    tensors = {f"{part}.{key}": TensorRef.of(value) for part, state in parts.items() for key, value in state.items()}
    tensors["kept.loss.logvar"] = TensorRef.of(torch.zeros(()))  # of another layout
    header = Header("latent-diffusion", spec.model_dump(mode="json"), tensors={k: r.shape for k, r in tensors.items()})
    return model, Checkpoint(Path("model"), "uldm", header, tensors)


@pytest.mark.parametrize(("backbone", "autoencoder"), OURS.values(), ids=OURS)
@torch.no_grad()
def test_diffusers_gives_our_numbers(backbone: dict[str, Any], autoencoder: dict[str, Any], tmp_path: Path) -> None:
    ours, checkpoint = made_by_us(backbone, autoencoder)
    write(checkpoint, tmp_path / "written", "ema")
    theirs = diffusers.LDMPipeline.from_pretrained(tmp_path / "written")
    channels, side, _ = ours.latent_shape
    x, t = random(2, channels, 8, 8), torch.tensor([3, 900])
    same(theirs.unet(x, t).sample, ours.denoiser.backbone(x, t))
    same(theirs.vqvae.decode(x / theirs.vqvae.config.scaling_factor).sample, ours.decode(x))
    encoded = theirs.vqvae.encode(random(2, 3, 16, 16))
    same(
        encoded.latents if autoencoder["kind"] == "vq" else encoded.latent_dist.mean,
        ours.encode(random(2, 3, 16, 16)) / 0.7,
    )
    assert theirs.unet.config.sample_size == side
    assert torch.allclose(theirs.scheduler.alphas_cumprod, ours.schedule.alphas_cumprod, atol=1e-6)


@torch.no_grad()
def test_raw_weights_by_choice(tmp_path: Path) -> None:
    ours, checkpoint = made_by_us(*OURS["plain"])
    write(checkpoint, tmp_path / "written", "raw")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "written" / "unet")
    assert torch.equal(theirs.conv_in.weight, 2 * ours.denoiser.backbone.input_blocks[0][0].weight)


@pytest.mark.parametrize("kind", ["vq", "kl"])
@torch.no_grad()
def test_autoencoder_alone_is_written(kind: str, tmp_path: Path) -> None:
    spec = AutoencoderModel.model_validate({"autoencoder": {"vq": OUR_VQ, "kl": OUR_KL}[kind], "image_size": 16})
    ours: Any = randomized(spec.build())
    tensors = {f"ema.{key}": TensorRef.of(value) for key, value in ours.state_dict().items()}
    header = Header("autoencoder", spec.model_dump(mode="json"), tensors={k: r.shape for k, r in tensors.items()})
    write(Checkpoint(Path("model"), "uldm", header, tensors), tmp_path / "written")
    kinds = {"vq": diffusers.VQModel, "kl": diffusers.AutoencoderKL}
    theirs = kinds[kind].from_pretrained(tmp_path / "written")
    z = random(2, ours.post_quant_conv.in_channels, 8, 8)
    same(theirs.decode(z).sample, ours.from_latent(z))
    assert theirs.config.scaling_factor == {"vq": 1.0, "kl": 0.18215}[kind]


@torch.no_grad()
def test_a_published_model_written_for_diffusers(golden_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The reference's own numbers, from a checkpoint in its layout."""
    checkpoint = golden_checkpoint("uncond-vq")
    write(compvis.read(checkpoint), tmp_path / "written", "ema")
    theirs = diffusers.LDMPipeline.from_pretrained(tmp_path / "written")
    golden = load_file(GOLDEN / "uncond-vq" / "golden.safetensors")
    same(theirs.unet(golden["x_T"], golden["t"]).sample, golden["eps.ema"])
    same(theirs.vqvae.decode(golden["latent"] / theirs.vqvae.config.scaling_factor).sample, golden["decoded"])
    theirs.scheduler.set_timesteps(8)
    x = golden["x_T"]
    for t in theirs.scheduler.timesteps:
        x = theirs.scheduler.step(theirs.unet(x, t).sample, t, x, eta=0.0).prev_sample
    same(x, golden["ddim.eta0.x"][-1])


def test_heads_of_several_sizes_are_refused(golden_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone\.num_heads is 4 at several widths, so heads have 8, 16 channels"):
        write(compvis.read(golden_checkpoint("uncond-kl")), tmp_path / "written", "ema")
