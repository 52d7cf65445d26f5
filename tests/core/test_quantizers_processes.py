"""Quantizers trained by two processes end as by one that sees the same samples, however they are cut up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import uldm_cli

# Each process trains every kind, in float64, on its chunks of the same steps. The gradients' mean over the processes
# and micro-batches is what DDP makes. Step 3 is skipped.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from uldm_cli.core import collectives
from uldm_cli.core.quantizers import FSQ, CosineQuantizer, EMAQuantizer, NearestQuantizer

rank, world, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[4], rank=rank, world_size=world)
KINDS = {
    "nearest": lambda: NearestQuantizer(48, 3, revive_below=0.97, seed=5),
    "cosine": lambda: CosineQuantizer(48, 3, code_dim=2, revive_below=0.97, seed=5),
    "ema": lambda: EMAQuantizer(48, 3, decay=0.9, revive_below=0.5, seed=5),
    "fsq": lambda: FSQ((4, 4, 3)),
}

def trained(build, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), build()).double()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.02)
    moved = torch.zeros((), dtype=torch.int64)
    for step in range(1, 13):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        for a in range(parts):
            chunk = x.chunk(parts * world)[a * world + rank]
            quantized = model(chunk * torch.nan if step == 3 else chunk)
            loss = quantized.z.square().mean() + sum(quantized.losses.values())
            (loss / parts).backward()
        if step == 3:
            model[1].forget_step()
            continue
        for p in learned:
            p.grad = collectives.mean(p.grad)
        optimizer.step()
        before = model[1].codes.detach().clone()
        model[1].after_step(step)
        moved += ((model[1].codes - before).abs().sum(1) > 0.3).sum()
    state = model[1].state()
    return {**model.state_dict(), **state, "moved": moved}

found = {}
for name, build in KINDS.items():
    for parts in (1, 2):
        found |= {f"{name}.{parts}.{key}": value.contiguous() for key, value in trained(build, parts).items()}
save_file(found, out)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What one process ended with, and each of two."""
    folder = tmp_path_factory.mktemp("processes")
    root = str(Path(uldm_cli.__file__).resolve().parent.parent)
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SCRIPT,
                str(rank),
                str(world),
                str(folder / f"{world}-{rank}"),
                str(folder / "meet"),
            ],
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in [(0, 1), (0, 2), (1, 2)]
    ]
    for run in runs:
        _, said = run.communicate(timeout=200)
        assert run.returncode == 0, said
    return [load_file(folder / name) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("kind", ["nearest", "cosine", "ema", "fsq"])
def test_two_processes_end_as_one(ended: list[dict[str, Tensor]], kind: str, parts: int) -> None:
    own = [{k: v for k, v in one.items() if k.startswith(f"{kind}.{parts}.")} for one in ended]
    alone = own[0]
    assert alone[f"{kind}.{parts}.epoch_counts"].sum() == 11 * 8 * 16
    if kind != "fsq":
        assert alone[f"{kind}.{parts}.moved"] > 10  # codes that have been put elsewhere
    for both in own[1:]:
        for name, value in alone.items():
            torch.testing.assert_close(both[name], value, rtol=0, atol=1e-9, msg=name)
    assert all(torch.equal(own[1][name], own[2][name]) for name in alone)


@pytest.mark.parametrize("kind", ["nearest", "cosine", "fsq"])
def test_micro_batches_change_nothing(ended: list[dict[str, Tensor]], kind: str) -> None:
    """But an EMA codebook starts on latents of the first micro-batch, which is then another."""
    for name, value in ended[0].items():
        if name.startswith(f"{kind}.1."):
            torch.testing.assert_close(ended[0][name.replace(".1.", ".2.", 1)], value, rtol=0, atol=1e-9)
