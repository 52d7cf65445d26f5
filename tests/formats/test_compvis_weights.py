"""Published checkpoints: every tensor under our name and back, what does not fit, and what is found where."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from uldm_cli.errors import ConfigError
from uldm_cli.formats import compvis, native
from uldm_cli.formats.checkpoint import Checkpoint, Header
from uldm_cli.formats.compvis.config import read_config
from uldm_cli.formats.compvis.names import BUFFERS
from uldm_cli.formats.compvis.shapes import shapes_of
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel
from uldm_cli.specs.yamlfile import read_yaml, to_yaml

PACKAGE_PARENT = Path(compvis.__file__).parents[3]
GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
FAMILIES = sorted(path.name for path in (GOLDEN / "compvis").iterdir())
UNET, STAGE, COND = "unet_config.params", "first_stage_config.params", "cond_stage_config.params"
ADM: dict[bool, dict[str, Any]] = {
    True: {"cond_stage_config": {"target": "torch.nn.Identity"}, "conditioning_key": "adm"},
    False: {},
}
"""What a U-Net with classes needs besides."""
State = dict[str, Tensor]
COUNTERS = {"model_ema.decay", "model_ema.num_updates"}


@cache
def _state_dict(family: str) -> State:
    state: State = WEIGHTS["state_dict"](GOLDEN / "compvis" / family)
    return state


def state_dict(family: str) -> State:
    """A family's state dict, to be added to and taken from."""
    return dict(_state_dict(family))


def changed_config(family: str, changes: dict[str, Any], path: Path) -> Path:
    """A family's YAML with some values changed, by dotted path under `model.params`."""
    data, _ = read_yaml(GOLDEN / "compvis" / family / "config.yaml", targets=True)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = data["model"]["params"]
        for name in parents:
            node = node[name]
        node[last] = value
    path.write_text(to_yaml(data))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint as it was published, its YAML beside it."""

    def make(family: str) -> Path:
        path = folder / family / "model.ckpt"
        if not path.exists():
            path.parent.mkdir()
            WEIGHTS["write_checkpoint"](GOLDEN / "compvis" / family, path)
            shutil.copy(GOLDEN / "compvis" / family / "config.yaml", path.parent)
        return path

    folder = tmp_path_factory.mktemp("published")
    return make


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with a state dict of one's own, beside a family's YAML in which values may be changed."""

    def make(state: State, family: str = "uncond-vq", changes: dict[str, Any] | None = None) -> Path:
        changed_config(family, changes or {}, tmp_path / "config.yaml")
        torch.save({"state_dict": state, "global_step": 7}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return make


def refused(path: Path, config: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compvis.read(path, config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def part(checkpoint: Checkpoint, name: str) -> State:
    start = f"{name}."
    return {n.removeprefix(start): t.read() for n, t in checkpoint.tensors.items() if n.startswith(start)}


def loaded(folder: Path) -> State:
    state: State = torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]
    return state


def same(a: State, b: State) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_place(family: str, published: Callable[[str], Path]) -> None:
    checkpoint = compvis.read(published(family))
    assert (checkpoint.layout, checkpoint.header.kind, checkpoint.header.step) == ("compvis", "latent-diffusion", 4321)
    assert checkpoint.header.weights == ("ema", "raw")
    assert checkpoint.extra == ()
    assert [w for w in checkpoint.warnings if "ModelCheckpoint" not in w] == []
    model = LatentDiffusionModel.model_validate(checkpoint.header.config).build()
    model.autoencoder.load_state_dict(part(checkpoint, "autoencoder"))
    for weights in ("backbone", "ema"):
        model.denoiser.backbone.load_state_dict(part(checkpoint, weights))
    if model.conditioner is not None:
        model.conditioner.load_state_dict(part(checkpoint, "conditioner"))
    assert set(part(checkpoint, "kept")) >= {*BUFFERS, *COUNTERS}


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("uncond-vq", {f"{UNET}.conv_resample": False, f"{UNET}.use_scale_shift_norm": True, f"{UNET}.num_res_blocks": 2}),
    ("uncond-kl", {f"{UNET}.conv_resample": False, f"{UNET}.attention_resolutions": [], f"{UNET}.num_classes": 9}),
    ("class-cond", {f"{UNET}.channel_mult": [1, 2, 3, 1], f"{UNET}.transformer_depth": 2}),
    ("semantic", {f"{COND}.bias": True}),
    ("rdm", {f"{STAGE}.ddconfig.attn_resolutions": [48, 24], f"{STAGE}.ddconfig.ch_mult": [2, 1, 4]}),
    ("inpaint", {f"{STAGE}.ddconfig.attn_resolutions": [16], f"{STAGE}.ddconfig.ch_mult": [1]}),
]


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), *VARIANTS])
def test_shapes_are_those_of_the_modules(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = read_config(changed_config(family, changes | ADM[f"{UNET}.num_classes" in changes], tmp_path / "c.yaml"))
    model = LatentDiffusionModel.model_validate(config.config)
    channels = model.latent_shape[0]
    with torch.device("meta"):
        modules: dict[str, Any] = {
            "autoencoder": model.autoencoder.build(),
            "backbone": model.backbone.build(channels + model.concat_channels, channels),
        }
        if model.conditioner is not None:
            modules["conditioner"] = model.conditioner.build()
    states = {part: module.state_dict() for part, module in modules.items()}
    expected = {f"{part}.{name}": tuple(t.shape) for part, state in states.items() for name, t in state.items()}
    assert shapes_of(model) == expected


def test_looking_at_a_checkpoint_needs_no_torch(published: Callable[[str], Path]) -> None:
    program = "import sys; from pathlib import Path; from uldm_cli.formats import compvis\n"
    program += "compvis.read(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, str(published("text"))], check=True, cwd=PACKAGE_PARENT)


def test_raw_and_averaged_weights_are_not_confused(published: Callable[[str], Path]) -> None:
    checkpoint, state = compvis.read(published("uncond-vq")), state_dict("uncond-vq")
    name = "input_blocks.1.0.in_layers.2.weight"
    raw, average = (checkpoint.tensors[f"{part}.{name}"].read() for part in ("backbone", "ema"))
    assert torch.equal(raw, state[f"model.diffusion_model.{name}"])
    assert torch.equal(average, state["model_ema.diffusion_modelinput_blocks10in_layers2weight"])
    assert not torch.equal(raw, average)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_give_every_tensor_back(family: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    source = compvis.read(published(family))
    native.write(source, tmp_path / "ours.safetensors")
    ours = native.read(tmp_path / "ours.safetensors")
    compvis.write(ours, tmp_path / "theirs")
    assert same(loaded(tmp_path / "theirs"), state_dict(family))
    again = compvis.read(tmp_path / "theirs" / "model.ckpt")
    assert (again.header, again.warnings, again.extra) == (source.header, (), ())


def test_the_scale_factor_is_the_tensor_where_the_config_says_so(
    published: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    state = state_dict("uncond-kl")
    value = float(state["scale_factor"])
    assert compvis.read(published("uncond-kl")).header.config["scale_factor"] == value != 1
    changes = {"scale_by_std": False, "scale_factor": 0.5}
    assert compvis.read(saved(state, "uncond-kl", changes)).header.config["scale_factor"] == 0.5
    del state["scale_factor"]
    checkpoint = compvis.read(saved(state, "uncond-kl"))
    assert checkpoint.header.config["scale_factor"] == 1.0
    assert any("scale_by_std" in warning for warning in checkpoint.warnings)


def test_a_scale_factor_that_is_none(saved: Callable[..., Path]) -> None:
    state = state_dict("uncond-kl")
    for wrong in (torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(5)):
        path = saved(state | {"scale_factor": wrong}, "uncond-kl")
        assert "no number above 0" in refused(path)


def test_a_first_stage_that_is_the_conditioner_is_held_once(
    published: Callable[[str], Path], saved: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = compvis.read(published("inpaint"))
    assert not [name for name in checkpoint.tensors if "cond_stage" in name or name.startswith("conditioner.")]
    compvis.write(checkpoint, tmp_path / "out")
    state = loaded(tmp_path / "out")
    first, second = (state[f"{start}_stage_model.encoder.conv_in.weight"] for start in ("first", "cond"))
    assert first.data_ptr() == second.data_ptr()  # stored once


def test_a_conditioner_that_is_another_first_stage_is_kept(saved: Callable[..., Path], tmp_path: Path) -> None:
    state = state_dict("inpaint")
    name = "cond_stage_model.encoder.conv_in.weight"
    state[name] = state[name] + 1
    checkpoint = compvis.read(saved(state, "inpaint"))
    assert torch.equal(checkpoint.tensors[f"kept.{name}"].read(), state[name])
    assert any(warning.startswith("1 tensors under cond_stage_model.*") for warning in checkpoint.warnings)
    compvis.write(checkpoint, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), state)


def test_without_an_average(saved: Callable[..., Path], tmp_path: Path) -> None:
    state = {name: t for name, t in state_dict("uncond-vq").items() if not name.startswith("model_ema.")}
    checkpoint = compvis.read(saved(state, changes={"use_ema": False}))
    assert checkpoint.header.weights == ("raw",)
    assert any("no averaged (EMA) weights" in warning for warning in checkpoint.warnings)
    compvis.write(checkpoint, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), state)
    data, _ = read_yaml(tmp_path / "out" / "config.yaml", targets=True)
    assert data["model"]["params"]["use_ema"] is False


def test_an_incomplete_average(saved: Callable[..., Path]) -> None:
    state = state_dict("uncond-vq")
    del state["model_ema.diffusion_modelout2bias"]
    message = refused(saved(state))
    assert "model_ema.diffusion_modelout2bias is missing in the checkpoint and [3] by the config" in message
    assert "averaged weights are incomplete" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, saved: Callable[..., Path], tmp_path: Path) -> None:
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state_dict("uncond-vq").items()}
    checkpoint = compvis.read(saved(state))
    assert any("half precision" in warning for warning in checkpoint.warnings)
    compvis.write(checkpoint, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), state)


def test_extras_are_kept_and_named_where_they_are_unknown(saved: Callable[..., Path], tmp_path: Path) -> None:
    known = {
        "logvar": torch.zeros(1000),
        "ddim_sigmas": torch.zeros(3),
        "first_stage_model.loss.logvar": torch.ones(()),
    }
    state = state_dict("uncond-vq") | known | {"mystery.weight": torch.ones(2)}
    checkpoint = compvis.read(saved(state))
    assert checkpoint.extra == ("mystery.weight",)
    compvis.write(checkpoint, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), state)
    data, _ = read_yaml(tmp_path / "out" / "config.yaml", targets=True)
    assert data["model"]["params"]["learn_logvar"] is True


def test_a_bare_state_dict_and_one_in_safetensors(saved: Callable[..., Path], tmp_path: Path) -> None:
    state = state_dict("uncond-vq")
    saved(state)
    torch.save(state, tmp_path / "bare.pt")
    save_file(state, tmp_path / "same.safetensors")
    for name in ("bare.pt", "same.safetensors"):
        checkpoint = compvis.read(tmp_path / name)
        assert checkpoint.header.step == 0
        compvis.write(checkpoint, tmp_path / "out")
        assert same(loaded(tmp_path / "out"), state)


def starting(state: State, *starts: str, without: str = "") -> State:
    return {name.removeprefix(without): value for name, value in state.items() if name.startswith(starts)}


FIRST, NETWORK = "first_stage_model.", "model.diffusion_model."
PARTS: dict[str, tuple[Callable[[State], State], str]] = {
    "network": (lambda s: starting(s, NETWORK), "holds a U-Net without a first stage, and"),
    "bare network": (lambda s: starting(s, NETWORK, without=NETWORK), "holds a U-Net alone, and"),
    "first stage": (lambda s: starting(s, FIRST), "holds the first stage of a latent diffusion model, without"),
    "autoencoder": (lambda s: starting(s, FIRST, without=FIRST), "holds an autoencoder, and"),
    "none": (lambda s: {"a": torch.ones(1)}, "holds nothing of a latent diffusion model, and"),
}  # fmt: skip


@pytest.mark.parametrize("which", PARTS)
def test_parts_of_a_model_are_called_what_they_are(which: str, saved: Callable[..., Path]) -> None:
    take, said = PARTS[which]
    message = refused(saved(take(state_dict("uncond-vq"))))
    assert said in message
    assert "describes a latent diffusion model" in message


def autoencoder_config(family: str, path: Path, target: str) -> Path:
    """The first stage of a family as a model of its own."""
    data, _ = read_yaml(GOLDEN / "compvis" / family / "config.yaml", targets=True)
    stage = data["model"]["params"]["first_stage_config"]
    path.write_text(to_yaml({"model": {"base_learning_rate": 4.5e-6, **stage, "target": target}}))
    return path


@pytest.mark.parametrize(
    ("family", "target"),
    [("uncond-vq", "ldm.models.autoencoder.VQModel"), ("rdm", "ldm.models.autoencoder.AutoencoderKL")],
)
def test_an_autoencoder_alone(family: str, target: str, tmp_path: Path) -> None:
    state = starting(state_dict(family), FIRST, without=FIRST)
    average = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in state.items()}
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 3, 4, 4)}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.losslogvar": torch.ones(())}
    autoencoder_config(family, tmp_path / "model.yaml", target)
    for extra in ({}, loss, loss | average | counters):
        torch.save({"state_dict": state | extra}, tmp_path / "model.ckpt")
        checkpoint = compvis.read(tmp_path / "model.ckpt")
        assert (checkpoint.header.kind, checkpoint.warnings, checkpoint.extra) == ("autoencoder", (), ())
        module = AutoencoderModel.model_validate(checkpoint.header.config).build()
        for weights in ("model", "ema")[: 1 + ("model_ema.decay" in extra)]:
            module.load_state_dict(part(checkpoint, weights))
        compvis.write(checkpoint, tmp_path / "out")
        assert same(loaded(tmp_path / "out"), state | extra)
        assert compvis.read(tmp_path / "out" / "model.ckpt").header == checkpoint.header


def test_a_whole_model_under_the_yaml_of_its_autoencoder(published: Callable[[str], Path], tmp_path: Path) -> None:
    config = autoencoder_config("uncond-vq", tmp_path / "vq.yaml", "ldm.models.autoencoder.VQModel")
    message = refused(published("uncond-vq"), config)
    assert "holds a latent diffusion model, and" in message
    assert "describes an autoencoder. Name the YAML of the whole model with --config" in message


MISFITS = [
    ("uncond-vq", {f"{UNET}.model_channels": 64}, "unet_config.params.model_channels"),
    ("uncond-vq", {f"{UNET}.channel_mult": [1, 2, 4]}, "unet_config.params.channel_mult"),
    ("uncond-vq", {f"{UNET}.num_res_blocks": 2}, "num_res_blocks"),
    ("uncond-vq", {f"{UNET}.attention_resolutions": [1, 2, 4]}, "attention_resolutions"),
    ("uncond-vq", {f"{UNET}.use_scale_shift_norm": True}, "use_scale_shift_norm"),
    ("uncond-vq", {f"{UNET}.resblock_updown": True}, "resblock_updown"),
    ("class-cond", {f"{UNET}.context_dim": 32, f"{COND}.embed_dim": 32}, "unet_config.params.context_dim"),
    ("layout", {f"{UNET}.transformer_depth": 1}, "unet_config.params.transformer_depth"),
    ("inpaint", {f"{UNET}.in_channels": 6}, "unet_config.params.in_channels"),
    ("class-cond", {f"{COND}.n_classes": 10}, "cond_stage_config.params.n_classes"),
    ("text", {f"{COND}.n_layer": 3}, "cond_stage_config.params.n_layer"),
    ("text", {f"{COND}.max_seq_len": 77}, "cond_stage_config.params.max_seq_len"),
    ("semantic", {f"{COND}.in_channels": 8}, "cond_stage_config.params.in_channels"),
    ("uncond-vq", {f"{STAGE}.n_embed": 64}, "first_stage_config.params.n_embed"),
    ("uncond-vq", {f"{STAGE}.ddconfig.ch": 64}, "first_stage_config.params.ddconfig.ch"),
    ("uncond-vq", {f"{STAGE}.ddconfig.ch_mult": [1, 4]}, "first_stage_config.params.ddconfig.ch_mult"),
    ("uncond-vq", {f"{STAGE}.ddconfig.num_res_blocks": 2}, "first_stage_config.params.ddconfig.num_res_blocks"),
    ("uncond-vq", {f"{STAGE}.ddconfig.attn_type": "none"}, "first_stage_config.params.ddconfig.attn_type"),
    ("rdm", {f"{STAGE}.ddconfig.attn_resolutions": []}, "first_stage_config.params.ddconfig.attn_resolutions"),
    ("rdm", {f"{STAGE}.ddconfig.z_channels": 4}, "first_stage_config.params.ddconfig.z_channels"),
]


@pytest.mark.parametrize(("family", "changes", "field"), MISFITS, ids=[f"{m[0]}-{m[2]}" for m in MISFITS])
def test_a_config_that_does_not_fit(
    family: str, changes: dict[str, Any], field: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    config = changed_config(family, changes, tmp_path / "wrong.yaml")
    message = refused(published(family), config)
    assert str(config) in message
    said = message.partition("n the config, ")[2]
    assert said.startswith("model.params")
    assert field in said
    assert 1 <= message.count(" in the checkpoint and ") <= 10


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"timesteps": 100}, "timesteps"), ({"linear_end": 0.0205}, "linear_end"), ({"beta_schedule": "cosine"}, "beta_")],
)
def test_another_schedule(
    changes: dict[str, Any], field: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    path = published("uncond-vq")
    compvis.check_schedule(compvis.read(path))
    checkpoint = compvis.read(path, changed_config("uncond-vq", changes, tmp_path / "wrong.yaml"))
    with pytest.raises(ConfigError, match=rf"{path} .*In the config, .*{field}"):
        compvis.check_schedule(checkpoint)


def test_both_shapes_are_shown(published: Callable[[str], Path], tmp_path: Path) -> None:
    config = changed_config("uncond-vq", {f"{STAGE}.n_embed": 64}, tmp_path / "wrong.yaml")
    message = refused(published("uncond-vq"), config)
    shapes = "quantize.embedding.weight is [128, 3] in the checkpoint and [64, 3] by the config"
    assert f"1 tensor differs: first_stage_model.{shapes}. In the config, " in message


# Finding the two files


@pytest.mark.parametrize(
    "place", ["config.yaml", "model.yaml", "2022-01-01T00-00-00-project.yaml", "../configs/2022-project.yaml"]
)
def test_the_yaml_is_found_where_it_was_published(place: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "model.ckpt"
    config = path.parent / place
    path.parent.mkdir(parents=True)
    config.parent.mkdir(exist_ok=True)
    shutil.copy(published("uncond-vq"), path)
    with pytest.raises(
        compvis.MissingConfig, match=r"holds a latent diffusion model, but no YAML .*--config"
    ) as caught:
        compvis.read(path)
    assert caught.value.path == path
    shutil.copy(GOLDEN / "compvis" / "uncond-vq" / "config.yaml", config.resolve())
    assert compvis.read(path).header.kind == "latent-diffusion"


def test_the_newest_of_a_runs_configs_counts(published: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    shutil.copy(published("uncond-vq"), path)
    (tmp_path / "2021-12-31T00-00-00-project.yaml").write_text("old: 1")
    shutil.copy(GOLDEN / "compvis" / "uncond-vq" / "config.yaml", tmp_path / "2022-01-01T00-00-00-project.yaml")
    assert compvis.read(path).header.kind == "latent-diffusion"


def test_the_checkpoint_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model that uldm knows"):
        compvis.weights_in(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/last.ckpt", "any.ckpt", "model.ckpt"):
        (tmp_path / name).touch()
        assert compvis.weights_in(tmp_path) == tmp_path / name
    (tmp_path / "model.ckpt").unlink()
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ConfigError, match=r"several checkpoints. Name one of: any\.ckpt, other\.safetensors"):
        compvis.weights_in(tmp_path)


# Writing


@pytest.mark.parametrize("family", ["uncond-vq", "uncond-kl", "text"])
def test_what_a_model_of_ours_lacks_is_computed(family: str, published: Callable[[str], Path], tmp_path: Path) -> None:
    source, state = compvis.read(published(family)), state_dict(family)
    ours = replace(source, tensors={n: t for n, t in source.tensors.items() if not n.startswith("kept.")})
    compvis.write(ours, tmp_path / "out")
    written = loaded(tmp_path / "out")
    assert set(state) - set(written) <= {"scale_factor", *(n for n in state if "to_logits" in n)}
    assert not set(written) - set(state)
    assert same({n: written[n] for n in BUFFERS}, {n: state[n] for n in BUFFERS})
    assert {n: (written[n].dtype, written[n].shape) for n in COUNTERS} == {
        n: (state[n].dtype, state[n].shape) for n in COUNTERS
    }
    again = compvis.read(tmp_path / "out" / "model.ckpt")
    assert again.header.config == source.header.config
    assert again.header.step == 4321


def test_an_average_alone_becomes_the_weights(published: Callable[[str], Path], tmp_path: Path) -> None:
    source = compvis.read(published("uncond-vq"))
    only = {n: t for n, t in source.tensors.items() if n.startswith(("ema.", "autoencoder."))}
    compvis.write(replace(source, tensors=only), tmp_path / "out")
    again = compvis.read(tmp_path / "out" / "model.ckpt")
    assert again.header.weights == ("raw",)
    assert same(part(again, "backbone"), part(source, "ema"))


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    config = {"autoencoder": {"kind": "vqvae"}, "image_size": 64}
    with pytest.raises(ConfigError, match=r"autoencoder\.kind is vqvae"):
        compvis.write(Checkpoint(tmp_path / "a", "uldm", Header("autoencoder", config), {}), tmp_path / "out")
    assert not list(tmp_path.iterdir())
