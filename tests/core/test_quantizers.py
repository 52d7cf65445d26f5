"""Quantizers against brute force and arithmetic by hand; collapse and revival; what is known of the codes' use."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uldm_cli.core import rng
from uldm_cli.core.quantizers import EMAQuantizer, NearestQuantizer, Quantizer, entropy, perplexity, usage
from uldm_cli.errors import ConfigError


def latents(count: int = 2, dim: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, 4, 5, generator=torch.Generator().manual_seed(seed))


def rows(z: Tensor) -> Tensor:
    """`[N, D, h, w]` as `[M, D]`."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def with_codes(codes: Tensor, kind: type[Quantizer] = NearestQuantizer, **settings: object) -> Quantizer:
    quantizer = kind(len(codes), codes.shape[1], **settings)
    quantizer.embedding.data.copy_(codes)
    return quantizer


def ema_with_codes(codes: Tensor, *, decay: float = 0.9, revive_below: float = 0.0) -> EMAQuantizer:
    """As if trained until now on batches that used each code once."""
    quantizer = with_codes(codes, EMAQuantizer, decay=decay, revive_below=revive_below, seed=0)
    quantizer.cluster_sum.copy_(codes)
    quantizer.initialized.fill_(True)
    return quantizer


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_nearest_is_that_of_brute_force(size: int, dim: int, seed: int) -> None:
    z = latents(dim=dim, seed=seed)
    quantizer = with_codes(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed + 1))).eval()
    distances = (rows(z)[:, None].double() - quantizer.codes.double()).square().sum(-1)
    quantized = quantizer(z)
    assert quantized.indices.shape == (2, 4, 5)
    chosen = distances.gather(1, quantized.indices.view(-1, 1))[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-4, atol=1e-5)
    assert torch.equal(rows(quantized.z), quantizer.codes[quantized.indices.flatten()])


def test_gradients_pass_straight_through() -> None:
    z = latents().requires_grad_()
    quantizer = with_codes(torch.randn(7, 3))
    upstream = torch.randn(2, 3, 4, 5)
    (quantizer(z).z * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    assert quantizer.embedding.grad is None or not quantizer.embedding.grad.any()


def test_losses_by_hand() -> None:
    """Two latents of two dimensions: (1, 0) takes the code (1, 1), and (5, 4) the code (4, 4)."""
    quantizer = with_codes(torch.tensor([[1.0, 1.0], [4.0, 4.0], [-9.0, 0.0]]))
    z = torch.tensor([[1.0, 5.0], [0.0, 4.0]]).view(1, 2, 1, 2).requires_grad_()
    losses = quantizer(z).losses
    assert losses["codebook_loss"].item() == losses["commitment_loss"].item() == 0.5  # squares 0, 1, 1, 0: their mean
    losses["codebook_loss"].backward()
    assert z.grad is None  # it moves the codes only
    torch.testing.assert_close(quantizer.embedding.grad, torch.tensor([[0.0, 0.5], [-0.5, 0.0], [0.0, 0.0]]))
    quantizer.embedding.grad = None
    losses = quantizer(z).losses
    losses["commitment_loss"].backward()
    assert quantizer.embedding.grad is None  # and this one the latents only
    torch.testing.assert_close(z.grad.view(2, 2), torch.tensor([[0.0, 0.5], [-0.5, 0.0]]))


@pytest.mark.parametrize("legacy", [False, True])
def test_beta_stands_where_the_published_quantizer_has_it(legacy: bool) -> None:
    """Its formulas, sg stopping the gradient: (sg z_q - z)^2 + beta (z_q - sg z)^2, or beta at the other one."""
    z, codes = latents().requires_grad_(), torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    quantizer = NearestQuantizer(7, 3, legacy=legacy)
    quantizer.embedding.data.copy_(codes)
    losses = quantizer(z).losses
    (losses["codebook_loss"] + 0.25 * losses["commitment_loss"]).backward()
    ours = z.grad.clone(), quantizer.embedding.grad.clone()

    z.grad = None
    codes.requires_grad_()
    z_q = codes[quantizer(z).indices].permute(0, 3, 1, 2)
    commitment, codebook = (z_q.detach() - z).square().mean(), (z_q - z.detach()).square().mean()
    (commitment + 0.25 * codebook if legacy else 0.25 * commitment + codebook).backward()
    torch.testing.assert_close(ours[0], z.grad)
    torch.testing.assert_close(ours[1], codes.grad)


def test_ema_codebook_learns_by_no_gradient() -> None:
    quantizer = ema_with_codes(torch.randn(7, 3))
    z = latents().requires_grad_()
    losses = quantizer(z).losses
    assert losses["codebook_loss"].item() == losses["commitment_loss"].item()
    assert not losses["codebook_loss"].requires_grad
    losses["commitment_loss"].backward()
    assert z.grad.any()
    assert not quantizer.embedding.requires_grad


def test_dead_code_of_a_gradient_codebook_goes_to_a_latent_and_counts_as_used() -> None:
    """Of average use 1 before; after a step without use 0.99, and of 40 latents of 4 codes 10 are the average."""
    codes = torch.cat([torch.eye(3), torch.full((1, 3), 1000.0)])

    def stepped(revive_below: float) -> NearestQuantizer:
        quantizer = with_codes(codes, revive_below=revive_below)
        quantizer(latents())
        quantizer.after_step(7)
        return quantizer

    alive, dead = stepped(0.98), stepped(0.995)
    counts = alive.epoch_counts
    assert counts.sum() == 40
    assert counts[:3].min() > 10  # well used: they stay in both
    assert torch.equal(alive.codes, codes)
    torch.testing.assert_close(alive.use, 0.99 + 0.01 * counts / 10)
    drawn = rows(latents())[rng.integers(0, 7, torch.arange(4), 40)]
    assert torch.equal(dead.codes, torch.cat([torch.eye(3), drawn[3:]]))
    torch.testing.assert_close(dead.use, torch.cat([alive.use[:3], torch.ones(1)]))


def test_a_published_codebook_keeps_its_codes_when_its_training_goes_on() -> None:
    """Its file holds the codes alone, `quantize.embedding`; nothing is taken for dead before it was out of use long."""
    quantizer = NearestQuantizer(8, 3, revive_below=0.03)
    assert list(quantizer.state_dict()) == ["embedding"]
    codes = torch.cat([torch.eye(3), torch.full((5, 3), 1000.0)])
    quantizer.load_state_dict({"embedding": codes})
    for step in range(1, 300):
        quantizer(latents(seed=step))
        quantizer.after_step(step)
    assert torch.equal(quantizer.codes, codes)
    for step in range(300, 400):  # 0.99 ** 349 is 0.03
        quantizer(latents(seed=step))
        quantizer.after_step(step)
    assert (quantizer.codes.abs() < 10).all()


@pytest.mark.parametrize("kind", [NearestQuantizer, EMAQuantizer])
def test_a_skipped_step_leaves_no_trace(kind: type[Quantizer]) -> None:
    def stepped(*, skipped: bool) -> Quantizer:
        given = {"decay": 0.9} if kind is EMAQuantizer else {}
        torch.manual_seed(0)
        quantizer = kind(16, 3, revive_below=0.99, seed=1, **given)
        for step in range(1, 4):
            if skipped:  # in the first step of all the codes are placed, on such latents
                quantizer(latents(seed=9) * torch.nan)
                quantizer.forget_step()
            quantizer(latents(seed=step))
            quantizer.after_step(step)
        return quantizer

    whole, robust = (q.state_dict() | q.state() for q in (stepped(skipped=False), stepped(skipped=True)))
    assert whole["epoch_counts"].sum() == 3 * 40
    for name, value in whole.items():
        assert torch.equal(robust[name], value), name


def test_a_pass_without_gradients_is_no_training() -> None:
    quantizer = EMAQuantizer(16, 3, decay=0.9, revive_below=0.3, seed=0)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with torch.no_grad():
        quantizer(latents())
    quantizer.after_step(1)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.epoch_counts.sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_distances_are_float32_whatever_surrounds_them(dtype: torch.dtype) -> None:
    """Codes so close together that bfloat16 confuses them."""
    codes = torch.linspace(0.9, 1.0, 64).view(-1, 1)
    quantizer = with_codes(codes).eval()
    z = codes.view(1, 1, 8, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = quantizer(z)
    expected = (z.float().view(-1, 1) - codes.view(1, -1)).abs().argmin(1)
    assert torch.equal(quantized.indices.flatten(), expected)
    assert quantized.z.dtype == dtype


def test_ema_update_by_hand() -> None:
    """Decay 0.75. Code 0 gets (1, 1) and (3, 1), code 1 gets (8, 0), code 2 nothing."""
    quantizer = ema_with_codes(torch.tensor([[1.0, 2.0], [9.0, 0.0], [-9.0, 5.0]]), decay=0.75)
    quantizer(torch.tensor([[1.0, 3.0, 8.0], [1.0, 1.0, 0.0]]).view(1, 2, 1, 3))
    quantizer.after_step(1)
    sizes = [0.75 + 0.25 * 2, 0.75 + 0.25 * 1, 0.75]
    sums = [
        [0.75 * 1 + 0.25 * (1 + 3), 0.75 * 2 + 0.25 * (1 + 1)],
        [0.75 * 9 + 0.25 * 8, 0.0],
        [0.75 * -9, 0.75 * 5],
    ]
    torch.testing.assert_close(quantizer.cluster_size, torch.tensor(sizes))
    torch.testing.assert_close(quantizer.cluster_sum, torch.tensor(sums))
    codes = [[a / size, b / size] for (a, b), size in zip(sums, sizes, strict=True)]
    torch.testing.assert_close(quantizer.codes, torch.tensor(codes))


def test_micro_batches_make_one_step() -> None:
    def updated(*parts: Tensor) -> EMAQuantizer:
        quantizer = ema_with_codes(torch.eye(3), revive_below=0.5)
        for part in parts:
            quantizer(part)
        quantizer.after_step(1)
        return quantizer

    z = latents(4)
    whole, halves = updated(z), updated(z[:2], z[2:])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], value)
    assert not torch.equal(whole.codes, torch.eye(3))


def test_evaluating_changes_nothing() -> None:
    quantizer = ema_with_codes(torch.randn(7, 3)).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(latents())
    quantizer.after_step(1)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.epoch_counts.sum() == 0


def test_codes_start_as_latents_of_the_first_batch() -> None:
    quantizer = EMAQuantizer(16, 3, decay=0.99, revive_below=0.0, seed=5)
    z = latents() + 100
    quantized = quantizer(z)
    distances = (quantizer.codes[:, None] - rows(z)).abs().sum(-1)
    assert (distances.min(1).values == 0).all()
    assert len(quantizer.codes.unique(dim=0)) > 8
    assert bool(quantizer.initialized)
    assert (quantized.z - z).abs().max() < 10  # the first batch is quantized with them already
    quantizer(z + 1000)
    assert (quantizer.codes < 200).all()  # only the first batch places them
    drawn = rows(z)[rng.integers(5, 0, torch.arange(16), 40)]
    assert torch.equal(quantizer.codes, drawn)  # by the seed


def test_evaluating_first_places_no_codes() -> None:
    quantizer = EMAQuantizer(16, 3, decay=0.99, revive_below=0.0, seed=5).eval()
    before = quantizer.codes.clone()
    quantizer(latents() + 100)
    assert torch.equal(quantizer.codes, before)
    assert not quantizer.initialized


def test_dead_codes_go_elsewhere_in_another_step() -> None:
    def revived(step: int) -> Tensor:
        quantizer = ema_with_codes(torch.full((8, 3), 1000.0), revive_below=0.9)
        quantizer.cluster_size.zero_()
        quantizer(latents())
        quantizer.after_step(step)
        return quantizer.codes

    assert torch.equal(revived(1), revived(1))
    assert not torch.equal(revived(1), revived(2))


def test_dead_code_is_put_on_a_latent_with_average_weight() -> None:
    """Share 0.1 of the average use, 40 / 4: below 1. The code far away has had 2, and after this step 1.8 or 0.9."""
    codes = torch.cat([torch.eye(3), torch.full((1, 3), 1000.0)])

    def stepped(size: float) -> EMAQuantizer:
        quantizer = ema_with_codes(codes, decay=0.9, revive_below=0.1)
        quantizer.cluster_size.copy_(torch.tensor([10.0, 10.0, 10.0, size]))
        quantizer.cluster_sum.copy_(codes * quantizer.cluster_size[:, None])
        quantizer(latents())
        quantizer.after_step(1)
        return quantizer

    alive, dead = stepped(2.0), stepped(1.0)
    torch.testing.assert_close(alive.codes[3], codes[3])
    assert (rows(latents()) == dead.codes[3]).all(1).any()
    assert dead.cluster_size[3] == 10
    torch.testing.assert_close(dead.cluster_sum[3], 10 * dead.codes[3])
    torch.testing.assert_close(dead.codes[:3], alive.codes[:3])


def test_without_revival_a_dead_code_stays() -> None:
    quantizer = ema_with_codes(torch.cat([torch.eye(3), torch.full((1, 3), 1000.0)]), decay=0.5, revive_below=0.0)
    for step in range(1, 200):
        quantizer(latents(seed=step))
        quantizer.after_step(step)
    torch.testing.assert_close(quantizer.codes[3], torch.full((3,), 1000.0))


def test_revival_prevents_the_collapse_of_a_gradient_codebook() -> None:
    """Latents in 16 clusters far from the codes' start: gradient moves one or two codes there, and 14 never learn."""
    centres = 4 + 3 * torch.randn(16, 4, generator=torch.Generator().manual_seed(3))

    def trained(quantizer: NearestQuantizer | EMAQuantizer) -> float:
        optimizer = torch.optim.Adam([quantizer.embedding], lr=0.05)
        generator = torch.Generator().manual_seed(4)
        for step in range(1, 201):
            quantizer.epoch_counts.zero_()
            which = torch.randint(0, 16, (256,), generator=generator)
            z = centres[which] + 0.1 * torch.randn(256, 4, generator=generator)
            loss = quantizer(z.view(1, 16, 16, 4).permute(0, 3, 1, 2)).losses["codebook_loss"]
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            quantizer.after_step(step)
        return perplexity(quantizer.epoch_counts).item()

    torch.manual_seed(0)
    assert trained(NearestQuantizer(16, 4)) < 5
    assert trained(NearestQuantizer(16, 4, revive_below=0.7)) > 14
    assert trained(EMAQuantizer(16, 4, decay=0.9, revive_below=0.1, seed=0)) > 14


def test_epoch_counts() -> None:
    quantizer = with_codes(torch.tensor([[0.0], [10.0], [20.0]]))
    quantizer(torch.tensor([0.1, 9.0, 11.0, -3.0]).view(1, 1, 2, 2))
    assert quantizer.epoch_counts.tolist() == [0, 0, 0]  # the step may yet be skipped
    quantizer.after_step(1)
    assert quantizer.epoch_counts.tolist() == [2, 2, 0]
    for _ in range(2):  # micro-batches
        quantizer(torch.tensor([9.0]).view(1, 1, 1, 1))
    quantizer.after_step(2)
    assert quantizer.epoch_counts.tolist() == [2, 4, 0]
    assert "epoch_counts" not in quantizer.state_dict()


@pytest.mark.parametrize(
    ("counts", "expected", "share"),
    [
        ([5, 0, 0, 0], 1.0, 0.25),
        ([3, 3, 3, 3], 4.0, 1.0),
        ([1, 1, 0, 0], 2.0, 0.5),
        ([2, 1, 1, 0], math.exp(1.5 * math.log(2)), 0.75),  # entropy: 1/2 log 2 + 2 (1/4) log 4
        ([0, 0, 0, 0], 1.0, 0.0),
    ],
)
def test_perplexity_and_usage_by_hand(counts: list[int], expected: float, share: float) -> None:
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(expected)
    assert usage(torch.tensor(counts)).item() == share
    assert entropy(torch.tensor(counts)).item() == pytest.approx(math.log2(expected))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50))
def test_perplexity_lies_between_one_and_the_codes_in_use(counts: list[int]) -> None:
    used = sum(count > 0 for count in counts)
    assert 1 - 1e-9 <= perplexity(torch.tensor(counts)).item() <= max(used, 1) + 1e-9


@pytest.mark.parametrize("kind", [NearestQuantizer, EMAQuantizer])
def test_state_resumes_exactly(kind: type[Quantizer]) -> None:
    def stepped(quantizer: Quantizer, steps: range) -> Quantizer:
        for step in steps:
            quantizer(latents(seed=step))
            quantizer.after_step(step)
        return quantizer

    def new() -> Quantizer:  # 20 latents a step for 32 codes: some die in each
        torch.manual_seed(3)
        return kind(32, 3, **({"decay": 0.9} if kind is EMAQuantizer else {}), revive_below=0.95, seed=1)

    whole, half, resumed = stepped(new(), range(1, 11)), stepped(new(), range(1, 6)), new()
    resumed.load_state_dict(half.state_dict())
    resumed.load_state(half.state())
    stepped(resumed, range(6, 11))
    assert not torch.equal(whole.codes, half.codes)
    for name, value in (whole.state_dict() | whole.state()).items():
        assert torch.equal((resumed.state_dict() | resumed.state())[name], value), name


def test_the_state_of_another_codebook_is_refused() -> None:
    for state in ({"epoch_counts": torch.zeros(8, dtype=torch.int64)}, NearestQuantizer(9, 3).state()):
        with pytest.raises(ConfigError, match=r"expected .* of 8 codes in the state of the training, not found"):
            NearestQuantizer(8, 3).load_state(state)
