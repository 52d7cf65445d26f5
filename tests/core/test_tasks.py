"""Losses of autoencoders, by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from uldm_cli import assets
from uldm_cli.core.autoencoding import AutoencoderTask, ReconstructionWeights
from uldm_cli.core.lpips import LPIPS
from uldm_cli.formats.native import load_tensors
from uldm_cli.specs.autoencoders import VQVAE

WEIGHTS = ReconstructionWeights(l1=2.0, l2=3.0, lpips=0.0, codebook=5.0, commitment=7.0)


def images(count: int = 8, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Darker(nn.Module):
    """An autoencoder whose every pixel is a quarter too dark, with known quantizer losses."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(-0.25))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return x + self.offset, x, {"codebook_loss": torch.tensor(0.5), "commitment_loss": torch.tensor(0.125)}


def test_autoencoder_loss_by_hand() -> None:
    task = AutoencoderTask(Darker(), WEIGHTS, None)
    loss, logs = task("autoencoder", images(), torch.arange(8))
    expected = {"l1": 0.25, "l2": 0.0625, "codebook": 0.5, "commitment": 0.125}
    expected["loss"] = 2 * 0.25 + 3 * 0.0625 + 5 * 0.5 + 7 * 0.125
    expected["psnr"] = 20 * math.log10(2 / 0.25)  # the range is 2
    assert {name: value.item() for name, value in logs.items()} == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected["loss"])
    assert not any(value.requires_grad for value in logs.values())
    loss.backward()
    assert task.model.offset.grad.item() == pytest.approx(-2 - 3 * 2 * 0.25)


def test_perceptual_loss_is_added() -> None:
    lpips = LPIPS(load_tensors(assets.path("lpips-alex.safetensors")), "alex", checked=False)
    weights = ReconstructionWeights(l1=0, l2=0, lpips=4.0, codebook=0, commitment=0)
    x = images(2, 32)
    task = AutoencoderTask(Darker(), weights, lpips)
    loss, logs = task("autoencoder", x, torch.arange(2))
    expected = lpips(x - 0.25, x).mean()
    assert expected > 0.001
    torch.testing.assert_close(logs["lpips"], expected.detach())
    torch.testing.assert_close(loss, 4 * expected)
    assert [p is task.model.offset for p in task.trained("autoencoder")] == [True]


def vqvae(quantizer: str) -> nn.Module:
    torch.manual_seed(0)
    fields = {"down_channels": (8, 8, 8), "mid_channels": (8, 8), "norm_channels": 4, "codebook_size": 16}
    return VQVAE.model_validate({**fields, "num_heads": 1, "quantizer": quantizer}).build()


@pytest.mark.parametrize(("quantizer", "learned"), [("ema", False), ("nearest", True)])
def test_trained_parameters_leave_out_a_codebook_that_follows_averages(quantizer: str, learned: bool) -> None:
    model = vqvae(quantizer)
    trained = AutoencoderTask(model, WEIGHTS, None).trained("autoencoder")
    assert any(p is model.quantize.embedding for p in trained) == learned
    assert len(trained) == len(list(model.parameters())) - (not learned)


def test_codebook_figures_are_of_the_epoch_and_steps_reach_the_codebook() -> None:
    model = vqvae("ema")
    task = AutoencoderTask(model, WEIGHTS, None).train()
    for _ in range(2):
        task("autoencoder", images(), torch.arange(8))
        codes = model.quantize.codes.clone()
        task.after_step(1)
        assert not torch.equal(model.quantize.codes, codes)
    counts = model.quantize.epoch_counts
    assert counts.sum() == 2 * 8 * 2 * 2
    shares = [count / 64 for count in counts.tolist() if count]
    logs = task.codebook_logs()
    assert logs["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert logs["usage"] == len(shares) / 16
    task.start_epoch()
    assert task.codebook_logs() == {"entropy": 0.0, "perplexity": 1.0, "usage": 0.0}
