"""Latent diffusion: the scale factor, precision, and what its parts are asked."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.conditioners import ClassEmbedder, FirstStage, Rescaler
from uldm_cli.core.conditioning import Condition, Conditioning
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.schedules import VariancePreserving, linear_betas
from uldm_cli.errors import UsageError


class Autoencoder(nn.Module):
    """Latents are a quarter of the images' size, and three times their values; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        self.seen = x
        return self.factor * nn.functional.avg_pool2d(x, 2)

    def from_latent(self, z: Tensor) -> Tensor:
        self.seen = z
        return nn.functional.interpolate(z / self.factor, scale_factor=2)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


@pytest.fixture
def model() -> LatentDiffusion:
    denoiser = Denoiser(Half(), VariancePreserving(linear_betas(10, 0.01, 0.1)), "eps")
    return LatentDiffusion(Autoencoder(), denoiser, 0.25, (3, 4, 4), (3, 8, 8))


def images() -> Tensor:
    """Of two by two equal pixels, so that nothing is lost."""
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_scale_factor_multiplies_latents(model: LatentDiffusion) -> None:
    z = model.encode(images())
    torch.testing.assert_close(z, 0.75 * images()[:, :, ::2, ::2])
    torch.testing.assert_close(model.decode(z), images())
    torch.testing.assert_close(model.autoencoder.seen, 4 * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autoencoder_computes_in_its_precision_and_the_rest_in_float32(model: LatentDiffusion, dtype) -> None:
    model.autoencoder.to(dtype)
    z = model.encode(images())
    assert model.autoencoder.seen.dtype == dtype
    decoded = model.decode(z)
    assert model.autoencoder.seen.dtype == dtype
    assert z.dtype == decoded.dtype == torch.float32
    assert decoded.is_contiguous()
    torch.testing.assert_close(decoded, images(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("side", "largest"), [(768, 768), (1024, 576)])
def test_large_images_are_decoded_in_tiles(model: LatentDiffusion, side: int, largest: int) -> None:
    z = torch.linspace(-1, 1, side // 2).expand(1, 3, side // 2, side // 2)
    image = model.decode(z)
    assert model.autoencoder.seen.shape[2:] == (largest // 2, largest // 2)
    expected = F.interpolate(z / 0.75, scale_factor=2)
    torch.testing.assert_close(image, expected)


class Told(nn.Module):
    """A backbone that answers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        self.seen = {"x": x, "context": context, "y": y}
        return x[:, :3]


def conditional(conditioner: nn.Module, conditioning: Conditioning) -> LatentDiffusion:
    denoiser = Denoiser(Told(), VariancePreserving(linear_betas(10, 0.01, 0.1)), "eps")
    return LatentDiffusion(Autoencoder(), denoiser, 0.25, (3, 4, 4), (3, 8, 8), conditioner, conditioning)


def told(model: LatentDiffusion, condition: Condition) -> dict[str, Tensor | None]:
    """What the backbone is called with, beside two samples of zeros."""
    model(torch.zeros(2, 3, 4, 4), 3, condition)
    return model.denoiser.backbone.seen


def test_a_first_stage_encodes_conditions_without_the_scale_factor() -> None:
    model = conditional(FirstStage(), "concat")
    condition = model.condition(images())
    torch.testing.assert_close(condition.concat, 3 * images()[:, :, ::2, ::2])
    x = told(model, condition)["x"]
    assert x.dtype == torch.bfloat16
    assert not x[:, :3].any()
    torch.testing.assert_close(x[:, 3:], condition.concat.bfloat16())


def test_a_context_goes_to_the_backbone_in_its_precision() -> None:
    model = conditional(ClassEmbedder(5, 8).bfloat16(), "crossattn")
    condition = model.condition(torch.tensor([4, 0]))
    assert condition.context.dtype == torch.float32
    seen = told(model, condition)
    torch.testing.assert_close(seen["context"], model.conditioner.embedding.weight[[4, 0]][:, None])
    assert seen["x"].shape == (2, 3, 4, 4)
    assert seen["y"] is None


def test_a_hybrid_model_takes_both() -> None:
    model = conditional(ClassEmbedder(5, 8), "hybrid")
    condition = model.condition(torch.tensor([1, 1]), concat=torch.ones(2, 1, 4, 4))
    seen = told(model, condition)
    assert seen["x"].shape == (2, 4, 4, 4)
    assert seen["context"].shape == (2, 1, 8)


def test_a_label_stays_a_whole_number() -> None:
    model = conditional(nn.Identity(), "adm")
    assert torch.equal(told(model, model.condition(torch.tensor([7, 2])))["y"], torch.tensor([7, 2]))


def test_a_value_comes_in_the_conditioners_precision() -> None:
    model = conditional(Rescaler(1, "bilinear", 0.5, 3, 2, bias=False).bfloat16(), "concat")
    condition = model.condition(images())
    assert (condition.concat.shape, condition.concat.dtype) == ((2, 2, 4, 4), torch.float32)


def test_an_unconditional_model_takes_no_condition(model: LatentDiffusion) -> None:
    for ask in (model.condition, model.encode_condition):
        with pytest.raises(UsageError, match=r"^this model takes no condition\. It was trained without$"):
            ask(images())


def test_it_denoises_with_its_denoiser(model: LatentDiffusion) -> None:
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x, 3).eps, 0.5 * x)
    assert model.schedule is model.denoiser.schedule
