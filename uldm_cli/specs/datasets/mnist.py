"""The MNIST family, and the small set that is embedded in the package."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from uldm_cli import assets, fetch
from uldm_cli.errors import ConfigError
from uldm_cli.specs.datasets.base import Dataset

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet

DIGITS = tuple("0123456789")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

_PIXELS = 28  # side of the images of the MNIST family


class _MnistLike(Dataset):
    """Four IDX files, gzipped or not, in `<root>/<name>/raw` as torchvision lays them out, or in root itself."""

    root: str | None = Field(
        None, min_length=1, description="folder with the IDX files; without one they are downloaded to the cache"
    )
    train: bool = Field(True, description="the training images; false for the test images")
    size: int = Field(32, ge=8, le=4096, description="side of the images; above 28 they are padded with black")
    channels: Literal[1, 3] = Field(1, description="1 for grey, 3 for the grey repeated")

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    mirrors: ClassVar[tuple[str, ...]]
    md5: ClassVar[dict[str, str]]  # as torchvision publishes them

    def build(self) -> "ImageSet":
        from uldm_cli.core.data import ArrayImages, read_idx

        part = "train" if self.train else "t10k"
        image_file, label_file = self._files(f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.shape[1:] != (_PIXELS, _PIXELS):
            raise ConfigError(f"{image_file} holds an array {images.shape}, expected (N, {_PIXELS}, {_PIXELS})")
        if labels.shape != images.shape[:1] or labels.max(initial=0) >= len(self.classes):
            raise ConfigError(f"{label_file} does not hold a label below {len(self.classes)} for each of {image_file}")
        return ArrayImages(images, labels, classes=self.classes, size=self.size, channels=self.channels)

    def _files(self, *stems: str) -> list[Path]:
        if self.root is None:
            folder = fetch.cache("data") / self.name.lower() / self.name / "raw"
            return [self._find([folder], stem) or self._download(folder / f"{stem}.gz") for stem in stems]
        root = Path(self.root).expanduser()
        found = []
        for stem in stems:
            file = self._find([root / self.name / "raw", root / "raw", root], stem)
            if file is None:
                hint = f"Put {stem}.gz there, or leave root out to have it downloaded"
                raise ConfigError(f"{root} does not hold {self.name}: no {self.name}/raw/{stem}.gz", hint)
            found.append(file)
        return found

    @staticmethod
    def _find(folders: list[Path], stem: str) -> Path | None:
        files = (folder / name for folder in folders for name in (stem, f"{stem}.gz"))
        return next((file for file in files if file.is_file()), None)

    def _download(self, file: Path) -> Path:
        urls = [mirror + file.name for mirror in self.mirrors]
        return fetch.fetch(urls, file, md5=self.md5[file.name], description=f"{self.name} {file.name}")


class MNIST(_MnistLike):
    """Handwritten digits (LeCun, Cortes, Burges): 60,000 to train, 10,000 to test, 28x28 grey."""

    kind: Literal["mnist"] = "mnist"

    name = "MNIST"
    classes = DIGITS
    mirrors = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    }


class FashionMNIST(_MnistLike):
    """Pieces of clothing (Zalando, MIT licence): 60,000 to train, 10,000 to test, 28x28 grey."""

    kind: Literal["fashion-mnist"] = "fashion-mnist"

    name = "FashionMNIST"
    classes = CLOTHES
    mirrors = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    )
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }


class Tiny(Dataset):
    """3,200 images of Fashion-MNIST to train and 400 to test, embedded in the package: needs no network."""

    kind: Literal["tiny"] = "tiny"
    train: bool = Field(True, description="the training images; false for the test images")
    size: int = Field(32, ge=8, le=4096, description="side of the images; above 28 they are padded with black")
    channels: Literal[1, 3] = Field(1, description="1 for grey, 3 for the grey repeated")

    columns: ClassVar[int] = 320  # of the embedded picture that are training images

    def build(self) -> "ImageSet":
        from uldm_cli.core.data import ArrayImages, read_mosaic

        tiles, labels = read_mosaic(assets.path("tiny-fashion-mnist.png"), _PIXELS)
        part = slice(self.columns) if self.train else slice(self.columns, None)
        images, labels = tiles[:, part].reshape(-1, _PIXELS, _PIXELS), labels[:, part].reshape(-1)
        return ArrayImages(images, labels, classes=CLOTHES, size=self.size, channels=self.channels)
