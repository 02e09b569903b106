"""Registered versions: register a measured configuration, promote it to champion, export it for another engine."""

from __future__ import annotations

import os
from pathlib import Path

from ..analysis.decisions import export as analysis
from ..measure.journal import write_text
from ..tracking import promotion, registry
from ..tracking.latest import resolve
from ..tracking.promotion import Promotion
from ..tracking.registry import CANDIDATE, Registered
from ..tracking.store import open_store


def register(
    reference: str | os.PathLike[str],
    name: str,
    alias: str = CANDIDATE,
    *,
    accept_suspect: str | None = None,
    tracking_uri: str | None = None,
) -> Registered:
    """Register a measured run, or the winner of a recommendation, as a version of `name`. See `registry.register`."""
    reference, _ = resolve(reference, tracking_uri)
    registry.check_request(reference, name, alias)
    return registry.register(open_store(tracking_uri, reads=True), reference, name, alias, accept_suspect)


def promote(version: str, *, tracking_uri: str | None = None) -> Promotion:
    """Make a version that has passed its gate the champion of its name. See `promotion.promote`."""
    return promotion.promote(open_store(tracking_uri, reads=True), version)


def export(version: str, target: str, *, output: str | None = None, tracking_uri: str | None = None) -> tuple[str, str]:
    """Return the URI of a registered version, and the command or manifest that serves it with `target`.

    The text is also written to the file `output`. Raises UsageError, TrackingError or JournalError.
    """
    store = open_store(tracking_uri, reads=True)
    found = registry.registered_at(store, version)
    text = analysis.export(*registry.stored_config(store, found), uri=found.uri, target=target)
    if output:
        write_text(Path(output), text)
    return found.uri, text
