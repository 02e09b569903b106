"""Conversations measured turn by turn, with the history recomputed and with it kept."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.analysis import efficiency, latency, summary
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.config.cells import config_hash, needs_no_less
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.batch import compare_replies, measure_cell, time_turns
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import CellMeasurements, LoadInfo, ModelFacts, RequestRecord
from mlflow_llmbench.reports.result import report_markdown
from mlflow_llmbench.workloads.conversations import turn_texts
from mlflow_llmbench.workloads.prompts import load_prompts

from ..results import made
from .test_batch import fake

TURNS = [["Hello there.", "And then?", "Is that all of it?"], ["One more.", "Thanks."]]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token if m['role'] == "
    "'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def conversations(tmp_path: Path) -> str:
    def messages(turns: list[str]) -> list[dict[str, str]]:
        spoken = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in (("user", turn), ("assistant", "I see."))
        ]
        return spoken[:-1]

    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": messages(turns)}) + "\n" for turns in TURNS))
    return str(file)


def loaded(folder: Path, **settings: Any) -> TransformersBackend:
    cell = Cell(model=str(folder), device="cpu", output_tokens=12, **settings)
    backend = TransformersBackend(cell, TransformersBackend.resolve(cell))
    backend.load()
    return backend


def measure(backend: Any, workload: str, history: str, **settings: Any) -> tuple[CellMeasurements, Cell]:
    chosen = {"prompt_tokens": None, "output_tokens": 12, "warmup": 1, "repetitions": 2, **settings}
    cell = Cell(workload=workload, history=history, **chosen)
    return measure_cell(backend, cell, load_prompts(workload), 512, lambda *_, **__: None), cell


# Texts and ids


def test_conversations_are_read_with_their_turns_and_as_one_text(conversations: str) -> None:
    prompts = load_prompts(conversations)
    assert [list(one.asks) for one in prompts.conversations] == TURNS
    assert prompts.texts[1] == "User: One more.\nAssistant: I see.\nUser: Thanks.\nAssistant:"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path: Path, messages: Any) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "good"}\n' + json.dumps({"messages": messages}))
    with pytest.raises(UsageError, match='line 2: "messages" are not a conversation: they .* Write a list of'):
        load_prompts(str(file))


def test_a_file_with_prompts_too_has_no_conversations(tmp_path: Path) -> None:
    file = tmp_path / "both.jsonl"
    file.write_text('{"prompt": "good"}\n{"messages": [{"role": "user", "content": "a"}]}')
    prompts = load_prompts(str(file))
    assert (prompts.texts, prompts.conversations) == (("good", "User: a\nAssistant:"), ())


def test_turns_joined_with_the_answers_are_the_text_of_the_template() -> None:
    def render(chat: list[dict[str, str]]) -> str:
        return "".join(f"<{m['role']}>{m['content'].strip()}</>" for m in chat) + "<assistant>"

    parts = turn_texts(TURNS[0], render)
    assert parts == [
        "<user>Hello there.</><assistant>",
        "</><user>And then?</><assistant>",
        "</><user>Is that all of it?</><assistant>",
    ]
    assert turn_texts(TURNS[1], None) == ["User: One more.\nAssistant:", "\nUser: Thanks.\nAssistant:"]


def test_a_template_that_drops_answers_cannot_keep_a_history() -> None:
    with pytest.raises(UsageError, match="leaves earlier answers out"):
        turn_texts(TURNS[0], lambda chat: chat[-1]["content"])


def test_the_chat_template_of_the_tokenizer_is_used(tiny_model: Path) -> None:
    backend = loaded(tiny_model)
    plain = backend.encode_turns(TURNS[1])
    assert [backend.decode(ids) for ids in plain] == ["User: One more.\nAssistant:", "\nUser: Thanks.\nAssistant:"]
    backend.tokenizer.chat_template = TEMPLATE
    first, second = backend.encode_turns(TURNS[1])
    assert [first[0], second[0]] == [backend.tokenizer.bos_token_id, backend.tokenizer.eos_token_id]
    assert [backend.decode(ids) for ids in (first, second)] == [
        "[user] One more.\n[assistant] ",
        "\n[user] Thanks.\n[assistant] ",
    ]
    backend.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(Exception, match="^TemplateError while applying the chat template: no$"):
        backend.encode_turns(TURNS[1])


# Requests and answers


def test_the_same_tokens_come_out_whether_the_history_is_kept_or_recomputed(
    tiny_model: Path, conversations: str
) -> None:
    backend = loaded(tiny_model)
    found = {}
    for history in ("recomputed", "kept"):
        for batch in (1, 2):
            measured, cell = measure(backend, conversations, history, batch_size=batch)
            found[history, batch] = measured.outputs
            own = measured.repetitions[0].requests
            added = [len(ids) for ids in backend.encode_turns(TURNS[0])]
            prompts = [sum(added[: i + 1]) + 12 * i for i in range(3)]
            assert [r.prompt_tokens for r in own] == prompts
            assert [r.rows for r in own] == [batch] * 3
            held = [0, prompts[0] + 11, prompts[1] + 11]
            assert [r.cached_tokens for r in own] == (held if history == "kept" else [None] * 3)
            assert [len(r.requests) for r in measured.repetitions] == [3, 2]
            assert [r.output_tokens for r in own] == [12] * 3
    assert found["kept", 1] == found["recomputed", 1]
    assert found["kept", 2] == found["recomputed", 2] == found["kept", 1]
    measured, cell = measure(backend, conversations, "kept")
    assert compare_replies(backend, cell, load_prompts(conversations), measured) == (True, True, True)
    prompt, output = measured.outputs[0]
    other = dataclasses.replace(measured, outputs=((prompt, [*output[:-1], output[-1] + 1]),))
    assert compare_replies(backend, cell, load_prompts(conversations), other) == (True, True, False)


def test_only_the_new_turn_is_prefilled_where_the_history_is_kept(tiny_model: Path) -> None:
    backend = loaded(tiny_model)
    seen: list[int] = []
    backend.model.register_forward_hook(
        lambda _, arguments, keywords, output: seen.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    turns = [[[5, 6, 7, 8]], [[9, 10, 11]]]
    time_turns(backend, turns, 3, kept=True)
    assert seen == [4, 1, 1, 1 + 3, 1, 1]  # the last token of an answer was never computed
    seen.clear()
    time_turns(backend, turns, 3)
    assert seen == [4, 1, 1, 4 + 3 + 3, 1, 1]


def test_the_time_of_the_first_token_follows_what_is_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by 1 µs when it is read, and by the time that is slept."""
    now = itertools.count(1000, 1000)
    slept = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(now) + slept[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(slept.pop() + round(seconds * 1e9)))
    found = {}
    for history in ("recomputed", "kept"):
        backend, _ = fake("ttft_ms=1+itl_ms=0+prompt_ms=1")
        measured, _ = measure(backend, "chat", history, output_tokens=4, repetitions=1)
        found[history] = measured.repetitions[0].requests
    for recomputed, kept in zip(found["recomputed"], found["kept"], strict=True):
        assert recomputed.prefilled_tokens == recomputed.prompt_tokens == kept.prompt_tokens
        saved = latency.ttft_ms(recomputed) - latency.ttft_ms(kept)
        assert saved == pytest.approx(kept.cached_tokens, abs=0.1)
    assert (found["kept"][1].cached_tokens or 0) > 20


# Figures


def talks() -> Any:
    """Two conversations of three and two turns, TTFT 10, 20, 30 and 20, 40 ms, 4 tokens, 1 ms apart."""
    ms = 1_000_000

    def request(start: int, first: int, prompt: int, cached: int) -> RequestRecord:
        return RequestRecord(
            start * ms, tuple((start + first + i) * ms for i in range(4)), 1, prompt, cached_tokens=cached
        )

    base = made(factors=(1.0, 1.0))
    first = (request(0, 10, 10, 0), request(20, 20, 30, 13), request(50, 30, 50, 33))
    second = (request(100, 20, 20, 0), request(150, 40, 40, 23))
    repetitions = tuple(
        dataclasses.replace(r, requests=q) for r, q in zip(base.repetitions, (first, second), strict=True)
    )
    cell = dataclasses.replace(base.cell, history="kept", output_tokens=4, prompt_tokens=None, workload="chat")
    return dataclasses.replace(base, cell=cell, repetitions=repetitions, same_replies=(True, True, False))


def test_turns_have_series_and_a_table() -> None:
    result = talks()
    points = {(p.key, p.step): p.value for p in summary.series(result)}
    assert [points["steps/turn_ttft_ms", turn] for turn in (1, 2, 3)] == [15, 30, 30]
    assert [points["steps/turn_e2e_ms", turn] for turn in (1, 2, 3)] == [18, 33, 33]
    assert [points["steps/turn_prompt_tokens", turn] for turn in (1, 2, 3)] == [15, 35, 50]
    assert [points["steps/turn_prefilled_tokens", turn] for turn in (1, 2, 3)] == [15, 17, 17]
    metrics = summary.summarize(result)
    assert metrics["latency/ttft_ms_mean"] == pytest.approx(24)
    assert metrics["throughput/output_tokens_per_s"] == pytest.approx((12 / 0.083 + 8 / 0.093) / 2)
    rates = [(10 / 10 + 17 / 20 + 17 / 30) / 3, (20 / 20 + 17 / 40) / 2]
    assert metrics["throughput/prefill_tokens_per_s"] == pytest.approx(sum(rates) / 2 * 1000)
    assert metrics["trust/same_replies_ratio"] == pytest.approx(2 / 3)
    report = report_markdown(result, metrics, judge(result, metrics))
    assert "| 2 | 2 | 35.0 | 17.0 | 30.0 | 33.0 |" in report
    assert "the same answer, token by token, in 2 of its 3 turns. A prompt computed" in report
    assert "## Turn by turn" not in report_markdown(made(), {}, None)
    unknown = dataclasses.replace(result, same_replies=())
    assert "unknown whether a recomputed history gives the same answers" in report_markdown(unknown, metrics, None)


def test_conversations_of_other_lengths_are_no_noise_and_noise_is() -> None:
    def judged(*pace: float) -> list[str]:
        ms, repetitions = 1_000_000, []
        for number, factor in enumerate(pace):
            turns = 2 + number % 4
            requests = [
                RequestRecord(
                    i * 500 * ms, tuple(round((i * 500 + 100 * (i + 1) + 10 * factor * k) * ms) for k in range(4)), 1, 9
                )
                for i in range(turns)
            ]
            repetitions.append(dataclasses.replace(made().repetitions[0], index=number, requests=tuple(requests)))
        result = dataclasses.replace(talks(), repetitions=tuple(repetitions))
        metrics = summary.summarize(result)
        assert metrics["trust/cv_ratio"] > 0.1
        return [reason.sentence for reason in judge(result, metrics).reasons if reason.code == "high_variation"]

    assert judged(1.0, 1.01, 0.99, 1.0, 1.02) == []
    [sentence] = judged(1.0, 1.6, 0.8, 1.0, 1.3)
    assert sentence.startswith("The time per output token of the repetitions varies by ")


def test_flops_are_those_of_what_was_computed() -> None:
    load = LoadInfo(1.0, flops_per_token=10.0, head_flops=2.0, attention_flops_per_context_token=1.0)
    whole = dataclasses.replace(talks(), load=load, peaks={"flops_per_s": 1e6})
    tokens = [(0, 13), (13, 33), (33, 53), (0, 23), (23, 43)]  # tokens in the cache before and after
    done = sum((end - held) * (10 + (end + held) / 2) + 4 * 2 for held, end in tokens)
    assert efficiency.model_flops_utilization(whole) == pytest.approx(done / ((13 + 23 + 33 + 23 + 43) / 1e3) / 1e6)


def test_the_history_belongs_to_the_configuration_and_not_to_the_workload() -> None:
    kept, recomputed = (
        Cell(workload="chat", prompt_tokens=None, history=history) for history in ("kept", "recomputed")
    )
    prompts, model = load_prompts("chat"), ModelFacts("m", "folder", "m", "r")
    assert prompts.digest(kept, None) == prompts.digest(recomputed, None)
    assert prompts.digest(kept, None) != prompts.digest(dataclasses.replace(kept, history="none"), None)
    assert config_hash(kept, model) != config_hash(recomputed, model)
    assert not needs_no_less(kept, recomputed)
    assert needs_no_less(kept, recomputed, ignore_shape=True)


# Whole commands


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"history": "both"}, "Unknown history: both."),
        ({"workload": "chat", "history": "kept"}, (
            "history=kept sends each turn of a conversation at its own length. Give prompt_tokens=auto."
        )),
        ({"workload": "qa", "history": "none,kept", "prompt_tokens": "auto"}, (
            "history=kept needs conversations, and workload=qa has none. Use workload=chat"
        )),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_turn_by_turn_is_one_line(
    store_uri: str, parameters: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run(model="fake:", backend="fake", **parameters)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "http://h", "backend": "openai", "history": "kept"}, (
            "history=kept is for a model in this process; a server gets the history with each turn."
        )),
        ({"history": "sent"}, "history=sent is for a server."),
        ({"url": "http://h", "backend": "openai", "history": "none,sent"}, "Give endpoint=chat."),
        ({"url": "http://h", "backend": "openai", "history": "sent", "endpoint": "chat", "request_rate": "2"},
         "history=sent is a closed loop"),
    ],
)  # fmt: skip
def test_a_server_gets_its_history_with_each_turn(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({"workload": "chat", "prompt_tokens": "auto"} | given)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_sweep_over_histories_is_measured_and_logged(tiny_model: Path, conversations: str, store_uri: str) -> None:
    asked = {"prompt_tokens": "auto", "output_tokens": "6", "warmup": "1", "repetitions": "2"}
    done = run(model=str(tiny_model), workload=conversations, history="recomputed,kept", **asked)
    assert done.outcome == "ok", done.table()
    results = {found.cell.history: found for found in map(journal.read_result, done.folder.glob("*/artifacts"))}
    assert results["kept"].same_replies == (True, True, True)
    assert results["recomputed"].same_replies == ()
    assert results["kept"].texts == results["recomputed"].texts
    assert results["kept"].texts[1]["prompt"].startswith("User: One more.\nAssistant:")
    client = MlflowClient(store_uri)
    for run_id in done.run_ids:
        points = client.get_metric_history(run_id, "steps/turn_ttft_ms")
        assert sorted(point.step for point in points) == [1, 2, 3]
    [folder] = [f for f in done.folder.glob("*/artifacts") if journal.read_result(f).cell.history == "kept"]
    with gzip.open(folder / "samples.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    assert sorted({(row["repetition"], row["row"]) for row in rows}) == [
        ("0", "0"),
        ("0", "1"),
        ("0", "2"),
        ("1", "0"),
        ("1", "1"),
    ]


def test_a_conversation_that_outgrows_the_context_is_refused_in_a_line(
    tiny_model: Path, conversations: str, store_uri: str
) -> None:
    done = run(
        model=str(tiny_model),
        workload=conversations,
        history="kept",
        prompt_tokens="auto",
        output_tokens="100",
        repetitions="2",
    )
    [row] = done.rows
    assert row.message.startswith("The longest conversation of workload talks has ")
    assert "is more than the context of 256" in row.message
