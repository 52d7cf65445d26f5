"""The only downloader: mirrors in turn, resuming, checksums, and a clear word when there is no network.

ULDM_OFFLINE=1 forbids it to reach for the network; see `offline`. Only http and https are spoken, redirects included.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from uldm_cli import __version__, console
from uldm_cli.errors import UldmError, UsageError

if TYPE_CHECKING:
    from uldm_cli.console import Progress

ATTEMPTS = 3  # at each address, as long as a broken connection brought something
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18
_NOT_THE_FILE = "a web page instead of the file"
_WEB_PAGE = re.compile(rb"\s*(<!doctype\s+html|<html)\b", re.IGNORECASE)


class _Failed(Exception):
    """This address does not work; `again` says whether trying it once more is worth it."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def offline(variable: str = "ULDM_OFFLINE") -> bool:
    """Whether the environment forbids the network: unset, empty, 0, false and no allow it, anything else does not."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no")


def cache_home() -> Path:
    """The folder of the user's caches, of all programs; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache(kind: str) -> Path:
    """The folder for downloads of a kind, such as "data"; not made yet."""
    return cache_home() / "uldm" / kind


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    description: str,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    by_hand: str | None = None,
) -> Path:
    """Downloads a file unless it is there, and puts it in place only when complete and right.

    What arrives lies in `<destination>.part`, and what the server said of it in `<destination>.part.json`. A later call
    resumes it where a checksum can prove the result, or where the server says that its file is still the same. Of
    several processes that want it one downloads, and the others wait; see `alone`.

    Args:
        urls: the file's addresses, tried in turn.
        destination: where it goes; folders are made.
        description: what messages call it.
        sha256: expected checksum, hexadecimal.
        md5: the same, for publishers who give no better.
        size: expected length in bytes.
        by_hand: what a message says to do where nothing can be downloaded; by default, to put the file there.

    Returns:
        `destination`.

    Raises:
        UldmError: no address gave the right file, ULDM_OFFLINE forbids trying, or it cannot be written.
    """
    if destination.exists():
        return destination
    if wrong := [url for url in urls if urlsplit(url).scheme not in ("http", "https")]:
        raise UsageError(f"{wrong[0]} is not an http or https address")
    by_hand = by_hand or f"Put the file of {urls[0]} at {destination} by hand"
    if offline():
        raise UldmError(f"{description} is not on this machine and ULDM_OFFLINE forbids downloading it", by_hand)
    part = _Part(destination, provable=bool(sha256 or md5))
    reasons = []
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with alone(destination.with_name(destination.name + ".lock"), f"downloads {description}"):
            for url in urls:
                if destination.exists():  # another process brought it
                    return destination
                try:
                    _download(url, part, description, size)
                    part.check(sha256, md5, size)
                except _Failed as failure:
                    reasons.append(f"{urlsplit(url).hostname}: {failure}")
                else:
                    part.put_in_place()
                    return destination
    except OSError as error:
        raise UldmError(f"{description} cannot be stored at {destination} ({error.strerror or error})") from error
    raise UldmError(f"{description} could not be downloaded ({'; '.join(reasons)})", by_hand)


@contextmanager
def alone(lock: Path, what: str, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock file while the block runs. Other processes that come to it wait, and look again what is to be done.

    The file goes at the end. That of a killed process stays, but locks nothing. Windows and some network disks have no
    such locks: there nobody waits.

    Args:
        lock: the file, in a folder that exists.
        what: what those who wait say that another process does: "downloads X".
        wait: whether to wait for it, instead of giving up.

    Raises:
        OSError: the file cannot be made.
        UsageError: another process has it, and this one is not to wait.
    """
    if sys.platform == "win32":
        yield
        return
    while True:
        with lock.open("wb") as file:
            _acquire(file, what, wait=wait)
            if not _is_open(file, lock):
                continue  # who had it has removed it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _acquire(file: BinaryIO, what: str, *, wait: bool) -> None:
    import fcntl  # Windows has none

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UsageError(f"another process {what}", "Wait until it has ended, or stop it") from None
        console.note(f"waiting for another process, which {what}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def _is_open(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at its path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@dataclass(frozen=True)
class _Origin:
    """Which file of which server a part belongs to. `version` is a strong ETag or a date: what If-Range takes."""

    url: str
    version: str
    length: int

    @classmethod
    def of(cls, url: str, headers: http.client.HTTPMessage, length: int) -> "_Origin":
        etag = headers.get("ETag", "")
        strong = etag if etag.startswith('"') else ""
        return cls(url, strong or headers.get("Last-Modified", ""), length)


class _Part:
    """The file that is being received, and where it came from.

    `provable` says that a checksum will tell whether the whole is right, so that any beginning may be tried.
    """

    def __init__(self, destination: Path, *, provable: bool) -> None:
        self._destination = destination
        self.path = destination.with_name(destination.name + ".part")
        self._origin_path = destination.with_name(destination.name + ".part.json")
        self._provable = provable

    @property
    def length(self) -> int:
        with suppress(FileNotFoundError):
            return self.path.stat().st_size
        return 0

    @property
    def origin(self) -> _Origin | None:
        with suppress(OSError, ValueError, TypeError):
            return _Origin(**json.loads(self._origin_path.read_text(encoding="utf-8")))
        return None

    def resumable(self, url: str) -> bool:
        """Whether a request to this address may ask for the rest only."""
        origin = self.origin
        return self._provable or (origin is not None and origin.url == url and origin.version != "")

    def is_whole(self, size: int | None) -> bool:
        """Whether nothing is missing, by the length that was expected or that the server said."""
        origin = self.origin
        return self.length > 0 and self.length in (size, origin.length if origin else None)

    def is_continued_by(self, origin: _Origin) -> bool:
        """Whether the rest that a server sends belongs to this beginning."""
        known = self.origin
        if known is None or known.url != origin.url:
            return self._provable
        return known == origin

    def begin(self, origin: _Origin) -> None:
        """Forget the bytes of another file, and note whose are coming."""
        self.path.unlink(missing_ok=True)
        self._origin_path.write_text(json.dumps(asdict(origin)), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._origin_path.unlink(missing_ok=True)

    def put_in_place(self) -> None:
        os.replace(self.path, self._destination)
        self._origin_path.unlink(missing_ok=True)

    def check(self, sha256: str | None, md5: str | None, size: int | None) -> None:
        """Removes what is not the file, so that no later call resumes from it."""
        problem = None
        if size is not None and self.length != size:
            problem = f"{self.length} bytes instead of {size}"
        with self.path.open("rb") as file:
            if problem is None and _WEB_PAGE.match(file.read(256)):
                problem = _NOT_THE_FILE
            for algorithm, expected in (("sha256", sha256), ("md5", md5)):
                if expected and problem is None:
                    file.seek(0)
                    found = hashlib.file_digest(file, algorithm).hexdigest()
                    if found != expected.lower():
                        problem = f"another file: its {algorithm} begins with {found[:12]}, expected {expected[:12]}"
        if problem:
            self.discard()
            raise _Failed(problem)


def _download(url: str, part: _Part, description: str, size: int | None) -> None:
    """Brings `part` to its full length, resuming after broken connections."""
    for attempt in range(ATTEMPTS):
        before = part.length
        try:
            return _transfer(url, part, description, size)
        except _Failed as failure:
            stuck = part.length <= before
            if not failure.again or stuck or attempt == ATTEMPTS - 1:
                raise


def _transfer(url: str, part: _Part, description: str, size: int | None) -> None:
    """One request: what `part` lacks, or everything when the server does not do ranges or has another file now."""
    have = part.length if part.resumable(url) else 0
    if have and part.is_whole(size):
        return
    with _open(url, part, have) as response:
        if response.headers.get_content_type() == "text/html":
            raise _Failed(_NOT_THE_FILE)
        have = _continued_from(response, have)
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else 0
        if size is not None and total not in (0, size):
            raise _Failed(f"{total} bytes instead of {size}")
        origin = _Origin.of(url, response.headers, total)
        if have and not part.is_continued_by(origin):
            part.discard()
            return _transfer(url, part, description, size)
        if not have:
            part.begin(origin)
        received = have + _receive(response, part, description, (total or size or have) - have, append=have > 0)
    if received < total:
        raise _Failed(f"the connection broke after {received} of {total} bytes", again=True)
    if part.length != received:
        part.discard()
        raise _Failed("another process was downloading it at the same time")


def _open(url: str, part: _Part, have: int) -> http.client.HTTPResponse:
    """The server's answer to a request for what follows the first `have` bytes."""
    headers = {"User-Agent": f"uldm/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        origin = part.origin
        if origin and origin.url == url and origin.version:
            headers["If-Range"] = origin.version  # another version is sent whole
    try:
        response: http.client.HTTPResponse = _opener().open(
            urllib.request.Request(url, headers=headers), timeout=_TIMEOUT
        )
    except HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.discard()  # it is longer than the file, so another file's
            raise _Failed("the part downloaded earlier does not fit") from error
        raise _Failed(" ".join(f"{error.code} {error.reason}".split())) from error
    except (URLError, OSError, http.client.HTTPException) as error:
        raise _Failed(_reason(error)) from error
    return response


def _continued_from(response: http.client.HTTPResponse, have: int) -> int:
    """Where in the file the answer begins: at `have`, as was asked, or at 0."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    place = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if place is None or int(place[1]) != have:
        raise _Failed("it sends another part of the file than was asked for")
    return have


def _receive(response: http.client.HTTPResponse, part: _Part, description: str, missing: int, *, append: bool) -> int:
    with part.path.open("ab" if append else "wb") as file, console.progress(missing, description, "B") as progress:
        return _copy(response, file, progress)


def _copy(response: http.client.HTTPResponse, file: BinaryIO, progress: "Progress") -> int:
    received = 0
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:  # of the network; what the disk raises passes
            raise _Failed(_reason(error), again=True) from error
        if not chunk:
            return received
        file.write(chunk)
        received += len(chunk)
        progress.advance(len(chunk))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only, and from https to nothing weaker."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and (scheme != "http" or req.type == "https"):
            raise _Failed(f"it redirects to {newurl}, and {scheme} is not followed from {req.type}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Like urlopen's, but without file:, ftp: and data:, to which a redirect could lead."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        _Redirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "")) or str(error) or type(error).__name__
