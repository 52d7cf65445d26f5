"""One process against two: the same training by torchrun, and by how much figures and weights differ.

usage: python benchmarks/processes.py [--steps N]

A VQ-VAE with an EMA codebook and a discriminator is trained on the embedded pictures, in float64 and in float32, by one
process and by two gloo processes with the same global batch. A line of the table is the largest relative difference of
any figure of `metrics.jsonl` up to a step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from uldm_cli import console
from uldm_cli.errors import UldmError

SETTINGS = (
    *("autoencoder.down_channels=[16,32,32]", "autoencoder.mid_channels=[32,32]", "autoencoder.norm_channels=8"),
    *("autoencoder.codebook_size=256", 'adversarial={"start":10,"warmup_steps":10}'),
    *("train.batch_size=32", "train.log_every=1", "train.save_every=1000", "train.picture_every=1000"),
)
NOT_COMPARED = ("images_per_second", "data_wait")


def train(processes: int, precision: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """The lines of metrics of a training by so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "uldm_cli"]
    where = ["--device", "cpu", "--precision", precision, "--outdir", str(folder)]
    command = [sys.executable, *launcher, "vqvae", "train", *SETTINGS, f"train.steps={steps}", *where, "-q"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise UldmError(f"{processes} processes in {precision} failed: {ended.stderr.strip()[-2000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(one: list[dict[str, float]], two: list[dict[str, float]], steps: int) -> tuple[float, str]:
    """The largest relative difference up to a step, and of which figure."""
    found = [
        (abs(a[name] - b[name]) / max(abs(a[name]), 1e-12), name)
        for a, b in zip(one[:steps], two[:steps], strict=True)
        for name in a
        if name not in NOT_COMPARED
    ]
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps: int = parser.parse_args().steps
    rows = []
    with tempfile.TemporaryDirectory() as temporary, console.progress(4, "training", "runs") as progress:
        for precision in ("fp64", "fp32"):
            one = train(1, precision, steps, Path(temporary) / f"{precision}-1")
            progress.advance()
            two = train(2, precision, steps, Path(temporary) / f"{precision}-2")
            progress.advance()
            for until in sorted({min(5, steps), steps}):
                rows.append((precision, until, *difference(one, two, until)))
    console.result(
        {"rows": [dict(zip(("precision", "steps", "difference", "figure"), row, strict=True)) for row in rows]},
        title="Two processes against one, with the same global batch",
        columns=("precision", "steps", "largest relative difference", "of"),
        rows=[(precision, until, f"{error:.1e}", name) for precision, until, error, name in rows],
    )


if __name__ == "__main__":
    main()
