"""The seam to a model that several processes run together, and the memory of all of them.

The worker is rank 0: it is measured, and its stamps are those of all ranks, because a token is there only after the
collectives in which every rank takes part. The other ranks are processes that the backend starts. They make the same
calls, hold their own parts of the model, and report nothing but their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..system.memory import HostMemory
from .base import Backend, DeviceMemory


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank now. `mapped`: bytes of its parameters that lie in file mappings."""

    host: HostMemory | None
    device: DeviceMemory | None = None
    mapped: int = 0


class ParallelBackend(Backend, Protocol):
    """A backend that can run one model in several ranks, as many as `tensor_parallel` of its cell."""

    rank_pids: tuple[int, ...]  # of the other ranks, once they are started

    def start_ranks(self) -> None:
        """Start the other ranks, and wait until each has imported its libraries.

        Called before `peaks`, and only for several ranks. Raises MeasurementError.
        """

    def ready(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        """Hand the next call of `generate` to the other ranks, and wait until all of them are about to make it.

        Called before a timed region, which then holds no message to another process.
        """

    def rank_memory(self) -> tuple[RankMemory, ...]:
        """Return the memory of each rank, this process first."""

    def collective_share(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> float | None:
        """Generate once, not for timing; return the share of the time that this rank spent in collectives.

        Waiting for other ranks is part of it. None if it cannot be seen.
        """

    def end_ranks(self) -> None:
        """End the other ranks, whatever they are doing. Called last."""


def rank_pids(backend: Backend) -> tuple[int, ...]:
    """Return the ids of the processes that run the model beside the worker; empty for most backends."""
    return tuple(getattr(backend, "rank_pids", ()))


def host_of(ranks: Sequence[RankMemory]) -> HostMemory | None:
    """Return the host memory of all ranks together; None if it cannot be read for one of them.

    File pages count once where ranks share them: those of the first rank, and of each other one its parameters in file
    mappings. Anonymous pages are never shared. The peak is the sum of the ranks' peaks, which they reach in step.
    """
    first, *others = [rank.host for rank in ranks]
    if first is None or any(one is None or one.anonymous is None for one in others):
        return first if first and not others else None
    rss, anonymous, peak = first.rss, first.anonymous, first.peak_rss
    for rank in ranks[1:]:
        added, spike = _beside(rank)
        rss += added
        anonymous = None if anonymous is None else anonymous + (rank.host.anonymous or 0 if rank.host else 0)
        peak = None if peak is None or spike is None else peak + spike
    return HostMemory(rss, anonymous, peak)


def _beside(rank: RankMemory) -> tuple[int, int | None]:
    """Return what a rank adds to the resident memory of the first one, now and at its peak."""
    host = rank.host
    if host is None or host.anonymous is None:
        return 0, None
    own = host.anonymous + rank.mapped
    return own, None if host.peak_rss is None else own + max(host.peak_rss - host.rss, 0)


def device_of(ranks: Sequence[RankMemory]) -> DeviceMemory | None:
    """Return the device memory of all ranks together, each on its own device; None without devices."""
    found = [rank.device for rank in ranks if rank.device]
    if not found or len(found) < len(ranks):
        return None
    drivers = [one.driver for one in found if one.driver is not None]
    return DeviceMemory(
        sum(one.allocated for one in found),
        sum(one.reserved for one in found),
        sum(one.peak_reserved for one in found),
        sum(drivers) if len(drivers) == len(found) else None,
    )
