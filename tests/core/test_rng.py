"""Counter-based random numbers: that they are random, and functions of seed, stream and number alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uldm_cli.core import rng

NUMBERS = torch.arange(2000)
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(state: int, draw: int) -> int:
    """The draw-th number, from 1, of SplitMix64 (Steele, Lea & Flood 2014) started at a state."""
    z = (state + draw * GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_own_splitmix_gives_its_published_values() -> None:
    assert [splitmix(1234567, i) for i in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 2**62))
@settings(deadline=None)
def test_bits_are_splitmix_keyed_by_seed_stream_and_number(seed: int, stream: int, number: int) -> None:
    root = splitmix((seed * GOLDEN + stream - GOLDEN) & MASK, 1)
    key = splitmix((root + number * GOLDEN - GOLDEN) & MASK, 1)
    ours = rng.bits(seed, stream, torch.tensor([number]), 3)
    assert [value & MASK for value in ours[0].tolist()] == [splitmix(key, i) for i in (1, 2, 3)]


def test_known_values() -> None:
    """Were these to change, a resumed training would go on with other noise than it began with."""
    number = torch.tensor([0, 1, 1000])
    bits = rng.bits(0, 1, number, 1).flatten().tolist()
    assert bits == [4720248854425330031, 6180444375122719049, 5342211603544426305]
    assert rng.integers(0, 2, number, 1000).tolist() == [699, 785, 318]
    assert rng.coin(0, 1, torch.arange(8)).tolist() == [False, False, True, True, False, True, True, False]
    normal = [[-1.220716, 0.324615, -1.537245], [-1.226766, 0.253158, -0.66218], [-0.564285, 1.907454, 1.797925]]
    torch.testing.assert_close(rng.normal(0, 3, number, (3,)), torch.tensor(normal), rtol=1e-5, atol=1e-6)


def values(seed: int = 0, stream: int = 3, shape: tuple[int, ...] = (4, 5, 5)) -> Tensor:
    return rng.normal(seed, stream, NUMBERS, shape)


def test_normal_has_the_moments_and_the_distribution() -> None:
    x = values().flatten().double()
    count = len(x)
    assert x.mean().abs() < 4 / count**0.5
    assert (x.var() - 1).abs() < 4 * (2 / count) ** 0.5
    assert (x**3).mean().abs() < 4 * (15 / count) ** 0.5
    assert ((x**4).mean() - 3).abs() < 4 * (96 / count) ** 0.5
    distance = (torch.special.ndtr(x.sort().values) - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 1.95 / count**0.5  # Kolmogorov-Smirnov, one in a thousand
    assert 4 < x.abs().max() < 7


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    a, b = a.flatten().double(), b.flatten().double()
    return float((a * b).mean().abs() * len(a) ** 0.5)


def test_normal_is_independent() -> None:
    x = values()
    flat = x.flatten(1)
    half = flat.shape[1] // 2
    assert correlation(flat[:, 1:], flat[:, :-1]) < 4  # neighbours
    assert correlation(flat[:, :half], flat[:, half:]) < 4  # the two of a Box-Muller pair
    assert correlation(flat[:, :half] ** 2 - 1, flat[:, half:] ** 2 - 1) < 12  # and their sizes: deviation 2 each
    assert correlation(x[1:], x[:-1]) < 4  # numbers
    assert correlation(x, values(seed=1)) < 4
    assert correlation(x, values(stream=4)) < 4
    assert correlation(values(seed=1), values(stream=4)) < 4
    assert len(flat.unique()) > 0.99 * flat.numel()


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=6), st.integers(1, 5))
@settings(deadline=None)
def test_any_split_of_a_batch_draws_the_same(numbers: list[int], at: int) -> None:
    number = torch.tensor(numbers)
    parts = [part for part in (number[:at], number[at:]) if len(part)]
    assert torch.equal(rng.normal(1, 2, number, (3, 3)), torch.cat([rng.normal(1, 2, p, (3, 3)) for p in parts]))
    assert torch.equal(rng.integers(1, 2, number, 9), torch.cat([rng.integers(1, 2, p, 9) for p in parts]))
    assert torch.equal(rng.coin(1, 2, number), torch.cat([rng.coin(1, 2, p) for p in parts]))


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 2), ()])
def test_normal_has_the_shape(shape: tuple[int, ...]) -> None:
    x = rng.normal(0, 0, torch.arange(2), shape)
    assert x.shape == (2, *shape)
    assert x.dtype == torch.float32


def test_integers_are_uniform() -> None:
    high = 10
    drawn = rng.integers(5, 2, torch.arange(100_000), high)
    counts = torch.bincount(drawn, minlength=high).double()
    assert len(counts) == high
    chi_squared = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, one in a thousand
    pairs = torch.bincount(drawn[1:] * high + drawn[:-1], minlength=100).double()
    assert ((pairs - 1000) ** 2 / 1000).sum() < 149  # 99 degrees of freedom


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**62), st.integers(1, 2**40))
@settings(deadline=None)
def test_integers_stay_in_range(seed: int, number: int, high: int) -> None:
    drawn = rng.integers(seed, 2, torch.tensor([number]), high)
    assert drawn.dtype == torch.int64
    assert 0 <= drawn.item() < high


def test_coin_is_fair() -> None:
    heads = rng.coin(5, 1, torch.arange(100_000)).double()
    assert (heads.mean() - 0.5).abs() < 4 * 0.5 / 100_000**0.5
    assert correlation(2 * heads[1:] - 1, 2 * heads[:-1] - 1) < 4
