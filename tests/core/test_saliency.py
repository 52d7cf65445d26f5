"""Gradients of a prediction with respect to its input: exact, on the right positions, repeatable."""

from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.autoencoders import KL, VQ, Shape
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.quantizers import NearestQuantizer
from uldm_cli.core.saliency import Scalar, attributions, box_mean, decoder, eps_energy, saliency, x0_energy
from uldm_cli.core.samplers import Prediction
from uldm_cli.core.schedules import VariancePreserving, scaled_linear_betas
from uldm_cli.core.unet import UNet, UNetConfig
from uldm_cli.errors import UsageError

SHAPE = Shape(
    in_channels=3,
    out_ch=3,
    resolution=8,
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    attn_resolutions=(),
    attention=True,
    dropout=0.0,
    z_channels=3,
    embed_dim=3,
)
BACKBONE = UNetConfig(
    in_channels=3,
    out_channels=3,
    model_channels=64,  # two to a group: one alone has no deviation where the input is zero
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    num_head_channels=None,
    dropout=0.0,
    use_scale_shift_norm=False,
    resblock_updown=False,
)
METHODS = ["gradient", "smoothgrad", "integrated"]
every_method = pytest.mark.parametrize("method", METHODS)
BOX = (1, 3, 5, 4)
T = 30


def model(autoencoder: nn.Module | None = None) -> LatentDiffusion:
    """Small, in float64, and with no weight zero: an untrained U-Net's last layers are."""
    torch.manual_seed(0)
    backbone = UNet(BACKBONE)
    autoencoder = KL(SHAPE) if autoencoder is None else autoencoder
    generator = torch.Generator().manual_seed(0)
    for parameter in chain(backbone.parameters(), autoencoder.parameters()):
        parameter.data += (0.05 if parameter.ndim > 1 else 0.3) * torch.randn(parameter.shape, generator=generator)
    denoiser = Denoiser(backbone, VariancePreserving(scaled_linear_betas(100, 0.0015, 0.0195)), "eps")
    whole = LatentDiffusion(autoencoder, denoiser, 0.5, (3, 4, 4), (3, 8, 8))
    return whole.double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> LatentDiffusion:
    return model()


def inputs(count: int = 2, size: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scalar(name: str, small: LatentDiffusion) -> Scalar:
    return {"x0": x0_energy, "eps": eps_energy, "box": box_mean(decoder(small), BOX, (8, 8))}[name]


@torch.no_grad()
def finite_differences(small: LatentDiffusion, x: Tensor, of: Scalar, step: float = 1e-4) -> Tensor:
    """The derivative with respect to each element of one input, by two calls each."""
    moved = step * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    ahead, behind = (torch.cat([of(small(part, T)) for part in (x + s * moved).split(64)]) for s in (1, -1))
    return ((ahead - behind) / (2 * step)).view_as(x)


@pytest.mark.parametrize("target", ["x0", "eps", "box"])
def test_gradients_are_the_finite_differences(target: str, small: LatentDiffusion) -> None:
    of = scalar(target, small)
    x = inputs(1)
    expected = finite_differences(small, x[0], of)[None]
    largest = expected.abs().max().item()
    assert largest > 0
    torch.testing.assert_close(attributions(small, x, T, of), expected, rtol=1e-4, atol=1e-4 * largest)
    mapped = saliency(small, x, T, of)
    torch.testing.assert_close(mapped, expected.abs().sum(1), rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("target", ["x0", "eps", "box"])
def test_integrated_gradients_add_up_to_the_difference(target: str, small: LatentDiffusion) -> None:
    """The axiom of completeness; the baseline is zero."""
    of, x = scalar(target, small), inputs(1)
    with torch.no_grad():
        expected = of(small(x, T)) - of(small(torch.zeros_like(x), T))
    parts = attributions(small, x, T, of, method="integrated", samples=192, at_once=32)
    torch.testing.assert_close(parts.sum((1, 2, 3)), expected, rtol=1e-4, atol=1e-5)


def test_smoothgrad_is_the_mean_gradient_near_the_input() -> None:
    """Where the gradient is the input itself, it is off by the noise's mean."""
    x = 3 * inputs(size=8) + 1
    many = attributions(identity, x, T, x0_energy, method="smoothgrad", samples=400, sigma=0.5, at_once=100)
    error = (many - x).flatten(1)
    torch.testing.assert_close(error.std(1), 0.5 * x.flatten(1).std(1) / 20, rtol=0.15, atol=0)
    exact = attributions(identity, x, T, x0_energy, method="smoothgrad", samples=3, sigma=0.0)
    torch.testing.assert_close(exact, x)


def identity(x: Tensor, t: int) -> Prediction:
    return Prediction(x, x)


def corner(x: Tensor, t: int) -> Prediction:
    """Looks at nothing but three rows of two positions, at the top right."""
    seen = torch.zeros_like(x)
    seen[:, :, :3, -2:] = torch.tanh(x[:, :, :3, -2:]) + 2
    return Prediction(seen.sum((1, 2, 3), keepdim=True).expand_as(x), x)


@every_method
def test_a_model_that_depends_on_a_corner_lights_that_corner(method) -> None:
    found = saliency(corner, inputs(size=8), T, x0_energy, method=method, samples=3)
    assert found.shape == (2, 8, 8)
    assert (found[:, :3, -2:] > 0).all()
    found[:, :3, -2:] = 0
    assert not found.any()


def test_a_box_of_the_image_lights_its_latents() -> None:
    """Of a decoder whose pixels come of the latent below them."""

    def decode(z: Tensor) -> Tensor:
        return nn.functional.interpolate(z, scale_factor=2, mode="nearest")

    found = saliency(identity, inputs(1, size=8), T, box_mean(decode, (8, 2, 4, 6), (16, 16)))
    expected = torch.zeros(1, 8, 8, dtype=torch.float64)
    expected[:, 1:4, 4:6] = 4 / (4 * 6)
    torch.testing.assert_close(found, expected)


@every_method
def test_what_depends_on_nothing_is_zero_everywhere(method) -> None:
    def constant(x: Tensor, t: int) -> Prediction:
        return Prediction(0 * x + 1, 0 * x)

    flat = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), inputs(1, size=8)[0].float()])
    found = saliency(constant, flat, T, x0_energy, method=method, samples=2)
    assert found.shape == (3, 8, 8)
    assert not found.any()


def test_noise_is_that_of_the_seed(small: LatentDiffusion) -> None:
    def maps(seed: int | list[int], count: int = 2) -> Tensor:
        return saliency(small, inputs(2)[:count], T, x0_energy, method="smoothgrad", samples=3, seed=seed)

    assert torch.equal(maps(7), maps(7))
    torch.testing.assert_close(maps(7, count=1), maps(7)[:1])
    torch.testing.assert_close(maps([7, 8]), maps(7))
    assert not torch.isclose(maps([7, 7]), maps(7))[1].all()
    assert not torch.isclose(maps(7), maps(9)).all()


@every_method
def test_no_more_inputs_at_once_than_allowed(method, small: LatentDiffusion) -> None:
    calls = []

    def counted(x: Tensor, t: int) -> Prediction:
        calls.append(len(x))
        return small(x, t)

    one = saliency(counted, inputs(), T, eps_energy, method=method, samples=5, at_once=1)
    inputs_a_sample = 1 if method == "gradient" else 5
    assert calls == [1] * (2 * inputs_a_sample)
    calls.clear()
    several = saliency(counted, inputs(), T, eps_energy, method=method, samples=5, at_once=4)
    assert calls == {1: [2], 5: [4, 4, 2]}[inputs_a_sample]
    torch.testing.assert_close(several, one)


def test_small_inputs_are_computed_together() -> None:
    calls = []

    def counted(x: Tensor, t: int) -> Prediction:
        calls.append(len(x))
        return identity(x, t)

    for size, together in ((4, 10), (32, 1), (16, 5)):
        calls.clear()
        saliency(counted, inputs(1, size), T, x0_energy, method="smoothgrad", samples=10)
        assert calls == [together] * (10 // together)


@every_method
def test_each_sample_can_have_a_denoiser_of_its_own(method, small: LatentDiffusion) -> None:
    def louder(x: Tensor, t: int) -> Prediction:
        return Prediction(*(3 * part for part in small(x, t)))

    both = saliency([small, louder], inputs(), T, x0_energy, method=method, samples=2)
    alone = saliency(small, inputs(), T, x0_energy, method=method, samples=2)
    torch.testing.assert_close(both, alone * torch.tensor([1.0, 9.0], dtype=torch.float64).view(2, 1, 1))


def test_parameters_are_left_alone(small: LatentDiffusion) -> None:
    learning = model().requires_grad_()
    found = saliency(learning, inputs(), T, x0_energy)
    assert all(parameter.grad is None for parameter in learning.parameters())
    torch.testing.assert_close(found, saliency(small, inputs(), T, x0_energy))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_where_they_are_switched_off(mode, small: LatentDiffusion) -> None:
    with mode():
        found = saliency(small, inputs() + 0, T, x0_energy)
        assert not torch.is_grad_enabled()
    assert not found.requires_grad
    assert torch.equal(found, saliency(small, inputs(), T, x0_energy))


def test_float32_stays_float32(small: LatentDiffusion) -> None:
    found = saliency(model().float(), inputs().float(), T, x0_energy)
    assert found.dtype == torch.float32
    exact = saliency(small, inputs(), T, x0_energy)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3 * exact.max().item())


def test_the_differentiable_decoder_decodes(small: LatentDiffusion) -> None:
    z = inputs()
    torch.testing.assert_close(decoder(small)(z).float(), small.decode(z))


def test_gradients_pass_the_codes_by() -> None:
    """A decoded latent has the gradient of the code in its place."""
    quantizer = NearestQuantizer(16, 3)
    quantizer.embedding.data *= 40
    vq = model(VQ(SHAPE, quantizer))
    z = inputs(1).requires_grad_()
    codes = vq.autoencoder.quantize(z.detach() / vq.scale_factor).z.requires_grad_()
    of = box_mean(lambda latents: latents, BOX, (8, 8))
    (found,) = torch.autograd.grad(of(Prediction(decoder(vq)(z), z)).sum(), z)
    (expected,) = torch.autograd.grad(of(Prediction(vq.autoencoder.decode(codes), z)).sum(), codes)
    assert found.any()
    torch.testing.assert_close(found, expected / vq.scale_factor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("box", [(0, 0, 17, 1), (10, 3, 7, 2), (0, 15, 2, 2), (-1, 0, 2, 2), (3, 3, 0, 1)])
def test_boxes_that_are_not_within_the_image(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UsageError, match=r"the box .* is not a part of the image.*within 16 x 12 pixels"):
        box_mean(lambda z: z, box, (12, 16))


@pytest.mark.parametrize("amiss", [{"samples": 0}, {"sigma": -0.1}, {"at_once": 0}])
def test_numbers_that_cannot_be(amiss: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        saliency(identity, inputs(), T, x0_energy, **amiss)


def test_as_many_denoisers_and_seeds_as_samples() -> None:
    with pytest.raises(UsageError, match="1 denoisers for 2 samples"):
        saliency([identity], inputs(), T, x0_energy)
    with pytest.raises(UsageError, match="3 seeds for 2 samples"):
        saliency(identity, inputs(), T, x0_energy, seed=[1, 2, 3])
