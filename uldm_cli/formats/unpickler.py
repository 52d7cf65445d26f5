"""Reads the language that pickles are written in, and does none of what they say.

A pickle is a program: it may name any function and have it called. Here the standard library only takes it apart into
instructions; what an instruction does is written below. Tensors and plain containers are made, an object of an unknown
class becomes a `Foreign`, which does nothing, and a call of anything else is refused. No name from a file is imported.
"""

import pickletools
import struct
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.storages import DTYPES, counts, storage_type, unreadable, view
from uldm_cli.formats.tensors import TensorRef, shown

MOST_STEPS = 3_000_000
"""Instructions a pickle may have: a byte of it can ask for a hundred of memory."""
HINT = "Weights need no code to be read: do not open this file with other programs"
_DAMAGE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, struct.error)
"""What reading something that is not a whole pickle raises."""

_SCALARS = {
    **{"f8": "d", "f4": "f", "f2": "e", "b1": "?"},
    **{"i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B"},
}
"""Numpy's short names of types, as `struct` has them."""
_UNREADABLE = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch.serialization._get_layout": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a special device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a special device",
}
_MODULES = IMPORT_MAPPING | {"posix": "os", "nt": "os"}
"""Modules under the names of Python 2, as most pickles have them, or of one system; and what they are called now."""
_HARMLESS = {
    *("argparse.Namespace", "types.SimpleNamespace", "uuid.UUID", "decimal.Decimal", "fractions.Fraction"),
    *("datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath"),
    *("collections.deque", "numpy.ndarray"),
}
"""Classes of the standard library and numpy of which training scripts leave objects in their checkpoints."""
_OWN = {"torch", "numpy"}
"""Where, beside the standard library, a class may well do something when it is made."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle says is a class or a function. Nothing is looked up under it."""

    name: str

    @property
    def makes_nothing_but_an_object(self) -> bool:
        """Whether it is a class of some library, and making an object of it no more than that."""
        root, last = self.name.split(".", 1)[0], self.name.rsplit(".", 1)[-1]
        if self.name in _HARMLESS:
            return True
        if not last.lstrip("_")[:1].isupper():
            return False
        return self.name.startswith(("torch.nn.modules.", "torch.optim.")) or not (
            root in _OWN or root in sys.stdlib_module_names
        )


@dataclass(eq=False)
class Foreign:
    """Stands where an object of an unknown class would be."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    """What it holds if its class is a kind of dict."""
    elements: list[Any] = field(default_factory=list)
    """What it holds if its class is a kind of list."""


@dataclass(eq=False)
class _NumpyType:
    code: str
    order: str = "<"


class Unpickler:
    """Runs the pickles of one file.

    Args:
        place: the file's name, for messages.
        load: gives what a persistent id stands for, as `torch.save` uses them for storages; ValueError if nothing.
    """

    def __init__(self, place: str, load: Callable[[Any], Any]) -> None:
        self.place = place
        self.load = load
        self.skipped: dict[str, None] = {}
        """Names of classes and functions that stand for nothing here, in the order in which they came."""
        self._left = MOST_STEPS
        self._reset()

    def _reset(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        """What the pickle at a stream's position describes; the stream then stands behind it.

        Raises:
            ConfigError: it would call something, or holds a tensor of a kind that is not read.
            ValueError: it is damaged, or not a pickle.
        """
        self._reset()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of backslashes in old kinds of text
                return self._run(stream)
        except _DAMAGE as e:
            raise ValueError from e
        finally:
            self._reset()

    def _run(self, stream: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            self._spend(1)
            if opcode.name == "STOP":
                return self._stack[-1]
            if opcode.name in _PUSHED:
                self._stack.append(argument)
            elif opcode.name in _MADE:
                self._stack.append(_MADE[opcode.name]())
            else:
                _STEPS[opcode.name](self, argument)
        raise ValueError

    def _spend(self, amount: int) -> None:
        """Counts work, and copies: without that, a small pickle could repeat a large part of itself for ever."""
        self._left -= amount
        if self._left < 0:
            raise ConfigError(f"{self.place} holds more than any checkpoint should", HINT)

    # Stack and memo

    def _marked(self) -> list[Any]:
        """Takes everything above the last mark."""
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _mark(self, _: object) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop(self, _: object) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: object) -> None:
        self._marked()

    def _duplicate(self, _: object) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def _memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    # Containers

    def _tuple(self, length: int | None) -> None:
        items = self._marked() if length is None else [self._stack.pop() for _ in range(length)][::-1]
        self._stack.append(tuple(items))

    def _list(self, _: object) -> None:
        self._stack.append(self._marked())

    def _dict(self, _: object) -> None:
        items = self._marked()
        self._stack.append(_pairs(items))

    def _frozenset(self, _: object) -> None:
        items = self._marked()
        self._stack.append(frozenset(_key(item) for item in items))

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(_key(item) for item in items)
        else:
            elements = target.elements if isinstance(target, Foreign) else target
            if not isinstance(elements, list):
                raise TypeError
            elements.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        entries = target.entries if isinstance(target, Foreign) else target
        if not isinstance(entries, dict):
            raise TypeError
        entries.update(_pairs(items))

    # Names and calls

    def _global(self, name: str) -> None:
        module, _, name = name.partition(" ")
        self._stack.append(self._named(module, name))

    def _stack_global(self, _: object) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError
        self._stack.append(self._named(module, name))

    def _named(self, module: str, name: str) -> Global:
        name = ".".join(NAME_MAPPING.get((module, name), (_MODULES.get(module, module), name)))
        found = Global(shown(name))
        if found.name not in _CALLS and found.name not in DTYPES and storage_type(found.name) is None:
            self.skipped[found.name] = None
        return found

    def _reduce(self, _: object) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._stack.append(self._called(called, arguments))

    def _inst(self, name: str) -> None:
        arguments = tuple(self._marked())
        module, _, name = name.partition(" ")
        self._stack.append(self._called(self._named(module, name), arguments))

    def _obj(self, _: object) -> None:
        called, *arguments = self._marked()
        self._stack.append(self._called(called, tuple(arguments)))

    def _new(self, _: object) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        self._stack.append(self._called(called, arguments))

    def _new_with_names(self, _: object) -> None:
        self._stack.pop()
        self._new(None)

    def _called(self, called: Any, arguments: Any) -> Any:
        """What takes the place of a call's result.

        Raises:
            ConfigError: the call is not one of those that make tensors, plain values or an object of some class.
        """
        if not isinstance(called, Global):
            raise ConfigError(f"{self.place} would call an object that it made itself", HINT)
        if called.name in _UNREADABLE:
            raise unreadable(self.place, _UNREADABLE[called.name])
        call = _CALLS.get(called.name)
        if call is None and not called.makes_nothing_but_an_object:
            raise ConfigError(f"{self.place} would call {called.name}", HINT)
        if not isinstance(arguments, tuple):
            raise TypeError
        return call(self, *arguments) if call else Foreign(called.name, arguments)

    def _build(self, _: object) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Global):
            raise ConfigError(f"{self.place} would change {target.name}", HINT)
        if isinstance(target, Foreign):
            target.state = state
        elif isinstance(target, _NumpyType):
            target.order = state[1]
        # The attributes of plain values are of no use, such as the versions of modules that a state dict has.

    def _persistent(self, _: object) -> None:
        self._stack.append(self.load(self._stack.pop()))

    # What stands in for the functions that a checkpoint may name

    def _mapping(self, items: Any = ()) -> dict[Any, Any]:
        self._spend(len(items))
        if isinstance(items, dict):
            return dict(items)
        return {_key(key): value for key, value in items}

    def _default_mapping(self, _factory: object = None, items: Any = ()) -> dict[Any, Any]:
        return self._mapping(items)

    def _collection(self, items: Any = ()) -> set[Any]:
        self._spend(len(items))
        return {_key(item) for item in items}

    def _bytes(self, content: Any = b"", encoding: str = "latin-1") -> bytes:
        """How protocol 2 writes bytes, and all protocols those that can be changed."""
        if isinstance(content, str):
            return self._encoded(content, encoding)
        if not isinstance(content, bytes):
            raise TypeError
        return content

    def _encoded(self, text: str, encoding: str) -> bytes:
        if encoding not in {"latin1", "latin-1"}:
            raise ValueError
        self._spend(len(text) // 64)
        return text.encode("latin-1")

    def _reconstructed(self, kind: Any, _base: object, state: object) -> Any:
        made = self._called(kind, ())
        if isinstance(made, Foreign):
            made.state = state
        return made

    def _size(self, sizes: Any) -> tuple[int, ...]:
        return counts(sizes)

    def _device(self, *description: object) -> str:
        return ":".join(str(part) for part in description if isinstance(part, str | int))[:100]

    def _numpy_type(self, code: Any, *_: object) -> _NumpyType:
        return _NumpyType(code)

    def _numpy_scalar(self, kind: Any, content: Any) -> Any:
        if isinstance(content, str):  # from Python 2
            content = content.encode("latin-1")
        if not (isinstance(kind, _NumpyType) and isinstance(content, bytes)):
            raise TypeError
        if kind.code not in _SCALARS or kind.order == ">":
            return Foreign("numpy.generic", (content,))
        return struct.unpack(f"<{_SCALARS[kind.code]}", content)[0]

    def _numpy_array(self, *arguments: object) -> Foreign:
        self.skipped["numpy.ndarray"] = None
        return Foreign("numpy.ndarray", arguments)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
        """Versions 1 and 2 of `_rebuild_tensor`. What follows is for training, but for the last."""
        return view(storage, storage.dtype, offset, size, stride, *rest[2:])

    def _typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorRef:
        """Version 3, for types that have no class of storages."""
        _requires_grad, _hooks, dtype, *metadata = rest
        if dtype.name not in DTYPES:
            raise unreadable(self.place, f"a tensor of {dtype.name}")
        return view(storage, DTYPES[dtype.name], offset, size, stride, *metadata)

    def _parameter(self, data: Any, *_: object) -> TensorRef:
        if not isinstance(data, TensorRef):
            raise TypeError
        return data

    def _tensor_of_type(self, rebuild: Any, _type: object, arguments: Any, _state: object) -> TensorRef:
        return self._parameter(self._called(rebuild, arguments))


def _key(key: Any) -> Any:
    """A key of a dict, of a kind that takes no time to compare."""
    if isinstance(key, tuple) and len(key) <= 16 and not any(isinstance(part, tuple) for part in key):
        return tuple(_key(part) for part in key)
    if not isinstance(key, str | bytes | int | float | None | Global | Foreign):
        raise TypeError
    if isinstance(key, int) and key.bit_length() > 64:
        raise ValueError
    return key


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Instructions that push their argument."""

_MADE: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple},
}

_STEPS: dict[str, Callable[[Unpickler, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": Unpickler._mark,
    "POP": Unpickler._pop,
    "POP_MARK": Unpickler._pop_mark,
    "DUP": Unpickler._duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Unpickler._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Unpickler._get),
    "MEMOIZE": Unpickler._memoize,
    "TUPLE": lambda machine, _: machine._tuple(None),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "LIST": Unpickler._list,
    "DICT": Unpickler._dict,
    "FROZENSET": Unpickler._frozenset,
    "APPEND": lambda machine, _: machine._extend([machine._stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine._extend(machine._marked())),
    "SETITEM": lambda machine, _: machine._set([machine._stack.pop(), machine._stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set(machine._marked()),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "INST": Unpickler._inst,
    "OBJ": Unpickler._obj,
    "NEWOBJ": Unpickler._new,
    "NEWOBJ_EX": Unpickler._new_with_names,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
}
"""What instructions do. Those that are not here, codes of extensions and buffers outside of the pickle, end it."""

_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": Unpickler._mapping,
    "collections.Counter": Unpickler._mapping,
    "collections.defaultdict": Unpickler._default_mapping,
    **dict.fromkeys(("builtins.set", "builtins.frozenset"), Unpickler._collection),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray"), Unpickler._bytes),
    "_codecs.encode": Unpickler._encoded,
    "copyreg._reconstructor": Unpickler._reconstructed,
    "torch.Size": Unpickler._size,
    "torch.device": Unpickler._device,
    "torch._utils._rebuild_tensor": Unpickler._tensor,
    "torch._utils._rebuild_tensor_v2": Unpickler._tensor,
    "torch._utils._rebuild_tensor_v3": Unpickler._typed_tensor,
    "torch._utils._rebuild_parameter": Unpickler._parameter,
    "torch._utils._rebuild_parameter_with_state": Unpickler._parameter,
    "torch._tensor._rebuild_from_type_v2": Unpickler._tensor_of_type,
    "numpy.dtype": Unpickler._numpy_type,
    **{
        f"numpy.{core}.{name}": call
        for core in ("core", "_core")
        for name, call in (
            ("multiarray.scalar", Unpickler._numpy_scalar),
            ("multiarray._reconstruct", Unpickler._numpy_array),
            ("numeric._frombuffer", Unpickler._numpy_array),
        )
    },
}
"""The functions that a checkpoint may call, and what is done instead."""
