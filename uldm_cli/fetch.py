"""The only downloader: mirrors in turn, resuming, checksums, and a clear word when there is no network.

ULDM_OFFLINE=1 forbids it to reach for the network. Only http and https are spoken, redirects included.
"""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from uldm_cli import __version__, console
from uldm_cli.errors import UldmError, UsageError

if TYPE_CHECKING:
    from uldm_cli.console import Progress

ATTEMPTS = 3  # at each address, as long as a broken connection brought something
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18


class _Failed(Exception):
    """This address does not work; `again` says whether trying it once more is worth it."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    description: str,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
) -> Path:
    """Downloads a file unless it is there, and puts it in place only when complete and right.

    What arrives lies in `<destination>.part`; where a checksum can prove the result, a later call resumes from it.

    Args:
        urls: the file's addresses, tried in turn.
        destination: where it goes; folders are made.
        description: what messages call it.
        sha256: expected checksum, hexadecimal.
        md5: the same, for publishers who give no better.
        size: expected length in bytes.

    Returns:
        `destination`.

    Raises:
        UldmError: no address gave the right file, ULDM_OFFLINE forbids trying, or it cannot be written.
    """
    if destination.exists():
        return destination
    if wrong := [url for url in urls if urlsplit(url).scheme not in ("http", "https")]:
        raise UsageError(f"{wrong[0]} is not an http or https address")
    by_hand = f"Put the file of {urls[0]} at {destination} by hand"
    if os.environ.get("ULDM_OFFLINE", "") not in ("", "0"):
        raise UldmError(f"{description} is not on this machine and ULDM_OFFLINE forbids downloading it", by_hand)
    part = destination.with_name(destination.name + ".part")
    reasons = []
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is None and md5 is None:
            part.unlink(missing_ok=True)
        for url in urls:
            try:
                _download(url, part, description, size)
                _check(part, sha256, md5, size)
            except _Failed as failure:
                reasons.append(f"{urlsplit(url).hostname}: {failure}")
            else:
                os.replace(part, destination)
                return destination
    except OSError as error:
        raise UldmError(f"{description} cannot be stored at {destination} ({error.strerror or error})") from error
    raise UldmError(f"{description} could not be downloaded ({'; '.join(reasons)})", by_hand)


def _download(url: str, part: Path, description: str, size: int | None) -> None:
    """Brings `part` to its full length, resuming after broken connections."""
    for attempt in range(ATTEMPTS):
        before = _length(part)
        try:
            return _transfer(url, part, description, size)
        except _Failed as failure:
            stuck = _length(part) <= before
            if not failure.again or stuck or attempt == ATTEMPTS - 1:
                raise


def _transfer(url: str, part: Path, description: str, size: int | None) -> None:
    """One request: what `part` lacks, or everything when the server does not do ranges."""
    have = _length(part)
    if size is not None and have == size:
        return
    headers = {"User-Agent": f"uldm/{__version__}", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)  # it is longer than the file, so another file's
            raise _Failed("the part downloaded earlier does not fit") from error
        raise _Failed(f"{error.code} {error.reason}") from error
    except (URLError, OSError, http.client.HTTPException) as error:
        raise _Failed(_reason(error)) from error
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else size or 0
        with part.open("ab" if have else "wb") as file, console.progress(total, description, "B") as progress:
            progress.advance(have)
            received = have + _copy(response, file, progress)
    if received < total:
        raise _Failed(f"the connection broke after {received} of {total} bytes", again=True)


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


def _check(part: Path, sha256: str | None, md5: str | None, size: int | None) -> None:
    """Removes what is not the file, so that no later call resumes from it."""
    problem = None
    if size is not None and _length(part) != size:
        problem = f"{_length(part)} bytes instead of {size}"
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected and problem is None:
            with part.open("rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != expected.lower():
                problem = f"another file: its {algorithm} begins with {found[:12]}, expected {expected[:12]}"
    if problem:
        part.unlink(missing_ok=True)
        raise _Failed(problem)


def _opener() -> urllib.request.OpenerDirector:
    """Like urlopen's, but without file:, ftp: and data:, to which a redirect could lead."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _length(part: Path) -> int:
    with suppress(FileNotFoundError):
        return part.stat().st_size
    return 0


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "")) or str(error) or type(error).__name__
