"""What a sampling run is going to write and where, known and checked before torch is imported."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from uldm_cli.errors import ConfigError
from uldm_cli.runs.models import ModelFile, chosen_weights, model_config, resolve
from uldm_cli.runs.outdir import choose_outdir
from uldm_cli.runs.raw import KIND as TRAJECTORY
from uldm_cli.runs.raw import trajectory_paths
from uldm_cli.specs.load import Flag, load_config
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.samplers import Spaced
from uldm_cli.specs.sampling import Reference, Sampling, Walk, model_reference
from uldm_cli.specs.yamlfile import read_yaml

SCALES = "differences"
LONGEST_NAME = 200

W = TypeVar("W", bound=Walk)
_OWN = ("kind", "save")


@dataclass(frozen=True)
class Plan:
    """A sampling run whose config, model and folder fit together."""

    spec: Walk
    model: ModelFile
    folder: Path
    record: str
    """Name of the file in `folder` that keeps the resolved config."""
    steps: int
    """How many the sampler makes of the model's timesteps."""
    image_size: tuple[int, int]
    """Height and width."""

    @property
    def logged(self) -> tuple[int, ...]:
        """The completed steps that are written: the multiples of the step size, and always the last."""
        return logged_steps(self.steps, self.spec.step_size)

    @property
    def batches(self) -> list[range]:
        """The samples' indices in order, cut into what is computed at once."""
        size = 1 if self.spec.deterministic else self.spec.batch_size
        return [range(start, min(start + size, self.spec.num)) for start in range(0, self.spec.num, size)]

    @property
    def pictures(self) -> tuple[str, ...]:
        """The kinds that are written as PNG."""
        return tuple(kind for kind in self.spec.save if kind not in ("npz", TRAJECTORY))

    @property
    def archive(self) -> Path | None:
        """Where the samples are written as one array, if they are."""
        return self.folder / "samples.npz" if "npz" in self.spec.save else None

    def sample_folder(self, index: int) -> Path:
        """Where a sample's pictures of its steps are: one sample has no folder of its own."""
        return self.folder / self._number(index) if self.spec.num > 1 else self.folder

    def picture_path(self, kind: str, index: int, steps: tuple[int, ...]) -> Path:
        """Where sample `index` has its picture of a step `(n,)`, or of a difference `(n, m)`."""
        if self.spec.step_size == 0:
            return self.folder / f"{self._number(index)}.png"
        return self.sample_folder(index) / picture_name(kind, steps)

    def scales_path(self, folder: Path) -> Path | None:
        """Where the scales of the differences in a folder are written, if there are any."""
        differences = any(columns(kind, self.logged) for kind in self.pictures if kind.endswith("-diff"))
        name = f"{SCALES}.json" if self.record == "sample.yaml" else f"grid_{SCALES}.json"
        return folder / name if differences else None

    def sample_files(self, index: int) -> Iterator[tuple[str, Path]]:
        """Every file of a sample, with its kind."""
        for kind in self.pictures:
            for steps in columns(kind, self.logged):
                yield kind, self.picture_path(kind, index, steps)
        scales = self.scales_path(self.sample_folder(index))
        if scales:
            yield SCALES, scales
        if TRAJECTORY in self.spec.save:
            for path in trajectory_paths(self.sample_folder(index)):
                yield TRAJECTORY, path

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file of the samples, with its kind."""
        for index in range(self.spec.num):
            yield from self.sample_files(index)
        if self.archive:
            yield "npz", self.archive

    def grid_files(self) -> Iterator[tuple[str, Path]]:
        """Every file of a grid, with its kind."""
        for kind in self.pictures:
            if columns(kind, self.logged):
                yield kind, self.folder / grid_name(kind, self.logged, self.spec.step_size, self.spec.sheet.format)
        scales = self.scales_path(self.folder)
        if scales:
            yield SCALES, scales

    @property
    def sampled_with(self) -> dict[str, str]:
        """What the numbers of every sample say of what made them."""
        sampler = self.spec.sampler.model_dump(mode="json")
        return {"model": self.model.name, "sampler": json.dumps(sampler), "show": self.spec.show}

    def drawn_from(self, index: int) -> dict[str, str]:
        """What a sample's picture says of its random numbers."""
        if self.spec.rng == "compvis":
            return {"rng": "compvis", "seed": str(self.spec.seed), "sample": str(index)}
        return {"seed": str(self.spec.sample_seeds[index])}

    @property
    def drawn_from_all(self) -> dict[str, str]:
        """What a picture of all samples says of their random numbers."""
        if self.spec.rng == "compvis":
            return {"rng": "compvis", "seed": str(self.spec.seed)}
        return {"seeds": ",".join(map(str, self.spec.sample_seeds))}

    @property
    def made_with(self) -> list[str]:
        """What the title of a sheet says of how its samples were made, in phrases."""
        spec = self.spec
        eta = getattr(spec.sampler, "eta", None)
        seeds = [spec.seed] if spec.rng == "compvis" else spec.sample_seeds
        several = f"seeds {seeds[0]} to {seeds[-1]}" if spec.seeds is None else f"seeds {spec.seeds}"
        return [
            Path(self.model.name).name,
            spec.sampler.model_dump()["kind"].upper(),
            f"{self.steps} steps" if self.steps > 1 else "1 step",
            *([] if eta is None else [f"eta {eta:g}"]),
            f"seed {seeds[0]}" if len(seeds) == 1 else several,
        ]

    def _number(self, index: int) -> str:
        return f"{index:0{max(5, len(str(self.spec.num - 1)))}d}"


def logged_steps(steps: int, step_size: int) -> tuple[int, ...]:
    """The multiples of the step size below the number of steps, and that itself; of step size 0 only that."""
    return (*range(step_size, steps, step_size), steps) if step_size else (steps,)


def read_config(kind: type[W], path: Path | None, overrides: Sequence[str], flags: Mapping[str, object]) -> W:
    """The config of a command line, over what the model's own header says of how to sample from it.

    The YAML of a published checkpoint may stand in the place of the config.
    """
    if path is not None and _is_published(path):
        path, flags = None, {**flags, "checkpoint_config": Flag("--config", str(path))}
    given = model_reference(path, overrides, flags)
    if given.checkpoint_config is not None and given.model is None:
        raise ConfigError(
            f"{given.checkpoint_config} describes a published checkpoint, and none is given",
            "Name it with --checkpoint",
        )
    base = model_config(_resolve(given), LatentDiffusionModel).sample
    if kind is not Sampling:  # what a command saves, and its kind, are its own
        base = {name: value for name, value in base.items() if name in Walk.model_fields and name not in _OWN}
    return load_config(kind, path, overrides, flags, base=base)


def _is_published(path: Path) -> bool:
    """Whether a YAML is that of a published checkpoint: its `model` names a class, as `target`; ours name none."""
    model = read_yaml(path, targets=True)[0].get("model")
    return isinstance(model, dict) and "target" in model


def _resolve(named: Reference | Walk) -> ModelFile:
    return resolve(named.model, config=Path(named.checkpoint_config) if named.checkpoint_config else None)


def make_plan(spec: Walk, outdir: Path | None, default: Path, record: str) -> Plan:
    """Checks a config against its model and picks the folder; writes nothing.

    Args:
        spec: what to sample.
        outdir: the folder that the user named, if any.
        default: the folder otherwise; a neighbour of it where that holds results of another config.
        record: `sample.yaml`, `grid.yaml` or `explain.yaml`.

    Raises:
        ConfigError: the model cannot be sampled from, or not in so many steps or at that size; the folder cannot be
            written to.
    """
    file = _resolve(spec)
    model = _checked(spec, file)
    steps, size = _steps(spec, model, file.name), _image_size(spec, model, file.name)
    return Plan(spec, file, choose_outdir(outdir, default, record, spec), record, steps, size)


def _checked(spec: Walk, file: ModelFile) -> LatentDiffusionModel:
    """The model's config, if it has what the run needs."""
    chosen_weights(file, spec.weights)
    model = model_config(file, LatentDiffusionModel)
    if model.conditioning is not None:
        raise ConfigError(
            f"{file.name} needs a condition ({model.conditioning}), and this command gives none",
            "It samples from unconditional models",
        )
    if getattr(spec.sampler, "variance", None) == "learned" and not model.learned_variance:
        raise ConfigError(
            f"sampler.variance learned: {file.name} has learned no variance",
            "Take posterior or beta, or train a model with learned_variance=true",
        )
    return model


def _steps(spec: Walk, model: LatentDiffusionModel, name: str) -> int:
    """How many steps the sampler really makes, and that they can be taken and logged as asked."""
    asked: int = spec.sampler.steps  # type: ignore[attr-defined]  # every sampler has it: the config was validated
    timesteps: int | None = getattr(model.schedule, "timesteps", None)
    if timesteps is None:
        if isinstance(spec.sampler, Spaced) and spec.sampler.spacing == "compvis":
            raise ConfigError(f"--spacing compvis: the schedule of {name} does not say how many timesteps it has")
        return asked
    if asked > timesteps:
        raise ConfigError(
            f"{asked} steps are more than the {timesteps} timesteps of {name}",
            f"--total-steps can be {timesteps} at most",
        )
    if not isinstance(spec.sampler, Spaced):
        return asked
    steps = len(spec.sampler.timesteps(timesteps)) - 1
    if spec.step_size > steps:
        raise ConfigError(f"--step-size {spec.step_size}: it is greater than the total of {steps} steps")
    if spec.step_size == steps and all(kind.endswith("-diff") for kind in spec.save):
        raise ConfigError(f"--save: a difference needs two logged steps, and a step size of {steps} logs only the last")
    return steps


def _image_size(spec: Walk, model: LatentDiffusionModel, name: str) -> tuple[int, int]:
    """Height and width of the images, which the networks can halve as often as they do."""
    multiple = model.autoencoder.factor * model.backbone.factor
    for flag, side in (("--height", spec.height), ("--width", spec.width)):
        if side is not None and side % multiple:
            near = max(round(side / multiple), 1) * multiple
            raise ConfigError(
                f"{flag} {side}: expected a multiple of {multiple}, which {name} needs", f"The nearest is {near}"
            )
    _, height, width = model.image_shape
    return (spec.height or height, spec.width or width)


def columns(kind: str, logged: Sequence[int]) -> list[tuple[int, ...]]:
    """What is drawn of a kind: each logged step as `(n,)`, or each two consecutive ones n < m as `(n, m)`."""
    return list(pairwise(logged)) if kind.endswith("-diff") else [(n,) for n in logged]


def picture_name(kind: str, steps: tuple[int, ...]) -> str:
    """`image_step_40.png`, or `image_diff_80_minus_40.png` of the steps (40, 80)."""
    subject = kind.removesuffix("-diff")
    if len(steps) == 1:
        return f"{subject}_step_{steps[0]}.png"
    return f"{subject}_diff_{steps[1]}_minus_{steps[0]}.png"


def column_label(steps: tuple[int, ...]) -> str:
    """`40`, or `80-40` of the difference (40, 80)."""
    return "-".join(str(n) for n in reversed(steps))


def grid_name(kind: str, logged: Sequence[int], step_size: int, ending: str = "png") -> str:
    """`image_step(40,80,120).png`, `image_diff_step(80-40,120-80).png`; when too long, `image_step(5..1000x5).png`."""
    subject = kind.replace("-", "_")
    labels = [column_label(steps) for steps in columns(kind, logged)]
    name = f"{subject}_step({','.join(labels)}).{ending}"
    return name if len(name) <= LONGEST_NAME else f"{subject}_step({labels[0]}..{labels[-1]}x{step_size}).{ending}"
