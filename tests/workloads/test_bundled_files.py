"""The prompt sets bundled with the package are well formed and match their README."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mlflow_llmbench.workloads.conversations import plain_dialogue

FOLDER = Path(__file__).resolve().parents[2] / "mlflow_llmbench" / "workloads"

ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| `(?P<file>[\w.]+)` \| (?P<count>\d+) "
    r"\| (?P<shortest>\d+) \| (?P<mean>\d+) \| (?P<longest>\d+) \| (?P<total>\d+) \|$",
    re.MULTILINE,
)
README = (FOLDER / "README.md").read_text(encoding="utf-8")
TABLE = {match["file"]: match for match in ROW.finditer(README)}
FILES = sorted(path.name for path in FOLDER.glob("*.jsonl"))

# The keys that each line has besides "id" and its text, which is "messages" in chat.jsonl and else "prompt".
EXTRA_KEYS = {
    "chat.jsonl": set(),
    "code.jsonl": {"language"},
    "creative.jsonl": set(),
    "domain.jsonl": {"domain"},
    "qa.jsonl": {"answer"},
    "summarization.jsonl": {"genre", "reference"},
}


def load(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text[:-1].split("\n")]
    for row in rows:
        if "messages" in row:
            row["turns"] = [message["content"] for message in row["messages"]]
            row["prompt"] = plain_dialogue(row["turns"])
    return rows


def word_counts(name):
    return [len(row["prompt"].split()) for row in load(name)]


def test_readme_lists_every_file():
    assert sorted(EXTRA_KEYS) == FILES
    assert sorted(TABLE) == FILES
    for file, row in TABLE.items():
        assert file == row["name"] + ".jsonl"


@pytest.mark.parametrize("name", FILES)
def test_lines_have_the_expected_keys(name):
    for row in load(name):
        assert isinstance(row, dict)
        if name == "chat.jsonl":
            texts = row.pop("turns")
            assert all(set(message) == {"role", "content"} for message in row.pop("messages"))
            assert all(text.strip() == text != "" for text in texts)
        assert set(row) == {"id", "prompt"} | EXTRA_KEYS[name]
        for value in row.values():
            assert isinstance(value, str)
            assert value.strip()


@pytest.mark.parametrize("name", FILES)
def test_ids_are_unique_and_numbered(name):
    rows = load(name)
    stem = name.removesuffix(".jsonl")
    expected = [f"{stem}-{number:02d}" for number in range(1, len(rows) + 1)]
    assert [row["id"] for row in rows] == expected


def test_prompts_are_distinct():
    prompts = Counter(" ".join(row["prompt"].lower().split()) for name in FILES for row in load(name))
    assert [prompt for prompt, count in prompts.items() if count > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_prompts_have_no_stray_white_space(name):
    for row in load(name):
        prompt = row["prompt"]
        assert prompt == prompt.lstrip(), row["id"]
        # A trailing space changes the tokens; a line break may end a prompt.
        assert not re.search(r"[ \t]$", prompt, re.MULTILINE), row["id"]


@pytest.mark.parametrize("name", FILES)
def test_counts_agree_with_the_readme(name):
    row = TABLE[name]
    words = word_counts(name)
    assert int(row["count"]) == len(words)
    assert int(row["shortest"]) == min(words)
    assert int(row["longest"]) == max(words)
    assert int(row["total"]) == sum(words)
    assert abs(int(row["mean"]) - sum(words) / len(words)) <= 0.5


def test_qa_form():
    for row in load("qa.jsonl"):
        assert re.fullmatch(r"Question: [^\n]+\?\nAnswer:", row["prompt"]), row["id"]


def test_summarization_form():
    rows = load("summarization.jsonl")
    assert [row["genre"] for row in rows] == ["news", "abstract"] * 10
    for row in rows:
        # A news article begins with its place, an abstract has no such line.
        assert bool(re.match(r"[A-Z ]+ – ", row["prompt"])) is (row["genre"] == "news"), row["id"]
        article, end, rest = row["prompt"].partition("\n\nSummary:")
        assert end and not rest, row["id"]
        assert 300 <= len(article.split()) <= 800, row["id"]
        assert len(row["reference"].split()) < len(article.split()) / 2, row["id"]


def test_creative_form():
    assert all(10 <= words <= 60 for words in word_counts("creative.jsonl"))


def test_code_form():
    rows = load("code.jsonl")
    languages = Counter(row["language"] for row in rows)
    for language, count in languages.items():
        assert re.search(rf"`{language}` \({count}\b", README), language
    assert set(languages) == {"python", "javascript", "c", "sql", "bash", "java", "go", "rust"}


def test_complete_python_prompts_parse():
    """A Python prompt that ends with a full line is valid up to the next statement."""
    checked = 0
    for row in load("code.jsonl"):
        prompt = row["prompt"]
        if row["language"] != "python" or not prompt.endswith("\n"):
            continue
        last = prompt.rstrip("\n").rsplit("\n", 1)[-1]
        indent = len(last) - len(last.lstrip()) + (4 if last.endswith(":") else 0)
        ast.parse(prompt + " " * indent + "pass\n")
        checked += 1
    assert checked >= 5


def test_chat_form():
    rows = load("chat.jsonl")
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)], row["id"]
        assert roles[-1] == "user", row["id"]
    assert len(rows) == 25
    assert set(Counter(len(row["turns"]) // 2 + 1 for row in rows)) == {2, 3, 4, 5, 6}


def test_domain_form():
    rows = load("domain.jsonl")
    fields = Counter(row["domain"] for row in rows)
    assert fields == {"legal": 10, "science": 10}
    assert all(15 <= words <= 80 for words in word_counts("domain.jsonl"))


def test_the_sets_have_their_sizes_and_a_licence():
    sizes = {"qa": 50, "summarization": 20, "creative": 20, "code": 30, "chat": 25, "domain": 20}
    assert {Path(name).stem: len(load(name)) for name in FILES} == sizes
    assert "Apache License, Version 2.0" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
