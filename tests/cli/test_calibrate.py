"""`llmbench calibrate`: measured or from results, kept, and used by the next comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlflow_llmbench import compare
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.system import calibrations

CELL = ("--backend", "fake", "--model", "fake:ttft_ms=6+itl_ms=2", "--output-tokens", "4", "--prompt-tokens", "4")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path / "cache"))


def test_it_measures_and_the_next_comparison_uses_it(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *CELL, "--processes", "3", "--repetitions", "5", "--warmup", "1", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert (told["processes"], told["repetitions"], told["backend"]) == (3, 15, "fake")
    assert lines[0].startswith("Noise between 3 processes of fake:ttft_ms=6+itl_ms=2 none, by fake on ")
    assert f"Kept: {told['file']}" in lines
    [kept] = calibrations.kept()
    assert set(kept.spreads) >= {"throughput/output_tokens_per_s", "latency/ttft_ms_mean"}
    for _ in range(2):
        main(["run", *CELL, "--repetitions", "5", "--warmup", "1", "--rerun"])
    folders = sorted(Path("llmbench-results").iterdir())
    comparison = compare(folders[1], folders[2], allow=frozenset({"verdict"}))
    assert [noise.source for noise in comparison.process_noise if noise] == ["calibrated", "calibrated"]
    capsys.readouterr()
    assert main(["calibrate", "--of", str(folders[0])]) == 0
    assert calibrations.kept() == (kept,)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--quant", "int4,int8"), "quant has several values: int4,int8. A calibration measures one configuration"),
        (("--of", "here", "--quant", "int4"), "Existing results are given, and a parameter to measure: quant."),
    ],
)
def test_what_it_cannot_do_is_one_line(
    arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"llmbench: {told}")
    assert len(captured.err.splitlines()) == 1
