"""Deployment of a measured result, as held by a registered version: model, settings, limits, metrics, evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ...records.backends import CHECKPOINT, GGUF_FILE, Serving, recorded_capabilities, served_libraries
from ...records.cell import Cell
from ...records.errors import UsageError
from ...records.metric import GB, Tag
from ...records.metrics import PEAK_MEMORY, SCHEMA, shown_in
from ...records.mixed_plan import QUANTIZED, QuantPlan
from ...records.quantizations import FLOAT_DTYPES, SCHEMES, UNPACKED, library_of_method, resolve
from ...records.redaction import redact, redact_all
from ...records.results import RunResult, Verdict

SHOWN = (
    "model",
    "revision",
    "quant",
    "decode",
    "device",
    "batch_size",
    "max_prompt_tokens",
    "max_new_tokens",
    "workload",
    "history",
)
"""Keys of the configuration that become tags of the version."""

SERVED_DECODES = ("generate",)
SERVED_HISTORIES = ("none", "recomputed")


@dataclass(frozen=True)
class Evidence:
    """Source of the metrics: the measured run, its sweep, its verdict, and why a suspect one was accepted."""

    run_id: str
    sweep: str
    verdict: Verdict
    accepted_suspect: str | None = None
    linked: str = ""  # the run that was measured, if this one only links to it


@dataclass(frozen=True)
class Deployment:
    """Data of a registered version.

    `config` is the `model_config` of the served model, plain JSON data; `figures` are the metrics stored with it.
    """

    config: Mapping[str, Any]
    figures: Mapping[str, float]
    requirements: tuple[str, ...]
    evidence: Evidence


def deployment_of(result: RunResult, metrics: Mapping[str, float], evidence: Evidence) -> Deployment:
    """Build the deployment of a measured result from its summary metrics.

    Raises UsageError for a result that must not or cannot be deployed.
    """
    _refuse(result, evidence)
    cell, model, engine = result.cell, result.model, _serving(result).engine
    facts, plan = (result.load.facts, result.load.quant_plan) if result.load else ({}, None)
    figures = {entry.key: metrics[entry.key] for entry in shown_in(Tag) if entry.key in metrics}
    source, place, file = _place(result)
    device = cell.device if cell.device != "auto" else str(facts.get("model.device", "cpu")).partition(":")[0]
    longest = [r.prompt_tokens for repetition in result.repetitions for r in repetition.requests if r.prompt_tokens]
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "model": cell.model,
        "backend": cell.backend,
        "engine": engine,
        "source": source,
        "location": place,
        "gguf_file": file,
        "revision": model.revision,
        "tokenizer": _tokenizer(result),
        "trust_remote_code": cell.trust_remote_code,
        "quant": cell.quant,
        "dtype": _dtype(result),
        "compute_dtype": facts.get("model.dtype"),
        "quantization": _quantization(cell.quant, facts, model.source == "gguf", plan)
        if engine == CHECKPOINT.engine
        else {},
        "method": facts.get("quant.method"),
        "kernel": facts.get("quant.kernel"),
        "bits_per_weight": facts.get("quant.bits_per_weight"),
        "decode": cell.decode,
        "attention": cell.attention,
        "device": device,
        "threads": facts.get("llama_cpp.threads", cell.threads),
        "batch_size": cell.batch_size,
        "max_prompt_tokens": max(longest, default=cell.prompt_tokens),
        "max_new_tokens": cell.output_tokens,
        "workload": cell.workload,
        "history": cell.history,
        "needs": _needs(result, metrics),
        "measured": figures,
        "hashes": vars(result.hashes),
        "evidence": _evidence(evidence),
        **(_packed(result) if engine == GGUF_FILE.engine else {}),
    }
    return Deployment(redact_all(config), figures, _requirements(result), evidence)


def refusal_to_register(result: RunResult, metrics: Mapping[str, float], evidence: Evidence) -> str | None:
    """Return why `register` refuses a result, in one sentence; None if it takes it."""
    try:
        deployment_of(result, metrics, evidence)
    except UsageError as error:
        return str(error)
    return None


def version_tags(deployment: Deployment) -> dict[str, str]:
    """Tags of a version for readers of the registry: metrics without their section, verdict, evidence.

    The order matters: the model's page shows only the first ones.
    """
    config, evidence = deployment.config, deployment.evidence
    tags = {
        **{name: config[name] for name in SHOWN},
        **{key.partition("/")[2]: f"{value:.6g}" for key, value in deployment.figures.items()},
        "verdict": evidence.verdict.word,
        "verdict_reasons": ",".join(reason.code for reason in evidence.verdict.reasons),
        "accepted_suspect": evidence.accepted_suspect,
        "run_id": evidence.run_id,
        "sweep": evidence.sweep,
        "linked_run": evidence.linked,
        "config_hash": config["hashes"]["config"],
        "schema": config["schema"],
    }
    return {f"llmbench.{name}": redact(str(value))[:5000] for name, value in tags.items() if value not in (None, "")}


def _refuse(result: RunResult, evidence: Evidence) -> None:
    cell, verdict = result.cell, evidence.verdict
    if result.failure or verdict.word == "invalid":
        why = (
            f"its outcome is {result.outcome}"
            if result.failure
            else ", ".join(reason.code for reason in verdict.reasons)
        )
        raise UsageError(
            f"The run {evidence.run_id} is invalid ({why}), and is not registered. Measure it again, or give another "
            "run."
        )
    if verdict.word == "suspect" and not evidence.accepted_suspect:
        codes = ", ".join(reason.code for reason in verdict.reasons)
        raise UsageError(
            f"The run {evidence.run_id} is suspect ({codes}). Measure it again, or register it with "
            '--accept-suspect "REASON".'
        )
    if cell.weights == "random":
        raise UsageError(
            f"The run {evidence.run_id} has random weights, whose answers mean nothing. Measure the model with its own "
            "weights."
        )
    serving = recorded_capabilities(cell.backend).serving
    if serving is None:
        raise UsageError(
            f"backend={cell.backend} cannot be registered: the registered model is run by "
            f"{' or '.join(served_libraries())}. Measure with one of them."
        )
    from_file = serving.engine == GGUF_FILE.engine
    is_made = from_file or cell.prune or SCHEMES[cell.quant].makes_files
    if is_made and (result.load is None or result.load.made is None):
        raise UsageError(
            f"The run {evidence.run_id} does not say where its model files are, so it cannot be served. Measure it "
            "again."
        )
    if from_file and result.load and result.load.facts.get("model.tokenizer") == "none":
        raise UsageError(
            f"The GGUF file of the run {evidence.run_id} has no tokenizer, so it cannot answer texts. Measure a model "
            "that has one."
        )
    if cell.batching:
        raise UsageError(
            f"batching={cell.batching} cannot be served: the registered model batches the prompts of one request, not "
            "requests that come one by one. Measure with batching=none."
        )
    if cell.history not in SERVED_HISTORIES:
        raise UsageError(
            f"history={cell.history} cannot be served: the registered model keeps nothing from one request to the "
            "next. Measure with history=recomputed."
        )
    _refuse_settings(cell, from_file)


def _refuse_settings(cell: Cell, from_file: bool) -> None:
    """Raise UsageError for how the model was run, if a registered version would run otherwise."""
    if cell.kv_cache is not None and not from_file:
        raise UsageError(f"kv_cache={cell.kv_cache} cannot be served yet. Measure with kv_cache=auto.")
    if cell.tensor_parallel > 1:
        raise UsageError(
            f"tensor_parallel={cell.tensor_parallel} cannot be served yet: the registered model runs in one process. "
            "Measure with tensor_parallel=1."
        )
    if cell.placement != "single":
        raise UsageError(
            f"placement={cell.placement} cannot be served yet: the registered model lies on one device. "
            "Measure with placement=single."
        )
    if cell.decode not in SERVED_DECODES:
        raise UsageError(f"decode={cell.decode} cannot be served yet. Measure with decode={', '.join(SERVED_DECODES)}.")


def _serving(result: RunResult) -> Serving:
    """Return how a version is served; what cannot be registered was refused before."""
    found = recorded_capabilities(result.cell.backend).serving
    assert found
    return found


def _dtype(result: RunResult) -> str:
    """The dtype to load with: the requested one, the compute dtype of a quantization, or the checkpoint's own."""
    cell = result.cell
    if cell.quant in FLOAT_DTYPES:
        return FLOAT_DTYPES[cell.quant]
    facts = result.load.facts if result.load else {}
    return "auto" if cell.quant == "none" else str(facts.get("model.dtype", "auto"))


def _quantization(
    quant: str, facts: Mapping[str, str | int | float], from_gguf: bool, plan: QuantPlan | None
) -> dict[str, Any]:
    """The recipe of the quantization as it was realised; empty if the checkpoint loads as it is."""
    scheme = SCHEMES[quant]
    if scheme.library is None or scheme.makes_files:  # a checkpoint that was made names its quantization itself
        return dict(UNPACKED) if from_gguf and scheme.dtype else {}
    layers = plan and {name: [layer for layer, given in plan.modules.items() if given == name] for name in QUANTIZED}
    realised = {
        "int8_threshold": facts.get("quant.threshold"),
        "dtype": facts.get("quant.compute_dtype"),
        "double_quant": facts.get("quant.double_quant") == "true",
        "group_size": facts.get("quant.group_size"),
        "layers": layers,
    }
    unknown = [setting for setting in scheme.settings if realised[setting] is None]
    if unknown or not any(name.startswith("quant.") for name in facts):
        raise UsageError(
            f"quant={quant} cannot be registered yet: the served model does not know how it was realised. Use another "
            "quantization."
        )
    return resolve(scheme.recipe, realised)


def _place(result: RunResult) -> tuple[str, str, str | None]:
    """Source of the served model: its kind, its location, and the GGUF file in it."""
    model, made = result.model, result.load.made if result.load else None
    if model.source == "hub_gguf":
        repository, _, file = model.location.partition(":")
        return model.source, repository, file
    if _serving(result).engine == GGUF_FILE.engine or model.source == "gguf":
        path = PurePath(made or model.location)
        return "gguf", str(path.parent), path.name
    return ("folder", made, None) if made else (model.source, model.location, None)


def _tokenizer(result: RunResult) -> dict[str, str | None] | None:
    """Location of the tokenizer of a checkpoint made from another one; None if it lies with the weights."""
    model = result.model
    if _serving(result).engine != CHECKPOINT.engine or result.load is None or result.load.made is None:
        return None
    return {"location": model.location, "revision": model.revision if model.source in ("hub", "preset") else None}


def _packed(result: RunResult) -> dict[str, Any]:
    """Settings for llama.cpp: expected file type, layers on the GPU, mapping, and the type of the KV cache."""
    cell, facts = result.cell, result.load.facts if result.load else {}
    return {
        "file_type": facts["quant.type"],
        "gpu_layers": cell.gpu_layers,
        "mmap": cell.mmap,
        "kv_cache": facts["kv_cache.type"],
    }


def _needs(result: RunResult, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Requirements on a machine: peak memory in bytes, of host or device, and the machine that was measured."""
    device_peak, host_peak = PEAK_MEMORY
    on_device = device_peak in metrics
    peak = metrics.get(device_peak if on_device else host_peak)
    names = [gpu["name"] for gpu in result.environment.get("gpus") or []] if on_device else []
    machine = names[0] if names else (result.environment.get("cpu") or {}).get("name")
    return {
        "peak_memory_bytes": None if peak is None else round(peak * GB),
        "memory_of": "device" if on_device else "host",
        "measured_on": machine,
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "run_id": evidence.run_id,
        "sweep": evidence.sweep,
        "verdict": evidence.verdict.word,
        "verdict_reasons": [reason.code for reason in evidence.verdict.reasons],
        "accepted_suspect": evidence.accepted_suspect,
        **({"linked_run": evidence.linked} if evidence.linked else {}),
    }


def _requirements(result: RunResult) -> tuple[str, ...]:
    """Pins of the packages that the served model imports, as measured; local labels (`+cpu`), on no index, are cut."""
    packages = result.environment.get("packages") or {}
    serving = _serving(result)
    if serving.engine == GGUF_FILE.engine:
        pins = tuple(f"{name}=={packages[name]}" for name in serving.packages if name in packages)
        return (*pins, "huggingface_hub") if result.model.source == "hub_gguf" else pins
    wanted = [*serving.packages]
    wanted += SCHEMES[result.cell.quant].packages
    wanted += ["gguf"] if result.model.source == "gguf" else []
    ready = library_of_method(result.load.facts.get("quant.method")) if result.load else None
    wanted += ready.packages if ready else ()
    return tuple(
        f"{name}=={re.sub(r'[+].*', '', packages[name])}" for name in dict.fromkeys(wanted) if name in packages
    )
