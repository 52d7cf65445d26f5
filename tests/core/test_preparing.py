"""What is cut out of an image and how it is scaled; images that are arrays; unusable images of every sort."""

import io
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uldm_cli.core import rng
from uldm_cli.core.data import Preparation, open_files, sequential, stream
from uldm_cli.core.data import sources as sources_module
from uldm_cli.core.images import ImageError
from uldm_cli.errors import ConfigError, UsageError

RANDOM = np.random.default_rng(0)


def noise(width: int, height: int, *more: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, *(more or (3,))), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    return encoded(Image.fromarray(array), "PNG")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tif(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="minisblack", **options)
    return file.getvalue()


def chw(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 0)


@pytest.mark.parametrize("size", [(50, 33), (33, 50), (40, 33), (33, 33)])
@pytest.mark.parametrize("resize", ["lanczos", "bicubic", "bilinear", "box"])
def test_the_centre_is_cut_at_whole_pixels_then_scaled(size: tuple[int, int], resize: Any) -> None:
    """Step by step what the published loader of LSUN does."""
    pixels = noise(*size)
    side, (width, height) = min(size), size
    square = pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    scaled = Image.fromarray(square).resize((16, 16), getattr(Image.Resampling, resize.upper()))
    assert np.array_equal(Preparation(16, resize=resize)(png(pixels), "x"), chw(np.asarray(scaled)))


def test_box_is_the_mean_of_whole_boxes() -> None:
    pixels = noise(32, 32).astype(np.float64)
    means = pixels.reshape(8, 4, 8, 4, 3).mean((1, 3))
    found = Preparation(8, resize="box")(png(pixels.astype(np.uint8)), "x").numpy()
    assert np.abs(found - chw(means)).max() <= 1  # Pillow rounds twice: rows, then columns


def test_nothing_is_scaled_with_none() -> None:
    pixels = noise(21, 18)
    found = Preparation(9, resize="none")(png(pixels), "x")
    assert np.array_equal(found, chw(pixels[4:13, 6:15]))
    with pytest.raises(ImageError, match="21x18 pixels, smaller than 19"):
        Preparation(19, resize="none")(png(pixels), "x")


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(8, 14),
    height=st.integers(8, 14),
    bits=st.integers(0, 2**63 - 1),
    resize=st.sampled_from(["none", "lanczos"]),
)
def test_random_crops_are_all_the_windows_there_are(width: int, height: int, bits: int, resize: Any) -> None:
    pixels = noise(width, height)
    size = 8 if resize == "none" else min(width, height)
    found = Preparation(size, resize=resize, crop="random")(png(pixels), "x", bits).numpy()
    windows = [
        chw(pixels[top : top + size, left : left + size])
        for top in range(height - size + 1)
        for left in range(width - size + 1)
    ]
    assert np.array_equal(found, windows[bits % len(windows)])


def test_window_is_taken_before_everything_else() -> None:
    pixels = noise(178, 218)
    found = Preparation(64, window=140)(png(pixels), "x")
    centre = Image.fromarray(pixels[39:179, 19:159]).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(found, chw(np.asarray(centre)))
    with pytest.raises(ImageError, match="100x100 pixels, smaller than 140"):
        Preparation(64, window=140)(png(noise(100, 100)), "x")


def test_a_random_crop_follows_from_seed_and_number_alone(tmp_path: Path) -> None:
    pixels = noise(40, 40, 1)[..., 0]
    (tmp_path / "x.png").write_bytes(png(pixels))
    data = open_files(tmp_path, Preparation(16, 1, "none", "random"))
    batches = list(islice(stream(data, batch_size=4, seed=5), 3))
    later = list(islice(stream(data, batch_size=3, seed=5, start=6, workers=1), 2))
    assert torch.equal(torch.cat([b.image for b in batches])[6:], torch.cat([b.image for b in later]))
    drawn = rng.bits(5, rng.STREAM_CROP, torch.arange(12), 1)[:, 0].tolist()
    for image, value in zip(torch.cat([b.image for b in batches]), drawn, strict=True):
        top, left = divmod(value % 2**64 % 2**63 % 25**2, 25)
        assert np.array_equal(image[0], pixels[top : top + 16, left : left + 16])
    centre = next(sequential(data, batch_size=1)).image[0, 0]
    assert np.array_equal(centre, pixels[12:28, 12:28])
    assert next(stream(data, batch_size=200, seed=1)).image.flatten(1).unique(dim=0).shape[0] > 100


@pytest.mark.parametrize("write", [npy, tif])
def test_any_number_of_channels(write: Callable[[np.ndarray], bytes], tmp_path: Path) -> None:
    pixels = noise(20, 16, 5)
    for name, array in (("last", pixels), ("first", chw(pixels)), ("one", chw(pixels)[None])):
        (tmp_path / f"{name}.{write.__name__}").write_bytes(write(np.ascontiguousarray(array)))
    (tmp_path / "other.png").write_bytes(png(noise(16, 16)))
    data = open_files(tmp_path, Preparation(16, channels=5))
    assert [name.split(".")[0] for name in data.names] == ["first", "last", "one"]
    for image, label in (data[i] for i in range(3)):
        assert label == -1
        assert image.dtype == torch.uint8
        assert np.array_equal(image, chw(pixels[:, 2:18]))


def test_tiff_with_samples_of_a_pixel_together_and_apart() -> None:
    pixels = noise(16, 16, 6)
    together = tif(pixels, planarconfig="contig", metadata=None)
    apart = tif(np.ascontiguousarray(chw(pixels)), planarconfig="separate", metadata=None)
    for content in (together, apart):
        assert np.array_equal(Preparation(16, channels=6)(content, "x.tif"), chw(pixels))


def test_each_channel_is_scaled_as_pillow_scales_colours() -> None:
    pixels = noise(30, 24)
    four = np.concatenate([pixels, pixels[..., :1]], axis=2)
    found = Preparation(10, channels=4)(npy(four), "x.npy")
    assert torch.equal(found[:3], Preparation(10)(png(pixels), "x.png"))
    assert torch.equal(found[3], found[0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 257, 32_768, 65_535], np.uint16), [0, 1, 128, 255]),
        (np.array([0, 0.5, 1 / 255, 1], np.float32), [0, 128, 1, 255]),
        (np.array([0, 0.25, 0.75, 1], np.float16), [0, 64, 191, 255]),
    ],
)
def test_values_become_8_bits(values: np.ndarray, expected: list[int]) -> None:
    array = np.broadcast_to(values, (8, 8, 4))
    assert Preparation(8, channels=4)(npy(array), "x")[:, 0, 0].tolist() == expected
    assert Preparation(8, channels=4)(tif(array), "x")[:, 7, 7].tolist() == expected


def test_npy_in_colour_and_grey_as_celeba_hq_has_it() -> None:
    pixels = noise(12, 12)
    assert np.array_equal(Preparation(12)(npy(chw(pixels)[None]), "x"), chw(pixels))
    assert np.array_equal(Preparation(12, channels=1)(npy(pixels[..., 0]), "x")[0], pixels[..., 0])
    assert np.array_equal(Preparation(12, channels=1)(npy(pixels[None, ..., 0]), "x")[0], pixels[..., 0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(noise(9, 9, 3)), r"an array \[9, 9, 3\], expected \[H, W, 4\] or \[4, H, W\]"),
        (npy(np.zeros((9, 9, 4), np.int64)), "values of type int64, expected uint8, uint16, or floats"),
        (npy(np.full((9, 9, 4), 1.5)), r"floats from 1\.5 to 1\.5, expected them in \[0, 1\]"),
        (npy(np.full((9, 9, 4), np.nan)), "floats from nan"),
        (npy(np.array([{"a": 1}] * 4)), r"an array \[4\]"),
        (npy(noise(9, 5, 4)), "9x5 pixels, smaller than 8"),
        (npy(noise(9, 9, 4))[:-20], "cannot be decoded"),
        (npy(noise(9, 9, 4))[:20], "its header cannot be read"),
        (tif(noise(9, 9, 4))[:40], "its header cannot be read"),
        (png(noise(9, 9)), "its header cannot be read"),
        (b"", "its header cannot be read"),
    ],
)
def test_unusable_arrays(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        Preparation(8, channels=4)(content, "x")
    assert "\n" not in str(caught.value)


def test_pickled_array_is_not_opened(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    array = np.full((9, 9, 4), Bad(), dtype=object)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    with pytest.raises(ImageError, match="values of type object"):
        Preparation(8, channels=4)(file.getvalue(), "x")
    assert not (tmp_path / "executed").exists()


OME = """<?xml version="1.0"?>
<OME UUID="urn:uuid:1" xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">
<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="16" SizeY="16" SizeC="5" SizeZ="1" SizeT="1">
<TiffData IFD="0" FirstC="0" PlaneCount="1"><UUID FileName="{}">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>"""


def test_files_that_a_tiff_names_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    secret = tmp_path / "secret.tif"
    secret.write_bytes(tif(noise(16, 16, 1)[..., 0]))
    hostile = tif(noise(16, 16, 1)[..., 0], description=OME.format(secret).encode(), metadata=None)
    (tmp_path / "set/hostile.tif").write_bytes(hostile)
    spy = Mock(wraps=open)
    for function in ("builtins.open", "io.open"):
        monkeypatch.setattr(function, spy)
    with pytest.raises(ConfigError, match=r"hostile\.tif: an array \[16, 16\]"):
        open_files(tmp_path / "set", Preparation(8, channels=5))
    with pytest.raises(ImageError, match=r"an array \[16, 16\]"):
        Preparation(8, channels=5)(hostile, "x.tif")
    opened = {str(call.args[0]) for call in spy.call_args_list}
    assert str(tmp_path / "set/hostile.tif") in opened
    assert str(secret) not in opened


def test_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    (tmp_path / "x.tif").write_bytes(tif(noise(9, 9, 4)))
    monkeypatch.setattr(sources_module, "import_module", missing)
    with pytest.raises(ConfigError, match=r"more than three channels, uldm needs .*tifffile.*pip install tifffile"):
        open_files(tmp_path, Preparation(8, channels=4))


def claim(width: int, height: int) -> bytes:
    """A small PNG whose header claims another size."""
    content = bytearray(png(noise(8, 8)))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


USABLE = {
    "grey.png": png(np.full((16, 16), 77, np.uint8)),
    "alpha.png": png(np.full((16, 16, 4), (10, 20, 30, 0), np.uint8)),
    "cmyk.jpg": encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"),
    "frame.gif": encoded(Image.new("P", (16, 16), 0), "GIF"),
    "one/alone.png": png(noise(16, 16)),
}
UNUSABLE = {
    "corrupt.jpg": b"\xff\xd8\xff\xe0 no more",
    "empty.png": b"",
    "huge.png": claim(60_000, 60_000),
    "long.png": claim(20_000, 10),
}


def test_a_folder_of_everything_that_goes_wrong(tmp_path: Path) -> None:
    for name, content in (USABLE | UNUSABLE).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data = open_files(tmp_path, Preparation(8))
    assert data.names == sorted(USABLE)
    assert data.classes == ("one",)
    reasons = dict(data.skipped)
    assert sorted(reasons) == sorted(UNUSABLE)
    assert reasons["empty.png"].startswith("not an image")
    assert "million pixels" in reasons["huge.png"]
    assert "larger than 16384" in reasons["long.png"]
    shown = {name: data[i][0][:, 4, 4].tolist() for i, name in enumerate(data.names)}
    assert shown["grey.png"] == [77, 77, 77]
    assert shown["alpha.png"] == [255, 255, 255]
    assert min(shown["cmyk.jpg"]) > 250
    assert shown["frame.gif"] == [0, 0, 0]
    with pytest.raises(UsageError, match=r"corrupt\.jpg in .*With data\.strict=false such files are skipped"):
        open_files(tmp_path, Preparation(8), strict=True)


def test_unchecked_images_are_found_when_their_turn_comes(tmp_path: Path) -> None:
    for name, content in (USABLE | UNUSABLE).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data = open_files(tmp_path, Preparation(8), checked=False)
    assert len(data) == len(USABLE | UNUSABLE)
    batch = next(stream(data, batch_size=len(data), seed=0))
    assert {name for name, _ in batch.skipped} == set(UNUSABLE)
    with pytest.raises(UsageError, match=r"strict=false"):
        next(stream(data, batch_size=len(data), seed=0, strict=True))
