"""`uldm ldm train`: trains a latent diffusion model in the latents of a trained autoencoder."""

import math
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.checkpoints import MODEL
from uldm_cli.runs.metrics import Line
from uldm_cli.runs.models import load_autoencoder, model_config, newest_autoencoder, resolve
from uldm_cli.runs.outdir import OUTPUTS, default_outdir
from uldm_cli.runs.preview import Preview
from uldm_cli.runs.preview import preview as make_preview
from uldm_cli.runs.train import Plan, Result, count_parameters, make_engine, make_plan, open_images, train
from uldm_cli.runs.vqvae_train import squeezed
from uldm_cli.specs.diffusion_training import DiffusionTraining, data_of
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch
    from torch import Tensor

    from uldm_cli.core.data import ImageSet
    from uldm_cli.core.latent import Autoencoder

SHOWN = 16
PICTURE_STEPS = 50
MEASURED = 1024
"""Images from which the scale factor is measured."""


def plan(
    spec: DiffusionTraining, outdir: Path | None, config: Path | None, *, resume: bool = False
) -> Plan[DiffusionTraining]:
    """Where a run writes and what it goes on from. What the config leaves open is filled in: autoencoder, data."""
    return make_plan(complete(spec), outdir, default_outdir("ldm", "train", config), resume=resume)


def preview(plan: Plan[DiffusionTraining]) -> Preview:
    """What `run` would do."""
    import torch

    spec = plan.config
    autoencoder = model_config(resolve(spec.autoencoder, "autoencoder"), AutoencoderModel)
    channels, side, _ = autoencoder.latent_shape
    with torch.device("meta"):
        module = spec.backbone.build(channels, channels)
    details = {"autoencoder": str(spec.autoencoder), "latents": f"{channels} channels of {side}x{side}"}
    return make_preview(plan, "latent diffusion", module, details)


def run(plan: Plan[DiffusionTraining]) -> Result:
    """Trains as the plan's config says."""
    return train(plan, partial(DiffusionJob, plan))


def complete(spec: DiffusionTraining) -> DiffusionTraining:
    """The config with its autoencoder and its data named, and found to fit each other and the backbone.

    Raises:
        ConfigError: there is no autoencoder, or it cannot take the data, or the backbone not its latents.
    """
    reference = spec.autoencoder or newest_autoencoder(OUTPUTS)
    if reference is None:
        embedded = "autoencoder=fruits64 data=images data.root=FOLDER takes the embedded one"
        hint = f"Run `uldm vqvae train` first, or name one: autoencoder=PATH; {embedded}"
        raise ConfigError(f"there is no trained autoencoder in {OUTPUTS}", hint)
    file = resolve(reference, "autoencoder")
    if spec.autoencoder is None:
        of = file.header.training.get("train", {}).get("steps", "?")
        console.note(f"autoencoder: {reference}, the newest run (step {file.header.step} of {of})")
    data = spec.data or data_of(file.header.training, file.name)
    if data is None:
        what = f"{file.name} does not say which images it was trained on"
        raise ConfigError(what, "Name them, as in data=images data.root=FOLDER")
    completed = spec.model_copy(update={"autoencoder": reference, "data": data})
    completed.check_fit(model_config(file, AutoencoderModel).autoencoder, reference)
    return completed


def measured_scale(
    autoencoder: "Autoencoder", images: "ImageSet", seed: int, device: "torch.device", *, strict: bool
) -> float:
    """One over the standard deviation of latents, over all dimensions (Rombach et al. 2022, appendix G).

    Args:
        autoencoder: whose latents are measured.
        images: of which the first MEASURED that training will see are taken.
        seed: of the training's order.
        device: where the autoencoder is.
        strict: stop at a file that cannot be decoded.
    """
    import torch

    from uldm_cli.core.data import stream
    from uldm_cli.core.training import to_float

    latents = []
    with console.progress(MEASURED, "measuring the scale of the latents", "images") as progress, torch.no_grad():
        for batch in islice(stream(images, batch_size=64, seed=seed, strict=strict), MEASURED // 64):
            latents.append(autoencoder.to_latent(to_float(batch.image.to(device))).cpu().double())
            progress.advance(64)
    deviation = float(torch.cat(latents).std())
    if not (math.isfinite(deviation) and deviation > 0):
        what = f"the autoencoder's latents of {MEASURED} images have the standard deviation {deviation}"
        raise UldmError(what, "Train it on such images first")
    console.note(f"scale factor {1 / deviation:.5f}, measured on {MEASURED} images")
    return 1 / deviation


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
        self.dataset = open_images(spec.data)
        engine = make_engine(plan)
        # A run goes on with the autoencoder that it began with, whatever the reference leads to now.
        source = str(plan.checkpoint / MODEL) if plan.checkpoint else spec.autoencoder
        autoencoder: Any = load_autoencoder(resolve(source, "autoencoder")).to(engine.device)
        autoencoder.to(memory_format=torch.channels_last)
        self.config = self._model(plan, autoencoder, engine.device)
        torch.manual_seed(spec.train.seed)
        self.model = self.config.build()
        self.model.autoencoder = autoencoder
        self.module = self.model.denoiser.backbone.to(memory_format=torch.channels_last)
        if spec.train.compile:
            self.module.compile()
            autoencoder.encoder.compile()
        self.trainer = Trainer(
            DiffusionTask(self.model, spec.train.seed),
            self.module,
            engine,
            spec.optim.build(spec.train.steps),
            ema_decay=spec.train.ema_decay,
            flip_seed=spec.train.seed if spec.data.flip else None,
            accumulate=spec.train.accumulate,
        )
        self.title = f"latent diffusion, {count_parameters(self.module):,} parameters, {engine.precision}"

    def _model(
        self, plan: Plan[DiffusionTraining], autoencoder: "Autoencoder", device: "torch.device"
    ) -> LatentDiffusionModel:
        """The model's config. A scale factor that is not given is measured, or read from where training goes on."""
        spec = plan.config
        if plan.checkpoint:
            return model_config(resolve(str(plan.checkpoint)), LatentDiffusionModel)
        scale = spec.scale_factor
        if scale is None:
            scale = measured_scale(autoencoder, self.dataset, spec.train.seed, device, strict=self.data.strict)
        return LatentDiffusionModel(
            autoencoder=model_config(resolve(spec.autoencoder, "autoencoder"), AutoencoderModel).autoencoder,
            image_size=self.dataset.size,
            backbone=spec.backbone,
            schedule=spec.schedule,
            target=spec.target,
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

    def picture(self) -> "tuple[str, np.ndarray]":
        """Samples of the averaged weights, from the same noise each time."""
        import torch

        from uldm_cli.core.images import to_uint8
        from uldm_cli.core.noise import PerSampleNoise
        from uldm_cli.runs.draw.grid import draw_grid
        from uldm_cli.specs.samplers import DDIM

        model, device = self.model.eval(), self.trainer.engine.device
        noise = PerSampleNoise(range(SHOWN), model.latent_shape, device)
        sampler = DDIM(steps=min(PICTURE_STEPS, model.schedule.T), eta=0.0).build()
        with torch.no_grad(), self.trainer.ema.applied():
            *_, last = sampler(model.denoiser, noise.initial(), model.schedule, noise)
            # A model that cannot be sampled from yet is no reason to stop training it.
            pictures = squeezed(to_uint8(model.decode(last.x).nan_to_num()))
        columns = SHOWN // 2
        return "samples", draw_grid([pictures[:columns], pictures[columns:]], [""] * columns)
