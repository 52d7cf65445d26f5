"""Training: one loop for every task, a generator of records.

What is evaluated, shown and saved happens outside, between records.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.data import Batch
from uldm_cli.core.ema import EMA, Profiles
from uldm_cli.core.engine import Engine


class Task(nn.Module):
    """What is trained: the modules, the losses, and what happens around a step.

    `phases` names the optimizers, in order; each steps on its own loss over its own parameters, which no other phase
    has; meanwhile those of the other phases want no gradients. A step may be made of several micro-batches: then each
    phase sees them all, in the same order, before the next phase begins. The gradients of all phases are computed
    before the first optimizer steps.
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
    spike: float | None = None
    """A step whose gradient's norm is so many times its running average is skipped."""

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
    batches: list[Batch]
    """This process's micro-batches."""
    logs: dict[str, Tensor]
    """Means over this process's samples."""
    lr: float
    fault: "Fault | None" = None
    """Why the step changed nothing, if so."""


@dataclass(frozen=True)
class Fault:
    """What was wrong with a step's gradient."""

    what: str
    """In words: "the gradient of 'autoencoder' is NaN or infinite"."""
    spoilt: bool
    """Whether the weights may be to blame: then they are not worth saving."""


class Trainer:
    """A task with its optimizers and moving average: everything that a step changes, and so all that is saved.

    Args:
        task: what is trained.
        averaged: the module whose moving average is kept, and whose weights are shared out where the engine shards.
        engine: where and how it is computed.
        optimization: how the optimizers step.
        ema_decay: of the average.
        flip_seed: of mirroring half of the images; None mirrors none.
        accumulate: micro-batches a step.
        ema_profiles: widths of the averages that are kept beside the usual one, as `Profiles` takes them.
    """

    def __init__(
        self,
        task: Task,
        averaged: nn.Module,
        engine: Engine,
        optimization: Optimization,
        *,
        ema_decay: float,
        flip_seed: int | None,
        accumulate: int = 1,
        ema_profiles: Sequence[float] = (),
    ) -> None:
        self.task, self.engine = task.to(engine.device, engine.weights_dtype), engine
        self.optimization, self.flip_seed, self.accumulate = optimization, flip_seed, accumulate
        o = optimization
        engine.shard(averaged)
        self._trained = {phase: task.trained(phase) for phase in task.phases}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            phase: _AdamW(parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
            for phase, parameters in self._trained.items()
        }
        self._prepared = {
            phase: engine.prepare(_Phase(task, phase, parameters)) for phase, parameters in self._trained.items()
        }
        self._norms = {phase: RunningNorm() for phase in task.phases}
        self.ema, self.profiles = EMA(averaged, ema_decay), Profiles(averaged, ema_profiles)

    def fit(self, batches: Iterable[Batch], start: int = 0) -> Iterator[Record]:
        """Trains from the step after `start` to the last, yielding a record a step."""
        source = iter(batches)
        for step in range(start + 1, self.optimization.steps + 1):
            micro = list(islice(source, self.accumulate))
            if len(micro) < self.accumulate:
                return
            yield self._step(step, micro)

    def _step(self, step: int, micro: list[Batch]) -> Record:
        inputs = [self._inputs(batch) for batch in micro]
        lr = self.optimization.lr_at(step)
        self.task.train()
        logs: dict[str, Tensor] = {}
        fault = None
        phases = self.task.begin(step)
        for phase in phases:
            loss, found = self._gradient(phase, inputs)
            logs |= found
            fault = fault or self._fault(phase, float(found[f"{phase}_grad_norm"]), loss)
        if fault is None:
            for phase in phases:
                self._update(phase, lr, float(logs[f"{phase}_grad_norm"]))
            self.task.after_step(step)
            self.ema.update()
            self.profiles.update()
        self.engine.scaled()
        return Record(step, micro, logs, lr, fault)

    def _gradient(self, phase: str, inputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes and clips a phase's gradient; its loss and what it logs, as means over the micro-batches."""
        run, optimizer = self._prepared[phase], self.optimizers[phase]
        optimizer.zero_grad(set_to_none=True)
        for other, parameters in self._trained.items():
            for parameter in parameters:
                parameter.requires_grad_(other == phase)
        losses: list[Tensor] = []
        found: list[dict[str, Tensor]] = []
        for i, (image, number) in enumerate(inputs):
            with self.engine.gathering(run, last=i == len(inputs) - 1):
                loss, logs = run(image, number)
                self.engine.backward(loss / len(inputs))
            losses.append(loss.detach())
            found.append(logs)
        norm = self.engine.clip(self._trained[phase], self.optimization.clip_norm, optimizer)
        means = {name: torch.stack([logs[name] for logs in found]).mean() for name in found[0]}
        return torch.stack(losses).mean(), {**means, f"{phase}_grad_norm": norm.detach()}

    def _fault(self, phase: str, norm: float, loss: Tensor) -> Fault | None:
        """What is wrong with a gradient of this norm, the same in every process."""
        if not math.isfinite(norm):
            # In fp16 gradients overflow until the scaler has found its scale, and nothing is wrong with the weights.
            spoilt = self.engine.scaler is None or self.engine.any(not math.isfinite(float(loss)))[0]
            return Fault(f"the gradient of '{phase}' is NaN or infinite", spoilt)
        usual, limit = self._norms[phase], self.optimization.spike
        if limit is None or not usual.known:
            return None
        # What is below the clipping norm is no danger, however much smaller it was before.
        allowed = limit * max(usual.mean, self.optimization.clip_norm)
        if norm <= allowed:
            return None
        usual.add(allowed)  # should the gradients stay so large, they become the usual ones
        what = f"the gradient of '{phase}' has the norm {norm:.3g}, more than {allowed:.3g}"
        return Fault(f"{what}, which is {limit:g} times the usual", spoilt=False)

    def _update(self, phase: str, lr: float, norm: float) -> None:
        optimizer = self.optimizers[phase]
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.engine.step(optimizer)
        self._norms[phase].add(norm)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.engine.device
        number = batch.number.to(device, non_blocking=True)
        image = batch.image.to(device, non_blocking=True)
        image = (to_float(image) if image.dtype == torch.uint8 else image).to(self.engine.weights_dtype)
        if self.flip_seed is not None:
            flipped = rng.coin(self.flip_seed, rng.STREAM_FLIP, number)
            image = torch.where(flipped[:, None, None, None], image.flip(3), image)
        return image, number

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs beside the model's weights: the optimizers' moments, by phase, parameter and name; the
        task's own state; averages beside the usual one; the gradients' usual norms; the scaler of fp16."""
        tensors = {}
        for phase, optimizer in self.optimizers.items():
            for index, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    tensors[f"{phase}.{index}.{name}"] = torch.as_tensor(value)
            tensors[f"{phase}.norm"] = self._norms[phase].state()
        tensors |= {f"task.{name}": value for name, value in self.task.state().items()}
        tensors |= {f"profiles.{name}": value for name, value in self.profiles.state_dict().items()}
        if self.engine.scaler is not None:
            scaler = self.engine.scaler.state_dict()
            tensors |= {f"scaler.{name}": torch.tensor(float(value)) for name, value in scaler.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for phase, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            state["state"] = {}
            for index, parameter in enumerate(self._trained[phase]):
                found = below(f"{phase}.{index}.", tensors)
                if found:
                    state["state"][index] = {k: _laid_out_like(parameter, v) for k, v in found.items()}
            optimizer.load_state_dict(state)
            self._norms[phase].load(tensors[f"{phase}.norm"])
        self.task.load_state(below("task.", tensors))
        self.profiles.load_state_dict(below("profiles.", tensors))
        if self.engine.scaler is not None:
            now = self.engine.scaler.state_dict()
            stored = below("scaler.", tensors)
            self.engine.scaler.load_state_dict({k: type(now[k])(float(v)) for k, v in stored.items()})


class _Phase(nn.Module):
    """What accelerate wraps: a task's phase, whose parameters are those that the phase trains and no others."""

    def __init__(self, task: Task, phase: str, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)
        self._run = (task, phase)  # in a tuple, so that the task's other parameters do not become this module's

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        task, phase = self._run
        return task(phase, image, number)


class _AdamW(torch.optim.AdamW):
    """PyTorch's. On a CPU its fused kernel copies what has the channels last, so that is shown as it lies in memory."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """Fills lists of parameters, gradients and moments."""
        answer = super()._init_group(group, *lists)
        for tensors in lists:
            if isinstance(tensors, list):
                tensors[:] = map(_as_it_lies, tensors)
        return answer


def _as_it_lies(tensor: Tensor) -> Tensor:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 2, 3, 1) if last and tensor.device.type == "cpu" else tensor


class RunningNorm:
    """A running average of gradient norms, over about the last hundred steps."""

    DECAY = 0.99
    NEEDED = 100
    """So many norms make an average that others can be held against."""

    def __init__(self) -> None:
        self.count, self._sum = 0, 0.0

    @property
    def known(self) -> bool:
        return self.count >= self.NEEDED

    @property
    def mean(self) -> float:
        return self._sum / (1 - self.DECAY**self.count) if self.count else 0.0

    def add(self, norm: float) -> None:
        self.count += 1
        self._sum = self.DECAY * self._sum + (1 - self.DECAY) * norm

    def state(self) -> Tensor:
        return torch.tensor([self.count, self._sum], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.count, self._sum = int(state[0]), float(state[1])


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """The fused optimizer walks through memory, so a moment must lie there as its parameter does (channels last)."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


def to_float(image: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1], channels last in memory."""
    return (image.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
