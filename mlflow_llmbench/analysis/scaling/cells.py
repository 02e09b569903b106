"""Measured cells for the study of scaling: their variables, names, and groups that differ in one setting."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...records.calibration import Calibration
from ...records.cell import Cell, differing
from ...records.metrics import PROMPT_TOKENS, TTFT
from ...records.results import RunResult, Verdict
from ..comparison import UNNAMED
from ..layout import moved
from ..repetitions import PER_REPETITION, unit_values
from ..summary import hardware_name, summarize
from ..verdict import judge

MEDIAN_TTFT = TTFT.key("p50")


MOST_NAMED = 4
"""Most models that a heading names."""


@dataclass(frozen=True)
class Measured:
    """A usable result with its summary metrics. `calibrations`: as in `compare`."""

    result: RunResult
    metrics: Mapping[str, float]
    calibrations: tuple[Calibration, ...] = ()

    @property
    def cell(self) -> Cell:
        """The cell that was measured."""
        return self.result.cell

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict on the result."""
        return judge(self.result)

    @property
    def is_suspect(self) -> bool:
        """True if the figures are to be taken with care; charts and tables mark them."""
        return self.verdict.word == "suspect"

    @property
    def dtype(self) -> str:
        """The dtype of the loaded weights, by torch's name; empty if unknown."""
        return str(self.result.load.facts.get("model.dtype", "")) if self.result.load else ""

    def variable(self, name: str) -> float | None:
        """Return a law's x: a setting, `parameters` in 10⁹, or `held_tokens` = batch · (prompt + output).

        None if the number of parameters or of prompt tokens is unknown.
        """
        prompt = self.metrics.get(PROMPT_TOKENS.key())
        if name == "parameters":
            count = parameter_count(self.result)
            return count / 1e9 if count else None
        if name == "held_tokens":
            return None if prompt is None else self.cell.batch_size * (prompt + self.cell.output_tokens)
        return prompt if name == "prompt_tokens" else float(getattr(self.cell, name))

    def values(self, metric: str) -> list[float]:
        """Return the metric's values above 0, per repetition, or per process if there are several.

        Empty for a metric that a run has only once.
        """
        of = PER_REPETITION.get(metric)
        found = unit_values(self.result, of) if of else None
        return [value for value in found or [] if value > 0]


def parameter_count(result: RunResult) -> float | None:
    """Return the number of parameters of the loaded model; None if it is unknown."""
    count = result.load.facts.get("model.parameters") if result.load else None
    return float(count) if count else None


def select_usable(
    results: Sequence[RunResult], calibrations: Sequence[Calibration] = ()
) -> tuple[list[Measured], list[str]]:
    """Return one result of each configuration with a valid or suspect verdict, and a line on each result left out.

    If a configuration was measured several times with one hardware and software, the newest valid result counts, else
    the newest, in every figure, law and sentence.
    """
    kept: list[tuple[Measured, str]] = []
    left_out: list[str] = []
    newest: dict[tuple[str, str], tuple[bool, int]] = {}
    varied = varied_settings([result.cell for result in results])
    for result in {(*_configuration(result), result.started_ms): result for result in results}.values():
        metrics = summarize(result)
        verdict_ = judge(result, metrics)
        name = describe(result.cell, varied)
        if verdict_.word == "invalid":
            why = result.outcome if result.failure else ", ".join(reason.code for reason in verdict_.reasons)
            left_out.append(f"{name}: {why}")
        elif result.cell.batching:
            left_out.append(f"{name}: a stream of requests; the laws hold for batches of one shape")
        elif away := moved(result):
            left_out.append(f"{name}: {away}; the laws hold for models in one place")
        elif not result.repetitions:
            left_out.append(f"{name}: no repetitions")
        else:
            kept.append((Measured(result, metrics, tuple(calibrations)), name))
            rank = _rank(result)
            newest[_configuration(result)] = max(newest.get(_configuration(result), rank), rank)
    chosen = []
    for measured, name in kept:
        if newest[_configuration(measured.result)] == _rank(measured.result):
            chosen.append(measured)
        else:
            left_out.append(f"{name}: measured again; the newest valid result of a configuration counts")
    return chosen, left_out


def _configuration(result: RunResult) -> tuple[str, str]:
    return result.hashes.config, result.hashes.env


def _rank(result: RunResult) -> tuple[bool, int]:
    return judge(result, summarize(result)).word == "valid", result.ended_ms


def varied_settings(cells: Sequence[Cell]) -> list[str]:
    """Return the settings in which cells differ, without those that only control how long is measured."""
    return differing(cells, UNNAMED)


def describe(cell: Cell, names: Sequence[str]) -> str:
    """Name a cell by the given settings: `opt-125m int8 batch_size=4`. Without any, by model and quantization."""
    model = cell.model.rstrip("/").rsplit("/", 1)[-1]
    short = {"model": f"{model} {cell.prune}" if cell.prune else model, "quant": cell.quant}
    names = [name for name in names if name != "prune" or "model" not in names]  # it stands with the model
    return " ".join(short[name] if name in short else f"{name}={getattr(cell, name)}" for name in names or short)


def models_text(cells: Sequence[Measured]) -> str:
    """List the names of the cells' models, at most `MOST_NAMED` of them."""
    names = list(dict.fromkeys(describe(measured.cell, ["model"]) for measured in cells))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def subject(cells: Sequence[Measured]) -> str:
    """Name the cells by their models, and by their quantization if all have the same."""
    quants = {measured.cell.quant for measured in cells}
    return " ".join([models_text(cells), *(quants if len(quants) == 1 else ())])


def machine_names(cells: Sequence[Measured]) -> dict[str, str]:
    """Map the environment hash of each machine to its name, with the hash if machines with other software share it."""
    names = {m.result.hashes.env: hardware_name(m.result) for m in cells}
    alike = Counter(names.values())
    return {env: f"{name} [{env[:6]}]" if alike[name] > 1 else name for env, name in names.items()}


def grouped(cells: Sequence[Measured], freed: Sequence[str]) -> Iterator[tuple[str, list[Measured]]]:
    """Yield (name, cells) of groups that differ only in the freed settings, on one machine with one software.

    Groups are sorted by their settings and named by those that vary between them. Models share a group only if their
    weights have the same dtype, since `none` can mean a different one for each, and, if prompts are as long as their
    texts, only with the same workload.
    """
    fixed = [f.name for f in dataclasses.fields(Cell) if f.name not in (*UNNAMED, *freed)]
    named = [name for name in varied_settings([c.cell for c in cells]) if name not in freed]
    machines = machine_names(cells)
    across = "model" in freed
    dtypes = {measured.dtype for measured in cells} if across else {""}
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for measured in cells:
        cell = measured.cell
        own = (cell.workload if across and cell.prompt_tokens is None else "", measured.dtype if across else "")
        key = (measured.result.hashes.env, *(getattr(cell, name) for name in fixed), *own)
        groups.setdefault(key, []).append(measured)
    for key in sorted(
        groups,
        key=lambda key: [
            (isinstance(v, str), v is None, v or 0) if not isinstance(v, str) else (True, False, v) for v in key
        ],
    ):
        first = groups[key][0]
        where = describe(
            first.cell,
            [name for name in named if name != "revision"]
            or [name for name in ("model", "quant") if name not in freed],
        )
        yield (
            where
            + (f" {key[-1]}" if len(dtypes) > 1 else "")
            + (f" on {machines[str(key[0])]}" if len(machines) > 1 else ""),
            groups[key],
        )
