"""Tensors that are read when asked for, and safetensors files that are written a tensor at a time."""

import gc
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import uldm_cli
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.tensors import ITEM_BYTES, TORCH_NAMES, TensorRef, open_safetensors, write_safetensors

DTYPES = [getattr(torch, name) for name in TORCH_NAMES.values()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def of_every_type() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        tensors[f"{dtype}.matrix"] = (3 * torch.randn(3, 5)).abs().to(dtype)
        tensors[f"{dtype}.number"] = torch.tensor(1).to(dtype)
        tensors[f"{dtype}.empty"] = torch.empty(0, 3, dtype=dtype)
    tensors |= {"transposed": torch.randn(4, 5).t(), "part": torch.randn(10)[2:5], "repeated": torch.ones(1).expand(7)}
    return tensors | {
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "grad": torch.ones(2).requires_grad_(),
    }


def test_the_formats_own_library_reads_what_is_written(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", of_every_type()
    write_safetensors(path, tensors, {"format": "pt"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert same_bits(read[name], value.detach().resolve_conj()), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_formats_own_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {name: value.detach().resolve_conj().clone().contiguous() for name, value in of_every_type().items()}
    save_file(tensors, path, {"a": "b"})
    metadata, refs = open_safetensors(path)
    assert metadata == {"a": "b"}
    for name, value in tensors.items():
        assert same_bits(refs[name].read(), value), name
        assert refs[name].nbytes == value.numel() * value.element_size()


def test_every_element_begins_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1), "c": torch.ones(1).double()}, {})
    content = path.read_bytes()
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0
    assert content.endswith(struct.pack("<df3b", 1, 1, 1, 1, 1))


def test_tensor_at_an_odd_place_is_read(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\7" + struct.pack("<2f", 1.5, -2))
    refs = open_safetensors(path)[1]
    assert refs["a"].read().tolist() == [7]
    assert refs["b"].read().tolist() == [1.5, -2]


def test_writing_to_what_was_read_leaves_the_file_be(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(4)}, {})
    before = path.read_bytes()
    open_safetensors(path)[1]["a"].read().add_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("metadata", [{"a": 1}, [], "text", None])
def test_metadata_are_texts(metadata: object, tmp_path: Path) -> None:
    import json

    text = json.dumps({"__metadata__": metadata}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ConfigError, match="is not a safetensors file, or its start is damaged"):
        open_safetensors(path)


def test_a_tensor_can_be_changed_as_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3)}, {})
    changed = open_safetensors(path)[1]["a"].map((3, 2), lambda x: x.t() + 1)
    assert (changed.shape, changed.dtype, changed.nbytes) == ((3, 2), "F32", 24)
    assert changed.read().tolist() == [[1, 4], [2, 5], [3, 6]]
    write_safetensors(path, {"b": changed}, {})  # over the file that it reads
    assert load_file(path)["b"].tolist() == [[1, 4], [2, 5], [3, 6]]


def test_file_that_changes_between_header_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)}, {})
    ref = open_safetensors(path)[1]["a"]
    write_safetensors(path, {"a": torch.ones(40)}, {})
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} changed while it was being read"):
        ref.read()
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        ref.read()


def test_source_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)}, {})
    before = path.read_bytes()

    def fails() -> Tensor:
        raise UldmError("the source went away")

    with pytest.raises(UldmError, match="the source went away"):
        write_safetensors(path, {"a": torch.zeros(4), "b": TensorRef((2,), "F32", fails)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the system's list of open files")
def test_many_tensors_hold_few_files_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {str(i): torch.full((3,), float(i)) for i in range(2000)}, {})
    before = len(os.listdir("/proc/self/fd"))
    tensors = {name: ref.read() for name, ref in open_safetensors(path)[1].items()}
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert all(value.eq(float(name)).all() for name, value in tensors.items())
    del tensors
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


STREAMED = """
import resource, sys
from pathlib import Path
import torch
from uldm_cli.formats.tensors import TensorRef, open_safetensors, write_safetensors

path, copy = Path(sys.argv[1]), Path(sys.argv[2])
big = TensorRef((4_000_000,), "F32", lambda: torch.ones(4_000_000))
write_safetensors(path, {"first": big}, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(path, {str(i): big for i in range(12)}, {})  # 192 MB
write_safetensors(copy, open_safetensors(path)[1], {})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_memory_is_needed_for_a_tensor_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    environment = os.environ | {"PYTHONPATH": str(Path(uldm_cli.__file__).parents[1])}
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # the C library gives memory back at once
    command = [sys.executable, "-c", STREAMED, *map(str, paths)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 60_000  # a tensor or two
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_every_type_has_a_size() -> None:
    assert {name: getattr(torch, kind).itemsize for name, kind in TORCH_NAMES.items()} == ITEM_BYTES
