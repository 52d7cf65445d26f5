"""Devices, mixed precision, processes and trackers: the only user of accelerate."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast_object_list, gather_object
from torch import Tensor, nn

from uldm_cli.core import collectives, sharding
from uldm_cli.core.device import pick_device, pick_dtype
from uldm_cli.errors import UldmError, UsageError

_LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
_MIXED = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Engine:
    """Runs a training step where and how it was asked for, in this process and those that a launcher started with it.

    Args:
        device: as `pick_device` takes it; of several processes each takes an accelerator of its own.
        precision: as `pick_dtype` takes it; bf16 and fp16 mean autocast, the weights stay float32.
        trackers: names that accelerate knows, such as "tensorboard"; they write to `folder`.
        folder: the run's.
        sharded: whether each process holds a part of the trained weights only, by FSDP. Accelerate offers that on
            accelerators; here it is done by what it builds on, on CPUs, too.

    Raises:
        UsageError: several processes and a numbered device, not all of what a launcher sets, or a launcher that does
            something else than DDP or FSDP.
        UldmError: the launcher started several processes, and accelerate sees another number.
    """

    def __init__(
        self,
        device: str,
        precision: str,
        *,
        trackers: Sequence[str] = (),
        folder: Path | None = None,
        sharded: bool = False,
    ) -> None:
        picked = pick_device(device)
        self.dtype = pick_dtype(precision, picked)
        launched = int(os.environ.get("WORLD_SIZE") or 1)
        missing = [name for name in _LAUNCHED if name not in os.environ] if launched > 1 else []
        if missing:
            what = f"WORLD_SIZE is {launched}, but {', '.join(missing)} are not set"
            raise UsageError(what, "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE")
        if picked.index is not None:
            if launched > 1:
                hint = f"Name {picked.type}: every process takes one of its own"
                raise UsageError(f"--device {device} is a single one, and there are {launched} processes", hint)
            torch.accelerator.set_device_index(picked.index)
        # Without cpu=True accelerate would start lone processes on a CPU, each with a run of its own.
        self._accelerator = Accelerator(
            cpu=picked.type == "cpu",
            mixed_precision=_MIXED.get(self.dtype, "no"),
            # Whatever the launcher's config says: a step's micro-batches are the trainer's.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=list(trackers) or None,
            project_dir=folder,
        )
        kind = self._accelerator.distributed_type
        if kind not in _SUPPORTED:
            raise UsageError(f"{kind.value} is not supported", "Launch with DDP or FSDP")
        self.sharded = sharded
        self._shards: nn.Module | None = None
        self.device = self._accelerator.device
        self.precision = {torch.float32: "fp32", torch.float64: "fp64", **_MIXED}[self.dtype]
        self.world, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        if self.world != launched or self.world != collectives.world():
            seen = f"accelerate sees {self.world}, torch {collectives.world()}"
            raise UldmError(f"the launcher started {launched} processes, but {seen}", "Start them with torchrun")

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of weights and images: float64 where that was asked for, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def shard(self, module: nn.Module) -> None:
        """Shares a module's parameters out among the processes, if the engine shards; before it has an optimizer."""
        if self.sharded:
            sharding.shard(module, self.device, self.world)
            self._shards = module

    def prepare(self, module: nn.Module) -> nn.Module:
        """A module, wrapped for this device, precision and number of processes.

        Its optimizer is not: accelerate's would step in the same way, and look up installed packages in every step.
        """
        if self.sharded:  # accelerate would do it once more
            module.forward = self._accelerator.autocast()(module.forward)
            return module
        wrapped: nn.Module = self._accelerator.prepare(module)
        return wrapped

    def gathering(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: only the step's last one averages the processes' gradients."""
        if self._shards is not None:
            sharding.average_gradients(self._shards, last)
            return nullcontext()
        return nullcontext() if last else self._accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], norm: float, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clips the gradients' total norm to at most `norm`; returns what it was.

        Accelerate's own way would unscale those of all optimizers, of which some have had theirs unscaled already.
        """
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        total = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        found = sharding.whole(total)
        if not found <= norm:  # else every gradient would be multiplied by one
            torch.nn.utils.clip_grads_with_norm_(parameters, norm, total)
        return found

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's step. When all have stepped or none, `scaled` ends it."""
        if self.scaler is not None:
            self.scaler.step(optimizer)
        else:
            optimizer.step()

    def scaled(self) -> None:
        """The scale of fp16 takes its lesson from the gradients of a step, made or not."""
        if self.scaler is not None:
            self.scaler.update()

    @property
    def scaler(self) -> Any:
        """The gradients' scaler of fp16; None of other precisions."""
        return self._accelerator.scaler

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in at least one process: all of them get the same answer."""
        if self.world == 1:
            return flags
        return tuple(bool(x) for x in collectives.total(torch.tensor(flags, device=self.device).int()).tolist())

    def from_main(self, value: Any) -> Any:
        """The main process's value, in every process."""
        return broadcast_object_list([value])[0] if self.world > 1 else value

    def from_all(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks, in each of them."""
        return list(gather_object([value])) if self.world > 1 else [value]

    def kept(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the main process is to keep of tensors: themselves, or where they are shared out, put together.

        All processes must ask for it; where tensors are shared out, the others get nothing.
        """
        return sharding.kept(tensors, self.main) if self.sharded else tensors

    def restoring(self) -> AbstractContextManager[None]:
        """Around the copying of kept tensors, read by every process, into those that may be shared out."""
        return sharding.spreading() if self.sharded else nullcontext()

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()

    def begin_tracking(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Opens the trackers, if there are any, for the run in a folder. `config` maps names to plain values."""
        if self._accelerator.log_with:
            # A run that goes on is to be one run there, too.
            same = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            wandb = {"dir": str(folder), "name": folder.name, "id": same, "resume": "allow"}
            self._accelerator.init_trackers("uldm", config=dict(config), init_kwargs={"wandb": wandb})

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Gives the trackers figures."""
        if self._accelerator.log_with:
            self._accelerator.log(dict(values), step=step)

    def end_tracking(self) -> None:
        if self._accelerator.log_with:
            self._accelerator.end_training()
