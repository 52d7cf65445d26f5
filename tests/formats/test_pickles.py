"""Checkpoints of PyTorch give the tensors that PyTorch itself reads from them, and tell what was left out."""

import argparse
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import uldm_cli
from uldm_cli.errors import ConfigError
from uldm_cli.formats.pickles import Pickle, open_pickle, sniff

FORMATS = {"zip": True, "legacy": False}
FAMILIES = ["uncond-vq", "uncond-kl", "class-cond", "inpaint", "superres", "text", "layout", "semantic", "rdm"]
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


@pytest.fixture(params=FORMATS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def saved(tmp_path: Path, layout: str) -> Callable[..., Pickle]:
    """Saves something with PyTorch, and opens it."""

    def save(content: object, **options: Any) -> Pickle:
        path = tmp_path / "model.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=FORMATS[layout], **options)
        assert sniff(path) == layout
        opened = open_pickle(path)
        assert opened.format == layout
        return opened

    return save


@contextmanager
def library(name: str) -> Iterator[type]:
    """A class of a library that is only there while something is saved."""
    module, _, kind = name.rpartition(".")
    made = ModuleType(module)
    parts = module.split(".")
    parents = [".".join(parts[:n]) for n in range(1, len(parts))]
    foreign = type(kind, (), {"__module__": module})
    setattr(made, kind, foreign)
    with patch.dict(sys.modules, {parent: ModuleType(parent) for parent in parents} | {module: made}):
        yield foreign


def same(tensors: Any, expected: dict[str, Tensor]) -> None:
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        ref = tensors[name]
        read = ref.read()
        assert (read.dtype, read.shape, ref.shape) == (value.dtype, value.shape, tuple(value.shape)), name
        bits = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (read, value)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("family", FAMILIES)
def test_published_checkpoints(family: str, golden_checkpoint: Callable[[str], Path]) -> None:
    path = golden_checkpoint(family)
    with library(CALLBACK):
        expected = torch.load(path, weights_only=False)["state_dict"]
    opened = open_pickle(path)
    same(opened.tensors, expected)
    assert opened.skipped == [CALLBACK]
    assert opened.plain == {
        "epoch": 3,
        "global_step": 4321,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {CALLBACK: {"monitor": "val/loss_simple_ema"}},
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def test_every_type_of_tensor(saved: Callable[..., Pickle]) -> None:
    torch.manual_seed(0)
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool]
    kinds += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
    state = {str(kind): (3 * torch.randn(3, 5)).to(kind) for kind in kinds}
    state |= {"number": torch.tensor(3.5), "empty": torch.empty(0, 3), "grad": torch.ones(2, requires_grad=True)}
    state |= {"parameter": nn.Parameter(torch.randn(4)), "nan": torch.tensor([float("nan"), float("-inf")])}
    same(saved(state).tensors, state)


def test_types_that_have_no_class_of_storages(tmp_path: Path) -> None:
    kinds = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
    state = {str(kind): torch.tensor([1, 2, 3]).to(kind)[1:] for kind in kinds}
    torch.save(state, tmp_path / "x.pt")
    same(open_pickle(tmp_path / "x.pt").tensors, state)


def test_views_and_shared_storages(saved: Callable[..., Pickle]) -> None:
    whole = torch.arange(24.0)
    matrix = whole.view(4, 6)
    state = {
        "whole": whole,
        "again": whole,
        "transposed": matrix.t(),
        "column": matrix[:, 2],
        "last": whole[23:],
        "every third": whole[1::3],
        "repeated": torch.ones(2).expand(5, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "none of it": whole[5:5],
    }
    same(saved(state).tensors, state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(saved: Callable[..., Pickle], protocol: int) -> None:
    state = {"a": torch.ones(2), "b": nn.Parameter(torch.zeros(3)), "c": torch.ones(2).half()}
    content = {"state_dict": OrderedDict(state), "epoch": 2, "list": [1.5, (True, None)], "set": {1, 2}, "big": 2**40}
    opened = saved(content, pickle_protocol=protocol)
    same(opened.tensors, state)
    assert opened.plain == {"epoch": 2, "list": [1.5, [True, None]], "set": [1, 2], "big": 2**40}


def test_tensors_with_attributes(saved: Callable[..., Pickle]) -> None:
    state = {"a": torch.ones(2), "b": nn.Parameter(torch.zeros(3))}
    state["a"].note, state["b"].note = "mine", "yours"  # type: ignore[attr-defined]
    same(saved(state).tensors, state)


def test_names_of_dicts_in_dicts(saved: Callable[..., Pickle]) -> None:
    one, two = torch.ones(1), torch.zeros(2)
    same(
        saved({"model": {"a.b": one, "c": {0: two}}, "ema": one}).tensors,
        {"model.a.b": one, "model.c.0": two, "ema": one},
    )
    opened = saved({"state_dict": {"a": one}, "ema": {"a": two}, "best": two})
    same(opened.tensors, {"a": one})
    assert opened.plain == {}


def test_state_dict_of_a_module_knows_its_versions(saved: Callable[..., Pickle]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    same(saved(module.state_dict()).tensors, module.state_dict())
    same(saved({"state_dict": module.state_dict()}).tensors, module.state_dict())


def test_plain_values(saved: Callable[..., Pickle], tmp_path: Path) -> None:
    content = {
        "state_dict": {"a": torch.ones(1)},
        "hyper_parameters": argparse.Namespace(lr=0.5, names=["x"], root=Path("/data")),
        "numpy": {"number": np.float64(0.25), "count": np.int64(7), "array": np.ones(3)},
        "counted": Counter("aab"),
        "default": defaultdict(list, {"k": [1]}),
        "device": torch.device("cuda", 1),
        "size": torch.Size([2, 3]),
        "bytes": [b"abc", b"", bytearray(b"x")],
        "dtype": torch.float16,
        "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1e-4}]},
        ("a", 1): 3,
        "huge": 1 << 2000,
    }
    opened = saved(content)
    assert opened.plain == {
        "hyper_parameters": {"lr": 0.5, "names": ["x"]},
        "numpy": {"number": 0.25, "count": 7},
        "counted": {"a": 2, "b": 1},
        "default": {"k": [1]},
        "device": "cuda:1",
        "size": [2, 3],
        "optimizer": {"state": {"0": {"step": 5}}, "param_groups": [{"lr": 1e-4}]},
        "('a', 1)": 3,
    }
    assert {"argparse.Namespace", "numpy.ndarray", "builtins.list"} <= set(opened.skipped)


@pytest.mark.parametrize("kind", [dict, list])
def test_kinds_of_dict_and_list_of_an_unknown_library(kind: type, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "x.ckpt"
    state = {"a": torch.ones(2)}
    with library("omegaconf.dictconfig.DictConfig") as plain:
        foreign = type("DictConfig", (kind,), {"__module__": plain.__module__})
        setattr(sys.modules[plain.__module__], "DictConfig", foreign)  # noqa: B010
        held = foreign([("x", 1)])
        content = {"config": held, "state_dict": foreign(state) if kind is dict else state}
        torch.save(content, path, _use_new_zipfile_serialization=FORMATS[layout])
    opened = open_pickle(path)
    same(opened.tensors, state)
    assert opened.plain == ({"config": {"x": 1}} if kind is dict else {})
    assert opened.skipped == ["omegaconf.dictconfig.DictConfig"]


def test_cuda_locations_are_read_on_the_cpu(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "x.pt"
    with patch("torch.serialization.location_tag", lambda storage: "cuda:3"):
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=FORMATS[layout])
    same(open_pickle(path).tensors, {"a": torch.ones(3)})


def test_writing_to_what_was_read_leaves_the_file_be(saved: Callable[..., Pickle], tmp_path: Path) -> None:
    opened = saved({"a": torch.ones(3)})
    opened.tensors["a"].read().zero_()
    assert opened.tensors["a"].read().tolist() == [1, 1, 1]


def test_values_that_an_object_hides_are_not_weights(saved: Callable[..., Pickle]) -> None:
    with pytest.raises(
        ConfigError, match=r"no tensors that have names \(an object of torch.nn.modules.linear.Linear\)"
    ):
        saved(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"no tensors that have names \(a list\)"):
        saved([torch.ones(2)])
    with pytest.raises(ConfigError, match=r"no tensors that have names \(a dict\)"):
        saved({"epoch": 3})


def test_two_tensors_of_one_name(saved: Callable[..., Pickle]) -> None:
    with pytest.raises(ConfigError, match=r"holds two tensors named a\.b"):
        saved({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.ones(2, dtype=torch.complex128), "a torch.ComplexDoubleStorage"),
        (torch.ones(2, 2).to_sparse(), "a sparse tensor"),
        (torch.ones(2, 2, device="meta"), "a tensor without values"),
        (torch.ones(2, dtype=torch.complex64).conj(), "a tensor of negated or conjugated numbers"),
    ],
    ids=["complex128", "sparse", "meta", "conjugated"],
)
def test_tensors_that_are_no_weights_are_named(tensor: Tensor, what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": tensor}, path)
    with pytest.raises(ConfigError) as caught:
        open_pickle(path)
    assert str(caught.value).startswith(f"{path} holds {what}, which cannot be read. ")


def test_sniffing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {f"{i}": torch.ones(1) for i in range(9)}
    for name, write in {
        "safetensors": lambda path: save_file(state, path),
        "zip": lambda path: torch.save(state, path),
        "legacy": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "unknown": lambda path: path.write_text("kind: ldm-sample\n"),
    }.items():
        path = tmp_path / "model.ckpt"
        write(path)
        assert sniff(path) == name
    # The length of this header, 0x280, begins as a pickle does.
    path.write_bytes((0x280).to_bytes(8, "little") + b"{}".ljust(0x280))
    assert sniff(path) == "safetensors"


def test_no_torch_before_a_tensor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.ones(2)}, path)
    script = (
        "import sys; from pathlib import Path; from uldm_cli.formats.pickles import open_pickle\n"
        "print(open_pickle(Path(sys.argv[1])).tensors['a'].shape, sorted({'torch', 'numpy'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(uldm_cli.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "(2,) []\n"


def test_archive_without_a_byte_order_and_one_of_the_other(tmp_path: Path) -> None:
    source, path = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"a": torch.ones(2)}, source)

    def rewritten(order: bytes | None) -> None:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                if not entry.filename.endswith("byteorder"):
                    new.writestr(entry.filename, old.read(entry))
            if order is not None:
                new.writestr("a/byteorder", order)

    rewritten(None)
    same(open_pickle(path).tensors, {"a": torch.ones(2)})
    rewritten(b"big")
    with pytest.raises(ConfigError, match="was written by a big-endian machine"):
        open_pickle(path)


def test_pickle_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(ConfigError, match=r"is a pickle, but not one of torch\.save"):
        open_pickle(path)
