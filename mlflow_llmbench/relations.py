"""What the results of a sweep say together and none of them alone: pairs with and without a server, the limits of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import goodput, plan, twin
from .cell import Options
from .records import RunResult, to_json


@dataclass(frozen=True)
class Relations:
    """`added`: metrics of each result beside its own · `figures`: metrics of the whole · `sentences`: for a person · `limits`: of a search."""

    added: tuple[Mapping[str, float], ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    sentences: tuple[str, ...] = ()
    limits: tuple[goodput.Limit, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What is kept of a search as goodput.json; of several configurations none has its limits among the figures."""
        return {"limits": [{**to_json(limit), "sentence": limit.sentence()} for limit in self.limits]}


def relate(results: Sequence[RunResult], names: Sequence[str], options: Options) -> Relations:
    """What results of one sweep, with the names of their runs, say of each other."""
    whole = {result.cell: result for result in results if result.outcome == "ok" and result.repetitions}
    added: list[dict[str, float]] = []
    sentences: list[str] = []
    for result, name in zip(results, names, strict=True):
        offline = (
            whole.get(plan.without_server(result.cell))
            if options.twin and result.cell.launch and result.cell in whole
            else None
        )
        added.append(twin.added(offline, result) if offline else {})
        sentences += [twin.sentence(name, added[-1])] if offline else []
    limits = goodput.limits(results, options.attainment) if options.find else []
    sentences += [limit.sentence() for limit in limits]
    figures = limits[0].figures() if len(limits) == 1 else {}
    return Relations(tuple(added), figures, tuple(sentences), tuple(limits))
