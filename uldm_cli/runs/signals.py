"""Ctrl-C and SIGTERM as wishes that the work in hand can be ended in order, and SIGUSR1 as one to save."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BURST = 1.0
"""Signals within so many seconds are one wish to stop."""


@dataclass
class Stop:
    """Whether somebody asked to stop, and when first, in seconds of the monotonic clock; or asked to save."""

    asked: float | None = None
    save: bool = False
    """SIGUSR1 came; whoever saves sets it back."""

    @property
    def requested(self) -> bool:
        return self.asked is not None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM only ask to stop; a second one, later, raises KeyboardInterrupt at once.
    SIGUSR1 asks to save, where the system has such a signal.

    One wish often arrives as two signals: `timeout` and torchrun send SIGTERM to the process and then to its group.
    So what follows within BURST seconds is no second wish, which would lose what is about to be saved.
    """
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        now = time.monotonic()
        if stop.asked is None:
            stop.asked = now
        elif now - stop.asked > BURST:
            raise KeyboardInterrupt

    def ask_to_save(number: int, frame: object) -> None:
        stop.save = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGUSR1"):
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, ask_to_save)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
