"""Findings that need several results of a sweep: a server and none, several ranks and one, the limits of a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..analysis import goodput, parallel, server_overhead
from ..config.cells import without_server
from ..records.cell import Options
from ..records.codec import to_json
from ..records.results import RunResult


@dataclass(frozen=True)
class CrossFindings:
    """Findings across the results of a sweep.

    `added`: extra metrics of each result, in order · `figures`: metrics of the whole sweep · `sentences`: for people ·
    `limits`: the limits that a search found.
    """

    added: tuple[Mapping[str, float], ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    sentences: tuple[str, ...] = ()
    limits: tuple[goodput.GoodputLimit, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the content of goodput.json: every limit of a search.

        With several configurations, only this file has their limits; `figures` has none.
        """
        return {"limits": [{**to_json(limit), "sentence": limit.sentence()} for limit in self.limits]}


def cross_findings(results: Sequence[RunResult], names: Sequence[str], options: Options) -> CrossFindings:
    """Return the findings across the results of one sweep; `names` are those of their runs, in the same order."""
    whole = {result.cell: result for result in results if result.outcome == "ok" and result.repetitions}
    added: list[dict[str, float]] = []
    sentences: list[str] = []
    for result, name in zip(results, names, strict=True):
        offline = (
            whole.get(without_server(result.cell))
            if options.twin and result.cell.launch and result.cell in whole
            else None
        )
        added.append(server_overhead.added(offline, result) if offline else {})
        sentences += [server_overhead.sentence(name, added[-1])] if offline else []
        ranks = result.cell.tensor_parallel
        several = ranks > 1 and result.cell in whole
        if one := whole.get(dataclasses.replace(result.cell, tensor_parallel=1)) if several else None:
            added[-1] |= parallel.gained(one, result)
            sentences.append(parallel.sentence(name, one, result, added[-1]))
    limits = goodput.limits(results, options.attainment) if options.find else []
    sentences += [limit.sentence() for limit in limits]
    figures = limits[0].figures() if len(limits) == 1 else {}
    return CrossFindings(tuple(added), figures, tuple(sentences), tuple(limits))
