"""Figures, tables and sentences of a model that is laid out over several places."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlflow_llmbench.analysis import efficiency, layout, summary
from mlflow_llmbench.analysis.scaling.cells import select_usable
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import Hashes, LoadInfo, PlacedPart, RunResult
from mlflow_llmbench.reports.result import report_markdown
from mlflow_llmbench.sweeps import resume
from mlflow_llmbench.tracking.runs import cell_tags
from tests.analysis.test_summary import result

GB = 10**9
ON_DISK = (PlacedPart("cpu", GB, ("embed", "layers.0")), PlacedPart("disk", 2 * GB, ("layers.1", "layers.2")))
TWO_GPUS = (PlacedPart("cuda:0", GB, ("layers.0",)), PlacedPart("cuda:1", 2 * GB, ("layers.1",)))


def laid(parts: tuple[PlacedPart, ...] | None, **fields: Any) -> RunResult:
    load = LoadInfo(1.0, 3000, step_bytes=800, kv_bytes_per_token=10, flops_per_token=100.0, placement=parts)
    peaks = {"read_bytes_per_s": 1e6, "flops_per_s": 1e6}
    cell = Cell(batch_size=2, output_tokens=4, placement="auto" if parts else "single")
    return result([[2, 2, 2]] * 5, load=load, peaks=peaks, idle_w=1.0, cell=cell, **fields)


def test_weights_are_told_by_place() -> None:
    found = summary.summarize(laid(ON_DISK))
    assert (found["memory/weight_host_gb"], found["memory/weight_disk_gb"]) == (1, 2)
    assert "memory/weight_gpus_gb" not in found
    measured = laid(TWO_GPUS)
    assert summary.summarize(measured)["memory/weight_gpus_gb"] == 3
    points = [(p.key, p.step, p.value) for p in summary.series(measured) if p.key == "steps/gpu_weight_gb"]
    assert points == [("steps/gpu_weight_gb", 0, 1), ("steps/gpu_weight_gb", 1, 2)]
    assert cell_tags(laid(ON_DISK), judge(laid(ON_DISK)))["llmbench.placement"] == "cpu 1.00 GB, disk 2.00 GB"
    assert not [key for key in summary.summarize(laid(None)) if "weight_" in key and key != "memory/weight_gb"]
    assert "llmbench.placement" not in cell_tags(laid(None), judge(laid(None)))


def test_bandwidth_is_not_told_of_weights_that_come_from_elsewhere() -> None:
    assert efficiency.model_bandwidth_utilization(laid(None)) == 0.5
    assert efficiency.model_bandwidth_utilization(laid(ON_DISK)) is None
    why = efficiency.utilization_doubt(laid(ON_DISK))
    assert why == (
        "MBU is left out, because each step brings weights from elsewhere, at another bandwidth: 2.00 GB on the disk."
    )
    beside = laid((PlacedPart("cuda:0", GB), PlacedPart("cpu", 2 * GB), PlacedPart("disk", GB)))
    assert layout.moved(beside) == "2.00 GB in host memory and 1.00 GB on the disk"
    nominal = dataclasses.replace(laid(ON_DISK), nominal_bandwidth=0.0001)
    assert efficiency.model_bandwidth_utilization(nominal) is None
    assert "mbu_above_one" not in {reason.code for reason in judge(nominal).reasons}
    # Computed by one device all the same, so the share of its FLOP/s is that of the model on it.
    assert efficiency.model_flops_utilization(laid(ON_DISK)) == efficiency.model_flops_utilization(laid(None))


def test_gpus_that_compute_one_after_another_count_as_one_but_have_no_single_energy_counter() -> None:
    assert efficiency.model_bandwidth_utilization(laid(TWO_GPUS)) == 0.5
    assert efficiency.device_count(laid(TWO_GPUS)) == 1 and layout.gpu_count(laid(TWO_GPUS)) == 2
    assert efficiency.joules_per_token(laid(TWO_GPUS)) is None


def test_a_report_has_what_landed_where_beside_the_plan() -> None:
    measured = laid(ON_DISK, predicted_placement={"cpu": 3 * GB, "disk": 0})
    text = report_markdown(measured, summary.summarize(measured), judge(measured))
    assert "## What landed where" in text
    assert "| cpu | 1.00 | 3.00 | embed, layers.0 |" in text and "| disk | 2.00 | 0 | layers.1–2 |" in text
    empty = laid((PlacedPart("cpu", GB, ("",)),), predicted_placement={"cpu": GB, "disk": GB // 2})
    told = report_markdown(empty, summary.summarize(empty), judge(empty))
    assert "| cpu | 1.00 | 1.00 | the whole model |" in told and "| disk | 0 | 0.500 | – |" in told
    assert "What landed where" not in report_markdown(laid(None), {}, None)


def test_laws_leave_out_models_that_lie_elsewhere() -> None:
    usable, left_out = select_usable([laid(ON_DISK), laid(None, hashes=Hashes("f", "b", "c", "d", "e"))])
    assert [one.cell.placement for one in usable] == ["single"]
    assert [text.partition(": ")[2] for text in left_out] == [
        "2.00 GB on the disk; the laws hold for models in one place"
    ]


def test_a_result_is_reused_only_if_it_lies_as_it_would_now() -> None:
    class Planned:
        predicted_placement: dict[str, int] | None

    class Job:
        planned = Planned()

    def alike(found: RunResult, expected: dict[str, int] | None) -> bool:
        Job.planned.predicted_placement = expected
        return resume._lay_alike(found, Job())  # type: ignore[arg-type]

    assert alike(laid(None), None) and alike(laid(ON_DISK), {"cpu": GB, "disk": 2 * GB})
    assert alike(laid(ON_DISK), {"cpu": GB + GB // 5, "disk": 2 * GB - GB // 5})
    assert not alike(laid(ON_DISK), {"cpu": 3 * GB}) and not alike(laid(ON_DISK), None)
