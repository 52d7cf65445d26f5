"""`uldm ldm train`: trains a latent diffusion model in the latents of a trained autoencoder."""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.begun import begun_runs, filled, taken_over
from uldm_cli.runs.latent_cache import cached_data, check_autoencoder, read_index, training_set
from uldm_cli.runs.memory import diffusion_memory, mind_memory
from uldm_cli.runs.metrics import Line
from uldm_cli.runs.models import (
    ModelFile,
    check_backbone,
    known_autoencoder,
    load_autoencoder,
    load_backbone,
    model_config,
    planned_autoencoder,
    resolve,
)
from uldm_cli.runs.outdir import default_outdir
from uldm_cli.runs.preview import Preview, make_preview
from uldm_cli.runs.processes import sharded
from uldm_cli.runs.train import Result, count_parameters, make_engine, train
from uldm_cli.runs.train_plan import Plan, make_plan
from uldm_cli.runs.trained_on import (
    autoencoder_of,
    chosen_autoencoder,
    chosen_data,
    images_of,
    tell_other_size,
    told_apart,
)
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.encoding import LatentIndex
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from uldm_cli.core.data import ImageSet
    from uldm_cli.core.engine import Engine
    from uldm_cli.core.latent import Autoencoder, LatentDiffusion

TAKEN_OVER = ("backbone", "schedule", "target", "learned_variance", "scale_factor", "sample")
"""What of a model's config a training takes over that begins with it, beside autoencoder and images."""
SHOWN = 16
PICTURE_STEPS = 50
ENCODED = 16
"""Images that are encoded at a time to measure latents: in float32, and beside what training holds already."""
MEASURED, CHECKED = 1024, 128
"""Images from which the scale factor is measured, and on which one that was given is checked."""
UNUSUAL, WRONG = 1.5, 4.0
"""By what factor the scaled latents' deviation may be off 1 before it is told, and before it is refused."""


def plan(
    spec: DiffusionTraining, outdir: Path | None, config: Path | None, *, resume: bool = False
) -> Plan[DiffusionTraining]:
    """Where a run writes and what it goes on from. What the config leaves open is filled in: autoencoder, data.

    Raises:
        ConfigError: as `make_plan` and `complete`; or the weights cannot be shared out as the launcher asks.
    """
    if sharded() and spec.train.compile:
        raise ConfigError("train.compile does not work with FSDP yet", "Leave one of them out")
    if sharded() and spec.train.precision == "fp16":
        raise ConfigError("fp16 is not supported with FSDP", "Take train.precision=bf16")
    index = None if spec.latents is None else read_index(Path(spec.latents))
    default = default_outdir("ldm", "train", config)
    completed = _going_on(spec, index, outdir, default) or complete(spec, index)
    plan = make_plan(completed, outdir, default, resume=resume)
    if completed.init_from is not None and not plan.checkpoint:
        _check_beginning(completed)
    if index is not None and not plan.finished:
        check_autoencoder(Path(str(spec.latents)), index, resolve(autoencoder_of(plan), "autoencoder"))
    return replace(plan, latents=index)


def _going_on(
    spec: DiffusionTraining, index: LatentIndex | None, outdir: Path | None, default: Path
) -> DiffusionTraining | None:
    """The config with what it leaves open as in the run that it goes on with; None where there is none.

    Where it names neither a folder nor an autoencoder, a run that is finished is left alone: there may be a newer one.
    """
    for run in begun_runs(outdir, default):
        if run.finished and outdir is None and spec.autoencoder is None:
            continue
        if index is not None and run.said.get("autoencoder") not in (spec.autoencoder, index.reference):
            continue
        if config := filled(spec, run, named=outdir is not None):
            if spec.autoencoder is None:
                console.note(f"autoencoder: {config.autoencoder}, with which the run in {run.folder} began")
            return config
    return None


def _check_beginning(spec: DiffusionTraining) -> None:
    """Makes sure that the model which training begins with has the config's network.

    Raises:
        ConfigError: it has another one: in what they differ.
    """
    import torch

    file = resolve(spec.init_from)
    with torch.device("meta"):
        channels = known_autoencoder(spec.autoencoder).latent_shape[0]
        module = spec.backbone.build(channels, channels * (2 if spec.learned_variance else 1))
    try:
        check_backbone(module, file)
    except ConfigError as e:
        theirs = model_config(file, LatentDiffusionModel).backbone
        if theirs == spec.backbone:  # then it is the file that is not what it says
            raise
        what = f"init_from={spec.init_from} has another network: {told_apart(theirs, spec.backbone)}"
        raise ConfigError(what, "Leave the backbone's settings out, and they are taken from there") from e


def preview(plan: Plan[DiffusionTraining]) -> Preview:
    """What `run` would do."""
    import torch

    spec = plan.config
    assert spec.data is not None
    where, autoencoder = str(spec.autoencoder), known_autoencoder(autoencoder_of(plan))
    if planned := planned_autoencoder(autoencoder_of(plan)):
        where += f", not on this machine yet: {planned.command}"
    channels, side, _ = autoencoder.model_copy(update={"image_size": spec.data.size}).latent_shape
    with torch.device("meta"):
        module = spec.backbone.build(channels, channels * (2 if spec.learned_variance else 1))
    details = {"autoencoder": where, "latents": f"{channels} channels of {side}x{side}"}
    if spec.latents is not None:
        details["read from"] = spec.latents
    if spec.init_from is not None:
        details["begins with"] = spec.init_from
    return make_preview(plan, "latent diffusion", module, diffusion_memory(plan), details)


def run(plan: Plan[DiffusionTraining]) -> Result:
    """Trains as the plan's config says."""
    resolve(autoencoder_of(plan), "autoencoder")  # before the images: to open some takes an hour of extracting
    return train(plan, partial(DiffusionJob, plan))


def complete(spec: DiffusionTraining, index: LatentIndex | None) -> DiffusionTraining:
    """The config with its autoencoder and its data named, and found to fit each other and the backbone.

    `index` is that of the latents that the config names, if it names any.

    Raises:
        ConfigError: there is no autoencoder, or it cannot take the data, or the backbone not its latents.
    """
    planned = planned_autoencoder(spec.autoencoder)
    if planned and index is None and spec.data is not None:
        # That is a plan; to make it true takes the weights, which `run` asks for.
        completed, model = spec, planned.model
    else:
        completed, file = _found(spec, index)
        model = model_config(file, AutoencoderModel)
    completed.check_fit(model.autoencoder, str(completed.autoencoder))
    return completed


def _found(spec: DiffusionTraining, index: LatentIndex | None) -> tuple[DiffusionTraining, ModelFile]:
    """The config with the autoencoder and the data that are there, and the autoencoder's file."""
    if index is None:
        reference, file = chosen_autoencoder(spec.autoencoder)
        data = chosen_data(spec.data, file)
    else:
        try:
            reference, file = chosen_autoencoder(spec.autoencoder or index.reference)
        except ConfigError as e:
            if spec.autoencoder is not None:
                raise
            what = f"the autoencoder that made {spec.latents} is not where it was: {e.message}"
            raise ConfigError(what, "Name it: autoencoder=PATH") from e
        data = cached_data(Path(str(spec.latents)), index, spec.data)
    return spec.model_copy(update={"autoencoder": reference, "data": data}), file


def base_config(reference: str, outdir: Path | None = None, config: Path | None = None) -> dict[str, Any]:
    """What a training takes over from the latent diffusion model that it begins with, as a config below all others.

    That is the model whole: network, schedule, target, scale factor, autoencoder and defaults of sampling; and the
    images that it was trained on, if it tells them. A run in the folder, or else in the config's default one, that
    began with the model tells all that itself, should the model be gone.

    Raises:
        ConfigError: there is no such model, or it needs a condition.
    """
    try:
        file = resolve(reference)
    except ConfigError:
        default = default_outdir("ldm", "train", config)
        if known := taken_over(reference, outdir, default, ("init_from", "autoencoder", "data", *TAKEN_OVER)):
            return known
        raise
    model = model_config(file, LatentDiffusionModel)
    if model.conditioning is not None:
        what = f"{file.name} needs a condition ({model.conditioning}), and training gives none yet"
        raise ConfigError(what, "Begin with an unconditional model")
    kept = model.model_dump(mode="json", include=set(TAKEN_OVER))
    return {"init_from": reference, "autoencoder": reference, "data": images_of(file, model), **kept}


@dataclass(frozen=True)
class Measuring:
    """How the spread of latents is measured: on the first images that training will see."""

    autoencoder: Any
    images: "ImageSet"
    shape: tuple[int, int, int]
    """Of a latent."""
    seed: int
    """Of the training."""
    engine: "Engine"
    """Of the training; the autoencoder is on its device."""
    batch: int
    """Images to be encoded at a time."""
    strict: bool
    """Whether to stop at a file that cannot be decoded."""

    def scale(self) -> float:
        """One over the latents' standard deviation, over all dimensions (Rombach et al. 2022, appendix G)."""
        count = min(MEASURED, len(self.images))
        scale = 1 / self._deviation(count)
        console.note(f"scale factor {scale:.5f}, measured on {count} images")
        return scale

    def check(self, scale: float, name: str) -> None:
        """Holds a scale factor that was given against the latents of the autoencoder called `name`.

        Raises:
            ConfigError: it cannot be this autoencoder's.
        """
        count = min(CHECKED, len(self.images))
        deviation = self._deviation(count)
        off = max(scale * deviation, 1 / (scale * deviation))
        said = (
            f"scale_factor {scale:.5g} brings the latents of {name} to a standard deviation of {scale * deviation:.3g} "
            f"instead of 1: measured on {count} images it would be {1 / deviation:.5g}"
        )
        if off > WRONG:
            raise ConfigError(said, "scale_factor=null has it measured; or name the autoencoder that it is of")
        if off > UNUSUAL:
            console.warn(f"{said}; scale_factor=null measures it")

    def _deviation(self, count: int) -> float:
        """Of the latents of so many images; what the first process finds counts in all of them."""
        import torch

        from uldm_cli.core.data import stream
        from uldm_cli.core.diffusing import training_latents
        from uldm_cli.core.training import to_float

        latents, device, size = [], self.engine.device, min(self.batch, count)
        batches = islice(stream(self.images, batch_size=size, seed=self.seed, strict=self.strict), -(-count // size))
        with console.progress(count, "measuring the scale of the latents", "images") as progress:
            for batch in batches:
                image, number = batch.image.to(device), batch.number.to(device)
                cached = image.is_floating_point()
                image = image if cached else to_float(image)
                found = training_latents(
                    self.autoencoder, image, number, seed=self.seed, shape=self.shape, cached=cached
                )
                latents.append(found.cpu().double())
                progress.advance(len(number))
        deviation: float = self.engine.from_main(float(torch.cat(latents)[:count].std()))
        if not (math.isfinite(deviation) and deviation > 0):
            what = f"the autoencoder's latents of {count} images have the standard deviation {deviation}"
            raise UldmError(what, "Train it on such images first")
        return deviation


class DiffusionJob:
    """A latent diffusion model in training."""

    kind = "latent-diffusion"

    def __init__(self, plan: Plan[DiffusionTraining]) -> None:
        import torch

        from uldm_cli.core.diffusing import DiffusionTask
        from uldm_cli.core.training import Trainer

        spec = plan.config
        assert spec.data is not None
        self.data = spec.data
        self.dataset = training_set(plan)
        mind_memory(plan, diffusion_memory)
        engine = make_engine(plan)
        autoencoder: Any = load_autoencoder(resolve(autoencoder_of(plan), "autoencoder")).to(engine.device)
        autoencoder.to(memory_format=torch.channels_last)
        self.config = self._model(plan, autoencoder, engine)
        torch.manual_seed(spec.train.seed)
        self.model = self.config.build()
        self.model.autoencoder = autoencoder
        self.module = self.model.denoiser.backbone.to(memory_format=torch.channels_last)
        if spec.init_from is not None and not plan.checkpoint:
            load_backbone(self.module, resolve(spec.init_from))
            console.note(f"begins with the weights of {spec.init_from}")
        if spec.train.compile:
            self.module.compile()
            autoencoder.encoder.compile()
        self.trainer = Trainer(
            DiffusionTask(self.model, spec.train.seed, spec.loss.build(), cached=spec.latents is not None),
            self.module,
            engine,
            spec.optim.build(spec.train.steps),
            ema_decay=spec.train.ema_decay,
            flip_seed=spec.train.seed if spec.data.flip and spec.latents is None else None,
            accumulate=spec.train.accumulate,
            ema_profiles=spec.train.ema_profiles,
        )
        self._at_once = min(plan.micro_batch, SHOWN)
        self.title = f"latent diffusion, {count_parameters(self.module):,} parameters, {engine.precision}"

    def _model(
        self, plan: Plan[DiffusionTraining], autoencoder: "Autoencoder", engine: "Engine"
    ) -> LatentDiffusionModel:
        """The model's config. A scale factor that is not given is measured, or read from where training goes on."""
        spec = plan.config
        if plan.checkpoint:
            return model_config(resolve(str(plan.checkpoint)), LatentDiffusionModel)
        file = resolve(spec.autoencoder, "autoencoder")
        tell_other_size(self.dataset.size, file)
        held = model_config(file, AutoencoderModel)
        held = held.model_copy(update={"image_size": self.dataset.size})
        measuring = Measuring(
            autoencoder,
            self.dataset,
            held.latent_shape,
            spec.train.seed,
            engine,
            batch=min(plan.micro_batch, ENCODED),
            strict=self.data.strict,
        )
        scale = spec.scale_factor
        if scale is None and plan.latents is not None:
            scale = plan.latents.scale_factor
            console.note(f"scale factor {scale:.5f}, measured on all latents in {spec.latents}")
        elif scale is None:
            scale = measuring.scale()
        else:
            measuring.check(scale, str(spec.autoencoder))
        if spec.loss.weighting == "min-snr" and getattr(spec.schedule, "zero_terminal_snr", False):
            console.warn(
                "loss.weighting min-snr gives the last timestep, where sampling begins, no weight; simple does"
            )
        return LatentDiffusionModel(
            autoencoder=held.autoencoder,
            image_size=held.image_size,
            backbone=spec.backbone,
            schedule=spec.schedule,
            target=spec.target,
            learned_variance=spec.learned_variance,
            scale_factor=scale,
            sample=spec.sample,
        )

    def untrained(self) -> "Mapping[str, Mapping[str, Tensor]]":
        return {"autoencoder": self.model.autoencoder.state_dict()}

    def epoch_logs(self) -> dict[str, float]:
        return {}

    def start_epoch(self) -> None:
        pass

    def warnings(self, line: Line) -> list[str]:
        return []

    def picture(self) -> "tuple[str, np.ndarray] | None":
        """Samples of the averaged weights, from the same noise each time."""
        averaged = self.trainer.engine.kept(self.trainer.ema.state)
        if not self.trainer.engine.main:
            return None
        if not self.trainer.engine.sharded:
            with self.trainer.ema.applied():
                return "samples", self._samples(self.model)
        model = self.config.build()
        model.autoencoder = self.model.autoencoder
        model.denoiser.backbone.load_state_dict(averaged)
        return "samples", self._samples(model.to(self.trainer.engine.device))

    def _samples(self, model: "LatentDiffusion") -> "np.ndarray":
        import torch

        from uldm_cli.core.images import to_uint8
        from uldm_cli.core.noise import PerSampleNoise
        from uldm_cli.runs.draw.grid import draw_grid, squeezed
        from uldm_cli.specs.samplers import DDIM

        model, device = model.eval(), self.trainer.engine.device
        noise = PerSampleNoise(range(SHOWN), model.latent_shape, device)
        sampler = DDIM(steps=min(PICTURE_STEPS, model.schedule.T), eta=0.0).build()
        with torch.no_grad():
            *_, last = sampler(model.denoiser, noise.initial(), model.schedule, noise)
            # A model that cannot be sampled from yet is no reason to stop training it.
            decoded = torch.cat([model.decode(part) for part in torch.split(last.x, self._at_once)])
            pictures = squeezed(to_uint8(decoded.nan_to_num()))
        columns = SHOWN // 2
        return draw_grid([pictures[:columns], pictures[columns:]], [""] * columns)
