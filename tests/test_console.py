import json
import os
import pty
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import uldm_cli
from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError

PACKAGE_PARENT = Path(uldm_cli.__file__).resolve().parent.parent


def on_terminal(code: str, **env: str) -> str:
    """What `code` shows where stdout and stderr are a terminal of 80 columns."""
    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT), "COLUMNS": "80", "TERM": "xterm"} | env
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while process.poll() is None or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 0.05)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
    process.wait()
    os.close(leader)
    return shown.decode()


TABLE = {"columns": ["file", "size"], "rows": [["a.png", 1.23456], ["b.png", 20]]}


def test_result_for_people_is_a_table_and_a_summary_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.result({"files": 2}, title="Written", **TABLE, summary="2 files")
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines() if line.split()] == [
        ["Written"],
        ["file", "size"],
        ["─" * (len("a.png") + len("1.235") + 5)],
        ["a.png", "1.235"],
        ["b.png", "20"],
        ["2", "files"],
    ]
    assert err == ""


def test_result_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    console.configure(json=True)
    data = {"path": Path("out"), "psnr": float("inf"), "bad": float("nan"), "n": np.int64(3), "a": np.eye(2), "t": (1,)}
    console.result(data, title="Written", **TABLE, summary="2 files")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "out", "psnr": None, "bad": None, "n": 3, "a": [[1, 0], [0, 1]], "t": [1]}
    assert err == ""


def test_quiet_says_only_what_was_asked_for_and_what_went_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    console.result({}, title="Written", **TABLE, summary="2 files")
    console.note("reading")
    with console.progress(2, "sampling", "steps") as progress:
        progress.advance(2)
    with console.training(2, 0, "vqvae") as training:
        training.update(1, {"loss": 1.0}, 1.0)
    console.text("kind: ddim")
    console.warn("3 files skipped")
    console.error(UldmError("no model", "Train one"))
    assert capsys.readouterr() == ("kind: ddim\n", "warning: 3 files skipped\nerror: no model. Train one\n")


def test_error_under_json_is_also_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(json=True)
    console.error(ConfigError("no such key 'optmi'", "Did you mean 'optim'?"))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "no such key 'optmi'", "hint": "Did you mean 'optim'?", "exit_code": 2}
    assert err == "error: no such key 'optmi'. Did you mean 'optim'?\n"


def test_text_of_users_is_never_markup_and_never_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]x[/red]\x1b[2J\n:smile:"
    shown = "[red]x[/red]\\x1b[2J :smile:"
    console.note(name)
    console.result({}, title=name, columns=[name], rows=[[name]], summary=name)
    out, err = capsys.readouterr()
    assert err.strip() == shown
    assert out.count(shown) == 4
    assert "\x1b" not in out


def test_only_rank_zero_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    console.note("reading")
    console.warn("slow")
    console.result({}, **TABLE, summary="2 files")
    console.text("kind: ddim")
    with console.progress(2, "sampling", "steps") as progress:
        progress.advance(2)
    console.error(ConfigError("a mistake that every rank makes"))
    assert capsys.readouterr() == ("", "")
    console.error(UldmError("out of memory"))
    assert capsys.readouterr() == ("", "rank 1: error: out of memory\n")


def test_piped_progress_logs_now_and_then_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress(100, "sampling", "steps") as progress:
        for _ in range(100):
            now += 0.125
            progress.advance()
    assert capsys.readouterr().err.splitlines() == [
        "sampling 40/100  8 steps/s  left 0:00:08",
        "sampling 80/100  8 steps/s  left 0:00:02",
        "sampling 100/100  8 steps/s  took 0:00:12",
    ]


def test_progress_that_fails_does_not_claim_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), console.progress(10, "reading", "files"):
        raise ValueError("broken")
    assert capsys.readouterr().err == ""


def test_progress_counts_right_from_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(4000, "writing", "files") as progress:
        threads = [threading.Thread(target=lambda: [progress.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "writing 4000/4000" in capsys.readouterr().err


def test_piped_training_logs_each_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.training(4000, 100, "vqvae on fruits") as training:
        now = 10.0
        training.update(200, {"loss": 0.123456, "perplexity": 12345.6}, 512.34)
    assert capsys.readouterr().err.splitlines() == [
        "vqvae on fruits",
        "step 200/4000  loss 0.1235  perplexity 12346  512.3 images/s  left 0:06:20",
    ]


def test_piped_training_says_in_between_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Soon after the start, and whenever nothing has been said for a while."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.training(100, 0, "slow") as training:
        for step in range(1, 9):
            now = 4.0 * step
            training.reached(step)
        training.update(9, {"loss": 1.0}, 2.0)
        for step in (10, 11):
            now = 40.0 + 15 * (step - 9)
            training.reached(step)
    assert capsys.readouterr().err.splitlines() == [
        "slow",
        "step 2/100  0.25 steps/s  left 0:06:32",
        "step 9/100  loss 1  2 images/s  left 0:05:24",
        "step 11/100  0.1571 steps/s  left 0:09:26",
    ]


BARS = """
import time
import uldm_cli
from uldm_cli import console
with console.training(4, 0, "vqvae [on] fruits") as training:
    training.update(2, {"loss": 0.25}, 512.0)
    training.reached(3)
    console.note("a note [between]")
    with console.progress(3, "inner", "files") as inner:  # must not draw into the display around it
        inner.advance()
with console.progress(3, "sampling [x]", "steps") as progress:
    progress.advance(3)
console.warn("careful")
console.result({}, columns=["file"], rows=[["a.png"]])
"""


def test_terminal_shows_live_tables_and_bars() -> None:
    shown = on_terminal(BARS)
    for piece in (
        "vqvae [on] fruits",
        "loss",
        "0.25",
        "512 images/s",
        "a note [between]",
        "sampling [x]",
        "3/4",
        "3/3",
        "a.png",
    ):
        assert piece in shown
    assert "inner" not in shown
    assert "\x1b[33mwarning:\x1b[0m careful" in shown


def test_no_color_is_honoured() -> None:
    shown = on_terminal(BARS, NO_COLOR="1")
    assert "warning: careful" in shown
    colours = [f"\x1b[{code}" for code in ("31", "32", "33", "36", "38;5", "38;2")]
    assert not any(colour in shown for colour in colours)


SHOW = """
from pathlib import Path
from uldm_cli import console
console.configure(json={json}, quiet={quiet})
console.picture(Path({path!r}))
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.new("RGB", (4, 2), (10, 20, 30)).save(path)
    return path


def test_a_picture_shows_in_a_terminal_as_that_can(picture: Path) -> None:
    code = SHOW.format(json=False, quiet=False, path=str(picture))
    assert on_terminal(code, PYTHONIOENCODING="utf-8") == "\x1b[38;2;10;20;30m\x1b[48;2;10;20;30m▀▀▀▀\x1b[0m\r\n"
    assert on_terminal(code, TERM="xterm-kitty").startswith("\x1b_Ga=T,f=100,c=1,")
    assert on_terminal(code, TERM="dumb") == ""
    assert "shows no pictures" in on_terminal(code, PYTHONIOENCODING="ascii")


def test_a_picture_is_not_for_pipes_json_or_quiet(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.picture(picture)
    assert capsys.readouterr() == ("", "")
    for mode in ({"json": True, "quiet": False}, {"json": False, "quiet": True}):
        assert on_terminal(SHOW.format(**mode, path=str(picture)), TERM="xterm-kitty") == ""


def test_of_a_film_the_last_frame_shows_and_of_a_vector_graphic_a_note(tmp_path: Path) -> None:
    from PIL import Image

    film, graphic = tmp_path / "film.png", tmp_path / "plot.svg"
    frames = [Image.new("RGB", (1, 2), (n, n, n)) for n in (0, 99, 200)]
    frames[0].save(film, save_all=True, append_images=frames[1:])
    graphic.write_text("<svg/>")
    code = SHOW.format(json=False, quiet=False, path=str(film))
    assert on_terminal(code, PYTHONIOENCODING="utf-8").startswith("\x1b[38;2;200;200;200m")
    code = SHOW.format(json=False, quiet=False, path=str(graphic))
    assert on_terminal(code).endswith("plot.svg is of a kind that no terminal shows\r\n")
