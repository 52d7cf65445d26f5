"""`uldm vqvae train`: trains an autoencoder."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.runs.begun import taken_over
from uldm_cli.runs.memory import autoencoder_memory, mind_memory
from uldm_cli.runs.metrics import Line
from uldm_cli.runs.models import load_autoencoder, model_config, resolve
from uldm_cli.runs.outdir import default_outdir
from uldm_cli.runs.perceptual import Backbone, Metric, Settings, load_metric
from uldm_cli.runs.preview import Preview, make_preview
from uldm_cli.runs.processes import sharded
from uldm_cli.runs.train import Result, count_parameters, make_engine, open_images, train
from uldm_cli.runs.train_plan import Plan, make_plan
from uldm_cli.runs.trained_on import images_of, told_apart
from uldm_cli.specs.autoencoder_training import AutoencoderTraining, Loss
from uldm_cli.specs.models import AutoencoderModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor, nn


SHOWN = 8
WON = 0.1
"""Loss of a discriminator below which it hardly errs; one that cannot tell has 1 (hinge) or 0.69 (vanilla)."""
COLLAPSED = 0.2
"""Share of the codes below which use over an epoch counts as collapse."""


def plan(
    spec: AutoencoderTraining, outdir: Path | None, config: Path | None, *, resume: bool = False
) -> Plan[AutoencoderTraining]:
    """Where a run writes and what it goes on from.

    Raises:
        ConfigError: as `make_plan`, and if the weights were to be shared out.
    """
    if sharded():
        raise ConfigError("an autoencoder is not trained with FSDP: it is small", "Launch with DDP")
    return make_plan(spec, outdir, default_outdir("vqvae", "train", config), resume=resume)


def base_config(reference: str, outdir: Path | None = None, config: Path | None = None) -> dict[str, Any]:
    """What a training takes over from the model that it begins with, as a config below all others.

    That is its autoencoder, and the images that it was trained on, if it tells them. A run in the folder, or else in
    the config's default one, that began with the model tells that itself, should the model be gone.

    Raises:
        ConfigError: there is no such model.
    """
    try:
        file = resolve(reference, "autoencoder")
    except ConfigError:
        default = default_outdir("vqvae", "train", config)
        if known := taken_over(reference, outdir, default, ("init_from", "autoencoder", "data")):
            return known
        raise
    model = model_config(file, AutoencoderModel)
    images = images_of(file, model)
    return {"init_from": reference, "autoencoder": model.autoencoder.model_dump(mode="json"), "data": images}


def preview(plan: Plan[AutoencoderTraining]) -> Preview:
    """What `run` would do."""
    import torch

    spec = plan.config
    with torch.device("meta"):
        module = spec.autoencoder.build()
        discriminator = spec.adversarial.build(spec.data.channels).discriminator if spec.adversarial else None
    details = {}
    if spec.init_from and not plan.checkpoint:
        pretrained(spec)
        details["begins with"] = spec.init_from
    if spec.freeze:
        details["trained"] = "the decoder only"
    if spec.loss.lpips:
        details["perceptual loss"] = _perceptual(spec.loss)
    if spec.adversarial and discriminator:
        details["discriminator"] = _told(spec, discriminator)
    return make_preview(plan, "autoencoder", module, autoencoder_memory(plan), details)


def run(plan: Plan[AutoencoderTraining]) -> Result:
    """Trains as the plan's config says."""
    return train(plan, partial(AutoencoderJob, plan))


def load_loss_metric(loss: Loss) -> Metric:
    """The perceptual distance that a config asks for, on the CPU.

    Raises:
        ConfigError: its weights are not there, or are others.
    """
    settings = Settings(
        "loss.lpips_net={}", "loss.lpips_weights", "loss.lpips_auto_download=true", "takes a file or a folder"
    )
    backbone = Backbone(loss.lpips_net, loss.lpips_weights, loss.lpips_auto_download, settings=settings)
    return load_metric(backbone, device="cpu", checked=False)


def _perceptual(loss: Loss) -> str:
    """What a run would use, without fetching it."""
    try:
        return load_loss_metric(loss.model_copy(update={"lpips_auto_download": False})).described
    except ConfigError:
        if loss.lpips_weights or not loss.lpips_auto_download:
            raise
        return f"LPIPS by {loss.lpips_net}, whose weights will be downloaded"


def pretrained(spec: AutoencoderTraining) -> "nn.Module":
    """The autoencoder that a config's `init_from` names.

    Raises:
        ConfigError: there is none, or it is of another config.
    """
    assert spec.init_from is not None
    file = resolve(spec.init_from, "autoencoder")
    theirs = model_config(file, AutoencoderModel).autoencoder
    if theirs != spec.autoencoder:
        hint = "Set autoencoder to what `uldm config show` or the run's train.yaml says of it"
        what = f"init_from={spec.init_from} is another autoencoder: {told_apart(theirs, spec.autoencoder)}"
        raise ConfigError(what, hint)
    return load_autoencoder(file)


def _told(spec: AutoencoderTraining, discriminator: Any) -> str:
    assert spec.adversarial is not None
    start = spec.adversarial.start
    begins = f"from step {start + 1:,}" if start < spec.train.steps else f"never: it would start after step {start:,}"
    size = f"{count_parameters(discriminator):,} parameters"
    return f"{size}, sees {discriminator.receptive_field} pixels, {begins}"


class AutoencoderJob:
    """An autoencoder in training."""

    kind = "autoencoder"

    def __init__(self, plan: Plan[AutoencoderTraining]) -> None:
        import torch

        from uldm_cli.core.training import Trainer

        self.spec = spec = plan.config
        self.seed, self.data = spec.train.seed, spec.data
        self.dataset = open_images(spec.data)
        self.config = AutoencoderModel(autoencoder=spec.autoencoder, image_size=self.dataset.size)
        self.metric = load_loss_metric(spec.loss) if spec.loss.lpips else None
        mind_memory(plan, autoencoder_memory)
        torch.manual_seed(self.seed)
        self.module: Any = spec.autoencoder.build().to(memory_format=torch.channels_last)
        if spec.init_from and not plan.checkpoint:
            self.module.load_state_dict(pretrained(spec).state_dict())
        self.task = self._task()
        if spec.train.compile:
            self._compile()
        self.trainer = Trainer(
            self.task,
            self.module,
            make_engine(plan),
            spec.optim.build(spec.train.steps),
            ema_decay=spec.train.ema_decay,
            flip_seed=self.seed if spec.data.flip else None,
            accumulate=spec.train.accumulate,
            ema_profiles=spec.train.ema_profiles,
        )
        self.title = f"autoencoder, {count_parameters(self.module):,} parameters, {self.trainer.engine.precision}"
        self._warned: set[str] = set()
        if self.metric and self.metric.weights != "embedded":
            console.note(f"perceptual loss: {self.metric.described}")
        if self.task.discriminator is not None:
            console.note(f"discriminator: {_told(spec, self.task.discriminator)}")

    def _task(self) -> Any:
        import torch

        from uldm_cli.core.autoencoding import AutoencoderTask

        spec = self.spec
        adversarial = spec.adversarial.build(spec.data.channels) if spec.adversarial else None
        if adversarial:
            adversarial.discriminator.to(memory_format=torch.channels_last)
        return AutoencoderTask(
            self.module,
            spec.loss.build(),
            self.metric.module.to(memory_format=torch.channels_last) if self.metric else None,
            seed=self.seed,
            logvar=spec.loss.logvar,
            adversarial=adversarial,
            frozen=spec.freeze is not None,
        )

    def _compile(self) -> None:
        import torch

        if self.task.discriminator is not None and self.spec.adversarial and self.spec.adversarial.adaptive:
            # Gradients at the last layer are asked for three times, and those inside compiled code can be had once.
            last, disable = self.module.decoder.conv_out, cast("Any", torch.compiler.disable)
            last.forward = disable(last.forward)
        self.module.encoder.compile()
        self.module.decoder.compile()

    def untrained(self) -> "Mapping[str, Mapping[str, Tensor]]":
        return {}

    def epoch_logs(self) -> dict[str, float]:
        logs: dict[str, float] = self.task.codebook_logs()
        return logs

    def start_epoch(self) -> None:
        self.task.start_epoch()

    def warnings(self, line: Line) -> list[str]:
        """What a person should know of a line of metrics, each thing once a run."""
        found = {"discriminator": self._won(line), "codebook": self._collapsed(line)}
        new = {name: text for name, text in found.items() if text and name not in self._warned}
        self._warned |= new.keys()
        return list(new.values())

    def _won(self, line: Line) -> str | None:
        loss = line.get("discriminator")
        if loss is None or loss >= WON:
            return None
        undecided = "1" if self.spec.adversarial and self.spec.adversarial.loss == "hinge" else "0.69"
        return (
            f"the discriminator wins: its loss was {loss:.2g} (one that cannot tell has {undecided}), and what it then "
            "asks for is of little use. Give it fewer or narrower channels, a later adversarial.start, or more "
            "weight to the reconstruction"
        )

    def _collapsed(self, line: Line) -> str | None:
        if "usage" not in line or line["epoch"] < line["counted_epoch"]:
            return None  # of the first epoch there is only a part yet
        codes = self.module.quantize.codebook_size
        latents = len(self.dataset) * (self.dataset.size // self.spec.autoencoder.factor) ** 2
        if line["usage"] >= COLLAPSED * min(1.0, latents / codes):
            return None
        return (
            f"the codebook collapses: in epoch {line['counted_epoch']:g} only {line['usage']:.1%} of its {codes:,} "
            "codes were used. Take a quantizer that revives codes (autoencoder.quantizer=ema), a smaller "
            "codebook_size, or a lower optim.lr"
        )

    def picture(self) -> "tuple[str, np.ndarray]":
        """The first images that training saw, above their reconstructions by the averaged weights."""
        import torch

        from uldm_cli.core.data import stream
        from uldm_cli.core.images import to_uint8
        from uldm_cli.core.training import to_float
        from uldm_cli.runs.draw.grid import draw_grid, squeezed

        count = min(SHOWN, len(self.dataset))
        batch = next(stream(self.dataset, batch_size=count, seed=self.seed, strict=self.data.strict))
        engine, images = self.trainer.engine, batch.image
        images = to_float(images) if images.dtype == torch.uint8 else images
        images = images.to(engine.device, engine.weights_dtype)
        self.module.eval()
        with torch.no_grad(), self.trainer.ema.applied():
            recon = self.module.from_latent(self.module.to_latent(images))
        rows = [squeezed(to_uint8(pictures)) for pictures in (images, recon)]
        return "recon", draw_grid(rows, [""] * count)
