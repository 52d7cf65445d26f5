"""Sampling as a run sees it: the steps of a batch, and frames made of those that are logged."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

from uldm_cli import console, registry
from uldm_cli.errors import PluginError, UldmError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from uldm_cli.console import Progress
    from uldm_cli.core.latent import LatentDiffusion
    from uldm_cli.core.noise import BatchNoise, PerSampleNoise
    from uldm_cli.core.samplers import Step
    from uldm_cli.core.schedules import Schedule
    from uldm_cli.runs.plan import Plan


class Frame:
    """What a batch looks like after a step. Only what is asked for is decoded and copied to the host.

    Args:
        model: decodes.
        step: the completed step.
        show: what of it to look at: the state ("x_t"), or the clean latent predicted in it ("x0").
    """

    def __init__(self, model: LatentDiffusion, step: Step, show: str) -> None:
        self.step, self.n = step, step.n
        self._model, self._state = model, step.x0 if show == "x0" else step.x

    @property
    def schedule(self) -> Schedule:
        """How much signal and noise a timestep holds."""
        return self._model.schedule

    @cached_property
    def latent(self) -> NDArray[np.float32]:
        """The scaled latents, `[N, C, h, w]`."""
        array: NDArray[np.float32] = self._state.float().cpu().numpy()
        return array

    @cached_property
    def pixels(self) -> NDArray[np.float32]:
        """Decoded images, `[N, H, W, C]` in [-1, 1]."""
        array: NDArray[np.float32] = self._decoded.clamp(-1.0, 1.0).permute(0, 2, 3, 1).cpu().numpy()
        return array

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """Decoded images in 8 bits, `[N, H, W, C]`."""
        from uldm_cli.core.images import to_uint8

        return to_uint8(self._decoded)

    @cached_property
    def _decoded(self) -> Tensor:
        return self._model.decode(self._state)


class Trajectories:
    """The model and sampler of a plan, ready to walk its batches."""

    def __init__(self, plan: Plan) -> None:
        from uldm_cli.runs.models import load_latent_diffusion

        spec = plan.spec
        for warning in plan.model.checkpoint.warnings:
            console.warn(warning)
        self.spec, self._logged = spec, plan.logged
        self.model: LatentDiffusion = load_latent_diffusion(
            plan.model, device=spec.device, precision=spec.precision, weights=spec.weights
        )
        self.device = next(self.model.parameters()).device
        self._latent_shape = latent_shape(self.model, plan.image_size)
        # mypy sees only that it is a spec: what a sampler is built from is the plugin's own matter
        self._sampler: Any = spec.sampler
        self._generator = generator_of(spec.seed, self.device) if spec.rng == "compvis" else None
        if spec.compile:
            self.model.denoiser.backbone.compile()

    def frames(self, batch: range, progress: Progress) -> Iterator[Frame]:
        """The logged steps of the samples with these indices; counts every step of each sample as progress.

        Batches are asked for in order, each walked to its end: with `rng` compvis one's draws follow the other's.
        """
        steps = counted(self._steps(batch), progress, len(batch))
        return frames(self.model, steps, self._logged, self.spec.show)

    def _steps(self, batch: range) -> Iterator[Step]:
        from uldm_cli.core.noise import BatchNoise, PerSampleNoise

        if self._generator:
            noise = BatchNoise(self._generator, (len(batch), *self._latent_shape))
            return noise.keep_pace(walk(self.model, self._sampler, noise))
        seeds = self.spec.sample_seeds[batch.start : batch.stop]
        return walk(self.model, self._sampler, PerSampleNoise(seeds, self._latent_shape, self.device))

    def repeatable(self) -> AbstractContextManager[None]:
        """To compute in: cuDNN otherwise may pick, from run to run, algorithms that round differently."""
        import torch

        if self.spec.deterministic and self.device.type == "cuda":
            return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        return nullcontext()


def latent_shape(model: LatentDiffusion, size: tuple[int, int]) -> tuple[int, int, int]:
    """Of the latents `(z, h, w)` of images of this height and width."""
    channels, side, _ = model.latent_shape
    factor = model.image_shape[1] // side
    return (channels, size[0] // factor, size[1] // factor)


def generator_of(seed: int, device: torch.device) -> torch.Generator:
    """Draws what the global generator of this device draws after `torch.manual_seed(seed)`, and leaves that alone."""
    import torch

    return torch.Generator(device).manual_seed(seed)


def walk(model: LatentDiffusion, sampler: Any, noise: PerSampleNoise | BatchNoise) -> Iterator[Step]:
    """The steps of one batch, from the first draw of its noise."""
    steps: Iterator[Step] = built(sampler)(model.denoiser, noise.initial(), model.schedule, noise)
    return steps


def built(sampler: Any) -> Any:
    """What a sampler's spec builds. A plugin imports its heavy part only there, so there it can still break."""
    try:
        return sampler.build()
    except UldmError:
        raise
    except Exception as e:
        owner = registry.owner("samplers", sampler.kind)
        raise PluginError(f"sampler '{sampler.kind}' of {owner} failed to build: {type(e).__name__}: {e}") from e


def counted(steps: Iterable[Step], progress: Progress, samples: int) -> Iterator[Step]:
    """The same steps, each reported for every sample."""
    for step in steps:
        progress.advance(samples)
        yield step


def frames(model: LatentDiffusion, steps: Iterable[Step], logged: Collection[int], show: str) -> Iterator[Frame]:
    """Frames of the logged steps: of the state ("x_t"), or of the clean latent predicted in them ("x0")."""
    wanted = frozenset(logged)
    for step in steps:
        if step.n in wanted:
            yield Frame(model, step, show)
