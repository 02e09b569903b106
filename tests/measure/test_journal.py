"""Folders of results in which anybody may have put anything: no read of them waits or runs out of memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlflow_llmbench.measure import journal
from mlflow_llmbench.records.errors import JournalError


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in (".claim", "worker.log", "worker.jsonl", "result.json"):
        os.mkfifo(tmp_path / name)
    assert not journal.is_claimed(tmp_path)
    journal.redact_log(tmp_path / "worker.log")
    with pytest.raises(
        JournalError, match=r"^Cannot read .*worker\.jsonl: it is a pipe, not a file\. Delete the folder"
    ):
        list(journal.read_events(tmp_path / "worker.jsonl"))
    with pytest.raises(JournalError, match=r"^Cannot read the result .*: it is a pipe, not a file\. Give the folder"):
        journal.read_result(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"cell":' * 5000, "1" * 5000, "null", "[]", '"x"'])
def test_a_record_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(JournalError, match=r"^Cannot read the result .*\. Give the folder of a measured cell\.$"):
        journal.read_result(tmp_path)
    (tmp_path / "worker.jsonl").write_text(content + "\n")
    with pytest.raises(JournalError, match=r"worker\.jsonl, line 1, is damaged\. Delete the folder"):
        list(journal.read_events(tmp_path / "worker.jsonl"))


def test_a_power_cut_may_end_a_journal_with_zeros_and_large_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "worker.jsonl"
    file.write_bytes(bytes(5000))
    assert list(journal.read_events(file)) == []
    os.truncate(file, 50 * 10**9)
    with pytest.raises(JournalError, match="it has 50,000,000,000 bytes"):
        list(journal.read_events(file))
