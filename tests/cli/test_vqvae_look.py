"""The commands that look into an autoencoder, as they are typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vqvae(empty_folder: Path, uldm_main: Run, tiny_ldm: Path) -> Run:
    """Run `uldm vqvae VERB ... --model TINY` in this process, in a folder with a few images: code, stdout, stderr."""
    Path("in").mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        Image.linear_gradient("L").resize((32, 32)).rotate(90 * number).convert("RGB").save(f"in/{name}")

    def run(verb: str, *args: object, model: bool = True) -> tuple[int, str, str]:
        return uldm_main("vqvae", verb, *args, *(["--model", tiny_ldm] if model else []))

    return run


@pytest.mark.parametrize("verb", ["visualize", "reconstruct", "codebook", "latents", "interpolate"])
def test_help_has_examples(vqvae: Run, verb: str) -> None:
    code, out, _ = vqvae(verb, "--help", model=False)
    assert code == 0
    assert f"Examples:\n  uldm vqvae {verb}" in out


def test_visualize_tells_what_it_wrote(vqvae: Run) -> None:
    code, out, err = vqvae("visualize", "in/a.png", "--device", "cpu")
    assert code == 0, err
    assert "4 files in viz_out" in out
    assert sorted(path.name for path in Path("viz_out").iterdir()) == [
        "a_code_hist.png",
        "a_loss.txt",
        "a_recon.png",
        "a_recon_indices.png",
    ]
    code, out, _ = vqvae("visualize", "in", "--out", "x", "--json", "--dpi", "60")
    told = json.loads(out)
    assert [one["image"] for one in told["images"]] == ["a.png", "b.png"]
    assert told["images"][0]["size"] == [32, 32]
    assert {"codebook", "commitment", "perplexity"} < set(told["images"][0])


def test_reconstruct_says_the_worst(vqvae: Run) -> None:
    code, out, err = vqvae("reconstruct", "in", "--out", "out", "--device", "cpu")
    assert code == 0, err
    assert "LPIPS (AlexNet)" in out
    assert "2 reconstructions in out" in out
    code, out, _ = vqvae("reconstruct", "in", "--out", "out", "--json")
    told = json.loads(out)
    assert set(told["summary"]) == {"psnr", "lpips", "l1"}
    assert len(told["images"]) == 2
    assert vqvae("reconstruct", "in", "--out", "out", "-q") == (0, "", "")


def test_codebook_latents_and_interpolate(vqvae: Run) -> None:
    code, out, err = vqvae("codebook", "--data", "in", "--json", "--dpi", "50")
    assert code == 0, err
    told = json.loads(out)
    assert told["usage"]["used"] + len(told["usage"]["dead"]) == told["codes"] == 64
    code, out, err = vqvae("latents", "in/a.png", "in/b.png", "--out", "l.pdf")
    assert code == 0, err
    assert Path("l.pdf").read_bytes().startswith(b"%PDF")
    code, out, err = vqvae("interpolate", "in/a.png", "in/b.png", "--steps", 3)
    assert code == 0, err
    assert "3 pictures of 32x32: viz_out/a_to_b.png" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("visualize", "nope"), "there is no image or folder nope"),
        (("visualize", "empty"), "no images in empty"),
        (("visualize", "bad.png"), "bad.png: not an image"),
        (("visualize", "dot.png"), "dot.png: 1x1 pixels, smaller than 8 on a side"),
        (("visualize", "long.png"), "long.png: 20000x8 pixels, larger than 16384 on a side"),
        (("visualize", "in", "--out", "bad.png"), "bad.png is a file where a folder is needed"),
        (("visualize", "in", "--size", "0"), "--size is 0"),
        (("visualize", "in", "--device", "warp"), "--device warp cannot be used"),
        (("reconstruct", "badly"), "none of the 1 images in badly is usable"),
        (("codebook", "--num", "3"), "--num without --data"),
        (("codebook", "--data", "nowhere"), "nowhere does not exist"),
        (("latents", "in/a.png", "--scale", "0"), "--scale is 0"),
        (("latents", "in/a.png", "--out", "x.jpg"), "a plot is written as .png, .svg or .pdf"),
        (("latents", "in/a.png", "bad.png"), "bad.png: not an image"),
        (("interpolate", "in/a.png", "in"), "in is a folder, and an image is needed"),
        (("interpolate", "in/a.png", "in/b.png", "--out", "x.jpg"), "a plot is written as .png, .svg or .pdf"),
        (("visualize", "in", "--format", "jpg"), "--format jpg: a plot is written as png, svg or pdf"),
    ],
)
def test_one_line_for_each_mistake(vqvae: Run, arguments: tuple[str, ...], words: str) -> None:
    for folder in ("empty", "badly"):
        Path(folder).mkdir()
    for file in ("bad.png", "badly/bad.png"):
        Path(file).write_text("<html>")
    Image.new("RGB", (1, 1)).save("dot.png")
    Image.new("RGB", (20_000, 8)).save("long.png")
    before = sorted(Path().rglob("*"))
    code, out, err = vqvae(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len([line for line in err.strip().splitlines() if line.startswith("error: ")]) == 1
    assert sorted(Path().rglob("*")) == before


def test_sheets_have_titles_in_each_format(vqvae: Run) -> None:
    for form in ("png", "svg", "pdf"):
        assert vqvae("visualize", "in/a.png", "--format", form, "--dpi", 60, "--font-size", 12)[0] == 0
    assert "original" in Path("viz_out/a_recon_indices.svg").read_text()
    assert Path("viz_out/a_recon_indices.pdf").read_bytes().startswith(b"%PDF")
    assert not Path("viz_out/a_recon.svg").exists()
    with Image.open("viz_out/a_recon_indices.png") as sheet:
        assert sheet.info["dpi"] == pytest.approx((60, 60), abs=0.1)
        assert sheet.info["title"].startswith("a.png, by ")
    code, _, err = vqvae("codebook", "--format", "svg", "--out", "pages")
    assert code == 0, err
    assert sorted(path.name for path in Path("pages").iterdir())[0] == "codebook_codes.svg"
    assert "Below each its id in the codebook" in Path("pages/codebook_codes.svg").read_text()
    assert vqvae("interpolate", "in/a.png", "in/b.png", "--steps", 3, "--out", "strip.svg")[0] == 0
    assert "From a.png (0) to b.png (1), by" in Path("strip.svg").read_text()
