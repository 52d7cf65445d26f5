"""The sampling config: what it defaults to, what it refuses, and which steps and seeds it means."""

import pytest
from pydantic import ValidationError

from uldm_cli.specs.samplers import DDIM
from uldm_cli.specs.sampling import LARGEST_SEED, Sampling, parse_seeds


def make(**fields):
    return Sampling.model_validate(fields)


def refusal(**fields):
    with pytest.raises(ValidationError) as caught:
        make(**fields)
    error = caught.value.errors()[0]
    return ".".join(map(str, error["loc"])), error["msg"]


def test_nothing_given_is_the_documented_default():
    spec = make()
    assert spec.sampler == DDIM(steps=200, eta=1.0)
    assert (spec.model, spec.weights, spec.num, spec.seed, spec.show) == (None, None, 1, 1125, "x_t")
    assert spec.save == ("image", "latent")
    assert spec.step_size == 40
    assert list(spec.sample_seeds) == [1125]


def test_the_default_step_size_fits_fewer_steps():
    assert make(sampler={"kind": "ddim", "steps": 25}).step_size == 25


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("5", [5]),
        ("3,7,9", [3, 7, 9]),
        ("10-13", [10, 11, 12, 13]),
        ("9, 0-2", [9, 0, 1, 2]),
        (5, [5]),
        ([3, 7], [3, 7]),
    ],
)
def test_seeds_are_lists_and_ranges(text, seeds):
    spec = make(seeds=text)
    assert list(spec.sample_seeds) == seeds
    assert spec.num == len(seeds)


def test_seeds_follow_the_first():
    assert list(make(seed=7, num=3).sample_seeds) == [7, 8, 9]


def test_fifty_thousand_seeds_are_not_listed():
    assert parse_seeds("0-49999") == range(50_000)


@pytest.mark.parametrize(
    "text", ["", "a", "3-", "-3", "5-3", "1,,2", "1,1", "0-2,2", "1.5", f"{LARGEST_SEED + 1}", "0-9999999999"]
)
def test_seeds_that_mean_nothing_are_refused(text):
    field, _ = refusal(seeds=text)
    assert field == "seeds"


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"step_size": 201}, "step_size", "201 is greater than the total of 200"),
        ({"step_size": -1}, "step_size", "greater than or equal to 0"),
        ({"sampler": {"kind": "ddim", "steps": 0}}, "sampler.steps", "greater than or equal to 1"),
        ({"sampler": {"kind": "ddpm", "eta": 1}}, "sampler.eta", "Extra inputs"),
        ({"num": 0}, "num", "greater than or equal to 1"),
        ({"batch_size": 0}, "batch_size", "greater than or equal to 1"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": LARGEST_SEED, "num": 2}, "num", "beyond the largest"),
        ({"seeds": "0-9", "num": 3}, "num", "`seeds` names 10"),
        ({"show": "eps"}, "show", "'x_t' or 'x0'"),
        ({"save": "image,latnt"}, "save", "did you mean 'latent'"),
        ({"save": "image,image"}, "save", "twice"),
        ({"save": ""}, "save", "is none of"),
        ({"save": "npz"}, "save", "step_size 0"),
        ({"save": "latent", "step_size": 0}, "save", "final images only"),
        ({"device": "gpu"}, "device", "pattern"),
        ({"precision": "fp16"}, "precision", "'fp32'"),
        ({"sampler": {"kind": "plms", "eta": 0}}, "sampler.eta", "Extra inputs"),
        (
            {"sampler": {"kind": "ddim", "spacing": "quad"}},
            "sampler.spacing",
            "'trailing' or 'compvis'",
        ),
        ({"sampler": {"kind": "ddpm", "spacing": "compvis"}}, "sampler.spacing", "Extra inputs"),
        ({"rng": "global"}, "rng", "'per-sample' or 'compvis'"),
        ({"rng": "compvis", "seeds": "3,7"}, "rng", "cannot go with --seeds"),
        ({"rng": "compvis", "deterministic": True}, "rng", "cannot go with --deterministic"),
        ({"height": 0}, "height", "greater than or equal to 1"),
        ({"step_sise": 4}, "step_sise", "Extra inputs"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_its_field(fields, field, says):
    where, message = refusal(**fields)
    assert where == field
    assert says in message


def test_final_images_only_saves_just_them():
    assert make(step_size=0).save == ("image",)
    assert make(step_size=0, save="npz,image").save == ("npz", "image")


@pytest.mark.parametrize("fields", [{}, {"seeds": "3,7"}, {"step_size": 0}, {"sampler": "ddpm", "num": 4}])
def test_what_is_resolved_means_the_same_again(fields):
    spec = make(**fields)
    assert make(**spec.model_dump(mode="json")) == spec


def test_the_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make().seed = 3


def test_a_difference_needs_two_logged_steps() -> None:
    with pytest.raises(ValidationError, match="a difference needs two logged steps"):
        Sampling.model_validate({"step_size": 200, "save": ["image-diff"]})
    assert Sampling.model_validate({"step_size": 200, "save": ["image", "image-diff"]}).step_size == 200


def test_only_a_model_can_tell_how_many_steps_the_published_spacing_makes():
    """So a step size that looks too large here need not be: 400 of 1000 timesteps makes 500."""
    sampler = {"kind": "ddim", "steps": 400, "spacing": "compvis"}
    assert make(sampler=sampler, step_size=450).step_size == 450
    assert make(sampler=sampler, step_size=400, save="image-diff").step_size == 400
