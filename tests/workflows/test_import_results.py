"""Results of other programs: translated keys, kept names and why, and the runs made from them."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from mlflow_llmbench.analysis.other_tools import Foreign, read_foreign
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records import reading
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.metrics import KEYS

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "foreign"
FILES = sorted(GOLDEN.glob("*.json"))


def load(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def read(name: str) -> list[Foreign]:
    return read_foreign(load(name))


def test_vllm_in_a_closed_loop_with_single_requests() -> None:
    [found] = read("vllm_serve_detailed")
    assert (found.source, found.name) == ("vllm bench serve", "meta-llama/Llama-3.2-1B c2")
    assert found.metrics == {
        "latency/ttft_ms_mean": 21.0,
        "latency/ttft_ms_p50": 20.0,
        "latency/e2e_ms_mean": 42.3333,
        "latency/e2e_ms_p50": 41.3333,
        "latency/tpot_ms_mean": 10.6667,
        "latency/tpot_ms_p50": 9.6667,
        "latency/itl_ms_mean": 10.6667,
        "latency/itl_ms_p50": 9.6667,
        "window/full_output_tokens_per_s": 3.6,
        "window/full_requests_per_s": 1.2,
        "errors/failed_ratio": 0.25,
        "settings/concurrency": 2.0,
    }
    assert found.own["vllm/p99_ttft_ms"] == 30.0  # three requests support no p99
    assert "vllm/request_goodput" not in found.own  # absent is absent
    assert found.params["request_rate"] == "inf" and "ttfts" not in found.params


def test_chunks_of_several_tokens_are_no_inter_token_latency() -> None:
    data = load("vllm_serve_detailed")
    bundled = {**data, "output_lens": [6, 3, 3, 0]}
    [found] = read_foreign(bundled)
    assert "latency/itl_ms_mean" not in found.metrics and found.own["vllm/mean_itl_ms"] == 10.6667
    assert found.metrics["latency/tpot_ms_mean"] == 10.6667


def test_a_zero_that_stands_for_no_value_is_absent() -> None:
    data = load("vllm_serve_detailed")
    none = {name: 0.0 for name in data if name.endswith(("_tpot_ms", "_itl_ms"))}
    [found] = read_foreign({**data, **none, "output_lens": [1, 1, 1, 0], "itls": [[], [], [], []]})
    assert not [key for key in {**found.metrics, **found.own} if "tpot" in key or "itl" in key]
    assert found.metrics["latency/ttft_ms_mean"] == 21.0
    report = load("guidellm_benchmarks")
    first = report["benchmarks"][0]["metrics"]["time_to_first_token_ms"]["successful"]
    first.update(
        {name: 0 for name, value in first.items() if isinstance(value, int | float)},
        percentiles=dict.fromkeys(first["percentiles"], 0.0),
    )
    [concurrent, _] = read_foreign(report)
    assert not [key for key in {**concurrent.metrics, **concurrent.own} if "first_token" in key or "ttft" in key]


def test_latencies_of_an_open_loop_are_counted_from_another_time() -> None:
    [found] = read("vllm_serve_open_loop")
    assert set(found.metrics) == {"latency/tpot_ms_mean", "latency/tpot_ms_p50", "errors/failed_ratio"}
    assert found.own["vllm/mean_ttft_ms"] == 21.0 and found.own["vllm/output_throughput"] == 3.6
    assert found.metrics["errors/failed_ratio"] == 0.0
    [burst] = read_foreign({**load("vllm_serve_open_loop"), "request_rate": "inf"})
    assert set(burst.metrics) == set(found.metrics) and burst.name == "meta-llama/Llama-3.2-1B inf/s"
    [closed] = read_foreign({**load("vllm_serve_open_loop"), "request_rate": "inf", "max_concurrency": 4})
    assert closed.metrics["latency/ttft_ms_p99"] == 30.0  # 400 requests do support it


def test_of_guidellm_only_the_mean_time_to_first_token_is_ours() -> None:
    concurrent, poisson = read("guidellm_benchmarks")
    assert (concurrent.name, concurrent.version, poisson.name) == ("concurrent 4", "0.8.1", "poisson 2.0")
    assert concurrent.metrics == {"latency/ttft_ms_mean": 30.0, "settings/concurrency": 4.0}
    assert poisson.metrics == {}
    for found in (concurrent, poisson):  # weighted by tokens, and with the first token counted in
        assert (
            found.own["guidellm/inter_token_latency_ms_mean"] == 11.0
            and found.own["guidellm/time_per_output_token_ms_mean"] == 12.0
        )
        assert found.own["guidellm/time_to_first_token_ms_p99"] == 32.0
    assert (
        "guidellm/time_to_first_token_ms_mean" not in concurrent.own
        and poisson.own["guidellm/time_to_first_token_ms_mean"] == 30.0
    )


def test_aiperfs_inter_token_latency_is_our_time_per_output_token() -> None:
    [found] = read("aiperf_profile_export")
    assert (found.source, found.version, found.name) == ("aiperf", "0.13.0", "aiperf concurrency 8")
    assert found.metrics == {
        "latency/ttft_ms_mean": 40.0,
        "latency/ttft_ms_p50": 40.0,
        "latency/ttft_ms_p95": 41.5,
        "latency/e2e_ms_mean": 500.0,
        "latency/e2e_ms_p50": 500.0,
        "latency/e2e_ms_p95": 501.5,
        "latency/tpot_ms_mean": 9.0,
        "latency/tpot_ms_p50": 9.0,
        "latency/tpot_ms_p95": 10.5,
        "errors/failed_ratio": 0.0,
        "settings/concurrency": 8.0,
    }
    assert found.own["aiperf/time_to_first_token_p99"] == 42.0  # 100 requests support no p99
    assert found.own["aiperf/output_token_throughput_avg"] == 700.0


def test_aiperfs_percentiles_count_failed_requests_and_its_open_loops_another_time() -> None:
    data = load("aiperf_profile_export")
    [failed] = read_foreign({**data, "error_request_count": {"unit": "requests", "avg": 25.0}})
    assert "latency/ttft_ms_p50" not in failed.metrics and failed.metrics["latency/ttft_ms_mean"] == 40.0
    assert failed.metrics["errors/failed_ratio"] == 0.2
    [broken] = read_foreign({**data, "is_complete": False, "incomplete_reason": "records stalled"})
    [stopped] = read_foreign({**data, "was_cancelled": True})
    for part in (broken, stopped):
        assert (
            not [key for key in part.metrics if key.startswith("latency/")]
            and part.own["aiperf/time_to_first_token_avg"] == 40.0
        )
    assert (broken.params["is_complete"], broken.params["incomplete_reason"]) == ("False", "records stalled")
    data["input_config"]["phases"][1] |= {"type": "poisson"}
    [opened] = read_foreign(data)
    assert "latency/ttft_ms_mean" not in opened.metrics and opened.metrics["latency/tpot_ms_mean"] == 9.0


def test_llama_bench_and_optimum_benchmark_keep_their_own_names() -> None:
    prompt, output = read("llama_bench")
    assert (prompt.name, output.name) == ("gemma3 270M Q4_K - Medium pp512", "gemma3 270M Q4_K - Medium tg128")
    assert prompt.metrics == {"memory/weight_gb": 0.246012416, "settings/prompt_tokens": 512.0}
    assert output.own["llama-bench/avg_ts"] == 64.0 and output.metrics["settings/output_tokens"] == 128.0
    assert output.params["n_threads"] == "2" and "samples_ns" not in output.params
    [deep, _] = read_foreign([{**row, "n_depth": 512} for row in load("llama_bench")])
    assert deep.name == "gemma3 270M Q4_K - Medium pp512 @ d512"
    [optimum] = read("optimum_benchmark")
    assert optimum.metrics == {"settings/batch_size": 2.0, "settings/prompt_tokens": 16.0}
    assert (
        optimum.own["optimum-benchmark/decode.throughput.value"] == 320.0
        and optimum.own["optimum-benchmark/prefill.memory.max_ram"] == 1200.5
    )
    assert optimum.version == "0.6.0" and optimum.params["backend.model"] == "openai-community/gpt2"
    [bare] = read_foreign(load("optimum_benchmark")["report"])  # benchmark_report.json alone
    assert bare.metrics == {} and bare.own == optimum.own


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_translation_is_a_key_of_ours_and_every_own_name_is_not(file: Path) -> None:
    for found in read_foreign(json.loads(file.read_text())):
        assert set(found.metrics) <= set(KEYS)
        assert found.own and not set(found.own) & set(KEYS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {},
            "It is not a result of a known program. "
            "Give the JSON of vllm bench serve, guidellm, aiperf, llama-bench, optimum-benchmark.",
        ),
        ([], "It is not a result of a known program."),
        ("text", "It is not a result of a known program."),
        ({"metadata": {}, "benchmarks": []}, "It is a result of guidellm without any measurement."),
        (
            {"metadata": {}, "benchmarks": [{"config": {}}]},
            "It looks like a result of guidellm, and cannot be read: KeyError: 'metrics'. "
            "Check that the file is complete.",
        ),
        (
            {"model_id": "m", "duration": 1, "completed": None, "request_throughput": 1},
            "It looks like a result of vllm bench serve, and cannot be read: TypeError",
        ),
    ],
)
def test_what_is_no_result_is_told(data: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_foreign(data)
    assert str(caught.value).startswith(message)


# The command


def test_files_become_runs_once(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(GOLDEN / "guidellm_benchmarks.json"), str(GOLDEN / "vllm_serve_detailed.json")]
    assert main(["import", *files, "--json"]) == 0
    out = capsys.readouterr().out
    assert f"{files[0]}: 2 measurements of guidellm, 2 of them new." in out
    told = json.loads(out.splitlines()[-1])
    client = MlflowClient(store_uri)
    run = client.get_run(told[2]["run_id"])
    assert run.info.status == "FINISHED" and run.info.run_name == "meta-llama/Llama-3.2-1B c2"
    assert run.data.metrics["latency/ttft_ms_mean"] == 21.0 and run.data.metrics["vllm/p99_ttft_ms"] == 30.0
    tags = run.data.tags
    assert (tags["llmbench.source"], tags["llmbench.tokens_by"]) == (
        "vllm bench serve",
        "the server, or the client's tokenizer",
    )
    assert "latency/ttft_ms_mean" in tags["llmbench.translated"]
    assert not {"llmbench.outcome", "llmbench.verdict", "llmbench.hardware_hash", "llmbench.sweep"} & tags.keys()
    assert [item.path for item in client.list_artifacts(told[2]["run_id"], "imported")] == [
        "imported/vllm_serve_detailed.json"
    ]
    assert main(["import", *files, "--json"]) == 0
    again = capsys.readouterr().out
    assert "0 of them new" in again
    assert [one["run_id"] for one in json.loads(again.splitlines()[-1])] == [one["run_id"] for one in told]


def test_json_lines_of_llama_bench_are_read_too(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llama.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in load("llama_bench")))
    assert main(["import", str(file)]) == 0
    assert "2 measurements of llama-bench, 2 of them new." in capsys.readouterr().out


def test_nothing_is_concluded_from_an_imported_run(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(GOLDEN / "vllm_serve_detailed.json"), "--json"]) == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])[0]["run_id"]
    for command in (["compare", run_id, run_id], ["recommend", run_id], ["reproduce", run_id]):
        assert main(command) == 2
        assert (
            f"The run {run_id} was imported from vllm bench serve: it has neither raw stamps nor the fingerprint"
            in capsys.readouterr().err
        )
    assert main(["register", run_id, "--name", "bot"]) == 2


def test_secrets_in_a_file_are_masked(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_" + "a1B2" * 9
    file = tmp_path / "result.json"
    file.write_text(
        json.dumps({**load("vllm_serve_detailed"), "label": f"token {secret}", "generated_texts": [f"Bearer {secret}"]})
    )
    assert main(["import", str(file), "--json"]) == 0
    run_id = json.loads(capsys.readouterr().out.splitlines()[-1])[0]["run_id"]
    client = MlflowClient(store_uri)
    kept = Path(client.download_artifacts(run_id, "imported/result.json", str(tmp_path))).read_text()
    assert secret not in kept + json.dumps(client.get_run(run_id).data.params) and "***" in kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Cannot read file.json: No such file or directory."),
        ("{", "Cannot read file.json: it is not JSON: "),
        ('{"a": 1}', "Cannot import file.json. It is not a result of a known program."),
    ],
)
def test_wrong_files_are_one_line(
    content: str | None, message: str, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path("file.json").write_text(content)
    assert main(["import", "file.json"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llmbench: {message}") and len(error.splitlines()) == 1


def broken(value: object, path: list[int], other: object) -> object:
    """Return a copy of JSON data with one value replaced: the one that the numbers lead to."""
    if not path or not isinstance(value, dict | list) or not value:
        return other
    if isinstance(value, list):
        here = path[0] % len(value)
        return [broken(one, path[1:], other) if number == here else one for number, one in enumerate(value)]
    name = sorted(value)[path[0] % len(value)]
    return {**value, name: broken(value[name], path[1:], other)}


other_values = st.sampled_from(
    [None, [], {}, "x", "", True, -1, 0, 10**400, 10**299, 1.5, float("nan"), [None], [[]], {"a": []}]
)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(FILES), st.lists(st.integers(0, 50), max_size=5), other_values)
def test_fuzz_a_result_with_a_wrong_value_is_read_or_refused(file: Path, path: list[int], other: object) -> None:
    with contextlib.suppress(UsageError, reading.Unreadable):  # whose message is one line in any case
        content = json.dumps(broken(content_of(file), path, other))
        for found in read_foreign(reading.parse_json(content)):
            assert all(math.isfinite(value) for value in (*found.metrics.values(), *found.own.values()))
            assert all(isinstance(value, str) for value in (found.source, found.version, found.name))


@functools.cache
def content_of(file: Path) -> object:
    return json.loads(file.read_text())
