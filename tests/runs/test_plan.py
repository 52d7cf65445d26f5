"""What a sampling run is going to do, known before torch is there."""

from typing import Literal

import pytest

from uldm_cli.errors import ConfigError
from uldm_cli.runs.models import model_config, resolve
from uldm_cli.runs.plan import _steps, logged_steps, read_config
from uldm_cli.runs.sample import plan_sample
from uldm_cli.specs.base import Spec
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.samplers import DDIM
from uldm_cli.specs.sampling import Sampling


@pytest.fixture
def plan(tiny_ldm, tmp_path):
    """Makes plans for a model of 100 timesteps and 32x32 images, whose sides must be multiples of 8."""

    def make(sampler="ddim", steps=10, **fields):
        spacing = {"spacing": fields.pop("spacing")} if "spacing" in fields else {}
        sampler = {"kind": sampler, "steps": steps, **spacing}
        spec = Sampling.model_validate({"model": str(tiny_ldm), "sampler": sampler, **fields})
        return plan_sample(spec, tmp_path / "out")

    return make


@pytest.mark.parametrize(
    ("steps", "size", "logged"),
    [
        (200, 60, (60, 120, 180, 200)),
        (200, 40, (40, 80, 120, 160, 200)),
        (200, 200, (200,)),
        (200, 0, (200,)),
        (3, 1, (1, 2, 3)),
        (1, 1, (1,)),
    ],
)
def test_multiples_of_the_step_size_and_always_the_last_are_logged(steps, size, logged):
    assert logged_steps(steps, size) == logged


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_the_published_spacing_can_make_more_steps_than_asked_for(plan, sampler):
    made = plan(sampler, 40, step_size=20, spacing="compvis")
    assert (made.steps, made.logged) == (50, (20, 40, 50))
    assert {path.name for kind, path in made.files() if kind == "image"} == {
        f"image_step_{n}.png" for n in (20, 40, 50)
    }
    assert plan(sampler, 40, step_size=20).logged == (20, 40)


def test_a_step_size_may_lie_between_the_steps_asked_for_and_those_made(plan):
    assert plan(steps=40, step_size=45, spacing="compvis").logged == (45, 50)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 40, "step_size": 51}, "--step-size 51: it is greater than the total of 50 steps"),
        ({"steps": 40, "step_size": 50, "save": "image-diff"}, "a step size of 50 logs only the last"),
        ({"steps": 30}, "cannot take 30 steps over 100 timesteps. The nearest that work: 25 (it makes 25) and 34 (it"),
        ({"steps": 100}, "cannot take 100 steps over 100 timesteps. The nearest that work: 50 (it makes 50)"),
        ({"steps": 101}, "101 steps are more than the 100 timesteps"),
    ],
)
def test_what_the_published_spacing_cannot_do(plan, fields, says):
    with pytest.raises(ConfigError) as caught:
        plan(**{"step_size": 0, "save": "image", **fields}, spacing="compvis")
    assert says in str(caught.value)


def test_a_schedule_that_does_not_say_its_timesteps_has_no_published_spacing(tiny_ldm):
    class Continuous(Spec):
        """As a plugin may have it: T is known once it is built."""

        kind: Literal["continuous"] = "continuous"

    model = model_config(resolve(str(tiny_ldm)), LatentDiffusionModel).model_copy(update={"schedule": Continuous()})
    assert _steps(Sampling(sampler=DDIM(steps=30)), model, "mine") == 30
    with pytest.raises(ConfigError, match="--spacing compvis: the schedule of mine does not say"):
        _steps(Sampling(sampler=DDIM(steps=30, spacing="compvis")), model, "mine")


def test_a_size_is_the_model_s_own_or_as_asked(plan):
    assert plan().image_size == (32, 32)
    assert plan(height=48).image_size == (48, 32)
    assert plan(height=64, width=16).image_size == (64, 16)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"height": 50}, "--height 50: expected a multiple of 8, which"),
        ({"width": 3}, "The nearest is 8"),
        ({"height": 64, "width": 63}, "The nearest is 64"),
    ],
)
def test_a_size_that_the_networks_cannot_halve_is_refused(plan, fields, says):
    with pytest.raises(ConfigError) as caught:
        plan(**fields)
    assert says in str(caught.value)


PUBLISHED = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params: {}\n"


def test_the_yaml_of_a_published_checkpoint_may_stand_in_the_place_of_the_config(tmp_path, tiny_ldm):
    path = tmp_path / "ffhq.yaml"
    path.write_text(PUBLISHED)
    with pytest.raises(ConfigError) as caught:
        read_config(Sampling, path, [], {})
    assert str(caught.value) == f"{path} describes a published checkpoint, and none is given. Name it with --checkpoint"
