"""Batches from a set of images: endless and shuffled for training, once through in order for evaluation.

What sample number k shows depends on the seed and on k alone: epoch k // L, place k % L of the permutation that
(seed, epoch) draws. So neither batch size, nor workers, nor stopping and resuming changes what training sees.
"""

import hashlib
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from threading import current_thread, main_thread
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from uldm_cli.core import rng
from uldm_cli.core.images import ImageError
from uldm_cli.errors import UldmError, UsageError

STRICT_HINT = "With data.strict=false such files are skipped"


@dataclass(frozen=True)
class Draws:
    """What the random choices for training samples are a function of: `core.rng` makes them of both fields.

    Attributes:
        seed: of the run.
        numbers: int64 `[N]`, the sample numbers.
    """

    seed: int
    numbers: Tensor


class ImageSet(Protocol):
    """Square images of one size with labels. `dataset[i]` raises ImageError for a file that cannot be decoded.

    A set whose training images depend on chance (a random crop) also has `sample(index, bits)`, which is
    `dataset[index]` for training: `bits` is an int of 63 random bits, which `core.rng` draws for the sample's number.

    A set that is held in memory, or mapped into it, may also have `gather(indices, draws) -> (images, labels)`. It is
    then used, in the process itself, instead of reading item by item in workers. `draws` is None in evaluation.
    """

    classes: tuple[str, ...]  # names of the labels 0, 1, ...; empty without classes
    channels: int
    size: int
    skipped: list[tuple[str, str]]  # (name, reason) of the files left out when the set was opened

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image, uint8 `[channels, size, size]`, and its label, -1 for none."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some images.

    Attributes:
        image: uint8 `[N, C, H, W]`; of a set of cached latents, floating point.
        label: int64 `[N]`, -1 for none.
        number: int64 `[N]`, the sample numbers; of `sequential` and `filled`, the indices.
        skipped: (name, reason) of each file that could not be decoded here.
    """

    image: Tensor
    label: Tensor
    number: Tensor
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers send copies. Torch's way, shared memory, fails where /dev/shm is small, as in most containers."""
        return _unpacked, (self.image.numpy(), self.label.numpy(), self.number.numpy(), self.skipped)

    def pin_memory(self) -> "Batch":
        """What DataLoader calls to have page-locked memory, from which copies to CUDA need not wait."""
        return replace(
            self, image=self.image.pin_memory(), label=self.label.pin_memory(), number=self.number.pin_memory()
        )


def stream(
    dataset: ImageSet,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    strict: bool = False,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Endless shuffled batches; they run across the borders of epochs and are always full.

    A file that cannot be decoded is replaced by the next readable one in the set's own order, and named in the
    batch's `skipped` whenever its turn comes. Several processes share the samples: the k-th batch of process `rank`
    has the numbers from `start + (k * world + rank) * batch_size` on, so that together they see what one would.

    Args:
        dataset: what to read.
        batch_size: samples a batch, of this process.
        seed: of the permutations, and of what is random about a sample.
        start: the first sample number of all processes; nothing before it is read.
        rank: this process's number, from 0.
        world: processes that share the samples.
        workers: processes that read and decode; 0 reads in this one. They end when the iterator is closed.
        strict: stop at a file that cannot be decoded.
        pin_memory: for consumers on CUDA.

    Raises:
        UsageError: strict, or no file of the set can be decoded.
    """
    reader = _ShuffledReader(dataset, seed, strict)
    numbers = (range(first, first + batch_size) for first in count(start + rank * batch_size, world * batch_size))
    yield from _load(reader, numbers, workers, pin_memory)


def sequential(
    dataset: ImageSet, *, batch_size: int, workers: int = 0, strict: bool = False, pin_memory: bool = False
) -> Iterator[Batch]:
    """The whole set once, in order. Files that cannot be decoded are left out and named in a batch's `skipped`.

    Raises:
        UsageError: strict, or no file of the set can be decoded.
    """
    indices = (range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size))
    held: Batch | None = None  # one batch behind, so that a batch without readable files hands its names on
    for batch in _load(_OrderedReader(dataset, strict), indices, workers, pin_memory):
        if held is None:
            held = batch
        elif not len(held):
            held = replace(batch, skipped=held.skipped + batch.skipped)
        elif not len(batch):
            held = replace(held, skipped=held.skipped + batch.skipped)
        else:
            yield held
            held = batch
    if held is None or not len(held):
        raise _nothing_readable([] if held is None else held.skipped)
    yield held


def filled(
    dataset: ImageSet,
    batches: Iterable[range],
    *,
    workers: int = 0,
    strict: bool = False,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """The images of these indices, a batch a range, and each batch full.

    A file that cannot be decoded is replaced as in `stream`; a batch's `skipped` names those of its own indices alone.

    Raises:
        UsageError: strict, or no file of the set can be decoded.
    """
    yield from _load(_FilledReader(dataset, strict), iter(batches), workers, pin_memory)


class _Reader(ABC):
    """What a worker runs: numbers to a batch. DataLoader hands `__getitems__` a whole batch's numbers at once."""

    def __init__(self, dataset: ImageSet, strict: bool) -> None:
        self.dataset = dataset
        self.strict = strict

    def __getitems__(self, numbers: Sequence[int]) -> Batch | UldmError:
        try:
            return self.read(numbers)
        except UldmError as error:  # as a value: an exception would arrive as a page of the worker's traceback
            return error

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Batch: ...

    def gather(self, indices: Sequence[int], numbers: Sequence[int], draws: Draws | None = None) -> Batch | None:
        """All at once, where the set can do that."""
        gather = getattr(self.dataset, "gather", None)
        if gather is None:
            return None
        images, labels = gather(_int64(indices), draws)
        return Batch(images, labels, _int64(numbers))

    def item(self, index: int, skipped: list[tuple[str, str]], bits: int | None = None) -> tuple[Tensor, int] | None:
        """One sample; None, with a note in `skipped`, when it cannot be decoded."""
        try:
            return self.dataset[index] if bits is None else self.dataset.sample(index, bits)  # type: ignore[attr-defined]
        except ImageError as error:
            if self.strict:
                raise UsageError(str(error), STRICT_HINT) from error
            skipped.append((error.name, error.reason))
            return None

    def next_readable(self, index: int, bits: int | None, skipped: list[tuple[str, str]]) -> tuple[Tensor, int]:
        for offset in range(len(self.dataset)):
            if item := self.item((index + offset) % len(self.dataset), skipped, bits):
                return item
        raise _nothing_readable(skipped)

    def batch(self, items: list[tuple[Tensor, int]], numbers: Sequence[int], skipped: list[tuple[str, str]]) -> Batch:
        shape = (0, self.dataset.channels, self.dataset.size, self.dataset.size)
        images = torch.stack([image for image, _ in items]) if items else torch.empty(shape, dtype=torch.uint8)
        return Batch(images, torch.tensor([label for _, label in items], dtype=torch.int64), _int64(numbers), skipped)


class _OrderedReader(_Reader):
    def read(self, numbers: Sequence[int]) -> Batch:
        if (in_memory := self.gather(numbers, numbers)) is not None:
            return in_memory
        skipped: list[tuple[str, str]] = []
        found = [(number, item) for number in numbers if (item := self.item(number, skipped))]
        return self.batch([item for _, item in found], [number for number, _ in found], skipped)


class _FilledReader(_Reader):
    def read(self, numbers: Sequence[int]) -> Batch:
        if (in_memory := self.gather(numbers, numbers)) is not None:
            return in_memory
        found: list[tuple[Tensor, int]] = []
        skipped: list[tuple[str, str]] = []
        for number in numbers:
            tried: list[tuple[str, str]] = []
            found.append(self.next_readable(number, None, tried))
            skipped += tried[:1]  # the others are named where it is their turn
        return self.batch(found, numbers, skipped)


class _ShuffledReader(_Reader):
    def __init__(self, dataset: ImageSet, seed: int, strict: bool) -> None:
        super().__init__(dataset, strict)
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def read(self, numbers: Sequence[int]) -> Batch:
        indices = [self.index(number) for number in numbers]
        if (in_memory := self.gather(indices, numbers, Draws(self.seed, _int64(numbers)))) is not None:
            return in_memory
        skipped: list[tuple[str, str]] = []
        found = [self.next_readable(*each, skipped) for each in zip(indices, self.bits(numbers), strict=True)]
        return self.batch(found, numbers, skipped)

    def bits(self, numbers: Sequence[int]) -> Sequence[int | None]:
        """What is random about each sample, where the set asks for it. One by one this takes as long as decoding."""
        if not hasattr(self.dataset, "sample"):
            return [None] * len(numbers)
        drawn: list[int] = rng.bits(self.seed, rng.STREAM_CROP, _int64(numbers), 1)[:, 0].tolist()
        return [value & (1 << 63) - 1 for value in drawn]

    def index(self, number: int) -> int:
        epoch, place = divmod(number, len(self.dataset))
        if epoch != self._epoch:
            self._order = permutation(len(self.dataset), self.seed, epoch)
            self._epoch = epoch
        return int(self._order[place])


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, int64 `[length]`."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=7).digest()  # seeds nearby share no bits
    return torch.randperm(length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))


def _load(reader: _Reader, numbers: Iterator[range], workers: int, pin_memory: bool) -> Iterator[Batch]:
    if hasattr(reader.dataset, "gather"):
        workers = 0  # indexing memory is faster than sending batches between processes
    with warnings.catch_warnings(), _child_signal_kept():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than processors
        loader: DataLoader[Batch] = DataLoader(
            reader,  # type: ignore[arg-type]  # a map-style dataset in all but the base class
            batch_sampler=numbers,  # type: ignore[arg-type]  # an iterator will do: it is read once
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # its own, so that the global one is left as it was
        )
        batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            if isinstance(batch, UldmError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        hint = "Usually memory is short: use fewer workers or a smaller batch"
        raise UldmError("a process that reads the data was killed", hint) from error
    finally:
        del batches  # the last reference: its workers end now


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Undoes DataLoader's signal handler, which lets a worker's death raise wherever this process happens to be.

    The next batch that is asked for finds the dead worker too, within five seconds.
    """
    if not hasattr(signal, "SIGCHLD") or current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _unpacked(image: np.ndarray, label: np.ndarray, number: np.ndarray, skipped: list[tuple[str, str]]) -> Batch:
    return Batch(torch.from_numpy(image), torch.from_numpy(label), torch.from_numpy(number), skipped)


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and `timeout` reach every process of a group; the main one alone answers, and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _nothing_readable(skipped: list[tuple[str, str]]) -> UldmError:
    first = f", the first being {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
    return UsageError(f"not one image of the data set can be decoded{first}")
