"""Commands that decide: recommend, register, gate, promote, export, reproduce, import.

Each parses its options, calls one function of the library and prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import LlmbenchError, UsageError
from .parameters import default_text
from .redaction import redact

if TYPE_CHECKING:
    from .gate import Gate
    from .recommend import Limit, Measure, Recommendation
    from .records import RunResult
    from .registry import Registered
    from .tracking import Store

BYTES = {
    "": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
MILLISECONDS = {"": 1, "us": 1e-3, "µs": 1e-3, "ms": 1, "s": 1e3}
STATISTICS = {"ttft": ("p50", "mean", "p90", "p95", "p99"), "tpot": ("mean", "p50", "p95")}
"""Latency → the statistics that a limit can name, the default first."""


def add_parsers(commands: Any) -> None:
    """Add the parsers of these commands to `commands`, the subparsers of the command line."""
    recommend = commands.add_parser(
        "recommend", help="choose the best configuration among results, within limits, and explain the choice"
    )
    recommend.add_argument("references", nargs="+", metavar="RESULT", help="sweep, run id, runs:/ID, or results folder")
    recommend.add_argument(
        "--goal",
        metavar="GOAL",
        default="throughput",
        help="optimize throughput, latency, cost or energy (default: throughput)",
    )
    recommend.add_argument(
        "--max-memory", metavar="SIZE", help="maximum peak memory, of the device if there is one: 6GB, 512MiB"
    )
    recommend.add_argument(
        "--max-ttft", metavar="TIME", help="maximum time to first token: 200ms (median), or p95=0.2s"
    )
    recommend.add_argument("--max-tpot", metavar="TIME", help="maximum time per output token: 50ms (mean), or p95=60ms")
    recommend.add_argument(
        "--min-quality",
        metavar="LIST",
        help="quality limits: kl=0.05 (maximum), perplexity=12 (maximum), top1=0.95 (minimum)",
    )
    recommend.add_argument(
        "--allow",
        metavar="LIST",
        default="",
        help="compare results despite these differences: hardware,software,workload,scenario",
    )
    _add_accept_suspect(recommend)
    recommend.add_argument("--output", metavar="FOLDER", help="also write the files into this folder")
    register = commands.add_parser(
        "register", help="add a measured configuration to the MLflow Model Registry, with its evidence"
    )
    register.add_argument(
        "reference",
        metavar="RUN",
        help="run id, parent run of a sweep with a recommendation, or a recommendation.json file",
    )
    register.add_argument("--name", required=True, metavar="NAME", help="registered model, for example support-bot")
    register.add_argument(
        "--alias",
        metavar="ALIAS",
        default="candidate",
        help="alias that points to the new version (default: candidate)",
    )
    _add_accept_suspect(register)
    gate = commands.add_parser(
        "gate", help="compare a measured run with the champion of a registered model; the exit code is the verdict"
    )
    gate.add_argument("candidate", metavar="CANDIDATE", help="run id, sweep, results folder, or models:/NAME@ALIAS")
    gate.add_argument(
        "--against", required=True, metavar="VERSION", help="models:/NAME@champion, or models:/NAME/VERSION"
    )
    gate.add_argument(
        "--limit",
        metavar="LIST",
        default="",
        help="allowed regression per metric: ttft=10%%,memory=0.02; kl in nats if the champion has no kl",
    )
    gate.add_argument(
        "--default-limit",
        metavar="RATIO",
        default="5%",
        help="allowed regression of every other metric (default: 5%%)",
    )
    gate.add_argument(
        "--measure",
        action="store_true",
        help="measure both configurations again here, in alternating order, instead of using their runs",
    )
    gate.add_argument("--pairs", metavar="N", help="number of fresh processes per side; implies --measure (default: 6)")
    _add_output_dir(gate, "with --measure: folder for results")
    gate.add_argument("--experiment", metavar="NAME", help="with --measure: MLflow experiment (default: llmbench)")
    _add_grants(gate)
    gate.add_argument("--junit", metavar="FILE", help="write the verdict as JUnit XML")
    gate.add_argument("--markdown", metavar="FILE", help="write the verdict as Markdown")
    _add_accept_suspect(gate)
    promote = commands.add_parser("promote", help="make a version that has passed its gate the champion")
    promote.add_argument(
        "version",
        metavar="VERSION",
        help="models:/NAME@candidate, models:/NAME/VERSION, or models:/NAME@previous to go back",
    )
    export = commands.add_parser(
        "export", help="write the command or manifest that serves a registered version with another engine"
    )
    export.add_argument("version", metavar="VERSION", help="models:/NAME@champion, or models:/NAME/VERSION")
    export.add_argument(
        "--for",
        dest="target",
        required=True,
        metavar="TARGET",
        help="vllm, tgi, sglang, llama.cpp, transformers, docker-compose or kubernetes",
    )
    export.add_argument("--output", metavar="FILE", help="write it to this file (default: print it)")
    reproduce = commands.add_parser(
        "reproduce",
        help="measure a run or a registered version again and compare; the exit code says whether they agree",
    )
    reproduce.add_argument("reference", metavar="RUN", help="run id, runs:/ID, results folder, or models:/NAME@ALIAS")
    reproduce.add_argument(
        "--margin", metavar="RATIO", default="5%", help="largest difference that counts as equivalent (default: 5%%)"
    )
    _add_grants(reproduce)
    reproduce.add_argument("--url", metavar="URL", help="present address of the server, for a run that measured one")
    _add_output_dir(reproduce, "folder for results")
    reproduce.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: the run's)")
    bring = commands.add_parser(
        "import",
        help="import results of vllm bench serve, GuideLLM, AIPerf, llama-bench or optimum-benchmark into the store",
    )
    bring.add_argument("files", nargs="+", metavar="FILE", help="JSON file that the program wrote")
    bring.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: llmbench)")
    for command in (recommend, register, gate, promote, export, reproduce, bring):
        _add_common(command)


def _add_accept_suspect(parser: Any) -> None:
    parser.add_argument(
        "--accept-suspect",
        metavar="REASON",
        help="accept suspect results for this reason, which is recorded; none = do not accept them",
    )


def _add_output_dir(parser: Any, what: str) -> None:
    parser.add_argument(
        "--output-dir",
        metavar="FOLDER",
        default=default_text("output_dir"),
        help=f"{what} (default: {default_text('output_dir')})",
    )


def _add_grants(parser: Any) -> None:
    """Add the options for permissions that are not taken over from a run that is measured again."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, if the run did"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read weights stored as a pickle, if the run did")


def _grants(given: argparse.Namespace) -> frozenset[str]:
    return frozenset(name for name in ("trust_remote_code", "allow_pickle") if getattr(given, name))


def _add_common(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or a SQLite file here)"
    )


def _recommend(given: argparse.Namespace) -> int:
    from . import decision, recommend
    from .evidence import load_results

    limits = _limits(given)
    results = [result for reference in given.references for result in load_results(reference, given.tracking_uri)]
    allow = frozenset(filter(None, (_told(given.allow) or "").split(",")))
    found = recommend.recommend(results, given.goal, limits, accept_suspect=_reason(given), allow=allow)
    print(decision.format_recommendation(found))
    _keep_recommendation(given, found, results)
    if given.json:
        print(json.dumps(recommend.recommendation_json(found), ensure_ascii=False))
    return 0 if found.winner else 1


def _keep_recommendation(given: argparse.Namespace, found: Recommendation, results: list[RunResult]) -> None:
    """Write recommendation.json, .md and the chart, and log them on the parent run of the winner's sweep."""
    from . import decision, pareto, recommend, registry, tracking
    from .journal import write_bytes, write_json

    sweep = (found.winner.result if found.winner else results[0]).sweep
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.output or scratch)
        write_json(folder / "recommendation.json", recommend.recommendation_json(found))
        write_bytes(folder / "recommendation.md", decision.recommendation_markdown(found).encode())
        pareto.draw_recommendation(found, folder / "charts")
        store = tracking.open_store(given.tracking_uri)
        parent = registry.parent_of_sweep(store, sweep)
        for run_id in filter(None, (parent, store.given_run_id)):
            registry.log_folder(store, run_id, folder)
        if parent:
            advice = f" Register the winner: llmbench register {parent} --name NAME" if found.winner else ""
            print(f"\nLogged on run {parent}: recommendation.md.{advice}")
        else:
            print(f"\nNot logged: the store {redact(store.uri)} has no run of the sweep {sweep}.")


def _limits(given: argparse.Namespace) -> list[Limit]:
    """Parse the limits of the options, in the order memory, TTFT, TPOT, quality. Raises UsageError."""
    from .recommend import MEMORY, QUALITY, Limit

    found = []
    if (most := _told(given.max_memory)) is not None:
        found.append(Limit("--max-memory", MEMORY, _quantity("--max-memory", most, BYTES, "6GB")))
    for name, text in (("ttft", _told(given.max_ttft)), ("tpot", _told(given.max_tpot))):
        if text is not None:
            measure, amount = _latency(name, text)
            found.append(Limit(f"--max-{name}", measure, _quantity(f"--max-{name}", amount, MILLISECONDS, "200ms")))
    for part in filter(None, (_told(given.min_quality) or "").split(",")):
        name, _, text = part.partition("=")
        if name not in QUALITY:
            raise UsageError(
                f"Unknown quality: {name}. Known: {', '.join(QUALITY)}. Give for example --min-quality kl=0.05."
            )
        found.append(
            Limit(f"--min-quality {name}", QUALITY[name], _quantity(f"--min-quality {name}", text, {"": 1}, "kl=0.05"))
        )
    return found


def _latency(name: str, text: str) -> tuple[Measure, str]:
    """Split `p95=200ms` into the measure of that statistic and the amount as text. Raises UsageError."""
    from .recommend import Measure

    statistic, _, amount = text.rpartition("=")
    statistic = statistic or STATISTICS[name][0]
    if statistic not in STATISTICS[name]:
        raise UsageError(f"Unknown statistic in --max-{name}: {statistic}. Known: {', '.join(STATISTICS[name])}.")
    words = {"ttft": "time to first token", "tpot": "time per output token"}
    shown = {"p50": "median", "mean": "mean"}.get(statistic, statistic)
    advice = (
        "More repetitions support higher percentiles."
        if statistic not in ("mean", "p50")
        else "Measure at least 2 output tokens."
    )
    return Measure(f"{shown} {words[name]}", (f"latency/{name}_ms_{statistic}",), "lower", advice), amount


def _quantity(option: str, text: str, units: dict[str, float], example: str) -> float:
    """Parse a non-negative number with a unit; returns bytes for BYTES, ms for MILLISECONDS. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-zµ]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units:
        known = [name for name in units if name]
        raise UsageError(
            f"{option} is not a number{f' with a unit ({chr(44).join(known)})' if known else ''}: {text}. "
            f"Give for example {example}."
        )
    return float(match[1]) * units[unit]


def _register(given: argparse.Namespace) -> int:
    from . import registry, tracking

    store = tracking.open_store(given.tracking_uri)
    made = registry.register(store, given.reference, given.name, given.alias, _reason(given))
    what = "Registered" if made.new else "Already registered as"
    print(f"{what} {made.uri}, alias {given.alias}. Its evidence is the run {made.run_id}.")
    print(f"Serve it: mlflow models serve -m models:/{made.name}@{given.alias} --env-manager local")
    if given.json:
        print(
            json.dumps(
                {
                    "name": made.name,
                    "version": made.version,
                    "alias": given.alias,
                    "run_id": made.run_id,
                    "new": made.new,
                }
            )
        )
    return 0


def _gate(given: argparse.Namespace) -> int:
    """Run the gate. Exit code: 0 pass, 1 regression, 2 not comparable or a wrong parameter, 3 invalid, 4 no verdict."""
    try:
        return _gate_verdict(given)
    except LlmbenchError as error:
        if error.exit_code != 1:
            raise
        print(f"llmbench: {error}", file=sys.stderr)  # not 1, which means regression here
        return 4


def _gate_verdict(given: argparse.Namespace) -> int:
    from . import gate, gate_report, registry, tracking

    limits, limit = (
        gate.parse_limits(_told(given.limit) or ""),
        gate.parse_ratio("--default-limit", given.default_limit),
    )
    store = tracking.open_store(given.tracking_uri)
    champion = registry.registered_at(store, given.against)
    baseline = registry.result_of(store, champion.run_id)
    candidate, run_id, shown = _candidate(given, store, baseline)
    found, measured = _held(given, baseline, candidate, limits, limit)
    print(gate_report.format_gate(found, champion.uri, shown))
    texts = {"gate.md": gate_report.gate_markdown, "junit.xml": gate_report.gate_junit}
    files = {name: write(found, champion.uri, shown).encode() for name, write in texts.items()}
    _write_gate(given, found, files, store, champion, run_id, measured)
    if given.json:
        told = {"champion": champion.uri, "candidate": shown, "run_id": run_id, "measured": measured}
        print(json.dumps({**gate.gate_json(found), **told}, ensure_ascii=False))
    return found.exit_code


def _held(
    given: argparse.Namespace, baseline: RunResult, candidate: RunResult, limits: dict[str, float], limit: float
) -> tuple[Gate, str | None]:
    """Return the gate, and the parent run of the sweep that was measured for it (None if none was)."""
    from . import gate

    pairs = _pairs(given)
    if pairs is None:
        return gate.decide(baseline, candidate, limits, limit=limit, accept_suspect=_reason(given)), None
    if refused := gate.refuse_unlike_work(baseline, candidate):
        return refused, None

    from .progress import Progress
    from .rematch import rematch

    done = rematch(
        baseline,
        candidate,
        pairs=pairs,
        granted=_grants(given),
        output_dir=given.output_dir,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        watcher=Progress(sys.stderr),
    )
    found = gate.decide(
        done.champion, done.candidate, limits, limit=limit, accept_suspect=_reason(given), in_turns=True
    )
    return dataclasses.replace(found, notes=(*found.notes, *done.notes)), done.sweep.parent_id


def _pairs(given: argparse.Namespace) -> int | None:
    """Return the number of fresh processes per side; None if the existing runs are used. Raises UsageError."""
    from .ab import DEFAULT_PAIRS

    text = _told(given.pairs)
    if text is None:
        return DEFAULT_PAIRS if given.measure else None
    if not text.isdecimal():
        raise UsageError(f"--pairs is not a whole number: {text}. Give at least 2; the default is {DEFAULT_PAIRS}.")
    return int(text)


def _candidate(given: argparse.Namespace, store: Store, baseline: RunResult) -> tuple[RunResult, str | None, str]:
    """Return the candidate's result, its run id (None if the store has none), and its name in messages.

    For a sweep, take the cell with the champion's configuration. Raises UsageError if there is not exactly one.
    """
    from . import registry
    from .evidence import load_results

    if given.candidate.startswith("models:/"):
        version = registry.registered_at(store, given.candidate)
        return registry.result_of(store, version.run_id), version.run_id, version.uri
    results = load_results(given.candidate, given.tracking_uri)
    same = (
        results
        if len(results) == 1
        else [result for result in results if result.hashes.config == baseline.hashes.config]
    )
    if len(same) != 1:
        raise UsageError(
            f"{given.candidate} has {len(results)} cells, and {len(same)} of them have the champion's configuration. "
            "Give the run of one cell."
        )
    run_id = registry.run_behind(store, given.candidate, same[0])
    return same[0], run_id, f"run {run_id}" if run_id else given.candidate


def _write_gate(
    given: argparse.Namespace,
    found: Gate,
    files: dict[str, bytes],
    store: Store,
    champion: Registered,
    run_id: str | None,
    measured: str | None,
) -> None:
    from . import gate, gate_report, registry
    from .journal import write_bytes, write_json
    from .report import split_table

    for option, name in ((given.markdown, "gate.md"), (given.junit, "junit.xml")):
        if option:
            write_bytes(Path(option), files[name])
    if run_id is None:
        print(
            f"\nNot logged: the store {redact(store.uri)} has no run of the candidate. "
            "Upload it with `llmbench upload`."
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            write_bytes(folder / name, content)
        write_json(folder / "gate.json", gate.gate_json(found))
        write_json(folder / "table.json", split_table(gate_report.HEADING, gate_report.gate_cells(found.checks)))
        for kept_in in filter(None, (run_id, store.given_run_id)):
            registry.log_gate(store, kept_in, champion, found.verdict, found.why, _reason(given), folder, measured)


def _promote(given: argparse.Namespace) -> int:
    from . import registry, tracking

    done = registry.promote(tracking.open_store(given.tracking_uri), given.version)
    new, before = done.champion, done.before
    print(
        f"{new.uri} is the champion of {new.name}."
        + ("" if before else " It is the first, so there was nothing to gate it against.")
    )
    if before:
        print(f"Version {before} is kept as previous. To go back: llmbench promote models:/{new.name}@previous")
    if given.json:
        print(json.dumps({"name": new.name, "champion": new.version, "previous": before}))
    return 0


def _export(given: argparse.Namespace) -> int:
    from . import registry, tracking
    from .export import export
    from .journal import write_bytes

    store = tracking.open_store(given.tracking_uri)
    version = registry.registered_at(store, given.version)
    text = export(*registry.stored_config(store, version), uri=version.uri, target=given.target)
    if given.output:
        write_bytes(Path(given.output), text.encode())
        print(f"Written: {given.output}")
    else:
        print(text, end="")
    if given.json:
        print(json.dumps({"version": version.uri, "target": given.target, "text": text}, ensure_ascii=False))
    return 0


def _reproduce(given: argparse.Namespace) -> int:
    """Reproduce a run.

    Exit code: 0 equivalent, 1 different, 2 not comparable or a wrong parameter, 3 invalid, 4 undecided or not measured.
    """
    try:
        return _reproduced(given)
    except LlmbenchError as error:
        if error.exit_code != 1:
            raise
        print(f"llmbench: {error}", file=sys.stderr)  # not 1, which means different here
        return 4


def _reproduced(given: argparse.Namespace) -> int:
    from .gate import parse_ratio

    margin = parse_ratio("--margin", given.margin)

    from . import compare, reproduce, reproduction
    from .progress import Progress

    done = reproduce.reproduce(
        given.reference,
        margin=margin,
        granted=_grants(given),
        url=_told(given.url),
        output_dir=given.output_dir,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        watcher=Progress(sys.stderr),
        say=print,
    )
    print(reproduction.format_reproduction(done.found))
    if done.comparison:
        print(f"\n{compare.format_comparison(done.comparison)}")
    if done.sweep:
        print(f"\nResults: {done.sweep.folder}")
    if given.json:
        told = {"original": done.original.name, "original_run_id": done.original.run_id, "run_id": done.run_id}
        print(json.dumps({**reproduction.reproduction_json(done.found), **told}, ensure_ascii=False))
    return done.found.exit_code


def _import(given: argparse.Namespace) -> int:
    from .importing import import_file

    told = []
    for file in given.files:
        done = import_file(file, given.tracking_uri, given.experiment)
        print(f"{file}: {len(done.found)} measurements of {done.found[0].source}, {done.new} of them new.")
        for one, run_id in zip(done.found, done.run_ids, strict=True):
            ours = ", ".join(sorted(one.metrics)) or "nothing"
            print(f"  {run_id}  {one.name}: {len(one.own)} figures under its own names; under ours: {ours}")
            told.append(
                {
                    "file": file,
                    "source": one.source,
                    "run_id": run_id,
                    "metrics": dict(one.metrics),
                    "own": dict(one.own),
                }
            )
    if given.json:
        print(json.dumps(told, ensure_ascii=False))
    return 0


def _reason(given: argparse.Namespace) -> str | None:
    """Return the reason for accepting suspect results, None if they are not accepted."""
    return _told(given.accept_suspect)


def _told(text: str | None) -> str | None:
    """Return the value of an option; None if it is empty or `none`, the default of an MLproject parameter."""
    text = (text or "").strip()
    return None if text in ("", "none") else text


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "recommend": _recommend,
    "register": _register,
    "gate": _gate,
    "promote": _promote,
    "export": _export,
    "reproduce": _reproduce,
    "import": _import,
}
