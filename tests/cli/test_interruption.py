"""The first signal interrupts a command, wherever it comes; those after it are ignored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from mlflow_llmbench.cli.interruption import SIGNALS, interruptible


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers, which a command leaves as they are."""
    names = (*SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before, strict=True):
        signal.signal(name, handler)


class Finalized:
    """An object in whose finalizer a signal comes. Python drops what is raised there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_in_a_finalizer_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = threading.Event()
    with interruptible():
        Finalized()
        with pytest.raises(KeyboardInterrupt):
            waiting.wait(60)
    assert capsys.readouterr().err == ""


def test_only_the_first_signal_interrupts() -> None:
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        for name in SIGNALS:
            signal.raise_signal(name)
