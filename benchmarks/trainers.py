"""The trainers that `benchmarks/training.py` compares: each function builds one, and gives what makes a step of it.

All see the same batches, which are in memory already: what reads files is not compared. diffusers has training loops
as scripts only; here they are as in its `train_unconditional.py` and `train_vqgan.py` (without a discriminator), with
what they log every step. `denoising_diffusion_pytorch` has a class, of which only the data loader is replaced.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli import assets
from uldm_cli.core.autoencoding import AutoencoderTask, ReconstructionWeights
from uldm_cli.core.data import Batch
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.diffusing import DiffusionTask
from uldm_cli.core.engine import Engine
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.lpips import LPIPS
from uldm_cli.core.training import Optimization, Task, Trainer
from uldm_cli.errors import UldmError
from uldm_cli.formats.native import load_tensors
from uldm_cli.specs.autoencoders import VQ
from uldm_cli.specs.backbones import UNet
from uldm_cli.specs.schedules import ScaledLinear

Step = Callable[[], object]
DISTINCT = 4
"""Batches in memory, which come again and again."""
EVER = 10**9
LR, CLIP, DECAY = 1e-4, 1.0, 0.9999


@dataclass(frozen=True)
class Case:
    """What is trained on: images, or latents, `[batch, *shape]`."""

    shape: tuple[int, int, int]
    batch: int
    unet: UNet | None = None
    """Of a diffusion model."""
    peer_dim: int = 0
    """Width of the U-Net of `denoising_diffusion_pytorch`, that makes it about as large."""


def unet(width: int, mult: tuple[int, ...], attention: tuple[int, ...]) -> UNet:
    return UNet(
        model_channels=width,
        channel_mult=mult,
        num_res_blocks=2,
        attention_resolutions=attention,
        num_head_channels=32,
        dropout=0.0,
    )


CASES = {
    "latents": Case((4, 16, 16), 16, unet(96, (1, 2), (1, 2)), peer_dim=112),
    "pixels": Case((3, 32, 32), 16, unet(64, (1, 2, 2), (4,)), peer_dim=72),
    "vqvae": Case((3, 64, 64), 8),
    "cache": Case((3, 64, 64), 16, unet(96, (1, 2), (1, 2))),
}
AUTOENCODER = VQ(ch=32, ch_mult=(1, 2, 4), num_res_blocks=2, z_channels=4, codebook_size=1024)
"""What is trained in the case "vqvae": the published shape, a quarter as wide."""
ENCODER = VQ()
"""What encodes in the case "cache": the published VQ-f4."""


def floats(case: Case) -> Iterator[Tensor]:
    """Batches in [-1, 1], again and again."""
    generator = torch.Generator().manual_seed(0)
    yield from cycle([torch.rand(case.batch, *case.shape, generator=generator) * 2 - 1 for _ in range(DISTINCT)])


def numbered(images: Iterator[Tensor]) -> Iterator[Batch]:
    """Batches as training has them, with the numbers of their samples."""
    for i, image in enumerate(images):
        yield Batch(image, torch.full((len(image),), -1), torch.arange(i * len(image), (i + 1) * len(image)))


def uldm_trainer(task: Task, averaged: nn.Module, precision: str, batches: Iterator[Tensor]) -> Step:
    o = Optimization(LR, (0.9, 0.99), 0.01, warmup_steps=500, decay="constant", clip_norm=CLIP, steps=EVER, spike=20.0)
    trainer = Trainer(task, averaged, Engine("cpu", precision), o, ema_decay=DECAY, flip_seed=None)
    records = trainer.fit(numbered(batches))
    return lambda: next(records)


def uldm_denoiser(case: Case, autoencoder: nn.Module, latent: tuple[int, int, int], *, cached: bool) -> DiffusionTask:
    assert case.unet is not None
    backbone = case.unet.build(latent[0], latent[0]).to(memory_format=torch.channels_last)
    denoiser = Denoiser(backbone, ScaledLinear().build(), "eps")
    return DiffusionTask(LatentDiffusion(autoencoder, denoiser, 1.0, latent, case.shape), seed=0, cached=cached)


def uldm_diffusion(case: Case, precision: str) -> tuple[Step, nn.Module]:
    """The case's network on what is given, as it is."""
    task = uldm_denoiser(case, nn.Identity(), case.shape, cached=True)
    averaged = task.model.denoiser.backbone
    return uldm_trainer(task, averaged, precision, floats(case)), averaged


def uldm_encoding(case: Case, precision: str, *, cached: bool = False) -> tuple[Step, nn.Module]:
    """The case's network on latents that are made of images in every step, or that were made before."""
    encoder = ENCODER.build().eval().to(memory_format=torch.channels_last)
    side = case.shape[1] // ENCODER.factor
    latent = (ENCODER.latent_channels, side, side)
    task = uldm_denoiser(case, encoder, latent, cached=cached)
    averaged = task.model.denoiser.backbone
    return uldm_trainer(task, averaged, precision, floats(replace(case, shape=latent) if cached else case)), averaged


def uldm_autoencoder(case: Case, precision: str) -> tuple[Step, nn.Module]:
    model: Any = AUTOENCODER.build().to(memory_format=torch.channels_last)
    weights = ReconstructionWeights(l1=1.0, l2=1.0, lpips=0.5, codebook=1.0, commitment=0.25)
    lpips = LPIPS(load_tensors(assets.path("lpips-alex.safetensors")), "alex", checked=False)
    lpips.to(memory_format=torch.channels_last)  # as `uldm vqvae train` has it
    return uldm_trainer(AutoencoderTask(model, weights, lpips), model, precision, floats(case)), model


def diffusers_loop(model: Any, precision: str, batches: Iterator[Tensor], loss_of: Callable[..., Tensor]) -> Step:
    """What diffusers' scripts do with a model; `loss_of(model, batch)` differs."""
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=True, mixed_precision={"fp32": "no"}.get(precision, precision))
    ema: Any = EMAModel(
        model.parameters(),
        decay=DECAY,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=type(model),
        model_config=model.config,
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule: Any = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=EVER)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def step() -> float:
        model.train()
        with accelerator.accumulate(model):
            loss = loss_of(model, next(batches))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        return loss.detach().item()

    return step


def diffusers_diffusion(case: Case, precision: str) -> tuple[Step, nn.Module]:
    from diffusers import DDPMScheduler, UNet2DModel

    spec = case.unet
    assert spec is not None
    attends = [2**level in spec.attention_resolutions for level in range(len(spec.channel_mult))]
    model: Any = UNet2DModel(  # type: ignore[no-untyped-call]  # diffusers has no types
        sample_size=case.shape[1],
        in_channels=case.shape[0],
        out_channels=case.shape[0],
        layers_per_block=spec.num_res_blocks,
        block_out_channels=[spec.model_channels * mult for mult in spec.channel_mult],
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        attention_head_dim=spec.num_head_channels,
    )
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)  # type: ignore[no-untyped-call]

    def loss_of(wrapped: Any, clean: Tensor) -> Tensor:
        noise = torch.randn(clean.shape)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),)).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted: Tensor = wrapped(noisy, timesteps).sample
        return F.mse_loss(predicted.float(), noise.float())

    return diffusers_loop(model, precision, floats(case), loss_of), model


def diffusers_autoencoder(case: Case, precision: str) -> tuple[Step, nn.Module]:
    from diffusers import VQModel
    from lpips import LPIPS as Peer

    levels = len(AUTOENCODER.ch_mult)
    model: Any = VQModel(  # type: ignore[no-untyped-call]
        block_out_channels=[AUTOENCODER.ch * mult for mult in AUTOENCODER.ch_mult],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=AUTOENCODER.num_res_blocks,
        latent_channels=AUTOENCODER.z_channels,
        vq_embed_dim=AUTOENCODER.latent_channels,
        num_vq_embeddings=AUTOENCODER.codebook_size,
    )
    with warnings.catch_warnings(action="ignore"):  # it calls torchvision as one did long ago
        perceptual = Peer(net="alex", pnet_rand=True, verbose=False)  # as fast as with weights that are downloaded
    perceptual.requires_grad_(False)

    def loss_of(wrapped: Any, image: Tensor) -> Tensor:
        out = wrapped(image)
        recon: Tensor = out.sample.float()
        pixels = F.l1_loss(recon, image) + F.mse_loss(recon, image)
        distance: Tensor = perceptual(recon, image).mean()
        codebook: Tensor = out.commit_loss.mean()
        return pixels + 0.5 * distance + codebook

    return diffusers_loop(model, precision, floats(case), loss_of), model


def lucidrains_diffusion(case: Case, precision: str) -> tuple[Step, nn.Module]:
    """Its trainer with its network, which is as large but not the same."""
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from denoising_diffusion_pytorch import Trainer as Peer
    except ImportError as e:
        raise UldmError(
            "the benchmark needs denoising-diffusion-pytorch", "pip install denoising-diffusion-pytorch"
        ) from e
    assert case.unet is not None
    model = Unet(case.peer_dim, dim_mults=case.unet.channel_mult, channels=case.shape[0])
    diffusion = GaussianDiffusion(model, image_size=case.shape[1], objective="pred_noise")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(100):  # what it reads is replaced; it looks whether there are enough
            (Path(folder) / f"{i}.png").touch()
        trainer = Peer(
            diffusion,
            folder,
            train_batch_size=case.batch,
            train_lr=LR,
            train_num_steps=0,
            max_grad_norm=CLIP,
            ema_decay=DECAY,
            save_and_sample_every=EVER,
            results_folder=folder,
            calculate_fid=False,
            amp=precision != "fp32",
            mixed_precision_type=precision,
        )
    trainer.dl = ((image + 1) / 2 for image in floats(case))

    def step() -> None:
        trainer.train_num_steps = trainer.step + 1
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a progress bar, and that it is done
            trainer.train()

    return step, model


TRAINERS: dict[str, dict[str, Callable[[Case, str], tuple[Step, nn.Module]]]] = {
    "latents": {
        "uldm": uldm_diffusion,
        "diffusers": diffusers_diffusion,
        "denoising_diffusion_pytorch": lucidrains_diffusion,
    },
    "vqvae": {"uldm": uldm_autoencoder, "diffusers + lpips": diffusers_autoencoder},
    "cache": {"encoding": uldm_encoding, "cached": partial(uldm_encoding, cached=True)},
}
TRAINERS["pixels"] = TRAINERS["latents"]
