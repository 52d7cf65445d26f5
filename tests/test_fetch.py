"""The downloader against a real server (tests/conftest.py) that breaks in all the usual ways."""

import errno
import hashlib
import http.client
import subprocess
import sys
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from uldm_cli import fetch
from uldm_cli.errors import UldmError, UsageError

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def get(target: Path, *urls: str, sha256: str | None = SHA256, size: int | None = None) -> Path:
    return fetch.fetch(urls, target, description="the thing", sha256=sha256, size=size)


def test_downloads_once(server: Any, tmp_path: Path) -> None:
    target = tmp_path / "deep/er/file"
    for _ in range(2):
        assert get(target, server.url("file"), size=len(CONTENT)) == target
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert [path.name for path in target.parent.iterdir()] == ["file"]


FETCH = """
import sys
from pathlib import Path
from uldm_cli.fetch import fetch
fetch([sys.argv[1]], Path(sys.argv[2]), description="the thing")
"""


def test_of_several_processes_one_downloads(server: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FETCH, server.url("file"), str(tmp_path / "file")]
    with fetch.alone(tmp_path / "file.lock", "is the test"):
        started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
        said = [process.stderr.readline() for process in started if process.stderr]
        assert not server.requests
    assert said == ["waiting for another process, which downloads the thing\n"] * 3
    for process in started:
        process.communicate(timeout=60)
    assert [process.returncode for process in started] == [0, 0, 0]
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_lock_of_a_killed_process_locks_nothing(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.lock").touch()
    get(tmp_path / "file", server.url("file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_disks_without_locks(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    number = errno.ENOLCK
    get(tmp_path / "file", server.url("file"))
    number = errno.EIO
    with pytest.raises(UldmError, match=r"cannot be stored at .*other \(no locks\)"):
        get(tmp_path / "other", server.url("file"))


def test_resumes_after_broken_connections(server: Any, tmp_path: Path) -> None:
    server.breaks = 2
    get(tmp_path / "file", server.url("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_later_call_resumes(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    get(tmp_path / "file", server.url("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("/file", "bytes=1000-")]


def test_complete_part_needs_no_request_when_the_size_is_known(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(tmp_path / "file", server.url("file"), size=len(CONTENT))
    assert not server.requests


def interrupt(server: Any, target: Path, name: str = "file") -> int:
    """Leave the first half of a download whose result no checksum proves; returns its length."""
    server.breaks = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "ATTEMPTS", 1)
        with pytest.raises(UldmError, match="broke after"):
            get(target, server.url(name), sha256=None)
    server.requests.clear()
    return len(CONTENT) // 2


ETAG = {"ETag": '"1"'}
DATE = {"ETag": 'W/"1"', "Last-Modified": "Tue, 01 Mar 2022 10:00:00 GMT"}


@pytest.mark.parametrize("headers", [ETAG, DATE])
def test_without_a_checksum_it_resumes_the_same_version(server: Any, tmp_path: Path, headers: dict[str, str]) -> None:
    server.headers = headers
    half = interrupt(server, tmp_path / "file")
    get(tmp_path / "file", server.url("file"), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("/file", f"bytes={half}-")]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["file", "ignores-if-range"])
def test_without_a_checksum_another_version_is_downloaded_whole(server: Any, tmp_path: Path, name: str) -> None:
    server.headers = ETAG
    interrupt(server, tmp_path / "file", name)
    server.headers, server.content = {"ETag": '"2"'}, bytes(reversed(CONTENT))
    get(tmp_path / "file", server.url(name), sha256=None)
    assert (tmp_path / "file").read_bytes() == server.content


def test_without_a_checksum_a_mirror_is_asked_for_everything(server: Any, tmp_path: Path) -> None:
    server.headers = ETAG
    interrupt(server, tmp_path / "file")
    get(tmp_path / "file", server.url("mirror"), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("/mirror", None)]


def test_without_a_checksum_or_a_version_nothing_old_is_resumed(server: Any, tmp_path: Path) -> None:
    interrupt(server, tmp_path / "file")
    get(tmp_path / "file", server.url("file"), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("/file", None)]


def test_a_part_that_nobody_knows_is_not_resumed(server: Any, tmp_path: Path) -> None:
    server.headers = ETAG
    (tmp_path / "file.part").write_bytes(b"something else")
    (tmp_path / "file.part.json").write_text("{}")
    get(tmp_path / "file", server.url("file"), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_part_is_put_in_place(server: Any, tmp_path: Path) -> None:
    """A process that was killed between the last byte and the renaming leaves that."""
    server.headers = ETAG
    interrupt(server, tmp_path / "file")
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(tmp_path / "file", server.url("file"), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert not server.requests


def test_an_answer_that_begins_elsewhere(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UldmError, match="another part of the file than was asked for"):
        get(tmp_path / "file", server.url("no-content-range"))


def test_a_web_page_is_not_the_file(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UldmError, match="a web page instead of the file"):
        get(tmp_path / "file", server.url("page"))
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:1000]
    server.content = b"\n<!DOCTYPE html><html><body>Please log in"
    with pytest.raises(UldmError, match="a web page instead of the file"):
        get(tmp_path / "other", server.url("file"), sha256=None)
    assert not (tmp_path / "other").exists()


def test_server_without_ranges(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    get(tmp_path / "file", server.url("no-ranges"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_part_is_thrown_away_and_the_mirror_gives_all(server: Any, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    get(tmp_path / "file", server.url("file"), server.url("mirror"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_missing_then_mirror(server: Any, tmp_path: Path) -> None:
    get(tmp_path / "file", server.url("gone"), server.url("file"))
    assert [path for path, _ in server.requests] == ["/gone", "/file"]


def test_wrong_checksum(server: Any, tmp_path: Path) -> None:
    with pytest.raises(UldmError, match=r"another file: its sha256 begins with .*Put the file of .* by hand") as caught:
        get(tmp_path / "file", server.url("wrong"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_checksum_then_mirror(server: Any, tmp_path: Path) -> None:
    get(tmp_path / "file", server.url("wrong"), server.url("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_md5(server: Any, tmp_path: Path) -> None:
    fetch.fetch([server.url("f")], tmp_path / "a", description="a", md5=hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(UldmError, match="its md5 begins"):
        fetch.fetch([server.url("f")], tmp_path / "b", description="b", md5="0" * 32)


def test_wrong_size(server: Any, tmp_path: Path) -> None:
    with pytest.raises(UldmError, match=f"{len(CONTENT)} bytes instead of 5"):
        get(tmp_path / "file", server.url("file"), sha256=None, size=5)


def test_all_reasons_are_told(server: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UldmError, match=r"could not be downloaded \(127\.0\.0\.1: 404 .*; 127\.0\.0\.1: .*broke after 0"
    ):
        get(tmp_path / "file", server.url("gone"), server.url("always-breaks"))


def test_nobody_listens(tmp_path: Path, server: Any) -> None:
    with pytest.raises(UldmError, match=r"Connection refused.*by hand"):
        get(tmp_path / "file", "http://127.0.0.1:9/file")


def test_redirect(server: Any, tmp_path: Path) -> None:
    get(tmp_path / "file", server.url("to?/there"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_only_http_even_after_a_redirect(server: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an http or https address"):
        get(tmp_path / "file", "file:///etc/passwd")
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/file"):
        with pytest.raises(UldmError, match=r"could not be downloaded \(127\.0\.0\.1: .*(?i:redirect).*" + target):
            get(tmp_path / "file", server.url(f"to?{target}"))
    assert not list(tmp_path.iterdir())


def test_a_redirect_does_not_give_up_encryption() -> None:
    request = urllib.request.Request("https://example.org/a")
    headers = http.client.HTTPMessage()
    with pytest.raises(fetch._Failed, match=r"redirects to http://example\.org/b, and http is not followed from https"):
        fetch._Redirects().redirect_request(request, BytesIO(), 302, "Found", headers, "http://example.org/b")


@pytest.mark.parametrize("value", ["1", "true", "yes", "on"])
def test_offline(value: str, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULDM_OFFLINE", value)
    with pytest.raises(UldmError, match=r"the thing is not on this machine and ULDM_OFFLINE.*by hand"):
        get(tmp_path / "none/file", server.url("file"))
    assert not server.requests
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"put there by hand")
    assert get(tmp_path / "file", server.url("file")).read_bytes() == b"put there by hand"


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "NO"])
def test_online(value: str, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULDM_OFFLINE", value)
    get(tmp_path / "file", server.url("file"))
    assert len(server.requests) == 1


def test_disk_error_is_not_blamed_on_the_mirrors(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_copy", full)
    with pytest.raises(UldmError, match=r"cannot be stored at .*No space left"):
        get(tmp_path / "file", server.url("file"), server.url("mirror"))
    assert len(server.requests) == 1


def test_folder_that_is_a_file(server: Any, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UldmError, match="cannot be stored"):
        get(tmp_path / "f/file", server.url("file"))
