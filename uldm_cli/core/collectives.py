"""Sums and means over the processes of a training run; with one process they change nothing."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


@torch.no_grad()
def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, the same on each; a new tensor where there are several."""
    if world() == 1:
        return value
    summed = value.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


@torch.no_grad()
def mean(value: Tensor) -> Tensor:
    """The mean of a floating-point tensor over all processes, the same on each."""
    return total(value) / world()


def differentiable_total(value: Tensor) -> Tensor:
    """As `total`, with gradients: what flows back is summed over the processes, too."""
    return value if world() == 1 else all_reduce(value)
