"""Nothing outside a results folder is read, uploaded or written, whatever links and paths somebody has put into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.measure.own_files import own_files

from .test_upload import CELL, elsewhere

__all__ = ["elsewhere"]

SECRET = "of another folder, which is nobody's business"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, store_template: Path) -> Path:
    """The folder of a sweep of two cells."""
    root = tmp_path_factory.mktemp("measured")
    shutil.copy(store_template, root / "mlflow.db")
    uri = f"sqlite:///{root}/mlflow.db"
    return run(model="fake:ttft_ms=1", batch_size="1,2", output_dir=str(root), tracking_uri=uri, **CELL).folder


def plant_file(folder: Path, outside: Path) -> None:
    (folder / "artifacts" / "passwd.txt").symlink_to(outside / "secret.txt")


def plant_folder(folder: Path, outside: Path) -> None:
    (folder / "artifacts" / "more").symlink_to(outside)


def plant_hard_link(folder: Path, outside: Path) -> None:
    os.link(outside / "secret.txt", folder / "artifacts" / "hard.txt")


def plant_pipe(folder: Path, outside: Path) -> None:
    os.mkfifo(folder / "artifacts" / "pipe.txt")


def plant_charts(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder.parent / "comparison" / "charts", ignore_errors=True)
    (folder.parent / "comparison" / "charts").symlink_to(outside)


def plant_goodput(folder: Path, outside: Path) -> None:
    (folder.parent / "comparison" / "goodput.json").symlink_to(outside / "secret.txt")


def plant_log_of_a_killed_command(folder: Path, outside: Path) -> None:
    (folder.parent / "ended.json").unlink()
    (folder.parent / ".claim").unlink(missing_ok=True)
    (folder.parent / ".claim").symlink_to(outside / "secret.txt")
    (folder / "other.log").symlink_to(outside / "log.txt")


def plant_result(folder: Path, outside: Path) -> None:
    shutil.move(folder / "artifacts" / "result.json", outside / "result.json")
    (folder / "artifacts" / "result.json").symlink_to(outside / "result.json")


def plant_artifacts_of_a_killed_command(folder: Path, outside: Path) -> None:
    (folder.parent / "ended.json").unlink()
    shutil.rmtree(folder / "artifacts")
    (folder / "artifacts").symlink_to(outside)


@pytest.mark.parametrize(
    ("plant", "arrive"),
    [
        (plant_file, 2), (plant_folder, 2), (plant_hard_link, 2), (plant_pipe, 2), (plant_charts, 2),
        (plant_goodput, 2), (plant_log_of_a_killed_command, 2), (plant_result, 1),
        (plant_artifacts_of_a_killed_command, 2),
    ],
)  # fmt: skip
def test_what_a_link_leads_to_stays_where_it_is(
    plant: Callable[[Path, Path], None],
    arrive: int,
    measured: Path,
    elsewhere: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outside, root = tmp_path / "outside", tmp_path / measured.name
    shutil.copytree(measured, root)
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (outside / "log.txt").write_text(f"{SECRET} password=abcdefghijk")
    plant(next(file.parent for file in sorted(root.glob("*/cell.json"))), outside)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    code = main(["upload", str(root), "--tracking-uri", elsewhere])
    told = capsys.readouterr()
    assert code == 1
    assert "was left out: only files of the folder itself are uploaded. Put a copy in its place" in told.err
    assert f"{arrive + 1} runs uploaded" in told.out
    assert {path: path.read_bytes() for path in outside.iterdir()} == before
    store = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(outside)]
    for path in store:
        inside = path.is_relative_to(root) and path not in own_files(root)
        assert inside or SECRET.encode() not in path.read_bytes(), path


def test_the_files_that_its_parameters_name_are_not_looked_at(
    measured: Path,
    elsewhere: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They may be on another machine, or be anything here."""
    root = tmp_path / measured.name
    shutil.copytree(measured, root)
    os.mkfifo(tmp_path / "pipe")
    known = json.loads((root / "sweep.json").read_text())
    for name in ("workload", "quality_text"):
        for path in ("/absent/file.jsonl", str(tmp_path / "pipe"), "/etc/passwd"):
            known["parameters"][name] = path
            (root / "sweep.json").write_text(json.dumps(known))
            assert main(["upload", str(root), "--tracking-uri", elsewhere]) == 0, capsys.readouterr().err
