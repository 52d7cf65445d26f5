"""Latent caches on disk: what is in them, resuming, several processes, damage, and what is refused."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import save
from uldm_cli.runs import ldm_train, vqvae_encode
from uldm_cli.runs.latent_cache import identity, open_cache, read_index
from uldm_cli.runs.models import load_autoencoder, model_config, resolve
from uldm_cli.specs.encoding import Encoding
from uldm_cli.specs.models import AutoencoderModel

IMAGES = 20
QUICK = {"shard_size": 8, "batch_size": 4, "workers": 0, "device": "cpu"}


@pytest.fixture
def encoding(training, autoencoder: Path, photos: Path):
    """Makes configs of three files: `encoding(dtype="float16")`."""

    def make(root: Path = photos, *, flip: bool = True, strict: bool = False, **fields: object) -> Encoding:
        data = {"kind": "images", "root": str(root), "size": 16, "flip": flip, "strict": strict}
        return Encoding.model_validate({"autoencoder": str(autoencoder), "data": data, **QUICK, **fields})

    return make


def encode(spec: Encoding, folder: Path) -> vqvae_encode.Result:
    return vqvae_encode.run(vqvae_encode.plan(spec, folder))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tmp"}


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files, one after the other."""
    parts = [load_file(path) for path in sorted(folder.glob("latents-*"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pixels(root: Path) -> tuple[torch.Tensor, list[int]]:
    """The images in the order of their names, read by Pillow alone, and their classes."""
    paths = sorted(root.rglob("*.png"), key=lambda path: path.relative_to(root).as_posix())
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, ["ab".index(path.parent.name) for path in paths]


# What is in it


def test_row_i_is_image_i_in_both_orientations(encoding, autoencoder, photos, tmp_path):
    result = encode(encoding(), tmp_path / "z")
    images, labels = pixels(photos)
    module = load_autoencoder(resolve(str(autoencoder), "autoencoder"))
    found = everything(tmp_path / "z")
    with torch.no_grad():
        expected, mirrored = module.to_latent(images), module.to_latent(images.flip(3))
    assert found.keys() == {"z", "z_flipped", "label"}
    torch.testing.assert_close(found["z"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["z_flipped"], mirrored, rtol=0, atol=1e-5)
    assert float((expected - mirrored).abs().max()) > 0.01
    assert found["label"].tolist() == labels
    both = torch.cat([expected, mirrored]).double()
    assert result.index.scale_factor == pytest.approx(1 / float(both.std(correction=0)), rel=1e-5)
    assert (result.encoded, result.skipped, result.index.classes) == (IMAGES, 0, ("a", "b"))
    assert sorted(files(tmp_path / "z")) == [
        "encode.yaml",
        "index.json",
        *(f"latents-{i:05}.safetensors" for i in range(3)),
    ]


def test_without_flip_one_orientation_is_stored(encoding, tmp_path):
    result = encode(encoding(flip=False), tmp_path / "z")
    assert everything(tmp_path / "z").keys() == {"z", "label"}
    stored = sum(path.stat().st_size for path in (tmp_path / "z").glob("latents-*"))
    assert result.index.nbytes <= stored < result.index.nbytes + 3 * 1500


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mean_and_log_variance_of_a_kl_autoencoder(encoding, kl_file, photos, dtype, tmp_path):
    result = encode(encoding(autoencoder=str(kl_file), flip=False, dtype=dtype), tmp_path / "z")
    found = everything(tmp_path / "z")
    with torch.no_grad():
        mean, logvar = load_autoencoder(resolve(str(kl_file), "autoencoder")).moments(pixels(photos)[0])
    assert found.keys() == {"mean", "logvar", "label"}
    assert found["mean"].dtype == getattr(torch, dtype)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(found["mean"].float(), mean, **tolerance)
    torch.testing.assert_close(found["logvar"].float(), logvar, **tolerance)
    drawn = mean + (0.5 * logvar).exp() * torch.randn(500, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert result.index.scale_factor == pytest.approx(1 / float(drawn.std()), rel=5e-3)


def test_the_images_of_the_autoencoder_are_taken_by_default(training, autoencoder, tmp_path):
    spec = Encoding.model_validate({"autoencoder": str(autoencoder), **QUICK})
    index = encode(spec, tmp_path / "z").index
    assert (index.images, index.flip, index.data["kind"]) == (IMAGES, True, "images")


def test_an_autoencoder_is_the_same_inside_a_latent_diffusion_model(training, autoencoder, ldm, tmp_path):
    ldm_train.run(ldm_train.plan(ldm(steps=2), tmp_path / "ldm", None))
    found = [resolve(str(folder), "autoencoder") for folder in (autoencoder, tmp_path / "ldm")]
    configs = [model_config(file, AutoencoderModel).autoencoder for file in found]
    assert found[0].header.kind != found[1].header.kind
    first, second = (identity(load_autoencoder(file), config) for file, config in zip(found, configs, strict=True))
    assert first == second
    raw = load_autoencoder(found[0], "raw")
    assert identity(raw, configs[0]) != first


def test_batches_and_workers_change_nothing(encoding, tmp_path):
    encode(encoding(), tmp_path / "a")
    encode(encoding(workers=2), tmp_path / "b")
    encode(encoding(batch_size=8), tmp_path / "c")
    a, b, c = (everything(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in a:
        torch.testing.assert_close(a[name], c[name], rtol=0, atol=1e-5)


def test_a_dry_run_writes_nothing_and_knows_the_size(encoding, tmp_path):
    plan = vqvae_encode.plan(encoding(), tmp_path / "z")
    told = vqvae_encode.preview(plan)
    assert (told.contents.images, told.contents.shards, told.there) == (IMAGES, 3, 0)
    assert told.contents.nbytes == IMAGES * (2 * 4 * 8 * 8 * 4 + 8)
    assert not (tmp_path / "z").exists()


# Stopping and going on


KILLED = """
import signal
from uldm_cli.formats import tensors

write = tensors._write_tensor
left = [3 + 2]

def tensor(file, name, ref):
    write(file, name, ref)
    left[0] -= 1
    if left[0] == 0:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

tensors._write_tensor = tensor
"""
"""A process that encodes is killed in the middle of the second file, after two of its three tensors."""


def test_what_was_killed_goes_on_with_what_is_missing(encoding, start, tmp_path, capsys):
    spec = encoding()
    encode(spec, tmp_path / "whole")
    killed = start(spec, tmp_path / "killed", before=KILLED)
    assert killed.exit_code() == -signal.SIGKILL, killed.log.read_text()
    assert sorted(files(tmp_path / "killed")) == ["encode.yaml", "latents-00000.safetensors"]
    assert list((tmp_path / "killed").glob(".*.tmp"))
    with pytest.raises(ConfigError, match=r"half-written: 1 file of latents, and no index.json.* uldm vqvae encode"):
        read_index(tmp_path / "killed")
    assert encode(spec, tmp_path / "killed").encoded == IMAGES - 8
    assert f"1 of 3 files in {tmp_path / 'killed'} are there already" in capsys.readouterr().err
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_ctrl_c_leaves_whole_files(encoding, tmp_path, monkeypatch):
    from uldm_cli.runs.latent_writer import LatentWriter

    fill, calls = LatentWriter._fill, iter(range(100))

    def interrupted(self, *args):
        if next(calls) == 3:  # the second batch of the second file
            signal.raise_signal(signal.SIGINT)
        fill(self, *args)

    monkeypatch.setattr(LatentWriter, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(encoding(), tmp_path / "z")
    assert sorted(files(tmp_path / "z")) == ["encode.yaml", "latents-00000.safetensors"]
    monkeypatch.undo()
    assert encode(encoding(), tmp_path / "z").encoded == IMAGES - 8
    encode(encoding(), tmp_path / "whole")
    assert files(tmp_path / "z") == files(tmp_path / "whole")


def test_the_same_again_writes_nothing(encoding, tmp_path):
    encode(encoding(), tmp_path / "z")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "z").iterdir()}
    assert encode(encoding(), tmp_path / "z").encoded == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "z").iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "no latents"])
def test_a_damaged_file_is_named_and_made_anew(encoding, damage, tmp_path, capsys):
    encode(encoding(), tmp_path / "z")
    whole = files(tmp_path / "z")
    path = tmp_path / "z" / "latents-00001.safetensors"
    content = bytearray(whole[path.name])
    content[-5] ^= 1
    wrong = {"truncated": whole[path.name][:-1], "one bit": bytes(content), "empty": b""}
    path.write_bytes(wrong.get(damage, (tmp_path / "z" / "encode.yaml").read_bytes()))
    capsys.readouterr()
    assert encode(encoding(), tmp_path / "z").encoded == 8
    assert f"warning: {path} is damaged: it is encoded again" in capsys.readouterr().err
    assert files(tmp_path / "z") == whole


# Several processes


LATE = """
import time
from uldm_cli.runs import vqvae_encode

look = vqvae_encode._missing

def late(*args):
    time.sleep(2 * int(os.environ["RANK"]))
    return look(*args)

vqvae_encode._missing = late
"""
"""The second process looks at what is there when the first, if it did not wait, had written its files."""


def test_a_slow_process_does_not_take_the_files_of_a_quick_one_for_earlier_ones(encoding, start_two, finish, tmp_path):
    spec = encoding()
    encode(spec, tmp_path / "one")
    processes = start_two(spec, tmp_path / "two", LATE)
    finish(processes)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert "there already" not in "".join(process.log.read_text() for process in processes)


def test_two_processes_write_what_one_does_byte_for_byte(encoding, mixed, start_two, finish, tmp_path):
    spec = encoding(mixed)
    encode(spec, tmp_path / "one")
    finish(start_two(spec, tmp_path / "two"))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for number in (0, 1):
        (tmp_path / "two" / f"latents-{number:05}.safetensors").unlink()
    (tmp_path / "two" / "latents-00002.safetensors").write_bytes(b"cut")
    finish(start_two(spec, tmp_path / "two"))
    assert files(tmp_path / "two") == files(tmp_path / "one")


# Images that cannot be used


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """A copy of the images of which one has no header, and three, the last two at the end, no pixels."""
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    (folder / "a" / "00.png").write_bytes(b"no picture")
    for name in ("a/04.png", "b/17.png", "b/19.png"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    return folder


def test_the_next_readable_image_takes_the_place_of_a_damaged_one(encoding, mixed, photos, tmp_path, capsys):
    result = encode(encoding(mixed), tmp_path / "z")
    encode(encoding(photos), tmp_path / "whole")
    found, whole = everything(tmp_path / "z"), everything(tmp_path / "whole")
    # Without a/00 the order is a/02 to a/18 and b/01 to b/19: of 19, the damaged ones are numbers 1, 17 and 18.
    sources = [1, 3, *range(3, 18), 1, 1]  # in the whole set; the last two take the first
    torch.testing.assert_close(found["z"], whole["z"][sources], rtol=0, atol=1e-5)
    assert found["label"].tolist() == whole["label"][sources].tolist()
    assert [name for file in result.index.files for name, _ in file.skipped] == ["a/04.png", "b/17.png", "b/19.png"]
    assert [name for name, _ in result.index.left_out] == ["a/00.png"]
    assert result.skipped == 4
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: skipped")]
    assert [line.split(":")[1] for line in warned] == [
        " skipped a/00.png",
        *(f" skipped {n}" for n in ("a/04.png", "b/17.png", "b/19.png")),
    ]


def test_strict_stops_at_a_damaged_image(encoding, mixed, tmp_path):
    (mixed / "a" / "00.png").unlink()
    with pytest.raises(UsageError, match=r"a/04\.png"):
        encode(encoding(mixed, strict=True), tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_images_of_which_none_can_be_decoded_leave_no_folder(encoding, mixed, tmp_path):
    for path in mixed.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match="not one image of the data set can be decoded"):
        encode(encoding(mixed), tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_images_of_another_size_than_the_autoencoders_are_told(encoding, autoencoder, tmp_path, capsys):
    spec = encoding()
    encode(spec, tmp_path / "usual")
    assert "data.size" not in capsys.readouterr().err
    encode(spec.model_copy(update={"data": spec.data.model_copy(update={"size": 32})}), tmp_path / "large")
    said = capsys.readouterr().err
    assert f"images are made 32x32, and {autoencoder} was trained on 16x16: data.size=16 takes those" in said


# What is refused


def test_files_of_another_autoencoder_are_not_gone_on_with(encoding, autoencoder, tmp_path):
    """Of the same shape and under the same name, but trained longer."""
    run = tmp_path / "run"
    shutil.copytree(autoencoder, run)
    encode(encoding(autoencoder=str(run)), tmp_path / "z")
    before = files(tmp_path / "z")
    newest = max((run / "checkpoints").iterdir())
    shutil.rmtree(newest)
    with pytest.raises(ConfigError, match="holds latents of something else: the autoencoder has the hash") as caught:
        encode(encoding(autoencoder=str(run)), tmp_path / "z")
    assert caught.value.hint == "Give another --outdir, or remove this folder"
    assert files(tmp_path / "z") == before


def test_files_of_other_images_are_not_gone_on_with(encoding, photos, tmp_path):
    folder = tmp_path / "grown"
    shutil.copytree(photos, folder)
    encode(encoding(folder), tmp_path / "z")
    (folder / "a" / "00.png").rename(folder / "a" / "01.png")
    with pytest.raises(ConfigError, match="the names of the images have the hash"):
        encode(encoding(folder), tmp_path / "z")
    shutil.copy(folder / "a" / "01.png", folder / "a" / "03.png")
    with pytest.raises(ConfigError, match="the images are 20 there and 21 here"):
        encode(encoding(folder), tmp_path / "z")


def test_another_config_gets_another_folder(encoding, tmp_path):
    encode(encoding(), tmp_path / "z")
    with pytest.raises(ConfigError, match="dtype is float32 there and float16 here"):
        vqvae_encode.plan(encoding(dtype="float16"), tmp_path / "z")


def test_images_that_the_autoencoder_cannot_take(encoding, tmp_path):
    grey = {"kind": "tiny"}
    with pytest.raises(ConfigError, match=r"data\.channels: expected 3, the channels of the autoencoder's images"):
        vqvae_encode.plan(encoding(data=grey), tmp_path / "z")


def test_random_crops_cannot_be_encoded(encoding, photos, tmp_path):
    data = {"kind": "images", "root": str(photos), "size": 16, "crop": "random"}
    with pytest.raises(ConfigError, match=r"data\.crop is random"):
        encode(encoding(data=data), tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_a_full_disk_is_told_and_leaves_no_half_file(encoding, largest_file, tmp_path):
    with largest_file(5000), pytest.raises(UldmError, match=r"disk full while writing .*latents-00000") as caught:
        encode(encoding(), tmp_path / "z")
    assert caught.value.exit_code == 1
    assert [path.name for path in (tmp_path / "z").iterdir()] == ["encode.yaml"]
    encode(encoding(), tmp_path / "z")
    encode(encoding(), tmp_path / "whole")
    assert files(tmp_path / "z") == files(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UldmError, match=r"the latents need 0\.00 GB, and .* has room for 0\.00 GB"):
        encode(encoding(), tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_latents_beyond_float16_are_told(encoding, kl_file, tmp_path):
    module = load_autoencoder(resolve(str(kl_file), "autoencoder"))
    module.quant_conv.bias.data[0] = 1e5
    model = model_config(resolve(str(kl_file), "autoencoder"), AutoencoderModel)
    path = tmp_path / "far.safetensors"
    save(path, Header("autoencoder", model.model_dump(mode="json")), {"model": module.state_dict()})
    with pytest.raises(UldmError, match=r"NaN or infinite in float16\. Use dtype=float32"):
        encode(encoding(autoencoder=str(path), dtype="float16"), tmp_path / "z")
    encode(encoding(autoencoder=str(path)), tmp_path / "wide")


# Reading


def test_a_cache_is_opened_as_a_set(encoding, tmp_path):
    index = encode(encoding(), tmp_path / "z").index
    latents = open_cache(tmp_path / "z", index, flip=False)
    assert (len(latents), latents.classes, latents.channels, latents.size) == (IMAGES, ("a", "b"), 3, 16)
    values, labels = latents.gather(torch.tensor([19, 3]))
    found = everything(tmp_path / "z")
    assert torch.equal(values, found["z"][[19, 3]])
    assert labels.tolist() == found["label"][[19, 3]].tolist()


@pytest.mark.parametrize("damage", ["missing", "truncated", "another"])
def test_opening_names_the_file_that_is_damaged(encoding, damage, tmp_path):
    index = encode(encoding(), tmp_path / "z").index
    path = tmp_path / "z" / "latents-00001.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.copy(tmp_path / "z" / "latents-00000.safetensors", path)
    with pytest.raises(ConfigError) as caught:
        open_cache(tmp_path / "z", index, flip=True)
    assert str(path) in caught.value.message
    assert f"uldm vqvae encode {tmp_path / 'z' / 'encode.yaml'} --outdir {tmp_path / 'z'}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "missing"),
        ('{"format": 2}', "format"),
    ],
)
def test_a_damaged_index_is_named(content, says, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        read_index(tmp_path)
    assert str(tmp_path / "index.json") in caught.value.message


def test_an_index_that_lists_too_few_files_is_refused(encoding, tmp_path):
    encode(encoding(), tmp_path / "z")
    path = tmp_path / "z" / "index.json"
    said = json.loads(path.read_text())
    del said["files"][1]
    path.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="files: expected 3 of 20 images in all"):
        read_index(tmp_path / "z")


@pytest.mark.parametrize(("make", "says"), [(False, "there is no folder"), (True, "holds no latents")])
def test_a_folder_without_latents(make, says, tmp_path):
    folder = tmp_path / "z"
    if make:
        folder.mkdir()
    with pytest.raises(ConfigError, match=f"{says}.*uldm vqvae encode"):
        read_index(folder)
