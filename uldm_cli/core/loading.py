"""Building networks that are about to be given their weights."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = {Tensor.uniform_, Tensor.normal_, nn.init.kaiming_uniform_, nn.init.trunc_normal_}


class Undrawn(TorchFunctionMode):
    """Inside, modules are made without drawing initial weights, which takes seconds for a few hundred million."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DRAWS:
            return func(*args, **(kwargs or {}))
        return args[0] if args else (kwargs or {})["tensor"]
