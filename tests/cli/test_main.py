"""The command line as a user meets it: exact lines, exit codes, and no heavy import before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.invocation import MODULE
from mlflow_llmbench.records.quantizations import QUANTIZATIONS

ROOT = Path(__file__).resolve().parents[2]
FAST = (
    "--backend fake --model fake:ttft_ms=2+itl_ms=1 --output-tokens 4 --prompt-tokens 4 --repetitions 5 --warmup 1"
).split()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "--quant", "int44"],
         f"llmbench: Unknown quant: int44. Did you mean int4? Known: {', '.join(QUANTIZATIONS)}.\n"),
        (["run", "--batch-size", "0"], "llmbench: batch_size is too small: 0. The smallest is 1.\n"),
        (["run", "--batchsize", "2"],
         "llmbench: Unknown option: --batchsize. Did you mean --batch-size? See `llmbench run --help-all`.\n"),
        (["run", "--zzz"], "llmbench: Unknown option: --zzz. See `llmbench run --help-all`.\n"),
        (["runn"], "llmbench: Unknown command: runn. Did you mean run? See `llmbench --help`.\n"),
        (["--model", "x"], "llmbench: The command comes first, then --model: llmbench run --model …\n"),
        (["--versoin"], "llmbench: Unknown option: --versoin. Did you mean --version? See `llmbench --help`.\n"),
        (["run", "--quant"], "llmbench: --quant needs a value. See `llmbench run --help-all`.\n"),
        (
            ["run", "--quant", "int4", "--model=x", "--quant=int8"],
            "llmbench: --quant is given 2 times. Give it once, with all values: --quant int4,int8.\n",
        ),
        (
            ["gate", "x", "--against", "models:/x/1", "--limit", "ttft=10%", "--limit", "kl=0.1"],
            "llmbench: --limit is given 2 times. Give it once, with all values: --limit ttft=10%,kl=0.1.\n",
        ),
        (["run", "--quant", "--rerun"], "llmbench: --quant needs a value. See `llmbench run --help-all`.\n"),
        (["run", "--json=1"], "llmbench: --json takes no value. See `llmbench run --help-all`.\n"),
        (["run", "model=x"], "llmbench: Unexpected argument: model=x. Write --model x.\n"),
        (["doctor", "x"], "llmbench: Unexpected argument: x. See `llmbench doctor --help`.\n"),
        (["upload"],
         "llmbench: FOLDER is missing: a sweep's folder, as printed by `llmbench run`. "
         "See `llmbench upload --help`.\n"),
        (["register", "r"],
         "llmbench: --name is missing: registered model, for example support-bot. See `llmbench register --help`.\n"),
        (["compare", "a", "b", "--noise", "much"],
         "llmbench: --noise is not a number: much. Give one such as 0.01.\n"),
        (["ab", "seed=0", "seed=0", "--pairs", "2.5"],
         "llmbench: --pairs is not a whole number: 2.5. Give one such as 6.\n"),
        (["completion", "zhs"], "llmbench: Unknown shell: zhs. Did you mean zsh? Known: bash, zsh, fish.\n"),
        (["run", "--config", "none.yaml"],
         "llmbench: Cannot read parameters from none.yaml: No such file or directory. "
         "Give a YAML file with one `name: value` per line.\n"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "light"),
    [
        (["--help"], ["rich"]),
        (["run", "--help-all"], ["rich"]),
        (["run", "--quant", "int44"], []),
        (["run", "--batch-size", "many"], []),
        (["runn"], []),
        (["--version"], []),
        (["completion", "zsh"], []),
    ],
)
def test_help_and_bad_parameters_import_nothing_heavy(arguments: list[str], light: list[str]) -> None:
    code = (
        "import sys\nfrom mlflow_llmbench.cli.main import main\n"
        f"main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'mlflow', 'matplotlib', 'numpy', 'ray', 'huggingface_hub', 'yaml', 'rich'}\n"
        f"heavy -= set({light!r})\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_terminal_that_lacks_a_character_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_llmbench", "run", "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--model MODEL,\\u2026 " in done.stdout


def test_run_prints_a_table_the_folder_and_how_to_open_the_ui(
    store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *FAST, "--batch-size", "1,2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["batch_size", "tokens/s"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert any(line.startswith("Results: /") and "llmbench-results" in line for line in lines)
    assert f"Open the comparison: mlflow ui --backend-store-uri {store_uri}" in lines
    assert any(
        line.startswith("then http://127.0.0.1:5000/#/experiments/") and "viewStateShareKey=" in line for line in lines
    )
    last = json.loads(lines[-1])
    assert last["outcome"] == "ok"
    assert [run["params"]["batch_size"] for run in last["runs"]] == [1, 2]
    found = MlflowClient(store_uri).get_run(last["runs"][0]["run_id"])
    assert found.data.metrics["latency/ttft_ms_p50"] == pytest.approx(last["runs"][0]["metrics"]["latency/ttft_ms_p50"])


def test_a_failed_cell_is_exit_code_1(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *("fake:fail=oom" if "ttft_ms" in part else part for part in FAST)]) == 1
    assert "oom: Scripted out-of-memory error with 1 rows." in capsys.readouterr().out


def test_the_config_of_a_run_runs_again(store_uri: str, tmp_path: Path) -> None:
    assert main(["run", *FAST]) == 0
    config = next(tmp_path.glob("llmbench-results/*/*/artifacts/config.yaml"))
    assert main(["run", "--config", str(config), "--output-dir", "again"]) == 0
    first, second = (
        json.loads(next(tmp_path.glob(f"{folder}/*/*/artifacts/result.json")).read_text())
        for folder in ("llmbench-results", "again")
    )
    assert first["hashes"]["config"] == second["hashes"]["config"]


def test_models_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "opt-1.3b" in table and "llama-2-13b" in table
    assert main(["models", "--json"]) == 0
    assert {"opt-125m", "gemma-3-270m"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert main(["doctor"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_versions_below_the_safe_ones_are_told_and_not_refused(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("torch-2.5.1", "transformers-5.2.0"):
        (tmp_path / f"site/{package}.dist-info").mkdir(parents=True)
        name, _, number = package.partition("-")
        (tmp_path / f"site/{package}.dist-info/METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        )
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["run", *FAST]) == 0
    assert capsys.readouterr().err.splitlines()[:2] == [
        "llmbench: torch 2.5.1 is older than 2.6, the oldest that runs no code out of pickled weights (CVE-2025-32434)."
        " Run: pip install 'torch>=2.6'",
        "llmbench: transformers 5.2.0 is older than 5.3, the oldest that runs no code of a model without "
        "trust_remote_code (CVE-2026-4372). Run: pip install 'transformers>=5.3,<6'",
    ]
    assert main(["doctor", "--json"]) == 0
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert items["torch"]["found"].startswith("2.5.1 is older than 2.6, ")
    assert items["torch"]["status"] == "limited"


def test_messages_name_commands_and_parameters_as_the_user_gave_them(
    store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *FAST]) == 0
    capsys.readouterr()
    assert main(["run", *FAST]) == 0
    reused = [line for line in capsys.readouterr().err.splitlines() if "measured before" in line]
    assert all(line.endswith("To measure it again: --rerun.") for line in reused)  # none if a busy machine disturbed it
    assert main(["promote", "models:/none/1"], program=MODULE) == 2
    assert "`python -m mlflow_llmbench register --name none`" in capsys.readouterr().err
    assert main(["promote", "models:/none/1"]) == 2
    assert "`llmbench register --name none`" in capsys.readouterr().err
    assert main(["runn"], program=MODULE) == 2
    assert "See `python -m mlflow_llmbench --help`." in capsys.readouterr().err
