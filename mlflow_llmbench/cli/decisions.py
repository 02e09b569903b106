"""Commands that decide: recommend, register, gate, promote, export, predict, capacity."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..records.errors import UsageError
from ..records.hardware import HARDWARE, Hardware, given_hardware, named_hardware
from ..records.invocation import LATEST, command_text
from ..records.redaction import redact
from .options import (
    ACCEPT_SUSPECT,
    EXPERIMENT,
    GOAL,
    JSON,
    LIMITS,
    PERMISSIONS,
    TRACKING_URI,
    Option,
    allow,
    comma_list,
    command,
    output_dir,
    parameter_options,
    permissions,
)
from .output import known, print_json, progress

PREDICTED = tuple(
    dataclasses.replace(option, help=option.help.partition(" (default:")[0], panel="")
    for option in parameter_options(
        ("model", "weights", "backend", "quant", "batch_size", "prompt_tokens", "output_tokens")
    )
)
"""Parameters of a cell that `predict` takes. What is not given is as in the measured cells, like all others."""

if TYPE_CHECKING:
    from ..analysis.decisions.recommend import Recommendation
    from ..workflows.gate import GateRun


@command(
    "recommend",
    "choose the best configuration within limits, and say why",
    Option(
        "references",
        "sweep, run id, runs:/ID, or results folder (default: latest sweep)",
        "RESULT",
        many=True,
        default=LATEST,
        entry_name="sweep",
    ),
    GOAL,
    *LIMITS,
    allow("hardware", "software", "workload", "scenario"),
    ACCEPT_SUSPECT,
    Option("--output", "also write the files into this folder", "FOLDER", panel="results"),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    examples=(
        "recommend SWEEP --max-memory 6GB --max-ttft 200ms",
        "recommend SWEEP_A SWEEP_B --goal latency --min-quality kl=0.05",
    ),
    entry_point="recommend",
)
def recommend(
    references: Sequence[str], goal: str, max_memory: str | None, max_ttft: str | None, max_tpot: str | None,
    min_quality: str | None, allow: str | None, accept_suspect: str | None, output: str | None, json: bool,
    tracking_uri: str | None, experiment: str | None,
) -> int:  # fmt: skip
    """Print the recommendation. Exit code: 0, or 1 if no result meets the limits."""
    from ..analysis.decisions.limits import read_limits
    from ..reports.recommendation import format_recommendation, recommendation_json
    from ..reports.versions import format_logged
    from ..workflows import recommend

    def show(found: Recommendation) -> None:
        print(format_recommendation(found))

    done = recommend.recommend(
        known(references, tracking_uri, experiment),
        goal,
        read_limits(max_memory, max_ttft, max_tpot, min_quality),
        accept_suspect=accept_suspect,
        allow=comma_list(allow),
        output=output,
        tracking_uri=tracking_uri,
        on_result=show,
    )
    print(f"\n{format_logged(done.run_id, done.store_uri, done.sweep, done.offer, done.kept)}")
    if json:
        print_json(recommendation_json(done.found))
    return 0 if done.found.winner else 1


@command(
    "register",
    "add a configuration to the Model Registry with its evidence",
    Option(
        "reference",
        "run id, sweep with a recommendation, or a recommendation.json file (default: latest sweep)",
        "RUN",
        default=LATEST,
        entry_name="run",
    ),
    Option("--name", "registered model, for example support-bot", "NAME", required=True),
    Option(
        "--alias",
        "alias that points to the new version (default: candidate)",
        "ALIAS",
        default="candidate",
    ),
    ACCEPT_SUSPECT,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    examples=(
        "register SWEEP --name support-bot",
        "register RUN --name support-bot --accept-suspect 'measured on a shared machine'",
    ),
    entry_point="register",
    store="first",
)
def register(
    reference: str, name: str, alias: str, accept_suspect: str | None, json: bool, tracking_uri: str | None,
    experiment: str | None,
) -> int:  # fmt: skip
    """Print the registered version."""
    from ..reports.versions import format_registered
    from ..workflows import versions

    reference = known([reference], tracking_uri, experiment)[0]
    made = versions.register(reference, name, alias, accept_suspect=accept_suspect, tracking_uri=tracking_uri)
    print(format_registered(made.uri, alias, made.run_id, made.new, made.served))
    if json:
        data = {"name": made.name, "version": made.version, "alias": alias, "run_id": made.run_id, "new": made.new}
        print_json(data, ensure_ascii=True)
    return 0


@command(
    "gate",
    "check a run against the champion of a registered model",
    Option("candidate", "run id, sweep, results folder, or models:/NAME@ALIAS", "CANDIDATE", entry_name="candidate"),
    Option("--against", "models:/NAME@champion, or models:/NAME/VERSION", "VERSION", required=True),
    Option(
        "--limit",
        "allowed regression per metric: ttft=10%,memory=0.02; kl in nats if the champion has no kl",
        "LIST",
        optional=True,
    ),
    Option("--default-limit", "allowed regression of every other metric (default: 5%)", "RATIO", default="5%"),
    Option(
        "--measure",
        "measure both configurations again here, in alternating order, instead of using their runs",
        flag=True,
    ),
    Option("--pairs", "number of fresh processes per side; implies --measure (default: 6)", "N", optional=True),
    output_dir("with --measure: folder for results"),
    Option("--experiment", "with --measure: MLflow experiment (default: llmbench)", "NAME", panel="results"),
    *PERMISSIONS,
    Option("--junit", "write the verdict as JUnit XML", "FILE", panel="results"),
    Option("--markdown", "write the verdict as Markdown", "FILE", panel="results"),
    ACCEPT_SUSPECT,
    JSON,
    TRACKING_URI,
    description="The exit code is the verdict: 0 pass, 1 regression, 2 not comparable, 3 invalid, 4 nothing judged.",
    examples=(
        "gate models:/support-bot@candidate --against models:/support-bot@champion --limit ttft=10%",
        "gate RUN --against models:/support-bot/3 --measure --junit gate.xml",
    ),
    failure_code=4,
    entry_point="gate",
    store="first",
)
def gate(
    candidate: str, against: str, limit: str | None, default_limit: str, measure: bool, pairs: str | None,
    output_dir: str, experiment: str | None, trust_remote_code: bool, allow_pickle: bool, junit: str | None,
    markdown: str | None, accept_suspect: str | None, json: bool, tracking_uri: str | None,
) -> int:  # fmt: skip
    """Print the verdict. Exit code: 0 pass, 1 regression, 2 not comparable or a wrong parameter, 3 invalid, 4 none."""
    from ..analysis.decisions.gate import parse_limits, parse_ratio
    from ..measure.journal import write_bytes
    from ..reports.gate import format_gate, gate_json
    from ..workflows import gate
    from ..workflows.gate_remeasurement import Remeasure

    def show(run: GateRun) -> None:
        print(format_gate(run.found, run.champion.uri, run.candidate))
        for path, name in ((markdown, "gate.md"), (junit, "junit.xml")):
            if path:
                write_bytes(Path(path), run.files[name])

    with progress(plans=False) as shown:
        again = Remeasure(
            _pairs(pairs),
            permissions(trust_remote_code, allow_pickle),
            output_dir,
            experiment,
            shown,
        )
        run = gate.gate(
            known([candidate], tracking_uri, experiment)[0],
            against,
            parse_limits(limit or ""),
            default_limit=parse_ratio("--default-limit", default_limit),
            accept_suspect=accept_suspect,
            again=again if measure or pairs else None,
            tracking_uri=tracking_uri,
            on_result=show,
        )
    if run.run_id is None:
        print(
            f"\nNot logged: the store {redact(run.store_uri)} has no run of the candidate. "
            f"Upload its results: `{command_text('upload', 'FOLDER')}`."
        )
    if json:
        sides = {"champion": run.champion.uri, "candidate": run.candidate}
        print_json({**gate_json(run.found), **sides, "run_id": run.run_id, "measured": run.measured})
    return run.found.exit_code


@command(
    "promote",
    "make a version that has passed its gate the champion",
    Option("version", "models:/NAME@candidate, models:/NAME/VERSION, or models:/NAME@previous to go back", "VERSION"),
    JSON,
    TRACKING_URI,
    examples=("promote models:/support-bot@candidate", "promote models:/support-bot@previous"),
    store="first",
)
def promote(version: str, json: bool, tracking_uri: str | None) -> int:
    """Print the new champion and the way back."""
    from ..reports.versions import format_promoted
    from ..workflows import versions

    done = versions.promote(version, tracking_uri=tracking_uri)
    print(format_promoted(done.champion.uri, done.before))
    if json:
        new = done.champion
        print_json({"name": new.name, "champion": new.version, "previous": done.before}, ensure_ascii=True)
    return 0


@command(
    "export",
    "write what serves a registered version with another engine",
    Option("version", "models:/NAME@champion, or models:/NAME/VERSION", "VERSION"),
    Option(
        "--for",
        "engine or manifest: vllm, tgi, sglang, llama.cpp, transformers, docker-compose or kubernetes",
        "TARGET",
        required=True,
        key="target",
        words=("vllm", "tgi", "sglang", "llama.cpp", "transformers", "docker-compose", "kubernetes"),
    ),
    Option("--output", "write it to this file (default: print it)", "FILE", panel="results"),
    JSON,
    TRACKING_URI,
    examples=(
        "export models:/support-bot@champion --for vllm",
        "export models:/support-bot/3 --for docker-compose --output compose.yaml",
    ),
    store="first",
)
def export(version: str, target: str, output: str | None, json: bool, tracking_uri: str | None) -> int:
    """Print the text, or where it was written."""
    from ..workflows import versions

    uri, text = versions.export(version, target, output=output, tracking_uri=tracking_uri)
    print(f"Written: {output}\n" if output else text, end="")
    if json:
        print_json({"version": uri, "target": target, "text": text})
    return 0


@command(
    "predict",
    "predict what was not measured, here or on other hardware",
    *PREDICTED,
    Option("--of", "sweeps, runs or folders to predict from (default: latest sweep)", "LIST", optional=True),
    Option(
        "--hardware",
        f"predict for this machine, by its nominal rates: {', '.join(HARDWARE)}",
        "NAME",
        optional=True,
        words=tuple(HARDWARE),
    ),
    Option("--bandwidth", "of another machine: bytes read from its memory, in GB/s", "GB/s", optional=True),
    Option("--flops", "its dense 16-bit operations, in TFLOP/s", "TFLOP/s", optional=True),
    Option("--memory", "its memory", "SIZE", optional=True),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="From measured cells of one machine, by fitted laws and the roofline, with the leave-one-out error; "
    "for other hardware, the bounds of its rates, or with --of at the share of them that was reached. Settings that "
    "you leave out are those of most measured cells. Logs nothing.",
    first="model quant batch_size of hardware",
    examples=(
        "predict --model opt-125m --quant bf16 --batch-size 8",
        "predict --model llama-2-7b --quant fp16,int4 --batch-size 1,16 --hardware rtx-4090",
    ),
)
def predict(
    of: str | None, hardware: str | None, bandwidth: str | None, flops: str | None, memory: str | None, json: bool,
    tracking_uri: str | None, experiment: str | None, **given: str | None,
) -> int:  # fmt: skip
    """Print the prediction."""
    from ..reports.prediction import format_prediction, prediction_json
    from ..workflows.predict import predict

    device = _hardware(hardware, bandwidth, flops, memory)
    references = [LATEST] if of is None and device is None else [*filter(None, (of or "").split(","))]
    known_ones = known(references, tracking_uri, experiment)
    found = predict(given, known_ones, device, tracking_uri=tracking_uri)
    print(format_prediction(found))
    if json:
        print_json(prediction_json(found))
    return 0


@command(
    "capacity",
    "how many of these servers some traffic needs, with interval",
    Option(
        "references",
        "sweep of find=goodput, runs, or results folders (default: latest sweep)",
        "RESULT",
        many=True,
        default=LATEST,
    ),
    Option("--rate", "requests per second of all users together", "PER_S", optional=True),
    Option("--trace", "file of the requests, as for `online`; its busiest part counts", "FILE", optional=True),
    Option("--window", "length of that part (default: 60s)", "SECONDS", default="60s"),
    Option("--headroom", "share on top of the traffic (default: 20%)", "RATIO", default="20%"),
    Option("--attainment", "share of the requests that has to meet the SLOs (default: 0.9)", "RATIO", default="0.9"),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="From loads of one server with slo_…_ms, such as a sweep of find=goodput: several configurations are "
    "answered beside each other. Logs nothing.",
    examples=("capacity SWEEP --rate 40", "capacity SWEEP --trace day.jsonl --window 5min --headroom 30%"),
)
def capacity(
    references: Sequence[str], rate: str | None, trace: str | None, window: str, headroom: str, attainment: str,
    json: bool, tracking_uri: str | None, experiment: str | None,
) -> int:  # fmt: skip
    """Print the number of servers."""
    from ..analysis.decisions.gate import parse_ratio
    from ..analysis.decisions.limits import SECONDS, quantity
    from ..reports.capacity import capacity_json, format_capacity
    from ..workflows.capacity import capacity

    found = capacity(
        known(references, tracking_uri, experiment),
        rate=None if rate is None else quantity("--rate", rate, {"": 1}, "--rate 12.5"),
        trace=trace,
        window_s=quantity("--window", window, SECONDS, "--window 60s"),
        headroom=parse_ratio("--headroom", headroom),
        attainment=parse_ratio("--attainment", attainment),
        tracking_uri=tracking_uri,
    )
    print(format_capacity(found))
    if json:
        print_json(capacity_json(found))
    return 0


COMMANDS = (recommend, register, gate, promote, export, predict, capacity)


def _hardware(name: str | None, bandwidth: str | None, flops: str | None, memory: str | None) -> Hardware | None:
    """Return the machine of these options, None if none is given. Raises UsageError."""
    rates = [text for text in (bandwidth, flops, memory) if text is not None]
    if name is None:
        return given_hardware(bandwidth, flops, memory) if rates else None
    if rates:
        raise UsageError(f"--hardware {name} has rates of its own. Leave out --bandwidth, --flops and --memory.")
    return named_hardware(name)


def _pairs(text: str | None) -> int:
    """Return the number of fresh processes per side. Raises UsageError."""
    from ..workflows.ab import DEFAULT_PAIRS

    if text is None:
        return DEFAULT_PAIRS
    if not text.isdecimal():
        raise UsageError(f"--pairs is not a whole number: {text}. Give at least 2; the default is {DEFAULT_PAIRS}.")
    return int(text)
