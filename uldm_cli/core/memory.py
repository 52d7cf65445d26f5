"""What a training will need in memory, estimated on shapes alone, and what there is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from uldm_cli.core import winograd
from uldm_cli.core.blocks import Conv2d


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs on its device while it trains."""

    weights: int
    """Of everything, trained or not, and of the moving average."""
    training: int
    """Gradients and the optimizer's moments."""
    activations: int
    """What a backward pass needs of the forward pass of a micro-batch, or encoding it needs, if that is more."""

    @property
    def fixed(self) -> int:
        """What the batch size does not change."""
        return self.weights + self.training

    @property
    def total(self) -> int:
        return self.fixed + self.activations


def estimate(
    trained: Iterable[nn.Module],
    others: Iterable[nn.Module],
    averages: int,
    activations: int,
    dtype: torch.dtype,
    shares: int = 1,
) -> Memory:
    """Memory of a training with AdamW.

    Args:
        trained: modules whose parameters are trained, of which the first is averaged.
        others: modules that are only used.
        averages: how many moving averages are kept.
        activations: bytes that a micro-batch needs for a while.
        dtype: of the weights, float32 or float64.
        shares: among how many processes the modules that are trained are shared out.
    """
    counts = [sum(p.numel() for p in module.parameters()) // shares for module in trained]
    used = sum(p.numel() for module in others for p in module.parameters())
    size = dtype.itemsize
    return Memory(
        weights=size * (sum(counts) + used + averages * counts[0]),
        training=3 * size * sum(counts),
        activations=activations,
    )


@contextmanager
def shapes_only(precision: torch.dtype) -> Iterator[None]:
    """Inside, tensors and modules that are made have shapes and no memory, and autocast is as in training."""
    mixed = precision in (torch.bfloat16, torch.float16)
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        yield


def kept_for_backward(run: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd keeps of what `run` computes, parameters left out. Use it in `shapes_only`."""
    kept: dict[int, int] = {}
    alive: list[object] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)  # else another one could get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def kept_transformed(module: nn.Module, run: Callable[[], object], samples: int) -> int:
    """Bytes that autograd keeps of so many samples beyond `kept_for_backward`, which convolves directly, where
    `core.winograd` would convolve. `run` takes one sample through the module. Use it in `shapes_only`."""
    more = 0

    def note(conv: Conv2d, inputs: tuple[Tensor], options: dict[str, int]) -> None:
        nonlocal more
        [x] = inputs
        if winograd.suits(conv, samples, *x.shape[1:], **options):
            more += winograd.kept_more(conv, x, **options)

    convs = (conv for conv in module.modules() if isinstance(conv, Conv2d))
    hooks = [conv.register_forward_pre_hook(note, with_kwargs=True) for conv in convs]
    run()
    for hook in hooks:
        hook.remove()
    return samples * more


def most_alive(run: Callable[[], object]) -> int:
    """Bytes of the tensors that `run` makes, when there are most of them at once. Use it in `shapes_only`, with
    parameters that want no gradients: then nothing is kept for a backward pass."""
    with _Alive() as alive:
        run()
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the storages of what operations return, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._held:
                self._held[storage._cdata] = storage.nbytes()
                finalize(storage, self._held.pop, storage._cdata)
        self.most = max(self.most, sum(self._held.values()))
        return result


def available(device: torch.device, local_rank: int, neighbours: int) -> int:
    """Bytes that a process can still have on its device.

    Args:
        device: without an index it is the accelerator that the process takes among several.
        local_rank: its number among the processes on this machine.
        neighbours: how many they are: on a CPU they share the memory.
    """
    if device.type == "cuda":
        numbered = ":" in str(device)
        return torch.cuda.mem_get_info(device if numbered else local_rank)[0]
    return int(psutil.virtual_memory().available) // neighbours
