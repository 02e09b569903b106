"""The notebook in examples/: it runs, its committed outputs are those of a run, and progress is shown in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra dev: nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="needs the extra dev: nbclient and ipykernel")

FILE = Path(__file__).parents[2] / "examples" / "notebook.ipynb"
FAKE = (
    'run(model="fake:ttft_ms=1+itl_ms=1", backend="fake", batch_size=[1, 2], output_tokens=4, repetitions=5, warmup=1)'
)


def outputs(notebook: Any) -> list[Any]:
    """Outputs of each code cell."""
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def executed(notebook: Any, folder: Path) -> Any:
    return nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(folder)}}).execute()


def test_the_committed_outputs_are_whole_and_name_no_place_of_a_machine() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    shown = outputs(notebook)
    assert [bool(of) for of in shown] == [False, True, True, True, True, True, True, True]
    kinds = {output.output_type for of in shown for output in of}
    assert kinds <= {"display_data", "execute_result", "stream"}
    assert not any(f"{root}/" in json.dumps(shown) for root in ("/home", "/root", "/tmp", "/work", "/Users"))


def test_progress_is_shown_in_place_and_a_result_as_a_table(store_uri: str, tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in ("from mlflow_llmbench import run", f"result = {FAKE}", "result")
    ]
    _, [progress], [table] = outputs(executed(nbformat.v4.new_notebook(cells=cells), tmp_path))
    assert progress.output_type == "display_data", "one output, replaced in place"
    html, text = progress.data["text/html"], progress.data["text/plain"]
    assert html.count("✓") == text.count("✓") == 2 and "tokens/s" in text
    assert "repetition" not in text, "what was redrawn is gone at the end"
    assert "<table>" in table.data["text/html"] and table.data["text/plain"].startswith("<SweepResult in ")


def test_an_error_is_one_line_in_a_notebook(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell('import mlflow_llmbench\nmlflow_llmbench.run(quant="int5")')
    cell.metadata["tags"] = ["raises-exception"]
    [[error]] = outputs(executed(nbformat.v4.new_notebook(cells=[cell]), tmp_path))
    assert error.ename == "UsageError" and error.evalue.startswith("Unknown quant: int5. ")
    assert error.traceback == [f"UsageError: {error.evalue}"]


def test_the_notebook_runs(store_uri: str, tmp_path: Path) -> None:
    committed = nbformat.read(FILE, as_version=4)
    kinds = [[output.output_type for output in of] for of in outputs(committed)]
    run = executed(nbformat.read(FILE, as_version=4), tmp_path)
    assert [[output.output_type for output in of] for of in outputs(run)] == kinds
    assert "Unknown quant: int5. " in outputs(run)[-1][0].text
