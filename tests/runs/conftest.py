"""What the tests of training runs share: very small trainings, and how to run, stop and compare them."""

import multiprocessing
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import save
from uldm_cli.runs import ldm_train, vqvae_train
from uldm_cli.runs.metrics import Means, read_lines
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.encoding import Encoding
from uldm_cli.specs.load import dump_yaml
from uldm_cli.specs.models import AutoencoderModel

Spec = AutoencoderTraining | DiffusionTraining


class Training:
    """The fixture `training`: what is known of the small trainings, and what can be done with them."""

    STEPS = 20
    BATCH = 8
    IMAGES = 20

    @staticmethod
    def run(spec: Spec, folder: Path, *, resume: bool = False):
        """The run of a config in this process."""
        if isinstance(spec, AutoencoderTraining):
            return vqvae_train.run(vqvae_train.plan(spec, folder, None, resume=resume))
        return ldm_train.run(ldm_train.plan(spec, folder, None, resume=resume))

    def interrupt(self, spec: Spec, folder: Path, step: int) -> None:
        """A run in whose given step somebody pressed Ctrl-C."""
        with self.signalled(step), pytest.raises(KeyboardInterrupt):
            self.run(spec, folder)

    @staticmethod
    @contextmanager
    def signalled(step: int) -> Iterator[None]:
        """Inside, Ctrl-C is pressed in the given step of a run."""
        steps = iter(range(1, step + 1))

        def add(self, logs, add=Means.add):
            if next(steps, None) == step:
                signal.raise_signal(signal.SIGINT)
            add(self, logs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Means, "add", add)
            yield

    @staticmethod
    def steps_saved(folder: Path) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))

    @staticmethod
    def lines_written(folder: Path) -> int:
        metrics = folder / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    @staticmethod
    def outcome(folder: Path) -> dict[str, object]:
        """What a run made, for comparison: bytes of the files, and the metrics without the rates.

        A file that was being written when its process was killed keeps its temporary name, and is left out.
        """
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
        found: dict[str, object] = {
            str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "metrics.jsonl"
        }
        lines = read_lines(folder / "metrics.jsonl")
        timed = ("images_per_second", "data_wait")
        found["metrics"] = [{k: value for k, value in line.items() if k not in timed} for line in lines]
        return found


# Forked from one that has imported torch, which would take each of them seconds.
PROCESSES = multiprocessing.get_context("forkserver")
CORE = ("uldm_cli.core.autoencoding", "uldm_cli.core.diffusing", "uldm_cli.core.engine")
PROCESSES.set_forkserver_preload(["uldm_cli.cli.app", *CORE, "PIL.PngImagePlugin"])
COMMANDS = {
    AutoencoderTraining: ("vqvae", "train"),
    DiffusionTraining: ("ldm", "train"),
    Encoding: ("vqvae", "encode"),
}
MAIN = """
import multiprocessing, os, sys
from uldm_cli.__main__ import main
os.environ.update(environment)
os.setsid()
multiprocessing.set_start_method("fork", force=True)  # else its readers had a server of their own, and outlived it
log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
exec(before)
sys.exit(main(args))
"""


class Process:
    """A run by the command line, in a process of its own, which may be one of several.

    Args:
        spec: what is run.
        folder: the run's.
        environment: as a launcher sets it.
        before: code that is run before it.
    """

    def __init__(
        self, spec: Spec | Encoding, folder: Path, environment: dict[str, str] | None = None, before: str = ""
    ) -> None:
        self.folder, self.log = folder, folder.with_suffix(f".log{(environment or {}).get('RANK', '')}")
        config = folder.with_suffix(".yaml")
        config.write_text(dump_yaml(spec))
        command = COMMANDS[type(spec)]
        given = {"args": [*command, str(config), "--outdir", str(folder)], "environment": environment or {}}
        self.process = PROCESSES.Process(target=exec, args=(MAIN, given | {"path": str(self.log), "before": before}))
        self.process.start()

    def wait_for_lines(self, count: int) -> None:
        """Until it has written so many lines of metrics."""
        end = time.monotonic() + 120
        while Training.lines_written(self.folder) < count:
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, "the process hangs"
            time.sleep(0.002)

    def kill(self) -> None:
        self.process.kill()
        assert self.exit_code() == -signal.SIGKILL

    def exit_code(self) -> int | None:
        self.process.join(100)
        return self.process.exitcode


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Starts processes, as `Process` says, of which none outlives the test."""
    started = []

    def begin(*args, **options) -> Process:
        started.append(Process(*args, **options))
        return started[-1]

    yield begin
    for process in started:
        process.process.kill()


@pytest.fixture
def finish() -> Callable[[list[Process]], None]:
    """Waits for processes, which end well."""

    def wait(processes: list[Process]) -> None:
        for process in processes:
            assert process.exit_code() == 0, process.log.read_text()

    return wait


@pytest.fixture
def start_two(start: Callable[..., Process]) -> Callable[..., list[Process]]:
    """Starts a run in two processes, as torchrun does it."""

    def begin(spec: Spec | Encoding, folder: Path, before: str = "", **environment: str) -> list[Process]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= environment
        return [start(spec, folder, place | {"RANK": rank, "LOCAL_RANK": rank}, before) for rank in ("0", "1")]

    return begin


@pytest.fixture
def training(fresh_accelerate: None) -> Training:
    return Training()


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Inside `largest_file(size)`, writing more than so many bytes to a file fails, as on a disk that is full."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small coloured images, of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(Training.IMAGES):
        pixels = np.kron(generator.integers(0, 255, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def vqvae(photos: Path) -> Callable[..., AutoencoderTraining]:
    """Makes configs: `vqvae(steps=3)`."""

    def make(**train: object) -> AutoencoderTraining:
        return small_autoencoder({"kind": "images", "root": str(photos), "size": 16, "flip": True}, **train)

    return make


@pytest.fixture
def grey_vqvae() -> Callable[..., AutoencoderTraining]:
    """As `vqvae`, of the embedded grey images, with the perceptual loss."""

    def make(**train: object) -> AutoencoderTraining:
        return small_autoencoder({"kind": "tiny"}, channels=1, lpips=0.5, **train)

    return make


@pytest.fixture
def gan(vqvae: Callable[..., AutoencoderTraining]) -> Callable[..., AutoencoderTraining]:
    """As `vqvae`, with a discriminator that starts in the fifth step, and a learned log-variance."""

    def make(**train: object) -> AutoencoderTraining:
        loss, adversarial = {"loss": {"logvar": 0.1}}, {"adversarial": small_adversarial(start=4)}
        return AutoencoderTraining.model_validate({**vqvae(**train).model_dump(), **loss, **adversarial})

    return make


@pytest.fixture
def kl(photos: Path) -> Callable[..., AutoencoderTraining]:
    """A KL autoencoder with a discriminator from the first step."""

    def make(**train: object) -> AutoencoderTraining:
        shape = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 8, "z_channels": 2}
        data = {"kind": "images", "root": str(photos), "size": 8, "flip": True}
        config = {"autoencoder": {"kind": "kl", **shape}, "data": data, "adversarial": small_adversarial(start=0)}
        return AutoencoderTraining.model_validate({**config, **_common(train)})

    return make


@pytest.fixture(scope="module")
def autoencoder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished autoencoder's run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("autoencoder")
    Training.run(small_autoencoder({"kind": "images", "root": str(photos), "size": 16, "flip": True}), folder)
    return folder


@pytest.fixture(scope="session")
def kl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small autoencoder of images of 16 pixels, with posteriors of some width."""
    kind = {"kind": "kl", "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 16}
    model = AutoencoderModel.model_validate({"autoencoder": kind, "image_size": 16})
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("kl") / "kl.safetensors"
    save(path, Header("autoencoder", model.model_dump(mode="json")), {"model": model.build().state_dict()})
    return path


@pytest.fixture
def ldm(autoencoder: Path) -> Callable[..., DiffusionTraining]:
    """Makes configs with dropout, whose draws are the only ones from a generator that has a state."""

    def make(**train: object) -> DiffusionTraining:
        network = {"kind": "unet", "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "dropout": 0.3}
        backbone = {"backbone": {**network, "attention_resolutions": [1]}}
        config = {"autoencoder": str(autoencoder), "schedule": {"kind": "scaled_linear", "timesteps": 20}, **backbone}
        return DiffusionTraining.model_validate({**config, **_common(train)})

    return make


def small_autoencoder(
    data: dict[str, object], channels: int = 3, lpips: float = 0.0, **train: object
) -> AutoencoderTraining:
    widths = {"down_channels": [8, 8], "mid_channels": [8, 8], "down_sample": [True], "attn_down": [False]}
    counts = {"num_down_layers": 1, "num_up_layers": 1, "num_heads": 1, "norm_channels": 4, "codebook_size": 16}
    model = {"kind": "vqvae", "in_channels": channels, **widths, **counts}
    config = {"autoencoder": model, "data": data, "loss": {"lpips": lpips}, **_common(train)}
    return AutoencoderTraining.model_validate(config)


def small_adversarial(start: int) -> dict[str, object]:
    return {"start": start, "warmup_steps": 4, "discriminator": {"channels": [4, 8]}}


def _common(train: dict[str, object]) -> dict[str, object]:
    """`log_every` divides neither `save_every` nor `steps`: the means between two lines must survive, too."""
    settings = {"steps": Training.STEPS, "batch_size": Training.BATCH, "workers": 0}
    machine = {"device": "cpu", "precision": "fp32"}
    every = {"log_every": 3, "save_every": 5, "picture_every": 10}
    return {"optim": {"warmup_steps": 2}, "train": settings | machine | every | train}
