"""Which timesteps are visited: exactly so many as asked for, or those of the reference."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uldm_cli.core.spacing import compvis_timesteps, trailing_timesteps, uniform_timesteps
from uldm_cli.errors import ConfigError, UsageError

DIVISORS = [steps for steps in range(1, 1001) if 1000 % steps == 0]


@given(st.integers(1, 2000).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))))
@settings(deadline=None)
def test_exactly_the_steps_asked_for(T_and_steps: tuple[int, int]) -> None:
    T, steps = T_and_steps
    timesteps = uniform_timesteps(T, steps)
    assert len(timesteps) == steps + 1
    assert all(before > after for before, after in pairwise(timesteps))
    assert timesteps[-1] == (-1 if steps == T else 0)
    if steps == T:
        assert timesteps[0] == T - 1
    else:  # evenly spread, over all of the schedule
        assert timesteps[0] == T + 1 - -(-T // steps)
        gaps = {before - after for before, after in pairwise(timesteps[:-1])}
        assert gaps <= {T // steps, -(-T // steps)}


@given(st.integers(1, 2000).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T))))
@settings(deadline=None)
def test_trailing_timesteps_begin_at_the_last_and_end_clean(T_and_steps: tuple[int, int]) -> None:
    T, steps = T_and_steps
    timesteps = trailing_timesteps(T, steps)
    assert len(timesteps) == steps + 1
    assert (timesteps[0], timesteps[-1]) == (T - 1, -1)
    gaps = {before - after for before, after in pairwise(timesteps)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 2  # of rounded places


def test_trailing_timesteps_are_those_of_diffusers() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) == steps:  # rounding their step can make one more
            difference = torch.tensor(trailing_timesteps(1000, steps)[:-1]) - theirs.timesteps
            assert difference.abs().max() <= (steps not in DIVISORS)  # halves may be rounded the other way


@pytest.mark.parametrize("T", [12, 1000])
def test_divisors_give_the_references_spacing(T: int) -> None:
    divisors = [steps for steps in range(1, T) if T % steps == 0]
    for steps in divisors:
        reference = [t + 1 for t in range(0, T, T // steps)]
        assert uniform_timesteps(T, steps) == [*reversed(reference), 0]


def test_all_timesteps() -> None:
    assert uniform_timesteps(4, 4) == [3, 2, 1, 0, -1]


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("choose", [uniform_timesteps, trailing_timesteps])
def test_impossible_numbers_of_steps(choose, steps: int) -> None:
    with pytest.raises(UsageError, match=f"{steps} sampling steps asked for. The model's schedule allows 1 to 1000"):
        choose(1000, steps)


def reference(T: int, steps: int) -> list[int] | None:
    """What the reference visits, rising; None where it looks beyond its table."""
    timesteps = [t + 1 for t in range(0, T, T // steps)]
    return timesteps if timesteps[-1] < T else None


def test_the_references_spacing_for_every_number_of_steps() -> None:
    refused, others = 0, 0
    for steps in range(1, 1001):
        expected = reference(1000, steps)
        if expected is None:
            refused += 1
            with pytest.raises(ConfigError, match=f"cannot take {steps} steps over 1000 timesteps"):
                compvis_timesteps(1000, steps)
        else:
            others += len(expected) != steps
            assert compvis_timesteps(1000, steps) == [*reversed(expected), 0]
    assert (refused, others) == (599, 386)


def test_four_hundred_steps_are_five_hundred() -> None:
    assert len(compvis_timesteps(1000, 400)) - 1 == 500


@pytest.mark.parametrize(
    ("steps", "hint"),
    [
        (300, "The nearest that work: 250 (it makes 250) and 334 (it makes 500)"),
        (3, "The nearest that work: 2 (it makes 2) and 4 (it makes 4)"),
        (1000, "The nearest that work: 500 (it makes 500)"),
        (5000, "The nearest that work: 500 (it makes 500)"),
        (0, "The nearest that work: 1 (it makes 1)"),
        (-4, "The nearest that work: 1 (it makes 1)"),
    ],
)
def test_what_the_reference_cannot_take_is_told_with_what_it_can(steps: int, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compvis_timesteps(1000, steps)
    assert caught.value.hint == hint


def test_a_schedule_that_no_number_fits() -> None:
    with pytest.raises(ConfigError) as caught:
        compvis_timesteps(1, 1)
    assert caught.value.hint is None


def test_a_plan_needs_no_torch_for_it() -> None:
    code = "import sys; from uldm_cli.core import spacing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
