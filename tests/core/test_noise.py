"""The noise of a sample is its seed's alone, and that of diffusers' pipelines; that of a batch is the reference's."""

import pytest
import torch

from uldm_cli.core.noise import BatchNoise, PerSampleNoise
from uldm_cli.core.samplers import Prediction, Step
from uldm_cli.core.schedules import VariancePreserving, scaled_linear_betas
from uldm_cli.specs.samplers import DDIM, DDPM, PLMS

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


SCHEDULE = VariancePreserving(scaled_linear_betas(20, 0.0015, 0.0195))


def denoise(x: torch.Tensor, t: int) -> Prediction:
    eps = torch.tanh(x)
    return Prediction((x - SCHEDULE.sigma(t) * eps) / SCHEDULE.alpha(t), eps)


def globally(sizes: list[int], calls: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The reference's draws from the global generator: of each batch x_T, then one after each call of the network."""
    torch.manual_seed(1125)
    return [(torch.randn(n, *SHAPE), torch.stack([torch.randn(n, *SHAPE) for _ in range(calls)])) for n in sizes]


def last_of(steps: list[Step]) -> torch.Tensor:
    return steps[-1].x


@pytest.mark.parametrize(
    ("spec", "calls"),
    [
        (DDIM(steps=5, eta=0), 5),  # draws, and multiplies with 0
        (DDIM(steps=5, eta=1), 5),
        (PLMS(steps=5), 6),
        (DDPM(steps=20), 20),  # its last step's draw is multiplied with 0, too
    ],
    ids=["ddim-eta-0", "ddim-eta-1", "plms", "ddpm"],
)
def test_batches_are_those_of_the_references_global_generator(spec: DDIM | DDPM | PLMS, calls: int) -> None:
    sizes = [3, 3, 2]
    expected = [
        last_of(list(spec.build()(denoise, x, SCHEDULE, lambda step, draw, noise=noise: noise[step - 1])))
        for x, noise in globally(sizes, calls)
    ]
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1125)
    for size, reference in zip(sizes, expected, strict=True):
        noise = BatchNoise(generator, (size, *SHAPE))
        steps = noise.keep_pace(spec.build()(denoise, noise.initial(), SCHEDULE, noise))
        assert torch.equal(last_of(list(steps)), reference)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_for_a_known_region_is_no_sampler_s_draw() -> None:
    """The reference draws that too, and the sampler's own besides."""
    torch.manual_seed(3)
    expected = [torch.randn(2, *SHAPE) for _ in range(4)]
    noise = BatchNoise(torch.Generator().manual_seed(3), (2, *SHAPE))
    x = noise.initial()
    assert torch.equal(x, expected[0])
    assert torch.equal(noise(1, 1), expected[1])
    assert len(list(noise.keep_pace([Step(1, 0, x, x, x, x, nfe=1)]))) == 1
    assert torch.equal(noise(2, 0), expected[3])


@pytest.mark.gpu
def test_a_generator_of_a_gpu_draws_what_its_global_one_does() -> None:
    torch.manual_seed(1125)
    expected = [torch.randn(3, *SHAPE, device="cuda") for _ in range(3)]
    noise = BatchNoise(torch.Generator("cuda").manual_seed(1125), (3, *SHAPE))
    for ours, reference in zip([noise.initial(), noise(1), noise(2)], expected, strict=True):
        assert torch.equal(ours, reference)
