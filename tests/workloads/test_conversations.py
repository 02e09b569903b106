"""Files of conversations: of users, and of agents with tools and times to think."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.workloads.conversations import parse_conversation
from mlflow_llmbench.workloads.prompts import load_prompts, require_conversations

CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"order": 7}'}}
OTHER = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
AGENT: list[dict[str, Any]] = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, OTHER]},
    {"role": "tool", "tool_call_id": "c2", "content": "", "delay_ms": 100},
    {"role": "tool", "tool_call_id": "c1", "content": "It left.", "delay_ms": 250.5},
    {"role": "assistant", "content": "It left."},
    {"role": "user", "content": "Thanks.", "delay_ms": 3000},
]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_turns_end_at_answers_and_have_their_delays() -> None:
    found, text = parse_conversation({"messages": AGENT, "tools": [TOOL]}, "f")
    assert [[m["role"] for m in turn.messages] for turn in found.turns] == [
        ["system", "user"],
        ["tool", "tool"],
        ["user"],
    ]
    assert [turn.delay_ms for turn in found.turns] == [0, 350.5, 3000]
    assert [turn.answer for turn in found.turns] == [AGENT[2], None, None]
    assert not any("delay_ms" in message for turn in found.turns for message in turn.messages)
    assert found.tools == (TOOL,) and not found.is_plain
    assert text.startswith("System: You help.\nUser: Where is it?\nAssistant: {")
    assert text.endswith("Tool: It left.\nAssistant: It left.\nUser: Thanks.\nAssistant:")


def test_images_are_parts_of_a_users_content() -> None:
    shown = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}
    found, text = parse_conversation({"messages": [shown]}, "f")
    assert found.turns[0].messages == (shown,) and not found.is_plain
    assert text == "User: What is it?\nAssistant:"


def test_everything_that_is_sent_and_when_is_part_of_the_workload(tmp_path: Path) -> None:
    def digest(**line: Any) -> str:
        file = tmp_path / "f.jsonl"
        file.write_text(json.dumps(line))
        return load_prompts(str(file)).digest(Cell(history="sent", prompt_tokens=None), None)

    later = [*AGENT[:-1], {**AGENT[-1], "delay_ms": 4000}]
    other_call = [*AGENT[:2], {**AGENT[2], "tool_calls": [CALL, {**OTHER, "function": {}}]}, *AGENT[3:]]
    every = [digest(messages=m, tools=t) for m in (AGENT, later, other_call) for t in ([], [TOOL])]
    assert len(set(every)) == 6
    # As before there were agents.
    assert digest(messages=[USER, ANSWER, USER]) == "9114c5b8b57f2c4a"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "judge", "content": "a"}], "have no role that is known in message 1: judge."),
        ([USER, USER], "have user at message 2, where only assistant can be."),
        ([USER, {"role": "system", "content": "a"}], "have system at message 2, where only assistant can be."),
        ([{"role": "tool", "content": "a"}], "have tool at message 1, where only system or user can be."),
        ([USER, ANSWER, {"role": "tool", "content": "a"}], "have tool at message 3, where only user can be."),
        ([USER, ANSWER], "end with an answer"),
        ([*AGENT[:3], USER], "have user at message 4, where only tool can be."),
        (AGENT[:4], "have no tool that answers the call c1."),
        ([*AGENT[:3], {**AGENT[3], "tool_call_id": "c9"}], "have a tool at message 4 whose tool_call_id is none of"),
        ([USER, {**ANSWER, "tool_calls": [{"type": "function"}]}, USER], "have tool_calls in message 2 that are not"),
        ([USER, {**ANSWER, "tool_calls": [CALL, CALL]}, USER], "have tool_calls in message 2 that are not"),
        ([{"role": "user", "content": [{"type": "text"}]}], "have no text in message 1"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "have no text in message 1"),
        ([{"role": "user", "content": []}], "have no text in message 1"),
        ([USER, {"role": "assistant", "content": None}, USER], "have no text in message 2: None."),
        (["a"], "have no role that is known in message 1: None."),
    ],
)
def test_what_a_chat_endpoint_would_refuse_is_one_clear_line(messages: list[Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conversation({"messages": messages}, "talks.jsonl, line 3")
    assert str(caught.value).startswith('talks.jsonl, line 3: "messages" are not a conversation: they ')
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [USER, ANSWER, {**USER, "delay_ms": -1}]}, "f, message 3, has a delay_ms that is no number of"),
        ({"messages": [USER, ANSWER, {**USER, "delay_ms": "5"}]}, "f, message 3, has a delay_ms that is no number of"),
        ({"messages": [USER, ANSWER, {**USER, "delay_ms": True}]}, "f, message 3, has a delay_ms that is no number of"),
        ({"messages": [{**USER, "delay_ms": 5}]}, "f, message 1, has a delay_ms and is of the first turn"),
        ({"messages": [USER, {**ANSWER, "delay_ms": 5}, USER]}, "f, message 2, has a delay_ms and is of an answer"),
        ({"messages": [USER], "tools": {"a": 1}}, 'f: "tools" is not a list of objects'),
        ({"messages": [USER], "tools": ["search"]}, 'f: "tools" is not a list of objects'),
    ],
)
def test_delays_and_tools_are_checked(line: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conversation(line, "f")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [AGENT, [USER, ANSWER, {**USER, "delay_ms": 5}], AGENT[:2]])
def test_agents_are_measured_behind_a_server_only(tmp_path: Path, messages: list[Any]) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    prompts = load_prompts(str(file))
    for history in ("recomputed", "kept"):
        with pytest.raises(UsageError, match="Measure it behind a server, with history=sent"):
            require_conversations(Cell(history=history, workload="f.jsonl"), prompts)
    require_conversations(Cell(history="sent", workload="f.jsonl"), prompts)
