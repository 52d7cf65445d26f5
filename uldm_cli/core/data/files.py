"""Sets of image files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from torch import Tensor

from uldm_cli.core.data.preparing import Preparation
from uldm_cli.core.data.sources import READ_ERRORS, Readable, Source, open_source
from uldm_cli.core.data.streams import STRICT_HINT
from uldm_cli.core.images import UNREAD, ImageError
from uldm_cli.errors import ConfigError, UsageError

_UNREAD = "of a format that is not read; as JPEG or PNG it would be"


class FileImages:
    """Image files as square images of one size.

    Args:
        source: where they are read from.
        names: of the files.
        labels: a number for each name, -1 for none.
        classes: names of the labels.
        preparation: how they become squares.
        skipped: (name, reason) of files that are left out.
    """

    def __init__(
        self,
        source: Readable,
        names: list[str],
        labels: Sequence[int],
        classes: Sequence[str],
        preparation: Preparation,
        skipped: list[tuple[str, str]] | None = None,
    ) -> None:
        self._source = source
        self.names = names
        self._labels = labels
        self.classes = tuple(classes)
        self._prepare = preparation
        self.channels = preparation.channels
        self.skipped = skipped or []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.sample(index, None)

    def sample(self, index: int, bits: int | None) -> tuple[Tensor, int]:
        """An image, uint8 `[channels, size, size]`, and its label; `bits` choose a random crop, None the centre."""
        name = self.names[index]
        return self._prepare(self._content(name), name, bits), self._labels[index]

    @property
    def size(self) -> int:
        return self._prepare.size

    @size.setter
    def size(self, size: int) -> None:
        self._prepare = replace(self._prepare, size=size)

    def side(self, index: int) -> int:
        """The short side of an image as it is stored, in pixels."""
        name = self.names[index]
        return min(self._prepare.decoded(self._content(name), name)[0].size)

    def _content(self, name: str) -> bytes:
        try:
            with self._source.open(name) as file:
                return file.read()
        except READ_ERRORS as error:
            raise ImageError(name, f"cannot be read ({error})") from error


def open_images(root: str | Path, *, size: int, channels: int = 3, strict: bool = False) -> FileImages:
    """A folder, .tar or .zip of images, as `open_files` opens it; the sub-folders of its root are the classes."""
    return open_files(root, Preparation(size, channels), strict=strict)


def open_files(
    root: str | Path,
    preparation: Preparation,
    *,
    only: tuple[str, Sequence[str]] | None = None,
    labelled: bool = True,
    checked: bool = True,
    strict: bool = False,
) -> FileImages:
    """Lists the images of a folder, of an archive or of an LMDB, sorted by code point.

    Hidden files and folders, and what lacks the extension of an image, are passed over. An image with a damaged
    header or an unusable size, or of a format that is not read, is left out and named in the set's `skipped`.

    Args:
        root: a folder, a .tar or a .zip, or the folder of an LMDB.
        preparation: how the images become squares.
        only: what errors call a list of names, and the names: of the images to use, as paths below the root. One that
            is not there means the only file that is called the same without folders and extension.
        labelled: the sub-folders of the root are the classes; a file beside them has the label -1.
        checked: read the header of each image now. Otherwise what is unusable is found when its turn comes.
        strict: an image that would be skipped is an error.

    Raises:
        ConfigError: root is missing, of another type, damaged, or holds no readable image; or `only` names others.
        UsageError: strict, and an image is unusable.
    """
    source = open_source(Path(root).expanduser())
    there = list(source.names())
    names = [name for name in there if _is_wanted(name, source, preparation)]
    problems = {} if only else {name: _UNREAD for name in there if _suffix(name) in UNREAD and not _is_hidden(name)}
    if only:
        chosen = set(_choose(names, only[1], str(root), only[0]))
        names = [name for name in names if name in chosen]
    if checked:
        problems |= {name: problem for name in names if (problem := _problem(source, name, preparation))}
    skipped = sorted(problems.items())
    if strict and skipped:
        raise UsageError(f"{skipped[0][0]} in {root}: {skipped[0][1]}", STRICT_HINT)
    ordered = sorted(set(names) - problems.keys())
    if not ordered:
        raise _no_images(root, preparation, skipped)
    labels, classes = _by_folder(ordered) if labelled else ([-1] * len(ordered), [])
    return FileImages(source, ordered, labels, classes, preparation, skipped)


def _by_folder(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Labels and classes by the topmost folder of each name."""
    classes = sorted({folder for name in names if (folder := _top_folder(name))})
    number = {folder: i for i, folder in enumerate(classes)}
    return [number.get(_top_folder(name), -1) for name in names], classes


def read_list(path: Path) -> list[str]:
    """The names in a text file, one a line.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", "It is to be a text file with a name a line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{path} is empty", "It is to be a text file with a name a line")
    return names


def _choose(there: Sequence[str], wanted: Sequence[str], root: str, where: str) -> list[str]:
    """Which of the names that are there a list means.

    A name is a path below the root. One that is not there means the only file that is called the same without folders
    and extension: lists of published splits are made for one layout of the files, and users have others.

    Raises:
        ConfigError: a name is not there, or could mean several files.
    """
    known = set(there)
    if known.issuperset(wanted):
        return list(wanted)
    by_stem: dict[str, list[str]] = {}
    for name in there:
        by_stem.setdefault(PurePosixPath(name).stem, []).append(name)
    found = []
    missing = []
    for name in wanted:
        same = [name] if name in known else by_stem.get(PurePosixPath(name).stem, [])
        if len(same) > 1:
            raise ConfigError(f"{name} of {where} could be {same[0]} or {same[1]} in {root}", "Write the whole path")
        found += same
        missing += [] if same else [name]
    if missing:
        what = f"{len(missing):,} of the {len(wanted):,} images of {where} are not in {root}, the first is {missing[0]}"
        raise ConfigError(what, "Names are paths below the root, one a line")
    return found


def _is_wanted(name: str, source: Source, preparation: Preparation) -> bool:
    if source.only_images:
        return True
    return _suffix(name) in preparation.extensions and not _is_hidden(name)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _problem(source: Readable, name: str, preparation: Preparation) -> str | None:
    """Why an image cannot be used, as far as its header tells."""
    try:
        with source.open(name) as file:
            preparation.check(file, name)
    except ImageError as error:
        return error.reason
    except READ_ERRORS as error:
        return f"cannot be read ({error})"
    return None


def _no_images(root: str | Path, preparation: Preparation, skipped: list[tuple[str, str]]) -> ConfigError:
    if not skipped:
        looked = " ".join(sorted(preparation.extensions))
        return ConfigError(f"no images in {root}", f"Looked for {looked}, in sub-folders too")
    name, reason = skipped[0]
    return ConfigError(f"none of the {len(skipped)} images in {root} is usable; the first, {name}: {reason}")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _top_folder(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""
