"""Commands that measure: run, online, ab, study, qat and plan."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config.spec import COMMANDS as PARAMETERS_OF
from ..config.spec import parse, read_yaml
from ..config.training import NAMES, TRAINING, parse_training
from ..config.training import default_text as training_default
from ..records.backends import SERVER_BACKEND
from ..records.cell import PARAMETERS, Cell
from ..records.redaction import redact
from .options import Parser, _add_parameter, _add_parameters

if TYPE_CHECKING:
    from ..sweeps.sweep import SweepResult
    from ..workflows.study import StudyResult


def _measuring(commands: Any) -> dict[str, Parser]:
    """Add the commands that measure, and `plan`, which previews `run`."""
    run = commands.add_parser(
        "run",
        help="measure one configuration, or a sweep",
        description="Comma lists on parameters marked † make a sweep: one run per cell.",
    )
    _add_parameters(run, PARAMETERS_OF["run"])
    plan = commands.add_parser(
        "plan",
        help="show what `run` would measure with the same parameters (cells, memory, minimum time); starts nothing",
    )
    _add_parameters(plan, PARAMETERS_OF["run"])
    online = commands.add_parser(
        "online",
        help="measure a model behind an OpenAI-compatible server",
        description="The API key comes from the environment: LLMBENCH_API_KEY or OPENAI_API_KEY. "
        "Comma lists on parameters marked † make a sweep.",
    )
    _add_parameters(online, PARAMETERS_OF["online"])
    duel = commands.add_parser(
        "ab",
        help="measure two configurations in alternating fresh processes, and report how they differ",
        description="Each side is name=value, or several in quotes: "
        "llmbench ab quant=bf16 'quant=int4 threads=1' --model opt-125m. Two equal sides show the machine's noise.",
    )
    for side in ("a", "b"):
        duel.add_argument(side, metavar=side.upper(), help="the parameters of this side")
    duel.add_argument("--pairs", metavar="N", type=int, default=6, help="fresh processes per side (default: 6)")
    _add_parameters(duel, [name for name in PARAMETERS_OF["run"] if name != "processes"])
    study = commands.add_parser(
        "study",
        help="measure a grid of models, and report laws, trade-offs, claims and recommendations with all figures",
        description="Measures a sweep (preset quick unless another is given) and studies it together with existing "
        "results (--of). With --of and no sweep parameters, it studies only the existing results.",
    )
    study.add_argument(
        "--of",
        metavar="LIST",
        action="append",
        default=[],
        help="existing results to include: sweeps, run ids, runs:/ID or results folders",
    )
    study.add_argument(
        "--share",
        metavar="RATIO",
        type=float,
        default=0.5,
        help="share of the best throughput per instance that a batch size must keep (default: 0.5)",
    )
    study.add_argument(
        "--price",
        metavar="LIST",
        default="none",
        help="price in money per hour: 0.5, or by part of the hardware's name: EPYC=0.5,A100=2.4 (default: none)",
    )
    study.add_argument(
        "--accept-suspect", metavar="REASON", help="also recommend suspect results, for this reason; none = do not"
    )
    study.add_argument(
        "--output",
        metavar="FOLDER",
        help="write study/ and scaling/ into this folder (default: the folder of the measured sweep)",
    )
    study.add_argument("--log", metavar="RUN", help="log them as artifacts of this run (default: the sweep's run)")
    _add_parameters(study, PARAMETERS_OF["run"])
    qat = commands.add_parser(
        "qat",
        help="train a model for int4-wo, and report how much of the lost quality it recovers",
        description="Quantization-aware training on your own text. The checkpoint can be measured like any other "
        "model: llmbench run --model FOLDER --quant int4-wo.",
    )
    for name in NAMES:
        _add_parameter(qat, name, TRAINING.get(name) or PARAMETERS[name], training_default(name), "")
    return {"run": run, "plan": plan, "online": online, "ab": duel, "study": study, "qat": qat}


def _parameters(given: argparse.Namespace) -> dict[str, object]:
    """Return the parameters of the file and the options, checked before anything slow is imported."""
    parameters: dict[str, object] = read_yaml(given.config) if given.config else {}
    parameters |= {name: value for name in PARAMETERS if (value := getattr(given, name, None)) is not None}
    if given.command == "online":
        parameters.setdefault("backend", SERVER_BACKEND)
    parse(parameters)
    return parameters


def _plan(given: argparse.Namespace) -> int:
    parameters = _parameters(given)

    from ..workflows import preview

    found = preview.preview(**parameters)
    print(preview.format_preview(found))
    if given.json:
        print(json.dumps(preview.preview_json(found), ensure_ascii=False))
    return 0


def _run(given: argparse.Namespace) -> int:
    parameters = _parameters(given)

    from ..sweeps import sweep
    from ..sweeps.progress import Progress

    _warn_of_versions()
    result = sweep.run(
        tracking_uri=given.tracking_uri, experiment=given.experiment, watcher=Progress(sys.stderr), **parameters
    )
    print(result.table())
    for sentence in result.sentences:
        print(f"\n{sentence}")
    _print_where(result)
    if given.json:
        print(json.dumps(_as_json(result), ensure_ascii=False))
    return result.exit_code


def _ab(given: argparse.Namespace) -> int:
    common = {name: value for name in PARAMETERS if (value := getattr(given, name, None)) is not None}
    parse(common)  # before anything slow is imported

    from ..reports import comparison
    from ..sweeps.progress import Progress
    from ..workflows import ab

    _warn_of_versions()
    duel = ab.run_ab(
        ab.parse_side(given.a),
        ab.parse_side(given.b),
        common,
        pairs=given.pairs,
        noise=given.noise,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        watcher=Progress(sys.stderr),
    )
    print(comparison.format_comparison(duel.comparison))
    _print_where(duel.sweep)
    if given.json:
        print(json.dumps({**comparison.comparison_json(duel.comparison), **_as_json(duel.sweep)}, ensure_ascii=False))
    return duel.sweep.exit_code


def _warn_of_versions() -> None:
    from ..backends.packages import warnings_of_versions

    for line in warnings_of_versions():
        print(f"llmbench: {line}", file=sys.stderr)


def _print_where(result: SweepResult) -> None:
    """Print where the results are and how to open them."""
    print(f"\nResults: {result.folder}")
    for line in result.not_uploaded:
        print(f"Not uploaded: {line}")
    what = "comparison" if result.parent_id else "run"
    if result.ui.startswith("http"):
        print(f"Open the {what}: {result.ui}/{result.page}")
    else:
        print(f"Open the {what}: {result.ui}\nthen http://127.0.0.1:5000/{result.page}")
    if result.not_uploaded:
        print(f"Upload the rest: llmbench upload {shlex.quote(str(result.folder))}")


def _as_json(result: SweepResult) -> Mapping[str, Any]:
    """Return the result as one JSON object: outcome, locations, and runs with their parameters and metrics."""
    runs = [
        {
            "run_id": run_id,
            "outcome": row.outcome,
            "verdict": row.verdict.word if row.verdict else None,
            "verdict_reasons": [reason.code for reason in row.verdict.reasons] if row.verdict else [],
            "params": vars(row.cell),
            "metrics": dict(row.metrics),
            "message": row.message or None,
        }
        for run_id, row in zip(result.run_ids, result.rows, strict=True)
    ]
    where = {
        "parent_run_id": result.parent_id,
        "tracking_uri": redact(result.tracking_uri),
        "experiment_id": result.experiment_id,
        "folder": str(result.folder),
        "not_uploaded": list(result.not_uploaded),
    }
    return {"outcome": result.outcome, **where, "runs": runs}


def _study(given: argparse.Namespace) -> int:
    named = _parameters(given)
    asked = any(name == "preset" or name in Cell.__dataclass_fields__ for name in named)

    from ..reports.study import format_study, study_json
    from ..sweeps.progress import Progress
    from ..workflows import study

    references = [
        part for text in given.of for part in ([text] if os.path.exists(text) else text.split(",")) if part != "none"
    ]
    prices = study.parse_prices(given.price)
    _warn_of_versions()
    done = study.run_study(
        named if asked or not references else None,
        of=references,
        share=given.share,
        prices=prices,
        accept_suspect=None if given.accept_suspect == "none" else given.accept_suspect,
        output=given.output,
        log=given.log,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        watcher=Progress(sys.stderr),
    )
    if done.sweep:
        print(f"{done.sweep.table()}\n")
    if done.found:
        print(format_study(done.found))
    _print_study(done)
    if given.json:
        told: dict[str, Any] = {"run_id": done.run_id, "study_folder": str(done.folder) if done.folder else None}
        told |= {"study": study_json(done.found, ())} if done.found else {}
        print(json.dumps({**told, **(_as_json(done.sweep) if done.sweep else {})}, ensure_ascii=False))
    return done.exit_code


def _print_study(done: StudyResult) -> None:
    """Print where the study is."""
    if done.sweep:
        _print_where(done.sweep)
    if done.found and done.folder:
        print(f"Report: {done.folder / 'study' / 'report.html'}")
    if done.found:
        print(
            f"Logged on run {done.run_id}: study/report.html."
            if done.run_id
            else "Not logged: the store has no run of these sweeps. Give --log RUN."
        )


def _qat(given: argparse.Namespace) -> int:
    named = {name: value for name in NAMES if (value := getattr(given, name)) is not None}
    parse_training(named)  # before anything slow is imported

    from ..records.results import to_json
    from ..reports.qat import format_trained, training_figures
    from ..workflows import qat

    _warn_of_versions()
    done = qat.train_quantized(
        named,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(format_trained(done))
    print(f"\nResults: {done.folder}" + (f"\nLogged on run {done.run_id}." if done.run_id else ""))
    if done.checkpoint:
        print(
            f"Run it: llmbench run --model {shlex.quote(done.checkpoint)} --quant int4-wo "
            f"--group-size {done.cell.group_size}"
        )
    if given.json:
        print(json.dumps({**to_json(done), "metrics": training_figures(done)}, ensure_ascii=False))
    return done.exit_code
