"""The command that measures two configurations in turns: it works as printed."""

from __future__ import annotations

import dataclasses
import shlex

from mlflow_llmbench.analysis.in_turns import command_in_turns
from mlflow_llmbench.records.backends import backend_of
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.workflows.ab import parse_side, parse_sides

BASE = Cell(model="opt-125m", weights="random", quant="bf16", batch_size=4, device="cpu")


def planned(command: str) -> list[Cell]:
    """The cells that `ab` measures if a command is typed as printed."""
    program, name, a, b, *options = shlex.split(command)
    assert (program, name) == ("llmbench", "ab")
    keys, values = options[::2], options[1::2]
    common = {key.removeprefix("--").replace("-", "_"): value for key, value in zip(keys, values, strict=True)}
    requests, _ = parse_sides(parse_side(a), parse_side(b), common, 6)
    cells = [request.first for request in requests]
    return [dataclasses.replace(cell, backend=backend_of(cell.backend, cell.quant)) for cell in cells]


def test_the_printed_command_measures_both_cells() -> None:
    for other in (
        dataclasses.replace(BASE, quant="int4"),
        dataclasses.replace(BASE, quant="q4_k_m", backend="llama_cpp"),
        dataclasses.replace(BASE, threads=2, batch_size=8),
        BASE,
    ):
        expected = [dataclasses.replace(cell, processes=6) for cell in (BASE, other)]
        assert planned(command_in_turns(BASE, other)) == expected
    text = command_in_turns(BASE, dataclasses.replace(BASE, quant="int4", processes=5))
    assert text == "llmbench ab quant=bf16 quant=int4 --model opt-125m --weights random --batch-size 4 --device cpu"


def test_what_cannot_be_filled_in_is_the_name_alone() -> None:
    for other in (
        dataclasses.replace(BASE, model="a folder/with blanks"),
        dataclasses.replace(BASE, url="http://127.0.0.1:8000"),
        dataclasses.replace(BASE, trust_remote_code=True),
    ):
        assert command_in_turns(BASE, other) == "llmbench ab"
