"""A checkpoint's tensors under our names, held against what the config says they are; and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import KEPT
from uldm_cli.formats.compvis.config import Translated
from uldm_cli.formats.compvis.mismatch import Difference, explain
from uldm_cli.formats.compvis.names import AVERAGED, EMA, ORIGINAL, TWIN, belongs, is_unused, source_name, told
from uldm_cli.formats.compvis.shapes import shapes_of
from uldm_cli.formats.tensors import TensorRef, Tensors
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Renamed:
    """The tensors of a checkpoint under our names."""

    tensors: dict[str, TensorRef]
    extra: tuple[str, ...]
    """Names that nobody knows; the tensors are kept."""
    warnings: tuple[str, ...]


def expected_shapes(model: Translated) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that our modules have for a config, averages left out."""
    kind = AutoencoderModel if model.kind == "autoencoder" else LatentDiffusionModel
    return shapes_of(read_model(kind, model.config, str(model.path)))


def rename(source: Tensors, model: Translated, path: Path) -> Renamed:
    """The tensors of a checkpoint under our names. What no module has is kept under `kept.`.

    Raises:
        ConfigError: the checkpoint holds something else than the config describes, or has other shapes.
    """
    expected = expected_shapes(model)
    _check_whole(source, model, path)
    averages = {} if not _has_average(source) else _average_of(expected, model.kind)
    wanted = {name: source_name(model.kind, name) for name in (*expected, *averages)}
    shapes = {**expected, **averages}
    used = set(wanted.values())
    differences = [
        Difference(theirs, source[theirs].shape if theirs in source else None, shapes[ours])
        for ours, theirs in wanted.items()
        if theirs not in source or source[theirs].shape != shapes[ours]
    ]
    twins = _twins(source, model)
    unknown = [name for name in source if name not in used and name not in twins]
    differences += [Difference(name, source[name].shape, None) for name in unknown if belongs(model.kind, name)]
    if differences:
        raise explain(differences, path, model)
    tensors = {ours: source[theirs] for ours, theirs in wanted.items()}
    tensors |= {KEPT + name: source[name] for name in source if name not in used and name not in twins.same}
    extra = tuple(name for name in unknown if not is_unused(name))
    return Renamed(tensors, extra, (*_warnings(source, model, bool(averages)), *twins.warnings))


def _check_whole(source: Tensors, model: Translated, path: Path) -> None:
    """Makes sure that a checkpoint is of the config's kind of model, before any tensors are compared."""
    found = told(source)
    wanted = "a latent diffusion model" if model.kind == "latent-diffusion" else "an autoencoder"
    if found != wanted:
        hint = {
            "an autoencoder": "Name the YAML of the autoencoder with --config",
            "a latent diffusion model": "Name the YAML of the whole model with --config",
        }.get(found, "Name a checkpoint that holds the whole model")
        raise ConfigError(f"{path} holds {found}, and {model.path} describes {wanted}", hint)


def _has_average(source: Tensors) -> bool:
    return any(name.startswith(EMA) and not is_unused(name) for name in source)


def _average_of(expected: Shapes, kind: str) -> dict[str, tuple[int, ...]]:
    part = AVERAGED[kind][0] + "."
    return {"ema." + name.removeprefix(part): shape for name, shape in expected.items() if name.startswith(part)}


@dataclass(frozen=True)
class _Twins:
    """The second copy of a first stage that is the conditioner, too."""

    same: frozenset[str] = frozenset()
    """Names whose tensors are equal, bit for bit, to the first copy's: they need not be kept."""
    other: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.same or name in self.other

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.other:
            return ()
        said = f"{len(self.other)} tensors under {TWIN}* are not those under {ORIGINAL}*; the latter are used"
        return (said,)


def _twins(source: Tensors, model: Translated) -> _Twins:
    if (model.config.get("conditioner") or {}).get("kind") != "first-stage":
        return _Twins()
    copies = {name: ORIGINAL + name.removeprefix(TWIN) for name in source if name.startswith(TWIN)}
    same = {name for name, first in copies.items() if first in source and _equal(source[name], source[first])}
    return _Twins(frozenset(same), frozenset(set(copies) - same))


def _equal(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors are the same bits. Where they share memory, as when they were saved, nothing is read."""
    import torch

    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    x, y = a.read(), b.read()
    if x.data_ptr() == y.data_ptr() and x.stride() == y.stride():
        return True
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y)))


def _warnings(source: Tensors, model: Translated, averaged: bool) -> list[str]:
    warnings = []
    if model.kind == "latent-diffusion" and not averaged:
        warnings.append("it holds no averaged (EMA) weights, only the raw ones")
    floats = {ref.dtype for name, ref in source.items() if belongs(model.kind, name)}
    half = sorted(floats & {"F16", "BF16"})
    if half:
        warnings.append(f"its weights are in half precision ({', '.join(half)})")
    if model.scale_by_std and "scale_factor" not in source:
        said = (
            f"the config has scale_by_std, and the checkpoint no scale_factor: {model.config['scale_factor']} is used"
        )
        warnings.append(said)
    return warnings
