"""`uldm vqvae train`: trains an autoencoder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import assets
from uldm_cli.formats.native import Header, load_into, load_tensors
from uldm_cli.runs.outdir import default_outdir
from uldm_cli.runs.train import Plan, Result, make_plan, train
from uldm_cli.specs.models import AutoencoderModel
from uldm_cli.specs.training import AutoencoderTraining

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from uldm_cli.core.lpips import LPIPS

SHOWN = 8


def plan(spec: AutoencoderTraining, outdir: Path | None, config: Path | None, *, resume: bool = False) -> Plan:
    """Where a run writes and what it goes on from."""
    return make_plan(spec, outdir, default_outdir("vqvae", "train", config), resume=resume)


def run(spec: AutoencoderTraining, plan: Plan) -> Result:
    """Trains as `spec` says."""
    return train(plan, AutoencoderJob(spec))


def load_lpips() -> "LPIPS":
    """The perceptual distance with the embedded AlexNet."""
    from uldm_cli.core.lpips import LPIPS

    return LPIPS(load_tensors(assets.path("lpips-alex.safetensors")))


class AutoencoderJob:
    """An autoencoder in training."""

    def __init__(self, spec: AutoencoderTraining) -> None:
        import torch

        from uldm_cli.core.engine import Engine
        from uldm_cli.core.tasks import AutoencoderTask
        from uldm_cli.core.training import Trainer

        self.spec = spec
        data: Any = spec.data
        self.dataset = data.build()
        torch.manual_seed(spec.train.seed)
        self.model = spec.autoencoder.build().to(memory_format=torch.channels_last)
        if spec.train.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()
        self.task = AutoencoderTask(self.model, spec.loss.build(), load_lpips() if spec.loss.lpips else None)
        self.trainer = Trainer(
            self.task,
            self.model,
            Engine(spec.train.device, spec.train.precision),
            spec.optim.build(spec.train.steps),
            ema_decay=spec.train.ema_decay,
            flip_seed=spec.train.seed if data.flip else None,
        )
        self.title = f"autoencoder, {parameters(self.model)}, {self.trainer.engine.precision}"

    def header(self, step: int) -> Header:
        model = AutoencoderModel(autoencoder=self.spec.autoencoder, image_size=self.dataset.size)
        return Header("autoencoder", model.model_dump(mode="json"), self.spec.model_dump(mode="json"), step)

    def parts(self) -> "Mapping[str, Mapping[str, Tensor]]":
        return {"model": self.model.state_dict()}

    def load(self, checkpoint: Path) -> None:
        load_into(self.model, checkpoint, "model")

    def state(self) -> "dict[str, Tensor]":
        return {"epoch_counts": self.model.quantize.epoch_counts}

    def load_state(self, state: "dict[str, Tensor]") -> None:
        self.model.quantize.epoch_counts.copy_(state["epoch_counts"])

    def epoch_logs(self) -> dict[str, float]:
        return self.task.codebook_logs()

    def start_epoch(self) -> None:
        self.task.start_epoch()

    def picture(self) -> "tuple[str, np.ndarray]":
        """The first images of the set above their reconstructions by the averaged weights."""
        import torch

        from uldm_cli.core.images import to_uint8
        from uldm_cli.core.training import to_float
        from uldm_cli.runs.draw.grid import draw_grid

        count = min(SHOWN, len(self.dataset))
        chosen = [self.dataset[i * len(self.dataset) // count][0] for i in range(count)]
        images = to_float(torch.stack(chosen).to(self.trainer.engine.device))
        self.model.eval()
        with torch.no_grad(), self.trainer.ema.applied():
            recon = self.model(images)[0]
        rows = [squeezed(to_uint8(images)), squeezed(to_uint8(recon))]
        return "recon", draw_grid(rows, [""] * count)


def squeezed(pictures: "np.ndarray") -> "list[np.ndarray]":
    """`[N, H, W, C]` as N pictures, `[H, W]` where C is 1."""
    return [picture[..., 0] if picture.shape[-1] == 1 else picture for picture in pictures]


def parameters(module: Any) -> str:
    """How many parameters a module has, for people."""
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"
