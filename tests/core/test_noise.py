"""The noise of a sample is its seed's alone, and that of diffusers' pipelines."""

import pytest
import torch

from uldm_cli.core.noise import PerSampleNoise

SHAPE = (4, 8, 8)


def draws(seeds: list[int], count: int = 3) -> torch.Tensor:
    """`[count, N, *SHAPE]`: the initial noise and that of the first steps."""
    noise = PerSampleNoise(seeds, SHAPE)
    return torch.stack([noise.initial(), *(noise(step) for step in range(1, count))])


def test_depends_on_its_own_seed_only() -> None:
    alone = draws([5])
    for batch in ([5, 6], [4, 5], [9, 5, 1, 0], [5, 5]):
        assert torch.equal(draws(batch)[:, batch.index(5)], alone[:, 0])


def test_seeds_and_steps_differ() -> None:
    values = draws([0, 1, 2**63 - 1]).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(values) - torch.eye(len(values))
    assert correlation.abs().max() < 5 / values.shape[1] ** 0.5


def test_global_generator_is_neither_used_nor_moved() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draws([3])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(draws([3]), first)


@pytest.mark.parametrize("seeds", [[7], [3, 1, 2]])
def test_is_that_of_diffusers(seeds: list[int]) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for ours in draws(seeds):
        assert torch.equal(ours, randn_tensor((len(seeds), *SHAPE), generator=generators))


def test_is_standard_normal_float32() -> None:
    values = draws(list(range(64)))
    assert values.dtype == torch.float32
    assert values.mean().abs() < 5 / values.numel() ** 0.5
    assert (values.var() - 1).abs() < 5 * (2 / values.numel()) ** 0.5
