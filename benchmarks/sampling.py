"""Sampling speed against diffusers: the same architecture, batch and steps, in turns in one process, as ratios.

usage: python benchmarks/sampling.py [--model embedded|ffhq] [--batch N]... [--steps N] [--rounds N] [--compile]
                                      [--decode]

`embedded` is fruits64's U-Net (9.2 M parameters, 4x16x16 latents) with its weights; `ffhq` is the architecture of the
published FFHQ model (274 M, 3x64x64) with random ones; `--decode` adds its first stage, so that it goes from noise to
an image of 256x256. diffusers runs `UNet2DModel` with `DDIMScheduler`, and `VQModel`, in float32, as its pipelines do.
A round is a few DDIM steps of each in turn; the ratio is of the median times. For the embedded model the images of
bfloat16 are compared with those of float32 (PSNR, 50 steps).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from loading import CONFIG
from torch import Tensor, nn

from uldm_cli import console
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.specs.models import LatentDiffusionModel, read_model
from uldm_cli.specs.samplers import DDIM

FFHQ = read_model(LatentDiffusionModel, CONFIG, "the benchmark")
SHAPES = {"embedded": (4, 16, 16), "ffhq": (3, 64, 64)}


def uldm_model(model: str, precision: str, compile: bool) -> LatentDiffusion:
    """The model as `uldm ldm sample` has it."""
    if model == "embedded":
        whole = load_latent_diffusion(resolve(None), precision=precision)
    else:
        whole = FFHQ.build().eval().requires_grad_(False)
        for network in (whole.denoiser.backbone, whole.autoencoder):
            network.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    if compile:
        whole.denoiser.backbone.compile()
    return whole


def peer_network(model: str) -> nn.Module:
    """diffusers' network of the same architecture, in float32."""
    spec = (resolve(None).header.config if model == "embedded" else FFHQ.model_dump())["backbone"]
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


def peer_first_stage() -> Any:
    """diffusers' first stage of the FFHQ model."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    first_stage = VQModel(  # type: ignore[no-untyped-call]
        block_out_channels=[128, 256, 512], layers_per_block=2, num_vq_embeddings=8192, vq_embed_dim=3, **blocks
    )
    return first_stage.eval()  # type: ignore[attr-defined]


def uldm_run(model: LatentDiffusion, x: Tensor, steps: int, decode: bool) -> None:
    noise = PerSampleNoise(range(len(x)), x.shape[1:])
    *_, last = DDIM(steps=steps, eta=1.0).build()(model.denoiser, x, model.schedule, noise)
    if decode:
        model.decode(last.x)


@torch.no_grad()
def peer_run(network: nn.Module, first_stage: Any, x: Tensor, steps: int) -> None:
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
    if first_stage is not None:
        first_stage.decode(x)


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
    parser.add_argument("--decode", action="store_true", help="decode the result, too (only with --model ffhq)")
    args = parser.parse_args()
    if args.decode and args.model != "ffhq":
        parser.error("diffusers has no autoencoder like that of the embedded model: --decode needs --model ffhq")
    peer, first_stage = peer_network(args.model), peer_first_stage() if args.decode else None
    ours = {precision: uldm_model(args.model, precision, args.compile) for precision in ("fp32", "bf16")}
    backbone = ours["fp32"].denoiser.backbone
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in backbone.parameters())
    rows, data = [], []
    for batch in args.batch:
        x = torch.randn(batch, *SHAPES[args.model], generator=torch.Generator().manual_seed(0))
        runs: dict[str, Callable[[], None]] = {"diffusers": partial(peer_run, peer, first_stage, x, args.steps)}
        runs |= {name: partial(uldm_run, model, x, args.steps, args.decode) for name, model in ours.items()}
        times = medians(runs, args.rounds)
        row = {"batch": batch} | {f"{name}_s_per_step": t / args.steps for name, t in times.items()}
        row |= {f"{name}_ratio": times["diffusers"] / times[name] for name in ours}
        data.append(row)
        rows.append(list(row.values()))
    similarity = image_psnr() if args.model == "embedded" else []
    middle = f"{statistics.median(similarity):.1f} dB, lowest {similarity[0]:.1f} dB" if similarity else "not measured"
    console.result(
        {"model": args.model, "compiled": args.compile, "decoded": args.decode, "rows": data, "bf16_psnr": similarity},
        title=f"{args.model}{', compiled' * args.compile}{', decoded' * args.decode}: "
        "seconds a step, and times as fast as diffusers",
        columns=("batch", "diffusers fp32", "fp32", "bf16", "ratio fp32", "ratio bf16"),
        rows=rows,
        summary=f"bf16 images against fp32's: median {middle}",
    )


if __name__ == "__main__":
    main()
