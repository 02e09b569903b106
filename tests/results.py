"""Results with chosen time stamps, as from a quiet machine, and sweeps of them in a store."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow_llmbench.analysis.process_noise import key_of
from mlflow_llmbench.records.calibration import Calibration, Spread
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.metrics import KEYS
from mlflow_llmbench.records.results import (
    Hashes,
    LoadInfo,
    MemoryStages,
    ModelFacts,
    Noise,
    Repetition,
    RequestRecord,
    RunResult,
)
from mlflow_llmbench.reports.artifacts import write_cell
from mlflow_llmbench.sweeps.job import Job, write_job
from mlflow_llmbench.sweeps.planning import PlannedCell
from mlflow_llmbench.sweeps.upload import upload

MS, GB = 1_000_000, 10**9
WIGGLE = (1.0, 0.99, 1.01, 0.995, 1.005)
MACHINE = {"cpu": {"name": "AMD EPYC"}, "packages": {"torch": "2.12.0+cpu", "transformers": "5.0"}}


def made(
    quant: str = "none",
    batch: int = 1,
    step: float = 10.0,
    ttft: float = 20.0,
    memory: float = 4.0,
    factors: Sequence[float] = WIGGLE,
    **fields: Any,
) -> RunResult:
    """Repetitions of 5 tokens: the first after `ttft` ms, then one every `step` ms, all multiplied by the repetition's
    factor.

    Peak memory is in GB.
    """
    repetitions = []
    for index, factor in enumerate(factors):
        t0 = index * 10_000 * MS
        stamps = tuple(t0 + round((ttft + i * step) * factor * MS) for i in range(5))
        repetitions.append(
            Repetition(index, index, (RequestRecord(t0, stamps, batch, 8),), Noise(1.0, energy_j=30.0 * factor))
        )
    cell = Cell(
        model="fake:x",
        backend="fake",
        quant=quant,
        batch_size=batch,
        prompt_tokens=8,
        output_tokens=5,
        repetitions=max(len(factors), 1),
    )
    base = RunResult(
        cell,
        "ok",
        1000,
        2000,
        Hashes(f"{quant}{batch}", "w", "h", "s", "e"),
        ModelFacts("fake:x", "none", "fake", "r"),
        MACHINE,
        LoadInfo(1.0, weight_bytes=GB),
        repetitions=tuple(repetitions),
        steady=True,
        memory=MemoryStages(host_needed={"peak": round(memory * GB)}),
        price_per_hour=1.0,
        sweep="s",
    )
    return dataclasses.replace(base, **fields)


def known_noise(result: RunResult, sd: float = 0.0, degrees: int = 10**6) -> Calibration:
    """A calibration of a result's machine by which its processes differ by `sd`; by nothing unless it is given."""
    spreads = dict.fromkeys(KEYS, (Spread(sd**2, degrees),))
    return Calibration(*key_of(result), "model none", 10, 200, 0, spreads=spreads)


def write_sweep(folder: Path, results: Sequence[RunResult]) -> Path:
    """Write these results as a sweep's folder, as `llmbench run` does; the folder's name is the sweep's name."""
    for result in results:
        cell, name = result.cell, result.hashes.config
        planned = PlannedCell(cell, result.model, result.hashes, f"{cell.quant} b{cell.batch_size}", name)
        job = Job(planned, folder / name)
        write_job(job)
        write_cell(dataclasses.replace(result, sweep=folder.name), job.folder / "artifacts")
    parameters = {"model": "fake:x", "backend": "fake", "quant": ",".join(dict.fromkeys(r.cell.quant for r in results))}
    parameters["batch_size"] = ",".join(dict.fromkeys(str(r.cell.batch_size) for r in results))
    order = [result.hashes.config for result in results]
    known = {
        "parameters": parameters,
        "cells": len(results),
        "parent": "a sweep" if len(results) > 1 else None,
        "order": order,
    }
    (folder / "sweep.json").write_text(json.dumps(known))
    return folder


def stored(folder: Path, store_uri: str, *results: RunResult) -> list[str]:
    """Upload results as one sweep; return the ids of their runs, in the order of the results."""
    run_ids = upload(str(write_sweep(folder, results)), store_uri).run_ids
    return [run_ids[result.hashes.config] for result in results]
