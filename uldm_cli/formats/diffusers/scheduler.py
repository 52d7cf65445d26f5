"""Schedulers: what their configs say of a model, and the one that makes diffusers sample as uldm does."""

from collections.abc import Mapping
from typing import Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.diffusers.fields import Fields, unheld

CLASSES = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler")
"""Schedulers whose betas and prediction types mean the same."""
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
"""Diffusers' names of schedules, and ours."""
TARGETS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
COSINE_OFFSET = 0.008  # the only one that diffusers has
FIXED = {"trained_betas": (None,), "rescale_betas_zero_snr": (False, True), "thresholding": (False,)}


def read_scheduler(fields: Fields) -> tuple[dict[str, Any], str, list[str]]:
    """The schedule, the target, and warnings."""
    kind = fields.get("_class_name")
    if kind not in CLASSES:
        raise fields.wrong("_class_name", ", ".join(CLASSES))
    fields.fixed(FIXED)
    timesteps = fields.integer("num_train_timesteps", 1000)
    schedule: dict[str, Any] = {"kind": SCHEDULES[fields.choice("beta_schedule", list(SCHEDULES))]}
    schedule["timesteps"] = timesteps
    start, end = fields.number("beta_start", 0.0001), fields.number("beta_end", 0.02)
    schedule |= {"offset": COSINE_OFFSET} if schedule["kind"] == "cosine" else {"start": start, "end": end}
    schedule["zero_terminal_snr"] = fields.get("rescale_betas_zero_snr", False)
    target = TARGETS[fields.choice("prediction_type", list(TARGETS))]
    warnings = []
    if kind != "PNDMScheduler" and fields.get("clip_sample", True):
        warnings.append(f"{fields.path}: clip_sample limits latents to [-1, 1] in diffusers, which uldm does not do")
    if (spacing := fields.get("timestep_spacing", "leading")) != _spacing(schedule):
        warnings.append(f"{fields.path}: timestep_spacing is {spacing!r:.40}, and uldm takes its own timesteps")
    return schedule, target, warnings


def write_scheduler(schedule: Mapping[str, Any], target: str) -> dict[str, Any]:
    """The config of a DDIMScheduler; its timesteps and last step are those of the reference.

    Raises:
        ConfigError: diffusers has no such schedule.
    """
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if schedule["kind"] not in names:
        raise ConfigError(
            f"diffusers has no schedule like schedule.kind {schedule['kind']!r}", f"It has: {', '.join(names)}"
        )
    if schedule["kind"] == "cosine" and schedule["offset"] != COSINE_OFFSET:
        offset = schedule["offset"]
        raise unheld(f"schedule.offset is {offset}, and diffusers' cosine schedule has {COSINE_OFFSET} only")
    betas = {f"beta_{end}": schedule[end] for end in ("start", "end") if end in schedule}
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": names[schedule["kind"]],
        **betas,
        # As uldm samples where the last timestep holds no signal: from it on, and to the clean end.
        "set_alpha_to_one": schedule["zero_terminal_snr"],
        "timestep_spacing": _spacing(schedule),
        "rescale_betas_zero_snr": schedule["zero_terminal_snr"],
        "clip_sample": False,
        "num_train_timesteps": schedule["timesteps"],
        "prediction_type": {ours: theirs for theirs, ours in TARGETS.items()}[target],
        "steps_offset": 1,
        "thresholding": False,
        "trained_betas": None,
    }


def _spacing(schedule: Mapping[str, Any]) -> str:
    """Diffusers' name of the timesteps that uldm takes by default."""
    return "trailing" if schedule["zero_terminal_snr"] else "leading"
