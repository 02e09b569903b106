"""Commands without the name of a sweep take the newest one of the experiment, and say which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import compare, load_results, recommend, register
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.tracking.latest import latest_sweep

from ..results import made, stored, write_sweep

OLD, NEW = "20260101T000000Z-aaaaaa", "20260102T000000Z-bbbbbb"


@pytest.fixture
def two_sweeps(store_uri: str, tmp_path: Path) -> list[str]:
    """The runs of the newer of two sweeps, which was uploaded first."""
    newer = stored(tmp_path / NEW, store_uri, made(started_ms=2000), made("int8", step=12, started_ms=2001))
    stored(tmp_path / OLD, store_uri, made(batch=2), made("int8", batch=2))
    return newer


def test_a_sweep_of_several_models_names_them(store_uri: str, tmp_path: Path) -> None:
    results = [
        replace(
            made(step=10 + i),
            cell=replace(made().cell, model=f"fake:{i}"),
            hashes=replace(made().hashes, config=f"{i}"),
            started_ms=1000 + i,
        )
        for i in range(5)
    ]
    stored(tmp_path / OLD, store_uri, *results[:2])
    assert f"{OLD}, 2 cells of fake:0 and fake:1 in the" in str(latest_sweep(store_uri))
    stored(tmp_path / NEW, store_uri, *(replace(one, started_ms=one.started_ms + 1000) for one in results))
    assert f"{NEW}, 5 cells of fake:0, fake:1 and 3 more in the" in str(latest_sweep(store_uri))


@pytest.mark.usefixtures("two_sweeps")
@pytest.mark.parametrize(
    "arguments", [["recommend"], ["compare"], ["recommend", "latest"], ["scaling"], ["study", "--of", "latest"]]
)
def test_without_a_name_the_newest_sweep_is_taken_and_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"The latest sweep: {NEW}, 2 cells of fake:x in the experiment llmbench, measured at 1970-01-01 "
    )
    assert captured.err.count("The latest sweep") == 1
    assert '"batch_size": 2' not in captured.out


def test_python_takes_the_same_word(two_sweeps: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert [one.sweep for one in load_results("latest")] == [NEW, NEW]
    assert recommend(["latest"]).sweep == recommend("latest").sweep == NEW
    assert register("latest", "bot").run_id == two_sweeps[0]
    found = compare("latest")
    assert {found.name_a, found.name_b} == {"quant=none", "int8"}
    captured = capsys.readouterr()
    assert captured.out == "" and "The latest sweep" not in captured.err


def test_the_winner_of_the_newest_sweep_is_registered(
    two_sweeps: list[str], store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register", "--name", "bot"]) == 2
    parent = MlflowClient(store_uri).get_run(two_sweeps[0]).data.tags["mlflow.parentRunId"]
    assert f"Run `llmbench recommend {parent}`" in capsys.readouterr().err
    assert main(["recommend"]) == 0
    offer = capsys.readouterr().out.splitlines()[-1]
    assert offer.endswith(f"Register the winner: llmbench register {parent} --name fake-x")
    assert main(["register", "--name", "bot"]) == 0
    told = capsys.readouterr().out
    assert f"Its evidence is the run {two_sweeps[0]}.\nIt can be gated and promoted, but not served" in told
    assert "mlflow models serve" not in told
    assert main(offer.partition("winner: llmbench ")[2].split()) == 0


def test_what_cannot_be_registered_is_not_offered(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = [replace(one, cell=replace(one.cell, weights="random")) for one in (made(), made("int8", step=12))]
    run_id, _ = stored(tmp_path / NEW, store_uri, *random)
    assert main(["recommend"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    why = f"The run {run_id} has random weights, whose answers mean nothing. Measure the model with its own weights."
    assert told.endswith(f": recommendation.md. {why}")
    assert main(["register", run_id, "--name", "bot"]) == 2
    assert capsys.readouterr().err == f"llmbench: {why}\n"


def test_a_folder_of_that_name_is_meant(tmp_path: Path, store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "latest", [made(), made("int8", step=12)])
    assert main(["compare", "latest"]) == 0
    assert "The latest sweep" not in capsys.readouterr().err


def test_an_experiment_without_a_sweep_names_the_newest_elsewhere(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend"]) == 2
    none = f"llmbench: No sweep was measured in the experiment llmbench of {store_uri}. "
    assert capsys.readouterr().err == (f"{none}Measure one with `llmbench quickstart`, or give the folder of one.\n")
    upload(str(write_sweep(tmp_path / OLD, [made(), made("int8")])), store_uri, "other")
    assert main(["recommend"]) == 2
    assert capsys.readouterr().err == (
        f"{none}The newest of the store is {OLD}, in the experiment other: give its name.\n"
    )
    assert main(["recommend", "--experiment", "other"]) == 0
    assert latest_sweep(store_uri, "other").sweep == OLD
