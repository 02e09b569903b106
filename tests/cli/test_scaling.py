"""`llmbench scaling` on results with known delays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.sweeps.upload import upload

from ..results import made, write_sweep

TOKENS, TTFT, ITL, ROW = 5, 20.0, 5.0, 2.0


@pytest.fixture(scope="module")
def store(store_template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{shutil.copy(store_template, tmp_path_factory.mktemp('scaling') / 'mlflow.db')}"


@pytest.fixture(scope="module")
def sweep(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Folder and parent run of one sweep for all tests in this module, which only read it."""
    import mlflow

    results = [made(batch=rows, ttft=TTFT, step=ITL + ROW * (rows - 1)) for rows in (1, 2, 4, 8, 16)]
    folder = write_sweep(tmp_path_factory.mktemp("results"), results)
    yield folder, upload(str(folder), store).parent_id or ""
    mlflow.set_tracking_uri(None)


@pytest.mark.charts
def test_known_delays_come_back(
    sweep: tuple[Path, str], store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (measured, parent) = tmp_path / "out", sweep
    arguments = [
        "scaling",
        str(measured),
        *"--at batch_size=3,12 --output".split(),
        str(folder),
        "--log",
        parent,
        "--tracking-uri",
        store,
        "--json",
    ]
    assert main(arguments) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("- Throughput against batch size") for line in printed)
    data = json.loads(last)
    law = next(found for found in data["laws"] if found["law"] == "throughput_by_batch")
    assert law["nearest"] == "T = b/(a + c·b)"
    found = next(rival for rival in law["rivals"] if rival["formula"] == law["nearest"])["parameters"]
    steps = TOKENS - 1
    # b·N/T = TTFT + (N − 1)·(ITL + ROW·(b − 1)) ms, so a and c follow.
    assert found["a"]["value"] == pytest.approx((TTFT + steps * (ITL - ROW)) / TOKENS / 1e3, rel=0.001)
    assert found["c"]["value"] == pytest.approx(steps * ROW / TOKENS / 1e3, rel=0.001)
    predicted = {p["x"]: p for p in data["predictions"] if p["law"] == "throughput_by_batch"}
    assert sorted(predicted) == [3, 12]
    assert predicted[12]["value"] == pytest.approx(12 * TOKENS * 1e3 / (TTFT + steps * (ITL + 11 * ROW)), rel=0.001)
    assert json.loads((folder / "scaling.json").read_text())["laws"] == data["laws"]
    client = MlflowClient(store)
    assert {item.path for item in client.list_artifacts(parent, "scaling")} == {
        "scaling/charts",
        "scaling/scaling.json",
        "scaling/scaling.md",
    }
    assert len(client.list_artifacts(parent, "scaling/charts")) == len(list((folder / "charts").iterdir())) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "batch_size=17"], "17 lies outside the measured range 1 to 16"),
        (["--at", "output_tokens=4"], "--at takes batch_size or prompt_tokens and a list: output_tokens=4"),
        (["--at", "batch_size=many"], "--at has a value that is not a number: batch_size=many"),
        (["--share", "1.5"], "not between 0 and 1: 1.5"),
        (["--log", "0" * 32], "There is no run 00000000000000000000000000000000 in the MLflow store"),
    ],
)
def test_wrong_use_is_one_line(
    sweep: tuple[Path, str], store: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scaling", str(sweep[0]), "--tracking-uri", store, *arguments]) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert error.startswith("llmbench: ")
