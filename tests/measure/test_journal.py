"""Folders of results in which anybody may have put anything: no read of them waits or runs out of memory."""

from __future__ import annotations

import dataclasses
import gzip
import os
from pathlib import Path

import pytest

from mlflow_llmbench.measure import journal
from mlflow_llmbench.records.codec import to_json
from mlflow_llmbench.records.errors import JournalError
from mlflow_llmbench.records.results import Repetition, RequestRecord, RunResult

from ..results import made


def made_of(request: RequestRecord) -> RunResult:
    """A result of one repetition of this request."""
    return dataclasses.replace(made(), repetitions=(Repetition(0, 0, (request,)),))


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


IMPOSSIBLE: dict[str, tuple[RequestRecord, str]] = {
    "no token": (RequestRecord(0, ()), "a complete request has no token"),
    "no rows": (RequestRecord(0, (5,), rows=0), "a complete request has no token"),
    "before it was sent": (RequestRecord(10, (5, 20)), "tokens of a request arrive before it was sent"),
    "out of order": (RequestRecord(0, (20, 10)), "before an earlier token"),
    "negative counts": (RequestRecord(0, (5,), prompt_tokens=-1), "a negative number of tokens"),
    "chunks without stamps": (RequestRecord(0, (5,), chunk_tokens=(1, 1)), "other numbers of chunks and of stamps"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_request_that_nobody_can_have_measured_is_named(tmp_path: Path, name: str) -> None:
    request, told = IMPOSSIBLE[name]
    journal.write_json(tmp_path / "result.json", to_json(made_of(request)))
    with pytest.raises(JournalError, match=f"^Cannot read the result .*{told}.*\\. Give the folder of a measured cell"):
        journal.read_result(tmp_path)


def test_a_repetition_in_which_every_request_failed_is_named(tmp_path: Path) -> None:
    lost = Repetition(3, 0, (), failed=(RequestRecord(0, (), outcome="timeout"),))
    journal.write_json(tmp_path / "result.json", to_json(dataclasses.replace(made(), repetitions=(lost,))))
    with pytest.raises(JournalError, match="repetition 3 has no complete request"):
        journal.read_result(tmp_path)


def test_requests_that_were_measured_are_read_as_they_are(tmp_path: Path) -> None:
    together = made_of(RequestRecord(0, (5, 5, 9), chunk_tokens=(1, 0, 2), tokens=3))
    journal.write_json(tmp_path / "result.json", to_json(together))
    assert journal.read_result(tmp_path) == together


def test_a_power_cut_may_end_a_journal_with_zeros_and_large_files_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "worker.jsonl"
    file.write_bytes(bytes(5000))
    assert list(journal.read_events(file)) == []
    os.truncate(file, 50 * 10**9)
    with pytest.raises(JournalError, match="it has 50,000,000,000 bytes"):
        list(journal.read_events(file))


def test_samples_have_one_stamp_per_token_of_each_row() -> None:
    """Two rows; then a step with two tokens, which have its stamp both."""
    plain = Repetition(0, 0, (RequestRecord(5, (10, 20), rows=2),))
    guessed = Repetition(1, 0, (RequestRecord(30, (40, 50), tokens=3, chunk_tokens=(1, 2)),))
    text = gzip.decompress(journal.samples_csv(made(repetitions=(plain, guessed)))).decode()
    assert text.splitlines() == [
        "repetition,row,token,t_ns",
        *("0,0,0,5", "0,0,1,10", "0,0,2,20"),
        *("0,1,0,5", "0,1,1,10", "0,1,2,20"),
        *("1,0,0,30", "1,0,1,40", "1,0,2,50", "1,0,3,50"),
    ]
