"""Latents in files: what identifies an autoencoder, their deviation, and the set that training reads them from."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from uldm_cli.core import rng
from uldm_cli.core.data import Draws, stream
from uldm_cli.core.data.latents import LatentSet, deviation_of, digest_of, fingerprint, latents_of, sums_of
from uldm_cli.specs.autoencoders import KL, VQVAE

SMALL_KL = KL(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=16)
SMALL_VQ = VQVAE(down_channels=(8, 8), mid_channels=(8, 8), down_sample=(True,), attn_down=(False,), norm_channels=4)
ROWS, LAST = 6, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# What identifies an autoencoder


def test_a_fingerprint_is_of_config_and_weights_and_of_nothing_else():
    torch.manual_seed(0)
    module = SMALL_VQ.build()
    same = SMALL_VQ.build()
    assert fingerprint("a", same) != fingerprint("a", module)
    same.load_state_dict(module.state_dict())
    assert fingerprint("a", same) == fingerprint("a", module)
    assert fingerprint("b", same) != fingerprint("a", module)
    same.to(memory_format=torch.channels_last).double()
    assert fingerprint("a", same) == fingerprint("a", module)


def test_a_fingerprint_changes_with_the_last_bit_of_any_tensor():
    module = SMALL_VQ.build()
    before = fingerprint("", module)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            kept = tensor.flatten()[-1].clone()
            tensor.view(-1)[-1] = torch.nextafter(kept, torch.tensor(torch.inf))
            assert fingerprint("", module) != before
            tensor.view(-1)[-1] = kept
    assert fingerprint("", module) == before


def test_a_digest_is_of_the_bytes_in_the_order_of_the_names():
    import hashlib

    tensors = {"b": torch.tensor([1, 2]), "a": torch.tensor([0.5], dtype=torch.float16)}
    expected = hashlib.sha256(b"\x00\x38" + b"\x01" + b"\x00" * 7 + b"\x02" + b"\x00" * 7).hexdigest()
    assert digest_of(tensors) == expected


# What is kept of images


def test_of_a_posterior_mean_and_log_variance_are_kept():
    module, images = SMALL_KL.build().eval(), normal(2, 3, 16, 16)
    found = latents_of(module, images)
    noise = normal(2, 4, 8, 8, seed=1)
    assert found.keys() == {"mean", "logvar"}
    drawn = found["mean"] + (0.5 * found["logvar"]).exp() * noise
    torch.testing.assert_close(drawn, module.to_latent(images, noise).detach(), rtol=0, atol=1e-5)


def test_of_a_codebook_the_latents_before_quantizing_are_kept():
    module, images = SMALL_VQ.build().eval(), normal(2, 3, 16, 16)
    found = latents_of(module, images)
    assert found.keys() == {"z"}
    torch.testing.assert_close(found["z"], module.to_latent(images).detach(), rtol=0, atol=1e-5)
    assert not found["z"].requires_grad


# Their deviation


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(-50, 50), st.booleans())
def test_the_deviation_of_parts_is_that_of_the_whole(counts, offset, flip):
    parts = []
    for seed, count in enumerate(counts):
        part = {"z": normal(count, 2, 3, 3, seed=seed) + offset, "label": torch.zeros(count, dtype=torch.int64)}
        parts.append(part | ({"z_flipped": normal(count, 2, 3, 3, seed=seed + 99)} if flip else {}))
    numbers = torch.cat([part[name].double().flatten() for part in parts for name in part if name != "label"])
    assert deviation_of([sums_of(part) for part in parts]) == pytest.approx(float(numbers.std(correction=0)), rel=1e-6)


def test_the_deviation_of_posteriors_is_that_of_what_is_drawn_from_them():
    mean, logvar = 0.5 * normal(200, 4, 4, 4) + 0.3, normal(200, 4, 4, 4, seed=1) - 1
    drawn = torch.stack([mean + (0.5 * logvar).exp() * normal(*mean.shape, seed=2 + i) for i in range(100)])
    found = deviation_of([sums_of({"mean": mean, "logvar": logvar})])
    assert found == pytest.approx(float(drawn.double().std()), rel=2e-3)
    assert found > 1.1 * deviation_of([sums_of({"z": mean})])


def test_the_deviation_of_equal_latents_is_zero():
    assert deviation_of([sums_of({"z": torch.full((3, 2, 2, 2), 0.1)})]) == pytest.approx(0, abs=1e-6)


# The set


def files_of(folder: Path, parts: tuple[str, ...], *, flip: bool, dtype=torch.float32) -> tuple[list[Path], dict]:
    """Files of ROWS, ROWS and LAST latents, and all of them in one."""
    names = [*parts, *(f"{part}_flipped" for part in parts if flip)]
    total = 2 * ROWS + LAST
    whole = {name: normal(total, 2, 4, 4, seed=i).to(dtype) for i, name in enumerate(names)}
    whole["label"] = torch.arange(total) % 3 - 1
    files = []
    for number, first in enumerate(range(0, total, ROWS)):
        files.append(folder / f"{number}.safetensors")
        save_file({name: value[first : first + ROWS].contiguous() for name, value in whole.items()}, files[-1])
    return files, whole


def opened(files, parts, flip=False):
    return LatentSet(files, parts, flip=flip, classes=("x", "y"), channels=3, size=16)


def test_latents_are_found_by_their_index_across_files(tmp_path):
    files, whole = files_of(tmp_path, ("z",), flip=False)
    latents = opened(files, ("z",))
    assert (len(latents), latents.classes, latents.channels, latents.size) == (15, ("x", "y"), 3, 16)
    indices = torch.tensor([14, 0, 5, 6, 11, 12, 5])
    values, labels = latents.gather(indices)
    assert torch.equal(values, whole["z"][indices])
    assert torch.equal(labels, whole["label"][indices])
    assert torch.equal(latents[13][0], whole["z"][13])
    assert latents[13][1] == int(whole["label"][13])


def test_float16_is_lifted_to_float32(tmp_path):
    files, whole = files_of(tmp_path, ("z",), flip=False, dtype=torch.float16)
    values, _ = opened(files, ("z",)).gather(torch.tensor([7]))
    assert values.dtype == torch.float32
    assert torch.equal(values, whole["z"][7:8].float())


@pytest.mark.parametrize("parts", [("z",), ("mean", "logvar")])
def test_samples_that_training_mirrors_get_the_mirrored_images_latents(parts, tmp_path):
    files, whole = files_of(tmp_path, parts, flip=True)
    numbers, indices = torch.arange(100, 130), torch.arange(30) % 15
    mirrored = rng.coin(3, rng.STREAM_FLIP, numbers)
    assert 5 < int(mirrored.sum()) < 25
    plain, flipped = (torch.cat([whole[part + end] for part in parts], 1)[indices] for end in ("", "_flipped"))
    values, _ = opened(files, parts, flip=True).gather(indices, Draws(3, numbers))
    assert torch.equal(values, torch.where(mirrored[:, None, None, None], flipped, plain))
    assert torch.equal(opened(files, parts, flip=True).gather(indices)[0], plain)
    assert torch.equal(opened(files, parts).gather(indices, Draws(3, numbers))[0], plain)


def test_a_stream_shuffles_latents_as_it_does_images(tmp_path):
    files, whole = files_of(tmp_path, ("z",), flip=False)
    seen = [next(stream(opened(files, ("z",)), batch_size=15, seed=s)).image for s in (0, 1)]
    assert not torch.equal(seen[0], seen[1])
    for batch in seen:
        assert torch.equal(batch.sum((1, 2, 3)).sort().values, whole["z"].sum((1, 2, 3)).sort().values)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is told by Linux alone")
def test_files_are_mapped_and_closed(tmp_path):
    files, _ = files_of(tmp_path, ("z",), flip=False)
    latents = opened(files, ("z",))
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(file) in mapped for file in files)
    handles = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [handle for handle in handles if handle in map(str, files)]
    assert len(latents) == 15
