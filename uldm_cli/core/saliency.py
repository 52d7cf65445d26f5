"""Where the input of a denoiser matters: gradients of a number made of its prediction, with respect to the input.

All of it is exact as far as the network is: loaded in bfloat16, it gives gradients of that precision. Parameters are
left alone; they should not require gradients (those of loaded models do not), whose graph would only cost memory.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from uldm_cli.core import rng
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.samplers import Denoise, Prediction
from uldm_cli.errors import UsageError

Method = Literal["gradient", "smoothgrad", "integrated"]
Scalar = Callable[[Prediction], Tensor]
"""What is explained: from the prediction for N samples one number each, `[N]`."""
SMALL = 4096
"""Elements of the inputs whose gradients are computed together, by default."""
_STREAM = 0
"""Of random numbers, for the copies' noise."""


def saliency(
    denoise: Denoise | Sequence[Denoise],
    x_in: Tensor,
    t: int,
    scalar: Scalar,
    *,
    method: Method = "gradient",
    samples: int = 1,
    sigma: float = 0.1,
    seed: int | Sequence[int] = 0,
    at_once: int | None = None,
) -> Tensor:
    """How much each position of the input matters: absolute `attributions`, summed over the channels.

    Args: as in `attributions`.

    Returns:
        `[N, h, w]`, at least 0, on the device of the input and in its dtype.
    """
    found = attributions(
        denoise, x_in, t, scalar, method=method, samples=samples, sigma=sigma, seed=seed, at_once=at_once
    )
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
    seed: int | Sequence[int] = 0,
    at_once: int | None = None,
) -> Tensor:
    """What each element of the input contributes to a scalar of the prediction.

    - `gradient`: the derivative at the input.
    - `smoothgrad`: its mean over noised copies of the input (Smilkov et al. 2017).
    - `integrated`: the input times the mean derivative on the way from zero to it (Sundararajan et al. 2017), by
      Gauss-Legendre quadrature. A sample's contributions add up to its scalar minus that of zero, the more exactly the
      more points there are. Zero is the mean of latents and of noise alike, and so says nothing of either; a baseline
      of noise would be one more picture, whose own structure would show.

    Args:
        denoise: called with up to `at_once` inputs; or one for each sample, where they are told different things.
        x_in: `[N, C, h, w]`.
        t: the timestep.
        scalar: called with the prediction for those inputs.
        method: one of the above.
        samples: copies (`smoothgrad`) or points on the way (`integrated`) a sample; no use is made of it otherwise.
        sigma: deviation of the copies' noise as a share of the sample's own deviation.
        seed: of that noise: one for each sample, or the first of as many that follow each other.
        at_once: inputs, of one sample or several, whose gradients are computed together. Memory grows with it, and
            with nothing else. By default one, or so many that they have SMALL elements together: where inputs are
            small, a few at once take half of the time. A denoiser that is told one sample's condition takes one.

    Returns:
        `[N, C, h, w]`, on the device of the input and in its dtype.

    Raises:
        UsageError: a number is not one that it can be, or the denoisers are not as many as the samples.
    """
    if at_once is None:
        at_once = 1 if isinstance(denoise, Sequence) else max(1, SMALL // x_in[0].numel())
    seeds = range(seed, seed + len(x_in)) if isinstance(seed, int) else seed
    _check(samples, at_once, sigma, seeds=(len(seeds), len(x_in)))
    # Inside: gradients, which inference mode does not have.
    with torch.inference_mode(False), torch.enable_grad():
        x = x_in.detach().clone()
        inputs, weights = _inputs(x, method, samples, sigma, seeds)
        if isinstance(denoise, Sequence):
            if len(denoise) != len(x):
                raise UsageError(f"there are {len(denoise)} denoisers for {len(x)} samples", "Give one for each")
            parts = [_gradients(one, own, t, scalar, at_once) for one, own in zip(denoise, inputs, strict=True)]
            gradients = torch.stack(parts)
        else:
            gradients = _gradients(denoise, inputs.flatten(0, 1), t, scalar, at_once).view_as(inputs)
        mean = torch.einsum("nschw,s->nchw", gradients, weights)
    return mean * x if method == "integrated" else mean


def _check(samples: int, at_once: int, sigma: float, seeds: tuple[int, int]) -> None:
    if samples < 1 or at_once < 1 or sigma < 0:
        expected = "samples and at_once must be at least 1, sigma at least 0"
        raise UsageError(f"saliency with samples {samples}, at_once {at_once}, sigma {sigma}", expected)
    if seeds[0] != seeds[1]:
        raise UsageError(f"there are {seeds[0]} seeds for {seeds[1]} samples", "Give one for each")


def _inputs(x: Tensor, method: Method, samples: int, sigma: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where gradients are taken, `[N, samples, C, h, w]`, and what each counts, `[samples]`."""
    if method == "gradient":
        return x[:, None], x.new_ones(1)
    if method == "integrated":
        points, weights = (torch.from_numpy(values).to(x) / 2 for values in leggauss(samples))
        return x[:, None] * (points + 0.5).view(-1, 1, 1, 1), weights
    copies = torch.arange(samples)
    noise = torch.stack([rng.normal(seed, _STREAM, copies, x.shape[1:]) for seed in seeds]).to(x)
    deviation = sigma * x.flatten(1).std(1, correction=0).view(-1, 1, 1, 1, 1)
    return x[:, None] + deviation * noise, x.new_full((samples,), 1 / samples)


def _gradients(denoise: Denoise, inputs: Tensor, t: int, scalar: Scalar, at_once: int) -> Tensor:
    """The derivative at each of the inputs `[M, C, h, w]`, as many."""
    found = []
    for x in inputs.split(at_once):
        x = x.detach().requires_grad_()
        # The sum's derivative with respect to a sample is that of the sample's own scalar.
        found += torch.autograd.grad(scalar(denoise(x, t)).sum(), x)
    return torch.cat(found)


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

    Where codes take the latents' place, the gradient passes them by: it is that of the decoder at the codes. For an
    image of 256 x 256 pixels, a published decoder keeps about 2 GB until the gradient is taken.
    """
    dtype = next(model.autoencoder.parameters()).dtype
    return lambda z: model.autoencoder.from_latent((z / model.scale_factor).to(dtype)).to(z.dtype)
