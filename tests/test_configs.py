"""Every file in configs/: valid, passes a dry run as its head says, trains a step at reduced size, and is in the docs.

The files are found by glob, so that none is forgotten. Data are a few images in the layout of each set.
"""

import json
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import save
from uldm_cli.runs import ldm_train, zoo
from uldm_cli.runs.configs import config_class, resolve_config
from uldm_cli.runs.metrics import read_lines
from uldm_cli.runs.models import planned_autoencoder
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.models import AutoencoderModel
from uldm_cli.specs.yamlfile import read_yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PAGE = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
FILES = sorted(path for path in CONFIGS.rglob("*") if path.is_file())

ONE_STEP = (
    *("train.steps=1", "train.batch_size=2", "train.workers=0", "train.device=cpu", "train.precision=fp32"),
    *("optim.warmup_steps=0", "optim.spike=null"),
)
LAYOUTS = {"mnist": "idx", "fashion-mnist": "idx", "cifar10": "cifar"}  # of all other sets: folders of files

Run = Callable[..., tuple[int, str, str]]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(CONFIGS).as_posix())
each_ldm = pytest.mark.parametrize("name", [entry.name for entry in zoo.entries() if entry.task == "unconditional"])
each_autoencoder = pytest.mark.parametrize(
    "name", [entry.name for entry in zoo.entries() if entry.kind == "autoencoder"]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs, or parts of some, in each layout."""
    root = tmp_path_factory.mktemp("data")
    with Image.open(ROOT / "docs" / "models" / "fruits64_samples.png") as picture:
        parts = [np.asarray(picture.convert("RGB").crop((x, 0, x + 64, 64))) for x in range(0, 384, 64)]
    for folder in ("files/n01440764", "idx", "cifar"):
        (root / folder).mkdir(parents=True)
    for i, part in enumerate(parts):
        Image.fromarray(part).save(root / f"files/n01440764/{i}.png")
    grey = np.stack([part[::2, ::2, 0][:28, :28] for part in parts])
    (root / "idx/train-images-idx3-ubyte").write_bytes(idx(grey))
    (root / "idx/train-labels-idx1-ubyte").write_bytes(idx(np.zeros(len(parts), np.uint8)))
    records = b"".join(b"\0" + part[::2, ::2].transpose(2, 0, 1).tobytes() for part in parts)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (root / f"cifar/{name}.bin").write_bytes(records)
    return root


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


@pytest.fixture(autouse=True)
def _machine(empty_folder: Path, fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh one: a folder with the configs and nothing else, nothing pulled, no network."""
    (empty_folder / "configs").symlink_to(CONFIGS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_folder / "cache"))
    monkeypatch.setenv("ULDM_OFFLINE", "1")


def spec_of(file: Path) -> AutoencoderTraining | DiffusionTraining:
    spec = resolve_config(str(file))
    assert isinstance(spec, AutoencoderTraining | DiffusionTraining)
    return spec


def command_of(file: Path) -> list[str]:
    """The arguments of the first command in a file's head."""
    [command, *_] = re.findall(r"^#   uldm (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(command)


def root_for(spec: AutoencoderTraining | DiffusionTraining, data: Path) -> str:
    assert spec.data is not None
    return f"data.root={data / LAYOUTS.get(spec.data.kind, 'files')}"


# What the files say


@each
def test_head(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    kind = read_yaml(file)[0]["kind"]
    schema = lines[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / schema).resolve() == ROOT / "docs" / "schema" / f"{kind}.json"
    assert (file.parent / schema).is_file()
    group, verb, path, *overrides = command_of(file)
    assert (f"{group}-{verb}", path) == (kind, name_of(file))
    assert type(resolve_config(str(file), overrides)) is config_class(kind)
    assert max(map(len, lines)) <= 120


@each
def test_every_model_and_file_that_a_head_names_is_there(file: Path) -> None:
    head = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    for name in re.findall(r"zoo:([\w-]+)|zoo pull ([\w-]+)", head):
        zoo.entry("".join(name))
    for sibling in re.findall(r"\b((?:vqvae|ldm)\.yaml) beside", head):
        assert (file.parent / sibling).is_file()
    for run in re.findall(r"outputs/(?:vqvae|ldm)-([\w-]+)", head):
        assert run in (file.parent.name, "encode")


@each_autoencoder
def test_published_autoencoders_are_those_of_the_zoo(name: str) -> None:
    spec, entry = resolve_config(str(CONFIGS / "autoencoders" / f"{name}.yaml")), zoo.entry(name)
    planned = planned_autoencoder(f"zoo:{name}")
    assert isinstance(spec, AutoencoderTraining)
    assert planned is not None
    published = planned.model
    assert spec.autoencoder == published.autoencoder  # so that init_from=zoo:NAME works
    assert (spec.train.steps, spec.data.size) == (entry.train_steps, published.image_size)
    assert spec.optim.lr == pytest.approx(4.5e-6 * spec.train.batch_size)
    figures = {key: f"{value:.2f}" for key, value in entry.figures.items()}
    said = "rFID {rfid}, PSNR {psnr} +/- {psnr_std}, PSIM {psim} +/- {psim_std}".format(**figures)
    head = (CONFIGS / "autoencoders" / f"{name}.yaml").read_text(encoding="utf-8")
    assert said in " ".join(head.replace("\n#", " ").split())
    assert "rFID {rfid}, PSNR {psnr}, PSIM {psim}".format(**figures) in PAGE


@each_ldm
def test_published_models_are_those_of_the_zoo(name: str) -> None:
    [file] = [file for file in FILES if f"# The published model {name}:" in file.read_text(encoding="utf-8")]
    spec, known, entry = resolve_config(str(file)), zoo.described(name), zoo.entry(name)
    assert isinstance(spec, DiffusionTraining)
    assert spec.data is not None
    assert spec.backbone.model_dump(mode="json").items() >= known.config["backbone"].items()
    assert spec.schedule.model_dump(mode="json").items() >= known.config["schedule"].items()
    assert spec.target == known.config["target"]
    assert spec.loss.norm == entry.shape.get("loss_type", "l2")
    assert spec.scale_factor == (None if known.scale_by_std else known.config["scale_factor"])
    assert spec.autoencoder == f"zoo:{entry.shape['first_stage']}"
    assert spec.sample["sampler"]["eta"] == entry.sampling["eta"]
    figures = {key: f"{value:.2f}" for key, value in entry.figures.items()}
    said = "FID {fid}, IS {is}, precision {precision}, recall {recall}".format(**figures)
    assert said in " ".join(file.read_text(encoding="utf-8").replace("\n#", " ").split())
    assert said in PAGE


# A dry run of what the head says


@each
def test_dry_run(file: Path, data: Path, uldm_main: Run) -> None:
    spec = spec_of(file)
    group, verb, _, *_ = command_of(file)
    code, out, err = uldm_main(group, verb, file, root_for(spec, data), "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    name = file.parent.name if file.stem == group else file.stem
    assert told["outdir"] == f"outputs/{group}-{name}"
    assert not Path(told["outdir"]).exists()
    assert told["images"] == (30 if spec.data and spec.data.kind == "cifar10" else 6)
    row = next(line for line in PAGE.splitlines() if f"[`{name_of(file).removeprefix('configs/')}`]" in line)
    assert f" {told['parameters']:,} " in row, (
        f"docs/configs.md has another number of parameters than {told['parameters']:,}"
    )


def test_a_model_of_the_zoo_that_is_not_here_is_planned_with_but_not_trained_on(data: Path, uldm_main: Run) -> None:
    command = ("ldm", "train", CONFIGS / "ffhq256" / "ldm.yaml", f"data.root={data / 'files'}")
    code, out, _ = uldm_main(*command, "--dry-run")
    assert code == 0
    assert "zoo:vq-f4, not on this machine yet: uldm convert zoo pull vq-f4" in out
    assert "3 channels of 64x64" in out
    code, out, err = uldm_main(*command)
    assert (code, out) == (2, "")
    assert err == "error: vq-f4 of the zoo is not on this machine. Run: uldm convert zoo pull vq-f4\n"
    assert not Path("outputs").exists()


def test_an_unknown_model_of_the_zoo_or_one_that_does_not_fit_has_no_dry_run(data: Path, uldm_main: Run) -> None:
    command = ("ldm", "train", CONFIGS / "ffhq256" / "ldm.yaml", f"data.root={data / 'files'}", "--dry-run")
    code, _, err = uldm_main(*command, "autoencoder=zoo:vq-f5")
    assert code == 2
    assert err.startswith("error: the zoo has no model 'vq-f5'. Did you mean ")
    code, _, err = uldm_main(*command, "data.size=260")
    assert code == 2
    assert "multiple of 8, and these are 65x65" in err


def test_an_own_autoencoder_comes_first(data: Path, uldm_main: Run) -> None:
    command, root = ("ldm", "train", "configs/mnist/ldm.yaml"), f"data.root={data / 'idx'}"
    code, out, err = uldm_main(*command, root, "--dry-run")
    assert code == 0, err
    assert "configs/mnist/vqvae.yaml, not on this machine yet: uldm vqvae train configs/mnist/vqvae.yaml" in out
    assert "8 channels of 4x4" in out
    code, out, err = uldm_main(*command, root)
    assert (code, out) == (2, "")
    assert err == (
        "error: configs/mnist/vqvae.yaml has not been trained: outputs/vqvae-mnist holds no checkpoint. "
        "Run: uldm vqvae train configs/mnist/vqvae.yaml\n"
    )
    assert not Path("outputs").exists()

    code, _, err = uldm_main("vqvae", "train", "configs/mnist/vqvae.yaml", root, *ONE_STEP)
    assert code == 0, err
    code, out, err = uldm_main(*command, root, "--dry-run")
    assert code == 0, err
    assert re.search(r"configs/mnist/vqvae\.yaml +\n", out)  # as it is trained, no more is said


# A step of training, at reduced width and size


@each
def test_one_step(file: Path, data: Path, uldm_main: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(file)
    monkeypatch.setattr(ldm_train, "MEASURED", 64)
    monkeypatch.setattr(ldm_train, "PICTURE_STEPS", 2)
    smaller = smaller_training(spec, file) if isinstance(spec, AutoencoderTraining) else smaller_diffusion(spec)
    group, verb, *_ = command_of(file)
    code, _, err = uldm_main(group, verb, file, root_for(spec, data), *ONE_STEP, *smaller, "--outdir", "trained")
    assert code == 0, err
    [line] = read_lines(Path("trained/metrics.jsonl"))
    assert "skipped_steps" not in line
    assert line.keys() >= terms_of(spec)
    assert Path("trained/checkpoints/step-00000001/model.safetensors").is_file()


def terms_of(spec: AutoencoderTraining | DiffusionTraining) -> set[str]:
    """What the step must have computed."""
    if isinstance(spec, DiffusionTraining):
        return {"loss"}
    terms = {"l1", "l2", "psnr"}
    if spec.freeze is None:  # else nothing moves the latents
        terms |= {"kl", "logvar"} if spec.autoencoder.kind == "kl" else {"codebook", "commitment"}
    if spec.loss.lpips:
        terms.add("lpips")
    return terms | ({"generator", "d_weight", "discriminator"} if spec.adversarial else set())


def smaller_autoencoder(spec: Any) -> dict[str, object]:
    """Fields of an autoencoder that make it narrow; its levels stay."""
    if spec.kind == "vqvae":
        widths = {name: [8] * len(getattr(spec, name)) for name in ("down_channels", "mid_channels")}
        return {**widths, "norm_channels": 4, "num_heads": 1, "codebook_size": 16}
    width = {"ch": 32, "ch_mult": [1] * len(spec.ch_mult), "num_res_blocks": 1}
    return width | ({"codebook_size": 16} if spec.kind == "vq" else {})


def smaller_training(spec: AutoencoderTraining, file: Path) -> list[str]:
    narrow = {} if spec.init_from else smaller_autoencoder(spec.autoencoder)  # else it is not that of the model
    changes = {f"autoencoder.{name}": value for name, value in narrow.items()}
    if spec.loss.lpips:
        changes |= {"loss.lpips_net": "alex", "loss.lpips_auto_download": False}  # the embedded one
    if spec.adversarial:  # in the first step already
        changes |= {
            "adversarial.start": 0,
            "adversarial.discriminator.channels": [8] * (len(spec.adversarial.discriminator.channels)),
        }
    given = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    for size in range(spec.autoencoder.factor, 257, spec.autoencoder.factor):
        sized = [*given, f"data.size={size}"]
        with suppress(ConfigError):  # too small for the distance, or for the discriminator
            resolve_config(str(file), sized)
            return sized
    raise AssertionError("no size fits")


def smaller_diffusion(spec: DiffusionTraining) -> list[str]:
    """A narrow U-Net of the first two levels, in the latents of an untrained autoencoder like the one that is named."""
    backbone, named = spec.backbone, str(spec.autoencoder)
    kept = [factor for factor in backbone.attention_resolutions if factor <= 2]
    changes = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1], "attention_resolutions": kept}
    given = [f"backbone.{name}={json.dumps(value)}" for name, value in changes.items()]
    given += ["scale_factor=null", "schedule.timesteps=10", "sample={}"]
    if named == "fruits64":
        return [*given, "data.size=8"]
    planned = planned_autoencoder(named)
    assert planned is not None
    whole = planned.model.autoencoder
    small = type(whole).model_validate(whole.model_dump(mode="json") | smaller_autoencoder(whole))
    size = max(8, 2 * small.factor)
    model = AutoencoderModel(autoencoder=small, image_size=size)
    torch.manual_seed(0)
    save(
        Path("small.safetensors"),
        Header("autoencoder", model.model_dump(mode="json")),
        {"model": model.build().state_dict()},
    )
    return [*given, "autoencoder=small.safetensors", f"data.size={size}"]


# The page about them


def test_the_page_names_every_file_and_no_other() -> None:
    named = re.findall(r"^\| \[`([^`]+)`\]\(\.\./configs/([^)]+)\)", PAGE, re.MULTILINE)
    assert all(shown == linked for shown, linked in named)
    assert sorted(shown for shown, _ in named) == [file.relative_to(CONFIGS).as_posix() for file in FILES]
