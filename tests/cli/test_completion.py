"""Completion of commands, options and values, asked for as the scripts of the shells do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.backends import RUNTIMES

ROOT = Path(__file__).resolve().parents[2]


def completed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What bash is told for a line of which the last word is incomplete."""
    monkeypatch.setenv("_LLMBENCH_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    assert main([]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("llmbench re", ["plain,reproduce", "plain,recommend", "plain,register"]),
        ("llmbench run --mem", ["plain,--memory-limit"]),
        ("llmbench run --quant int4,int8-w", ["plain,int4,int8-wo"]),
        ("llmbench run --weights ", ["plain,hub", "plain,random"]),
        ("llmbench run --repetitions a", ["plain,auto"]),
        ("llmbench run --model gemma-3-2", ["plain,gemma-3-270m"]),
        ("llmbench run --model ./", ["file,./"]),
        ("llmbench run --workload su", ["plain,summarization"]),
        ("llmbench run --workload prompts/", ["file,prompts/"]),
        ("llmbench run --backend ", [f"plain,{name}" for name in RUNTIMES]),
        ("llmbench run --output-dir r", ["dir,r"]),
        ("llmbench export models:/bot/1 --for dock", ["plain,docker-compose"]),
        ("llmbench compare a b --allow hardware,so", ["plain,hardware,software"]),
        ("llmbench completion z", ["plain,zsh"]),
        ("llmbench nonsense --x", []),
    ],
)
def test_what_can_follow(
    line: str, found: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(line, monkeypatch, capsys) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_this_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"_LLMBENCH_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    program = tmp_path / "llmbench"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlflow_llmbench "$@"\n')
    program.chmod(0o755)
    typed = (
        'eval "$(llmbench completion bash)"; COMP_WORDS=(llmbench run --attention sd); COMP_CWORD=3; '
        '_llmbench_completion llmbench; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("sdpa\n", "")
