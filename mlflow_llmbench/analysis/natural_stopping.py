"""Figures of the answers as long as the model itself makes them, beside those of the forced length. Pure.

A forced length goes past the token by which the model ends its answer, and greedy decoding chooses the same tokens up
to there. So the time at which a model that may stop has answered is the stamp of that token.
"""

from __future__ import annotations

from ..records.metrics import ENDED, NATURAL_E2E, NATURAL_TOKENS
from ..records.results import RunResult
from .figures import Figures, distribution


def natural_figures(result: RunResult) -> Figures:
    """Return the natural lengths, the share of answers that end, and their times if a batch has one row.

    In a larger batch an answer that ends does not free its row, so it has no time of its own. Empty without texts.
    """
    if not result.natural:
        return {}
    found = distribution(NATURAL_TOKENS, [float(count) for count in result.natural if count])
    found |= {ENDED.key(): sum(count is not None for count in result.natural) / len(result.natural)}
    if result.cell.batch_size > 1:
        return found
    pairs = zip(result.natural, (one.requests[0] for one in result.repetitions), strict=False)
    times = [(r.stamps_ns[n - 1] - r.t0_ns) / 1e6 for n, r in pairs if n and r.single_tokens and n <= len(r.stamps_ns)]
    return found | distribution(NATURAL_E2E, times)
