"""Training: one loop for every task, a generator of records.

What is evaluated, shown and saved happens outside, between records.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.data import Batch
from uldm_cli.core.ema import EMA
from uldm_cli.core.engine import Engine


class Task(nn.Module):
    """What is trained: the modules, the losses, and what happens around a step.

    `phases` names the optimizers, in order; each steps on its own loss over its own parameters. A step may be made of
    several micro-batches: then each phase sees them all, in the same order, before the next phase begins.
    """

    phases: tuple[str, ...]

    def trained(self, phase: str) -> list[nn.Parameter]:
        """The parameters that a phase's optimizer holds."""
        raise NotImplementedError

    def begin(self, step: int) -> tuple[str, ...]:
        """Called before a step, counted from 1: the phases that it has."""
        return self.phases

    def forward(self, phase: str, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a phase on a micro-batch, a mean over its samples, and scalars to log.

        Args:
            phase: one of `phases`.
            image: `[N, C, H, W]` in [-1, 1], or cached latents, as the data set hands them out.
            number: the sample numbers, int64 `[N]`: of draws by `core.rng`.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called when all phases of a step are done, before the moving average. Not called for a skipped step."""

    def state(self) -> dict[str, Tensor]:
        """What resuming needs beside the averaged module and the optimizers: a discriminator, say."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


@dataclass(frozen=True)
class Optimization:
    """How the optimizer steps."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    decay: Literal["cosine", "constant"]
    clip_norm: float
    steps: int

    def lr_at(self, step: int) -> float:
        """Learning rate of a step counted from 1: linear warm-up, then constant or a cosine to zero."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.decay == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Record:
    """One completed training step. The scalars stay on the device until somebody reads them."""

    step: int
    batch: Batch
    logs: dict[str, Tensor]
    lr: float


class Trainer:
    """A task with its optimizers and moving average: everything that a step changes, and so all that is saved."""

    def __init__(
        self,
        task: Task,
        averaged: nn.Module,
        engine: Engine,
        optimization: Optimization,
        *,
        ema_decay: float,
        flip_seed: int | None,
    ) -> None:
        self.task, self.engine, self.optimization = task.to(engine.device), engine, optimization
        self.flip_seed = flip_seed
        o = optimization
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            phase: torch.optim.AdamW(
                task.trained(phase), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True
            )
            for phase in task.phases
        }
        self._run, self._prepared = engine.prepare(task, self.optimizers)
        self.ema = EMA(averaged, ema_decay)

    def fit(self, batches: Iterable[Batch], start: int = 0) -> Iterator[Record]:
        """Trains from the step after `start` to the last, yielding a record a step."""
        for step, batch in zip(range(start + 1, self.optimization.steps + 1), batches, strict=False):
            image, number = self._inputs(batch)
            lr = self.optimization.lr_at(step)
            logs: dict[str, Tensor] = {}
            self.task.train()
            for phase in self.task.begin(step):
                logs |= self._step(phase, image, number, lr)
            self.task.after_step(step)
            self.ema.update()
            yield Record(step, batch, logs, lr)

    def _step(self, phase: str, image: Tensor, number: Tensor, lr: float) -> dict[str, Tensor]:
        optimizer = self._prepared[phase]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss, logs = self._run(phase, image, number)
        self.engine.backward(loss)
        norm = self.engine.clip(self.task.trained(phase), self.optimization.clip_norm)
        optimizer.step()
        return {**logs, f"{phase}_grad_norm": norm.detach()}

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.engine.device
        number = batch.number.to(device, non_blocking=True)
        image = to_float(batch.image.to(device, non_blocking=True))
        if self.flip_seed is not None:
            flipped = rng.coin(self.flip_seed, rng.STREAM_FLIP, number)
            image = torch.where(flipped[:, None, None, None], image.flip(3), image)
        return image, number

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs beside the model's weights: optimizers' moments, by phase, parameter and name."""
        tensors = {}
        for phase, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    tensors[f"{phase}.{index}.{name}"] = torch.as_tensor(value)
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for phase, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            state["state"] = {}
            for index, parameter in enumerate(self.task.trained(phase)):
                prefix = f"{phase}.{index}."
                found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if found:
                    state["state"][index] = {k: _laid_out_like(parameter, v) for k, v in found.items()}
            optimizer.load_state_dict(state)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The fused optimizer walks through memory, so a moment must lie there as its parameter does (channels last)."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def to_float(image: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1], channels last in memory."""
    return (image.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
