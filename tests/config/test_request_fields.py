"""Parameters that add to requests: what is accepted, what is recorded, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.comparability import differences
from mlflow_llmbench.config.cells import config_hash, expand_cells, group_cells
from mlflow_llmbench.config.request_fields import variables_of
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import Hashes, ModelFacts, RunResult

SERVER = {"backend": "openai", "url": "http://127.0.0.1:8000", "model": "m"}
MODEL = ModelFacts("m", "none", "", "")


def cell(**settings: Any) -> Cell:
    [found] = expand_cells(parse({**SERVER, **settings}))
    return found


def test_fields_come_as_json_from_python_or_from_a_file(tmp_path: Path) -> None:
    fields = {"top_p": 0.9, "stop": ["a, b", "$END"], "chat_template_kwargs": {"enable_thinking": False}}
    file = tmp_path / "body.json"
    file.write_text(json.dumps(fields, indent=2))
    assert cell(extra_body=fields) == cell(extra_body=json.dumps(fields)) == cell(extra_body=str(file))
    found = cell(extra_body=str(file)).extra_body
    assert json.loads(found or "") == fields
    assert cell(extra_body=found).extra_body == found  # as config.yaml has it
    assert variables_of(found, '{"X-Key": "$A", "Y": "${B}$A"}', None) == ["END", "A", "B"]


def test_headers_hold_references_and_no_keys() -> None:
    given = {"Authorization": "Bearer $GATEWAY_KEY", "X-Team": "blue", "X-Priority": 3}
    assert json.loads(cell(headers=given).headers or "") == {**given, "X-Priority": "3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extra_body": '{"top_p": 0.9'}, "Cannot read extra_body: it is not JSON"),
        ({"extra_body": "missing.json"}, "Cannot read extra_body=missing.json: No such file or directory. Give JSON"),
        ({"extra_body": "{}"}, "extra_body is empty. Leave it out"),
        ({"extra_body": '{"a": 1, "b": {"c": 1, "c": 2}}'}, "Cannot read extra_body: 'c' stands in it twice"),
        ({"extra_body": '{"a": NaN}'}, "extra_body has a number that JSON cannot hold"),
        ({"extra_body": {"a": {1, 2}}}, "extra_body cannot be written as JSON"),
        ({"extra_body": {"a": "x y " * 2000}}, "extra_body has a value of 8,009 characters"),
        ({"extra_body": {"max_tokens": 5}}, "extra_body sets max_tokens, which has another place: give output_tokens"),
        ({"extra_body": {"stream": False}}, "extra_body sets stream, which has another place: every request streams"),
        ({"extra_body": {"user": "sk-abcdefgh12345678"}}, "what looks like a secret in user, and it would be recorded"),
        ({"extra_body": {"a": [{"api_key": "hunter2!"}]}}, "what looks like a secret in api_key"),
        ({"extra_body": {"sk-abcdefgh12345678": 1}}, "what looks like a secret in it"),
        ({"headers": {"X-Key": "hunter2"}}, "headers has what looks like a secret in X-Key"),
        ({"headers": {"Authorization": "Basic $USER but also a password"}}, "a secret in Authorization"),
        ({"headers": {"X-Team": "Ab3" * 8}}, "what looks like a secret in X-Team.* such as \\$GATEWAY_KEY"),
        ({"headers": {"X Team": "a"}}, "a name or a value that no HTTP header can hold: X Team"),
        ({"headers": {"X-Team": "a\r\nHost: b"}}, "a name or a value that no HTTP header can hold: X-Team"),
        ({"headers": {"X-Team": ["a"]}}, "headers has no text for X-Team"),
        ({"headers": {"Content-Length": "3"}}, "headers sets Content-Length, which the client sets itself"),
        ({"headers": {"X-Team": "a", "x-team": "b"}}, "headers sets x-team more than once, in other capitals"),
        ({"headers": '{"X-Priority": 1e999}'}, "headers has no text for X-Priority"),
        ({"headers": '{"X-Priority": NaN}'}, "headers has no text for X-Priority"),
        ({"headers": {"Proxy-Authorization": "Basic $LOGIN"}}, "headers sets Proxy-Authorization, which the client"),
        ({"headers": '["a"]'}, "Cannot read headers"),
        ({"thinking": "off"}, "thinking=off is for endpoint=chat"),
        ({"tls_ca": __file__}, "tls_ca is for a server behind https, and url is http://127.0.0.1:8000"),
        ({"url": "https://h", "tls_key": __file__}, "tls_key is the key of a certificate, and none is given"),
        ({"url": "https://h", "tls_ca": "none.pem"}, "There is no file none.pem. Give tls_ca a PEM file"),
        ({"url": "none", "launch": "s {port}", "proxy": "environment"}, "proxy=environment is for a server elsewhere"),
        ({"temperature": "-1"}, "temperature is too small"),
        ({"ignore_eos": "maybe"}, "Unknown ignore_eos: maybe"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as told:
        cell(**settings)
    assert "\n" not in str(told.value)
    assert not any(secret in str(told.value) for secret in ("sk-abc", "hunter2", "Ab3Ab3"))


def test_a_model_in_this_process_has_no_requests() -> None:
    with pytest.raises(UsageError, match="extra_body has a meaning only if a server is measured"):
        parse({"extra_body": '{"a": 1}'})


OTHERS: dict[str, Any] = {
    "temperature": 0.7,
    "ignore_eos": "false",
    "max_tokens_field": "max_tokens",
    "extra_body": {"top_p": 0.5},
    "headers": {"X-Team": "a"},
    "proxy": "environment",
}


@pytest.mark.parametrize("name", [*OTHERS, "thinking"])
def test_requests_are_part_of_the_identity_and_of_the_load(name: str) -> None:
    plain, other = cell(endpoint="chat"), cell(endpoint="chat", **{name: OTHERS.get(name, "off")})
    assert config_hash(plain, MODEL) != config_hash(other, MODEL)
    assert len(group_cells([plain, other])) == 2


def test_defaults_leave_the_identity_of_earlier_results() -> None:
    """Computed by the version before these parameters."""
    assert config_hash(cell(), MODEL) == "d88cb030cbb0f8be"


def test_certificates_are_no_part_of_the_identity(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.touch()
    assert config_hash(cell(url="https://h"), MODEL) == config_hash(cell(url="https://h", tls_ca=str(file)), MODEL)


def test_other_answers_are_another_workload() -> None:
    def result(**settings: Any) -> RunResult:
        return RunResult(cell(endpoint="chat", **settings), "ok", 0, 1, Hashes("c", "w", "h", "s", "e"), MODEL, {})

    found = differences(
        result(), result(temperature=0.7, thinking="off", extra_body={"top_p": 1}, headers={"X-A": "b"})
    )
    assert [str(difference) for difference in found] == [
        "temperature 0 → 0.7",
        "thinking auto → off",
        'extra_body none → {"top_p": 1}',
        'headers none → {"X-A": "b"}',
    ]
    assert {difference.kind for difference in found} == {"workload"}
    assert differences(result(temperature=1), result(temperature=1)) == []
