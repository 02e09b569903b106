"""Registered versions, promotions and logged decisions as text for a terminal."""

from __future__ import annotations

from ..records.invocation import command_text
from ..records.redaction import redact


def format_registered(uri: str, alias: str, run_id: str, new: bool, served: bool = True) -> str:
    """Return what was registered and how to serve it. `uri` is `models:/NAME/VERSION`, `run_id` its evidence."""
    name = uri.removeprefix("models:/").rpartition("/")[0]
    serve = (
        f"Serve it: mlflow models serve -m models:/{name}@{alias} --env-manager local"
        if served
        else "It can be gated and promoted, but not served: its backend is scripted and has no answers."
    )
    done = "Registered" if new else "Already registered as"
    return f"{done} {uri}, alias {alias}. Its evidence is the run {run_id}.\n{serve}"


def format_promoted(uri: str, before: str | None) -> str:
    """Return the new champion and the way back to version `before`, None for the first champion of its name."""
    name = uri.removeprefix("models:/").rpartition("/")[0]
    if before is None:
        return f"{uri} is the champion of {name}. It is the first, so there was nothing to gate it against."
    return (
        f"{uri} is the champion of {name}.\n"
        f"Version {before} is kept as previous. To go back: {command_text('promote', f'models:/{name}@previous')}"
    )


def format_logged(run_id: str | None, store_uri: str, sweep: str, offer: str = "", kept: bool = False) -> str:
    """Return where a recommendation was logged (`run_id` is None if it was not), and a sentence on registering it.

    `kept`: it has no winner and was not logged, because the run holds a recommendation with one.
    """
    if run_id is None:
        return f"Not logged: the store {redact(store_uri)} has no run of the sweep {sweep}."
    if kept:
        return f"Not logged: the run {run_id} keeps its earlier recommendation, which has a winner."
    return f"Logged on run {run_id}: recommendation.md. {offer}".rstrip()
