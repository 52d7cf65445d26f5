"""Weights of which every process that trains holds a part (Zhao et al. 2023, "PyTorch FSDP", by `fully_shard`)."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication


def shard(module: nn.Module, device: torch.device, world: int) -> None:
    """Shares a module's parameters out among all processes; those it computes with are together while it does.

    It is to be called as a whole, as `module(...)`, and so are the items of its module lists: one of these after the
    other is brought together and given back.

    Args:
        module: on its device, the same in all processes.
        device: of the process.
        world: how many processes there are.
    """
    module.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    mesh = init_device_mesh(device.type, (world,))
    for part in (*_items(module), module):
        fully_shard(part, mesh=mesh)


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def average_gradients(module: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages the gradients of all processes, or adds them up in each."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(now)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together where it is shared out; then all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept(tensors: Mapping[str, Tensor], main: bool) -> dict[str, Tensor]:
    """`whole` of several tensors, on the CPU, in the main process; nothing in the others, which must ask, too."""
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if main:
            found[name] = together.cpu()
    return found


def spreading() -> AbstractContextManager[None]:
    """Inside, whole tensors, the same in all processes, can be copied into those that are shared out."""
    return implicit_replication()
