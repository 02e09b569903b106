"""What requests to a server have beside their prompts: headers, fields, sampling, and thinking that is switched off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.backends.openai.backend import OpenAIBackend, joined
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.loadgen.client import Load
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.sweeps.sweep import run
from mlflow_llmbench.tracking.load_results import load_results
from mlflow_llmbench.workflows.reproduce import parameters_again
from mlflow_llmbench.workloads.prompts import load_prompts

from ...measure.test_online import CELL, TWO_USERS, codes, result
from ...null_server import null_server, read_log

MODEL = "null:ttft_ms=5+itl_ms=1"
NONE = ModelFacts("", "none", "", "")
SECRET = "canary-of-the-gateway-77"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with null_server(MODEL) as url:
        yield url


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "LLMBENCH_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GATEWAY", SECRET)


def cell(url: str, script: str = "", **settings: Any) -> Cell:
    asked = {"backend": "openai", "url": url, "model": f"null:ttft_ms=0+itl_ms=0{script}", "output_tokens": 4}
    return Cell(**{name: values[0] for name, values in parse({**asked, **settings}).axes.items()})  # type: ignore[arg-type]


def load(url: str, script: str = "", **settings: Any) -> tuple[OpenAIBackend, dict[str, Any], dict[str, Any]]:
    """Return a backend that has found out what its server accepts, its facts, and the last request that it sent."""
    backend = OpenAIBackend(cell(url, script, **settings), NONE)
    read_log(url)
    try:
        facts = backend.load().facts
        backend.client.ask(backend.body("hello there", 3, "last"))
    finally:
        backend.close()
    return backend, dict(facts), read_log(url)["last"]


def test_fields_and_headers_are_sent_with_the_values_of_the_environment(server: str) -> None:
    fields = {"top_p": 0.9, "user": "of $GATEWAY", "stream_options": {"continuous_usage_stats": True}}
    backend, facts, sent = load(server, extra_body=fields, headers={"X-Key": "$GATEWAY", "user-agent": "mine"})
    assert sent["headers"]["x-key"] == SECRET
    assert sent["headers"]["user-agent"] == "mine"
    assert sent["asked"] == {
        "max_tokens": 3,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "temperature": 0,
        "top_p": 0.9,
        "user": f"of {SECRET}",
        "prompt": "hello there",
    }
    recorded = json.loads(facts["server.request_fields"])
    assert recorded == {
        **{k: v for k, v in sent["asked"].items() if k not in ("max_tokens", "prompt")},
        "user": "of $GATEWAY",
    }
    assert SECRET not in repr(facts) + repr(backend.cell)


def test_a_header_of_the_user_replaces_the_api_key(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai-12345")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    plain = load(server)[2]["headers"]
    assert (plain["authorization"], plain["openai-organization"], plain["openai-project"]) == (
        "Bearer sk-of-openai-12345",
        "org-1",
        "proj-1",
    )
    assert load(server, headers={"authorization": "Token $GATEWAY"})[2]["headers"]["authorization"] == f"Token {SECRET}"
    monkeypatch.setenv("LLMBENCH_API_KEY", "own-key-1234567")  # another server's: OpenAI's names are not told
    assert "openai-organization" not in load(server)[2]["headers"]


def test_a_message_that_repeats_a_header_is_masked(server: str) -> None:
    backend = OpenAIBackend(cell(server, "+status=401", headers={"Authorization": "Bearer $GATEWAY"}), NONE)
    try:
        with pytest.raises(MeasurementError, match=r"the key was Bearer … Check its log, model, headers and endpoint"):
            backend.load()
    finally:
        backend.close()


def test_a_variable_that_is_not_set_is_told_before_anything_is_asked(server: str, tmp_path: Path) -> None:
    for name in ("headers", "extra_body"):
        for where in ({"url": server}, {"url": "none", "launch": "python {port}"}):
            settings = {**where, name: {"X-Key": "$NOT_THERE"}}
            with pytest.raises(UsageError, match=f"{name} refers to the environment variable NOT_THERE, which is not"):
                run(backend="openai", model=MODEL, output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "sent", "fact"),
    [
        ({}, True, "asked"),
        ({"ignore_eos": "true"}, True, "asked"),
        ({"ignore_eos": "false"}, None, "not asked"),
    ],
)
def test_the_end_of_answers_is_asked_for(server: str, settings: dict[str, Any], sent: object, fact: str) -> None:
    _, facts, request = load(server, **settings)
    assert (request["asked"].get("ignore_eos"), facts["server.ignore_eos"]) == (sent, fact)


@pytest.mark.parametrize(
    ("refused", "settings"),
    [
        ("ignore_eos", {"ignore_eos": "true"}),
        ("temperature", {"temperature": 0.7}),
        ("max_tokens", {"max_tokens_field": "max_tokens"}),
        ("top_k", {"extra_body": {"top_k": 20}}),
        ("ignore_eos;max_tokens;top_k", {"extra_body": {"top_k": 20}}),  # the first two can be left out
    ],
)
def test_what_was_asked_for_is_not_left_out(server: str, refused: str, settings: dict[str, Any]) -> None:
    backend = OpenAIBackend(cell(server, f"+refuses={refused}", **settings), NONE)
    try:
        with pytest.raises(
            MeasurementError, match=f"Unsupported parameter: {refused.split(';')[-1]}\\. Check .*{next(iter(settings))}"
        ):
            backend.load()
    finally:
        backend.close()


def test_sampling_and_the_field_of_the_length(server: str) -> None:
    _, facts, sent = load(server, "+refuses=ignore_eos", temperature=0.7, max_tokens_field="max_completion_tokens")
    assert (sent["asked"]["temperature"], sent["asked"]["max_completion_tokens"]) == (0.7, 3)
    assert "max_tokens" not in sent["asked"]
    assert (facts["server.temperature"], facts["server.length_field"]) == (0.7, "max_completion_tokens")
    assert facts["server.ignore_eos"] == "refused"


@pytest.mark.parametrize(
    ("script", "field"),
    [
        ("", "chat_template_kwargs"),  # does not think, and does not refuse the first field
        ("+reasoning=50+quiet=reasoning_effort", "reasoning_effort"),  # ignores the first
        ("+reasoning=50+quiet=thinking+refuses=chat_template_kwargs;reasoning_effort", "thinking"),
        ("+refuses=chat_template_kwargs;reasoning_effort;thinking;reasoning;enable_thinking", "no field"),
    ],
)
def test_thinking_is_switched_off_by_what_the_server_knows(server: str, script: str, field: str) -> None:
    _, facts, sent = load(server, script, endpoint="chat", thinking="off")
    assert facts["server.thinking_off"] == field
    off = {"chat_template_kwargs", "reasoning_effort", "thinking", "reasoning", "enable_thinking"} & set(sent["asked"])
    assert off == ({field} if field != "no field" else set())


def test_a_model_that_thinks_all_the_same_is_told(server: str) -> None:
    backend = OpenAIBackend(cell(server, "+reasoning=50+refuses=thinking", endpoint="chat", thinking="off"), NONE)
    try:
        with pytest.raises(
            MeasurementError,
            match=r"still thinks \(chat_template_kwargs ignored, reasoning_effort ignored, thinking refused, .* extra",
        ):
            backend.load()
    finally:
        backend.close()


def test_fields_of_one_object_are_joined() -> None:
    assert joined({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": {"z": 1}}) == {
        "a": {"x": 1, "y": 3},
        "b": 1,
        "c": {"z": 1},
    }


def test_several_client_processes_send_the_same(server: str) -> None:
    asked = cell(server, extra_body={"top_p": 0.9}, headers={"X-Key": "$GATEWAY"}, endpoint="chat", thinking="off")
    backend = OpenAIBackend(asked, NONE)
    try:
        backend.load()
        read_log(server)
        backend.send(load_prompts("synthetic"), asked, 0, Load(4, 2), processes=2)
    finally:
        backend.close()
    sent = read_log(server).values()
    assert {entry["headers"]["x-key"] for entry in sent} == {SECRET}
    assert [(e["asked"]["top_p"], "chat_template_kwargs" in e["asked"]) for e in sent] == [(0.9, True)] * 4


def test_answers_that_may_end_by_themselves_may_be_shorter() -> None:
    natural = Cell(**{**vars(CELL), "ignore_eos": "false", "output_tokens": 5})
    assert codes(result(*TWO_USERS, cell=natural)) == set()
    longer = result(*TWO_USERS, cell=Cell(**{**vars(natural), "output_tokens": 3}))
    assert codes(longer) == {"length_drift"}
    assert "do not have the requested 3 tokens" in judge(longer, summarize(longer)).reasons[0].sentence


def test_a_run_has_what_was_sent_and_no_secret(server: str, store_uri: str, tmp_path: Path) -> None:
    done = run(
        tracking_uri=store_uri,
        backend="openai",
        url=server,
        model=MODEL,
        headers={"X-Key": "$GATEWAY"},
        extra_body={"top_p": 0.9, "user": "$GATEWAY"},
        repetitions=5,
        warmup=1,
        output_tokens=4,
        prompt_tokens=16,
        requests=12,
    )
    assert done.exit_code == 0
    client = MlflowClient(store_uri)
    [measured] = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    params = measured.data.params
    assert params["headers"] == '{"X-Key": "$GATEWAY"}'
    assert params["extra_body"] == '{"top_p": 0.9, "user": "$GATEWAY"}'
    assert (params["temperature"], params["ignore_eos"], params["max_tokens_field"]) == ("0", "auto", "auto")
    assert json.loads(params["server.request_fields"])["top_p"] == 0.9
    assert not {"thinking", "tls_ca", "proxy"} & params.keys()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    with pytest.raises(
        UsageError, match=r"values of the environment are not sent for a run. If you trust it: llmbench onl"
    ):
        parameters_again(load_results(done.folder)[0], url=server)
