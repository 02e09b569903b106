"""`llmbench compare` on results by folder, run, parent and sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import JournalError, TrackingError
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.tracking.load_results import load_results

CELL = {"backend": "fake", "output_tokens": 6, "prompt_tokens": 4, "repetitions": 8, "warmup": 1}


@pytest.fixture
def sweep(store_uri: str) -> SweepResult:
    return run(model="fake:ttft_ms=6+itl_ms=2+row_ms=1", batch_size="1,4", **CELL)


def test_every_kind_of_reference_leads_to_the_same_results(sweep: SweepResult) -> None:
    folders = load_results(str(sweep.folder))
    assert {r.hashes.config for r in folders} == {r.hashes.config for r in load_results(sweep.folder.name)}
    assert [r.cell.batch_size for r in load_results(sweep.parent_id or "")] == [
        r.cell.batch_size for r in load_results(sweep.folder.name)
    ]
    [one] = load_results(f"runs:/{sweep.run_ids[1]}")
    assert one.cell.batch_size == 4
    assert load_results(str(sweep.folder / one.hashes.config)) == [one]
    assert load_results(str(sweep.folder / one.hashes.config / "artifacts")) == [one]


@pytest.mark.charts
def test_the_sentence_the_table_and_the_artifacts(
    sweep: SweepResult, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one, four = sweep.run_ids
    # A busy machine can make a verdict `invalid`; this test is about the command, not the verdict.
    assert main(["compare", one, f"runs:/{four}", "--log", one, "--json", "--allow", "verdict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [found] = json.loads(lines[-1])
    assert lines[0] == found["sentence"] and lines[0].startswith("batch_size=4 ")
    rate = found["effects"]["throughput/output_tokens_per_s"]
    assert rate["ratio"] > 1.2 and len(rate["values_a"]) == len(rate["values_b"]) == 8
    assert rate["effect"] in ("better", "no difference seen", "cannot be told")  # the latter two on a busy machine
    client = MlflowClient(store_uri)
    kept = {item.path for folder in ("comparison", "comparison/charts") for item in client.list_artifacts(one, folder)}
    charts = {f"comparison/charts/{name}.{kind}" for name in ("ratios", "values") for kind in ("svg", "png")}
    assert kept == {"comparison/comparison.md", "comparison/comparison.json", "comparison/charts", *charts}
    logged = json.loads(Path(client.download_artifacts(one, "comparison/comparison.json", ".")).read_text())
    assert logged == [found]
    assert lines[0] in Path(client.download_artifacts(one, "comparison/comparison.md", ".")).read_text()


@pytest.mark.charts
def test_files_of_a_comparison_beside_what_is_there(
    sweep: SweepResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run gets the files of the comparison, and none of the user's files in the folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    one, four = sweep.run_ids
    assert main(["compare", one, four, four, "--output", str(folder), "--log", one, "--allow", "verdict"]) == 0
    assert f"Written: {folder}" in capsys.readouterr().out
    drawn = {f"charts/{name}.{kind}" for name in ("ratios", "values_1", "values_2") for kind in ("svg", "png")}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "comparison.md",
        "comparison.json",
        "diary.txt",
        *drawn,
    }
    assert len(json.loads((folder / "comparison.json").read_text())) == 2
    assert {item.path for item in MlflowClient(sweep.tracking_uri).list_artifacts(one, "comparison")} == {
        "comparison/comparison.md",
        "comparison/comparison.json",
        "comparison/charts",
    }
    (folder / "file").write_text("")
    assert main(["compare", one, four, "--output", str(folder / "file"), "--allow", "verdict"]) == 1
    assert capsys.readouterr().err.startswith(f"llmbench: Cannot write {folder / 'file'}")
    assert main(["compare", one, four, "--log", "0" * 32, "--allow", "verdict"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unlike_hardware_is_refused_and_can_be_allowed(
    sweep: SweepResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(next(sweep.folder.glob("*/artifacts")), other)
    data = json.loads((other / "result.json").read_text())
    data["environment"]["cpu"]["name"] = "Another CPU"
    data["hashes"]["hardware"] = "0" * 16
    (other / "result.json").write_text(json.dumps(data))
    first = str(next(sweep.folder.glob("*/artifacts")))
    assert main(["compare", first, str(other)]) == 2
    error = capsys.readouterr().err
    assert "→ Another CPU" in error and "--allow" in error
    assert len(error.splitlines()) == 1
    assert main(["compare", first, str(other), "--allow", "hardware,verdict"]) == 0
    assert "Another CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("nonsense", JournalError, "nonsense is neither a folder, nor a run id, nor the name of a sweep"),
        ("0" * 32, TrackingError, "is not in the store"),
        ("20200101T000000Z-abcdef", TrackingError, "is not in the store"),
        (".", JournalError, "holds no result"),
    ],
)
def test_references_that_lead_nowhere(store_uri: str, reference: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_results(reference)


def test_wrong_use(sweep: SweepResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", sweep.run_ids[0]]) == 2
    assert "needs two results" in capsys.readouterr().err
    assert main(["compare", *sweep.run_ids, "--allow", "everything"]) == 2
    assert "Unknown difference to allow: everything. Known: hardware" in capsys.readouterr().err
