"""The configs of training: defaults that fit together, and what does not fit is refused with the field to change."""

import pytest
from pydantic import ValidationError

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoder_training import LPIPS_SIDES, AutoencoderTraining, Discriminator, Loss
from uldm_cli.specs.autoencoders import VQVAE
from uldm_cli.specs.datasets import Images, Tiny
from uldm_cli.specs.diffusion_training import DiffusionTraining, data_of
from uldm_cli.specs.initial import init_reference
from uldm_cli.specs.load import dump_yaml, load_config
from uldm_cli.specs.sampling import LARGEST_SEED


def refusal(model, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(model, None, overrides)
    return str(caught.value)


@pytest.mark.parametrize("model", [AutoencoderTraining, DiffusionTraining])
def test_defaults_survive_yaml(model, tmp_path):
    spec = model()
    (tmp_path / "a.yaml").write_text(dump_yaml(spec))
    assert load_config(model, tmp_path / "a.yaml") == spec


def test_defaults_fit_each_other():
    """`uldm ldm train` takes the autoencoder and the images of `uldm vqvae train`."""
    first = AutoencoderTraining()
    spec = DiffusionTraining(data=first.data)
    spec.check_fit(first.autoencoder, "the default")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.channels=3"], "data.channels=3 (command line): expected 1, the channels of the autoencoder's images"),
        (["data.size=30"], "data.size=30 (command line): expected a multiple of 4, the autoencoder's factor, got 30"),
        (["autoencoder.in_channels=3"], "data.channels: expected 3, the channels of the autoencoder's images, got 1"),
        (["loss.lpips=1", "data.size=28"], "loss.lpips=1 (command line): takes images of 31 pixels or more"),
        (["loss.lpips=1", "loss.lpips_net=vgg", "data.size=12"], "takes images of 16 pixels or more, and data.size is"),
        (["loss.lpips_net=vgg16"], "expected 'alex', 'vgg' or 'squeeze'"),
        (["freeze=encoder"], "freeze=encoder (command line): there is no trained encoder to leave as it is"),
        (
            ["adversarial.discriminator.kernels=[4,4]"],
            "adversarial.discriminator.kernels=[4,4] (command line): expected 4 entries, one a convolution",
        ),
        (
            ["adversarial={}", "data.size=8"],
            "it is too deep for images of 8 pixels: its layers would make sides of 4, 2, 1, 0. Give it fewer channels",
        ),
        (
            ["adversarial.discriminator.channels=[8,8]", "adversarial.discriminator.kernels=[32,4,1]"],
            "its layers would make sides of 2, 1, 3",
        ),
        (["adversarial.discriminator.channels=[]"], "expected at least 1 item"),
        (["adversarial.loss=wgan"], "expected 'hinge' or 'vanilla'"),
        (["optim.lr=0"], "optim.lr=0 (command line): expected a number greater than 0"),
        (["optim.lr=NaN"], "optim.lr=NaN (command line): expected a finite number"),
        (["optim.betas=[0.9,1]"], "optim.betas.1: expected a number less than 1, got 1"),
        (["optim.clip_norm=Infinity"], "expected a finite number"),
        ([f"train.seed={LARGEST_SEED + 1}"], f"expected a number of at most {LARGEST_SEED}"),
        (["train.steps=0"], "train.steps=0 (command line): expected a number greater than 0"),
        (["train.precision=fp8"], "expected 'auto', 'fp32', 'bf16', 'fp16' or 'fp64'"),
        (["train.device=gpu"], "expected auto, cpu, mps, cuda, or cuda:1 and so on"),
        (["train.ema_decay=1"], "expected a number less than 1"),
        (["trian.steps=3"], "unknown key 'trian'. Did you mean 'train'?"),
        (["autoencoder=vqvea"], "unknown autoencoder 'vqvea'. Did you mean 'vqvae'?"),
        (
            ["autoencoder=vqvae", "autoencoder.down_sample=[true]"],
            "autoencoder.down_sample=[true] (command line): expected 2 entries",
        ),
    ],
)
def test_what_an_autoencoder_cannot_be_trained_with(overrides, says):
    assert says in refusal(AutoencoderTraining, *overrides)


def test_the_perceptual_distance_compares_grey_and_colour():
    with pytest.raises(ValidationError, match=r"compares grey or colour images, and data.channels is 4"):
        AutoencoderTraining(
            autoencoder=VQVAE(in_channels=4), data=Images(root="x", channels=4), loss=Loss.model_validate({"lpips": 1})
        )


def test_the_smallest_images_of_the_perceptual_networks_are_the_cores():
    from uldm_cli.core.lpips import BACKBONES

    assert {name: backbone.smallest for name, backbone in BACKBONES.items()} == LPIPS_SIDES


@pytest.mark.parametrize(
    ("channels", "strides", "field"),
    [((64,), [2, 1], 10), ((64, 128, 256), [2, 2, 2, 1], 46), ((64, 128, 256, 512), [2, 2, 2, 1, 1], 70)],
)
def test_a_discriminator_by_its_channels_alone(channels, strides, field):
    """Three layers halve the size, the published way; the sides foretold are those that come out."""
    import torch

    spec = Discriminator(channels=channels)
    assert [stride for _, stride, _ in spec.convolutions] == strides
    built = spec.build(3)
    assert built.receptive_field == field
    assert built(torch.zeros(1, 3, 64, 64)).shape[2] == spec.sides(64)[-1]


def test_an_adversarial_part_is_off_until_something_of_it_is_set():
    assert AutoencoderTraining().adversarial is None
    spec = load_config(AutoencoderTraining, None, ["adversarial.start=50", "adversarial.loss=vanilla"])
    assert spec.adversarial is not None
    built = spec.adversarial.build(1)
    assert (built.start, built.loss, built.adaptive, built.weight) == (50, "vanilla", True, 0.5)
    assert built.discriminator.main[0].in_channels == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("scale_factor=0", "scale_factor=0 (command line): expected a number greater than 0"),
        ("scale_factor=Infinity", "scale_factor=Infinity (command line): expected a finite number"),
        ("target=noise", "expected 'eps', 'x0' or 'v'"),
        ("backbone.attention_resolutions=[3]", "expected some of the levels' factors, [1, 2]"),
        ("sample.smapler=ddim", "sample: smapler: unknown key 'smapler' (value 'ddim'). Did you mean 'sampler'?"),
        ("sample.num=0", "expected a number of at least 1, got 0"),
        ('sample={"sampler": "heun2"}', "unknown sampler 'heun2'"),
        ("loss.norm=huber", "loss.norm=huber (command line): expected 'l2' or 'l1'"),
        ("loss.weighting=snr", "expected 'simple' or 'min-snr'"),
        ("loss.gamma=0", "loss.gamma=0 (command line): expected a number greater than 0"),
        ("schedule.zero_terminal_snr=true", "target: with schedule.zero_terminal_snr the last timestep is nothing but"),
        ("init_from=", "init_from= (command line): expected"),
        ("train.ema_profiles=[0.05,0.3]", "train.ema_profiles.1: expected a number of at most 0.28, got 0.3"),
    ],
)
def test_what_a_diffusion_model_cannot_be_trained_with(override, says):
    assert says in refusal(DiffusionTraining, override)


def test_min_snr_weighs_squared_errors():
    said = refusal(DiffusionTraining, "loss.norm=l1", "loss.weighting=min-snr")
    assert (
        said
        == "loss.weighting=min-snr (command line): min-snr weighs squared errors, and norm is l1. Take l2, or simple"
    )


@pytest.mark.parametrize("target", ["x0", "v"])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_every_schedule_can_end_without_signal(kind, target):
    overrides = [f"schedule={kind}", "schedule.zero_terminal_snr=true", f"target={target}"]
    schedule = load_config(DiffusionTraining, None, overrides).schedule.build()
    assert (schedule.alpha(999), schedule.sigma(999)) == (0, 1)


def test_a_sigmoid_falls():
    said = refusal(DiffusionTraining, "schedule=sigmoid", "schedule.start=3", "schedule.end=1")
    assert said == "schedule.end=1 (command line): expected a number greater than start (3), got 1"


def test_the_model_that_a_training_begins_with_is_known_first(tmp_path):
    (tmp_path / "a.yaml").write_text("kind: ldm-train\ninit_from: mine\nnonsense: 3\n")
    assert init_reference(None, ["train.steps=3"], None) is None
    assert init_reference(tmp_path / "a.yaml", [], None) == "mine"
    assert init_reference(tmp_path / "a.yaml", ["train.steps=3", "init_from=yours"], None) == "yours"
    assert init_reference(tmp_path / "a.yaml", ["init_from=yours"], "theirs") == "theirs"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["backbone.use_spatial_transformer=true", "backbone.context_dim=8"], "backbone: it takes a context, and"),
        (["backbone.num_classes=10"], "backbone: it takes a label, and"),
    ],
)
def test_training_gives_no_conditions(overrides, says):
    said = refusal(DiffusionTraining, *overrides)
    assert f"{says} training gives none yet" in said
    assert said.endswith("Train one without")


def test_an_error_in_a_file_names_its_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("kind: vqvae-train\nautoencoder:\n  kind: vqvae\n  in_channels: 1\n  mid_channels: [64, 128]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(AutoencoderTraining, path)
    assert str(caught.value) == (
        f"{path}:5: autoencoder.mid_channels: expected a list that begins and ends with 128, "
        "the last of down_channels, got [64, 128]"
    )


@pytest.mark.parametrize(
    ("data", "says", "hint"),
    [
        (
            Tiny(channels=3),
            "data.channels: expected 1, the channels of the",
            "Set data.channels=1, or take an autoencoder with in_channels=3",
        ),
        (
            Tiny(size=30),
            "data.size: expected a multiple of 4, the autoencoder's",
            "Change data.size, or the autoencoder",
        ),
        (
            Tiny(size=28),
            "backbone: its levels need latents whose side is a multiple of 2, and these are 7x7",
            "Use fewer levels, or a data.size that 8 divides",
        ),
    ],
)
def test_images_that_a_trained_autoencoder_or_the_backbone_cannot_take(data, says, hint):
    with pytest.raises(ConfigError) as caught:
        DiffusionTraining(data=data).check_fit(VQVAE(in_channels=1), "mine")
    assert caught.value.message.startswith(says)
    assert caught.value.message.endswith("(the autoencoder is mine)")
    assert caught.value.hint == hint


def test_a_model_tells_what_it_was_trained_on():
    data = Images(root="photos", size=32)
    training = AutoencoderTraining(autoencoder=VQVAE(), data=data).model_dump(mode="json")
    assert data_of(training, "mine") == data
    assert data_of({}, "mine") is None


def test_images_of_a_newer_version_are_told():
    with pytest.raises(ConfigError) as caught:
        data_of({"data": {"kind": "webdataset"}}, "mine")
    assert caught.value.message.startswith("the data that mine was trained on: data.kind: unknown dataset 'webdataset'")


def test_specs_cannot_be_changed():
    with pytest.raises(ValidationError):
        AutoencoderTraining().train.steps = 3
