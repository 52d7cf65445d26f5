"""Samples of the reference's small models (see tests/golden), drawn as commands draw them: from a sampler's spec."""

from collections.abc import Callable

import pytest
from torch import Tensor

from uldm_cli.core.guidance import guided
from uldm_cli.core.known import known_region
from uldm_cli.core.samplers import Constrain, Denoise
from uldm_cli.specs.samplers import DDIM, PLMS

# The aim is 1e-4; about 2e-6 is measured.
TOLERANCE = 1e-5
STEPS = 8
GUIDED = ["class-cond", "layout", "rdm", "text"]
WITH_PLMS = [*GUIDED, "semantic", "superres", "uncond-kl", "uncond-vq"]
UNCONDITIONAL = ["uncond-kl", "uncond-vq"]


def of_families(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", names, indirect=True)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape
    assert ((ours - reference).norm() / reference.norm()).item() <= TOLERANCE


Last = Callable[..., Tensor]


@pytest.fixture
def last(golden, averaged) -> Last:
    """What a sampler arrives at from x_T, of the averaged weights."""

    def run(spec: DDIM | PLMS, denoise: Denoise | None = None, constrain: Constrain | None = None) -> Tensor:
        stored = golden.stored
        told = golden.condition(averaged)
        denoise = denoise or (lambda x, t: averaged(x, t, told))

        def noise(step: int, draw: int) -> Tensor:
            return stored["ddim.noise"][step - 1]

        *_, step = spec.build()(denoise, stored["x_T"], averaged.schedule, noise, constrain)
        return step.x

    return run


@pytest.mark.parametrize("spacing", ["uniform", "compvis"])  # the same, since 8 divides 1000
@pytest.mark.parametrize("eta", [0, 1])
def test_ddim_samples_and_images(golden, averaged, last: Last, eta: int, spacing: str) -> None:
    sample = last(DDIM(steps=STEPS, eta=eta, spacing=spacing))
    assert_close(sample, golden.stored[f"ddim.eta{eta}.sample"])
    assert_close(averaged.decode(sample), golden.stored[f"ddim.eta{eta}.image"])


def test_every_golden_run_is_compared(golden) -> None:
    assert ("plms.sample" in golden.stored) == (golden.name in WITH_PLMS)
    assert ("ddim.cfg3.sample" in golden.stored) == (golden.name in GUIDED)
    assert ("known.sample" in golden.stored) == (golden.name in UNCONDITIONAL)


@of_families(WITH_PLMS)
def test_plms(golden, last: Last) -> None:
    assert_close(last(PLMS(steps=STEPS)), golden.stored["plms.sample"])


@of_families(GUIDED)
def test_guidance(golden, averaged, last: Last) -> None:
    told, not_told = golden.condition(averaged), golden.condition(averaged, "uncond")
    calls = []

    def denoiser(x, t, condition):
        calls.append(len(x))
        return averaged.denoiser(x, t, condition)

    sample = last(DDIM(steps=STEPS, eta=0), guided(denoiser, told, not_told, 3.0))
    assert_close(sample, golden.stored["ddim.cfg3.sample"])
    assert calls == [2 * len(sample)] * STEPS  # one call a step for both


@of_families(UNCONDITIONAL)
def test_a_known_region(golden, averaged, last: Last) -> None:
    stored = golden.stored
    constrain = known_region(
        stored["latent"], stored["known.mask"], averaged.schedule, lambda call, draw: stored["known.noise"][call - 1]
    )
    assert_close(last(DDIM(steps=STEPS, eta=0), constrain=constrain), stored["known.sample"])
