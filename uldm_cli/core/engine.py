"""Devices, mixed precision and processes: the only user of accelerate."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from uldm_cli.core.device import pick_device, pick_dtype


class Engine:
    """Runs a training step where and how it was asked for.

    Args:
        device: as `pick_device` takes it.
        precision: as `pick_dtype` takes it; bf16 means autocast, the weights stay float32.
    """

    def __init__(self, device: str, precision: str) -> None:
        picked = pick_device(device)
        dtype = pick_dtype(precision, picked)
        if picked.type == "cuda" and picked.index is not None:
            torch.cuda.set_device(picked)
        self._accelerator = Accelerator(
            cpu=picked.type == "cpu", mixed_precision="bf16" if dtype == torch.bfloat16 else "no"
        )
        self.device = self._accelerator.device
        self.precision = "bf16" if dtype == torch.bfloat16 else "fp32"

    def prepare(
        self, module: nn.Module, optimizers: dict[str, torch.optim.Optimizer]
    ) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        """The module and its optimizers, wrapped for this device, precision and number of processes."""
        wrapped, *rest = self._accelerator.prepare(module, *optimizers.values())
        return wrapped, dict(zip(optimizers, rest, strict=True))

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, parameters: list[nn.Parameter], norm: float) -> Tensor:
        """Clips the gradients' total norm to at most `norm`; returns what it was."""
        total = self._accelerator.clip_grad_norm_(parameters, norm)
        assert total is not None
        return total
