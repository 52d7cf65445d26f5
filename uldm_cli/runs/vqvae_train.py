"""`uldm vqvae train`: trains an autoencoder."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import assets
from uldm_cli.formats.native import load_tensors
from uldm_cli.runs.metrics import Line
from uldm_cli.runs.outdir import default_outdir
from uldm_cli.runs.preview import Preview
from uldm_cli.runs.preview import preview as make_preview
from uldm_cli.runs.train import Plan, Result, count_parameters, make_engine, make_plan, open_images, train
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.models import AutoencoderModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from uldm_cli.core.lpips import LPIPS

SHOWN = 8


def plan(
    spec: AutoencoderTraining, outdir: Path | None, config: Path | None, *, resume: bool = False
) -> Plan[AutoencoderTraining]:
    """Where a run writes and what it goes on from."""
    return make_plan(spec, outdir, default_outdir("vqvae", "train", config), resume=resume)


def preview(plan: Plan[AutoencoderTraining]) -> Preview:
    """What `run` would do."""
    import torch

    with torch.device("meta"):
        module = plan.config.autoencoder.build()
    return make_preview(plan, "autoencoder", module, {})


def run(plan: Plan[AutoencoderTraining]) -> Result:
    """Trains as the plan's config says."""
    return train(plan, partial(AutoencoderJob, plan))


def load_lpips() -> "LPIPS":
    """The perceptual distance with the embedded AlexNet."""
    from uldm_cli.core.lpips import LPIPS

    return LPIPS(load_tensors(assets.path("lpips-alex.safetensors")), "alex", checked=False)


class AutoencoderJob:
    """An autoencoder in training."""

    kind = "autoencoder"

    def __init__(self, plan: Plan[AutoencoderTraining]) -> None:
        import torch

        from uldm_cli.core.autoencoding import AutoencoderTask
        from uldm_cli.core.training import Trainer

        spec = plan.config
        self.seed, self.data = spec.train.seed, spec.data
        self.dataset = open_images(spec.data)
        self.config = AutoencoderModel(autoencoder=spec.autoencoder, image_size=self.dataset.size)
        torch.manual_seed(self.seed)
        self.module = spec.autoencoder.build().to(memory_format=torch.channels_last)
        if spec.train.compile:
            self.module.encoder.compile()
            self.module.decoder.compile()
        self.task = AutoencoderTask(self.module, spec.loss.build(), load_lpips() if spec.loss.lpips else None)
        self.trainer = Trainer(
            self.task,
            self.module,
            make_engine(plan),
            spec.optim.build(spec.train.steps),
            ema_decay=spec.train.ema_decay,
            flip_seed=self.seed if spec.data.flip else None,
            accumulate=spec.train.accumulate,
        )
        self.title = f"autoencoder, {count_parameters(self.module):,} parameters, {self.trainer.engine.precision}"

    def untrained(self) -> "Mapping[str, Mapping[str, Tensor]]":
        return {}

    def epoch_logs(self) -> dict[str, float]:
        return self.task.codebook_logs()

    def start_epoch(self) -> None:
        self.task.start_epoch()

    def warnings(self, line: Line) -> list[str]:
        return []

    def picture(self) -> "tuple[str, np.ndarray]":
        """The first images that training saw, above their reconstructions by the averaged weights."""
        import torch

        from uldm_cli.core.data import stream
        from uldm_cli.core.images import to_uint8
        from uldm_cli.core.training import to_float
        from uldm_cli.runs.draw.grid import draw_grid

        count = min(SHOWN, len(self.dataset))
        batch = next(stream(self.dataset, batch_size=count, seed=self.seed, strict=self.data.strict))
        images = to_float(batch.image.to(self.trainer.engine.device))
        self.module.eval()
        with torch.no_grad(), self.trainer.ema.applied():
            recon = self.module(images)[0]
        rows = [squeezed(to_uint8(images)), squeezed(to_uint8(recon))]
        return "recon", draw_grid(rows, [""] * count)


def squeezed(pictures: "np.ndarray") -> "list[np.ndarray]":
    """`[N, H, W, C]` as N pictures, `[H, W]` where C is 1."""
    return [picture[..., 0] if picture.shape[-1] == 1 else picture for picture in pictures]
