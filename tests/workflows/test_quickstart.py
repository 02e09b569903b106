"""Quickstart: the model that it chooses, what it says beforehand, its decision, and commands that work as printed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis.decisions.recommend import Recommendation, recommend
from mlflow_llmbench.backends.checkpoints import packaged_model
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import MeasurementError
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.reports.quickstart import decision, format_quickstart_plan
from mlflow_llmbench.workflows import quickstart

from ..results import known_noise, made

FAKE = ("quickstart", "--backend", "fake", "--model", "fake:ttft_ms=2+itl_ms=1")
WITHOUT_PACKAGE = pytest.mark.skipif(packaged_model.is_installed(), reason="the package with the real model is here")


def found(*results: RunResult) -> Recommendation:
    return recommend(results, calibrations=[known_noise(results[0])])


# The model


@WITHOUT_PACKAGE
def test_without_a_model_the_weights_are_random_and_it_says_so() -> None:
    """The Hub is offline in tests, and nothing is in its cache."""
    prepared = quickstart.prepare()
    assert prepared.parameters["model"] == quickstart.SMALL_MODEL
    assert prepared.parameters["weights"] == "random" and "quality" not in prepared.parameters
    told = format_quickstart_plan(prepared.plan)
    assert told.startswith(
        "Model: pythia-160m with RANDOM weights: speed and memory are real, its answers are noise. The Hub cannot be "
        "reached for EleutherAI/pythia-160m, and it is not in the local cache. "
    )
    assert f"install {packaged_model.PACKAGE} gives a real model without the Hub." in told
    assert "64 prompt tokens, 16 output tokens, batch size 1, 10 repetitions each." in told
    assert "GB of disk. Ctrl-C keeps what was measured." in told
    assert prepared.plan.memory_bytes and prepared.plan.disk_bytes > 2 * 162_322_944 and prepared.plan.seconds > 30


def test_a_busy_machine_is_told_beforehand(tiny_model: Path) -> None:
    plan = quickstart.prepare(str(tiny_model)).plan
    told = format_quickstart_plan(dataclasses.replace(plan, busy_cpus=1.44)).splitlines()
    assert told[-1] == (
        "Other programs use 1.4 CPUs now, which makes results suspect. Stop them for a decision that counts."
    )
    assert "Other programs" not in format_quickstart_plan(dataclasses.replace(plan, busy_cpus=0.1))


def test_a_model_that_was_unpacked_is_taken(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path))
    shutil.copytree(tiny_model, packaged_model.model_folder())
    prepared = quickstart.prepare()
    assert prepared.parameters["model"] == str(packaged_model.model_folder()) and prepared.unpacked is None
    assert prepared.parameters["quality"] == "auto"
    assert "Gemma 3 270M with real weights" in format_quickstart_plan(prepared.plan)


def test_a_folder_is_a_real_model(tiny_model: Path) -> None:
    prepared = quickstart.prepare(str(tiny_model), "bf16,int8")
    assert prepared.parameters["quality"] == "auto" and prepared.parameters["quant"] == "bf16,int8"
    assert prepared.plan.model == str(tiny_model) and not prepared.plan.left_out
    assert prepared.asked == {"model": str(tiny_model), "quant": "bf16,int8"}


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama.cpp is installed")
def test_what_could_take_part_is_named_with_its_install_command(tiny_model: Path) -> None:
    prepared = quickstart.prepare(str(tiny_model))
    assert prepared.parameters["quant"] == "bf16,int4"
    told = format_quickstart_plan(prepared.plan)
    assert "Left out: q4_k_m by llama.cpp: " in told and "install llama-cpp-python" in told.replace("'", "")


@WITHOUT_PACKAGE
def test_a_package_that_cannot_be_unpacked_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=f"^The model of the package {packaged_model.PACKAGE} cannot be"):
        packaged_model.unpack(tmp_path / "models" / "gemma")
    assert not any((tmp_path / "models").iterdir())


def test_one_configuration_is_no_decision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAKE, "--quant", "int4"]) == 2
    line = "llmbench: A decision needs two configurations, and there is one: quant=int4. Give two: bf16,int4.\n"
    assert capsys.readouterr().err == line


# The decision


def test_the_faster_one_is_deployed_with_what_it_costs() -> None:
    told = decision(found(made("int4", step=5.0, memory=1.0), made("bf16", step=10.0, memory=2.0)))
    assert told.startswith("Deploy int4, the best for output throughput: output throughput ")
    assert "What int4 costs in quality was not measured." in told
    assert "bf16: It generates 0.667 times" in told and "needs 2.00 times the memory" in told


def test_of_equal_speeds_the_one_with_less_memory_is_deployed_and_says_why() -> None:
    told = decision(found(made("int4", memory=1.0), made("bf16", memory=2.0)))
    assert told.startswith("Deploy int4, for its memory alone. Their output throughput cannot be told apart: ")
    assert "It needs 1.00 GB of memory at its peak, the most of the others 2.00 GB." in told


def test_of_equal_speeds_and_memory_none_is_deployed() -> None:
    told = decision(found(made("fp16", memory=2.0), made("bf16", memory=2.0)))
    assert told.startswith("No decision between ") and "they need the same memory" in told


def test_the_only_valid_one_is_not_deployed_beside_a_suspect_one_that_looks_better() -> None:
    faster = made("bf16", step=5.0, steady=False)
    told = decision(found(made("int4", step=10.0), faster))
    assert told.startswith("No decision: only int4 is valid. bf16 is suspect (not_steady).")
    assert "bf16 looks better and is suspect" in told
    slower = made("bf16", step=20.0, steady=False)
    assert decision(found(made("int4", step=10.0), slower)).startswith("Deploy int4")


def test_suspect_results_decide_nothing() -> None:
    noisy = (1.0, 1.6, 0.7, 1.4, 0.8)
    told = decision(found(made("int4", step=5.0, factors=noisy), made("bf16", factors=noisy)))
    assert told.startswith("No decision: int4 is suspect (high_variation")
    assert "; bf16 is suspect (" in told
    assert "looks better and is suspect" in told


# The command


def test_the_command_measures_decides_and_names_commands_that_work(
    store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FAKE, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Model: fake:ttft_ms=2+itl_ms=1\nMeasures bf16 and int4: ")
    told = json.loads(captured.out.splitlines()[-1])
    assert [run["params"]["quant"] for run in told["runs"]] == ["bf16", "int4"]
    assert told["decision"] in captured.out and "Open the comparison: mlflow ui" in captured.out
    client = MlflowClient(store_uri)
    kept = {item.path for item in client.list_artifacts(told["parent_run_id"])}
    assert {"recommendation.json", "recommendation.md"} <= kept
    assert client.get_run(told["parent_run_id"]).data.params["quant"] == "bf16,int4"
    assert len(told["next"]) >= 2
    for line in told["next"]:
        assert f"  {line}  " in captured.out
        program, *words = shlex.split(line)
        assert program == "llmbench"
        if words[0] == "quickstart":
            assert words[1:] == ["--backend", "fake", "--model", FAKE[-1]]
        else:
            assert main(words) in (0, 1), capsys.readouterr().err
    capsys.readouterr()
    assert main([*FAKE, "--json"]) == 0
    again = capsys.readouterr()
    valid = sum(run["verdict"] == "valid" for run in told["runs"])
    assert again.err.count("measured before") == valid and again.err.count("--rerun") == valid


def test_a_store_that_is_away_loses_no_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAKE, "--tracking-uri", "http://127.0.0.1:9", "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["decision"] and told["not_uploaded"]
    compare = shlex.split(next(line for line in told["next"] if " compare " in line))[1:]
    assert Path(compare[1]).is_dir() and compare[2:] == ["--tracking-uri", "http://127.0.0.1:9"]
