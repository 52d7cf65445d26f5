"""A denoiser: the network together with what its output means."""

from typing import Literal

import torch
from torch import Tensor, nn

from uldm_cli.core.conditioning import Condition
from uldm_cli.core.samplers import Prediction, PredictionWithVariance
from uldm_cli.core.schedules import Schedule, ends_in_noise
from uldm_cli.errors import UsageError

Target = Literal["eps", "x0", "v"]
"""What a network predicts: the noise, the clean signal, or the velocity v = alpha eps - sigma x0."""


class Denoiser(nn.Module):
    """Predicts the clean signal and the noise of `x_t = alpha x0 + sigma eps`.

    Args:
        backbone: `(x [N, C, H, W], t [N or 1]) -> [N, C, H, W]`; a conditional one also takes `context` or `y`, as
            `Condition` has them, and `x` with the condition's channels after its own.
        schedule: alpha and sigma.
        target: what the backbone predicts (v: Salimans & Ho 2022, appendix D).
        learned_variance: the backbone gives 2 C channels, the other half being where the variance of an ancestral step
            lies (see `PredictionWithVariance`).

    Raises:
        UsageError: the noise is to be predicted also where there is nothing else, which would say nothing.
    """

    def __init__(
        self, backbone: nn.Module, schedule: Schedule, target: Target, *, learned_variance: bool = False
    ) -> None:
        super().__init__()
        if target == "eps" and ends_in_noise(schedule):
            raise UsageError("the schedule's last timestep holds no signal, so that eps says nothing", "Use v or x0")
        self.backbone, self.schedule, self.target = backbone, schedule, target
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, t: int, condition: Condition | None = None) -> Prediction:
        """For float32 `x` `[N, C, H, W]` whose samples are all at timestep t. Computes in the backbone's dtype."""
        times = torch.tensor([t], device=x.device)
        out = self.predict(x, times, condition).to(x.dtype, memory_format=torch.contiguous_format)
        said, variance = out.chunk(2, dim=1) if self.learned_variance else (out, None)
        prediction = convert(self.target, said, x, self.schedule.alpha(t), self.schedule.sigma(t))
        return prediction if variance is None else PredictionWithVariance(*prediction, variance)

    def predict(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The backbone's own answer, in its dtype, at timesteps `t` `[N]` or `[1]`: C channels, or 2 C."""
        dtype = next(self.backbone.parameters()).dtype
        told: dict[str, Tensor] = {}
        if condition is not None:
            if condition.concat is not None:
                x = torch.cat([x, condition.concat.to(x.dtype)], dim=1)
            if condition.context is not None:
                told["context"] = condition.context.to(dtype)
            if condition.label is not None:
                told["y"] = condition.label
        return self.backbone(x.to(dtype, memory_format=torch.channels_last), t, **told)


def convert(target: Target, out: Tensor, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Prediction:
    """x0 and eps from a network's output at a noised input (v: assumes alpha^2 + sigma^2 = 1).

    Where alpha is 0, only of x0 and v: an output of eps says nothing of x0 there.
    """
    if target == "eps":
        return Prediction((x - sigma * out) / alpha, out)
    if target == "x0":
        return Prediction(out, (x - alpha * out) / sigma)
    return Prediction(alpha * x - sigma * out, sigma * x + alpha * out)


def training_target(target: Target, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should have said, `[N, C, H, W]`; alpha and sigma are `[N, 1, 1, 1]`."""
    return {"eps": eps, "x0": x0}[target] if target != "v" else alpha * eps - sigma * x0
