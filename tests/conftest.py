"""What the tests share: a clean environment, and running `uldm` as a user does."""

import os

# Threads of several processes that share few cores wait for each other most of the time. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import uldm_cli
from uldm_cli import console, registry
from uldm_cli.__main__ import main

# A shell's background jobs ignore Ctrl-C and would hand that on to the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

PACKAGE_PARENT = Path(uldm_cli.__file__).resolve().parent.parent
# Variables that change what uldm prints or finds; a test that is about one sets it itself.
_STEERING = (
    "FORCE_COLOR",
    "LOCAL_RANK",
    "NO_COLOR",
    "RANK",
    "ULDM_DEBUG",
    "ULDM_DISABLE_PLUGINS",
    "ULDM_PLUGINS",
    "WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in _STEERING:
        monkeypatch.delenv(name, raising=False)
    yield
    console.configure()
    registry._plugins.cache_clear()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the device and the precision of a process's first run: those of other tests are forgotten."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def uldm_main(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `uldm ARGS` in this process: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@dataclass(frozen=True)
class Ended:
    """A process that has ended. `code` is its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def uldm(tmp_path: Path) -> Callable[..., Ended]:
    """Run `python -m uldm_cli ARGS` in an empty folder, with `env` added to the environment."""

    def run(*args: str, env: dict[str, str] | None = None, cwd: Path = tmp_path, python: tuple[str, ...] = ()) -> Ended:
        command = [sys.executable, *python, "-m", "uldm_cli", *args]
        environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)} | (env or {})
        ended = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture(scope="session")
def tiny_ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a very small latent diffusion model of 32x32 colour images, its weights random but fixed.

    Nothing in it is zero, so that whatever goes wrong with a step shows in the images. It has 100 timesteps, and EMA
    weights that differ from the raw ones.
    """
    import torch

    from uldm_cli.formats.checkpoint import Header
    from uldm_cli.formats.native import save
    from uldm_cli.specs.models import LatentDiffusionModel

    config = {
        "autoencoder": {
            "kind": "vqvae",
            "down_channels": [8, 8, 8],
            "mid_channels": [8, 8],
            "norm_channels": 4,
            "num_down_layers": 1,
            "num_up_layers": 1,
            "num_heads": 1,
            "codebook_size": 64,
        },
        "image_size": 32,
        "backbone": {
            "kind": "unet",
            "model_channels": 32,
            "channel_mult": [1, 1],
            "num_res_blocks": 1,
            "attention_resolutions": [2],
        },
        "schedule": {"kind": "scaled_linear", "timesteps": 100},
        "target": "eps",
        "scale_factor": 1.0,
    }
    model = LatentDiffusionModel.model_validate(config)
    module = model.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    ema = module.denoiser.backbone.state_dict()
    raw = {key: 0.9 * value for key, value in ema.items()}
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    parts = {"autoencoder": module.autoencoder.state_dict(), "backbone": raw, "ema": ema}
    save(path, Header("latent-diffusion", model.model_dump(mode="json"), step=3), parts)
    return path


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`golden_checkpoint(family)` is the `model.ckpt` of a model in tests/golden/compvis, `config.yaml` beside it."""
    import runpy

    golden = Path(__file__).parent / "golden"
    write_model = runpy.run_path(str(golden / "weights.py"))["write_model"]

    @cache
    def make(family: str) -> Path:
        return write_model(golden / "compvis" / family, tmp_path_factory.mktemp(family))

    return make


class Server(ThreadingHTTPServer):
    """A real one on the loopback interface. It serves `content` under any path; the path's name says how."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = bytes(range(256)) * 4000
        self.headers: dict[str, str] = {}  # added to every answer, such as ETag
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.breaks = 0  # how many more answers end early

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        if self.path == "/gone":
            return self.send_error(404)
        if self.path.startswith("/to?"):
            return self.redirect(self.path.removeprefix("/to?"))
        body = b"x" * len(self.server.content) if self.path == "/wrong" else self.server.content
        start = self.start(wanted)
        if start > len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start and self.path != "/no-content-range":
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.path == "/page":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        end = len(body)
        if self.server.breaks or self.path == "/always-breaks":
            self.server.breaks = max(self.server.breaks - 1, 0)
            end = start + (len(body) - start) // 2 if self.path != "/always-breaks" else start
        self.wfile.write(body[start:end])

    def start(self, wanted: str | None) -> int:
        """Where the answer begins: at the range that is wanted, unless that is of another version of the file."""
        only_if = self.headers["If-Range"]
        if not wanted or self.path == "/no-ranges":
            return 0
        if only_if and only_if not in self.server.headers.values() and self.path != "/ignores-if-range":
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("ULDM_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    console.configure(quiet=True)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    console.configure()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
