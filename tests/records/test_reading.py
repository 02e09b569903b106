"""Readers of files that anybody may have written: what they read, what they refuse, and that they end."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.records import reading
from mlflow_llmbench.records.reading import Unreadable

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)

READERS: tuple[Callable[[Path], Any], ...] = (
    reading.read_bytes,
    reading.read_text,
    reading.read_json,
    reading.read_own_json,
    reading.read_json_lines,
    reading.read_yaml,
    reading.open_file,
    reading.require_file,
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder", "absent", "loop", "nul"])
def test_what_is_no_file_is_told_without_waiting(reader: Callable[[Path], Any], kind: str) -> None:
    path = Path("x")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind("x")
        listening.close()
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("x")
    elif kind == "nul":
        path = Path("a\0b")
    words = {
        "fifo": "it is a pipe, not a file", "device": "it is a device, not a file", "socket": "it is a socket",
        "folder": "it is a folder", "absent": "No such file", "loop": "Too many levels", "nul": "null",
    }  # fmt: skip
    with pytest.raises(Unreadable, match=words[kind]):
        reader(path)


@pytest.mark.parametrize("reader", [*READERS[:6], reading.require_file], ids=lambda reader: reader.__name__)
def test_a_sparse_file_of_many_gigabytes_is_not_read(reader: Callable[[Path], Any]) -> None:
    path = Path("x")
    with path.open("wb") as file:
        file.write(b"{}")
        file.truncate(50 * 10**9)
    with pytest.raises(Unreadable, match="it has 50,000,000,000 bytes, and at most"):
        reader(path)


@pytest.mark.parametrize("reader", READERS[:6], ids=lambda reader: reader.__name__)
def test_binary_data_and_what_git_lfs_leaves_are_named(reader: Callable[[Path], Any]) -> None:
    path = Path("x")
    path.write_bytes(bytes(1000))
    with pytest.raises(Unreadable, match="it is no text: it holds zero bytes"):
        reader(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(Unreadable, match="it is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        reader(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read(encoding: str) -> None:
    path = Path("x")
    path.write_bytes('{"a": "é"}'.encode(encoding))
    assert reading.read_json(path) == reading.read_yaml(path) == {"a": "é"}
    assert reading.read_text(path) == '{"a": "é"}'
    assert [value for *_, value in reading.read_json_lines(path)] == [{"a": "é"}]
    assert reading.parse_json('\ufeff{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, "[" * 101 + "]" * 101, '[{"a":[' * 40 + "]}]" * 40])
def test_deep_json_is_refused_before_it_is_parsed(text: str) -> None:
    with pytest.raises(Unreadable, match=r"it is nested [\d,]+ levels deep, and at most 100 are read"):
        reading.parse_json(text)


def test_brackets_in_texts_are_no_depth() -> None:
    data = {"[" * 200: ['"' + "{" * 200, "\\" + "[" * 200, '\\"' * 3 + "[" * 200, [[]]]}
    assert reading.parse_json(json.dumps(data)) == data
    for sibling in ([], {}, {"a": [1]}):
        assert reading.parse_json(json.dumps([sibling] * 300)) == [sibling] * 300
    nested = "[" * 100 + "]" * 100
    assert reading.parse_json(nested) == json.loads(nested)


def test_a_number_that_no_float_can_hold_is_refused_and_a_text_of_digits_is_not() -> None:
    with pytest.raises(Unreadable, match="a number in it has 301 digits"):
        reading.parse_json('{"a": 1, "b": 1' + "0" * 300 + "}")
    data = {"pi": "3" * 5000, "n": 10**299}
    assert reading.parse_json(json.dumps(data)) == data
    assert float(data["n"]) > 0


def test_many_objects_are_refused_before_they_take_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_CONTAINERS", 1000)
    with pytest.raises(Unreadable, match="it has 1,002 objects and lists, and at most 1,000 are read"):
        reading.parse_json("[" + "{}," * 1000 + "[]]")


def test_half_a_surrogate_pair_is_read_in_records_of_ours_only() -> None:
    path = Path("x")
    path.write_text(r'{"path": "caf\udce9", "face": "\ud83d\ude42"}')
    assert reading.read_own_json(path) == {"path": "caf\udce9", "face": "🙂"}
    with pytest.raises(Unreadable, match="half of a surrogate pair"):
        reading.read_json(path)
    assert reading.parse_json(r'["\ud83d\ude42", "\\ud83d"]') == ["🙂", "\\ud83d"]


def test_a_line_of_json_lines_ends_at_a_line_feed_only() -> None:
    lines = ['{"a": "one\u2028two\u0085three\x1d"}', '{"a": 2}\r', "", "{", "null", "[" * 500, r'["\ud800"]', " \t"]
    lines[0] = lines[0].replace("\x1d", "\u2029")
    assert [(number, value) for number, _, value in reading.json_lines("\n".join(lines))] == [
        (1, {"a": "one\u2028two\u0085three\u2029"}), (2, {"a": 2}), (4, None), (5, None), (6, None), (7, None),
    ]  # fmt: skip


def laughs(levels: int) -> str:
    first = "a0: &a0 [" + ", ".join("x" for _ in range(9)) + "]\n"
    return first + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, levels))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(40), "it has more than 100,000 values, with those that aliases repeat"),
        ("a: &a {x: 1, y: 2}\n" + "".join(
            f"b{n}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 9)}]}}\n" for n in range(9)
        ), "it has more than 100,000 values"),
        ("&a [*a]", "it is nested more than 100 levels deep"),
        ("[" * 5000, "it is nested more than 100 levels deep"),
        ("- " * 5000, "it is nested more than 100 levels deep"),
        ("a: [1", "it is not YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        ("a: 1\nb: *x", "it is not YAML: found undefined alias 'x' in line 2"),
        ("a: 2024-13-45", "it is not YAML: month must be in 1..12"),
        ("a: !!timestamp x", "it is not YAML: "),
        ("a: !!python/name:os.system x", "it is not YAML: could not determine a constructor"),
        ("a: \x07", "it is not YAML: "),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(Unreadable) as caught:
        reading.parse_yaml(text)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_yaml_with_ordinary_aliases_is_read() -> None:
    assert reading.parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1}}
    assert reading.parse_yaml("") is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@few
@given(json_values)
def test_fuzz_json_is_what_the_standard_library_reads(value: Any) -> None:
    text = json.dumps(value)
    assert json.dumps(reading.parse_json(text, surrogates=True)) == json.dumps(json.loads(text))


fragments = st.lists(
    st.sampled_from(["[", "]", "{", "}", '"', "\\", ":", ",", "\n", " ", "- ", "&a ", "*a", "<<: ", "? ", "| ",
                     "!!int ", "1", "-1e9", "null", "~", "\ufeff", "\u2028", "\u0085", r"\ud800", "é", "'", "#",
                     "%YAML 1.1\n", "---", "0x", "1:1", "2024-01-01"]),
    max_size=60,
)  # fmt: skip


@few
@given(st.binary(max_size=200) | fragments.map(lambda parts: "".join(parts).encode()))
def test_fuzz_every_text_is_read_or_refused_in_one_line(content: bytes) -> None:
    told: list[str] = []
    for parse in (
        lambda: reading.parse_json(content),
        lambda: reading.parse_yaml(reading.decode(content)),
        lambda: list(reading.json_lines(reading.decode(content))),
    ):
        try:
            parse()
        except Unreadable as error:
            told.append(str(error))
    assert all(len(text.splitlines()) == 1 for text in told)


@few
@given(json_values)
def test_fuzz_yaml_is_what_pyyaml_reads(value: Any) -> None:
    text = yaml.safe_dump(json.loads(json.dumps(value)))
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:  # PyYAML writes characters that it does not read
        return
    assert repr(reading.parse_yaml(text)) == repr(expected)
