"""The `.ckpt` that uldm writes: PyTorch reads it, it takes little memory, and it is whole or not there."""

import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.compvis.pickled import write_pickle
from uldm_cli.formats.tensors import TensorRef

State = dict[str, Tensor]


def same(a: State, b: State) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


TENSORS = {
    "f32": torch.arange(12.0).reshape(3, 4),
    "f16": torch.ones(5, dtype=torch.float16),
    "bf16": torch.ones(2, 2, dtype=torch.bfloat16),
    "i64": torch.arange(3),
    "bool": torch.tensor([True, False]),
    "u8": torch.tensor(7, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
}


def test_what_is_written_is_what_pytorch_reads(tmp_path: Path) -> None:
    refs = {name: TensorRef.of(value) for name, value in TENSORS.items()}
    content = {"state_dict": refs | {"again": refs["f32"]}, "step": 3}
    for name in ("a.ckpt", "b.ckpt"):
        write_pickle(tmp_path / name, content)
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()
    assert zipfile.ZipFile(tmp_path / "a.ckpt").testzip() is None
    for mapped in (False, True):
        found = torch.load(tmp_path / "a.ckpt", weights_only=True, mmap=mapped)
        assert found["step"] == 3
        assert same(found["state_dict"], TENSORS | {"again": TENSORS["f32"]})
        assert found["state_dict"]["again"].data_ptr() == found["state_dict"]["f32"].data_ptr()
    with (tmp_path / "a.ckpt").open("rb") as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():  # the bytes of every member begin where they can be mapped
            file.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (info.header_offset + 30 + name + extra) % 64 == 0


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[Any] = []

    def read() -> Tensor:
        assert sum(reference() is not None for reference in alive) <= 1  # the last one goes when the next is there
        value = torch.zeros(1000)
        alive.append(weakref.ref(value.untyped_storage()))
        return value

    write_pickle(tmp_path / "model.ckpt", {f"t{n}": TensorRef((1000,), "F32", read) for n in range(5)})
    assert len(alive) == 5


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_text("before")

    def gone() -> Tensor:
        raise OSError(5, "Input/output error")

    with pytest.raises(UldmError, match=f"{path} cannot be written"):
        write_pickle(path, {"a": TensorRef.of(torch.ones(3)), "b": TensorRef((1,), "F32", gone)})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_types_that_such_a_file_cannot_hold(tmp_path: Path) -> None:
    ref = TensorRef.of(torch.ones(3).to(torch.float8_e5m2))
    with pytest.raises(ConfigError, match=r"F8_E5M2\. Convert with another --dtype"):
        write_pickle(tmp_path / "model.ckpt", {"a": ref})
    assert not list(tmp_path.iterdir())
