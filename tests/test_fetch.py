"""The downloader against a real server on the loopback interface that breaks in all the usual ways."""

import errno
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from uldm_cli import console, fetch
from uldm_cli.errors import UldmError, UsageError

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT under any path; the path's name says how."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.breaks = 0  # how many more answers end early

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        if self.path == "/gone":
            return self.send_error(404)
        if self.path == "/to-a-file":
            return self.redirect("file:///etc/passwd")
        if self.path == "/moved":
            return self.redirect("/there")
        body = b"x" * len(CONTENT) if self.path == "/wrong" else CONTENT
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.path != "/no-ranges" else 0
        if start > len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = len(body)
        if self.server.breaks or self.path == "/always-breaks":
            self.server.breaks = max(self.server.breaks - 1, 0)
            end = start + (len(body) - start) // 2 if self.path != "/always-breaks" else start
        self.wfile.write(body[start:end])

    def redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("ULDM_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    console.configure(quiet=True)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    console.configure()


def get(target: Path, *urls: str, sha256: str | None = SHA256, size: int | None = None) -> Path:
    return fetch.fetch(urls, target, description="the thing", sha256=sha256, size=size)


def test_downloads_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "deep/er/file"
    for _ in range(2):
        assert get(target, server.url("file"), size=len(CONTENT)) == target
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_resumes_after_broken_connections(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    get(tmp_path / "file", server.url("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_later_call_resumes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    get(tmp_path / "file", server.url("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.requests == [("/file", "bytes=1000-")]


def test_complete_part_needs_no_request_when_the_size_is_known(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    get(tmp_path / "file", server.url("file"), size=len(CONTENT))
    assert not server.requests


def test_without_a_checksum_nothing_old_is_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"something else")
    get(tmp_path / "file", server.url("file"), sha256=None)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_server_without_ranges(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    get(tmp_path / "file", server.url("no-ranges"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_wrong_part_is_thrown_away_and_the_mirror_gives_all(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    get(tmp_path / "file", server.url("file"), server.url("mirror"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_missing_then_mirror(server: Server, tmp_path: Path) -> None:
    get(tmp_path / "file", server.url("gone"), server.url("file"))
    assert [path for path, _ in server.requests] == ["/gone", "/file"]


def test_wrong_checksum(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UldmError, match=r"another file: its sha256 begins with .*Put the file of .* by hand") as caught:
        get(tmp_path / "file", server.url("wrong"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_checksum_then_mirror(server: Server, tmp_path: Path) -> None:
    get(tmp_path / "file", server.url("wrong"), server.url("file"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_md5(server: Server, tmp_path: Path) -> None:
    fetch.fetch([server.url("f")], tmp_path / "a", description="a", md5=hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(UldmError, match="its md5 begins"):
        fetch.fetch([server.url("f")], tmp_path / "b", description="b", md5="0" * 32)


def test_wrong_size(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UldmError, match=f"{len(CONTENT)} bytes instead of 5"):
        get(tmp_path / "file", server.url("file"), sha256=None, size=5)


def test_all_reasons_are_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        UldmError, match=r"could not be downloaded \(127\.0\.0\.1: 404 .*; 127\.0\.0\.1: .*broke after 0"
    ):
        get(tmp_path / "file", server.url("gone"), server.url("always-breaks"))


def test_nobody_listens(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UldmError, match=r"Connection refused.*by hand"):
        get(tmp_path / "file", "http://127.0.0.1:9/file")


def test_redirect(server: Server, tmp_path: Path) -> None:
    get(tmp_path / "file", server.url("moved"))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_only_http_even_after_a_redirect(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an http or https address"):
        get(tmp_path / "file", "file:///etc/passwd")
    with pytest.raises(UldmError, match="could not be downloaded"):
        get(tmp_path / "file", server.url("to-a-file"))
    assert not list(tmp_path.iterdir())


def test_offline(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    with pytest.raises(UldmError, match=r"the thing is not on this machine and ULDM_OFFLINE.*by hand"):
        get(tmp_path / "none/file", server.url("file"))
    assert not server.requests
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"put there by hand")
    assert get(tmp_path / "file", server.url("file")).read_bytes() == b"put there by hand"


def test_disk_error_is_not_blamed_on_the_mirrors(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "_copy", full)
    with pytest.raises(UldmError, match=r"cannot be stored at .*No space left"):
        get(tmp_path / "file", server.url("file"), server.url("mirror"))
    assert len(server.requests) == 1


def test_folder_that_is_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UldmError, match="cannot be stored"):
        get(tmp_path / "f/file", server.url("file"))
