"""Decisions from Python: typed arguments, a returned record, and nothing printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import mlflow_llmbench
from mlflow_llmbench import compare, load_results, run
from mlflow_llmbench.analysis.decisions.limits import read_limits
from mlflow_llmbench.records.errors import JournalError, UsageError
from mlflow_llmbench.workflows.compare import compare_all
from mlflow_llmbench.workflows.destination import Destination
from mlflow_llmbench.workflows.gate import GateRun, gate
from mlflow_llmbench.workflows.recommend import recommend
from mlflow_llmbench.workflows.versions import export, promote, register

from ..results import made, stored

SHORT: Any = {"backend": "fake", "prompt_tokens": 4, "output_tokens": 6, "warmup": 1, "repetitions": 5}


def test_from_a_sweep_to_a_champion_without_a_printed_line(
    store_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fast, slow = stored(tmp_path / "sweep", store_uri, made(), made("int8", step=12))
    capfd.readouterr()
    chosen = recommend([str(tmp_path / "sweep")], limits=read_limits(max_ttft="1s"), output="out")
    assert chosen.found.winner and chosen.found.winner.result.cell.quant == "none"
    assert (Path("out") / "recommendation.md").exists()
    assert recommended(store_uri) == {fast: "throughput"}
    first = register(fast, "bot")
    assert promote(first.uri).before is None
    seen: list[GateRun] = []
    done = gate(slow, "models:/bot@champion", {"latency/itl_ms_p50": 0.05}, on_result=seen.append)
    assert seen == [done] and (done.found.verdict, done.run_id, done.measured) == ("regression", slow, None)
    assert set(done.files) == {"gate.md", "junit.xml"}
    assert MlflowClient(store_uri).get_run(slow).data.tags["llmbench.gate"] == "regression"
    with pytest.raises(UsageError, match=f"{first.uri} was measured with backend=fake, and there is nothing to serve"):
        export("models:/bot@champion", "transformers")
    assert capfd.readouterr().out == ""


def recommended(store_uri: str) -> dict[str, str]:
    """Runs that are tagged as recommended, with the goal."""
    client = MlflowClient(store_uri)
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    tag = "llmbench.recommended"
    return {one.info.run_id: one.data.tags[tag] for one in found if tag in one.data.tags}


def test_one_run_of_a_sweep_is_tagged_as_recommended(store_uri: str, tmp_path: Path) -> None:
    fast, lean = stored(tmp_path / "sweep", store_uri, made(), made("int8", step=12, memory=1.0))
    recommend([tmp_path / "sweep"])
    assert recommended(store_uri) == {fast: "throughput"}
    recommend([tmp_path / "sweep"], limits=read_limits(max_memory="2GB"))
    assert recommended(store_uri) == {lean: "throughput"}
    recommend([tmp_path / "sweep"], limits=read_limits(max_memory="1MB"))
    assert recommended(store_uri) == {lean: "throughput"}, "nothing was recommended"


def test_one_reference_needs_no_list(store_uri: str, tmp_path: Path) -> None:
    stored(tmp_path / "sweep", store_uri, made(), made("int8", step=12))
    folder = str(tmp_path / "sweep")
    results = load_results(folder)
    for given in (folder, tmp_path / "sweep", [folder], results, iter(results)):
        winner = recommend(given).found.winner
        assert winner and winner.result.cell.quant == "none"
    assert len(compare_all(folder)) == len(compare_all([tmp_path / "sweep"])) == 1
    with pytest.raises(JournalError, match="llmbench-results/nowhere is neither a folder"):
        recommend("llmbench-results/nowhere")
    with pytest.raises(
        UsageError, match=r"^Row is not a reference of results\. Give a folder, .*run\(\.\.\.\) returned\.$"
    ):
        recommend(results.best())  # type: ignore[arg-type]


def test_what_run_returns_is_compared_and_recommended(store_uri: str) -> None:
    one, four = (run(model="fake:", batch_size=size, **SHORT) for size in (1, 4))
    several = run(model="fake:", batch_size=[2, 8], **SHORT)
    told = compare(one, four, allow={"verdict"})  # a busy machine can make a verdict invalid
    assert (told.name_a, told.name_b) == ("batch_size=1", "batch_size=4")
    both = compare(several, allow={"verdict"})
    assert {both.name_a, both.name_b} == {"batch_size=2", "batch_size=8"}
    first = load_results(several)[0]
    assert compare(one, first, allow={"verdict"}).name_b == f"batch_size={first.cell.batch_size}"
    recommend([one, four], accept_suspect="a busy machine")
    for wrong in ((one, several), (several, one)):
        with pytest.raises(UsageError) as error:
            compare(*wrong)
        assert str(error.value) == (
            f"{several.folder} has 2 cells, and one is compared. Give two results, such as the run ids of two cells, "
            "or two items of load_results(...)."
        )
    with pytest.raises(UsageError, match="has 1 cell, and two are compared if one argument is given"):
        compare(one)


def test_a_comparison_is_told_before_its_files_are_written(store_uri: str, tmp_path: Path) -> None:
    stored(tmp_path / "sweep", store_uri, made(), made(step=12, batch=2))
    (tmp_path / "file").write_text("")
    seen: list[object] = []
    allow = frozenset({"workload"})
    with pytest.raises(JournalError):
        compare_all(
            [str(tmp_path / "sweep")],
            allow=allow,
            destination=Destination(str(tmp_path / "file")),
            on_result=seen.append,
        )
    assert len(seen) == 1
    with pytest.raises(UsageError, match="Unknown difference to allow: weather"):
        compare_all([str(tmp_path / "sweep")], allow=frozenset({"weather"}))


@pytest.mark.parametrize("limit", [{"max_memory": "0GB"}, {"max_ttft": "p95=0ms"}, {"min_quality": "kl=0"}])
def test_a_limit_of_zero_is_refused(limit: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"^--m\S+( kl)? must be more than 0: 0\w*\. Give for example"):
        read_limits(**limit)


def test_the_public_functions_load_nothing_before_they_are_used() -> None:
    program = (
        "import sys, mlflow_llmbench as m; from mlflow_llmbench import *;"
        "print(*sorted(set(m.__all__) - set(globals())));"
        "print([name for name in ('torch', 'mlflow', 'transformers') if name in sys.modules])"
    )
    root = Path(mlflow_llmbench.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]
    assert set(mlflow_llmbench.__all__) <= set(dir(mlflow_llmbench))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlflow_llmbench.nonsense  # noqa: B018
