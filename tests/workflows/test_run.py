"""`run` and `online` as Python sees them: signature, docstring, types, progress, errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import mlflow_llmbench
from mlflow_llmbench import LlmbenchError, online, run
from mlflow_llmbench.config.spec import COMMANDS, parse
from mlflow_llmbench.measure.events import Event
from mlflow_llmbench.records.cell import PARAMETERS
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.reports.result import Row
from mlflow_llmbench.sweeps.progress import NullListener

SHORT = {"backend": "fake", "prompt_tokens": 4, "output_tokens": 6, "warmup": 1, "repetitions": 5}
OWN = ["progress", "tracking_uri", "experiment"]


@pytest.mark.parametrize(("function", "command"), [(run, "run"), (online, "online")])
def test_the_signature_has_the_declared_parameters(function: Callable[..., Any], command: str) -> None:
    given = inspect.signature(function).parameters
    assert list(given) == [*COMMANDS[command], *OWN]
    assert {one.kind for one in given.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(get_type_hints(function)) == {*given, "return"}
    told = inspect.getdoc(function) or ""
    assert all(
        f"\n    {name}{' †' if PARAMETERS[name].metadata['sweep'] else ''}: " in told for name in COMMANDS[command]
    )
    assert max(map(len, told.splitlines())) <= 120


def test_a_value_without_a_name_is_refused_with_its_name() -> None:
    unnamed: Any = run
    with pytest.raises(UsageError) as error:
        unnamed("opt-125m", quant="int4")
    assert str(error.value) == 'run takes parameters by name only: "opt-125m". Write run(model="opt-125m").'
    with pytest.raises(UsageError, match=r"Write run\(model=\.\.\.\)\.$"):
        unnamed(["opt-125m"])
    served: Any = online
    with pytest.raises(UsageError, match=r'Write online\(url="http://h:8000"\)\.$'):
        served("http://h:8000")


def test_the_defaults_in_the_signature_are_those_of_the_declaration() -> None:
    given = inspect.signature(run).parameters
    defaults = {name: given[name].default for name in COMMANDS["run"]}
    assert defaults["repetitions"] == "auto" and defaults["price_per_hour"] is None and defaults["batch_size"] == 1
    assert parse({name: value for name, value in defaults.items() if value is not None}) == parse({})


def test_every_public_function_has_types_and_a_docstring() -> None:
    for name in set(mlflow_llmbench.__all__) - {"LlmbenchError", "__version__"}:
        function = getattr(mlflow_llmbench, name)
        given = inspect.signature(function).parameters.values()
        assert inspect.getdoc(function), name
        assert all(one.annotation is not inspect.Parameter.empty for one in given), name
        assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in given), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_sise": 1}, "Unknown parameter: batch_sise. Did you mean batch_size? "),
        ({"quant": ["int4", "int5"]}, "Unknown quant: int5. "),
        ({"weights": "none"}, "Unknown weights: none. "),
        ({"batch_size": 0}, "batch_size is too small: 0. The smallest is 1."),
    ],
)
def test_an_error_is_an_exception_with_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmbenchError) as caught:
        run(**given)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


class Rows(NullListener):
    def __init__(self) -> None:
        self.names: set[str] = set()
        self.events: list[Event] = []

    def row(self, name: str, row: Row) -> None:
        self.names.add(name)

    def event(self, event: Event) -> None:
        self.events.append(event)


def test_progress_is_shown_where_it_is_asked_for(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = "fake:ttft_ms=1+itl_ms=1"
    listener = Rows()
    assert run(model=model, batch_size=[1, 2], progress=listener, tracking_uri=store_uri, **SHORT).outcome == "ok"  # type: ignore[arg-type]
    assert listener.names == {f"{model} b1", f"{model} b2"} and listener.events
    assert capsys.readouterr().err == ""
    run(model=model, progress=True, rerun=True, tracking_uri=store_uri, **SHORT)  # type: ignore[arg-type]
    assert "cell 1/1: " in capsys.readouterr().err
    run(model=model, rerun=True, tracking_uri=store_uri, **SHORT)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_a_real_model_with_texts_has_its_forward_pass_and_its_natural_lengths(tiny_model: Path, store_uri: str) -> None:
    done = run(
        model=str(tiny_model), workload="qa", prompt_tokens=16, output_tokens=6, warmup=1, repetitions=5,
        tracking_uri=store_uri,
    )  # fmt: skip
    [row] = done.rows
    assert row.metrics["latency/forward_ms_p50"] > 0
    assert 0 <= row.metrics["lengths/ended_ratio"] <= 1
    assert ("latency/natural_e2e_ms_mean" in row.metrics) is (row.metrics["lengths/ended_ratio"] > 0)
