"""Reading and converting a full-size published checkpoint, and time to the first step against diffusers.

usage: python benchmarks/loading.py [--folder DIR] [--rounds N] [--check]

The checkpoint has the layout and the architecture of the published FFHQ model (330 M parameters and their averages,
2.4 GB) and random weights. Every figure is of a fresh process, its start and its imports included: seconds of wall
time, and the peak of its resident memory. The ratio is uldm's time from the start to the first denoising step over
that of diffusers, which loads the folder that uldm converted.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from uldm_cli import console

LIMITS = {"inspect": (3.0, 500e6), "to-uldm": (None, 1.5e9), "to-diffusers": (None, 1.5e9)}
"""Seconds and bytes at most."""

CONFIG = {
    "autoencoder": {"kind": "vq"},
    "image_size": 256,
    "backbone": {
        "kind": "unet",
        "model_channels": 224,
        "channel_mult": [1, 2, 3, 4],
        "num_res_blocks": 2,
        "attention_resolutions": [8, 4, 2],
        "num_head_channels": 32,
    },
    "schedule": {"kind": "scaled_linear", "start": 0.0015, "end": 0.0195},
    "target": "eps",
    "scale_factor": 1.0,
}

OUR_STEP = """
import sys
import torch
from uldm_cli.runs.models import load_latent_diffusion, resolve
model = load_latent_diffusion(resolve(sys.argv[1]))
with torch.no_grad():
    model.denoiser(torch.randn(1, *model.latent_shape), 999)
"""
PEER_STEP = """
import sys
import torch
from diffusers import LDMPipeline
pipeline = LDMPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
pipeline.scheduler.set_timesteps(200)
with torch.no_grad():
    x = torch.randn(1, 3, 64, 64)
    t = pipeline.scheduler.timesteps[0]
    pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x)
"""


def make(folder: Path) -> None:
    """A checkpoint as the published ones are, in a new folder."""
    from uldm_cli.formats import compvis
    from uldm_cli.formats.checkpoint import Checkpoint, Header
    from uldm_cli.formats.tensors import TensorRef
    from uldm_cli.specs.models import LatentDiffusionModel, read_model

    model = read_model(LatentDiffusionModel, CONFIG, "the benchmark").build()
    backbone = model.denoiser.backbone.state_dict()
    parts = {"backbone": backbone, "ema": backbone, "autoencoder": model.autoencoder.state_dict()}
    tensors = {f"{part}.{key}": TensorRef.of(value) for part, state in parts.items() for key, value in state.items()}
    shapes = {name: ref.shape for name, ref in tensors.items()}
    header = Header("latent-diffusion", CONFIG, tensors=shapes)
    compvis.write(Checkpoint(folder, "uldm", header, tensors), folder)


def measured(*arguments: str) -> tuple[float, float]:
    """Seconds and peak bytes of a fresh Python."""
    began = time.perf_counter()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *arguments],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"failed: python {' '.join(arguments)}")
    return time.perf_counter() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put 7 GB of files; by default they are removed again")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; medians count")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is passed")
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        return _measure(Path(temporary), options.rounds, options.check)


def _measure(folder: Path, rounds: int, check: bool) -> int:
    # In a process of its own: the peak of a child is never below what its parent had when it was started.
    measured(__file__, "--make", str(folder / "published"))
    checkpoint, ours, peers = str(folder / "published/model.ckpt"), folder / "ours.safetensors", folder / "diffusers"
    once = {
        "inspect": ("-m", "uldm_cli", "convert", "inspect", checkpoint),
        "to-uldm": ("-m", "uldm_cli", "convert", "to-uldm", checkpoint, str(ours)),
        "to-diffusers": ("-m", "uldm_cli", "convert", "to-diffusers", checkpoint, str(peers)),
    }
    figures = {name: measured(*arguments) for name, arguments in once.items()}
    starts = {
        "first step, published file": ("-c", OUR_STEP, checkpoint),
        "first step, uldm's file": ("-c", OUR_STEP, str(ours)),
        "first step, diffusers": ("-c", PEER_STEP, str(peers)),
    }
    rounds_of = {name: [measured(*arguments) for _ in range(rounds)] for name, arguments in starts.items()}
    for name, all_ in rounds_of.items():
        figures[name] = statistics.median(s for s, _ in all_), max(b for _, b in all_)
    peer = figures["first step, diffusers"][0]
    ratios = {name: figures[name][0] / peer for name in starts}
    console.result(
        {"figures": figures, "ratios": ratios},
        title="A published checkpoint of 2.4 GB",
        columns=("what", "seconds", "peak MB", "seconds over diffusers'"),
        rows=[
            (n, f"{s:.2f}", f"{b / 1e6:,.0f}", f"{ratios[n]:.2f}" if n in ratios else "")
            for n, (s, b) in figures.items()
        ],
    )
    over = [name for name, (s, b) in LIMITS.items() if (s and figures[name][0] > s) or figures[name][1] > b]
    over += [name for name, ratio in ratios.items() if ratio > 1]
    return int(check and bool(over))


if __name__ == "__main__":
    sys.exit(main())
