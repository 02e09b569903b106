"""`llmbench study` on real runs of the fake backend: a sweep and its study by one command; studies of existing runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.workflows.study import parse_prices, run_study

GRID = "--backend fake --preset quick --batch-size 1,2,4 --prompt-tokens 16,32,64 --output-tokens 4 --warmup 1".split()


def told(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, object]]:
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.charts
def test_one_command_measures_and_studies_and_another_takes_it_in(
    store_uri: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["study", *GRID, "--tracking-uri", store_uri, "--json"]
    assert main([*command, "--model", "fake:ttft_ms=4+itl_ms=1+row_ms=1", "--price", "0.5"]) == 0
    lines, data = told(capsys)
    folder, parent = Path(str(data["folder"])), str(data["parent_run_id"])
    assert data["run_id"] == parent and data["study_folder"] == str(folder)
    assert any(line.startswith("- From batch size 1 to 4 throughput is ") for line in lines)
    assert (folder / "study/report.html").exists() and (folder / "scaling/scaling.json").exists()
    client = MlflowClient(store_uri)
    assert {item.path for item in client.list_artifacts(parent, "study")} == {
        "study/charts",
        "study/report.html",
        "study/report.md",
        "study/study.json",
    }
    assert {item.path for item in client.list_artifacts(parent, "scaling")} == {
        "scaling/charts",
        "scaling/scaling.json",
        "scaling/scaling.md",
    }
    charts = {Path(item.path).stem for item in client.list_artifacts(parent, "study/charts")}
    assert {"against_batch_size", "against_prompt_length", "per_instance", "heatmap_ttft", "cost_by_hardware"} <= charts
    assert client.get_run(parent).info.status == "FINISHED"

    monkeypatch.setenv("LLMBENCH_CHARTS", "0")
    assert main([*command, "--model", "fake:ttft_ms=8+itl_ms=2+row_ms=1", "--of", str(folder)]) == 0
    _, both = told(capsys)
    assert both["run_id"] != parent
    study = both["study"]
    assert isinstance(study, dict) and study["cells"] == 18

    first, second = Path(str(data["folder"])).name, str(both["parent_run_id"])
    out = tmp_path / "out"
    assert (
        main(["study", "--of", f"{first},{second}", "--output", str(out), "--tracking-uri", store_uri, "--json"]) == 0
    )
    _, again = told(capsys)
    assert again["run_id"] == parent and "runs" not in again  # that of the first sweep; nothing was measured
    assert json.loads((out / "study/study.json").read_text())["claims"] == study["claims"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of", "nowhere"], "nowhere is neither a folder, nor a run id, nor the name of a sweep."),
        (["--of", "x" * 300], "xxx is neither a folder, nor a run id"),
        (["--of", "nowhere", *GRID], "nowhere is neither a folder"),  # before anything is measured
        ([*GRID, "--price", "cheap"], "--price is not a price per hour: cheap."),
        ([*GRID, "--price", "EPYC=-1"], "--price is not a price per hour: EPYC=-1."),
        ([*GRID, "--preset", "quik"], "Unknown preset: quik."),
        ([*GRID, "--share", "1.5"], "The share of per-instance throughput to keep is not between 0 and 1: 1.5."),
        ([*GRID, "--share", "nan"], "The share of per-instance throughput to keep is not between 0 and 1: nan."),
        ([*GRID, "--log", "nowhere"], "There is no run nowhere in the MLflow store"),
        (
            [*GRID, "--workload", "mixed", "--batching", "static,dynamic", "--request-rate", "9"],
            "A study uses batches of one shape, but batching=static,dynamic",
        ),
    ],
)
def test_wrong_use_is_one_line_and_measures_nothing(
    store_uri: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["study", *arguments, "--tracking-uri", store_uri]) in (1, 2)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "llmbench-results").exists()


def test_prices_are_read() -> None:
    assert parse_prices("none") == {}
    assert parse_prices("0.5") == {"": 0.5}
    assert parse_prices("EPYC=0.5, A100=2.4") == {"EPYC": 0.5, "A100": 2.4}
    assert parse_prices("RTX 4090=1600/3y,0.5") == {"RTX 4090": pytest.approx(1600 / (3 * 8766)), "": 0.5}
    for wrong in ("1600/3", "1600/0y", "1600/-1y", "/3y", "1600/3 years", "inf/1y"):
        with pytest.raises(UsageError, match=f"--price is not a price per hour: {wrong}. Give --price 0.5"):
            parse_prices(wrong)


def test_a_study_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="A study needs results"):
        run_study(None)


def test_what_was_measured_is_kept_when_it_cannot_be_studied(
    store_uri: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = "--backend fake --model fake: --batch-size 1 --prompt-tokens 8 --output-tokens 4 --warmup 1".split()
    assert main(["study", *arguments, "--price", "A100=1", "--tracking-uri", store_uri]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "llmbench: The cells were measured but could not be studied: No machine of the study is called A100"
    )
    assert list((tmp_path / "llmbench-results").glob("*/*/artifacts/result.json"))
