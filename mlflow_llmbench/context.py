"""A run-context provider of MLflow: tags the runs of any program with the fingerprint of the machine, where that is asked for.

Off unless MLFLOW_LLMBENCH_TAG_RUNS=1. MLflow loads this in the middle of its own import, in every program of the environment, and an
error here would end all of them: so it needs the standard library only, takes no base class of MLflow's, and reads the machine
when the first run is begun and not before. MLflow asks it at each `mlflow.start_run` that makes a run, and not for `mlflow run`, a resumed
run or a client's `create_run`; our own runs are tagged by `tracking`, with the same tags.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

TAG_RUNS = "MLFLOW_LLMBENCH_TAG_RUNS"
"""The environment variable that turns it on: 1, true, yes or on."""


def fingerprint_tags(environment: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The tags of the vocabulary that say where and with what a run ran, without their prefix; `gpu` is the one that it used."""
    packages, hashes = environment.get("packages") or {}, environment.get("hashes") or {}
    return {
        "env_hash": hashes.get("env"),
        "hardware_hash": hashes.get("hardware"),
        "software_hash": hashes.get("software"),
        "cpu": (environment.get("cpu") or {}).get("name"),
        "gpu": gpu["name"] if gpu else None,
        "gpu_driver": environment.get("driver") if gpu else None,
        "cuda": environment.get("cuda") if gpu else None,
        "torch": packages.get("torch"),
        "transformers": packages.get("transformers"),
    }


@functools.cache
def _tags_here() -> dict[str, str]:
    """Those of this machine, read once per process; of several GPUs the first."""
    from . import __version__, machine

    found = machine.fingerprint()
    tags = {"mlflow_llmbench": __version__, **fingerprint_tags(found, next(iter(found["gpus"]), None))}
    return {f"llmbench.{name}": str(value) for name, value in tags.items() if value}


class RunContext:
    """What MLflow asks at the beginning of a run (its `RunContextProvider`, by its two methods)."""

    def in_context(self) -> bool:
        """Whether the user wants runs to be tagged."""
        return os.environ.get(TAG_RUNS, "").strip().lower() in ("1", "true", "yes", "on")

    def tags(self) -> dict[str, str]:
        """The fingerprint as tags `llmbench.…`."""
        return dict(_tags_here())
