"""The entry of `uldm` and of `python -m uldm_cli`: the version at once, and one boundary where errors become a line."""

import errno
import os
import sys
from collections.abc import Sequence

from uldm_cli import __version__, allocator, console
from uldm_cli.errors import UldmError

_INTERRUPTED = 130


def start() -> int:
    """`uldm` as a process of its own."""
    allocator.begin_anew(sys.argv[1:])
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 failure, 2 wrong input, 3 broken plugin, 130 interrupted."""
    args = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(args)
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as cause:
        return _report(cause)
    return code


def _run(args: list[str]) -> int:
    if args[:1] in (["--version"], ["-V"]):
        console.text(f"uldm {__version__}")
        return 0
    from uldm_cli.cli.app import run

    return run(args)


def _report(cause: BaseException) -> int:
    if os.environ.get("ULDM_DEBUG") == "1":
        console.traceback(cause)
    error = _as_error(cause)
    console.error(error)
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        _discard_stdout()  # what is still buffered would fail once more while Python shuts down
    return error.exit_code


def _as_error(cause: BaseException) -> UldmError:
    """The line for people that `cause` deserves; a plain "internal error" is a bug of this program."""
    if isinstance(cause, UldmError):
        return cause
    if isinstance(cause, KeyboardInterrupt):
        return UldmError("interrupted", exit_code=_INTERRUPTED)
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return UldmError(f"disk full while writing {cause.filename or 'the output'}", "Free some space, then run again")
    if isinstance(cause, OSError) and cause.filename and cause.strerror:
        return UldmError(f"{cause.filename}: {cause.strerror}")
    if _out_of_memory(cause):
        hint = "Try a smaller --batch-size, or --precision bf16; in training also a greater train.accumulate"
        return UldmError("out of memory", hint)
    if _left_alone(cause):
        return UldmError("the connection to another process of this run broke", "What that one said tells why")
    return UldmError(f"internal error: {type(cause).__name__}: {cause}", "Set ULDM_DEBUG=1 for the traceback")


def _out_of_memory(cause: BaseException) -> bool:
    """Torch's own errors are told by their text: importing it to ask would cost seconds."""
    if isinstance(cause, MemoryError):
        return True
    told = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(cause, RuntimeError) and any(phrase in str(cause) for phrase in told)


def _left_alone(cause: BaseException) -> bool:
    """Whether this is one of several processes, and another one has ended: by gloo's or NCCL's text, as above."""
    told = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and isinstance(cause, RuntimeError) and any(phrase in str(cause) for phrase in told)


def _discard_stdout() -> None:
    """Let the interpreter's last flush go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(start())
