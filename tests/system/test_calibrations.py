"""Calibrations on disk: what is kept is read again, one file per machine, and a damaged file is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mlflow_llmbench.records.calibration import Calibration, Spread
from mlflow_llmbench.records.errors import JournalError
from mlflow_llmbench.system import calibrations

RATE = "throughput/output_tokens_per_s"
FOUND = Calibration(
    "abc", "transformers", "cpu", "opt-125m int4", 10, 200, 1_700_000_000_000, "def", ("valid",),
    {RATE: (Spread(2e-4, 9.5, 1e-4, 190, 5), Spread(1e-4, 9, 5e-5, 190, 10))},
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_kept_is_read_again_and_replaced() -> None:
    assert calibrations.kept() == ()
    file = calibrations.keep(FOUND)
    other = dataclasses.replace(FOUND, device="cuda")
    calibrations.keep(other)
    assert calibrations.kept() == (FOUND, other)
    newer = dataclasses.replace(FOUND, of="opt-1.3b int4")
    assert calibrations.keep(newer) == file
    assert calibrations.kept() == (newer, other)
    assert [one.name for one in file.parent.iterdir() if one.name.startswith(".")] == []


def test_a_person_can_read_the_file() -> None:
    told = json.loads(calibrations.keep(FOUND).read_text())
    assert told["calibrated"] == "2023-11-14T22:13:20Z"
    assert told["relative_sd_between_processes"] == {RATE: round(5e-5**0.5, 6)}
    assert told["hardware"] == "abc"


def test_a_name_cannot_lead_out_of_the_folder(cache: Path) -> None:
    file = calibrations.keep(dataclasses.replace(FOUND, backend="../../x y"))
    assert file.parent == cache / "calibrations"


def test_a_damaged_file_is_named(cache: Path) -> None:
    calibrations.keep(FOUND)
    for text in ("{", "[]", '{"hardware": 1}'):
        (cache / "calibrations" / "damaged.json").write_text(text)
        with pytest.raises(JournalError) as caught:
            calibrations.kept()
        assert "damaged.json cannot be read" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(JournalError, match="The calibration cannot be written to .*LLMBENCH_CACHE"):
        calibrations.keep(FOUND)
