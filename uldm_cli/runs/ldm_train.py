"""`uldm ldm train`: trains a latent diffusion model in the latents of a trained autoencoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.formats.native import Header, load_into
from uldm_cli.runs.models import ModelFile, load_autoencoder, model_config, newest_autoencoder, resolve
from uldm_cli.runs.outdir import OUTPUTS, default_outdir
from uldm_cli.runs.train import Plan, Result, make_plan, train
from uldm_cli.runs.vqvae_train import parameters, squeezed
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel
from uldm_cli.specs.training import DiffusionTraining, check_images_fit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from uldm_cli.specs.base import Spec

SHOWN = 16
PICTURE_STEPS = 50
MEASURED = 1024
"""Images from which the scale factor is measured."""


def plan(spec: DiffusionTraining, outdir: Path | None, config: Path | None, *, resume: bool = False) -> Plan:
    """Where a run writes and what it goes on from. What the config leaves open is filled in: autoencoder, data."""
    return make_plan(complete(spec), outdir, default_outdir("ldm", "train", config), resume=resume)


def run(plan: Plan) -> Result:
    """Trains as the plan's config says."""
    return train(plan, DiffusionJob(plan))


def complete(spec: DiffusionTraining) -> DiffusionTraining:
    """The config with its autoencoder and its data named, and found to fit each other.

    Raises:
        ConfigError: there is no autoencoder, or it cannot take the data.
    """
    reference = spec.autoencoder or newest_autoencoder(OUTPUTS)
    if reference is None:
        raise ConfigError(
            f"there is no trained autoencoder in {OUTPUTS}",
            "run `uldm vqvae train` first, or name one: autoencoder=PATH (autoencoder=fruits64 is embedded)",
        )
    file = resolve(reference, "autoencoder")
    data = spec.data or _data_of(file)
    autoencoder = model_config(file, AutoencoderModel)
    try:
        check_images_fit(autoencoder.autoencoder, data.channels, data.size)  # type: ignore[attr-defined]
    except ValueError as e:
        raise ConfigError(f"the data do not fit the autoencoder {reference}: {e}", "change data, or the autoencoder") from e
    return spec.model_copy(update={"autoencoder": reference, "data": data})


def _data_of(file: ModelFile) -> "Spec":
    """The data set that an autoencoder was trained on."""
    from uldm_cli.specs.training import AutoencoderTraining

    if file.header.kind != "autoencoder":
        raise ConfigError(f"{file.name} does not say what its autoencoder was trained on", "give data, e.g. data=tiny")
    return AutoencoderTraining.model_validate(file.header.training).data


class DiffusionJob:
    """A latent diffusion model in training."""

    def __init__(self, plan: Plan) -> None:
        import torch

        from uldm_cli.core.engine import Engine
        from uldm_cli.core.tasks import DiffusionTask
        from uldm_cli.core.training import Trainer

        spec = plan.config
        assert isinstance(spec, DiffusionTraining)
        self.spec = spec
        data: Any = spec.data
        self.dataset = data.build()
        engine = Engine(spec.train.device, spec.train.precision)
        autoencoder = load_autoencoder(resolve(spec.autoencoder, "autoencoder")).to(
            engine.device, memory_format=torch.channels_last
        )
        self.config = self._model_config(plan, autoencoder)
        torch.manual_seed(spec.train.seed)
        self.model = self.config.build()
        self.model.autoencoder = autoencoder
        self.backbone = self.model.denoiser.backbone.to(memory_format=torch.channels_last)
        if spec.train.compile:
            self.backbone.compile()
            autoencoder.encoder.compile()
        self.trainer = Trainer(
            DiffusionTask(self.model, spec.train.seed),
            self.backbone,
            engine,
            spec.optim.build(spec.train.steps),
            ema_decay=spec.train.ema_decay,
            flip_seed=spec.train.seed if data.flip else None,
        )
        self.title = f"latent diffusion, {parameters(self.backbone)}, {engine.precision}"

    def _model_config(self, plan: Plan, autoencoder: Any) -> LatentDiffusionModel:
        """The model's header. A scale factor that is not given is measured, or read from where training goes on."""
        spec = self.spec
        if plan.checkpoint:
            return model_config(resolve(str(plan.checkpoint / "model.safetensors")), LatentDiffusionModel)
        source = model_config(resolve(spec.autoencoder, "autoencoder"), AutoencoderModel)
        return LatentDiffusionModel(
            autoencoder=source.autoencoder,
            image_size=self.dataset.size,
            backbone=spec.backbone,
            schedule=spec.schedule,
            target=spec.target,
            scale_factor=spec.scale_factor or self._measured_scale(autoencoder),
            sample=spec.sample,
        )

    def _measured_scale(self, autoencoder: Any) -> float:
        """One over the latents' standard deviation, over all dimensions (Rombach et al. 2022, appendix G)."""
        import torch

        from uldm_cli.core.data import stream
        from uldm_cli.core.training import to_float

        train = self.spec.train
        device = next(autoencoder.parameters()).device
        latents = []
        batches = stream(self.dataset, batch_size=64, seed=train.seed, workers=0)
        with console.progress(MEASURED, "measuring the scale of the latents", "images") as progress, torch.no_grad():
            for _ in range(MEASURED // 64):
                latents.append(autoencoder.to_latent(to_float(next(batches).image.to(device))).double())
                progress.advance(64)
        scale = 1 / float(torch.cat(latents).std())
        console.note(f"scale factor {scale:.5f}, measured on {MEASURED} images")
        return scale

    def header(self, step: int) -> Header:
        return Header(
            "latent-diffusion", self.config.model_dump(mode="json"), self.spec.model_dump(mode="json"), step
        )

    def parts(self) -> "Mapping[str, Mapping[str, Tensor]]":
        return {"backbone": self.backbone.state_dict(), "autoencoder": self.model.autoencoder.state_dict()}

    def load(self, checkpoint: Path) -> None:
        load_into(self.backbone, checkpoint, "backbone")

    def state(self) -> "dict[str, Tensor]":
        return {}

    def load_state(self, state: "dict[str, Tensor]") -> None:
        pass

    def epoch_logs(self) -> dict[str, float]:
        return {}

    def start_epoch(self) -> None:
        pass

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
            pictures = squeezed(to_uint8(model.decode(last.x).nan_to_num()))
        columns = SHOWN // 2
        return "samples", draw_grid([pictures[:columns], pictures[columns:]], [""] * columns)
