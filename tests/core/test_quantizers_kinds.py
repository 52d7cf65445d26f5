"""Cosine codes and finite scalar quantization by hand, and what holds of every kind of quantizer."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uldm_cli.core.quantizers import FSQ, CosineQuantizer, EMAQuantizer, NearestQuantizer, Quantizer

KINDS = {
    "nearest": lambda: NearestQuantizer(24, 3, revive_below=0.999),
    "ema": lambda: EMAQuantizer(24, 3, decay=0.9, revive_below=0.5, seed=0),
    "cosine": lambda: CosineQuantizer(24, 3, revive_below=0.999),
    "projected": lambda: CosineQuantizer(24, 3, code_dim=2, revive_below=0.999),
    "fsq": lambda: FSQ((4, 3, 3)),
}
LEVELS = st.lists(st.integers(3, 9), min_size=1, max_size=4)


def latents(count: int = 2, dim: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, dim, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows(z: Tensor) -> Tensor:
    """`[N, D, h, w]` as `[M, D]`."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def column(*values: float) -> Tensor:
    """One latent as `[1, D, 1, 1]`."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


# Cosine


def test_cosine_looks_at_directions_alone() -> None:
    """Of the directions (1, 0), (0, 1), (-1, 0) the latent (30, 40) is nearest to (0, 1): cosines 0.6, 0.8, -0.6."""
    quantizer = CosineQuantizer(3, 2).eval()
    quantizer.embedding.data.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.01], [-1.0, 0.0]]))
    quantized = quantizer(column(30, 40))
    assert quantized.indices.item() == 1
    assert quantized.z.flatten().tolist() == [0.0, 1.0]
    # (0.6, 0.8) against (0, 1): squares 0.36 and 0.04
    assert quantized.losses["codebook_loss"].item() == pytest.approx(0.2)
    assert quantized.losses["commitment_loss"].item() == pytest.approx(0.2)
    torch.testing.assert_close(quantizer.codes, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))


def test_projected_cosine_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    quantizer = CosineQuantizer(24, 5, code_dim=3).eval()
    inside, outside = quantizer.project_in, quantizer.project_out
    z = latents(dim=5)
    points = F.normalize(rows(z) @ inside.weight.T + inside.bias, dim=1)
    table = F.normalize(quantizer.embedding, dim=1)
    chosen = F.cosine_similarity(points[:, None], table[None], dim=2).argmax(1)
    quantized = quantizer(z)
    assert torch.equal(quantized.indices.flatten(), chosen)
    torch.testing.assert_close(rows(quantized.z), table[chosen] @ outside.weight.T + outside.bias)
    torch.testing.assert_close(quantizer.codes[chosen], rows(quantized.z))
    torch.testing.assert_close(quantized.losses["codebook_loss"], F.mse_loss(table[chosen], points))


def test_gradients_pass_straight_through_the_projections() -> None:
    """As if the code were the normalised projection itself."""
    torch.manual_seed(0)
    quantizer = CosineQuantizer(24, 5, code_dim=3)
    z, upstream = latents(dim=5).requires_grad_(), torch.randn(2, 5, 4, 5)
    (quantizer(z).z * upstream).sum().backward()
    ours, z.grad = z.grad, None
    (rows(upstream) * quantizer.project_out(F.normalize(quantizer.project_in(rows(z)), dim=1))).sum().backward()
    torch.testing.assert_close(ours, z.grad)
    assert quantizer.embedding.grad is None or not quantizer.embedding.grad.any()
    losses = quantizer(latents(dim=5)).losses
    losses["codebook_loss"].backward()
    assert quantizer.embedding.grad.any()


def test_codes_of_length_one_are_spread_over_all_directions() -> None:
    torch.manual_seed(0)
    codes = CosineQuantizer(4096, 3).embedding
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(4096))
    assert codes.mean(0).norm() < 0.05


def test_a_dead_cosine_code_is_put_on_a_latents_direction() -> None:
    quantizer = CosineQuantizer(64, 3, revive_below=0.999)  # 40 latents: not all of the codes can be used
    quantizer(latents())
    quantizer.after_step(1)
    apart = (quantizer.embedding[:, None] - F.normalize(rows(latents()), dim=1)).norm(dim=2).min(1).values
    dead = quantizer.epoch_counts == 0
    assert dead.sum() > 24
    assert (apart[dead] < 1e-6).all()


# FSQ


def test_fsq_by_hand() -> None:
    """Five values -2 to 2 in units of 1/2: 1.998 tanh z. Four values -2 to 1: 1.4985 tanh(z + shift) - 0.5."""
    quantizer = FSQ((5, 4)).eval()
    for z, value in [(-9, -2), (-1.2, -2), (-0.9, -1), (-0.2, 0), (0, 0), (0.3, 1), (0.9, 1), (1.2, 2), (9, 2)]:
        assert round(1.998 * math.tanh(z)) == value
        assert quantizer(column(z, 0)).z[0, 0].item() == value / 2
    shift = math.tan(0.5 / 1.4985)
    for z, value in [(-9, -2), (-1.1, -1), (-1.3, -2), (0, 0), (-0.4, -1), (0.3, 0), (0.6, 1), (9, 1)]:
        assert round(1.4985 * math.tanh(z + shift) - 0.5) == value
        assert quantizer(column(0, z)).z[0, 1].item() == value / 2
    assert quantizer(column(-9, -9)).indices.item() == 0
    assert quantizer(column(0, -9)).indices.item() == 2
    assert quantizer(column(-9, 0)).indices.item() == 2 * 5  # the first channel counts fastest
    assert quantizer(column(9, 9)).indices.item() == 19
    losses = quantizer(column(1, 1)).losses
    assert {name: value.item() for name, value in losses.items()} == {"codebook_loss": 0, "commitment_loss": 0}


@given(LEVELS, st.integers(0, 1000), st.floats(0.1, 10))
@settings(deadline=None, max_examples=50)
def test_fsq_is_that_of_the_papers_appendix(levels: list[int], seed: int, scale: float) -> None:
    z = latents(dim=len(levels), seed=seed, dtype=torch.float64) * scale
    widths = torch.tensor(levels, dtype=torch.float64)
    half_l = (widths - 1) * (1 - 1e-3) / 2
    offset = torch.where(widths % 2 == 1, 0.0, 0.5).double()
    bounded = torch.tanh(rows(z) + torch.tan(offset / half_l)) * half_l - offset
    zhat = bounded.round() / (widths // 2)
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    index = ((zhat * (widths // 2) + widths // 2).round().long() * basis).sum(1)
    quantized = FSQ(levels).eval()(z)
    torch.testing.assert_close(rows(quantized.z), zhat, rtol=0, atol=1e-15)
    assert torch.equal(quantized.indices.flatten(), index)


@given(LEVELS)
@settings(deadline=None, max_examples=30)
def test_fsq_indices_and_codes_are_one_to_one(levels: list[int]) -> None:
    quantizer = FSQ(levels).eval()
    codes = quantizer.codes
    assert codes.shape == (math.prod(levels), len(levels))
    assert len(codes.unique(dim=0)) == len(codes)
    assert (codes.min(), codes.max() <= 1) == (-1, True)
    assert torch.equal(quantizer.nearest(codes), torch.arange(len(codes)))


def test_gradient_of_fsq_is_that_of_its_bound() -> None:
    quantizer, z = FSQ((5, 4, 3)), latents().requires_grad_()
    quantizer(z).z.sum().backward()
    reach, half = torch.tensor([1.998, 1.4985, 0.999]), torch.tensor([2.0, 2.0, 1.0])
    shift = torch.tensor([0.0, math.tan(0.5 / 1.4985), 0.0])
    expected = (1 - torch.tanh(rows(z.detach()) + shift) ** 2) * reach / half
    torch.testing.assert_close(rows(z.grad), expected)


def test_fsq_survives_a_step_that_went_wrong() -> None:
    quantizer = FSQ((4, 3, 3))
    z = (latents() * torch.tensor([torch.nan, torch.inf, 1.0]).view(1, 3, 1, 1)).requires_grad_()
    quantized = quantizer(z)
    assert quantized.z[:, 0].isnan().all()  # and it does not hide
    quantizer.forget_step()


def test_fsq_has_nothing_to_learn_or_to_save() -> None:
    quantizer = FSQ((8, 5, 5, 5))
    assert quantizer.codebook_size == 1000
    assert not list(quantizer.parameters())
    assert not quantizer.state_dict()


# Every kind


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_what_is_quantized_is_a_code_of_the_table(kind: str, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    quantizer = KINDS[kind]().eval()
    quantized = quantizer(latents(seed=seed) * scale)
    assert quantized.indices.shape == (2, 4, 5)
    assert 0 <= quantized.indices.min() <= quantized.indices.max() < quantizer.codebook_size
    assert quantizer.codes.shape == (quantizer.codebook_size, quantizer.dim)
    torch.testing.assert_close(rows(quantized.z), quantizer.codes[quantized.indices.flatten()], rtol=1e-6, atol=1e-6)
    assert set(quantized.losses) == {"codebook_loss", "commitment_loss"}


@pytest.mark.parametrize("kind", ["nearest", "ema", "cosine"])
def test_a_code_is_its_own_code(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = KINDS[kind]().eval()
    once = quantizer(latents())
    again = quantizer(once.z)
    assert torch.equal(again.indices, once.indices)
    torch.testing.assert_close(again.z, once.z)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays(kind: str) -> None:
    """Latents that differ by less than float32 can tell have losses, codes and averages that differ, too."""
    torch.manual_seed(0)
    quantizer = KINDS[kind]().double()
    z = latents(dtype=torch.float64).requires_grad_()
    quantized = quantizer(z)
    quantized.z.sum().backward()
    quantizer.after_step(1)
    floating = [quantized.z, z.grad, *quantized.losses.values()]
    floating += [value for value in quantizer.state_dict().values() if value.is_floating_point()]
    assert {value.dtype for value in floating} == {torch.float64}
    quantizer.eval()
    if kind != "fsq":
        assert quantizer.codes.dtype == torch.float64
        low = quantizer(z.detach().float().double()).losses["commitment_loss"]
        apart = abs(low - quantizer(z.detach()).losses["commitment_loss"])
        assert 0 < apart < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_and_in_a_model_of_less_precision(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = KINDS[kind]().eval()
    z = latents()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(z).z, quantizer.float()(z).z)
    low = quantizer.bfloat16()(z.bfloat16())
    assert low.z.dtype == torch.bfloat16
    assert quantizer.codes.dtype == torch.float32
    assert torch.equal(rows(low.z), quantizer.codes.bfloat16()[low.indices.flatten()])


@pytest.mark.parametrize("kind", ["nearest", "ema", "cosine", "fsq"])
def test_each_learns_to_tell_clusters_apart(kind: str) -> None:
    """Eight clusters: after training each has codes of its own, which no other uses."""

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        which = torch.arange(64) % 8
        corner = (which[:, None] // torch.tensor([1, 2, 4]) % 2) * 2.0 - 1
        return corner + 0.1 * torch.randn(64, 3, generator=generator), which

    torch.manual_seed(0)
    quantizer: Quantizer = KINDS[kind]()
    optimizer = torch.optim.Adam([*quantizer.parameters(), torch.zeros((), requires_grad=True)], lr=0.02)
    for step in range(1, 151):
        points, _ = batch(step)
        z = points.view(1, 8, 8, 3).permute(0, 3, 1, 2)
        quantized = quantizer(z)
        loss = (quantized.z - z).square().mean() + sum(quantized.losses.values())
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        quantizer.after_step(step)
    points, which = batch(1000)
    indices = quantizer.eval()(points.view(1, 8, 8, 3).permute(0, 3, 1, 2)).indices.flatten()
    owners = [set(which[indices == code].tolist()) for code in indices.unique()]
    assert all(len(owner) == 1 for owner in owners)
    assert len(set().union(*owners)) == 8
