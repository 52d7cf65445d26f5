"""What `uldm ldm explain` is going to look at, draw and write: known and checked before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.runs.models import model_config
from uldm_cli.runs.outdir import default_outdir
from uldm_cli.runs.plan import Plan, grid_name, make_plan, picture_name
from uldm_cli.runs.sheets import sheet_layout
from uldm_cli.specs.explaining import Attention, Explaining
from uldm_cli.specs.models import LatentDiffusionModel

if TYPE_CHECKING:
    from uldm_cli.core.attention_maps import View

RECORD = "explain.yaml"
ARRAYS = "arrays"
MOST_PIXELS = 150_000_000  # of a sheet: what programs still open without asking back


@dataclass(frozen=True)
class ExplainPlan(Plan):
    """A run that looks, whose settings fit its model."""

    spec: Explaining
    latent_size: tuple[int, int]
    """Height and width."""
    layers: tuple[str, ...]
    """Names of those whose attention is looked at."""
    factor: int | None
    """How many times smaller than the latent the maps of `--attention-resolution` are."""

    def picture_path(self, kind: str, index: int, steps: tuple[int, ...]) -> Path:
        """Where sample `index` has its own picture of a step."""
        return self.sample_folder(index) / picture_name(kind, steps)

    def sheet_path(self, kind: str) -> Path:
        """Where the sheet of a kind is."""
        return self.folder / grid_name(kind, self.logged, self.spec.step_size, self.spec.sheet.format)

    def arrays_path(self, kind: str) -> Path:
        """Where the maps of a kind are as numbers."""
        return self.folder / f"{kind}.safetensors"

    def explain_files(self) -> Iterator[tuple[str, Path]]:
        """Every file of the run, with its kind."""
        for kind in self.spec.save:
            yield kind, self.sheet_path(kind)
        if self.spec.separate:
            for index in range(self.spec.num):
                yield from self.sample_files(index)
        if self.spec.save_arrays:
            for kind in self.spec.maps:
                yield ARRAYS, self.arrays_path(kind)

    @property
    def view(self) -> View:
        """What is to be seen of the attention."""
        return _view(self.spec.attention, self.factor, self.image_size)

    @property
    def looks(self) -> int:
        """Calls of the network for the maps of one step of one sample."""
        gradients = 1 if self.spec.saliency.method == "gradient" else self.spec.saliency.samples
        return gradients * ("saliency" in self.spec.maps) + ("attention" in self.spec.maps)

    def marked(self, kind: str) -> tuple[int, int, int, int] | None:
        """The part of the image that a map is about, as left, top, width and height, if it is about one."""
        if kind == "attention" and self.spec.attention.query is not None:
            return (*self.spec.attention.query, 1, 1)
        return self.spec.saliency.box if kind == "saliency" else None

    def title(self, kind: str) -> list[str]:
        """What stands above a sheet, in phrases."""
        return [*self.made_with, self._shown(kind)]

    def _shown(self, kind: str) -> str:
        if kind == "image":
            return "the predicted clean image" if self.spec.show == "x0" else "the state, decoded"
        if kind == "saliency":
            saliency = self.spec.saliency
            box = ",".join(map(str, saliency.box or ()))
            targets = {"x0": "the predicted clean latent", "eps": "the predicted noise", "box": f"the box {box}"}
            methods = {"gradient": "saliency", "smoothgrad": "SmoothGrad", "integrated": "integrated gradients"}
            return f"{methods[saliency.method]} for {targets[saliency.meant]}"
        chosen = self.spec.attention
        what = "received" if chosen.query is None else "of the pixel {},{}".format(*chosen.query)
        which = self.layers[0] if len(self.layers) == 1 else f"{len(self.layers)} layers"
        head = "" if chosen.head is None else f", head {chosen.head}"
        how = "rollout" if chosen.rollout else "attention"
        return f"{how} {what}, {which}{head}, 1 is an even share"


def plan_explain(spec: Explaining, outdir: Path | None = None, config: Path | None = None) -> ExplainPlan:
    """What `run_explain` would do, checked; writes nothing.

    Raises:
        ConfigError: as `make_plan`; or the model has no such attention, the image no such pixels, a sheet too many.
    """
    default = default_outdir("ldm", "explain", config)
    draft = make_plan(spec, None, default, RECORD)
    _check_pixels(spec, draft)
    layers, factor = _attention(spec, draft) if "attention" in spec.save else ((), None)
    if "attention" in spec.save and not layers:
        console.note(f"{draft.model.name} has no attention: it is left out")
        spec = spec.model_copy(update={"save": tuple(kind for kind in spec.save if kind != "attention")})
    plan = make_plan(spec, outdir, default, RECORD)
    return ExplainPlan(**vars(plan), latent_size=_latent_size(draft), layers=layers, factor=factor)


def _check_pixels(spec: Explaining, plan: Plan) -> None:
    """That the pixels which are named exist, and that sheets do not have too many."""
    height, width = plan.image_size
    inside = f"Images are {width} x {height} pixels"
    if spec.saliency.box is not None:
        x, y, w, h = spec.saliency.box
        if x + w > width or y + h > height:
            raise ConfigError(f"--saliency-box {x},{y},{w},{h} reaches beyond the image", inside)
    if spec.attention.query is not None:
        x, y = spec.attention.query
        if x >= width or y >= height:
            raise ConfigError(f"--attention-query {x},{y} is outside the image", f"{inside}, counted from 0")
    pixels = sheet_layout(plan, len(plan.logged)).pixels(spec.num)
    if pixels > MOST_PIXELS:
        raise ConfigError(
            f"a sheet of {len(plan.logged)} steps of {spec.num} samples would have {pixels / 1e6:.0f} million pixels",
            "Ask for fewer samples with --num, or fewer steps with a larger --step-size",
        )


def _latent_size(plan: Plan) -> tuple[int, int]:
    factor = model_config(plan.model, LatentDiffusionModel).autoencoder.factor
    return plan.image_size[0] // factor, plan.image_size[1] // factor


def _attention(spec: Explaining, plan: Plan) -> tuple[tuple[str, ...], int | None]:
    """Names of the layers that are meant, none where the model has no attention; the factor of their resolution.

    The network is made for that, without weights.
    """
    from uldm_cli.core.attention_maps import chosen, layers
    from uldm_cli.core.loading import Undrawn

    with Undrawn():
        backbone = model_config(plan.model, LatentDiffusionModel).build().denoiser.backbone
    there = [layer for layer in layers(backbone) if layer.kind == "self"]
    if not there:
        if "save" in spec.model_fields_set or spec.attention != Attention():
            raise ConfigError(f"--save: {plan.model.name} has no attention", "It has: image, saliency")
        return (), None
    named = [layer for layer in there if layer.name == spec.attention.layer]
    factor = _factor(spec.attention.resolution, {layer.factor for layer in named or there}, _latent_size(plan))
    view = _view(spec.attention, factor, plan.image_size)
    try:
        found = chosen(there, view)
    except UsageError as error:
        flag = "head" if named or view.layer is None else "layer"
        value = getattr(spec.attention, flag)
        raise ConfigError(f"--attention-{flag} {value}: {error.message}", error.hint) from error
    return tuple(layer.name for layer in found), factor


def _view(asked: Attention, factor: int | None, image: tuple[int, int]) -> View:
    from uldm_cli.core.attention_maps import View

    return View(asked.layer, factor, asked.head, asked.query, image, rollout=asked.rollout)


def _factor(resolution: str | None, factors: set[int], size: tuple[int, int]) -> int | None:
    """How many times smaller than the latent maps of this resolution are."""
    if resolution is None:
        return None
    there = {factor: (size[0] // factor, size[1] // factor) for factor in sorted(factors)}
    for factor, (height, width) in there.items():
        if resolution in (str(height), f"{height}x{width}"):
            return factor
    listed = ", ".join(f"{height}x{width}" for height, width in there.values())
    raise ConfigError(f"--attention-resolution {resolution}: there are no such maps", f"There are: {listed}")
