"""Quantizers side by side: the same small VQ-VAE trained with each on real photographs, as a Markdown table.

python benchmarks/codebooks.py --write docs/quantizers.md        # about 20 minutes on one core
python benchmarks/codebooks.py --epochs 1 --only ema fsq         # a quick look

The data are `fruits64` in the folder that ULDM_TEST_ASSETS names, or --data and --test: folders or archives of images.
Each training is one of `uldm vqvae train`, in a folder of its own under --outdir; a run that was stopped goes on where
it was, and one that is finished is only measured again.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uldm_cli import console
from uldm_cli.core.data import open_images, sequential
from uldm_cli.core.images import to_uint8
from uldm_cli.core.quantizers import usage
from uldm_cli.core.training import to_float
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs import vqvae_train
from uldm_cli.runs.files import atomic_write
from uldm_cli.runs.metrics import read_lines
from uldm_cli.runs.models import load_autoencoder, resolve
from uldm_cli.runs.perceptual import load_lpips
from uldm_cli.specs.autoencoder_training import AutoencoderTraining

SIZE, BATCH, CODES = 32, 32, 1024
ROUNDS, TIMED = 3, 40
"""Of the trainings that only time is taken of: how many, and their steps."""
QUANTIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest-unrevived": ("`nearest`, `revive_below: 0`", {"kind": "nearest", "revive_below": 0}),
    "nearest": ("`nearest`", {"kind": "nearest"}),
    "ema": ("`ema`", {"kind": "ema"}),
    "cosine": ("`cosine`", {"kind": "cosine"}),
    "fsq": ("`fsq`, `levels: [8, 8, 4, 4]`", {"kind": "fsq", "levels": (8, 8, 4, 4)}),
}
BEGIN, END = "<!-- benchmarks/codebooks.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Row:
    """What came out with one quantizer."""

    title: str
    psnr: float
    """Mean over test images, in dB, in 8 bits; by the averaged weights, like all that is measured on them."""
    lpips: float
    perplexity: float
    """Over the last epoch of training."""
    usage: float
    """Share of the codes used in that epoch."""
    test_usage: float
    """Share of the codes used in the test images."""


def config(quantizer: dict[str, Any], data: Path, steps: int, device: str) -> AutoencoderTraining:
    """The training, which is to end with the end of an epoch."""
    shape = {"down_channels": (8, 16, 16), "mid_channels": (16, 16), "norm_channels": 8, "num_heads": 2}
    depth = {"num_down_layers": 1, "num_up_layers": 1, "z_channels": 4, "codebook_size": CODES}
    return AutoencoderTraining.model_validate(
        {
            "autoencoder": {"kind": "vqvae", "in_channels": 3, **shape, **depth, "quantizer": quantizer},
            "data": {"kind": "images", "root": str(data), "size": SIZE},
            "optim": {"lr": 2e-3, "weight_decay": 0.0, "warmup_steps": 50},
            "train": {
                "steps": steps,
                "batch_size": BATCH,
                "precision": "fp32",
                "device": device,
                "workers": 0,
                "log_every": 10,
                "picture_every": 10**6,
            },
        }
    )


def measure(title: str, spec: AutoencoderTraining, folder: Path, test: Path, limit: int) -> Row:
    """Trains, unless that is done already, and looks at test images."""
    result = vqvae_train.run(vqvae_train.plan(spec, folder, None))
    lines = read_lines(folder / "metrics.jsonl")
    psnr, lpips, counts = reconstruct(result.checkpoint, test, limit)
    return Row(
        title,
        psnr,
        lpips,
        lines[-1]["perplexity"],
        lines[-1]["usage"],
        float(usage(counts)),
    )


def rates(specs: Mapping[str, AutoencoderTraining]) -> dict[str, float]:
    """Images a second of each, by the fastest ten steps of short trainings in turns.

    Others may have waited for what else the machine had to do; the first ones of a training do.
    """
    best = dict.fromkeys(specs, 0.0)
    for _ in range(ROUNDS):
        for name, spec in specs.items():
            with tempfile.TemporaryDirectory() as folder:
                vqvae_train.run(vqvae_train.plan(spec, Path(folder), None))
                lines = read_lines(Path(folder) / "metrics.jsonl")
            best[name] = max(best[name], *(line["images_per_second"] for line in lines[1:]))
    return best


@torch.inference_mode()
def reconstruct(checkpoint: Path, test: Path, limit: int) -> tuple[float, float, torch.Tensor]:
    """PSNR, LPIPS by AlexNet and the codes' counts on `limit` test images at equal distances."""
    model: Any = load_autoencoder(resolve(str(checkpoint), "autoencoder"))
    distance = load_lpips()
    counts = torch.zeros(CODES, dtype=torch.int64)
    images = open_images(test, size=SIZE, strict=True)
    chosen = set(torch.linspace(0, len(images) - 1, min(limit, len(images))).round().long().tolist())
    decibels, apart = [], []
    for batch in sequential(images, batch_size=64):
        kept = [i for i, number in enumerate(batch.number.tolist()) if number in chosen]
        x = to_float(batch.image[kept])
        if not len(x):
            continue
        z, _, indices = model.encode_with_indices(x)
        counts += torch.bincount(indices.flatten(), minlength=CODES)
        again = torch.from_numpy(to_uint8(model.decode(z))).permute(0, 3, 1, 2)
        mse = (batch.image[kept].double() - again).square().mean((1, 2, 3))
        decibels.append(10 * torch.log10(255**2 / mse))
        apart.append(distance(x, to_float(again)).flatten())
    return float(torch.cat(decibels).mean()), float(torch.cat(apart).mean()), counts


def table(rows: Mapping[str, Row], rates: Mapping[str, float]) -> str:
    """As Markdown."""
    lines = [
        "| quantizer | PSNR, dB | LPIPS | entropy, bits | perplexity | codes used | in test images | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        entropy, share = math.log2(row.perplexity), f"{row.usage:.1%} | {row.test_usage:.1%}"
        figures = f"{row.psnr:.2f} | {row.lpips:.4f} | {entropy:.2f} | {row.perplexity:.0f} | {share}"
        lines.append(f"| {row.title} | {figures} | {rates[name]:.0f} |")
    return "\n".join(lines)


def around(page: Path) -> tuple[str, str]:
    """What stands before and after the place of the table in a page, the two marks included."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"{page} lacks the lines between which the table goes", f"Write {BEGIN} and {END} into it")
    return before + begin, end + after


def main() -> int:
    """Print the table, and write it into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    assets = Path(os.environ.get("ULDM_TEST_ASSETS", "../shared")) / "data/fruits64"
    parser.add_argument("--data", type=Path, default=assets / "training.tar", help="images to train on")
    parser.add_argument("--test", type=Path, default=assets / "test.tar", help="other images, to measure with")
    parser.add_argument("--epochs", type=int, default=3, help="how often training sees each image (default: 3)")
    parser.add_argument("--limit", type=int, default=1000, help="test images that are looked at (default: 1000)")
    parser.add_argument("--only", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS), help="quantizers to compare")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/codebooks"), help="folder of the training runs")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps (default: cpu)")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    options = parser.parse_args()
    rows = {}
    try:
        if options.write:
            around(options.write)  # a page that cannot take the table is found before the training
        steps = math.ceil(options.epochs * len(open_images(options.data, size=SIZE)) / BATCH)
        chosen = {name: QUANTIZERS[name] for name in options.only}
        for name, (title, quantizer) in chosen.items():
            spec = config(quantizer, options.data, steps, options.device)
            rows[name] = measure(title, spec, options.outdir / name, options.test, options.limit)
        short = {name: config(one, options.data, TIMED, options.device) for name, (_, one) in chosen.items()}
        text = table(rows, rates(short))
        console.text(text)
        if options.write:
            whole = f"\n\n{text}\n\n".join(around(options.write)).encode()
            atomic_write(options.write, lambda file: file.write(whole))
    except UldmError as e:
        console.error(e)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
