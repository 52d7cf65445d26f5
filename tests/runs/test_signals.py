"""Wishes to stop, from real signals to this process."""

import signal
import time

import pytest

from uldm_cli.runs import signals
from uldm_cli.runs.signals import stop_on_signals


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_asks_to_stop(kind):
    with stop_on_signals() as stop:
        assert not stop.requested
        signal.raise_signal(kind)
        assert stop.requested


def test_what_follows_at_once_is_the_same_wish():
    """`timeout` and torchrun signal a process and then its group."""
    with stop_on_signals() as stop:
        for kind in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(kind)
        assert stop.requested


def test_a_second_wish_is_obeyed_at_once(monkeypatch):
    monkeypatch.setattr(signals, "BURST", 0.01)
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_afterwards_signals_mean_what_they_meant_before():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
