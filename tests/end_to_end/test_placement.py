"""A model of which half lies on the disk, into MLflow, with its quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import load_results, run
from mlflow_llmbench.config.model_shape import PROCESS_BYTES
from mlflow_llmbench.system.placement import MOVING_BYTES, SPARE
from tests.end_to_end.test_survival import runs, without_model

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CELL: dict[str, Any] = {"prompt_tokens": 16, "output_tokens": 8, "repetitions": 5, "warmup": 1, "device": "cpu"}
SCORING = 2 * 512 * 512 * 4
"""Bytes of the logits of 512 tokens of the tiny model."""


def test_half_of_a_model_on_the_disk_into_mlflow(store_uri: str, tiny_model: Path) -> None:
    weights = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    limit = int((PROCESS_BYTES + MOVING_BYTES + SCORING + 0.6 * weights) / (1 - SPARE))
    result = run(
        model=str(tiny_model), quant="fp32", placement="single,auto", quality="auto", memory_limit=str(limit), **CELL
    )
    assert [row.outcome for row in result.rows] == ["ok"] * 2, [row.message for row in result.rows]
    found = {without_model(one): one.data for one in runs(store_uri).values()}
    single, auto = found["placement=single"], found["placement=auto"]
    assert auto.params["placement"] == "auto" and "lm_head" in auto.params["placement.disk"]
    on_disk, in_memory = (auto.metrics[f"memory/weight_{place}_gb"] for place in ("disk", "host"))
    assert on_disk > 0 and in_memory > 0
    assert on_disk + in_memory == pytest.approx(single.metrics["memory/weight_gb"], rel=1e-3)
    assert auto.tags["llmbench.placement"].startswith("cpu 0.0") and ", disk 0.0" in auto.tags["llmbench.placement"]
    assert "efficiency/mbu_ratio" not in auto.metrics and "llmbench.placement" not in single.tags
    assert auto.metrics["quality/kl_vs_reference"] == single.metrics["quality/kl_vs_reference"] == 0
    assert auto.metrics["quality/perplexity"] == pytest.approx(single.metrics["quality/perplexity"])
    assert auto.metrics["memory/host_needed_gb_peak"] < limit / 1e9
    [measured] = [one for one in load_results(result.folder) if one.cell.placement == "auto"]
    assert measured.load and measured.load.placement and measured.predicted_placement
    for part in measured.load.placement:
        assert part.weight_bytes == pytest.approx(measured.predicted_placement[part.place], rel=0.01)
    assert not [*Path(result.folder).glob("*/offloaded")]
