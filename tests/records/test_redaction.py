"""Masking of secrets: texts, data, names of variables, a worker's environment, the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from pathlib import Path
from typing import TextIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.config.cells import cell_name
from mlflow_llmbench.measure.journal import redact_log, write_text
from mlflow_llmbench.records import redaction
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError, first_line
from mlflow_llmbench.records.redaction import (
    Terminal,
    escape_controls,
    excerpt,
    is_secret_name,
    redact,
    redact_all,
    worker_environment,
)
from mlflow_llmbench.records.results import MemoryStages, RequestRecord


@pytest.fixture(autouse=True)
def no_files_of_a_person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("GET https://user:pw@host/x failed", "GET https://***@host/x failed"),
        ("postgresql://u:pa/ss@host/db", "postgresql://***@host/db"),
        ("https://u:p@ss@host/a@b", "https://***@host/a@b"),
        ("https://u:1234@h, then https://v:q@k", "https://***@h, then https://***@k"),
        ("setting //user:pw@host/x", "setting //***@host/x"),
        ("index https://some-token@host/simple", "index https://***@host/simple"),
        (
            "s3://b/k?X-Amz-Credential=AK%2F1&X-Amz-Signature=0f&v=1",
            "s3://b/k?X-Amz-Credential=***&X-Amz-Signature=***&v=1",
        ),
        ("file:///x?sv=2024&sig=a%2Fb", "file:///x?sv=2024&sig=***"),
        ("sqlite:///a.db?password=short", "sqlite:///a.db?password=***"),
        ("{'Authorization': 'Bearer abc.def-12'}", "{'Authorization': 'Bearer ***'}"),
        ("Authorization: Basic dXNlcjpwdw==", "Authorization: Basic ***"),
        ("Authorization: 0123456789abcdef", "Authorization: ***"),
        ('{"x-api-key": "abcdefgh"}', '{"x-api-key": "***"}'),
        ("password = hunter2hunter2", "password = ***"),
        ("hub_token=abcdefgh12345678", "hub_token=***"),
        ("token hf_abcDEF123456 is wrong", "token *** is wrong"),
        ("ghp_0123456789abcdef0123", "***"),
        ("jwt eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "jwt ***"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----",
        ),
    ],
)
def test_secrets_are_known_by_their_looks(text: str, masked: str) -> None:
    assert redact(text) == masked
    assert redact(masked) == masked


MAKERS = (
    "hf_" + "a1B2" * 9, "hf_Abc12345", "ghp_" + "a1B2" * 9, "github_pat_11ABC_" + "a1B2" * 9, "glpat-a1B2c3D4e5F6g7H8",
    "xoxb-123456789012-abcdefABCDEF", "AIza" + "Sy-a1B2c3" * 4, "dapi" + "0123abcd" * 4, "sk-proj-a1B2_c3D4-e5F6g7H8",
    "sk-ant-api03-a1B2c3D4e5F6", "AKIAIOSFODNN7EXAMPLE", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "sk_live_a1B2c3D4e5F6g7", "npm_" + "a1B2c3" * 6, "nvapi-" + "a1B2c3" * 6, "gsk_" + "a1B2c3" * 6,
    "r8_" + "a1B2c3" * 6, "xai-" + "a1B2c3" * 6, "pypi-" + "AgEIcHlwaS" * 4, "hvs.CAESI" + "a1B2c3" * 4,
)  # fmt: skip
"""Invented keys in the formats of their makers."""


@pytest.mark.parametrize("key", MAKERS)
@pytest.mark.parametrize(
    "around", ["{}", "o_{}", "/data/o_{}/m", "a-{}.txt", "x={},", "'{}'", "[{}]", "see {}\\n", "__{}"]
)
def test_keys_are_known_wherever_they_stand(key: str, around: str) -> None:
    text = around.format(key)
    assert redact(text) == around.format("***")
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("serve --api-key abcdefgh --port 1", "serve --api-key *** --port 1"),
        ("serve --hf-token=abcdefgh", "serve --hf-token=***"),
        ("args: {'api_key': ['abcdefgh'], 'port': 1}", "args: {'api_key': ['***'], 'port': 1}"),
        ("Cookie: session=abc; user=1", "Cookie: ***"),
        ("https://hooks.slack.com/services/T0000/B0000/abcdefghijkl", "https://hooks.slack.com/services/***"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nDEK-Info: AES-1\n\nMIIE\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----",
        ),
    ],
)
def test_secrets_in_options_and_headers(text: str, masked: str) -> None:
    assert redact(text) == masked


REPEATED = (
    "token=", "token=a", "token =", "--token=", "sk-", "sk-a", "eyJ", "eyJaaaaaaaa.", "hf_", "hf_a", "//", "//u:",
    "//u:@", "://", "?a.", "?key", "password", "password=", "bearer ", "basic ", "authorization=", "-----BEGIN ",
    "--api-key", "cookie:", "-----BEGIN PRIVATE KEY-----", "SG.", "_", "a", "@",
    "//a:b", "token ", "x-y_z.", "?a=b;",
)  # fmt: skip
"""Beginnings of secrets. With look-aheads, texts of 40 kB of one of them took up to 9 s, growing with the square."""


@pytest.mark.parametrize("end", ["", "!", "@"])
def test_masking_takes_linear_time(end: str) -> None:
    """The bound is far above the seconds that a linear search takes, and far below those of a square one."""
    begun = time.process_time()
    for part in REPEATED:
        redact(part * (100_000 // len(part)) + end)
    assert time.process_time() - begun < 60


def test_a_text_is_masked_before_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-of-many-characters")
    assert excerpt("x" * 30 + "canary-of-many-characters", 40) == "x" * 30 + "***"
    assert excerpt("see hf_AbCdEfGh0123456789", 10) == "see ***"


@pytest.mark.parametrize(
    "text",
    [
        "then "
        "http://127.0.0.1:5000/#/experiments/1/runs?compareRunsMode=CHART&viewStateShareKey=llmbench-0123456789abcdef",
        "mlflow ui --backend-store-uri sqlite:////tmp/mlflow.db",
        "http://localhost:5000/a:b@c",
        "prompt_tokens=128 output_tokens=1700000000000000000 first_token: 1234567890123456789",
        "'NoneType' object has no attribute 'hf_quantizer' (hf_hub_download)",
        "Basic authentication failed for user@example.com",
        "eos_token=</s>, bos_token: <s>, token: 1.25e-05 s",
        "throughput/output_tokens_per_s 12345678.9, deadbeefdeadbeefdeadbeefdeadbeef",
        '{"a":"http://x:y","b":"me@x"}',
    ],
)
def test_ordinary_texts_are_left_alone(text: str) -> None:
    assert redact(text) == text


def test_secrets_are_known_from_the_environment_and_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_DB_PASSWD", 'p@ss "w%rd')
    monkeypatch.setenv("NPM_AUTHTOKEN", "p@ss")  # too short to mask
    monkeypatch.setenv("HTTPS_PROXY", "http://someone:proxy-word@proxy:3128")
    for file, text in {
        ".cache/huggingface/token": "of-the-hub-1\n",
        ".cache/huggingface/stored_tokens": "[work]\nhf_token = of-the-hub-2\n",
        ".mlflow/credentials": (
            "[mlflow]\nmlflow_tracking_username = somebody\nmlflow_tracking_password = of-mlflow-1\n"
        ),
    }.items():
        path = tmp_path / "home" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert (
        redact('it was p@ss "w%rd, p%40ss%20%22w%25rd in an address, p@ss \\"w%rd in JSON')
        == "it was ***, *** in an address, *** in JSON"
    )
    assert redact("proxy-word of-the-hub-1 of-the-hub-2 of-mlflow-1") == "*** *** *** ***"
    assert redact("[mlflow] somebody, someone, p@ss, work") == "[mlflow] somebody, someone, p@ss, work"


def test_numbers_words_and_paths_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, value in enumerate(["12345678", "1", "1.234e-05", "llmbench", "summarization", str(tmp_path)]):
        monkeypatch.setenv(f"SECRET_{number}", value)
    assert (
        redact(f"llmbench: 12345678 of 1, 1.234e-05, summarization in {tmp_path}/x")
        == f"llmbench: 12345678 of 1, 1.234e-05, summarization in {tmp_path}/x"
    )


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
        lambda one: st.lists(one) | st.dictionaries(st.text(), one),
    )
)
def test_data_without_texts_comes_back_as_it_was(data: object) -> None:
    assert json.dumps(redact_all(data)) == json.dumps(data)


def test_records_are_redacted_field_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "0123456789abcdef-x")
    record = RequestRecord(12345678, (23456789, 34567890), rows=2)
    assert redact_all({"a": (record, [MemoryStages({"peak": 123})])}) == {"a": (record, [MemoryStages({"peak": 123})])}
    cell = Cell(model="/models/0123456789abcdef-x/m", batch_size=8)
    assert redact_all([cell]) == [dataclasses.replace(cell, model="/models/***/m")]


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "openai_api_key",
        "GITHUB_PAT",
        "MYSQL_PWD",
        "SYSTEM_ACCESSTOKEN",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "SENTRY_DSN",
        "AZURE_STORAGE_CONNECTION_STRING",
        "DB-PASS",
    ],
)
def test_names_that_say_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["PATH", "PWD", "HOME", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "KEYBOARD", "XAUTHORITY", "MONKEY", "COMPASS"],
)
def test_names_that_do_not(name: str) -> None:
    assert not is_secret_name(name)


ORDINARY = {
    "PATH": "/usr/bin", "HOME": "/home/me", "LD_LIBRARY_PATH": "/opt/lib", "LD_PRELOAD": "libjemalloc.so",
    "OMP_PROC_BIND": "true", "CUDA_VISIBLE_DEVICES": "0",
    "HF_HOME": "/data/hf", "HF_HUB_OFFLINE": "1", "VIRTUAL_ENV": "/venv", "TMPDIR": "/tmp", "LC_ALL": "C.UTF-8",
    "CC": "gcc", "TRITON_CACHE_DIR": "/t",
    "LLMBENCH_API_KEY": "meant-for-the-worker", "HTTPS_PROXY": "http://proxy:3128", "no_proxy": "localhost",
    "SSL_CERT_FILE": "/etc/ssl/cert.pem",
}  # fmt: skip
FOR_DOWNLOADS = {
    "HF_TOKEN": "hf_abcDEF123456",
    "HF_TOKEN_PATH": "/t",
    "HUGGING_FACE_HUB_TOKEN": "x",
    "https_proxy": "http://me:word@proxy:3128",
}
NEVER = {
    "MLFLOW_TRACKING_URI": "https://host", "MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_TOKEN": "x",
    "AWS_PROFILE": "work", "AZURE_TENANT_ID": "1",
    "GOOGLE_APPLICATION_CREDENTIALS": "/k.json", "DATABRICKS_HOST": "https://host", "OPENAI_API_KEY": "x",
    "SSH_AUTH_SOCK": "/run/s",
    "PIP_INDEX_URL": "https://me:word@host/simple", "DATABASE_URL": "postgresql://me:word@host/db",
    "GITHUB_TOKEN": "ghp-of-mine", "COPY": "ghp-of-mine",
}  # fmt: skip


def test_a_worker_has_what_it_needs_and_no_secret() -> None:
    everything = ORDINARY | FOR_DOWNLOADS | NEVER
    assert worker_environment(everything, downloads=False) == ORDINARY
    assert worker_environment(everything, downloads=True) == ORDINARY | FOR_DOWNLOADS


def test_characters_that_act_are_written_out() -> None:
    assert (
        escape_controls("a\x1b[31mb\nc\x00\x7f\x9b\u2028\u202eabc\udce9")
        == r"a\x1b[31mb\nc\x00\x7f\x9b\u2028\u202eabc\udce9"
    )
    assert escape_controls("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
    assert escape_controls("naïve 東京 👩‍💻 \u200f") == "naïve 東京 👩‍💻 \u200f"


def test_the_terminal_gets_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-1234")
    seen = io.StringIO()
    with contextlib.redirect_stdout(cast(TextIO, Terminal(seen))):
        print("a canary-1234", "\x1b[2J\r\tb")
    Terminal(seen).writelines(["c canary-1234\n", "d\n"])
    assert seen.getvalue() == "a *** \\x1b[2J\r\tb\nc ***\nd\n"
    assert not Terminal(seen).isatty()


def test_errors_are_one_line_without_secrets_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-1234")
    assert str(UsageError("It is canary-1234\nat https://u:p@h\x1b.")) == r"It is ***\nat https://***@h\x1b."
    assert first_line(ValueError("x" * 195 + "canary-1234\nmore")) == "x" * 195 + "***"
    assert first_line(ValueError("https://user:" + "p" * 300 + "@host")) == "https://***@host"


def test_names_of_runs_are_cut_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cell_name(Cell(model="https://user:pa/ss@host/m"), []) == "m none b1 128+128"
    assert cell_name(Cell(model="https://user:pa/ss@host"), []) == "***@host none b1 128+128"
    assert cell_name(Cell(model="a\x1b[31m\u202eb"), []) == r"a\x1b[31m\u202eb none b1 128+128"
    assert len(cell_name(Cell(model="x" * 999), [])) == 250


def test_a_log_is_rewritten_only_where_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-1234")
    (tmp_path / "plain.log").write_bytes(b"\xff is no text\r\n")
    (tmp_path / "bad.log").write_bytes(b"\xff canary-1234\r\n")
    for name in ("plain.log", "bad.log", "absent.log"):
        redact_log(tmp_path / name)
    assert (tmp_path / "plain.log").read_bytes() == b"\xff is no text\r\n"
    assert (tmp_path / "bad.log").read_bytes() == "\N{REPLACEMENT CHARACTER} ***\r\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.log", "plain.log"]


def test_the_module_needs_no_other_of_ours() -> None:
    assert "from ." not in Path(redaction.__file__).read_text(encoding="utf-8")


def test_reports_are_written_without_secrets_and_pictures_as_they_are(tmp_path: Path) -> None:
    picture = "base64,AKIAIOSFODNN7EXAMPLE" + "A" * 80
    write_text(tmp_path / "x.md", f"because hf_AbCdEfGh0123456789 <img src='data:{picture}'> hf_AbCdEfGh0123456789")
    assert (tmp_path / "x.md").read_text() == f"because *** <img src='data:{picture}'> ***"


def test_a_private_key_ends_where_its_text_ends() -> None:
    begin = "-----BEGIN PRIVATE KEY-----"
    assert redact(f'{{"a": "{begin}MIIE+/=", "b": 1}}') == f'{{"a": "{begin}***", "b": 1}}'
    assert redact(f'{{"a": "{begin}***", "b": 1}}') == f'{{"a": "{begin}***", "b": 1}}'
