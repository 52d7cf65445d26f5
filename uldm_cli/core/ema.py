"""Moving averages of a model's weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

WIDEST = 12**-0.5
"""sigma_rel of a plain mean over all steps."""


class Average:
    """Averages every floating-point entry of a module's state dict (so an EMA codebook too).

    Args:
        module: whose state is followed. Entries of other types are copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self.updates = 0
        self._source = module.state_dict()
        self.state = {key: value.detach().clone() for key, value in self._source.items()}

    def decay_at(self, n: int) -> float:
        """Share of the average that the n-th update, counted from 1, keeps."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = self.decay_at(self.updates)
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


class EMA(Average):
    """The usual average: an exponential one.

    The decay warms up, `min(decay, (1 + n) / (10 + n))` after n updates, so that early averages are not dominated by
    the random start.

    Args:
        module: as in `Average`.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module)
        self.decay = decay

    def decay_at(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))


class PowerEMA(Average):
    """An average whose weights grow as a power of the step, so that its width grows with the training.

    After n updates, update k weighs (k^(gamma + 1) - (k - 1)^(gamma + 1)) / n^(gamma + 1) (Karras et al. 2024,
    "Analyzing and improving the training dynamics of diffusion models", section 3.1); the start values weigh nothing.

    Args:
        module: as in `Average`.
        sigma_rel: standard deviation of the weights' distribution over the training, as a share of its length; in
            (0, WIDEST].
    """

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        super().__init__(module)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def decay_at(self, n: int) -> float:
        return (1 - 1 / n) ** (self.gamma + 1)


class Profiles:
    """Power-function averages of several widths, from which `post_hoc_factors` makes one of any.

    Args:
        module: as in `Average`.
        sigmas: the widths, as `PowerEMA` takes them; without any, nothing is kept.
    """

    def __init__(self, module: nn.Module, sigmas: Sequence[float]) -> None:
        self.averages = [PowerEMA(module, sigma) for sigma in sigmas]

    def update(self) -> None:
        for average in self.averages:
            average.update()

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs, by the number of the average, and name."""
        tensors = {"updates": torch.tensor([average.updates for average in self.averages])} if self.averages else {}
        for i, average in enumerate(self.averages):
            tensors |= {f"{i}.{key}": value for key, value in average.state.items()}
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        for i, average in enumerate(self.averages):
            state = {key: tensors[f"{i}.{key}"] for key in average.state}
            average.load(state, int(tensors["updates"][i]))


def gamma_of(sigma_rel: float) -> float:
    """The power, 0 or greater, of an average's width in (0, WIDEST] (Karras et al. 2024, algorithm 2).

    It solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    inverse = sigma_rel**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max(), 0.0))


def post_hoc_factors(
    updates: Sequence[int], sigmas: Sequence[float], wanted_updates: int, wanted_sigma: float
) -> tuple[list[float], float]:
    """By what to multiply stored averages so that their sum is one that was never tracked.

    The factors are those whose mixture of weight profiles is closest to the wanted one, in least squares (Karras et
    al. 2024, section 3.2).

    Args:
        updates: of each stored average, how many it had seen.
        sigmas: of each, its sigma_rel.
        wanted_updates: after how many updates the average is wanted; none of the stored may be later.
        wanted_sigma: its sigma_rel.

    Returns:
        The factors, whose sum is 1, and how far the mixture is from the wanted profile, as a share of that one's norm.
    """
    n, gamma = np.array(updates, dtype=np.float64), np.array([gamma_of(sigma) for sigma in sigmas])
    end, power = np.array([float(wanted_updates)]), np.array([gamma_of(wanted_sigma)])
    overlap, goal = _products(n, gamma, n, gamma), _products(n, gamma, end, power)[:, 0]
    # In terms of profiles of norm 1: neighbours are nearly parallel, and what rounding cannot tell apart is left out.
    norms = np.sqrt(np.diag(overlap))
    factors = np.linalg.lstsq(overlap / np.outer(norms, norms), goal / norms, rcond=1e-12)[0] / norms
    factors /= factors.sum()
    square = float(_products(end, power, end, power)[0, 0])
    missed = square - 2 * float(factors @ goal) + float(factors @ overlap @ factors)
    return factors.tolist(), (max(missed, 0.0) / square) ** 0.5


def _products(n: NDArray, gamma: NDArray, m: NDArray, delta: NDArray) -> NDArray:
    """Inner products of weight profiles (gamma + 1) u^gamma / n^(gamma + 1), u from 0 to n: a row for each n."""
    n, gamma = n[:, None], gamma[:, None]
    shorter = np.minimum(n, m)
    return (
        ((gamma + 1) * (delta + 1) / (gamma + delta + 1))
        * (shorter / n) ** (gamma + 0.5)
        * (shorter / m) ** (delta + 0.5)
        / np.sqrt(n * m)
    )
