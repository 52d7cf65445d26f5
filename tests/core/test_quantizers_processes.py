"""Quantizers trained by two processes end as by one that sees the same samples, however they are cut up."""

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core import collectives
from uldm_cli.core.quantizers import FSQ, CosineQuantizer, EMAQuantizer, NearestQuantizer

KINDS = {
    "nearest": lambda: NearestQuantizer(48, 3, revive_below=0.97, seed=5),
    "cosine": lambda: CosineQuantizer(48, 3, code_dim=2, revive_below=0.97, seed=5),
    "ema": lambda: EMAQuantizer(48, 3, decay=0.9, revive_below=0.5, seed=5),
    "fsq": lambda: FSQ((4, 4, 3)),
}


def trained(kind: str, parts: int) -> dict[str, Tensor]:
    """Trains in float64, each process on its chunks of the same steps, of which the third is skipped.

    The gradients' mean over the processes and micro-batches is what DDP makes.
    """
    world, rank = collectives.world(), collectives.rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), KINDS[kind]()).double()
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
    return {**model.state_dict(), **model[1].state(), "moved": moved}


def compute() -> dict[str, Tensor]:
    """What every kind ends with, as `KIND.PARTS.NAME`."""
    cases = [(kind, parts) for kind in KINDS for parts in (1, 2)]
    return {f"{kind}.{parts}.{name}": value for kind, parts in cases for name, value in trained(kind, parts).items()}


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_two_processes_end_as_one(computed, kind: str, parts: int) -> None:
    ended = [computed.alone, *computed.parts]
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
def test_micro_batches_change_nothing(computed, kind: str) -> None:
    """But an EMA codebook starts on latents of the first micro-batch, which is then another."""
    for name, value in computed.alone.items():
        if name.startswith(f"{kind}.1."):
            torch.testing.assert_close(computed.alone[name.replace(".1.", ".2.", 1)], value, rtol=0, atol=1e-9)
