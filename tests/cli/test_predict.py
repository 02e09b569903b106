"""`llmbench predict`: from the latest sweep, for other hardware, always marked, nothing logged, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main

from ..results import made, stored


def told(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    *lines, last = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(last)


def test_a_prediction_from_the_latest_sweep_is_marked_and_not_logged(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 10 ms and 20 ms to the first token, whatever the batch: 5 tokens of 2 rows in 60 ms."""
    name = "20261121T101500Z-3f2a91"
    stored(tmp_path / name, store_uri, *(made(batch=batch, step=10.0 + batch / 1e3) for batch in (1, 4, 16)))
    client = MlflowClient(store_uri)
    before = {run.info.run_id: run.data.metrics for run in client.search_runs(["0", "1"])}
    assert main(["predict", "--batch-size", "2,4", "--model", "fake:x", "--json", "--tracking-uri", store_uri]) == 0
    text, data = told(capsys)
    assert text.startswith(
        "Predicted, not measured: model fake:x, quant none, prompt_tokens 8, output_tokens 5; on AMD"
    )
    assert f"from 3 measured cells of {name}." in text
    assert "predicted figure" in text and "leave-one-out error" in text
    assert "x none batch 4 with 8 + 5 tokens was measured, so it is not predicted." in text
    assert data["predicted"] is True and data["sweeps"] == [name]
    two, four = data["cells"]
    assert (two["measured"], four["measured"], four["figures"]) == (False, True, [])
    assert two["figures"] and all(figure["predicted"] is True for figure in two["figures"])
    rate = next(figure for figure in two["figures"] if figure["name"] == "throughput")
    assert rate["low"] <= rate["value"] <= rate["high"] and rate["unit"] == "tokens/s"
    assert rate["value"] == pytest.approx(2 * 5 / 0.06, rel=1e-3)
    assert {run.info.run_id: run.data.metrics for run in client.search_runs(["0", "1"])} == before


def test_other_hardware_needs_no_results(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # not asked
    command = ["predict", "--model", "llama-2-7b", "--quant", "fp16,int4", "--hardware", "t4", "--json"]
    assert main(command) == 0
    text, data = told(capsys)
    assert "Times are bounds by the nominal rates" in text and "on t4 (320 GB/s, 65 TFLOP/s, 16 GB; NVIDIA" in text
    half, four = data["cells"]
    assert (half["fits"], four["fits"]) == (True, True) and four["largest_batch"] > 3 * half["largest_batch"]
    assert [figure["bound"] for figure in half["figures"]] == ["at most", "at least", "at least", ""]
    step = half["figures"][2]["value"]
    assert step == pytest.approx(
        1e3 * (6_738_415_616 - 32_000 * 4096) * 2 / 320e9, rel=0.01
    )  # weights once, and a cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "rtx-490"], "Unknown hardware: rtx-490. Did you mean rtx-4090?"),
        (["--hardware", "t4", "--flops", "3"], "--hardware t4 has rates of its own. Leave out --bandwidth"),
        (["--memory", "8GB"], "A machine is given by its bandwidth and its FLOP/s. Add --bandwidth with GB/s."),
        (["--hardware", "t4", "--quant", "int5"], "Unknown quant: int5. Did you mean int8?"),
        (["--of", "nowhere"], "nowhere is neither a folder, nor a run id, nor the name of a sweep."),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["predict", "--model", "opt-125m", *arguments, "--tracking-uri", store_uri])
    captured = capsys.readouterr()
    assert code in (1, 2) and captured.out == ""
    assert message in captured.err.splitlines()[-1]
