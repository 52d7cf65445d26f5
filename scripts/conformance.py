"""How near uldm comes to the numbers of the published latent-diffusion code, on its nine small models in tests/golden.

usage: python scripts/conformance.py [FAMILY]... [--json]

Each model is written as it would be published, `model.ckpt` with `config.yaml` beside it, opened as the commands open
it, and made to compute what the reference computed. The error of a tensor is the norm of the difference over the norm
of the reference's; whole numbers must be equal. It exits 1 where an error is above 1e-4.
"""

import argparse
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from uldm_cli import console
from uldm_cli.core.conditioning import Condition, inpainting_condition
from uldm_cli.core.denoiser import training_target
from uldm_cli.core.guidance import guided
from uldm_cli.core.known import known_region
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.samplers import Constrain, Denoise, Noise, Step, ddpm, posterior_deviation
from uldm_cli.core.spacing import uniform_timesteps
from uldm_cli.formats.compvis.buffers import schedule_buffers
from uldm_cli.formats.compvis.write import source_tensors
from uldm_cli.runs.models import ModelFile, load_latent_diffusion, model_config, resolve
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.samplers import DDIM, PLMS

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
FAMILIES = sorted(path.name for path in (GOLDEN / "compvis").iterdir())
LIMIT = 1e-4
STEPS = 8
VALUES = ("class", "tokens", "lr_image", "segmentation", "embedding")
"""What conditions are made of, as the stored tensors are named."""
INPUTS = {
    *("image", "mask", "t", "x_T", "ddim.noise", "ddpm.noise", "known.mask", "known.noise"),
    *(f"{which}.{value}" for which in ("cond", "uncond") for value in VALUES),
}
"""What was given to the reference. All other stored tensors are its results."""
ROWS = {
    "encoding": ("encode.*", "latent"),
    "decoding": ("decoded", "decoded.*"),
    "quantizing": ("codes", "quantized"),
    "conditioning": ("cond.encoded", "uncond.encoded"),
    "schedule": ("state.*", "ddim.timesteps", "ddim.alphas*", "ddim.sigmas.*"),
    "noise prediction": ("eps.*",),
    "noising, loss": ("x_noisy", "loss.*"),
    "DDIM, eta 0": ("ddim.eta0.*",),
    "DDIM, eta 1": ("ddim.eta1.*",),
    "guidance": ("ddim.cfg3.*",),
    "PLMS": ("plms.*",),
    "known region": ("known.sample",),
    "DDPM": ("ddpm.from_t2",),
}
"""The table's rows, and which results each stands for."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model as commands have it, and what is stored of the reference's."""

    file: ModelFile
    model: LatentDiffusion
    """With the averaged weights."""
    stored: Tensors

    def condition(self, model: LatentDiffusion, which: str = "cond") -> Condition | None:
        """What the model is told ("cond"), or told instead for guidance ("uncond")."""
        if model.conditioning is None:
            return None
        if "mask" in self.stored:
            return inpainting_condition(model.encode_condition, self.stored["image"], self.stored["mask"])
        values = [self.stored[f"{which}.{name}"] for name in VALUES if f"{which}.{name}" in self.stored]
        # There is no value of nothing where the reference takes zeros.
        return model.condition(values[0] if values else self.stored[f"{which}.encoded"])

    def denoise(self) -> Denoise:
        """The denoiser, told the condition."""
        told = self.condition(self.model)
        return lambda x, t: self.model.denoiser(x, t, told)

    def steps(
        self, sampler: DDIM | PLMS, denoise: Denoise | None = None, constrain: Constrain | None = None
    ) -> Iterator[Step]:
        """A run of a sampler from x_T, with the noise that the reference drew."""
        noise = given(self.stored["ddim.noise"])
        return sampler.build()(denoise or self.denoise(), self.stored["x_T"], self.model.schedule, noise, constrain)


def given(noise: Tensor) -> Noise:
    """Noise `[step, N, C, h, w]`, a step at a time."""
    return lambda step, draw: noise[step - 1]


def first_stage(case: Case) -> Iterator[tuple[str, Tensor]]:
    model, stored = case.model, case.stored
    autoencoder, latent = model.autoencoder, stored["latent"] / model.scale_factor
    yield "latent", model.encode(stored["image"])
    yield "decoded", model.decode(stored["latent"])
    if "codes" in stored:
        quantized = autoencoder.quantize(latent)
        yield "codes", quantized.indices
        yield "quantized", quantized.z
        yield "decoded.noquant", autoencoder.decode(latent)
    else:
        mean, logvar = autoencoder.moments(stored["image"])
        yield "encode.mean", mean
        yield "encode.logvar", logvar


def conditions(case: Case) -> Iterator[tuple[str, Tensor]]:
    for which in ("cond", "uncond"):
        if f"{which}.encoded" in case.stored:
            (part,) = (part for part in vars(case.condition(case.model, which)).values() if part is not None)
            yield f"{which}.encoded", part


def schedule(case: Case) -> Iterator[tuple[str, Tensor]]:
    """The sampler's tables, and the buffers as they are written back: computed, or else those that were kept."""
    told = case.model.schedule
    rising = DDIM(steps=STEPS, spacing="compvis").timesteps(told.T)[::-1]
    squares = torch.tensor([told.alpha(t) ** 2 for t in rising], dtype=torch.float64)
    pairs = zip(rising[1:], rising[:-1], strict=True)
    yield "ddim.timesteps", torch.tensor(rising[1:])
    yield "ddim.alphas", squares[1:]
    yield "ddim.alphas_prev", squares[:-1]
    yield "ddim.sigmas.eta1", torch.tensor([posterior_deviation(told, t, s) for t, s in pairs], dtype=torch.float64)
    computed = schedule_buffers(model_config(case.file, LatentDiffusionModel).schedule.betas())
    computed["scale_factor"] = torch.tensor(case.model.scale_factor)
    written = source_tensors(case.file.checkpoint)
    for name in case.stored:
        group, _, key = name.partition(".")
        if group == "state":
            yield name, computed[key] if key in computed else written[key].read()


def network(case: Case) -> Iterator[tuple[str, Tensor]]:
    """Predictions and loss, the latter with the raw weights."""
    stored, t = case.stored, case.stored["t"]
    raw = load_latent_diffusion(case.file, weights="raw")
    told = case.condition(raw)
    yield "eps.ema", case.model.denoiser.predict(stored["x_T"], t, case.condition(case.model))
    yield "eps.raw", raw.denoiser.predict(stored["x_T"], t, told)
    latent, eps = stored["latent"], stored["ddim.noise"][0]
    alpha, sigma = raw.schedule.factors(t)
    noised = alpha * latent + sigma * eps
    yield "x_noisy", noised
    target = training_target(raw.denoiser.target, latent, eps, alpha, sigma)
    yield "loss.simple.l2", F.mse_loss(raw.denoiser.predict(noised, t, told), target)[None]


def ddim_runs(case: Case) -> Iterator[tuple[str, Tensor]]:
    for eta in (0, 1):
        steps = list(case.steps(DDIM(steps=STEPS, eta=eta, spacing="compvis")))
        yield f"ddim.eta{eta}.x", torch.stack([case.stored["x_T"], *(step.x for step in steps)])
        yield f"ddim.eta{eta}.pred_x0", torch.stack([case.stored["x_T"], *(step.x0 for step in steps)])
        yield f"ddim.eta{eta}.sample", steps[-1].x
        yield f"ddim.eta{eta}.image", case.model.decode(steps[-1].x)


def other_runs(case: Case) -> Iterator[tuple[str, Tensor]]:
    """What there is of guidance, PLMS and known regions; and the last ancestral steps."""
    model, stored = case.model, case.stored
    if "ddim.cfg3.sample" in stored:
        told = case.condition(model)
        assert told is not None, "only conditional models were guided"
        denoise = guided(model.denoiser, told, case.condition(model, "uncond"), 3.0)
        yield "ddim.cfg3.sample", last(case.steps(DDIM(steps=STEPS, eta=0), denoise))
    if "plms.sample" in stored:
        yield "plms.sample", last(case.steps(PLMS(steps=STEPS)))
    if "known.sample" in stored:
        kept = known_region(stored["latent"], stored["known.mask"], model.schedule, given(stored["known.noise"]))
        yield "known.sample", last(case.steps(DDIM(steps=STEPS, eta=0), constrain=kept))
    timesteps = uniform_timesteps(model.schedule.T, model.schedule.T)[-4:]
    start, noise = stored["x_T"], given(stored["ddpm.noise"])
    steps = ddpm(case.denoise(), start, model.schedule, noise, timesteps=timesteps, variance="posterior")
    yield "ddpm.from_t2", last(steps)


def last(steps: Iterator[Step]) -> Tensor:
    """What a run arrives at."""
    *_, step = steps
    return step.x


PARTS: tuple[Callable[[Case], Iterator[tuple[str, Tensor]]], ...] = (
    first_stage,
    conditions,
    schedule,
    network,
    ddim_runs,
    other_runs,
)


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative; infinite for another shape, other whole numbers, or what is no number."""
    if torch.equal(ours, reference):
        return 0.0
    if ours.shape != reference.shape or not reference.is_floating_point():
        return math.inf
    found = float((ours - reference).norm() / reference.norm())
    return math.inf if math.isnan(found) else found


@torch.no_grad()
def errors(family: str) -> dict[str, float]:
    """The error of everything that the reference computed with a model."""
    folder = GOLDEN / "compvis" / family
    stored = load_file(folder / "golden.safetensors")
    with TemporaryDirectory() as published:
        runpy.run_path(str(GOLDEN / "weights.py"))["write_model"](folder, Path(published))
        file = resolve(published)
        case = Case(file, load_latent_diffusion(file), stored)
        computed = dict(pair for part in PARTS for pair in part(case))
        return {name: error(computed[name], stored[name]) for name in sorted(stored.keys() - INPUTS)}


def row_of(name: str) -> str:
    """Where in the table a result stands."""
    (row,) = (row for row, patterns in ROWS.items() if any(fnmatchcase(name, pattern) for pattern in patterns))
    return row


def row_cells(row: str, found: dict[str, dict[str, float]]) -> list[str]:
    """A row of the table: the largest error of each family, or a dash where it has no such results."""
    cells = [row]
    for named in found.values():
        largest = max((error for name, error in named.items() if row_of(name) == row), default=None)
        cells.append("-" if largest is None else f"{largest:.1e}" if largest else "0")
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(usage="python scripts/conformance.py [FAMILY]... [--json]", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--json", action="store_true", help="every tensor's error, as one JSON document")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(FAMILIES))
    if unknown:
        parser.error(f"there is no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    console.configure(json=options.json)
    found = {family: errors(family) for family in options.families or FAMILIES}
    everything = [(error, family, name) for family, named in found.items() for name, error in named.items()]
    largest, family, name = max(everything)
    console.result(
        {"limit": LIMIT, "largest": largest, "errors": found},
        columns=["", *found],
        rows=[row_cells(row, found) for row in ROWS],
        summary=f"{len(everything)} tensors; the largest error is {largest:.1e}, of {name} in {family}",
    )
    return int(largest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
