"""Everything that the model card of fruits64 states: its figures as Markdown tables, and its pictures.

python benchmarks/fruits64.py --precision bf16 --compile            # an hour or two on two cores
python benchmarks/fruits64.py --limit 300 --samples 64 --also       # a quick look
python benchmarks/fruits64.py --against before.safetensors          # and a table with another model of these images

Needs `pip install '.[docs]'`, the data and the Inception weights. Samples and Inception features are kept in `--outdir`
and used again; a run that was stopped goes on where it was.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_fid import inception
from pytorch_fid.fid_score import calculate_frechet_distance
from safetensors.torch import load_file
from torch import Tensor
from torchvision.utils import make_grid

from uldm_cli import console
from uldm_cli.core.data import FileImages, open_images, sequential
from uldm_cli.core.device import pick_device
from uldm_cli.core.images import to_uint8
from uldm_cli.core.lpips import LPIPS
from uldm_cli.core.quantizers import perplexity, usage
from uldm_cli.core.vqvae import VQVAE
from uldm_cli.errors import UldmError
from uldm_cli.runs.files import atomic_write, write_png
from uldm_cli.runs.models import load_autoencoder, resolve
from uldm_cli.runs.perceptual import load_lpips
from uldm_cli.runs.sample import plan_sample, sample
from uldm_cli.specs.samplers import DDIM
from uldm_cli.specs.sampling import Sampling

SIZE = 64
BATCH = 50  # without a remainder in 2,000: a compiled network is compiled once
SAMPLES_SHOWN = 64
RECONSTRUCTIONS_SHOWN = 16
QUANTILES = (0.01, 0.1, 0.5, 0.9)
QUERIES = 2000
"""Images of each kind whose nearest training image is looked for."""

Features = NDArray[np.float64]


@dataclass(frozen=True)
class ImageFolder:
    """A set in memory: `images` uint8 `[N, 3, H, W]`, and the class of each."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Reconstruction:
    """How the autoencoder repeats images that it has not been trained on; both sides in 8 bits."""

    psnr: float
    """Mean of the images' PSNR, in dB."""
    psnr_of_mean: float
    """PSNR of the mean squared error over all images, in dB."""
    lpips: float
    perplexity: float
    usage: float
    fid: float
    """Of the reconstructions, against the images themselves."""


# Reading, sampling, looking at batches


def read(path: Path, limit: int | None) -> ImageFolder:
    """All images of an archive, or `limit` of them at equal distances."""
    opened: FileImages = open_images(path, size=SIZE, strict=True)
    batches = list(sequential(opened, batch_size=256))
    images, labels = torch.cat([b.image for b in batches]), torch.cat([b.label for b in batches])
    chosen = spread(len(images), limit or len(images))
    return ImageFolder(images[chosen], labels[chosen], opened.classes)


def spread(length: int, count: int) -> Tensor:
    """`count` indices below `length` at equal distances; all of them when there are fewer."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def draw_samples(
    setting: tuple[int, float], count: int, options: argparse.Namespace, model: str | None = None
) -> Tensor:
    """Samples with the seeds 0, 1, ... as `uldm ldm sample` makes them: uint8 `[N, 3, H, W]`."""
    steps, eta = setting
    spec = Sampling(
        model=model,
        sampler=DDIM(steps=steps, eta=eta),
        step_size=0,
        seeds=f"0-{count - 1}",
        save=("npz",),
        batch_size=BATCH,
        device=options.device,
        precision=options.precision,
        compile=options.compile,
    )
    other = f"-{Path(model).stem}" if model else ""
    plan = plan_sample(spec, options.outdir / f"ddim-{steps}-eta-{eta:g}{other}")
    sample(plan, resume=True)
    assert plan.archive
    return torch.from_numpy(np.load(plan.archive)["arr_0"]).permute(0, 3, 1, 2)


def batched(images: Tensor, device: torch.device, size: int = 64) -> Iterator[Tensor]:
    """Images as float batches in [-1, 1] on a device."""
    for first in range(0, len(images), size):
        yield images[first : first + size].to(device).float() / 127.5 - 1


def counted(images: Tensor, device: torch.device, what: str, size: int = 64) -> Iterator[Tensor]:
    """The same, with its progress shown."""
    with console.progress(len(images), what, "images") as progress:
        for batch in batched(images, device, size):
            yield batch
            progress.advance(len(batch))


def eight_bits(x: Tensor) -> Tensor:
    """Images `[N, 3, H, W]` in [-1, 1] as a file would hold them: uint8, on the host."""
    return torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2)


# The autoencoder


def autoencoder_of(ref: str | None, device: torch.device) -> VQVAE:
    """Of the embedded model, or of another one."""
    return cast(VQVAE, load_autoencoder(resolve(ref)).to(device).to(memory_format=torch.channels_last))


@torch.inference_mode()
def reconstruct(images: Tensor, model: VQVAE, device: torch.device) -> tuple[Tensor, Tensor]:
    """Reconstructions, uint8, and how often each code was used, `[K]`."""
    counts = torch.zeros(model.quantize.codebook_size, dtype=torch.int64)
    out: list[Tensor] = []
    for x in counted(images, device, "reconstructing"):
        z, _, indices = model.encode_with_indices(x)
        counts += torch.bincount(indices.flatten(), minlength=len(counts)).cpu()
        out.append(eight_bits(model.decode(z)))
    return torch.cat(out), counts


def judge(images: Tensor, model: VQVAE, lpips: LPIPS, extract: "Inception", device: torch.device) -> Reconstruction:
    """The figures of a model's reconstructions."""
    again, counts = reconstruct(images, model, device)
    mse = (images.float() - again).square().mean((1, 2, 3))
    return Reconstruction(
        psnr=float(decibels(mse).mean()),
        psnr_of_mean=float(decibels(mse.mean())),
        lpips=float(distances(images, again, lpips, device).mean()),
        perplexity=float(perplexity(counts)),
        usage=float(usage(counts)),
        fid=fid(extract(again, "reconstructions"), extract(images, "test images")),
    )


def decibels(mse: Tensor) -> Tensor:
    """PSNR of a mean squared error of 8-bit values."""
    return 10 * torch.log10(255**2 / mse)


@torch.inference_mode()
def distances(a: Tensor, b: Tensor, lpips: LPIPS, device: torch.device) -> Tensor:
    """LPIPS of each pair of images, `[N]`."""
    pairs = zip(counted(a, device, "LPIPS"), batched(b, device), strict=True)
    return torch.cat([lpips(x, y).flatten().cpu() for x, y in pairs])


# FID


class Inception:
    """Features of pytorch-fid's InceptionV3, kept in a folder by what they were computed of.

    Args:
        weights: safetensors with pytorch-fid's names, as float16 or float32; the classifier may be missing.
        cache: folder for features.
    """

    def __init__(self, weights: Path, cache: Path, device: torch.device) -> None:
        self.hash = hashlib.sha256(weights.read_bytes()).hexdigest()
        self._weights, self._cache, self._device = weights, cache, device
        self._network: Callable[[Tensor], list[Tensor]] | None = None

    def __call__(self, images: Tensor, what: str) -> Features:
        """Pooled features, float64 `[N, 2048]`, of uint8 images `[N, 3, H, W]`, resized as pytorch-fid does."""
        key = hashlib.sha256(images.contiguous().numpy().tobytes() + self.hash.encode()).hexdigest()
        path = self._cache / f"inception-{key[:16]}.npy"
        if not path.exists():
            found = self._compute(images, what)
            self._cache.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda file: np.save(file, found))
        features: Features = np.load(path).astype(np.float64)
        return features

    @torch.inference_mode()
    def _compute(self, images: Tensor, what: str) -> NDArray[np.float32]:
        network = self._network = self._network or self._load()
        batches = counted(images, self._device, f"Inception, {what}")
        # It takes [0, 1] and scales to [-1, 1] itself.
        return torch.cat([network((x + 1) / 2)[0].flatten(1).cpu() for x in batches]).numpy()

    def _load(self) -> Callable[[Tensor], list[Tensor]]:
        state = {name: value.float() for name, value in load_file(self._weights).items()}
        state.setdefault("fc.weight", torch.zeros(1008, 2048))  # behind the features: no matter what it holds
        state.setdefault("fc.bias", torch.zeros(1008))
        # pytorch-fid knows its weights only by their address, and would download them.
        with patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            network = inception.InceptionV3().eval().to(self._device, memory_format=torch.channels_last)
        return cast("Callable[[Tensor], list[Tensor]]", network)


def fid(a: Features, b: Features) -> float:
    """Frechet distance of two sets of features (Heusel et al. 2017)."""
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    return float(calculate_frechet_distance(*moments[0], *moments[1]))


# Nearest training images


class Neighbours:
    """The training image, or mirror image of one, that is nearest by LPIPS: training saw both."""

    def __init__(self, training: Tensor, lpips: LPIPS, device: torch.device) -> None:
        self._candidates = torch.cat([training, training.flip(-1)])
        self._lpips, self._device, self._count = lpips, device, len(training)

    @torch.inference_mode()
    def of(self, images: Tensor, what: str, own: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Index among the training images `[N]`, the (mirrored) image itself, and its LPIPS distance `[N]`.

        Args:
            images: uint8 `[N, 3, H, W]`.
            what: for the progress.
            own: which training image each of `images` is; it and its mirror image do not count then.
        """
        queries = torch.cat([self._lpips.embed(x) for x in counted(images, self._device, what)])
        best = torch.full((len(images),), torch.inf, device=self._device)
        index = torch.zeros(len(images), dtype=torch.int64, device=self._device)
        first = 0
        for batch in counted(self._candidates, self._device, f"{what} against training images", 512):
            there = self._lpips.embed(batch)
            apart = there.square().sum(1) - 2 * queries @ there.T
            number = torch.arange(first, first + len(batch), device=self._device)
            if own is not None:
                apart[own.to(self._device)[:, None] == number % self._count] = torch.inf
            nearest, where = apart.min(1)
            index = torch.where(nearest < best, number[where], index)
            best = torch.minimum(nearest, best)
            first += len(batch)
        found = self._candidates[index.cpu()]
        return index.cpu() % self._count, found, distances(images, found, self._lpips, self._device)


def memorisation(
    training: Tensor, test: Tensor, samples: Tensor, model: VQVAE, lpips: LPIPS, device: torch.device
) -> tuple[dict[str, list[float]], Tensor, Tensor]:
    """How near to training images samples are, and what that is to be compared with.

    Returns:
        Quantiles of the distances, by kind of image; each sample's nearest training image as index and as image.
    """
    neighbours = Neighbours(training, lpips, device)
    own = spread(len(training), QUERIES)
    copies, _ = reconstruct(training[own], model, device)
    unseen = test[spread(len(test), QUERIES)]
    decoded, _ = reconstruct(unseen, model, device)
    index, found, of_samples = neighbours.of(samples[:QUERIES], "samples")
    apart = {
        "samples": of_samples,
        "test images": neighbours.of(unseen, "test images")[2],
        "test images, through the autoencoder": neighbours.of(decoded, "reconstructions")[2],
        "training images, to the nearest other one": neighbours.of(training[own], "training images", own)[2],
        "training images, through the autoencoder, to themselves": distances(copies, training[own], lpips, device),
    }
    levels = torch.tensor(QUANTILES)
    return {name: d.quantile(levels).tolist() for name, d in apart.items()}, index, found


# What comes out


def write_pictures(
    folder: Path, samples: Tensor, nearest: Tensor, test: Tensor, model: VQVAE, device: torch.device
) -> None:
    """The card's pictures: samples, each beside its nearest training image, and reconstructions."""
    shown = samples[:SAMPLES_SHOWN]
    gap = torch.full_like(shown[..., :2], 255)
    pairs = torch.cat([shown, gap, nearest[:SAMPLES_SHOWN]], 3)
    originals = test[spread(len(test), RECONSTRUCTIONS_SHOWN)]
    again, _ = reconstruct(originals, model, device)
    folder.mkdir(parents=True, exist_ok=True)
    for name, images, columns, padding in (
        ("samples", shown, 8, 2),
        ("nearest_1", pairs[: SAMPLES_SHOWN // 2], 8, 8),
        ("nearest_2", pairs[SAMPLES_SHOWN // 2 :], 8, 8),
        ("reconstructions", torch.cat([originals, again]), RECONSTRUCTIONS_SHOWN, 2),
    ):
        picture = make_grid(images, nrow=columns, padding=padding, pad_value=255)
        write_png(folder / f"fruits64_{name}.png", picture.permute(1, 2, 0).contiguous().numpy())


def table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown; all columns but the first hold numbers."""
    rule = "|".join(["---", *("---:" for _ in columns[1:])])
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows), ""])


def comparison(data: Mapping[str, Any]) -> str:
    """The table of the embedded model and others; nothing where there are none."""
    if not data["against"]:
        return ""
    sampled = next(iter(data["fid"].values()))
    rows = [
        (name, f"{x['psnr']:.3f} dB", f"{x['lpips']:.5f}", f"{x['fid']:.2f}", f"{x['sampled']:.2f}")
        for name, x in {"embedded": data["reconstruction"] | {"sampled": sampled}, **data["against"]}.items()
    ]
    return table(("model", "PSNR", "LPIPS", "FID of reconstructions", f"FID of {data['shown']}"), rows)


def as_markdown(data: Mapping[str, Any]) -> str:
    """The figures, for the card."""
    seen: dict[str, float] = data["reconstruction"]
    rows = [
        ("PSNR, mean over the images", f"{seen['psnr']:.2f} dB"),
        ("PSNR of the mean squared error", f"{seen['psnr_of_mean']:.2f} dB"),
        ("LPIPS (AlexNet, version 0.1)", f"{seen['lpips']:.4f}"),
        ("FID, against the images themselves", f"{seen['fid']:.2f}"),
        ("codebook perplexity, of 1,024", f"{seen['perplexity']:.0f}"),
        ("codes used", f"{seen['usage']:.1%}"),
    ]
    scores = [(name, f"{score:.2f}") for name, score in data["fid"].items()]
    apart = [(name, *(f"{value:.4f}" for value in values)) for name, values in data["lpips_to_nearest"].items()]
    images = data["images"]
    return "\n".join(
        [
            table((f"reconstruction of {images['test']:,} test images", "value"), rows),
            table((f"against {images['training']:,} training images", "FID"), scores),
            comparison(data),
            table(("LPIPS to the nearest training image", *(f"{q:.0%}" for q in QUANTILES)), apart),
            f"By their nearest training image, the samples show {len(data['classes_sampled'])} "
            f"of {images['classes']} classes.",
        ]
    )


def score_samples(
    shown: Tensor, reference: Features, extract: Inception, options: argparse.Namespace
) -> dict[str, float]:
    """FID of the samples, and of fewer with each setting: FID falls with the number of images, so alike counts only."""
    found = extract(shown, "samples")
    scores = {title(options.sampler, len(found)): fid(found, reference)}
    if options.also:
        fewer = found[: options.also_samples]
        scores[title(options.sampler, len(fewer))] = fid(fewer, reference)
    for setting in options.also:
        drawn = draw_samples(setting, options.also_samples, options)
        scores[title(setting, len(drawn))] = fid(extract(drawn, "samples"), reference)
    return scores


def title(setting: tuple[int, float], count: int) -> str:
    """How a row of samples is called."""
    return f"{count:,} samples, DDIM, {setting[0]} steps, eta {setting[1]:g}"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON has them; writes the pictures."""
    device = pick_device(options.device)
    training, test = (read(options.data / f"{name}.tar", options.limit) for name in ("training", "test"))
    model, lpips = autoencoder_of(None, device), load_lpips().to(device)
    extract = Inception(options.inception, options.outdir, device)
    seen = judge(test.images, model, lpips, extract, device)
    shown = draw_samples(options.sampler, options.samples, options)
    reference = extract(training.images, "training images")
    scores = score_samples(shown, reference, extract, options)
    scores[f"the {len(test.images):,} test images"] = fid(extract(test.images, "test images"), reference)
    others = {}
    for ref in options.against:
        drawn = draw_samples(options.sampler, options.samples, options, ref)
        figures = judge(test.images, autoencoder_of(ref, device), lpips, extract, device)
        others[ref] = asdict(figures) | {"sampled": fid(extract(drawn, f"samples of {ref}"), reference)}
    apart, index, nearest = memorisation(training.images, test.images, shown, model, lpips, device)
    write_pictures(options.pictures, shown, nearest, test.images, model, device)
    labels = training.labels[index].bincount(minlength=len(training.classes)).tolist()
    return {
        "images": {"training": len(training.images), "test": len(test.images), "classes": len(training.classes)},
        "reconstruction": asdict(seen),
        "fid": scores,
        "against": others,
        "inception_sha256": extract.hash,
        "precision": options.precision,
        "shown": title(options.sampler, len(shown)),
        "quantiles": list(QUANTILES),
        "lpips_to_nearest": apart,
        "classes_sampled": {kind: n for kind, n in zip(training.classes, labels, strict=True) if n},
    }


def sampler(text: str) -> tuple[int, float]:
    """`200:1` as 200 steps and eta 1."""
    steps, _, eta = text.partition(":")
    return int(steps), float(eta)


def main() -> int:
    """Print the tables, and write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    shared = Path("../shared")
    parser.add_argument(
        "--against", nargs="*", default=[], metavar="REF", help="other latent diffusion models of these images"
    )
    parser.add_argument("--data", type=Path, default=shared / "data/fruits64", help="folder of training.tar, test.tar")
    parser.add_argument("--inception", type=Path, default=shared / "weights/inception-2015-12-05-fid.safetensors")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/fruits64-card"), help="samples and features")
    parser.add_argument("--pictures", type=Path, default=Path("docs/models"), help="folder of the card's pictures")
    parser.add_argument("--samples", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument(
        "--sampler", type=sampler, default=(50, 0.0), metavar="STEPS:ETA", help="setting of DDIM (default: 50:0)"
    )
    parser.add_argument(
        "--also",
        type=sampler,
        nargs="*",
        default=[(200, 1.0), (100, 1.0)],
        metavar="STEPS:ETA",
        help="settings to compare it with (default: 200:1, which is that of `uldm ldm sample`, and 100:1)",
    )
    parser.add_argument("--also-samples", type=int, default=500, help="samples for comparing (default: 500)")
    parser.add_argument("--limit", type=int, help="use so many images of each set only")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="of sampling")
    parser.add_argument("--compile", action="store_true", help="compile the network for sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    options = parser.parse_args()
    console.configure(json=options.json)
    try:
        data = measure(options)
    except UldmError as e:
        console.error(e)
        return e.exit_code
    if options.json:
        console.result(data)
    else:
        console.text(as_markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
