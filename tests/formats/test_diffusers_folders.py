"""Folders of diffusers: what comes back after reading and writing, what is refused and in which words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats import native
from uldm_cli.formats.checkpoint import Checkpoint
from uldm_cli.formats.diffusers import is_folder, read, write
from uldm_cli.specs.models import LatentDiffusionModel

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
STAGE: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
    "scaling_factor": 0.3,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers saves: `vq` and `kl` pipelines."""
    root = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        dropout=0.1,
    )
    stages = {
        "vq": diffusers.VQModel(**STAGE, num_vq_embeddings=16),
        "kl": diffusers.AutoencoderKL(**STAGE, latent_channels=3),
    }
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, num_train_timesteps=500)
    for name, stage in stages.items():
        diffusers.LDMPipeline(vqvae=stage, unet=unet, scheduler=scheduler).save_pretrained(root / name)
    return root


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the VQ pipeline, to spoil."""
    return Path(shutil.copytree(original / "vq", tmp_path / "vq"))


def edit(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    """Changes fields of a JSON file."""
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps(values | changes))


def refused(call: Callable[[], object]) -> str:
    """The message of the ConfigError that a call must raise, one line."""
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return str(caught.value)


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: ref.read() for name, ref in checkpoint.tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


def meaning(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """A model's config with what is left out filled in, and without what changes nothing."""
    full = dict(getattr(diffusers, kind).from_config(config).config)
    if kind == "VQModel":
        full["vq_embed_dim"] = full["vq_embed_dim"] or full["latent_channels"]
    idle = ("force_upcast", "num_train_timesteps")
    return {name: value for name, value in full.items() if not name.startswith("_") and name not in idle}


@pytest.mark.parametrize(("name", "kind"), [("vq", "VQModel"), ("kl", "AutoencoderKL")])
def test_everything_comes_back_through_our_own_format(name: str, kind: str, original: Path, tmp_path: Path) -> None:
    written = tmp_path / "back"
    native.write(read(original / name), tmp_path / "model.safetensors")
    write(native.read(tmp_path / "model.safetensors"), written)
    for part, part_kind in (("unet", "UNet2DModel"), ("vqvae", kind)):
        equal(load_file(written / part / WEIGHTS), load_file(original / name / part / WEIGHTS))
        before, after = (json.loads((root / part / "config.json").read_text()) for root in (original / name, written))
        assert meaning(after, part_kind) == meaning(before, part_kind)
    index = json.loads((written / "model_index.json").read_text())
    before = json.loads((original / name / "model_index.json").read_text())
    assert index | {"_diffusers_version": 0} == before | {"_diffusers_version": 0}
    scheduler = json.loads((written / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["steps_offset"], scheduler["set_alpha_to_one"], scheduler["clip_sample"]) == (1, False, False)
    assert (scheduler["num_train_timesteps"], scheduler["beta_schedule"]) == (500, "scaled_linear")
    equal(values(read(written)), values(read(original / name)))
    assert read(written).header == read(original / name).header


def test_config_is_a_model_of_ours(original: Path) -> None:
    model = LatentDiffusionModel.model_validate(read(original / "kl").header.config)
    assert model.latent_shape == (3, 8, 8)
    assert model.image_shape == (3, 16, 16)
    assert model.scale_factor == 0.3
    said = {"kind": "scaled_linear", "timesteps": 500, "start": 0.0001, "end": 0.02, "zero_terminal_snr": False}
    assert model.schedule.model_dump() == said


@pytest.mark.parametrize("name", ["vq", "kl"])
def test_first_stage_alone_comes_back(name: str, original: Path, tmp_path: Path) -> None:
    source = original / name / "vqvae"
    assert is_folder(source)
    checkpoint = read(source)
    assert checkpoint.header.kind == "autoencoder"
    assert checkpoint.header.config["image_size"] == 16
    write(checkpoint, tmp_path / "back")
    equal(load_file(tmp_path / "back" / WEIGHTS), load_file(source / WEIGHTS))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["scaling_factor"] == 0.3


@pytest.mark.parametrize(("name", "scale"), [("vq", 1.0), ("kl", 0.18215)])
def test_missing_scaling_factor(name: str, scale: float, original: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(original / name, tmp_path / "copy"))
    edit(copy / "vqvae" / "config.json", remove=("scaling_factor",))
    assert read(copy).header.config["scale_factor"] == scale


def test_old_names_in_pickles(folder: Path) -> None:
    expected = values(read(folder))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("unet", "vqvae"):
        tensors = load_file(folder / part / WEIGHTS)
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
        assert any("proj_attn" in key for key in tensors)
        (folder / part / WEIGHTS).unlink()
        torch.save(tensors, folder / part / "diffusion_pytorch_model.bin")
    checkpoint = read(folder)
    assert checkpoint.extra == checkpoint.warnings == ()
    equal(values(checkpoint), expected)


def test_first_stage_in_a_folder_called_vae(folder: Path) -> None:
    expected = values(read(folder))
    (folder / "vqvae").rename(folder / "vae")
    edit(folder / "model_index.json", remove=("vqvae",), vae=["diffusers", "VQModel"])
    equal(values(read(folder)), expected)


def test_shards(original: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    write(read(original / "vq"), written, shard_bytes=500_000)
    shards = sorted(written.glob("unet/*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 520_000 for path in shards)
    assert not (written / "unet" / WEIGHTS).exists()
    equal(values(read(written)), values(read(original / "vq")))
    theirs = diffusers.LDMPipeline.from_pretrained(written).unet.state_dict()
    equal(dict(theirs), load_file(original / "vq" / "unet" / WEIGHTS))


def test_tensors_without_a_place_come_back(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS) | {"stray.counter": torch.tensor([3])}
    save_file(tensors, folder / "unet" / WEIGHTS)
    checkpoint = read(folder)
    assert checkpoint.extra == ("unet.stray.counter",)
    assert "kept.unet.stray.counter" in checkpoint.tensors
    write(checkpoint, tmp_path / "back")
    equal(load_file(tmp_path / "back" / "unet" / WEIGHTS), tensors)


def test_a_folder_that_does_not_fit_its_config_is_told(folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    del tensors["mid_block.attentions.0.to_k.weight"]
    save_file(tensors, folder / "unet" / WEIGHTS)
    said = refused(lambda: read(folder))
    assert "unet does not fit its config.json: 1 tensor differs, first mid_block.attentions.0.to_q.weight" in said
    assert "the weights are incomplete" in said
    edit(folder / "unet" / "config.json", block_out_channels=[64, 64])
    said = refused(lambda: read(folder))
    assert " is [" in said
    assert "block_out_channels" in said


@pytest.mark.parametrize(
    ("changes", "kind", "target"),
    [
        ({}, "scaled_linear", "eps"),
        ({"beta_schedule": "linear", "prediction_type": "v_prediction"}, "linear", "v"),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, "cosine", "x0"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "scaled_linear", "v"),
    ],
)
def test_schedules(changes: dict[str, Any], kind: str, target: str, folder: Path, tmp_path: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    checkpoint = read(folder)
    model = LatentDiffusionModel.model_validate(checkpoint.header.config)
    assert (model.schedule.kind, model.target) == (kind, target)  # type: ignore[attr-defined]
    write(checkpoint, tmp_path / "back")
    ours = model.schedule.build().alphas_cumprod
    for place in (folder, tmp_path / "back"):
        scheduler = diffusers.DDIMScheduler.from_pretrained(place / "scheduler")
        assert torch.allclose(scheduler.alphas_cumprod, ours, rtol=1e-4, atol=1e-7)
        assert scheduler.config.prediction_type == changes.get("prediction_type", "epsilon")
    no_signal = changes.get("rescale_betas_zero_snr", False)
    assert (ours[-1] == 0) == no_signal
    spacing = ("trailing", True) if no_signal else ("leading", False)
    assert (scheduler.config.timestep_spacing, scheduler.config.set_alpha_to_one) == spacing


def test_noise_as_a_target_where_no_signal_is_left_is_refused(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    message = refused(lambda: read(folder))
    assert "target: with schedule.zero_terminal_snr the last timestep is nothing but noise" in message


def test_what_changes_sampling_is_said(folder: Path) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True, timestep_spacing="trailing")
    edit(folder / "unet" / "config.json", novelty=3, idle=None)
    warnings = "\n".join(read(folder).warnings)
    assert "clip_sample" in warnings
    assert "'trailing'" in warnings
    assert "does not know novelty" in warnings
    assert "idle" not in warnings


UNET, STAGE_CONFIG, SCHEDULER = "unet/config.json", "vqvae/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, ["StableDiffusionPipeline", "LDMPipeline"]),
        (UNET, {"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel", "UNet2DModel"]),
        (UNET, {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, ["CrossAttn", "AttnDownBlock2D"]),
        (UNET, {"down_block_types": ["DownBlock2D"]}, ["down_block_types", "2 entries"]),
        (UNET, {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, ["up_block_types", "same levels"]),
        (UNET, {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, ["one way to change the size"]),
        (UNET, {"block_out_channels": [64, 96]}, ["block_out_channels", "multiples of the first"]),
        (UNET, {"block_out_channels": "64"}, ["block_out_channels", "list of whole numbers"]),
        (UNET, {"attention_head_dim": 48}, ["attention_head_dim is 48", "64"]),
        (UNET, {"norm_num_groups": 16}, ["norm_num_groups is 16", "32"]),
        (UNET, {"norm_eps": 1e-6}, ["norm_eps"]),
        (UNET, {"freq_shift": 1}, ["freq_shift is 1"]),
        (UNET, {"flip_sin_to_cos": False}, ["flip_sin_to_cos is false", "true"]),
        (UNET, {"downsample_padding": 0}, ["downsample_padding is 0"]),
        (UNET, {"num_class_embeds": 10}, ["num_class_embeds is 10", "null"]),
        (UNET, {"resnet_time_scale_shift": "spatial"}, ['"spatial"', "scale_shift"]),
        (UNET, {"resnet_time_scale_shift": "scale_shift"}, ["attn_norm_num_groups", "32"]),
        (UNET, {"sample_size": None}, ["sample_size is null"]),
        (UNET, {"layers_per_block": 10**9}, ["layers_per_block", "1000"]),
        (UNET, {"dropout": float("nan")}, ["dropout is NaN"]),
        (UNET, {"out_channels": 6}, ["out_channels is 6", "3"]),
        (UNET, {"in_channels": 4, "out_channels": 4}, ["in_channels", "4", "3"]),
        (STAGE_CONFIG, {"_class_name": "AutoencoderTiny"}, ["AutoencoderTiny", "VQModel"]),
        (STAGE_CONFIG, {"_class_name": []}, ["_class_name is []"]),
        (STAGE_CONFIG, {"norm_type": "spatial"}, ["norm_type"]),
        (STAGE_CONFIG, {"lookup_from_codebook": True}, ["lookup_from_codebook is true"]),
        (STAGE_CONFIG, {"scaling_factor": 0}, ["scaling_factor is 0"]),
        (STAGE_CONFIG, {"down_block_types": ["DownEncoderBlock2D", "X"]}, ["AttnDownEncoderBlock2D"]),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["FlowMatch", "DDIMScheduler"]),
        (SCHEDULER, {"beta_schedule": "laplace"}, ["laplace", "scaled_linear"]),
        (SCHEDULER, {"prediction_type": "flow"}, ["flow", "v_prediction"]),
        (SCHEDULER, {"trained_betas": [0.1]}, ["trained_betas"]),
    ],
)  # fmt: skip
def test_what_cannot_be_held_names_its_field(
    file: str, changes: dict[str, Any], words: list[str], folder: Path
) -> None:
    edit(folder / file, **changes)
    message = refused(lambda: read(folder))
    assert str(folder) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("field", ["use_quant_conv", "use_post_quant_conv", "shift_factor", "latents_mean"])
def test_a_kl_autoencoder_that_cannot_be_held(field: str, original: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(original / "kl" / "vqvae", tmp_path / "copy"))
    edit(copy / "config.json", **{field: False if field.startswith("use") else 0.1})
    assert f"{field} is" in refused(lambda: read(copy))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: shutil.rmtree(f / "unet"), ["no folder unet/"]),
        (lambda f: shutil.rmtree(f / "vqvae"), ["no folder vqvae/"]),
        (lambda f: (f / "unet" / WEIGHTS).unlink(), ["unet holds no weights", WEIGHTS]),
        (lambda f: (f / "unet" / "config.json").unlink(), ["there is no", "config.json"]),
        (lambda f: (f / "unet" / "config.json").write_text("{"), ["is not JSON"]),
        (lambda f: (f / "unet" / "config.json").write_text("[" * 100_000), ["is not JSON"]),
        (lambda f: (f / "unet" / "config.json").write_text("[]"), ["JSON object"]),
        (lambda f: (f / "unet" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), ["git lfs pull"]),
        (lambda f: (f / "unet" / WEIGHTS).write_bytes(b"\0" * 9), ["not a safetensors file"]),
    ],
)
def test_a_damaged_folder_is_named(spoil: Callable[[Path], object], words: list[str], folder: Path) -> None:
    spoil(folder)
    message = refused(lambda: read(folder))
    for word in [str(folder), *words]:
        assert word in message


def test_another_librarys_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert "AutoencoderKL" in refused(lambda: read(tmp_path))
    assert not is_folder(tmp_path / "other")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"conv_in.weight": "../vqvae/diffusion_pytorch_model.safetensors"}, "does not say in which file"),
        ({"conv_in.weight": 3}, "does not say in which file"),
        ({"conv_in.weight": "gone.safetensors"}, "gone.safetensors"),
        ({"stray": "part.safetensors"}, "1 tensors that its files lack, first stray"),
    ],
)
def test_a_wrong_index_of_shards(weight_map: dict[str, Any], words: str, folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "part.safetensors")
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert words in refused(lambda: read(folder))


def changed(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    """With other values in the config: `autoencoder__kind="vqvae"` changes `autoencoder.kind`."""
    config = json.loads(json.dumps(checkpoint.header.config))
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return replace(checkpoint, header=replace(checkpoint.header, config=config))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("vq", {"backbone__num_heads": 4, "backbone__num_head_channels": None}, "backbone.num_heads is 4"),
        ("vq", {"backbone__channel_mult": [2, 4]}, "backbone.channel_mult begins with 2"),
        ("vq", {"backbone__conv_resample": False}, "backbone.conv_resample is false"),
        ("vq", {"autoencoder": {"kind": "vqvae", "z_channels": 3}}, "autoencoder.kind 'vqvae'"),
        ("vq", {"autoencoder__ch_mult": [2, 2]}, "autoencoder.ch_mult begins with 2"),
        ("vq", {"autoencoder__quantizer": {"kind": "cosine"}}, "autoencoder.quantizer.kind 'cosine'"),
        (
            "vq",
            {"autoencoder__quantizer": {"kind": "fsq", "levels": [4, 4, 4]}, "autoencoder__codebook_size": 64},
            "autoencoder.quantizer.kind 'fsq'",
        ),
        ("kl", {"autoencoder__embed_dim": 5}, "autoencoder.embed_dim is 5"),
        ("vq", {"schedule": {"kind": "cosine", "offset": 0.01}}, "schedule.offset is 0.01"),
        ("vq", {"learned_variance": True}, "learned_variance is true"),
        ("vq", {"schedule": {"kind": "sigmoid"}}, "schedule.kind 'sigmoid'"),
        (
            "vq",
            {
                "conditioning": "crossattn",
                "conditioner": {"kind": "identity"},
                "backbone__use_spatial_transformer": True,
                "backbone__context_dim": 8,
            },
            "conditioning is 'crossattn'",
        ),
    ],
)
def test_what_diffusers_cannot_hold_names_its_field(
    name: str, changes: dict[str, Any], words: str, original: Path, tmp_path: Path
) -> None:
    checkpoint = read(original / name)
    if "backbone__num_heads" in changes:
        changes = changes | {"backbone__attention_resolutions": [1, 2]}
    message = refused(lambda: write(changed(checkpoint, **changes), tmp_path / "back"))
    assert words in message
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_there(original: Path, tmp_path: Path) -> None:
    assert "no ema weights. It has: raw" in refused(lambda: write(read(original / "vq"), tmp_path / "back", "ema"))


def test_destination(original: Path, tmp_path: Path) -> None:
    checkpoint = read(original / "vq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in refused(lambda: write(checkpoint, tmp_path / "full"))
    assert "is a file" in refused(lambda: write(checkpoint, tmp_path / "full" / "mine.txt"))
    (tmp_path / "empty").mkdir()
    write(checkpoint, tmp_path / "empty")
    write(checkpoint, tmp_path / "deep" / "er")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_a_write_that_fails(folder: Path, tmp_path: Path) -> None:
    checkpoint = read(folder)
    (folder / "vqvae" / WEIGHTS).unlink()
    with pytest.raises(UldmError):
        write(checkpoint, tmp_path / "out" / "back")
    assert list((tmp_path / "out").iterdir()) == []
