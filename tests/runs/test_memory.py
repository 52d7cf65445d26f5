"""Memory that trainings need: estimated, told, and held against what there is."""

from dataclasses import replace

import psutil
import pytest
import torch

from uldm_cli.core.memory import kept_for_backward, most_alive, shapes_only
from uldm_cli.errors import ConfigError
from uldm_cli.runs import memory, vqvae_train
from uldm_cli.runs.ldm_train import plan as plan_ldm
from uldm_cli.runs.memory import autoencoder_memory, diffusion_memory, in_gb


def test_what_backward_keeps_by_hand():
    """A product keeps both its factors, and a square root its result; a parameter is counted elsewhere."""
    with shapes_only(torch.float32):
        a, b = (torch.empty(10, 100, requires_grad=True) for _ in range(2))
        weight = torch.nn.Parameter(torch.empty(100))
        assert kept_for_backward(lambda: a * b) == 2 * 4000
        assert kept_for_backward(lambda: (a * a).sqrt()) == 2 * 4000
        assert kept_for_backward(lambda: a * weight) == 4000


def test_the_most_that_is_alive_at_once_by_hand():
    """Two of three maps: the first is let go before the last is made. A view is no second one."""
    with shapes_only(torch.float32):
        a = torch.empty(10, 100)

        def run():
            b = a * 2
            b = (b + 1).view(100, 10)
            return b * 3

        assert most_alive(run) == 2 * 4000


def test_encoding_images_needs_memory_and_cached_latents_do_not(ldm, photos, tmp_path):
    """Of an autoencoder whose maps are large, beside a network of small ones."""
    spec = ldm(batch_size=32)
    data = {"kind": "images", "root": str(photos), "size": 256}
    plan = plan_ldm(type(spec).model_validate(spec.model_dump() | {"data": data}), tmp_path / "run", None)
    one_map = 32 * 8 * 256 * 256 * 4
    assert 2 * one_map < diffusion_memory(plan).activations
    cached = replace(plan, config=plan.config.model_copy(update={"latents": "cache"}))
    assert diffusion_memory(cached).activations < diffusion_memory(plan).activations


def test_the_estimate_is_what_a_forward_pass_takes(vqvae, tmp_path):
    """Of a forward pass without a loss within a third of the tensors that autograd really keeps."""
    plan = vqvae_train.plan(vqvae(batch_size=32), tmp_path / "run", None)
    estimated = autoencoder_memory(plan).activations
    module = plan.config.autoencoder.build()
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(torch.rand(32, 3, 16, 16))  # held: else its storages could get a second one's address
    assert estimated == pytest.approx(sum(kept.values()), rel=0.33)
    assert result[0].shape == (32, 3, 16, 16)


def test_parts_of_the_estimate(vqvae, ldm, tmp_path):
    spec = vqvae(batch_size=8)
    one = autoencoder_memory(vqvae_train.plan(spec, tmp_path / "a", None))
    count = sum(p.numel() for p in spec.autoencoder.build().parameters())
    assert (one.weights, one.training) == (2 * 4 * count, 3 * 4 * count)  # raw and averaged; gradient, two moments
    assert one.total == one.weights + one.training + one.activations
    twice = autoencoder_memory(vqvae_train.plan(vqvae(batch_size=16), tmp_path / "b", None))
    assert twice.fixed == one.fixed
    assert twice.activations == pytest.approx(2 * one.activations, rel=0.1)
    halved = autoencoder_memory(vqvae_train.plan(vqvae(batch_size=16, accumulate=2), tmp_path / "c", None))
    assert halved.activations == one.activations
    assert autoencoder_memory(vqvae_train.plan(vqvae(precision="fp64"), tmp_path / "d", None)).fixed == 2 * one.fixed
    profiles = autoencoder_memory(vqvae_train.plan(vqvae(ema_profiles=(0.05, 0.1)), tmp_path / "e", None))
    assert profiles.weights == 4 * 4 * count
    assert diffusion_memory(plan_ldm(ldm(), tmp_path / "f", None)).activations > 0


def test_a_network_that_cannot_fit_is_refused_before_it_is_made(training, vqvae, tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100_000}))
    with pytest.raises(ConfigError, match=r"moments need 0\.\d+ GB of memory, and 0\.0001 GB are free") as caught:
        training.run(vqvae(), tmp_path / "run")
    assert caught.value.hint == "Take a smaller network"
    assert not (tmp_path / "run").exists()


def test_a_batch_that_may_not_fit_is_told(training, vqvae, tmp_path, monkeypatch, capsys):
    need = autoencoder_memory(vqvae_train.plan(vqvae(), tmp_path / "run", None))
    free = (need.fixed + need.total) // 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    monkeypatch.setattr(memory, "_MOST", 10**9)
    training.run(vqvae(steps=1), tmp_path / "run")
    assert f"warning: this training needs about {in_gb(need.total)} of memory" in capsys.readouterr().err
