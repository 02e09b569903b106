"""Figures of the single ranks of a model that runs in several. Pure; empty for one that does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..records.metric import GB, Metric, Series
from ..records.metrics import (
    COMMUNICATION,
    RANK_DEVICE,
    RANK_DEVICE_PEAKS,
    RANK_HOST,
    RANK_HOST_PEAKS,
    RANK_WEIGHT_PARTS,
    RANK_WEIGHTS,
)
from ..records.results import RankStages, RunResult
from .figures import Figures


def rank_figures(result: RunResult) -> Figures:
    """Metrics of the rank with most memory, and of the time in collectives, by MLflow key."""
    ranks, parts = result.memory.ranks or (), (result.load.ranks if result.load else None) or ()
    found: Figures = {COMMUNICATION.key(): result.collective_share}
    for metric in (RANK_HOST, RANK_DEVICE):
        for stage in metric.statistics:
            sizes = [size for rank in ranks if (size := _stages(rank, metric).get(stage)) is not None]
            found[metric.key(stage)] = max(sizes) / GB if sizes else None
    weights = max((part.weight_bytes for part in parts), default=None)
    return found | {RANK_WEIGHTS.key(): None if weights is None else weights / GB}


def _stages(rank: RankStages, metric: Metric) -> Mapping[str, int]:
    return rank.device if metric is RANK_DEVICE else rank.host_needed


def rank_series(result: RunResult) -> Iterator[tuple[Series, int, float]]:
    """Yield each rank's figures: series, number of the rank, and value in GB."""
    for rank, part in enumerate((result.load.ranks if result.load else None) or ()):
        yield RANK_WEIGHT_PARTS, rank, part.weight_bytes / GB
    for rank, stages in enumerate(result.memory.ranks or ()):
        for series, sizes in ((RANK_HOST_PEAKS, stages.host_needed), (RANK_DEVICE_PEAKS, stages.device)):
            if "peak" in sizes:
                yield series, rank, sizes["peak"] / GB
