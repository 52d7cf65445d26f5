"""Data sets of Hugging Face, read with the package `datasets`: from the hub, or from a local folder."""

import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from uldm_cli.core.data.files import FileImages
from uldm_cli.core.data.preparing import Preparation
from uldm_cli.core.data.sources import optional
from uldm_cli.core.images import one_line
from uldm_cli.errors import ConfigError


def open_hub(
    name: str,
    preparation: Preparation,
    *,
    split: str,
    image: str | None = None,
    label: str | None = None,
    subset: str | None = None,
    offline: bool = False,
) -> FileImages:
    """A data set of encoded images.

    Args:
        name: `owner/name` on the hub, or a local folder: of parquet, arrow or image files, or as `save_to_disk` writes.
        preparation: how the images become squares.
        split: such as "train"; slices like "train[:10%]" are understood, too.
        image: the column of the images; None where there is only one of them.
        label: the column of the labels, which are numbers or texts; None for none.
        subset: which of the data set's configurations.
        offline: use what is on this machine only, here and wherever this process asks the hub.

    Raises:
        ConfigError: the package is not installed, the data set cannot be had, has no such split or column, or a row
            has more than one label.
    """
    datasets = optional("datasets", "To read a data set of Hugging Face")
    if offline:  # for the whole process; both packages read their environment once, when they are imported
        import_module("huggingface_hub.constants").HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        datasets.config.HF_HUB_OFFLINE = True
    table = _load(datasets, name, split, subset)
    kinds = table.features
    pictures = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if image is None and len(pictures) == 1:
        image = pictures[0]
    if image is None or image not in kinds:
        choice = ", ".join(pictures) or "none of its columns holds images"
        raise ConfigError(f"{name} has no image column {image or 'that is the only one'}", f"There are: {choice}")
    if label is not None and label not in kinds:
        raise ConfigError(f"{name} has no column {label}", f"There are: {', '.join(kinds)}")
    if label is not None and not isinstance(kinds[label], datasets.Value | datasets.ClassLabel):
        single = [column for column, kind in kinds.items() if isinstance(kind, datasets.Value | datasets.ClassLabel)]
        what = f"column {label} of {name} does not hold one number or text a row, but {type(kinds[label]).__name__}"
        raise ConfigError(what, f"Those that do: {', '.join(single) or 'none, so leave data.label out'}")
    rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    labels, classes = _labels(table, label) if label else ([-1] * len(table), [])
    return FileImages(_Rows(rows, image), [f"row {i}" for i in range(len(rows))], labels, classes, preparation)


class _Rows:
    """The encoded images of a column."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows, column

    def open(self, name: str) -> IO[bytes]:
        found = self._rows[int(name.removeprefix("row "))][self._column]
        if found is None:
            raise KeyError("the row has no image")
        content: bytes | None = found["bytes"]
        return Path(found["path"]).open("rb") if content is None else io.BytesIO(content)


def _load(datasets: Any, name: str, split: str, subset: str | None) -> Any:
    folder = Path(name).expanduser()
    datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(folder)[split]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(folder)
        return datasets.load_dataset(str(folder) if folder.exists() else name, subset, split=split)
    except Exception as error:  # the package raises what its many backends do
        where = f"the data set {name} of Hugging Face cannot be opened, split {split}"
        hint = "Check the name, split and subset; a local folder is given by its path"
        raise ConfigError(f"{where} ({type(error).__name__}: {one_line(error)[:200]})", hint) from error


def _labels(table: Any, column: str) -> tuple[Sequence[int], list[str]]:
    """A number for each row, and the names of the numbers."""
    values = table[column][:]
    names = getattr(table.features[column], "names", None)
    if names is None:
        names = sorted(set(values) - {None}, key=lambda value: (str(type(value)), value))
        number = {value: i for i, value in enumerate(names)}
        return [number.get(value, -1) for value in values], [str(value) for value in names]
    return [-1 if value is None else value for value in values], list(names)
