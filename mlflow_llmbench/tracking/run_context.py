"""MLflow run-context provider: tag the runs of any program with the machine's fingerprint.

Off unless MLFLOW_LLMBENCH_TAG_RUNS=1. MLflow loads this module during its own import, in every program of the
environment, and an error here would end all of them. So it uses only the standard library and no base class of MLflow,
and reads the machine only when the first run starts. MLflow calls it for each `mlflow.start_run` that creates a run,
but not for `mlflow run`, a resumed run or a client's `create_run`. `tracking` sets the same tags on our own runs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

TAG_RUNS = "MLFLOW_LLMBENCH_TAG_RUNS"
"""Environment variable that turns the tagging on: 1, true, yes or on."""


def fingerprint_tags(environment: Mapping[str, Any], gpu: Mapping[str, Any] | None) -> dict[str, str | None]:
    """Return the tags for the hardware and software of a run, without their prefix. `gpu` is the GPU that it used."""
    from ..records.environment import GPU_RUNTIME

    packages, hashes = environment.get("packages") or {}, environment.get("hashes") or {}
    return {
        "env_hash": hashes.get("env"),
        "hardware_hash": hashes.get("hardware"),
        "software_hash": hashes.get("software"),
        "cpu": (environment.get("cpu") or {}).get("name"),
        "gpu": gpu["name"] if gpu else None,
        "gpu_driver": environment.get("driver") if gpu else None,
        "cuda": environment.get("cuda") if gpu else None,
        **{name: environment.get(name) if gpu else None for name in GPU_RUNTIME},
        "torch": packages.get("torch"),
        "transformers": packages.get("transformers"),
        "git_commit": environment.get("git"),
    }


@functools.cache
def _tags_here() -> dict[str, str]:
    """Return this machine's tags, read once per process, with the first of several GPUs."""
    from .. import __version__
    from ..system import machine

    found = machine.fingerprint()
    tags = {"version": __version__, **fingerprint_tags(found, next(iter(found["gpus"]), None))}
    return {f"llmbench.{name}": str(value) for name, value in tags.items() if value}


class RunContext:
    """The two methods of MLflow's `RunContextProvider`, which MLflow calls when a run starts."""

    def in_context(self) -> bool:
        """Return True if the user turned the tagging on."""
        return os.environ.get(TAG_RUNS, "").strip().lower() in ("1", "true", "yes", "on")

    def tags(self) -> dict[str, str]:
        """Return the fingerprint as tags `llmbench.…`."""
        return dict(_tags_here())
