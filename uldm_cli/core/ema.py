"""Exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages every floating-point entry of a module's state dict (so an EMA codebook too).

    The decay warms up, `min(decay, (1 + n) / (10 + n))` after n updates, so that early averages are not dominated by
    the random start.

    Args:
        module: whose state is followed. Entries of other types are copied.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._source = module.state_dict()
        self.state = {key: value.detach().clone() for key, value in self._source.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floating = [key for key, value in self.state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.state[k] for k in floating], [self._source[k] for k in floating], 1 - decay)
        for key in self.state.keys() - set(floating):
            self.state[key].copy_(self._source[key])

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the module has the averaged weights; afterwards its own again, bit for bit."""
        own = {key: value.clone() for key, value in self._source.items()}
        try:
            self._fill(self.state)
            yield
        finally:
            self._fill(own)

    def _fill(self, state: dict[str, Tensor]) -> None:
        for key, value in self._source.items():
            value.copy_(state[key])

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Continues from a stored average."""
        self.updates = updates
        for key, value in self.state.items():
            value.copy_(state[key])
