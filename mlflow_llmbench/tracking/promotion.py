"""Verdicts of gates on registered versions, and the promotion of a version to champion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..analysis.decisions.gate import PASS
from ..records.errors import UsageError
from ..records.invocation import command_text
from .explanations import plain_errors
from .registry import CHAMPION, PREVIOUS, Registered, registered_at, run_at, stored_config
from .runs import set_tags
from .store import Store


def log_gate(
    store: Store,
    run_id: str,
    champion: Registered,
    verdict: str,
    why: str,
    accepted_suspect: str | None,
    folder: Path,
    measured: str | None = None,
) -> None:
    """Store a gate's verdict with the candidate's run: as tags, and its files under `gate/`. Raises TrackingError.

    `measured`: the run in which both sides were measured again for the gate, None if their own runs were used.
    """
    tags = {
        "gate": verdict,
        "gate_against": champion.uri,
        "gate_why": why,
        "gate_accepted_suspect": accepted_suspect or "",
        "gate_measured": measured or "",
    }
    set_tags(store, run_id, tags)
    with plain_errors(store.uri):
        store.client.log_artifacts(run_id, str(folder), "gate")


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion: the new champion, and the version of the former one (None for the first)."""

    champion: Registered
    before: str | None


def promote(store: Store, reference: str) -> Promotion:
    """Make a version the champion, and the former champion `previous`.

    The version must have passed its last gate, against the present champion. No gate is needed for the first champion
    of a name, which has nothing to compare with, nor for going back to `previous`, which was champion before. Raises
    UsageError, TrackingError.
    """
    new = registered_at(store, reference)
    stored_config(store, new)
    aliases: dict[str, str] = {
        alias: str(version) for alias, version in store.client.get_registered_model(new.name).aliases.items()
    }
    before = aliases.get(CHAMPION)
    if before == new.version:
        raise UsageError(f"{new.uri} is the champion already. Nothing was moved.")
    if before is not None and aliases.get(PREVIOUS) != new.version:
        _require_gate(store, new, before)
    with plain_errors(store.uri):
        if before is not None:
            store.client.set_registered_model_alias(new.name, PREVIOUS, before)
        store.client.set_registered_model_alias(new.name, CHAMPION, new.version)
    return Promotion(new, before)


def _require_gate(store: Store, new: Registered, champion: str) -> None:
    tags = run_at(store, new.run_id).data.tags
    verdict, against, present = (
        tags.get("llmbench.gate"),
        tags.get("llmbench.gate_against"),
        f"models:/{new.name}/{champion}",
    )
    if verdict == PASS and against == present:
        return
    why = (
        "has not been gated"
        if verdict is None
        else f"was gated against {against}"
        if against != present
        else f"did not pass its gate ({verdict})"
    )
    raise UsageError(
        f"{new.uri} {why}, and the champion is {present}. Nothing was moved. "
        f"Run: {command_text('gate', new.uri, against=present)}"
    )
