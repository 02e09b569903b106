"""Look at the logits of a measured cell, in a pass that is not timed.

A model that overflows gives tokens as fast as one that does not, and greedy decoding makes an ordinary id of a NaN. So
one repetition is done again, with its prompts, batch, length and decode path, and the logits of each step are seen. It
is the one that looks most like NaN: an arg max over NaNs is 0, and what is NaN once stays so, because it is in the
cache.
"""

from __future__ import annotations

import sys
from typing import cast

from ..backends.base import Backend, WatchedBackend
from ..records.cell import Cell
from ..records.errors import LlmbenchError
from ..records.results import CellMeasurements, LogitsCheck
from ..workloads.prompts import PromptSet
from .batch import checked_ids, time_turns, turns_of
from .stream import serve_untimed

MOST_ROWS = 4
"""Rows of a batch that are scored one by one, where the steps themselves cannot be seen."""


def check_logits(
    backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, measured: CellMeasurements
) -> LogitsCheck | None:
    """Return what was seen; None if the backend shows no logits, or if the pass failed, which the log then says.

    Called after the peak memory was read.
    """
    zeros = measured.zeros or (0,)
    index = zeros.index(max(zeros))
    try:
        if hasattr(backend, "watch_logits"):
            with cast(WatchedBackend, backend).watch_logits() as watch:
                if cell.batching:
                    serve_untimed(backend, cell, prompts, vocab_size, index)
                if not watch.checked:  # also where a replayed graph calls nothing of ours
                    turns = turns_of(backend, cell, prompts, vocab_size, index)
                    time_turns(backend, turns, cell.output_tokens, cell.history == "kept")
            return LogitsCheck(watch.checked, watch.nonfinite, watch.first_token, index, watch.weights())
        return _scored(backend, cell, prompts, vocab_size, index) if backend.capabilities.logits else None
    except (LlmbenchError, MemoryError) as error:
        print(f"Logits were not checked: {error or 'memory ran out'}", file=sys.stderr)
        return None


def _scored(backend: Backend, cell: Cell, prompts: PromptSet, vocab_size: int, index: int) -> LogitsCheck:
    """Score rows of a repetition with their own answers, for engines that choose tokens themselves."""
    checked = nonfinite = 0
    first: int | None = None
    sent = turns_of(backend, cell, prompts, vocab_size, index)[0][:MOST_ROWS]
    steps: list[object] = []
    backend.generate(sent, cell.output_tokens, steps.append)
    for prompt, answer in zip(sent, zip(*checked_ids(steps, len(sent)), strict=True), strict=True):
        finite = backend.logits([*prompt, *answer[:-1]], len(answer)).isfinite().all(-1).tolist()
        checked += len(finite)
        nonfinite += finite.count(False)
        found = finite.index(False) + 1 if False in finite else None
        first = found if first is None or (found is not None and found < first) else first
    return LogitsCheck(checked, nonfinite, first, index)
