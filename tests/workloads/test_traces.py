"""Recorded requests: the file format, the resulting schedule and lengths, and the whole way to a server and MLflow."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.cells import cell_name
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.workloads.arrivals import arrival_times_ns, request_count
from mlflow_llmbench.workloads.prompts import PromptSet, lengths_of, longest_of
from mlflow_llmbench.workloads.traces import read_trace

from ..null_server import null_server, read_log

MODEL = "null:ttft_ms=5+itl_ms=1"
REQUESTS = ((1000, 20, 4), (1010, 9, 7), (1010.5, 40, 2), (1100, 12, 5))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "day.jsonl"
    lines = [
        json.dumps({"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": [1]})
        for at, prompt, output in REQUESTS
    ]
    file.write_text("\n".join(lines) + "\n\n")
    return file


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server(MODEL) as url:
        yield url


def cell(trace: Path, **settings: object) -> Cell:
    return dataclasses.replace(Cell(url="http://h", backend="openai", trace=str(trace)), **settings)  # type: ignore[arg-type]


def test_times_count_from_the_first_request_and_every_request_has_its_lengths(trace: Path) -> None:
    one = cell(trace)
    assert arrival_times_ns(one, 0) == arrival_times_ns(one, 3) == (0, 10_000_000, 10_500_000, 100_000_000)
    assert [lengths_of(one, number) for number in range(5)] == [(20, 4), (9, 7), (40, 2), (12, 5), (20, 4)]
    assert longest_of(one) == (40, 7)
    assert one.open_loop
    assert cell_name(one, []) == "opt-125m online trace day.jsonl"


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 4), ({"requests": 3}, 3), ({"requests": 9}, 4), ({"duration_s": 0.05}, 3), ({"duration_s": 0.1}, 4)],
)
def test_the_beginning_of_a_trace_is_enough(trace: Path, settings: dict[str, object], count: int) -> None:
    one = cell(trace, **settings)
    assert request_count(one) == count
    assert len(arrival_times_ns(one, 0) or ()) == count


def test_another_content_is_another_workload_and_another_name_is_not(trace: Path, tmp_path: Path) -> None:
    prompts = PromptSet("synthetic")
    first = prompts.digest(cell(trace), None)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(trace.read_bytes())
    assert prompts.digest(cell(copy), None) == first != prompts.digest(Cell(url="http://h"), None)
    trace.write_text(trace.read_text().replace("1100", "1200"))
    os.utime(trace, ns=(1, 1))
    assert prompts.digest(cell(trace), None) != first


def blocks(ids: object) -> str:
    """A line of a trace with these blocks of 700 tokens."""
    return json.dumps({"timestamp": 1, "input_length": 700, "output_length": 2, "hash_ids": ids})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests. Write {"),
        ('{"timestamp": 1, "input_length": 2}', "line 1, is not a request of a trace"),
        ("[1, 2, 3]", "line 1, is not a request of a trace"),
        ("no json", "line 1, is not a request of a trace: no json."),
        (
            '{"timestamp": 5, "input_length": 2, "output_length": 2}\n{"timestamp": 4, "input_length": 2, '
            '"output_length": 2}',
            "line 2, goes back in time",
        ),
        ('{"timestamp": 5, "input_length": 2, "output_length": 0}', "or a length that is no number of tokens from 1"),
        ('{"timestamp": 5, "input_length": 2.5, "output_length": 1}', "or a length that is no number of tokens from 1"),
        ('{"timestamp": -5, "input_length": 2, "output_length": 1}', "has a time that is no number of milliseconds"),
        ('{"timestamp": NaN, "input_length": 2, "output_length": 1}', "has a time that is no number of milliseconds"),
        ('{"timestamp": "1", "input_length": 2, "output_length": 1}', "has a time that is no number of milliseconds"),
        (blocks([1]), "line 1, has 1 hash_ids, and its input_length of 700 tokens is 2 blocks of 512."),
        (blocks([1, 2, 3]), "line 1, has 3 hash_ids, and its input_length of 700 tokens is 2 blocks of 512."),
        (blocks([]), "line 1, has 0 hash_ids"),
        (blocks("12"), "line 1, has hash_ids that are not a list of whole numbers: 12."),
        (blocks([1, "2"]), "line 1, has hash_ids that are not a list of whole numbers"),
        (blocks([1, 2.5]), "line 1, has hash_ids that are not a list of whole numbers"),
        (blocks([True, 2]), "line 1, has hash_ids that are not a list of whole numbers"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_trace(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trace": "missing.jsonl"}, "There is no trace file missing.jsonl."),
        ({"request_rate": "5"}, "and request_rate is given too"),
        ({"concurrency": "5"}, "and concurrency is given too"),
        ({"output_tokens": "5"}, "and output_tokens is given too"),
        ({"workload": "mixed"}, "A trace has its own lengths, and workload=mixed draws them."),
        ({"url": "none", "backend": "fake"}, "trace has a meaning only if a server is measured"),
    ],
)
def test_what_a_trace_replaces_is_not_given_too(trace: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({"url": "http://h", "backend": "openai", "trace": str(trace)} | given)
    assert message in str(caught.value)


def test_a_trace_is_replayed_into_mlflow(server: str, trace: Path, store_uri: str) -> None:
    read_log(server)
    arguments = [
        "online",
        "--url",
        server,
        "--model",
        MODEL,
        "--trace",
        str(trace),
        *"--repetitions 5 --warmup 1 --tracking-uri".split(),
        store_uri,
    ]
    assert main(arguments) == 0
    client = MlflowClient(store_uri)
    [run] = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    params, metrics = run.data.params, run.data.metrics
    assert params["trace"] == str(trace)
    assert not {"prompt_tokens", "output_tokens"} & set(params)
    assert not {"settings/concurrency", "settings/request_rate"} & set(metrics)
    assert metrics["settings/output_tokens"] == metrics["lengths/output_tokens_mean"] == 4.5
    assert metrics["lengths/prompt_tokens_mean"] == pytest.approx(20.25)
    assert "length_drift" not in run.data.tags.get("llmbench.verdict_reasons", "")
    assert "client/send_delay_ms_p50" in metrics
    asked = [entry["asked"]["max_tokens"] for entry in read_log(server).values()]
    assert set(asked) == {1, 2, 4, 5, 7}  # 1 is a probe's
