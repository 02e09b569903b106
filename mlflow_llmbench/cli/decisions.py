"""Commands that decide: recommend, register, gate, promote, export, reproduce, import.

Each parses its options, calls one function of the library and prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..analysis.decisions.limits import _limits, _told
from ..records.cell import default_text
from ..records.errors import LlmbenchError
from ..workflows.gate import _candidate, _held, _permissions, _reason, _write_gate
from ..workflows.recommend import _keep_recommendation


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
    _add_permissions(gate)
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
    _add_permissions(reproduce)
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


def _add_permissions(parser: Any) -> None:
    """Add the options for permissions that are not taken over from a run that is measured again."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, if the run did"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read weights stored as a pickle, if the run did")


def _add_common(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or a SQLite file here)"
    )


def _recommend(given: argparse.Namespace) -> int:
    from ..analysis.decisions import recommend
    from ..reports import recommendation
    from ..tracking.load_results import load_results

    limits = _limits(given)
    results = [result for reference in given.references for result in load_results(reference, given.tracking_uri)]
    allow = frozenset(filter(None, (_told(given.allow) or "").split(",")))
    found = recommend.recommend(results, given.goal, limits, accept_suspect=_reason(given), allow=allow)
    print(recommendation.format_recommendation(found))
    _keep_recommendation(given, found, results)
    if given.json:
        print(json.dumps(recommend.recommendation_json(found), ensure_ascii=False))
    return 0 if found.winner else 1


def _register(given: argparse.Namespace) -> int:
    from ..tracking import registry
    from ..tracking.store import open_store

    store = open_store(given.tracking_uri)
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
    from ..analysis.decisions import gate
    from ..reports.gate import format_gate, gate_junit, gate_markdown
    from ..tracking import registry
    from ..tracking.store import open_store

    limits, limit = (
        gate.parse_limits(_told(given.limit) or ""),
        gate.parse_ratio("--default-limit", given.default_limit),
    )
    store = open_store(given.tracking_uri)
    champion = registry.registered_at(store, given.against)
    baseline = registry.result_of(store, champion.run_id)
    candidate, run_id, shown = _candidate(given, store, baseline)
    found, measured = _held(given, baseline, candidate, limits, limit)
    print(format_gate(found, champion.uri, shown))
    texts = {"gate.md": gate_markdown, "junit.xml": gate_junit}
    files = {name: write(found, champion.uri, shown).encode() for name, write in texts.items()}
    _write_gate(given, found, files, store, champion, run_id, measured)
    if given.json:
        told = {"champion": champion.uri, "candidate": shown, "run_id": run_id, "measured": measured}
        print(json.dumps({**gate.gate_json(found), **told}, ensure_ascii=False))
    return found.exit_code


def _promote(given: argparse.Namespace) -> int:
    from ..tracking import registry
    from ..tracking.store import open_store

    done = registry.promote(open_store(given.tracking_uri), given.version)
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
    from ..analysis.decisions.export import export
    from ..measure.journal import write_bytes
    from ..tracking import registry
    from ..tracking.store import open_store

    store = open_store(given.tracking_uri)
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
    from ..analysis.decisions.gate import parse_ratio

    margin = parse_ratio("--margin", given.margin)

    from ..reports import comparison, reproduction
    from ..sweeps.progress import Progress
    from ..workflows import reproduce

    done = reproduce.reproduce(
        given.reference,
        margin=margin,
        permissions=_permissions(given),
        url=_told(given.url),
        output_dir=given.output_dir,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        watcher=Progress(sys.stderr),
        say=print,
    )
    print(reproduction.format_reproduction(done.found))
    if done.comparison:
        print(f"\n{comparison.format_comparison(done.comparison)}")
    if done.sweep:
        print(f"\nResults: {done.sweep.folder}")
    if given.json:
        told = {"original": done.original.name, "original_run_id": done.original.run_id, "run_id": done.run_id}
        print(json.dumps({**reproduction.reproduction_json(done.found), **told}, ensure_ascii=False))
    return done.found.exit_code


def _import(given: argparse.Namespace) -> int:
    from ..workflows.import_results import import_file

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


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "recommend": _recommend,
    "register": _register,
    "gate": _gate,
    "promote": _promote,
    "export": _export,
    "reproduce": _reproduce,
    "import": _import,
}
