"""Sampling speed against diffusers: the same architecture, batch and steps, in turns in one process, as ratios.

usage: python benchmarks/sampling.py [--model embedded|ffhq] [--batch N]... [--steps N] [--rounds N] [--compile]

`embedded` is fruits64's U-Net (9.2 M parameters, 4x16x16 latents) with its weights; `ffhq` is the architecture of the
published FFHQ model (274 M, 3x64x64) with random ones. diffusers runs `UNet2DModel` with `DDIMScheduler` in float32,
as its pipelines do. A round is a few DDIM steps of each in turn; the ratio is of the median times. For the embedded
model the images of bfloat16 are compared with those of float32 (PSNR, 50 steps).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from uldm_cli import console
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.specs.backbones import UNet
from uldm_cli.specs.samplers import DDIM
from uldm_cli.specs.schedules import ScaledLinear

FFHQ = UNet(
    model_channels=224,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=2,
    attention_resolutions=(8, 4, 2),
    num_head_channels=32,
)
SHAPES = {"embedded": (4, 16, 16), "ffhq": (3, 64, 64)}


def uldm_denoiser(model: str, precision: str, compile: bool) -> Denoiser:
    """The denoiser as `uldm ldm sample` has it."""
    if model == "embedded":
        denoiser = load_latent_diffusion(resolve(None), precision=precision).denoiser
    else:
        channels = SHAPES[model][0]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        backbone = FFHQ.build(channels, channels).eval().to(dtype).to(memory_format=torch.channels_last)
        denoiser = Denoiser(backbone, ScaledLinear().build(), "eps")
    if compile:
        denoiser.backbone.compile()
    return denoiser


def peer_network(model: str) -> nn.Module:
    """diffusers' network of the same architecture, in float32."""
    spec = resolve(None).header.config["backbone"] if model == "embedded" else FFHQ.model_dump()
    attends = [2**level in spec["attention_resolutions"] for level in range(len(spec["channel_mult"]))]
    network: nn.Module = UNet2DModel(  # type: ignore[no-untyped-call, assignment]  # diffusers has no types
        sample_size=SHAPES[model][1],
        in_channels=SHAPES[model][0],
        out_channels=SHAPES[model][0],
        layers_per_block=spec["num_res_blocks"],
        block_out_channels=[spec["model_channels"] * mult for mult in spec["channel_mult"]],
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        attention_head_dim=spec["num_head_channels"],
    )
    return network.eval()


def uldm_run(denoiser: Denoiser, x: Tensor, steps: int) -> None:
    noise = PerSampleNoise(range(len(x)), x.shape[1:])
    for _ in DDIM(steps=steps, eta=1.0).build()(denoiser, x, denoiser.schedule, noise):
        pass


@torch.no_grad()
def peer_run(network: nn.Module, x: Tensor, steps: int) -> None:
    scheduler: Any = DDIMScheduler(  # type: ignore[no-untyped-call]
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, eta=1.0, generator=generators).prev_sample


def medians(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each, the median of `rounds`, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with console.progress((rounds + 1) * len(runs), "measuring", "runs") as progress:
        for _ in range(rounds + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
                progress.advance()
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def image_psnr() -> list[float]:
    """PSNR in dB of 16 images in bfloat16 against the same in float32, rising."""

    def images(model: LatentDiffusion) -> Tensor:
        noise = PerSampleNoise(range(16), model.latent_shape)
        *_, last = DDIM(steps=50, eta=0.0).build()(model.denoiser, noise.initial(), model.schedule, noise)
        return model.decode(last.x).clamp(-1, 1)

    exact, rough = (images(load_latent_diffusion(resolve(None), precision=p)) for p in ("fp32", "bf16"))
    error = ((exact - rough) / 2).square().mean((1, 2, 3))
    return sorted((-10 * error.log10()).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="embedded")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile uldm's network; diffusers' stays as it is")
    args = parser.parse_args()
    peer = peer_network(args.model)
    ours = {precision: uldm_denoiser(args.model, precision, args.compile) for precision in ("fp32", "bf16")}
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours["fp32"].backbone.parameters())
    rows, data = [], []
    for batch in args.batch:
        x = torch.randn(batch, *SHAPES[args.model], generator=torch.Generator().manual_seed(0))
        runs: dict[str, Callable[[], None]] = {"diffusers": partial(peer_run, peer, x, args.steps)}
        runs |= {name: partial(uldm_run, denoiser, x, args.steps) for name, denoiser in ours.items()}
        times = medians(runs, args.rounds)
        row = {"batch": batch} | {f"{name}_s_per_step": t / args.steps for name, t in times.items()}
        row |= {f"{name}_ratio": times["diffusers"] / times[name] for name in ours}
        data.append(row)
        rows.append(list(row.values()))
    similarity = image_psnr() if args.model == "embedded" else []
    middle = f"{statistics.median(similarity):.1f} dB, lowest {similarity[0]:.1f} dB" if similarity else "not measured"
    console.result(
        {"model": args.model, "compiled": args.compile, "rows": data, "bf16_psnr": similarity},
        title=f"{args.model}{', compiled' if args.compile else ''}: seconds a step, and times as fast as diffusers",
        columns=("batch", "diffusers fp32", "fp32", "bf16", "ratio fp32", "ratio bf16"),
        rows=rows,
        summary=f"bf16 images against fp32's: median {middle}",
    )


if __name__ == "__main__":
    main()
