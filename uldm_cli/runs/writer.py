"""Pictures and archives of a sampling run, written in threads while the next step is computed."""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from uldm_cli.runs.draw.latents import LATENT_SCALE, draw_latent, signed_to_bytes
from uldm_cli.runs.files import atomic_write, write_png

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

THREADS = 4
WAITING = 128  # pictures waiting to be encoded: beyond that, computing waits, so that memory stays bounded


class Writer:
    """Does writing in threads. Leaving the block waits for all of it; the first failure is raised in the caller.

    Also when the block is left by an exception, what was submitted is written: it has been computed, and a run that
    is resumed need not do so again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write")
        self._waiting: deque[Future[None]] = deque()

    def submit(self, task: Callable[..., None], *args: object) -> None:
        """Calls `task(*args)` in a thread, soon. Raises what an earlier task raised."""
        if len(self._waiting) >= WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(task, *args))

    def wait(self) -> None:
        """Until everything submitted is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()


def save_image(path: Path, image: NDArray[np.uint8], about: Mapping[str, str]) -> None:
    """A decoded image `[H, W, C]`."""
    write_png(path, drop_grey_channel(image), dict(about))


def save_latent(path: Path, latent: Floats, size: tuple[int, int], about: Mapping[str, str]) -> None:
    """A scaled latent `[C, h, w]`, drawn at `size` (height, width) in the fixed scale."""
    write_png(path, draw_latent(latent, size), {**about, "scale": f"{LATENT_SCALE:g}"})


def draw_difference(kind: str, values: Floats, size: tuple[int, int], scale: float) -> NDArray[np.uint8]:
    """A difference of images `[H, W, C]` or of latents `[C, h, w]`, with `scale` as white and its negative as black."""
    if kind == "image-diff":
        return drop_grey_channel(signed_to_bytes(values, scale))
    return draw_latent(values, size, scale)


def save_difference(
    path: Path, kind: str, values: Floats, size: tuple[int, int], scale: float, about: Mapping[str, str]
) -> None:
    """A difference, drawn in a scale that the picture keeps as text."""
    write_png(path, draw_difference(kind, values, size, scale), {**about, "scale": f"{scale:.9g}"})


def save_scales(path: Path, scales: Mapping[str, float]) -> None:
    """The scales of the pictures of differences in a folder: by file name, the value that is drawn white."""
    content = json.dumps({name: {"scale": scale} for name, scale in scales.items()}, indent=2) + "\n"
    atomic_write(path, lambda file: file.write(content.encode()))


def drop_grey_channel(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[H, W, 1]` as `[H, W]`; what has colour stays."""
    return image[..., 0] if image.shape[-1] == 1 else image
