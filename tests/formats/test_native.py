"""Our own checkpoints: what is read back, what is refused and in which words, and files that stay whole."""

import json
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import uldm_cli
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import load_into, load_tensors, read_header, save
from uldm_cli.formats.tensors import TensorRef, write_safetensors
from uldm_cli.formats.whole import _remove_stale

CONFIG = {"autoencoder": {"kind": "vqvae", "down_channels": [8, 16]}, "image_size": 16, "name": "Grüße"}


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))


def write(path: Path, **changes: Any) -> Path:
    header = Header(**{"kind": "autoencoder", "config": CONFIG, "training": {"lr": 0.5}, "step": 7} | changes)
    raw = model().state_dict()
    average = {name: value + 1 for name, value in raw.items()}
    save(path, header, {"model": raw, "ema": average})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors")


def refused(call: Callable[[], object], path: Path) -> str:
    """The message of the ConfigError that a call must raise: one line that names the file."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert caught.value.exit_code == 2
    return message


def with_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Replaces the JSON at the start of a file by what `edit` makes of it (or does to it)."""
    content = path.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    result = edit(header)
    text = json.dumps(header if result is None else result).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    return path


def test_header_is_read_back(file: Path) -> None:
    header = read_header(file)
    assert (header.kind, header.config, header.training, header.step) == ("autoencoder", CONFIG, {"lr": 0.5}, 7)
    assert header.tensors["model.0.weight"] == (4, 3, 3, 3)
    assert header.tensors["ema.1.num_batches_tracked"] == ()
    assert len(header.tensors) == 2 * 7
    assert header.weights == ("ema", "raw")


@pytest.mark.parametrize(
    ("kind", "parts", "weights"),
    [
        ("autoencoder", ["model"], ("raw",)),
        ("autoencoder", ["ema"], ("ema",)),
        ("latent-diffusion", ["autoencoder", "ema"], ("ema",)),
        ("latent-diffusion", ["autoencoder", "backbone"], ("raw",)),
        ("latent-diffusion", ["backbone", "ema", "autoencoder"], ("ema", "raw")),
        ("latent-diffusion", ["autoencoder"], ()),
    ],
)
def test_weights_that_a_file_holds(kind: str, parts: list[str], weights: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, Header(kind, {}), {part: {"a": torch.zeros(1)} for part in parts})
    assert read_header(path).weights == weights


def test_tensors_are_read_back_bit_for_bit(file: Path) -> None:
    loaded = load_tensors(file, "model.")
    expected = model().state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert load_tensors(file).keys() == {f"{part}.{name}" for part in ("model", "ema") for name in expected}


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4).to(torch.bfloat16),
        torch.randn(3).half(),
        torch.tensor(True),
        torch.arange(5),
        torch.empty(0, 3),
        torch.tensor([float("nan"), float("inf")]),
        torch.randn(3, 4).t(),  # not contiguous
        torch.randn(2, requires_grad=True),
    ],
    ids=["bf16", "fp16", "scalar-bool", "int64", "empty", "nan", "transposed", "grad"],
)
def test_every_type_of_tensor_survives(value: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, Header("autoencoder", {}), {"model": {"a": value}})
    assert read_header(path).tensors == {"model.a": tuple(value.shape)}
    loaded = load_tensors(path, "model.")["a"]
    assert loaded.dtype == value.dtype
    assert torch.equal(loaded.nan_to_num(), value.detach().nan_to_num())


def test_part_is_loaded_into_a_module(file: Path) -> None:
    module = model(seed=1)
    load_into(module, file, "ema")
    torch.testing.assert_close(dict(module.state_dict()), {n: v + 1 for n, v in model().state_dict().items()})


def test_file_without_tensors_is_a_checkpoint_too(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, Header("autoencoder", CONFIG), {})
    assert read_header(path).tensors == {}
    assert load_tensors(path) == {}


def test_header_is_read_without_torch(file: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from uldm_cli.formats.native import read_header\n"
        "print(read_header(Path(sys.argv[1])).step, sorted({'torch', 'numpy', 'safetensors'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(uldm_cli.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(file)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "7 []\n"


def test_truncated_anywhere_is_refused(file: Path) -> None:
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1]:
        file.write_bytes(content[:length])
        message = refused(lambda: read_header(file), file)
        if length >= header:
            assert f"is truncated: {length:,} bytes, and its header tells of {len(content):,}" in message
        refused(lambda: load_tensors(file), file)
        refused(lambda: load_into(model(), file, "model"), file)


def test_bytes_after_the_end_are_refused(file: Path) -> None:
    size = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(b"x")
    message = refused(lambda: read_header(file), file)
    assert f"is damaged: {size + 1:,} bytes, and its header tells of {size:,}" in message
    refused(lambda: load_tensors(file), file)


def png(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, "PNG")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.touch(),
        lambda path: path.write_text("kind: ldm-sample\n"),
        lambda path: path.write_bytes(bytes(1000)),
        lambda path: path.write_bytes(torch.randint(0, 256, (5000,), dtype=torch.uint8).numpy().tobytes()),
        png,
        lambda path: torch.save({"a": torch.zeros(3)}, path),
        lambda path: path.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        lambda path: path.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}"),
        lambda path: path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}"),
        lambda path: path.write_bytes(struct.pack("<Q", 50_000_000) + b"{"),
        lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
        lambda path: path.write_bytes(struct.pack("<Q", 4) + b"null"),
        lambda path: path.write_bytes(struct.pack("<Q", 2) + b"\xff\xfe"),
        lambda path: path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000),
    ],
    ids=[
        *("empty", "text", "zeros", "random", "png", "pickle", "length-2^63", "length-2^64", "length-over-limit"),
        *("length-over-file", "list", "null", "no-utf-8", "deep"),
    ],
)
def test_other_files_are_refused(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.manual_seed(0)
    make(path)
    assert "is not a safetensors file, or its start is damaged" in refused(lambda: read_header(path), path)
    refused(lambda: load_tensors(path), path)


def test_folder_missing_file_and_impossible_names(tmp_path: Path, file: Path) -> None:
    assert "is a folder, not a checkpoint" in refused(lambda: read_header(tmp_path), tmp_path)
    missing = tmp_path / "none.safetensors"
    assert "there is no file" in refused(lambda: read_header(missing), missing)
    for path in (tmp_path / ("x" * 300), file / "inside", tmp_path / "nul\0"):
        refused(lambda path=path: read_header(path), path)
    for path in (tmp_path, missing, tmp_path / ("x" * 300), file / "inside"):
        refused(lambda path=path: load_tensors(path), path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_unreadable_file(file: Path) -> None:
    file.chmod(0)
    assert "Permission denied" in refused(lambda: read_header(file), file)


FIRST = "model.0.weight"


def edited(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[FIRST].__setitem__(name, value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: [header],
        lambda header: header.__setitem__(FIRST, 3),
        lambda header: header.__setitem__(FIRST, None),
        lambda header: header.__setitem__(FIRST, [1, 2]),
        lambda header: header.__setitem__(FIRST, {}),
        lambda header: {name: entry for name, entry in header.items() if name != FIRST},  # leaves a hole
        lambda header: header.__setitem__("twice", header[FIRST]),  # overlaps
        edited("data_offsets", None),
        edited("data_offsets", []),
        edited("data_offsets", [0]),
        edited("data_offsets", [0, 432, 864]),
        edited("data_offsets", ["0", "432"]),
        edited("data_offsets", "ab"),
        edited("data_offsets", {"0": 0, "1": 432}),
        edited("data_offsets", [432, 0]),
        edited("data_offsets", [-432, 0]),
        edited("data_offsets", [0, 2**70]),
        edited("data_offsets", [0, 1e300]),
        edited("data_offsets", [0.0, float("nan")]),
        edited("shape", None),
        edited("shape", "abcd"),
        edited("shape", [4, 3, 3]),
        edited("shape", [4, 3, 3, 3, 0]),
        edited("shape", [-4, -3, 3, 3]),
        edited("shape", [4.0, 3.0, 3.0, 3.0]),
        edited("shape", [2**40, 2**40, 2**40]),
        edited("shape", {"4": 3}),
        edited("dtype", "F64"),
        edited("dtype", "F99"),
        edited("dtype", 32),
        edited("dtype", ["F32"]),
    ],
)
def test_headers_that_contradict_themselves(edit: Callable[[dict[str, Any]], Any], file: Path) -> None:
    with_header(file, edit)
    assert "is not a safetensors file, or its start is damaged" in refused(lambda: read_header(file), file)
    refused(lambda: load_tensors(file), file)
    refused(lambda: load_into(model(), file, "model"), file)


def said(**changes: object) -> dict[str, str]:
    return {"uldm": json.dumps({"kind": "autoencoder", "config": {}, "training": {}, "step": 0} | changes)}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        "text",
        [1],
        {"format": "pt"},
        {"uldm": 3},
        {"uldm": None},
        {"uldm": "no json"},
        {"uldm": "[" * 100_000},
        {"uldm": "[]"},
        {"uldm": "null"},
        {"uldm": "{}"},
        {"uldm": '{"kind": "autoencoder"}'},
        said(kind=3),
        said(kind=["autoencoder"]),
        said(config=[]),
        said(config="x"),
        said(training=None),
        said(step="7"),
        said(step=1.5),
    ],
)
def test_metadata_that_is_not_ours(metadata: object, file: Path) -> None:
    with_header(file, lambda header: header.__setitem__("__metadata__", metadata))
    assert "is a safetensors file, but not a checkpoint of uldm" in refused(lambda: read_header(file), file)


def test_safetensors_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)}, {})
    message = refused(lambda: read_header(path), path)
    assert message.endswith("is a safetensors file, but not a checkpoint of uldm. Name one that `uldm ... train` wrote")


def test_unknown_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", kind="video")
    assert "holds a model of the unknown kind 'video'" in refused(lambda: read_header(path), path)


def test_training_and_step_may_be_left_out(file: Path) -> None:
    text = json.dumps({"kind": "autoencoder", "config": CONFIG})
    with_header(file, lambda header: header["__metadata__"].__setitem__("uldm", text))
    header = read_header(file)
    assert (header.training, header.step) == ({}, 0)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole") / "x.safetensors").read_bytes()


def unless_refused(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it raises a ConfigError, of one line."""
    try:
        return call()
    except ConfigError as e:
        if "\n" in str(e):
            pytest.fail(f"more than one line: {e}")
        return None


@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
@example([(7, 255)])
@example([(6, 1)])
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_corruption_of_the_header_is_answered_in_one_line(
    content: bytes, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    """Either it is refused, or what is read is of the right types and loads."""
    damaged = bytearray(content)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for place, value in changes:
        damaged[place % header] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged)
    read = unless_refused(lambda: read_header(path))
    if read is not None:
        assert isinstance(read.config, dict)
        assert isinstance(read.step, int)
        assert read.weights in ((), ("ema",), ("raw",), ("ema", "raw"))
    unless_refused(lambda: load_into(model(), path, "model"))


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_as_header_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(lambda: read_header(path), path)


def test_tensors_that_differ_are_named_with_both_shapes(file: Path) -> None:
    """The first ten of eleven, in the module's order and then the file's."""
    layers = [nn.Linear(2, 2) for _ in range(4)]
    other = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(4), *layers, nn.Linear(2, 2, bias=False))
    message = refused(lambda: load_into(other, file, "model"), file)
    assert "was made for another config: 11 tensors differ, first " in message
    assert "model.0.weight is [4, 3, 3, 3] in the file and [5, 3, 3, 3] by the config; " in message
    assert "model.2.weight is missing in the file and [2, 2] by the config; " in message
    assert "model.6.weight is missing in the file and [2, 2] by the config. " in message
    assert message.count("in the file") == 10
    assert "0.bias" not in message


def test_tensor_too_many_is_named(file: Path) -> None:
    message = refused(lambda: load_into(model()[:1], file, "model"), file)
    assert "5 tensors differ, first model.1." in message
    assert " is [4] in the file and missing by the config" in message
    assert message.count("in the file") == 5


def test_a_module_that_does_not_fit_is_left_as_it_was(file: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    refused(lambda: load_into(other, file, "model"), file)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_part_that_is_not_there(file: Path) -> None:
    message = refused(lambda: load_into(model(), file, "backbone"), file)
    assert "backbone.0.weight is missing in the file and [4, 3, 3, 3] by the config" in message


def test_saving_replaces_and_leaves_nothing_else(file: Path) -> None:
    write(file, step=8)
    assert read_header(file).step == 8
    assert os.listdir(file.parent) == [file.name]
    (file.parent / "y").touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((file.parent / "y").stat().st_mode)


FULL = """
import resource, sys
from pathlib import Path
import torch
from uldm_cli.errors import UldmError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import save

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may grow beyond, as on a disk that is full
try:
    save(Path(sys.argv[1]), Header("autoencoder", {}), {"model": {"a": torch.zeros(100_000)}})
except UldmError as e:
    print(e.exit_code, e)
"""


def test_full_disk_leaves_the_old_file(file: Path) -> None:
    before = file.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(Path(uldm_cli.__file__).parents[1])}
    command = [sys.executable, "-c", FULL, str(file)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    code, message = ended.stdout.split(" ", 1)
    assert code == "1"
    assert message.startswith(f"disk full while writing {file}")
    assert "What was saved before is whole" in message
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import save

os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
save(Path(sys.argv[1]), Header("autoencoder", {}), {"model": {"a": torch.zeros(100)}})
"""


def test_killed_while_saving_leaves_the_old_file_and_a_later_save_clears_up(file: Path) -> None:
    before = file.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(Path(uldm_cli.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(file)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert file.read_bytes() == before
    [left] = set(file.parent.iterdir()) - {file}
    an_hour_ago = left.stat().st_mtime - 3700
    os.utime(left, (an_hour_ago, an_hour_ago))
    _remove_stale.cache_clear()  # a process looks once: this stands for the next one
    write(file)
    assert os.listdir(file.parent) == [file.name]


def test_failure_in_between_removes_the_temporary_file(file: Path) -> None:
    """A value that has no place in a file is a bug of the caller, and is raised as it is."""
    before = file.read_bytes()
    whole, half = torch.zeros(4), TensorRef((4,), "F32", lambda: torch.zeros(2))
    with pytest.raises(ValueError, match=r"b was to be F32 \(4,\), and is torch.float32 \(2,\)"):
        write_safetensors(file, {"a": whole, "b": half}, {})
    with pytest.raises(TypeError, match=r"cannot hold torch[.]complex128"):
        save(file, Header("autoencoder", {}), {"model": {"a": torch.zeros(4, dtype=torch.complex128)}})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("a file")], ids=["missing", "a-file"])
def test_folder_that_cannot_be_written_to(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "folder")
    path = tmp_path / "folder" / "x.safetensors"
    with pytest.raises(UldmError, match="cannot be written") as caught:
        write(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists()
