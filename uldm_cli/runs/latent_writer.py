"""Encoding images into the files of a latent cache, by one process or several.

Each process encodes every world-th file that is missing. The bytes of a file depend on neither number of processes.
"""

import json
from collections.abc import Generator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import UldmError
from uldm_cli.formats.tensors import write_safetensors
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.latent_cache import INDEX, KEY, RECORD, shard_path
from uldm_cli.runs.outdir import write_record
from uldm_cli.runs.signals import Stop
from uldm_cli.runs.skipped import Skipped
from uldm_cli.specs.encoding import Contents, Encoding, Shard, Sums

if TYPE_CHECKING:
    from torch import Tensor, nn

    from uldm_cli.core.data import Batch, ImageSet
    from uldm_cli.core.engine import Engine


class LatentWriter:
    """Encodes images in their own order and writes the files of a cache.

    An image that cannot be decoded is replaced by the next readable one, as in training from images.
    """

    def __init__(
        self,
        folder: Path,
        config: Encoding,
        contents: Contents,
        images: "ImageSet",
        module: "nn.Module",
        engine: "Engine",
        stop: Stop,
    ) -> None:
        import torch

        self.folder, self.config, self.contents, self.images = folder, config, contents, images
        self.engine, self.stop = engine, stop
        self.module = module.to(engine.device).to(memory_format=torch.channels_last)
        self._skipped = Skipped(f"{INDEX} will name them all")

    def write(self, missing: list[int]) -> None:
        """Writes the files of these numbers, each process its share; they go through them side by side."""
        rank, world, count = self.engine.rank, self.engine.world, self.contents.count
        self._skipped.add(self.images.skipped)
        images = sum(map(count, missing))
        with (
            closing(self._reading(missing[rank::world])) as self._batches,
            console.progress(images, "encoding", "images") as self._progress,
        ):
            for start in range(0, len(missing), world):
                together = missing[start : start + world]
                mine = together[rank : rank + 1]
                for number in mine:
                    self._write(number)
                self.engine.wait()
                self._progress.advance(sum(count(n) for n in together if n not in mine))

    def _reading(self, mine: list[int]) -> "Generator[Batch, None, None]":
        """The images of some files, one file after the other."""
        from uldm_cli.core.data import filled

        return filled(
            self.images,
            chain.from_iterable(map(self._rows, mine)),
            workers=self.config.workers,
            strict=self.config.data is not None and self.config.data.strict,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _rows(self, number: int) -> list[range]:
        """The indices of a file's images, batch by batch: no batch crosses its border."""
        first, size = number * self.contents.shard_size, self.config.batch_size
        end = first + self.contents.count(number)
        return [range(start, min(start + size, end)) for start in range(first, end, size)]

    def _write(self, number: int) -> None:
        from uldm_cli.core.data.latents import digest_of, sums_of

        tensors, skipped = self._encoded(number)
        sums = Sums.model_validate(sums_of(tensors))
        count = self.contents.count(number)
        shard = Shard(number=number, count=count, sha256=digest_of(tensors), sums=sums, skipped=skipped)
        said = {"contents": self.contents.model_dump(mode="json"), "shard": shard.model_dump(mode="json")}
        if not (writable_folder(self.folder) / RECORD).exists():
            write_record(self.folder, RECORD, self.config)
        write_safetensors(shard_path(self.folder, number), tensors, {KEY: json.dumps(said)})

    def _encoded(self, number: int) -> "tuple[dict[str, Tensor], tuple[tuple[str, str], ...]]":
        """The tensors of a file, and which images others stand for."""
        import torch

        contents, count = self.contents, self.contents.count(number)
        dtype: torch.dtype = getattr(torch, contents.dtype)
        tensors = {name: torch.empty((count, *contents.latent_shape), dtype=dtype) for name in contents.tensors}
        tensors["label"] = torch.empty(count, dtype=torch.int64)
        skipped: list[tuple[str, str]] = []
        for batch in islice(self._batches, len(self._rows(number))):
            self._fill(tensors, batch.number - number * contents.shard_size, batch.image, batch.label)
            skipped += batch.skipped
            self._progress.advance(len(batch))
            if self.stop.requested:
                console.note("what was written is whole; the same command goes on from there")
                raise KeyboardInterrupt
        self._skipped.add(skipped)
        return tensors, tuple(skipped)

    def _fill(self, tensors: "dict[str, Tensor]", places: "Tensor", images: "Tensor", labels: "Tensor") -> None:
        """Puts the latents of images, and of their mirrored copies, in their places."""
        import torch

        from uldm_cli.core.data.latents import FLIPPED, latents_of
        from uldm_cli.core.training import to_float

        device = self.engine.device
        pixels = to_float(images.to(device, non_blocking=True))
        found: dict[str, Tensor] = {}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.engine.precision == "bf16"):
            found |= latents_of(self.module, pixels)
            if self.contents.flip:
                mirrored = latents_of(self.module, pixels.flip(3))
                found |= {name + FLIPPED: value for name, value in mirrored.items()}
        for name, value in found.items():
            stored = value.to("cpu", tensors[name].dtype)
            if not stored.isfinite().all():
                wider = f" in {self.contents.dtype}" if value.isfinite().all() else ""
                hint = "Use dtype=float32" if wider else "Use --precision fp32, or another autoencoder"
                raise UldmError(f"the latents of the images are NaN or infinite{wider}", hint)
            tensors[name][places] = stored
        tensors["label"][places] = labels
