"""`uldm convert`: a model in another layout, and whether it is still the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uldm_cli import console
from uldm_cli.errors import UldmError, UsageError
from uldm_cli.formats import compvis, diffusers, native
from uldm_cli.formats.checkpoint import KEPT
from uldm_cli.formats.tensors import TensorRef
from uldm_cli.runs.models import ModelFile, load_autoencoder, load_latent_diffusion, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from uldm_cli.console import Progress
    from uldm_cli.formats.checkpoint import Checkpoint
    from uldm_cli.formats.tensors import Tensors

Layout = Literal["uldm", "compvis", "diffusers"]
FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""What --dtype can say, and the name that safetensors has for it."""
MB = 1_000_000


@dataclass(frozen=True)
class Converted:
    """A finished conversion."""

    source: ModelFile
    path: Path
    """The file or folder that was written."""
    tensors: int
    bytes: int
    seconds: float
    differences: dict[str, float] | None
    """Largest relative difference of what both compute, by its name; None where that was not asked for."""


def convert(
    reference: str | None,
    layout: Layout,
    destination: Path,
    *,
    config: Path | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    verify: bool = False,
) -> Converted:
    """Writes a model in another layout.

    Args:
        reference: the model, as `resolve` takes it.
        layout: what to write: "uldm" makes a file, the others a folder.
        destination: where; nothing may be there yet.
        config: the YAML of a published checkpoint, where it does not lie beside it.
        dtype: one of FLOATS for the weights; by default each tensor keeps its own.
        weights: "ema" or "raw", for diffusers, which has room for one of them; by default "ema" where there are any.
        verify: run both models on the same input.

    Raises:
        ConfigError: the model cannot be read, or not be written in that layout; the message names the field.
        UldmError: it cannot be written there, or `verify` finds that the two compute different numbers.
    """
    source = resolve(reference, "autoencoder", config)
    if destination.exists():
        raise UsageError(f"{destination} exists already", "Name a new place, or remove it first")
    compvis.check_schedule(source.checkpoint)
    start = time.perf_counter()
    checkpoint = source.checkpoint if dtype is None else cast(source.checkpoint, FLOATS[dtype])
    total = sum(ref.nbytes for ref in checkpoint.tensors.values())
    with console.progress(max(1, total // MB), f"converting to {layout}", "MB") as progress:
        _write(replace(checkpoint, tensors=_counted(checkpoint.tensors, progress)), layout, destination, weights)
    seconds = time.perf_counter() - start
    differences = None
    if verify:
        differences = compare(source, resolve(str(destination), "autoencoder"), weights)
        _check(differences, dtype, destination)
    return Converted(source, destination, len(checkpoint.tensors), total, seconds, differences)


def _write(checkpoint: Checkpoint, layout: Layout, destination: Path, weights: str | None) -> None:
    if layout == "uldm":
        with suppress(OSError):  # what is wrong there, writing the file tells
            destination.parent.mkdir(parents=True, exist_ok=True)
        native.write(checkpoint, destination)
    elif layout == "compvis":
        compvis.write(checkpoint, destination)
    else:
        diffusers.write(checkpoint, destination, weights)


def cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The same model with its weights in another floating-point type, by safetensors' name; nothing is read yet."""

    def changed(name: str, ref: TensorRef) -> TensorRef:
        if name.startswith(KEPT) or ref.dtype not in {*FLOATS.values(), "F64"}:
            return ref
        return TensorRef(ref.shape, dtype, lambda: _as(ref.read(), dtype))

    return replace(checkpoint, tensors={name: changed(name, ref) for name, ref in checkpoint.tensors.items()})


def _as(tensor: Tensor, dtype: str) -> Tensor:
    import torch

    return tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype])


def _counted(tensors: Tensors, progress: Progress) -> dict[str, TensorRef]:
    """The same tensors, each reported when it is read."""
    seen: set[str] = set()  # some are read twice, to be compared
    done = 0

    def reading(name: str, ref: TensorRef) -> TensorRef:
        def read() -> Tensor:
            nonlocal done
            if name not in seen:
                seen.add(name)
                before, done = done, done + ref.nbytes
                progress.advance(done // MB - before // MB)
            return ref.read()

        return TensorRef(ref.shape, ref.dtype, read)

    return {name: reading(name, ref) for name, ref in tensors.items()}


def compare(a: ModelFile, b: ModelFile, weights: str | None = None) -> dict[str, float]:
    """Norm of the difference over norm of a's, of everything that both compute from the same input, in float32.

    Both decode a's latent: one of b's, a little different, may fall to other codes.
    """
    ours = outputs(a, weights)
    theirs = outputs(b, weights, ours["latent"])
    return {name: float((theirs[name] - value).norm() / value.norm()) for name, value in ours.items()}


def outputs(file: ModelFile, weights: str | None, decoded: Tensor | None = None) -> dict[str, Tensor]:
    """What a model makes of inputs drawn from seed 0: latent, image and predicted noise.

    The image is that of `decoded`, or of the model's own latent.
    """
    import torch

    held = weights if weights in file.header.weights else None
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        if file.header.kind == "autoencoder":
            autoencoder: Any = load_autoencoder(file, held)
            channels = file.header.config["autoencoder"]["in_channels"]
            side = file.header.config["image_size"]
            latent = autoencoder.to_latent(draw(1, channels, side, side).clamp(-1, 1))
            return {"latent": latent, "image": autoencoder.from_latent(latent if decoded is None else decoded)}
        model = load_latent_diffusion(file, weights=held)
        latent = model.encode(draw(1, *model.image_shape).clamp(-1, 1))
        x = draw(1, *model.latent_shape)
        eps = model.denoiser(x, 500, _condition(file.header.config, model.latent_shape, draw)).eps
        return {"latent": latent, "image": model.decode(latent if decoded is None else decoded), "eps": eps}


def _condition(config: Mapping[str, Any], latent_shape: tuple[int, int, int], draw: Any) -> Any:
    """Some conditioning of the right shape, drawn like the rest."""
    import torch

    from uldm_cli.core.conditioning import Condition

    concat, context = config.get("concat_channels", 0), config["backbone"].get("context_dim")
    classes = config["backbone"].get("num_classes")
    return Condition(
        concat=draw(1, concat, *latent_shape[1:]) if concat else None,
        context=draw(1, 4, context) if context else None,
        label=torch.zeros(1, dtype=torch.int64) if classes else None,
    )


TOLERANCES = {None: 1e-4, "fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""By how much a conversion may change what is computed: float32 rounds differently in another memory layout only."""


def _check(differences: Mapping[str, float], dtype: str | None, path: Path) -> None:
    name, worst = max(differences.items(), key=lambda item: item[1])
    if not worst <= TOLERANCES[dtype]:
        hint = "It was written; do not use it, and report this"
        if dtype in ("fp16", "bf16"):
            hint = f"It was written. This model may need more digits than {dtype} has: compare samples before using it"
        raise UldmError(
            f"{path} does not compute the same: {name} differs by {worst:.1e}, more than {TOLERANCES[dtype]:.0e}", hint
        )
