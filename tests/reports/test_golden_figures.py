"""Every figure, table and tag of results of each scenario, against stored ones: results measured before keep them.

After an intended change, write the stored ones again: `python -m tests.reports.test_golden_figures`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.comparison import compare
from mlflow_llmbench.analysis.decisions import gate, recommend
from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of, version_tags
from mlflow_llmbench.analysis.decisions.export import export
from mlflow_llmbench.analysis.server_overhead import added, sentence
from mlflow_llmbench.analysis.summary import series, summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import (
    ClientReadings,
    Divergence,
    EngineReadings,
    Failure,
    LoadInfo,
    MemorySample,
    MemoryStages,
    Quality,
    Repetition,
    RequestRecord,
    RunResult,
    ServerReading,
    TaskScore,
    TextScores,
    TextTimes,
)
from mlflow_llmbench.reports.comparison import comparison_cells, comparison_json
from mlflow_llmbench.reports.gate import gate_json, gate_markdown
from mlflow_llmbench.reports.recommendation import recommendation_json, recommendation_markdown
from mlflow_llmbench.reports.result import (
    format_table,
    report_markdown,
    row_of,
    statistics_cells,
    summary_markdown,
    with_figures,
)
from mlflow_llmbench.reports.sweep import cells_table, headline

from ..results import GB, MS, made

GOLDEN = Path(__file__).parents[1] / "golden" / "figures.json"
STAGES = ("baseline", "loaded", "peak", "steady", "unloaded")

QUALITY = Quality(
    "d",
    TextScores("wiki", 50, 8, 4, ((1.0, 2.0, 1.5), (2.5, 1.0)), ((0.9, 2.0, 1.4), (2.4, 1.0)), ((4, 5, 3), (6, 2))),
    Divergence("fake:x", "ids", tuple((0.01 * (i % 7), 0.02) for i in range(160)), ((True, False), (True, True))),
    tasks=(TaskScore("arc", "acc", 0.5, 0.02, 100),),
)


def full(step: float = 10.0, device: bool = True, **fields: Any) -> RunResult:
    """A result of one batch size with everything that can be recorded."""
    stages = {stage: (i + 1) * GB for i, stage in enumerate(STAGES)}
    return dataclasses.replace(
        made(step=step, **fields),
        load=LoadInfo(
            2.5, 2 * GB, 19 * GB // 10, 4096, 4e9, 1e8, 2e4, cache_bytes=1000, facts={"model.device": "cuda:0"}
        ),
        first_call_ms=321.0,
        compile_s=4.5,
        peaks={"read_bytes_per_s": 5e11, "flops_per_s": 1e13},
        memory=MemoryStages(stages, stages, stages if device else {}, 6 * GB if device else None),
        predicted_bytes=5 * GB,
        idle_w=10.0,
        same_tokens=(5,),
        text_times=TextTimes((MS, 2 * MS, 6 * MS), (MS, MS, 3 * MS)),
        forward_ns=(18 * MS, 19 * MS, 23 * MS),
        natural=(4, None, 2),
        timeline=(MemorySample(0, GB, GB, GB), MemorySample(MS, 2 * GB, GB, None)),
        quality=QUALITY,
        environment={"cpu": {"name": "AMD EPYC"}, "gpus": [{"name": "NVIDIA X", "memory_bytes": 80 * GB}]},
    )


def loaded(cell: Cell, **fields: Any) -> RunResult:
    """A result of requests that overlap: five repetitions of 60, each with a prompt of its own, one of them failed."""
    repetitions = []
    for index in range(5):
        begin = index * 1000 * MS
        requests = [
            RequestRecord(
                begin + i * 5 * MS,
                tuple(begin + i * 5 * MS + (20 + 3 * token) * MS + index * 10_000 for token in range(5)),
                prompt_tokens=8 + i % 3,
                intended_ns=begin + i * 5 * MS - MS if cell.open_loop else None,
                visible_ns=begin + i * 5 * MS + 23 * MS,
                cached_tokens=i % 2,
            )
            for i in range(60)
        ]
        lags = tuple(range(0, 3 * MS, 10_000))
        repetitions.append(
            Repetition(
                index,
                index,
                tuple(requests[1:]),
                failed=(dataclasses.replace(requests[0], outcome="timeout", stamps_ns=(), end_ns=begin + 9 * MS),),
                client=ClientReadings(begin, begin + 500 * MS, lags, 0.1),
                engine=EngineReadings(2000, 1500, lags_ns=lags) if cell.batching else None,
                server=tuple(
                    ServerReading(
                        begin + i * 100 * MS - MS,
                        {"vllm:num_requests_running": 3.0 + i, "vllm:num_preemptions_total": 10.0 * index + i},
                    )
                    for i in range(4)
                ),
            )
        )
    return dataclasses.replace(full(device=False), cell=cell, repetitions=tuple(repetitions), **fields)


CLOSED = Cell(
    model="fake:x", backend="openai", url="http://h", concurrency=4, prompt_tokens=8, output_tokens=5, slo_ttft_ms=25.0,
    slo_tpot_ms=5.0,
)  # fmt: skip
STREAM = Cell(
    model="fake:x", backend="fake", batching="static", batch_size=4, request_rate=9.0, prompt_tokens=8, output_tokens=5
)


def results() -> dict[str, RunResult]:
    """One result of each kind."""
    closed = loaded(CLOSED)
    return {
        "offline": full(),
        "quantized": full(8.0, quant="int4"),
        "host only": made(quant="int8", step=12.0),
        "closed loop": closed,
        "ramp": loaded(dataclasses.replace(CLOSED, request_rate=100.0, ramp_to=300.0, requests=60)),
        "chunks": dataclasses.replace(closed, repetitions=tuple(map(_in_chunks, closed.repetitions))),
        "stream": loaded(STREAM),
        "turns": made(same_replies=(True, False)),
        "failed": made(factors=(), outcome="oom", failure=Failure("load", "no memory")),
    }


def _in_chunks(repetition: Repetition) -> Repetition:
    requests = tuple(dataclasses.replace(request, tokens=10) for request in repetition.requests)
    return dataclasses.replace(repetition, requests=requests)


def told(result: RunResult) -> dict[str, Any]:
    """Everything that is derived from one result."""
    metrics = summarize(result)
    verdict = judge(result, metrics)
    return {
        "metrics": [list(item) for item in metrics.items()],
        "series": [[point.key, point.step, point.value] for point in series(result)],
        "statistics": list(statistics_cells(result)),
        "description": summary_markdown(result, metrics, verdict),
        "report": report_markdown(result, metrics, verdict),
    }


def everything() -> Any:
    """All figures of all results, and of those that are compared, as plain JSON data."""
    found = results()
    rows = [row_of(result) for name, result in found.items()]
    pair, host = [found["offline"], found["quantized"]], found["host only"]
    overhead = added(host, found["closed loop"])
    rows[3] = with_figures(rows[3], overhead)
    verdict = judge(pair[1], summarize(pair[1]))
    deployed = deployment_of(pair[1], summarize(pair[1]), Evidence("r", "s", verdict, "known"))
    comparison, allowed = compare(*pair), dict.fromkeys(sorted(gate.parse_limits(LIMITS)), 0.02)
    tables = {}
    for group in ([*rows[:3]], [rows[3], rows[5]], [rows[6]]):
        table = cells_table(group, ["quant"])
        tables[group[0].cell.scenario] = [
            format_table(group, ["quant"]), table.heading, table.body, sorted(table.best), headline(group, ["quant"])
        ]  # fmt: skip
    chosen = [
        recommend.recommend([*pair, full(9.0, quant="fp4")], goal, accept_suspect="known")
        for goal in ("throughput", "latency", "cost", "energy")
    ]
    gates = [gate.decide(*order, accept_suspect="known") for order in (pair, pair[::-1])]
    gates.append(gate.decide(*pair, allowed, accept_suspect="known"))
    data = {
        "results": {name: told(result) for name, result in found.items()},
        "tables": tables,
        "overhead": [list(overhead.items()), sentence("x", overhead)],
        "limits": allowed,
        "tags": list(version_tags(deployed).items()),
        "export": export(
            {**deployed.config, "backend": "transformers", "source": "hub", "quant": "none", "location": "o/x"},
            uri="models:/x/1",
            target="vllm",
        ),
        "comparison": [comparison_cells(comparison), comparison_json(comparison)],
        "gates": [[gate_json(one), gate_markdown(one, "a", "b")] for one in gates],
        "recommendations": [[recommendation_json(one), recommendation_markdown(one)] for one in chosen],
    }
    return json.loads(json.dumps(data, default=dataclasses.asdict))


LIMITS = "throughput=1%,ttft=1%,itl=1%,tpot=1%,e2e=1%,memory=1%,weights=1%,load=1%,perplexity=1%,kl=1%,top1=1%"


def alike(found: Any, stored: Any, place: str = "") -> None:
    """Compare plain data; floats may differ in the last digits, the order of entries may not."""
    if isinstance(stored, dict):
        assert list(found) == list(stored), place
        for key, value in stored.items():
            alike(found[key], value, f"{place}/{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), place
        for number, value in enumerate(stored):
            alike(found[number], value, f"{place}/{number}")
    elif isinstance(stored, float):
        assert found == pytest.approx(stored, rel=1e-9, abs=1e-12), place
    else:
        assert found == stored, place


def test_figures_tables_and_tags_are_the_stored_ones() -> None:
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    alike(everything(), stored)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(everything(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
