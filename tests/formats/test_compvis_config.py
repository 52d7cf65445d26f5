"""The reference's YAML as our config, and back: what is translated, what is refused and in which words."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.compvis.config import read_config
from uldm_cli.formats.compvis.emit import Has, config_of
from uldm_cli.formats.compvis.targets import TARGETS
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel
from uldm_cli.specs.yamlfile import read_yaml, to_yaml

GOLDEN = Path(__file__).parents[1] / "golden" / "compvis"
IDENTITY = {"target": "torch.nn.Identity"}
RAW = Has(average=False, scale_factor=False, logvar=False)

# Family: autoencoder, side of the images, conditioner, way of conditioning, channels beside the latent's.
FAMILIES = {
    "uncond-vq": ("vq", 32, None, None, 0),
    "uncond-kl": ("kl", 16, None, None, 0),
    "class-cond": ("vq", 16, "class", "crossattn", 0),
    "inpaint": ("vq", 32, "first-stage", "concat", 4),
    "superres": ("vq", 32, "identity", "concat", 3),
    "text": ("kl", 16, "tokens", "crossattn", 0),
    "layout": ("vq", 16, "tokens", "crossattn", 0),
    "semantic": ("vq", 16, "rescaler", "concat", 3),
    "rdm": ("kl", 48, "identity", "crossattn", 0),
}


def stage(kind: str, channels: int, codes: int = 8192, **ddconfig: Any) -> dict[str, Any]:
    """A first stage at full size."""
    dd = {
        "double_z": kind == "AutoencoderKL",
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"embed_dim": channels, "monitor": "val/rec_loss", "ddconfig": dd | ddconfig, "lossconfig": IDENTITY}
    if kind != "AutoencoderKL":
        params["n_embed"] = codes
    return {"target": f"ldm.models.autoencoder.{kind}", "params": params}


def ldm(latent: int, first_stage: dict[str, Any], unet: dict[str, Any], **params: Any) -> dict[str, Any]:
    """A latent diffusion model at full size, as published."""
    channels = first_stage["params"]["embed_dim"]
    network = {"image_size": latent, "in_channels": channels, "out_channels": channels, "num_res_blocks": 2} | unet
    every = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "image",
        "cond_stage_key": "class_label",
        "image_size": latent,
        "channels": channels,
        "monitor": "val/loss_simple_ema",
        "cond_stage_config": "__is_unconditional__",
    }
    parts = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
        "first_stage_config": first_stage,
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"base_learning_rate": 2e-06, "target": target, "params": every | params | parts}}


def encoder(name: str, **params: Any) -> dict[str, Any]:
    return {"target": f"ldm.modules.encoders.modules.{name}", "params": params}


LEVELS = {"channel_mult": [1, 2, 3, 4], "attention_resolutions": [8, 4, 2]}
VQ_F4 = stage("VQModelInterface", 3)
WARM_UP = {"warm_up_steps": [10000], "cycle_lengths": [10000000000000], "f_start": [1e-6], "f_max": [1.0]}
# What was published, and the number of values in the U-Net where it is known.
PUBLISHED = {
    "ffhq256": (
        ldm(64, VQ_F4, LEVELS | {"model_channels": 224, "num_head_channels": 32}, concat_mode=False),
        274_056_163,
    ),
    "lsun_churches256": (
        ldm(
            32,
            stage("AutoencoderKL", 4, ch_mult=[1, 2, 4, 4]),
            {
                "model_channels": 192,
                "channel_mult": [1, 2, 2, 4, 4],
                "attention_resolutions": [1, 2, 4, 8],
                "num_heads": 8,
                "use_scale_shift_norm": True,
                "resblock_updown": True,
            },
            linear_end=0.0155,
            scale_by_std=True,
            scheduler_config={"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": WARM_UP},
        ),
        None,
    ),
    "cin256": (
        ldm(
            32,
            stage("VQModelInterface", 4, 16384, ch_mult=[1, 2, 2, 4], attn_resolutions=[32]),
            {
                "model_channels": 256,
                "channel_mult": [1, 2, 4],
                "attention_resolutions": [4, 2, 1],
                "num_head_channels": 32,
                "use_spatial_transformer": True,
                "transformer_depth": 1,
                "context_dim": 512,
            },
            cond_stage_config=encoder("ClassEmbedder", embed_dim=512, key="class_label"),
            cond_stage_trainable=True,
            conditioning_key="crossattn",
        ),
        None,
    ),
    "inpainting_big": (
        ldm(
            64,
            stage("VQModelInterface", 3, attn_type="none"),
            LEVELS | {"in_channels": 7, "model_channels": 256, "num_heads": 8, "resblock_updown": True},
            linear_end=0.0205,
            concat_mode=True,
            loss_type="l1",
            cond_stage_config="__is_first_stage__",
        ),
        None,
    ),
    "bsr_sr": (  # attention at a factor that no level has: it is without effect
        ldm(
            64,
            VQ_F4,
            {
                "in_channels": 6,
                "model_channels": 160,
                "attention_resolutions": [16, 8],
                "channel_mult": [1, 2, 2, 4],
                "num_head_channels": 32,
            },
            concat_mode=True,
            cond_stage_config=IDENTITY,
        ),
        None,
    ),
}


def written(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(to_yaml(data))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """A family's config with some values changed (by dotted path under `model.params`; None removes one)."""

    def make(family: str, changes: dict[str, Any] | None = None) -> Path:
        data, _ = read_yaml(GOLDEN / family / "config.yaml", targets=True)
        for dotted, value in (changes or {}).items():
            *parents, last = dotted.split(".")
            node = data["model"]["params"]
            for name in parents:
                node = node[name]
            if value is None:
                del node[last]
            else:
                node[last] = value
        return written(tmp_path / "config.yaml", data)

    return make


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    found = read_config(GOLDEN / family / "config.yaml")
    model = LatentDiffusionModel.model_validate(found.config)
    conditioner: Any = model.conditioner
    assert (
        found.config["autoencoder"]["kind"],
        model.image_size,
        conditioner and conditioner.kind,
        model.conditioning,
        model.concat_channels,
    ) == FAMILIES[family]
    assert found.kind == "latent-diffusion"
    assert found.warnings == ()
    assert found.scale_by_std == (family == "uncond-kl")


def test_every_value_arrives() -> None:
    found = read_config(GOLDEN / "rdm" / "config.yaml").config
    assert found["schedule"] == {"kind": "scaled_linear", "timesteps": 1000, "start": 0.0015, "end": 0.015}
    assert (found["scale_factor"], found["target"]) == (0.22765929, "eps")
    expected = {"ch_mult": [1, 1, 2], "attn_resolutions": [12], "z_channels": 8, "embed_dim": 8, "resolution": 48}
    assert {name: found["autoencoder"][name] for name in expected} == expected
    network = {"model_channels": 32, "attention_resolutions": [2, 1], "num_head_channels": 16, "context_dim": 40}
    assert {name: found["backbone"][name] for name in network} == network


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_at_full_size(name: str, tmp_path: Path) -> None:
    data, values = PUBLISHED[name]
    found = read_config(written(tmp_path / "config.yaml", data))
    assert found.warnings == ()
    model = LatentDiffusionModel.model_validate(found.config)
    assert model.image_shape == (3, 256, 256)
    channels, side, _ = model.latent_shape
    assert side == data["model"]["params"]["image_size"]
    if values is not None:
        with torch.device("meta"):
            network = model.backbone.build(channels + model.concat_channels, channels)
        assert sum(parameter.numel() for parameter in network.parameters()) == values


def test_an_autoencoder_alone(tmp_path: Path) -> None:
    for target, kind in (("VQModel", "vq"), ("VQModelInterface", "vq"), ("AutoencoderKL", "kl")):
        data = {"model": {"base_learning_rate": 4.5e-6, **stage(target, 4, ch_mult=[1, 2, 2, 4])}}
        data["model"]["params"]["lossconfig"] = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {}}
        found = read_config(written(tmp_path / "config.yaml", data))
        model = AutoencoderModel.model_validate(found.config)
        assert (found.kind, found.config["autoencoder"]["kind"]) == ("autoencoder", kind)
        assert (model.latent_shape, model.image_size) == ((4, 32, 32), 256)


def test_sizes_of_attention_that_no_level_has(config: Any) -> None:
    path = config("uncond-vq", {"first_stage_config.params.ddconfig.attn_resolutions": [16, 5]})
    assert read_config(path).config["autoencoder"]["attn_resolutions"] == [16]


@pytest.mark.parametrize(
    ("changes", "conditioning"),
    [
        ({"conditioning_key": None}, "concat"),  # its default is to concatenate
        ({"conditioning_key": None, "concat_mode": True}, "concat"),
        ({"conditioning_key": None, "concat_mode": False}, "crossattn"),
        ({"concat_mode": True}, "crossattn"),
        ({"cond_stage_config": "__is_unconditional__"}, None),
    ],
)
def test_the_way_of_conditioning(config: Any, changes: dict[str, Any], conditioning: str | None) -> None:
    network: dict[str, Any] = {
        "concat": {"in_channels": 6, "use_spatial_transformer": False, "context_dim": None},
        "crossattn": {},
        None: {"use_spatial_transformer": False, "context_dim": None},
    }[conditioning]
    changes |= {f"unet_config.params.{name}": value for name, value in network.items()}
    found = read_config(config("class-cond", changes)).config
    assert found["conditioning"] == conditioning
    assert (found["conditioner"] is None) == (conditioning is None)


def test_what_conditioners_leave_out_has_the_published_defaults(config: Any) -> None:
    path = config("class-cond", {"cond_stage_config.params.n_classes": None})
    assert read_config(path).config["conditioner"]["n_classes"] == 1000
    changes = {f"cond_stage_config.params.{n}": None for n in ("vocab_size", "max_seq_len", "use_tokenizer")}
    tokens = read_config(config("text", changes)).config["conditioner"]
    assert (tokens["vocab_size"], tokens["max_seq_len"], tokens["tokenizer"]) == (30522, 77, True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"beta_schedule": "linear"}, {"kind": "scaled_linear", "timesteps": 1000, "start": 0.0015, "end": 0.0195}),
        ({"beta_schedule": "sqrt_linear"}, {"kind": "linear", "timesteps": 1000, "start": 0.0015, "end": 0.0195}),
        ({"beta_schedule": "cosine", "timesteps": 500}, {"kind": "cosine", "timesteps": 500, "offset": 0.008}),
        (
            {"linear_start": None, "linear_end": None},
            {"kind": "scaled_linear", "timesteps": 1000, "start": 1e-4, "end": 0.02},
        ),
    ],
)
def test_schedules(config: Any, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert read_config(config("uncond-vq", theirs)).config["schedule"] == ours


def test_heads_given_twice_are_as_the_reference_takes_them(config: Any) -> None:
    network = read_config(config("uncond-vq", {"unet_config.params.num_heads": 4})).config["backbone"]
    assert (network["num_heads"], network["num_head_channels"]) == (None, 16)


UNSUPPORTED = [
    ("parameterization", "v", '"v" is not supported. Known are: eps, x0'),
    ("beta_schedule", "sqrt", '"sqrt" is not supported'),
    ("num_timesteps_cond", 2, "2 is not supported. It must be 1 or null"),
    ("use_positional_encodings", True, "true is not supported"),
    ("v_posterior", 0.5, "0.5 is not supported"),
    ("given_betas", [0.1, 0.2], "[0.1, 0.2] is not supported"),
    ("conditioning_key", "film", '"film" is not supported. Known are: concat, crossattn, hybrid, adm'),
    ("image_size", "64", 'expected a whole number, found "64"'),
    ("image_size", True, "expected a whole number, found true"),
    ("channels", 4, "4 channels, and the first stage's latents have 3 (embed_dim)"),
    ("timesteps", None, "is missing"),
    ("cond_stage_config", None, "is missing"),
    ("cond_stage_config", 3, "expected `key: value` lines, found 3"),
    ("unet_config.params.dims", 3, "3 is not supported. It must be 2"),
    ("unet_config.params.n_embed", 10, "10 is not supported"),
    ("unet_config.params.num_heads_upsample", 2, "2 is not supported"),
    ("unet_config.params.in_channels", 6, "6, and without conditioning it must be the latent's 3"),
    ("unet_config.params.out_channels", 6, "6, and the model's `channels` are 3"),
    ("unet_config.params.num_head_channels", None, "is missing, and so is num_head_channels"),
    ("unet_config.params.channel_mult", [1, 0], "expected a list of whole numbers above 0, found [1, 0]"),
    ("unet_config.target", "torch.nn.Identity", "'torch.nn.Identity' cannot stand here. Expected one of: ldm.modules."),
    ("first_stage_config.params.ddconfig.double_z", True, "a VQ autoencoder has it false"),
    ("first_stage_config.params.ddconfig.attn_type", "linear", '"linear" is not supported. Known are: vanilla, none'),
    ("first_stage_config.params.ddconfig.tanh_out", True, "true is not supported"),
    ("first_stage_config.params.remap", "indices.npy", '"indices.npy" is not supported'),
    ("first_stage_config.params.n_embed", None, "is missing"),
]


@pytest.mark.parametrize(("dotted", "value", "said"), UNSUPPORTED)
def test_what_is_refused_is_named_with_its_line(config: Any, dotted: str, value: Any, said: str) -> None:
    path = config("uncond-vq", {dotted: value})
    message = refused(path)
    assert said in message
    line, _, rest = message.removeprefix(f"{path}:").partition(": ")
    if value is not None:
        assert rest.startswith(f"model.params.{dotted}: ")
        assert dotted.rpartition(".")[2] in path.read_text().splitlines()[int(line) - 1]


def test_a_value_that_our_config_refuses(config: Any) -> None:
    message = refused(config("uncond-vq", {"unet_config.params.model_channels": 33}))
    assert "backbone.model_channels" in message


def test_an_unknown_target_is_named_with_line_and_the_nearest_right_one(config: Any) -> None:
    path = config("uncond-vq", {"unet_config.target": "ldm.modules.diffusionmodules.openaimodel.UNetModell"})
    message = refused(path)
    number = next(n for n, line in enumerate(path.read_text().splitlines(), 1) if "UNetModell" in line)
    assert message.startswith(f"{path}:{number}: model.params.unet_config.target: 'ldm.modules.")
    assert message.endswith("Did you mean 'ldm.modules.diffusionmodules.openaimodel.UNetModel'?")


@pytest.mark.parametrize(
    "target", ["os.system", "ldm.modules.encoders.modules.FrozenCLIPEmbedder", ["a"], {"a": 1}, 3, None]
)
def test_targets_outside_the_table(tmp_path: Path, target: Any) -> None:
    data, _ = read_yaml(GOLDEN / "text" / "config.yaml", targets=True)
    data["model"]["params"]["cond_stage_config"]["target"] = target
    assert "cond_stage_config.target: " in refused(written(tmp_path / "config.yaml", data))


def test_sections_of_training_are_passed_over_but_not_their_targets(tmp_path: Path) -> None:
    data, _ = read_yaml(GOLDEN / "uncond-vq" / "config.yaml", targets=True)
    plain = read_config(GOLDEN / "uncond-vq" / "config.yaml").config
    train = {"target": "taming.data.faceshq.FFHQTrain", "params": {"size": 256}}
    data["data"] = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 42, "wrap": False, "train": train}}
    logger = {"target": "main.ImageLogger", "params": {"batch_frequency": 5000}}
    data["lightning"] = {"callbacks": {"image_logger": logger}, "trainer": {"benchmark": True}}
    found = read_config(written(tmp_path / "config.yaml", data))
    assert (found.config, found.warnings) == (plain, ())
    train["target"] = "my.own.Faces"
    message = refused(written(tmp_path / "config.yaml", data))
    assert "data.params.train.target: 'my.own.Faces' is not known" in message
    assert "Remove the section `data:`" in message


def test_every_known_target_is_named_once_and_none_is_a_module_of_ours() -> None:
    assert len(TARGETS) == 16 + 26
    assert all(name.split(".")[0] in ("ldm", "main", "taming", "torch") for name in TARGETS)


def test_unknown_parameters_are_warned_of(config: Any) -> None:
    changes = {"mystery": 1, "unet_config.params.spin": 2, "first_stage_config.params.ddconfig.extra": 3}
    found = read_config(config("uncond-vq", changes))
    assert len(found.warnings) == 3
    assert all(": unknown, ignored" in warning and ":" in warning for warning in found.warnings)
    assert any("model.params.unet_config.params.spin" in warning for warning in found.warnings)


def test_dotted_targets_are_still_refused_in_our_own_configs(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("target: os.system")
    with pytest.raises(ConfigError, match="names Python code"):
        read_yaml(path)


# From our config to the reference's


def back(found: Any, path: Path, has: Has = RAW) -> Any:
    header = Header(found.kind, found.config)
    return read_config(written(path, config_of(header, path, has)))


@pytest.mark.parametrize("family", FAMILIES)
def test_back_and_forth(family: str, tmp_path: Path) -> None:
    found = read_config(GOLDEN / family / "config.yaml")
    has = Has(average=True, scale_factor=found.scale_by_std, logvar=False)
    again = back(found, tmp_path / "again.yaml", has)
    assert (again.kind, again.config, again.scale_by_std, again.warnings) == (
        found.kind,
        found.config,
        found.scale_by_std,
        (),
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_back_and_forth_at_full_size(name: str, tmp_path: Path) -> None:
    found = read_config(written(tmp_path / "config.yaml", PUBLISHED[name][0]))
    has = Has(average=True, scale_factor=found.scale_by_std, logvar=True)
    assert back(found, tmp_path / "again.yaml", has).config == found.config


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "cosine", "cosine_s": 0.01},
        {"beta_schedule": "sqrt_linear", "parameterization": "x0"},
        {"unet_config.params.num_heads": 4, "unet_config.params.num_head_channels": -1},
        {"unet_config.params.use_new_attention_order": True, "unet_config.params.conv_resample": False},
        {"scale_factor": 0.25, "image_size": 24},
    ],
)
def test_back_and_forth_of_rarer_values(config: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    found = read_config(config("uncond-vq", changes))
    assert back(found, tmp_path / "again.yaml").config == found.config


def test_an_autoencoder_alone_is_described_for_its_own_images(tmp_path: Path) -> None:
    """There the size of the images places the attention; here it does not, so the description changes."""
    small = {"kind": "kl", "resolution": 256, "attn_resolutions": [64], "ch": 32, "ch_mult": [1, 1, 2]}
    model = AutoencoderModel.model_validate({"autoencoder": small, "image_size": 32})
    header = Header("autoencoder", model.model_dump(mode="json"))
    path = written(tmp_path / "config.yaml", config_of(header, tmp_path, RAW))
    again = AutoencoderModel.model_validate(read_config(path).config)
    assert again.image_size == 32
    shapes = [
        {name: tuple(t.shape) for name, t in which.autoencoder.build().state_dict().items()} for which in (model, again)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("dotted", "value", "said"),
    [
        ("autoencoder", {"kind": "vqvae"}, "autoencoder.kind is vqvae. The reference has vq and kl"),
        ("autoencoder.quantizer", {"kind": "ema"}, "autoencoder.quantizer.kind is ema. The reference has only nearest"),
        ("autoencoder.quantizer", {"kind": "cosine"}, "autoencoder.quantizer.kind is cosine. The reference has only"),
        ("target", "v", "target is v. The reference knows eps and x0"),
        ("learned_variance", True, "learned_variance is True. The reference's models predict no variance"),
        (
            "schedule",
            {"kind": "sigmoid"},
            "schedule.kind is sigmoid. The reference knows scaled_linear, linear",
        ),
    ],
)
def test_what_the_reference_cannot_say(dotted: str, value: Any, said: str, tmp_path: Path) -> None:
    model = deepcopy(read_config(GOLDEN / "uncond-vq" / "config.yaml").config)
    *parents, last = dotted.split(".")
    node = model
    for name in parents:
        node = node[name]
    node[last] = value
    if dotted == "autoencoder":
        model["image_size"] = 64
    with pytest.raises(ConfigError) as caught:
        config_of(Header("latent-diffusion", model), tmp_path / "model.safetensors", RAW)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_reference_always_leaves_some_signal(tmp_path: Path) -> None:
    model = read_config(GOLDEN / "uncond-vq" / "config.yaml").config
    changes = {"target": "x0", "schedule": {"kind": "linear", "zero_terminal_snr": True}}
    with pytest.raises(ConfigError, match=r"schedule\.zero_terminal_snr is True\. In the reference some of the signal"):
        config_of(Header("latent-diffusion", model | changes), tmp_path / "model.safetensors", RAW)
