"""Quickstart: from nothing to a decision. Choose a small model, measure it as a sweep, and recommend a configuration.

`prepare` chooses and estimates, and starts nothing. `quickstart` measures what was prepared, by the plan and executor
of every sweep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..analysis.decisions.recommend import Recommendation
from ..backends.base import backend_class
from ..backends.checkpoints import packaged_model, sources
from ..config import model_shape
from ..config.models import find_preset
from ..config.spec import parse
from ..records.backends import DEFAULT_BACKEND, backend_of, capabilities_of, library_of
from ..records.errors import ModelError, TrackingError, UsageError
from ..records.installation import pip_install
from ..records.quantizations import SCHEMES
from ..reports.quickstart import QuickstartPlan, QuickstartResult
from ..sweeps.planning import Plan, PlannedCell, plan
from ..sweeps.progress import NullListener, ProgressListener
from ..sweeps.sweep import execute, open_executor
from ..system import cpu_time, estimate
from . import recommend

SMALL_MODEL = "pythia-160m"
"""Preset that is measured unless a model is given: small, free, and known to every runtime."""

QUANTIZATIONS = "bf16,int4"
RUNTIME_SCHEME = "q4_k_m"
"""Quantization by which the other runtime takes part: llama.cpp's usual one of four bits."""

SHAPE = {"prompt_tokens": "64", "output_tokens": "16", "warmup": "3", "repetitions": "10"}

START_S, CELL_S, QUALITY_S = 12.0, 5.0, 20.0
"""Assumed seconds on two cores to start and load, for what is around the repetitions of a cell, and for its quality."""

OVERHEAD = 2.0
"""Assumed times of a cell's repetitions over their least seconds."""

ASSUMED_RATES = {"read_bytes_per_s": 10e9, "flops_per_s": 100e9}
"""Rates of a machine on which nothing has been measured yet."""

RESULT_BYTES = 5_000_000
"""About how much the files of a cell take, with its charts, and their copy in the store."""

AUTO = "auto"


@dataclass(frozen=True)
class Model:
    """Model of a quickstart: the parameters that name it, what it is, and in `unpacked` the folder to unpack it into.

    `like`: parameters of a model of the same architecture that can be planned before it is unpacked.
    """

    parameters: Mapping[str, str]
    words: str
    unpacked: Path | None = None
    like: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_real(self) -> bool:
        """True unless its weights are random."""
        return self.parameters.get("weights") != "random"


@dataclass(frozen=True)
class Prepared:
    """A prepared quickstart: parameters of its sweep, what it will do in words, and the folder to unpack a model into.

    `asked`: parameters as the user wrote them.
    """

    parameters: Mapping[str, str]
    plan: QuickstartPlan
    asked: Mapping[str, str]
    unpacked: Path | None = None


def prepare(model: str = AUTO, quant: str = AUTO, others: Mapping[str, str] | None = None) -> Prepared:
    """Choose the model and the configurations, and estimate time, memory and disk. Starts and writes nothing.

    `model`: as in `run`; `auto` is a small one. `quant`: as in `run`; `auto` is bf16 and int4, and llama.cpp's q4_k_m
    if it can run here. `others`: further parameters of `run`. Raises UsageError, ModelError or MissingError.
    """
    others = others or {}
    backend = others.get("backend", DEFAULT_BACKEND)
    chosen = _choose_model(model, backend)
    given = {**SHAPE, **chosen.parameters, **others}
    if chosen.is_real and capabilities_of(backend).logits:
        given["quality"] = "auto"
    given["quant"] = QUANTIZATIONS if quant == AUTO else quant
    if len(parse(given).axes["quant"]) < 2:
        raise UsageError(
            f"A decision needs two configurations, and there is one: quant={quant}. Give two: bf16,{quant}."
        )
    planned, left_out = _plan({**given, **chosen.like}), ""
    if quant == AUTO and backend_of(backend, RUNTIME_SCHEME) != backend:  # it has a delegate that runs it
        planned, left_out = _with_runtime(planned, given, chosen.like)
        given["quant"] = ",".join(str(one) for one in planned.spec.axes["quant"])
    asked = {**others, "model": model, "quant": quant}
    return Prepared(given, _told(planned, chosen, given, left_out), asked, chosen.unpacked)


def quickstart(
    prepared: Prepared,
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: ProgressListener | None = None,
) -> QuickstartResult:
    """Measure what was prepared and recommend one of its configurations by throughput.

    What was measured before and is valid is reused, as by `run`. The recommendation is logged on the sweep's run.
    Raises LlmbenchError for an error found before anything starts.
    """
    if prepared.unpacked:
        (watcher or NullListener()).note(f"Unpacking the model into {prepared.unpacked}, once.")
        packaged_model.unpack(prepared.unpacked)
    spec = parse(prepared.parameters)
    with contextlib.closing(open_executor(spec, watcher)) as executor:
        planned = plan(spec, executor.machine)
        done = execute(planned, executor, (tracking_uri, experiment), watcher, prepared.asked)
    if done.outcome == "interrupted":
        return QuickstartResult(done, given_uri=tracking_uri, asked=prepared.asked)
    found: list[Recommendation] = []
    registration = ""
    try:
        chosen = recommend.recommend(
            [str(done.folder)], tracking_uri=tracking_uri, own=done.parent_id, on_result=found.append
        )
        registration, refusal = chosen.registration, chosen.refusal or ""
    except TrackingError as error:  # after the measurement: the decision is shown all the same
        refusal = str(error)
    return QuickstartResult(done, found[0] if found else None, registration, refusal, tracking_uri, prepared.asked)


# The model


def _choose_model(model: str, backend: str) -> Model:
    """Return the given model, else the packaged one, else one of the Hub or its cache, else random weights."""
    if model != AUTO:
        return _given_model(model, backend)
    folder = packaged_model.model_folder()
    words = f"Gemma 3 270M with real weights, from the package {packaged_model.PACKAGE}"
    if folder.exists():
        return Model({"model": str(folder)}, words)
    if packaged_model.is_installed():
        like = {"model": packaged_model.PRESET, "weights": "random", "quality": "none"}
        return Model({"model": str(folder)}, words, folder, like)
    return _preset(SMALL_MODEL, f"{pip_install(packaged_model.PACKAGE)} gives a real model without the Hub.")


def _given_model(model: str, backend: str) -> Model:
    if capabilities_of(backend).scripted or find_preset(model) is None:
        return Model({"model": model}, model)
    return _preset(model, "Give a local folder for a real model.")


def _preset(name: str, advice: str) -> Model:
    """Return a preset with its weights from the Hub or its cache, with random weights if they cannot be had."""
    try:
        found = sources.find_model(parse({"model": name}).first)
    except ModelError as error:
        why = str(error).partition(": ")[0].rstrip(".")
        words = f"{name} with RANDOM weights: speed and memory are real, its answers are noise. {why}. {advice}"
        return Model({"model": name, "weights": "random"}, words)
    return Model({"model": name}, f"{name} with real weights, from the Hub ({found.location})")


# The plan


def _plan(parameters: Mapping[str, str]) -> Plan:
    spec = parse(parameters)
    with contextlib.closing(open_executor(spec)) as executor:
        return plan(spec, executor.machine)


def _with_runtime(planned: Plan, given: Mapping[str, str], like: Mapping[str, str]) -> tuple[Plan, str]:
    """Return the plan with llama.cpp's quantization too, or the same plan and why it cannot take part."""
    runtime = library_of(SCHEMES[RUNTIME_SCHEME].backend)
    try:
        wider = _plan({**given, **like, "quant": f"{given['quant']},{RUNTIME_SCHEME}"})
    except ModelError as error:
        return planned, f"{RUNTIME_SCHEME} by {runtime}: {error}"
    for cell in wider.cells:
        if cell.cell.quant == RUNTIME_SCHEME and cell.refusal:
            return planned, f"{RUNTIME_SCHEME} by {runtime}: {cell.refusal.sentence}"
    return wider, ""


def _told(planned: Plan, chosen: Model, given: Mapping[str, str], left_out: str) -> QuickstartPlan:
    cells = planned.tried
    sizes = [one.predicted_bytes for one in cells if one.predicted_bytes is not None]
    free = planned.machine.memory.get(planned.spec.first.device, (None, ""))[0]
    seconds = START_S * planned.loads + sum(_seconds(one) for one in cells)
    seconds += QUALITY_S * len(cells) if given.get("quality") == "auto" else 0
    return QuickstartPlan(
        chosen.words,
        tuple(dict.fromkeys(str(one.cell.quant) for one in cells)),
        planned.spec.first,
        seconds + (packaged_model.UNPACK_S if chosen.unpacked else 0),
        max(sizes, default=None),
        free,
        _new_bytes(cells) + RESULT_BYTES * len(cells),
        left_out,
        cpu_time.busy_cpus(),
    )


def _seconds(one: PlannedCell) -> float:
    """Return about how long a cell takes, without starting and loading."""
    shape = model_shape.Shape.from_config(one.model.config) if one.model.config else None
    least = one.least_s or estimate.least_seconds(one.cell, one.model, shape, ASSUMED_RATES) or 0.0
    return CELL_S + OVERHEAD * least


def _new_bytes(cells: list[PlannedCell]) -> int:
    """Return the bytes of model files that are not here yet."""
    shared, own = 0, 0
    for one in cells:
        size = one.model.files_bytes or 0
        if not backend_class(one.cell.backend).is_prepared(one.cell, one.model):
            if SCHEMES[one.cell.quant].makes_files:
                own += 2 * size  # converted, and quantized
            else:
                shared = max(shared, size)
    return shared + own
