"""Training an autoencoder: the published losses, and what a discriminator, a learned variance and freezing change."""

import copy
import math
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from uldm_cli import assets
from uldm_cli.core import rng
from uldm_cli.core.autoencoding import AutoencoderTask, ReconstructionWeights
from uldm_cli.core.discriminator import PatchGAN
from uldm_cli.core.losses import Adversarial
from uldm_cli.core.lpips import LPIPS
from uldm_cli.errors import UldmError, UsageError
from uldm_cli.formats.native import load_tensors
from uldm_cli.specs.autoencoders import KL, VQ, VQVAE

NUMBER = torch.arange(100, 104)
SMALL = {"in_channels": 3, "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "resolution": 32, "z_channels": 2}
LEGACY = {"kind": "nearest", "legacy": True}


def images(size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def autoencoder(kind: str, quantizer: object = "nearest") -> nn.Module:
    torch.manual_seed(0)
    if kind == "kl":
        return KL.model_validate(SMALL).build()
    if kind == "vq":
        return VQ.model_validate({**SMALL, "codebook_size": 16, "quantizer": quantizer}).build()
    fields = {"down_channels": (8, 8), "mid_channels": (8, 8), "norm_channels": 4, "codebook_size": 16}
    levels = {"down_sample": (True,), "attn_down": (False,), "num_heads": 1, "num_down_layers": 1, "num_up_layers": 1}
    return VQVAE.model_validate({**fields, **levels, "quantizer": quantizer}).build()


def against(**changes: object) -> Adversarial:
    torch.manual_seed(1)
    discriminator = PatchGAN(3, (8, 8), (4,) * 3, (2, 2, 1), (1,) * 3)
    settings = {"weight": 0.8, "start": 0, "warmup_steps": 0, "loss": "hinge", "adaptive": True}
    return Adversarial(discriminator, **settings | changes)


def weights(**changes: float) -> ReconstructionWeights:
    return ReconstructionWeights(**{"l1": 1.0, "l2": 0.0, "lpips": 0.0, "codebook": 1.0, "commitment": 1.0} | changes)


def task_of(kind: str, quantizer: object = "nearest", **given: object) -> AutoencoderTask:
    fields = {"weights": weights(), "lpips": None, "seed": 7, "adversarial": against()}
    return AutoencoderTask(autoencoder(kind, quantizer), **fields | given).train()


def numbers(logs: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in logs.items()}


# The published losses


def published_adaptive(nll: Tensor, g: Tensor, last: Tensor, disc_weight: float) -> Tensor:
    """`calculate_adaptive_weight` of the published code."""
    nll_grads = torch.autograd.grad(nll, last, retain_graph=True)[0]
    g_grads = torch.autograd.grad(g, last, retain_graph=True)[0]
    return torch.clamp(torch.norm(nll_grads) / (torch.norm(g_grads) + 1e-4), 0.0, 1e4).detach() * disc_weight


def lpips64() -> LPIPS:
    return LPIPS(load_tensors(assets.path("lpips-alex.safetensors")), "alex", checked=False).double()


@pytest.mark.parametrize("disc_weight", [0.75, 1e-3])
def test_the_published_vq_loss(disc_weight) -> None:
    """VQLPIPSWithDiscriminator: mean(|x - r| + p) + d_weight g + 1.0 codebook, the codebook's beta being 0.25."""
    x = images(32).double()
    given = weights(lpips=1.0, codebook=1.0, commitment=0.25)
    adversarial = against(weight=disc_weight)
    task = task_of("vq", LEGACY, weights=given, lpips=lpips64(), adversarial=adversarial).double()
    model, discriminator = copy.deepcopy((task.model, task.discriminator))

    recon, _, losses = model(x)
    rec = (x - recon).abs() + task.lpips(x, recon)
    g = -discriminator(recon).mean()
    nll = rec.mean()
    d_weight = published_adaptive(nll, g, model.decoder.conv_out.weight, disc_weight)
    codebook = losses["codebook_loss"] + 0.25 * losses["commitment_loss"]
    expected = nll + d_weight * g + 1.0 * codebook.mean()
    expected.backward()

    assert task.begin(1) == ("autoencoder", "discriminator")
    loss, logs = task("autoencoder", x, NUMBER)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["d_weight"], d_weight)
    loss.backward()
    same_gradients(task.model, model)

    real, fake = discriminator(x), discriminator(recon.detach())
    expected = 0.5 * (torch.relu(1.0 - real).mean() + torch.relu(1.0 + fake).mean())
    loss, logs = task("discriminator", x, NUMBER)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected_gradients = torch.autograd.grad(expected, list(discriminator.parameters()))
    for ours, theirs in zip(task.discriminator.parameters(), expected_gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


@pytest.mark.parametrize("bounded", [False, True])
def test_the_published_kl_loss(bounded) -> None:
    """LPIPSWithDiscriminator: sums over pixels, a mean over images; ours is that by the number of an image's values.

    The logits of a discriminator in its first steps hardly depend on the images, so that the ratio meets its bound.
    """
    x, disc_weight = images(32).double(), 0.5
    adversarial = against(weight=disc_weight)
    if not bounded:
        with torch.no_grad():
            adversarial.discriminator.main[-1].weight.mul_(1e3)
    given = weights(lpips=1.0, kl=1e-6)
    task = task_of("kl", weights=given, lpips=lpips64(), logvar=0.3, adversarial=adversarial).double()
    model, discriminator = copy.deepcopy((task.model, task.discriminator))
    logvar = torch.tensor(0.3, dtype=torch.float64)

    mean, latent_logvar = model.moments(x)
    noise = rng.normal(7, rng.STREAM_POSTERIOR, NUMBER, mean.shape[1:]).double()
    recon = model.from_latent(mean + torch.exp(0.5 * latent_logvar) * noise)
    rec = (x - recon).abs() + task.lpips(x, recon)
    nll = rec / torch.exp(logvar) + logvar
    nll = torch.sum(nll) / nll.shape[0]
    kl = 0.5 * torch.sum(mean**2 + latent_logvar.exp() - 1.0 - latent_logvar, dim=[1, 2, 3])
    kl = torch.sum(kl) / kl.shape[0]
    g = -discriminator(recon).mean()
    d_weight = published_adaptive(nll, g, model.decoder.conv_out.weight, disc_weight)
    assert (d_weight == 1e4 * disc_weight) == bounded
    values = x[0].numel()
    expected = (nll + 1e-6 * kl + d_weight * g) / values
    expected.backward()

    task.begin(1)
    loss, logs = task("autoencoder", x, NUMBER)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["kl"], kl.detach())
    torch.testing.assert_close(logs["nll"], nll.detach() / values)
    torch.testing.assert_close(logs["d_weight"] * values, d_weight)
    loss.backward()
    same_gradients(task.model, model)
    assert task.logvar.grad.item() == pytest.approx(1 - (logs["nll"] - 0.3).item())


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=f"{name}: another gradient")


# A discriminator


@pytest.mark.parametrize("kind", ["vqvae", "kl"])
def test_before_its_start_a_discriminator_changes_nothing(kind) -> None:
    with_one, without = task_of(kind, adversarial=against(start=2)), task_of(kind, adversarial=None)
    for step in (1, 2):
        assert with_one.begin(step) == without.begin(step) == ("autoencoder",)
    logs = [numbers(task("autoencoder", images(), NUMBER)[1]) for task in (with_one, without)]
    assert logs[0] == logs[1]
    assert not {"generator", "d_weight"} & logs[0].keys()
    assert not with_one._kept
    assert with_one.begin(3) == ("autoencoder", "discriminator")


def test_the_generators_term_grows_over_the_warm_up() -> None:
    """Four steps to its full weight; without the adaptive weight the factor is the ramp times the weight."""
    task = task_of("vqvae", adversarial=against(start=2, warmup_steps=4, adaptive=False))
    for step, share in {3: 0.25, 4: 0.5, 6: 1.0, 9: 1.0}.items():
        task.begin(step)
        loss, logs = task("autoencoder", images(), NUMBER)
        known = numbers(logs)
        assert known["d_weight"] == pytest.approx(0.8 * share)
        rest = known["l1"] + known["codebook"] + known["commitment"]
        assert loss.item() == pytest.approx(rest + 0.8 * share * known["generator"])


def test_each_phase_gives_gradients_to_its_own_parameters_only_and_to_all_of_them() -> None:
    """Several processes would wait for ever for a gradient that does not come."""
    task = task_of("kl", logvar=0.0)
    everything = {id(p) for p in task.parameters()}
    assert {id(p) for phase in task.phases for p in task.trained(phase)} == everything
    task.begin(1)
    for phase in task.phases:
        task.zero_grad()
        task(phase, images(), NUMBER)[0].backward()
        moved = {id(p) for p in task.parameters() if p.grad is not None}
        assert moved == {id(p) for p in task.trained(phase)}


def test_the_discriminators_phase_takes_the_kept_reconstructions_in_their_order() -> None:
    task = task_of("vqvae")
    batches = [images(seed=seed) for seed in (0, 1)]
    task.begin(1)
    for x in batches:
        task("autoencoder", x, NUMBER)
    recons = [task.model(x)[0] for x in batches]
    task.model.forward = None  # it is not run again
    for x, recon in zip(batches, recons, strict=True):
        _, logs = task("discriminator", x, NUMBER)
        torch.testing.assert_close(logs["logits_real"], task.discriminator(x).mean())
        torch.testing.assert_close(logs["logits_fake"], task.discriminator(recon).mean())
    with pytest.raises(UldmError, match=r"has no reconstructions\. Run the autoencoder's before it"):
        task("discriminator", x, NUMBER)


def test_nothing_is_left_of_a_skipped_step() -> None:
    """Of one whose loss was NaN, say: neither its reconstructions nor its batch statistics."""
    task = task_of("vqvae")
    before = {name: value.clone() for name, value in task.discriminator.state_dict().items()}
    task.begin(1)
    task("autoencoder", images() * torch.nan, NUMBER)
    assert task.discriminator.main[3].running_mean.isnan().all()
    for name, value in task.state().items():  # a checkpoint that is saved now
        if name.startswith("discriminator."):
            assert torch.equal(value, before[name.removeprefix("discriminator.")])
    task.begin(2)
    assert not task._kept
    task("autoencoder", images(), NUMBER)
    task("discriminator", images(), NUMBER)
    task.after_step(2)
    kept = task.discriminator.main[3].running_mean.clone()
    assert not torch.equal(kept, before["main.3.running_mean"])
    task.begin(3)
    assert torch.equal(task.discriminator.main[3].running_mean, kept)


def test_looking_changes_nothing() -> None:
    task = task_of("vqvae")
    task.begin(1)
    task.eval()
    before = {name: value.clone() for name, value in task.state().items()}
    task.begin(1)
    with torch.no_grad():
        logs = task("autoencoder", images(), NUMBER)[1]
    assert logs["d_weight"].item() == pytest.approx(0.8)
    assert not task._kept
    assert all(torch.equal(value, before[name]) for name, value in task.state().items())


class Bare(nn.Module):
    """A plugin's, say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)


def test_what_an_autoencoder_must_have_is_said() -> None:
    with pytest.raises(UsageError, match=r"Bare has no decoder\.conv_out, .* Set adversarial\.adaptive=false"):
        AutoencoderTask(Bare(), weights(), None, adversarial=against())
    AutoencoderTask(Bare(), weights(), None, adversarial=against(adaptive=False))
    with pytest.raises(UsageError, match="Bare has no encoder, so its encoder cannot be frozen"):
        AutoencoderTask(Bare(), weights(), None, frozen=True)


@pytest.mark.parametrize(("kind", "loss"), [("vqvae", "hinge"), ("kl", "vanilla")])
def test_adversarial_training_learns(kind, loss) -> None:
    """Of one batch, the reconstruction error falls to less than 70 %, and the discriminator tells better than none."""
    task = task_of(kind, logvar=0.0, adversarial=against(weight=0.1, start=5, warmup_steps=5, loss=loss))
    optimizers = {phase: torch.optim.Adam(task.trained(phase), lr=4e-3, betas=(0.5, 0.9)) for phase in task.phases}
    smooth = nn.functional.interpolate(images(4), size=16, mode="bilinear")
    errors, told = [], []
    for step in range(1, 26):
        for phase in task.begin(step):
            value, logs = task(phase, smooth, NUMBER)
            optimizers[phase].zero_grad()
            value.backward()
            optimizers[phase].step()
            (told if phase == "discriminator" else errors).append(numbers(logs))
        task.after_step(step)
    assert errors[-1]["l1"] < 0.7 * errors[0]["l1"]
    assert len(told) == 20
    assert told[-1]["discriminator"] < 0.99 * {"hinge": 1.0, "vanilla": math.log(2)}[loss]
    assert told[-1]["logits_real"] > told[-1]["logits_fake"]
    assert all(math.isfinite(value) for logs in errors + told for value in logs.values())
    assert errors[-1]["logvar"] < 0  # it goes to the error's logarithm


@pytest.mark.parametrize("kind", ["vqvae", "kl"])
def test_autocast_computes_nearly_the_same(kind) -> None:
    values = []
    for low in (False, True):
        task = task_of(kind, logvar=0.0)
        task.begin(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, logs = task("autoencoder", images(), NUMBER)
            told = task("discriminator", images(), NUMBER)[1]
        assert loss.dtype == torch.float32
        loss.backward()
        values.append(numbers(logs | told))
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.1, abs=0.02)


# Latents


def test_a_kl_autoencoders_draws_are_the_samples_own() -> None:
    """Together or alone, at once or later: a sample's noise follows from the seed and its number."""
    task = task_of("kl", adversarial=None)
    x = images()
    together = task("autoencoder", x, NUMBER)[0]
    alone = [task("autoencoder", x[i : i + 1], NUMBER[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert task("autoencoder", x, NUMBER + 4)[0] != together
    assert task_of("kl", adversarial=None, seed=8)("autoencoder", x, NUMBER)[0] != together


def test_codes_are_counted_where_there_are_some() -> None:
    task = task_of("vqvae")
    task.begin(1)
    task("autoencoder", images(), NUMBER)
    task("discriminator", images(), NUMBER)
    task.after_step(1)
    assert task.model.quantize.epoch_counts.sum() == 4 * 8 * 8  # each once, though two phases saw the images
    assert task.codebook_logs()["usage"] > 0
    task.start_epoch()
    assert task.codebook_logs()["usage"] == 0
    for other in (task_of("kl"), task_of("vqvae", frozen=True)):
        other.start_epoch()
        assert other.codebook_logs() == {}


@pytest.mark.parametrize(("kind", "quantizer"), [("vqvae", "ema"), ("vqvae", "nearest"), ("kl", "")])
def test_a_frozen_encoder_keeps_every_bit_and_the_decoder_learns(kind, quantizer) -> None:
    model = autoencoder(kind, quantizer)
    if quantizer == "ema":  # a codebook that was trained
        model.quantize.initialized.fill_(True)
    task = AutoencoderTask(model, weights(kl=1.0), None, adversarial=against(), frozen=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latents = model.to_latent(images())
    optimizer = torch.optim.AdamW(task.trained("autoencoder"), lr=1e-2, weight_decay=0.1)
    for step in (1, 2):
        task.begin(step)
        loss, logs = task("autoencoder", images(), NUMBER)
        assert not {"codebook", "commitment", "kl"} & logs.keys()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(step)
    assert all(p.grad is not None for p in task.trained("autoencoder"))
    assert not model.encoder.training
    assert model.decoder.training
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert torch.equal(model.to_latent(images()), latents)


# State


@pytest.mark.parametrize("kind", ["vqvae", "kl"])
def test_the_state_is_all_that_the_model_does_not_hold(kind) -> None:
    """Another task of other start values goes on as the first does."""
    first, second = task_of(kind, logvar=0.0), task_of(kind, logvar=1.0)
    steps = count(1)

    def step(task: AutoencoderTask, number: int) -> dict[str, float]:
        task.begin(number)
        told = {}
        for phase in task.phases:
            task.zero_grad()
            loss, logs = task(phase, images(seed=number), NUMBER)
            loss.backward()
            with torch.no_grad():
                for p in task.trained(phase):
                    p -= 0.01 * p.grad
            told |= numbers(logs)
        task.after_step(number)
        return told | task.codebook_logs()

    for _ in range(2):
        step(first, next(steps))
    with torch.no_grad():
        for p in second.discriminator.parameters():
            p.zero_()
    state = {name: value.clone() for name, value in first.state().items()}
    second.model.load_state_dict(first.model.state_dict())
    second.load_state(state)
    at = next(steps)
    assert step(first, at) == step(second, at)
    assert all(torch.equal(value, second.state()[name]) for name, value in first.state().items())
    assert {"logvar", "discriminator.main.3.running_var"} <= state.keys()
    assert ("quantizer.epoch_counts" in state) == (kind == "vqvae")
