"""What a sampling run is going to write and where, known and checked before torch is imported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from uldm_cli.errors import ConfigError
from uldm_cli.runs.models import ModelFile, model_config, resolve
from uldm_cli.runs.outdir import choose_outdir
from uldm_cli.specs.load import load_config
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.sampling import Sampling, model_reference

SCALES = "differences"
LONGEST_NAME = 200


@dataclass(frozen=True)
class Plan:
    """A sampling run whose config, model and folder fit together."""

    spec: Sampling
    model: ModelFile
    folder: Path
    record: str
    """Name of the file in `folder` that keeps the resolved config."""

    @property
    def batches(self) -> list[range]:
        """The samples' indices in order, cut into what is computed at once."""
        size = 1 if self.spec.deterministic else self.spec.batch_size
        return [range(start, min(start + size, self.spec.num)) for start in range(0, self.spec.num, size)]

    @property
    def pictures(self) -> tuple[str, ...]:
        """The kinds that are written as PNG."""
        return tuple(kind for kind in self.spec.save if kind != "npz")

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
        differences = any(columns(kind, self.spec.logged) for kind in self.pictures if kind.endswith("-diff"))
        name = f"{SCALES}.json" if self.record == "sample.yaml" else f"grid_{SCALES}.json"
        return folder / name if differences else None

    def sample_files(self, index: int) -> Iterator[tuple[str, Path]]:
        """Every file of a sample, with its kind."""
        for kind in self.pictures:
            for steps in columns(kind, self.spec.logged):
                yield kind, self.picture_path(kind, index, steps)
        scales = self.scales_path(self.sample_folder(index))
        if scales:
            yield SCALES, scales

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file of the samples, with its kind."""
        for index in range(self.spec.num):
            yield from self.sample_files(index)
        if self.archive:
            yield "npz", self.archive

    def grid_files(self) -> Iterator[tuple[str, Path]]:
        """Every file of a grid, with its kind."""
        for kind in self.pictures:
            if columns(kind, self.spec.logged):
                yield kind, self.folder / grid_name(kind, self.spec.logged, self.spec.step_size)
        scales = self.scales_path(self.folder)
        if scales:
            yield SCALES, scales

    def _number(self, index: int) -> str:
        return f"{index:0{max(5, len(str(self.spec.num - 1)))}d}"


def read_config(path: Path | None, overrides: Sequence[str], flags: Mapping[str, object]) -> Sampling:
    """The config of a command line, over what the model's own header says of how to sample from it."""
    model = resolve(model_reference(path, overrides, flags.get("model")))
    return load_config(Sampling, path, overrides, flags, base=model_config(model, LatentDiffusionModel).sample)


def make_plan(spec: Sampling, outdir: Path | None, default: Path, record: str) -> Plan:
    """Checks a config against its model and picks the folder; writes nothing.

    Args:
        spec: what to sample.
        outdir: the folder that the user named, if any.
        default: the folder otherwise; a neighbour of it where that holds results of another config.
        record: `sample.yaml` or `grid.yaml`.

    Raises:
        ConfigError: the model cannot be sampled from, or not in so many steps; the folder cannot be written to.
    """
    model = resolve(spec.model)
    _check_model(spec, model)
    return Plan(spec, model, choose_outdir(outdir, default, record, spec), record)


def _check_model(spec: Sampling, model: ModelFile) -> None:
    if spec.weights not in model.header.weights:
        has = ", ".join(model.header.weights)
        raise ConfigError(f"weights={spec.weights}: {model.path} holds no such weights", f"It has: {has}")
    timesteps = getattr(model_config(model, LatentDiffusionModel).schedule, "timesteps", None)
    if timesteps is not None and spec.steps > timesteps:
        raise ConfigError(
            f"{spec.steps} steps are more than the {timesteps} timesteps of {model.name}",
            f"--total-steps can be {timesteps} at most",
        )


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


def grid_name(kind: str, logged: Sequence[int], step_size: int) -> str:
    """`image_step(40,80,120).png`, `image_diff_step(80-40,120-80).png`; when too long, `image_step(5..1000x5).png`."""
    subject = kind.replace("-", "_")
    labels = [column_label(steps) for steps in columns(kind, logged)]
    name = f"{subject}_step({','.join(labels)}).png"
    return name if len(name) <= LONGEST_NAME else f"{subject}_step({labels[0]}..{labels[-1]}x{step_size}).png"
