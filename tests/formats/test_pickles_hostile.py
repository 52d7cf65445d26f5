"""Files that would run something, or that are not what they say: refused in one line, and nothing has happened."""

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.pickles import open_pickle
from uldm_cli.formats.tensors import MappedFile
from uldm_cli.formats.unpickler import HINT, Unpickler


class Calls:
    """Whoever unpickles it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.reduced


def refused(path: Path) -> str:
    """The message: one line that names the file and ends in what to do."""
    with pytest.raises(ConfigError) as caught:
        open_pickle(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return message.removeprefix(f"{path} ")


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> Path:
    """An archive as PyTorch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (records or {}).items():
            file.writestr(f"archive/data/{name}", content)
    return path


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def script(canary: Path, name: str) -> str:
    """A folder with a program that leaves the canary."""
    folder = canary.parent / "program"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').close()\ndef run(): pass\n")
    return str(folder)


PAYLOADS: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "os.system": lambda canary: (os.system, f"touch '{canary}'"),
    "os.mkdir": lambda canary: (os.mkdir, str(canary)),
    "builtins.eval": lambda canary: (eval, f"open({str(canary)!r}, 'w').close()"),
    "builtins.exec": lambda canary: (exec, f"open({str(canary)!r}, 'w').close()"),
    "builtins.getattr": lambda canary: (getattr, "os", "system"),
    "builtins.__import__": lambda canary: (builtins.__import__, "os"),
    "builtins.map": lambda canary: (map, os.mkdir, [str(canary)]),
    "io.open": lambda canary: (open, str(canary), "w"),
    "subprocess.Popen": lambda canary: (subprocess.Popen, ["mkdir", str(canary)]),
    "subprocess.call": lambda canary: (subprocess.call, ["mkdir", str(canary)]),
    "torch.hub.load": lambda canary: (torch.hub.load, script(canary, "hubconf"), "run"),
    "torch.serialization.load": lambda canary: (torch.load, str(canary)),
    "torch.storage._load_from_bytes": lambda canary: (torch.storage._load_from_bytes, b""),
    "importlib.import_module": lambda canary: (importlib.import_module, "this"),
    "runpy.run_path": lambda canary: (runpy.run_path, f"{script(canary, 'x')}/x.py"),
    "functools.partial": lambda canary: (functools.partial, os.mkdir, str(canary)),
    "functools.reduce": lambda canary: (functools.reduce, os.mkdir, [str(canary)]),
    "operator.attrgetter": lambda canary: (operator.attrgetter, "system"),
    "numpy.fromfile": lambda canary: (np.fromfile, str(canary)),
    "yaml.load": lambda canary: (yaml.load, str(canary)),
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_calls_are_named_and_not_made(name: str, new: bool, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.ones(2)}, "x": [{"deep": (Calls(*PAYLOADS[name](canary)),)}]}
    torch.save(content, path, _use_new_zipfile_serialization=new)
    assert refused(path) == f"would call {name}. {HINT}"
    assert not canary.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.exec", "torch.hub.load", "runpy.run_path"])
def test_some_of_those_calls_do_leave_the_canary(name: str, canary: Path) -> None:
    function, *arguments = PAYLOADS[name](canary)
    function(*arguments, **({"source": "local"} if name == "torch.hub.load" else {}))
    assert canary.exists()


def opcodes(*parts: bytes | str) -> bytes:
    """A pickle of protocol 4 in pieces; text stands for pushing it."""
    pieces = [p if isinstance(p, bytes) else pickle.SHORT_BINUNICODE + bytes([len(p)]) + p.encode() for p in parts]
    return b"\x80\x04" + b"".join(pieces) + b"."


def touch(canary: Path) -> str:
    return f"touch '{canary}'"


SYSTEM = b"cposix\nsystem\n"
R, BUILD, NEWOBJ, MARK, TUPLE = pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.MARK, pickle.TUPLE
T1, T2, GLOBAL = pickle.TUPLE1, pickle.TUPLE2, pickle.STACK_GLOBAL
EMPTY = pickle.EMPTY_TUPLE
FOREIGN = opcodes("evil.lib", "Thing", GLOBAL, EMPTY, NEWOBJ)[2:-1]

PROGRAMS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "inst": (lambda c: opcodes(MARK, touch(c), b"iposix\nsystem\n"), "call os.system"),
    "obj": (lambda c: opcodes(MARK, SYSTEM, touch(c), b"o"), "call os.system"),
    "newobj": (lambda c: opcodes(SYSTEM, touch(c), T1, NEWOBJ), "call os.system"),
    "newobj of a class that starts a process": (
        lambda c: opcodes(b"csubprocess\nPopen\n", touch(c), T1, NEWOBJ),
        "call subprocess.Popen",
    ),
    "newobj_ex": (lambda c: opcodes(SYSTEM, touch(c), T1, b"}", pickle.NEWOBJ_EX), "call os.system"),
    "name from the stack": (lambda c: opcodes("posix", "system", GLOBAL, touch(c), T1, R), "call os.system"),
    "name from the memo": (
        lambda c: opcodes("system", b"\x94", b"0", "nt", b"h\0", GLOBAL, touch(c), T1, R),
        "call os.system",
    ),
    "name with dots": (
        lambda c: opcodes("torch._utils", "_rebuild_tensor_v2.__globals__", GLOBAL, touch(c), T1, R),
        "call torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "class reached through another": (
        lambda c: opcodes("collections", "OrderedDict.__init__", GLOBAL, touch(c), T1, R),
        "call collections.OrderedDict.__init__",
    ),
    "name of Python 2": (lambda c: opcodes(b"c__builtin__\nreduce\n", EMPTY, R), "call functools.reduce"),
    "result of a call": (lambda c: opcodes(FOREIGN, touch(c), T1, R), "call an object that it made itself"),
    "state of a class": (
        lambda c: opcodes(b"cevil\nThing\n", b"N}", "__setstate__", SYSTEM, b"s", T2, BUILD),
        "change evil.Thing",
    ),
    "state of a function": (
        lambda c: opcodes(b"ctorch._utils\n_rebuild_tensor\n", b"}", BUILD),
        "change torch._utils._rebuild_tensor",
    ),
    "state that is called": (lambda c: opcodes(FOREIGN, SYSTEM, touch(c), T1, R, BUILD), "call os.system"),
    "key of a dict": (lambda c: opcodes(b"}", SYSTEM, touch(c), T1, R, b"Ns"), "call os.system"),
    "persistent id": (lambda c: opcodes(SYSTEM, touch(c), T1, R, b"Q"), "call os.system"),
    "class of a storage": (
        lambda c: opcodes(MARK, "storage", SYSTEM, touch(c), T1, R, "0", "cpu", b"K\1", TUPLE, b"Q"),
        "call os.system",
    ),
    "factory of a dict": (
        lambda c: opcodes(b"ccollections\ndefaultdict\n", SYSTEM, touch(c), T1, R, T1, R),
        "call os.system",
    ),
    "reconstructor": (
        lambda c: opcodes(
            b"ccopy_reg\n_reconstructor\n", b"csubprocess\nPopen\n", b"c__builtin__\nobject\n", b"N\x87", R
        ),
        "call subprocess.Popen",
    ),
    "tensor with a type": (
        lambda c: opcodes(
            b"ctorch._tensor\n_rebuild_from_type_v2\n", MARK, SYSTEM, b"ctorch\nTensor\n", touch(c), T1, b"}", TUPLE, R
        ),
        "call os.system",
    ),
    "after a mark": (lambda c: opcodes(MARK, b"1", MARK, SYSTEM, touch(c), T1, R, b"l"), "call os.system"),
    "lower-case name of an unknown library": (
        lambda c: opcodes(b"cevil.lib\nthing\n", EMPTY, R),
        "call evil.lib.thing",
    ),
    "name that would break the line": (
        lambda c: opcodes("os\n\x1b[2J", "system", GLOBAL, EMPTY, R),
        "call os??[2J.system",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_a_pickler_would_not_write(name: str, tmp_path: Path, canary: Path) -> None:
    make, what = PROGRAMS[name]
    program = make(canary)
    assert refused(archive(tmp_path / "zip.ckpt", program)) == f"would {what}. {HINT}"
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(program)
    assert refused(bare) == f"would {what}. {HINT}"
    assert not canary.exists()


def test_pickle_of_the_oldest_protocol(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(Calls(os.system, touch(canary)), 0))
    assert refused(path) == f"would call os.system. {HINT}"
    pickle.loads(path.read_bytes())  # so it was a real one
    assert canary.exists()


def tensor(
    record: bytes = bytes(16), size: tuple[Any, ...] = (4,), *, offset: Any = 0, stride: Any = (1,), numel: Any = 4,
    kind: str = "FloatStorage", hooks: bytes = b"}", metadata: bytes = b"", key: str = "0"
) -> tuple[bytes, dict[str, bytes]]:  # fmt: skip
    """A pickle of `{"a": tensor}` with such numbers, and its record."""

    def push(value: object) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = opcodes(MARK, "storage", f"ctorch\n{kind}\n".encode(), key, "cpu", push(numel), TUPLE, b"Q")[2:-1]
    arguments = [MARK, storage, push(offset), push(size), push(stride), b"\x89", hooks, metadata, TUPLE]
    rebuilt = opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", *arguments, R)[2:-1]
    return opcodes(b"}", "a", rebuilt, b"s"), {"0": record}


def test_the_tensor_that_the_next_tests_change_is_sound(tmp_path: Path) -> None:
    record = struct.pack("<4f", 1, 2, 3, 4)
    path = archive(tmp_path / "x.ckpt", *tensor(record, (2, 2), stride=(1, 2)))
    assert open_pickle(path).tensors["a"].read().tolist() == [[1, 3], [2, 4]]
    path = archive(path, *tensor(record, (0, 5), offset=10**9, stride=(5, 10**9)))
    assert open_pickle(path).tensors["a"].read().shape == (0, 5)
    path = archive(path, *tensor(record, (1, 4), stride=(2**62, 1)))
    assert open_pickle(path).tensors["a"].read().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("where", ["hooks", "metadata"])
def test_calls_that_hide_in_a_tensor(where: str, tmp_path: Path, canary: Path) -> None:
    call = opcodes(SYSTEM, touch(canary), T1, R)[2:-1]
    hidden = opcodes(b"ccollections\nOrderedDict\n", b"]", b"]K\1", call, b"ea"[::-1][:0], T1, R)[2:-1]
    hooks = {"hooks": hidden} if where == "hooks" else {"metadata": call}
    path = archive(tmp_path / "x.ckpt", *tensor(**hooks))  # type: ignore[arg-type]
    assert refused(path) == f"would call os.system. {HINT}"
    assert not canary.exists()


OUTSIDE = "is damaged: a tensor would be elements {} of a storage that has 4. Fetch it again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (5,)}, OUTSIDE.format("0 to 5")),
        ({"offset": 1}, OUTSIDE.format("1 to 5")),
        ({"stride": (2,)}, OUTSIDE.format("0 to 7")),
        ({"size": (2, 2), "stride": (3, 1)}, OUTSIDE.format("0 to 5")),
        ({"size": (2**40, 2), "stride": (0, 10)}, OUTSIDE.format("0 to 11")),
        (
            {"size": (2**40,), "stride": (0,)},
            "holds a tensor of 4,398,046,511,104 bytes made of 16. It is no model's: do",
        ),
        ({"numel": 5}, "is damaged: its record data/0 has 16 bytes, and its pickle tells of 20. Fetch it again"),
        ({"record": bytes(17)}, "is damaged: its record data/0 has 17 bytes, and its pickle tells of 16. Fetch"),
        ({"key": "1"}, "is damaged: it has no record data/1. Fetch"),
        ({"key": "../data.pkl"}, "is damaged: it has no record data/../data.pkl. Fetch"),
        ({"kind": "QInt8Storage"}, "holds a torch.QInt8Storage, which cannot be read. Save"),
        *(
            (changes, "is damaged: its data.pkl is not a whole pickle. Fetch it again")
            for changes in (
                {"kind": "Tensor"},
                {"kind": "UntypedStorage", "numel": 16},
                {"numel": -4},
                {"numel": 2**63},
                {"numel": 4.0},
                {"numel": True},
                {"offset": -1},
                {"offset": "0"},
                {"size": (-1,)},
                {"size": (2.0,)},
                {"size": 4},
                {"size": (2**62,) * 3, "stride": (0,) * 3},
                {"size": (1,) * 65, "stride": (1,) * 65},
                {"stride": (-1,)},
                {"stride": (1, 1)},
                {"stride": None},
            )
        ),
    ],
    ids=str,
)
def test_tensors_outside_of_their_storage(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refused(archive(tmp_path / "x.ckpt", *tensor(**changes))).startswith(message)


def nested(levels: int, *, of: bytes, closed: bytes) -> bytes:
    return opcodes(of * levels, closed * levels)


@pytest.mark.parametrize(
    "program",
    [
        opcodes(b"]" * 3_100_000),
        opcodes(b"]", b"N" * 1_000_000, b"0" * 1_000_000, b"2ba" * 3),
        nested(500_000, of=b"]", closed=b"a"),
        opcodes(b")", b"\x85" * 2_000_000),
        opcodes(b"}", b")", b"\x85" * 1000, b"Ns"),  # as a key, which would be compared
        opcodes(b")", b"\x94\x86".replace(b"\x94", b"2") * 2000),  # doubles every time
        opcodes(b"]", b"\x942\x86".replace(b"\x86", b"a") * 50),  # a list in itself
        opcodes(b"(", b"N" * 2_000_000, b"l\x94", b"cbuiltins\nset\n\x94", b"0" * 2, b"h\1h\0\x85R" * 1000),
        opcodes(b"\x8b\xff\xff\xff\x7f"),
        opcodes(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"),
        opcodes(b"("),
        opcodes(b"0"),
        opcodes(b"R"),
        opcodes(b"h\7"),
        opcodes(b"\x82\1"),
        opcodes(b"\x97"),
        opcodes(b"Pstorage\n"),
        b"\x80\x04}",
        b"",
        b"\x80\x09.",
        opcodes(b"}", b"I" + b"9" * 10_000 + b"\n"),
        opcodes(b"S'\\c'\n", b"R"),  # of which Python warns
    ],
    ids=lambda program: repr(program[:12]),
)
def test_bombs_and_nonsense_end_soon(program: bytes, tmp_path: Path) -> None:
    start = time.process_time()
    refused(archive(tmp_path / "x.ckpt", program))
    assert time.process_time() - start < 20


def test_dicts_that_hold_one_another(tmp_path: Path) -> None:
    program, records = tensor()
    layer = b"}(" + opcodes("a", b"h\xfe", "b", b"h\xfe")[2:-1] + b"uq\xfe"
    doubling = b"}q\xfe" + program[2:-1] + b"0" + opcodes(program[2:-1], b"q\xfe", layer * 60)[2:-1]
    path = archive(tmp_path / "x.ckpt", opcodes(doubling), records)
    assert refused(path).startswith("holds dicts in dicts without end. ")
    itself = opcodes(program[2:-1], b"q\0", "me", b"h\0s")
    assert refused(archive(path, itself, records)).startswith("holds dicts in dicts without end. ")
    doubling = b"]q\xfe0" + b"](h\xfeh\xfeeq\xfe0" * 60
    plain = opcodes(doubling, b"}(", "state_dict", program[2:-1], "x", b"h\xfe", b"u")
    opened = open_pickle(archive(path, plain, records))
    assert (list(opened.tensors), opened.plain, opened.skipped) == (["a"], {}, ["x (too large)"])


PIECES = [bytes([code]) for code in range(256)] + [b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"X\1\0\0\0a"]


@given(st.lists(st.sampled_from(PIECES), max_size=40))
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_instructions_end_or_are_refused(tmp_path: Path, pieces: list[bytes]) -> None:
    path = tmp_path / "x"
    path.touch()
    file = MappedFile(path, path.stat())
    unpickler = Unpickler(str(path), lambda saved: file)
    with suppress(ValueError, UldmError):
        unpickler.run(io.BytesIO(b"".join(pieces) + b"."))
