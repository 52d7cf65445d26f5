"""What looking into fruits64 costs while it samples, against the sampling itself, as ratios.

usage: python benchmarks/explain.py [--batch N]... [--steps N] [--looks N] [--rounds N] [--check]

Saliency maps over the steps at which they are made: time of a gradient map (of the energy of x0) over that of a step of
the same batch; at most 5. Attention over the whole run: time of the looks (the network runs again, and all its layers
show their attention) over that of all steps; less than 10 %. All in float32, in turns; the ratio is of the median
times.

Memory is that of one sample with latents of 64 x 64, where attention is large: how far the peak of a process of its own
is above that of a step. For attention it is counted in the largest layer's probabilities, of which there are five in a
step; at most 3, since a softmax has an input and an output.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypedDict

import torch

from uldm_cli import console
from uldm_cli.core.attention_maps import View, layer_maps, layers, mean_map
from uldm_cli.core.saliency import saliency, x0_energy
from uldm_cli.runs.models import load_latent_diffusion, resolve

LIMITS = {"saliency": 5.0, "attention": 0.1}
"""Ratios of times, at most."""
LAYERS = 3.0
"""Memory of attention, in the probabilities of the largest layer, at most."""
T, LARGE = 500, 64


class Figures(TypedDict):
    batch: int
    seconds: dict[str, float]
    ratios: dict[str, float]


def workloads(batch: int, size: int | None = None) -> dict[str, Callable[[], object]]:
    """One step, and one look at it; of the model's own size, or of square latents."""
    model = load_latent_diffusion(resolve(None))
    channels, *own = model.latent_shape
    height, width = own if size is None else (size, size)
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def step() -> object:
        return model.denoiser(x, T)

    def attention() -> object:
        return mean_map(layer_maps(model.denoiser.backbone, step, (height, width), View()))

    return {"step": step, "saliency": lambda: saliency(model.denoiser, x, T, x0_energy), "attention": attention}


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, the median of `rounds`, after two that warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with console.progress((rounds + 2) * len(runs), "measuring", "runs") as progress:
        for _ in range(rounds + 2):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
                progress.advance()
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def peak(name: str) -> int:
    """Bytes at the peak of this process, which has done nothing else."""
    workloads(1, LARGE)[name]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> dict[str, float]:
    """Bytes that looks need beyond a step, and those of one layer's probabilities."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak, (name,)) for name in ("step", *LIMITS)}
    heads = max(
        layer.heads for layer in layers(load_latent_diffusion(resolve(None)).denoiser.backbone) if layer.factor == 1
    )
    return {name: peaks[name] - peaks["step"] for name in LIMITS} | {"layer": 4.0 * heads * LARGE**4}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=200, help="of the run")
    parser.add_argument("--looks", type=int, default=5, help="steps at which one looks")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is passed")
    options = parser.parse_args()
    rows: list[list[object]] = []
    data: list[Figures] = []
    for batch in options.batch:
        seconds = medians(workloads(batch), options.rounds)
        ratios = {
            "saliency": seconds["saliency"] / seconds["step"],
            "attention": options.looks * seconds["attention"] / (options.steps * seconds["step"]),
        }
        data.append({"batch": batch, "seconds": seconds, "ratios": ratios})
        times = [f"{1000 * s:.1f}" for s in seconds.values()]
        rows.append([batch, *times, f"{ratios['saliency']:.2f}", f"{ratios['attention']:.1%}"])
    needed = memory()
    in_layers = needed["attention"] / needed["layer"]
    console.result(
        {"steps": options.steps, "looks": options.looks, "rows": data, "bytes": needed, "attention_layers": in_layers},
        title=f"fruits64, looking at {options.looks} of {options.steps} steps: milliseconds, and ratios",
        columns=("batch", "step", "saliency", "attention", "saliency / step", "attention / whole run"),
        rows=rows,
        summary=f"At {LARGE} x {LARGE}, saliency needs {needed['saliency'] / 1e6:.0f} MB more than a step, attention "
        f"{needed['attention'] / 1e6:.0f} MB ({in_layers:.1f} layers)",
    )
    over = in_layers > LAYERS or any(row["ratios"][name] > limit for row in data for name, limit in LIMITS.items())
    return int(options.check and over)


if __name__ == "__main__":
    sys.exit(main())
