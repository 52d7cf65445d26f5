"""Where the input of a denoiser matters: gradients of a number made of its prediction, with respect to the input.

All of it is exact as far as the network is: loaded in bfloat16, it gives gradients of that precision. Parameters are
left alone; they should not require gradients (those of loaded models do not), whose graph would only cost memory.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.samplers import Denoise, Prediction
from uldm_cli.errors import UsageError

Method = Literal["gradient", "smoothgrad", "integrated"]
Scalar = Callable[[Prediction], Tensor]
"""What is explained: from the prediction for N samples one number each, `[N]`."""


def saliency(
    denoise: Denoise | Sequence[Denoise],
    x_in: Tensor,
    t: int,
    scalar: Scalar,
    *,
    method: Method = "gradient",
    samples: int = 1,
    sigma: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """How much each position of the input matters: absolute `attributions`, summed over the channels.

    Args: as in `attributions`.

    Returns:
        `[N, h, w]`, at least 0, on the device of the input and in its dtype.
    """
    found = attributions(denoise, x_in, t, scalar, method=method, samples=samples, sigma=sigma, seed=seed)
    return found.abs().sum(1)


def attributions(
    denoise: Denoise | Sequence[Denoise],
    x_in: Tensor,
    t: int,
    scalar: Scalar,
    *,
    method: Method = "gradient",
    samples: int = 1,
    sigma: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """What each element of the input contributes to a scalar of the prediction.

    - `gradient`: the derivative at the input.
    - `smoothgrad`: its mean over noised copies of the input (Smilkov et al. 2017).
    - `integrated`: the input times the mean derivative on the way from zero to it (Sundararajan et al. 2017). A
      sample's contributions add up to its scalar minus that of zero, the more exactly the more points there are. Zero
      is the mean of latents and of noise alike, and so says nothing of either; a baseline of noise would be one more
      picture, whose own structure would show.

    Samples and their copies are computed one at a time: memory is that of one, however many there are.

    Args:
        denoise: called with `[1, C, h, w]`; or one for each sample, where they are told different things.
        x_in: `[N, C, h, w]`.
        t: the timestep.
        scalar: called with the prediction for one sample.
        method: one of the above.
        samples: copies (`smoothgrad`) or points on the way (`integrated`) a sample; no use is made of it otherwise.
        sigma: deviation of the copies' noise as a share of the sample's own deviation.
        seed: of that noise. Sample i's is its own, the same in any batch whose i-th sample it is.

    Returns:
        `[N, C, h, w]`, on the device of the input and in its dtype.
    """
    calls = denoise if isinstance(denoise, Sequence) else [denoise] * len(x_in)
    # Without inference mode: its tensors have no gradients.
    with torch.inference_mode(False):
        return torch.cat([_gradient(call, x.clone(), t, scalar) for call, x in zip(calls, x_in.split(1), strict=True)])


def _gradient(denoise: Denoise, x: Tensor, t: int, scalar: Scalar) -> Tensor:
    """The derivative at `x` `[1, C, h, w]`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(scalar(denoise(x, t)).sum(), x)
    return gradient


def x0_energy(prediction: Prediction) -> Tensor:
    """Half the sum of squares of the predicted clean signal, `[N]`."""
    return prediction.x0.square().sum((1, 2, 3)) / 2


def eps_energy(prediction: Prediction) -> Tensor:
    """Half the sum of squares of the predicted noise, `[N]`."""
    return prediction.eps.square().sum((1, 2, 3)) / 2


def box_mean(decode: Callable[[Tensor], Tensor], box: tuple[int, int, int, int], image: tuple[int, int]) -> Scalar:
    """Mean brightness, in about [-1, 1], of a part of the decoded predicted clean signal.

    Args:
        decode: with gradients, such as `decoder` gives.
        box: left, top, width and height in pixels of the image.
        image: height and width of the image.

    Raises:
        UsageError: the box is empty or not within the image.
    """
    x, y, w, h = box
    height, width = image
    if min(w, h) < 1 or min(x, y) < 0 or x + w > width or y + h > height:
        raise UsageError(
            f"the box {','.join(map(str, box))} is not a part of the image",
            f"Expected x,y,width,height within {width} x {height} pixels, at least 1 x 1",
        )
    return lambda prediction: decode(prediction.x0)[:, :, y : y + h, x : x + w].mean((1, 2, 3))


def decoder(model: LatentDiffusion) -> Callable[[Tensor], Tensor]:
    """`model.decode` with gradients, and never in tiles.

    Where codes take the latents' place, the gradient passes them by: it is that of the decoder at the codes.
    """
    dtype = next(model.autoencoder.parameters()).dtype
    return lambda z: model.autoencoder.from_latent((z / model.scale_factor).to(dtype)).to(z.dtype)
