"""The first signal interrupts a command, wherever it comes; those after it are ignored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_llmbench.analysis import comparison
from mlflow_llmbench.cli.interruption import SIGNALS, interruptible
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.sweeps import sweep


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


FAKE = "--backend fake --model fake:ttft_ms=1+itl_ms=1 --output-tokens 4 --prompt-tokens 4 --repetitions 5 --warmup 1"


@pytest.mark.usefixtures("store_uri")
def test_an_interrupted_command_says_what_it_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes after two sides were measured, while they are compared; then before anything is measured."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "compare", interrupted)
        assert main(["ab", "seed=0", "seed=0", "--pairs", "2", *FAKE.split()]) == 130
    [folder] = tmp_path.glob("llmbench-results/*")
    assert capsys.readouterr().err.endswith(f"llmbench: interrupted. What was measured is in {folder}.\n")
    monkeypatch.setattr(sweep, "plan", interrupted)
    assert main(["run", *FAKE.split()]) == 130
    assert capsys.readouterr().err.endswith("llmbench: interrupted before anything was measured.\n")
