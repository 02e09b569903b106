"""Every command of docs/tutorial.md, in its order, in one shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
SAID = (
    "Logged on run", "Registered models:/support-bot/1, alias candidate.",
    "models:/support-bot/1 is the champion of support-bot. It is the first",
    "REGRESSION: run ", "exit code 1", "PASSED: models:/support-bot/1 against models:/support-bot/1.",
    "Registered models:/support-bot/2, alias candidate.",
    "PASSED: models:/support-bot/2 against models:/support-bot/1.", "Version 1 is kept as previous.",
    "Version 2 is kept as previous.",
    "Equivalent within ±30 % in all of ", "llama.json: 1 measurement of llama-bench, 1 of them new.",
)  # fmt: skip
"""Expected output of the commands, in this order."""


def test_the_page_has_no_command_outside_its_blocks() -> None:
    assert len(BLOCKS) == TUTORIAL.count("```sh") == 8
    assert all(
        line.startswith(("llmbench ", "  ", "SWEEP=", "SLOW=", "FAST=", "cat ", "[{", "END"))
        for block in BLOCKS
        for line in block.splitlines()
    )


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(store_uri: str, tmp_path: Path) -> None:
    own = f'llmbench() {{ {shlex.quote(sys.executable)} -m mlflow_llmbench "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store_uri}
    done = subprocess.run(
        ["bash", "-e"],
        input=own + "\n".join(BLOCKS),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    place = 0
    for said in SAID:
        place = done.stdout.find(said, place)
        assert place >= 0, f"{said!r} is missing or out of order:\n{done.stdout}"
