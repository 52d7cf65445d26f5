"""Training speed and memory against diffusers and `denoising_diffusion_pytorch`, in turns, as ratios.

usage: python benchmarks/training.py [--case NAME]... [--precision fp32|bf16]... [--steps N] [--rounds N] [--threads N]
                                      [--busy] [--resuming] [--check]

    latents   the denoiser of fruits64 (9.2 M parameters) in latents of 4x16x16, 16 a batch
    pixels    a U-Net of 6 M parameters in images of 3x32x32, 16 a batch
    vqvae     an autoencoder of the published VQ-f4 shape at a quarter of its width, with LPIPS, 8 images of 64x64
    cache     the denoiser of fruits64, 16 a batch, from images of 64x64 that the published VQ-f4 encodes in every step,
              or from cached latents

Each trainer has a process of its own, which sleeps while it is not its turn; a turn is a few steps. Ours has the
allocator's settings with which `uldm GROUP train` begins itself anew. A ratio is that of median images/s: ours over
the faster peer's, in the same precision, and ours in bfloat16 over the faster peer's in float32. Memory is the most
that its process has held. diffusers' network is the same as ours; the other's is as large within 2 % (parameters,
operations of a step), and has linear attention at the upper level. Everything but reading files is part of a step:
noise, loss, gradient, its clipping, AdamW, the moving average. On a machine that does other things, threads wait for
each other most of the time: take `--threads 1 --busy` there.

`--resuming` measures instead what `uldm vqvae train` does, on a folder of pictures: seconds from its start to the
first step's line of metrics, of a new run and of one that goes on in the middle of an epoch.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from uldm_cli import allocator, console
from uldm_cli.errors import UldmError

OURS = ("uldm", "encoding", "cached")
"""The trainers that begin as our commands do."""
FP32, BF16 = 1.3, 2.0
"""Aims: images/s over those of the faster peer in float32, of ours in float32 and in bfloat16."""
CACHED = 3.0
"""Aim: images/s from cached latents over those from images."""
CASES = ("latents", "pixels", "vqvae", "cache")


def serve(pipe: Connection, case: str, name: str, precision: str, threads: int, busy: bool) -> None:
    """In a process of its own: makes as many steps as it is told to, and says how many seconds they took."""
    clock = time.process_time if busy else time.perf_counter
    import torch
    from trainers import CASES, TRAINERS

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        step, network = TRAINERS[case][name](CASES[case], precision)
    except UldmError as e:
        pipe.send(e)
        return
    pipe.send((CASES[case].batch, sum(p.numel() for p in network.parameters())))
    for steps in iter(pipe.recv, 0):
        began = clock()
        for _ in range(steps):
            step()
        pipe.send(clock() - began)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


@dataclass
class Contestant:
    """A trainer in its process."""

    name: str
    precision: str
    pipe: Connection
    process: multiprocessing.process.BaseProcess
    batch: int = 0
    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of a step, by round."""
    peak: int = 0

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.batch / statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the distance of the quartiles, as a share of the median."""
        low, middle, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / middle

    def ask(self, steps: int) -> float:
        self.pipe.send(steps)
        return float(self.pipe.recv())


def begin(case: str, name: str, precision: str, threads: int, busy: bool) -> Contestant:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, case, name, precision, threads, busy), daemon=True)
    if name in OURS:
        os.environ[allocator.VARIABLE] = allocator.SETTINGS
    process.start()
    os.environ.pop(allocator.VARIABLE, None)
    theirs.close()  # so that a process which dies is noticed
    contestant = Contestant(name, precision, ours, process)
    said = ours.recv()
    if isinstance(said, UldmError):
        raise said
    contestant.batch, contestant.parameters = said
    return contestant


def compete(case: str, options: argparse.Namespace) -> list[Contestant]:
    """Every trainer of a case in every precision, in turns."""
    from trainers import TRAINERS

    names = [(name, precision) for precision in options.precision for name in TRAINERS[case]]
    contestants = [begin(case, name, precision, options.threads, options.busy) for name, precision in names]
    rounds, steps = options.rounds, options.steps
    with console.progress((rounds + 1) * len(contestants), f"measuring {case}", "turns") as progress:
        for number in range(rounds + 1):
            for contestant in contestants:
                taken = contestant.ask(steps if number else 1) / steps
                if number:  # the first turn warms up
                    contestant.seconds.append(taken)
                progress.advance()
    for contestant in contestants:
        contestant.peak = int(contestant.ask(0))
        contestant.process.kill()  # it has nothing left to do
        contestant.process.join()
    return contestants


def ratios(contestants: list[Contestant]) -> dict[str, float]:
    """Ours over the faster peer's."""
    rates = {(c.name, c.precision): c.rate for c in contestants}
    ours = {precision: rate for (name, precision), rate in rates.items() if name == "uldm"}
    peers = {p: max(rate for (name, q), rate in rates.items() if name != "uldm" and q == p) for p in ours}
    found = {f"{p} over the faster peer's {p}": ours[p] / peers[p] for p in ours}
    if {"fp32", "bf16"} <= ours.keys():
        found["bf16 over the faster peer's fp32"] = ours["bf16"] / peers["fp32"]
    return found


def gains(contestants: list[Contestant]) -> dict[str, float]:
    """Of the cache."""
    rates = {(c.name, c.precision): c.rate for c in contestants}
    precisions = dict.fromkeys(c.precision for c in contestants)
    return {f"cached over encoding, {p}": rates["cached", p] / rates["encoding", p] for p in precisions}


def aim(ratio: str) -> float | None:
    """What a ratio should be at least."""
    aims = {"fp32 over the faster peer's fp32": FP32, "bf16 over the faster peer's fp32": BF16}
    return CACHED if ratio.startswith("cached") else aims.get(ratio)


def speed(options: argparse.Namespace) -> bool:
    """Measures and shows the cases; whether all aims are met."""
    met = True
    for case in options.case or CASES:
        contestants = compete(case, options)
        found = gains(contestants) if case == "cache" else ratios(contestants)
        met &= all(ratio >= (aim(name) or 0) for name, ratio in found.items())
        rows = [
            [c.name, c.precision, f"{c.parameters / 1e6:.2f} M", f"{c.rate:.2f}", f"{c.spread:.0%}", c.peak // 10**6]
            for c in contestants
        ]
        data = [
            {"name": c.name, "precision": c.precision, "parameters": c.parameters}
            | {"images_per_second": c.rate, "spread": c.spread, "peak_bytes": c.peak}
            for c in contestants
        ]
        console.result(
            {"case": case, "threads": options.threads, "busy": options.busy, "trainers": data, "ratios": found},
            title=f"training, {case}, {options.threads} threads{', by the time of the processor' * options.busy}",
            columns=("trainer", "precision", "parameters", "images/s", "spread", "peak MB"),
            rows=rows,
            summary="; ".join(f"{ratio:.2f}: {name}" for name, ratio in found.items()),
        )
    return met


SETTINGS = [
    *("data=images", "data.size=64", "loss.lpips=0.5", "train.log_every=1", "train.save_every=100000"),
    *("autoencoder.in_channels=3", "train.batch_size=32", "train.picture_every=100000", "train.steps=100000"),
]
PICTURES, HALFWAY = 2048, 30
"""Pictures in the folder, and steps after which a run is stopped."""


def first_step(folder: Path, pictures: Path, threads: int, until: int = 1) -> float:
    """Starts a run, or goes on, and stops it after `until` steps: seconds until the first of them was in its metrics.

    Raises:
        UldmError: the run ended by itself.
    """
    command = [sys.executable, "-m", "uldm_cli", "vqvae", "train", *SETTINGS, f"data.root={pictures}"]
    metrics, size = folder / "metrics.jsonl", 0
    if metrics.exists():
        size = metrics.stat().st_size
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began, taken = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as said:
        run = subprocess.Popen([*command, "--outdir", str(folder)], stdout=said, stderr=said, env=environment)
        while run.poll() is None:
            if metrics.exists() and metrics.stat().st_size > size:
                taken = taken or time.perf_counter() - began
                if len(metrics.read_text().splitlines()) >= until:
                    run.send_signal(signal.SIGTERM)  # it saves
                    run.wait()
            time.sleep(0.002)
        said.seek(0)
        if not taken:
            raise UldmError(f"the run ended before its first step: {said.read().decode()[-500:]}")
    return taken


def write_pictures(folder: Path) -> None:
    """Noise: as many bytes to read and to decode as a picture of that size can have."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i:04}.png")


def resuming(rounds: int, threads: int) -> bool:
    """Measures and shows what going on costs; whether it is at most a batch."""
    fresh, resumed = [], []
    with tempfile.TemporaryDirectory() as place, console.progress(2 * rounds + 1, "measuring", "runs") as progress:
        pictures, begun = Path(place) / "pictures", Path(place) / "begun"
        pictures.mkdir()
        write_pictures(pictures)
        first_step(begun, pictures, threads, HALFWAY)
        progress.advance()
        lines = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
        batch: float = 32 / statistics.median(line["images_per_second"] for line in lines[5:])
        for i in range(rounds):
            fresh.append(first_step(Path(place) / f"fresh-{i}", pictures, threads))
            copied = shutil.copytree(begun, Path(place) / f"resumed-{i}")
            resumed.append(first_step(copied, pictures, threads))
            progress.advance(2)
    more: float = statistics.median(b - a for a, b in zip(fresh, resumed, strict=True))
    console.result(
        {"fresh_s": fresh, "resumed_s": resumed, "batch_s": batch, "more_s": more, "step": len(lines)},
        title="seconds to the first step",
        columns=("round", "new run", f"going on from step {len(lines)}"),
        rows=[[i, f"{a:.2f}", f"{b:.2f}"] for i, (a, b) in enumerate(zip(fresh, resumed, strict=True), 1)],
        summary=f"Going on takes {more:+.2f} s, a batch {batch:.2f} s",
    )
    return more <= batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all of them")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append", help="default: both")
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each trainer")
    parser.add_argument("--busy", action="store_true", help="count the processor's time: other programs are running")
    parser.add_argument("--resuming", action="store_true", help="measure the start of runs instead")
    parser.add_argument("--check", action="store_true", help="exit 1 where an aim is missed")
    options = parser.parse_args()
    options.precision = options.precision or ["fp32", "bf16"]
    if options.rounds < 2:
        parser.error("--rounds: at least 2, for the spread")
    try:
        met = resuming(options.rounds, options.threads) if options.resuming else speed(options)
    except UldmError as e:
        parser.exit(1, f"error: {e}\n")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
