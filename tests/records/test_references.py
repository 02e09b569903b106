"""References to environment variables in parameters, and how redaction treats them."""

from __future__ import annotations

import json

import pytest

from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.redaction import looks_secret, redact
from mlflow_llmbench.records.references import in_texts, names_in, resolved, without


def test_references_are_names_in_capitals() -> None:
    text = "Bearer $GATEWAY_KEY, ${TEAM_2}x, $$PRICE, $lower, $, ${a}"
    assert names_in(text) == ["GATEWAY_KEY", "TEAM_2"]
    assert without(text) == "Bearer , x, PRICE, $lower, $, ${a}"
    environment = {"GATEWAY_KEY": "abcdefgh-12345678\n", "TEAM_2": "blue"}
    assert resolved("headers", text, environment) == "Bearer abcdefgh-12345678, bluex, $PRICE, $lower, $, ${a}"


def test_a_value_that_was_read_is_masked_whatever_its_name() -> None:
    assert resolved("headers", "$GATEWAY", {"GATEWAY": "tenant-7f3a-blue"}) == "tenant-7f3a-blue"
    assert redact("The gateway says: tenant-7f3a-blue is not allowed") == "The gateway says: *** is not allowed"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"headers refers to the environment variable KEY, which is not set. Set it, or write \$\$"),
        (" \n", "KEY, which is not set"),
        ("a\nb", "KEY has a character that no HTTP header can hold"),
        ("k\u20ac", "KEY has a character that no HTTP header can hold"),
    ],
)
def test_a_variable_that_cannot_be_sent_is_named(value: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolved("headers", "$KEY", {} if value is None else {"KEY": value})


def test_references_stay_readable_where_a_literal_is_masked() -> None:
    for name in ("X-Api-Key", "Authorization", "Cookie", "password"):
        kept = json.dumps({name: "$GATEWAY_SECRET"})
        assert redact(kept) == kept
        assert redact(json.dumps({name: "${GATEWAY_SECRET}"})) == json.dumps({name: "${GATEWAY_SECRET}"})
        for literal in ("$gateway-secret1", "$GATEWAY_SECRETx9", "hunter22hunter"):
            assert literal not in redact(json.dumps({name: literal}))


def test_texts_of_json_are_changed_and_names_stay() -> None:
    data = {"a": ["x", 1, {"x": "x"}], "n": None, "t": True}
    assert in_texts(data, lambda text: text * 2) == {"a": ["xx", 1, {"x": "xx"}], "n": None, "t": True}


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("sk-proj-abcdefgh12345678", True),
        ("Ab3" * 8, True),
        ("ab3" * 8, False),  # a digest has one case
        ("https://user:hunter2@example.org", True),
        ("Qwen2.5-0.5B-Instruct-GPTQ-Int4", False),
    ],
)
def test_what_looks_like_a_key(text: str, secret: bool) -> None:
    assert looks_secret(text) is secret
