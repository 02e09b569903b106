"""Command line: parse, call one function of the library, print. Slow imports happen inside the commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from . import __version__, decide
from .cell import Cell
from .errors import LlmbenchError, UsageError
from .redaction import Terminal, redact
from .spec import COMMANDS as PARAMETERS_OF
from .spec import PARAMETERS, default_text, parse, read_yaml
from .training import NAMES, TRAINING, parse_training
from .training import default_text as training_default

if TYPE_CHECKING:
    from .study import StudyResult
    from .sweep import SweepResult


class Parser(argparse.ArgumentParser):
    """ArgumentParser with errors in our form: one line, what is wrong and what to do, exit code 2."""

    def error(self, message: str) -> Any:
        """Raise UsageError instead of printing the usage and exiting."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; the options of `run` come from the declared parameters."""
    parser = Parser(
        prog="llmbench", description="Honest benchmarks of quantized language models, each one an MLflow run."
    )
    parser.add_argument("--version", action="version", version=f"llmbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    found = {**_measuring(commands), **_reading(commands)}
    for name in ("run", "plan", "online", "study"):
        found[name].add_argument(
            "--config",
            metavar="FILE",
            help="YAML file of parameters, such as a run's config.yaml; command-line options override it",
        )
    for name in ("compare", "ab"):
        found[name].add_argument(
            "--noise",
            metavar="RATIO",
            type=float,
            default=0.01,
            help="relative differences below this count as noise (default: 0.01)",
        )
    for name in ("run", "plan", "online", "compare", "ab", "scaling", "study", "qat"):
        found[name].add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    for name in ("run", "online", "upload", "compare", "ab", "scaling", "study", "qat"):
        found[name].add_argument(
            "--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or a SQLite file here)"
        )
        found[name].add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: llmbench)")
    for name, help in (
        ("models", "list the model presets and which of them fit on this machine"),
        ("doctor", "report what this machine and environment can do, and what is missing"),
    ):
        found[name] = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        found[name].add_argument("--json", action="store_true", help="print one JSON object instead of text")
    found["doctor"].add_argument(
        "--worker-python",
        metavar="PATH",
        help="examine this Python interpreter for workers, instead of the current one",
    )
    decide.add_parsers(commands)
    return parser


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


def _reading(commands: Any) -> dict[str, Parser]:
    """Add the commands that read results."""
    upload = commands.add_parser("upload", help="upload what an MLflow store lacks of a results folder")
    upload.add_argument("folder", metavar="FOLDER", help="a sweep's folder, as printed by `llmbench run`")
    compare = commands.add_parser(
        "compare", help="report how two or more results differ, and whether that is more than noise"
    )
    compare.add_argument(
        "references",
        nargs="+",
        metavar="RESULT",
        help="run id, runs:/ID, sweep, or results folder; all others are compared with the first",
    )
    compare.add_argument(
        "--allow",
        metavar="LIST",
        default="",
        help="compare despite these differences: hardware,software,workload,scenario,schema,verdict",
    )
    compare.add_argument(
        "--paired",
        action="store_true",
        help="pair the values: both were measured in alternating order, by process or by repetition",
    )
    compare.add_argument(
        "--log", metavar="RUN", help="log the comparison and its charts as artifacts of this run, under comparison/"
    )
    compare.add_argument("--output", metavar="FOLDER", help="write the comparison and its charts into this folder")
    scaling = commands.add_parser(
        "scaling", help="fit scaling laws to a sweep, and report what batch, length, size and quantization cost"
    )
    scaling.add_argument(
        "references",
        nargs="+",
        metavar="SWEEP",
        help="sweep, run id, runs:/ID, or results folder; several are studied together",
    )
    scaling.add_argument(
        "--share",
        metavar="RATIO",
        type=float,
        default=0.5,
        help="share of the best throughput per instance that a batch size must keep (default: 0.5)",
    )
    scaling.add_argument(
        "--at",
        metavar="NAME=LIST",
        action="append",
        default=[],
        help="also predict at these values: batch_size=6,12 or prompt_tokens=300",
    )
    scaling.add_argument(
        "--output", metavar="FOLDER", help="write scaling.json, scaling.md and charts into this folder"
    )
    scaling.add_argument(
        "--log", metavar="RUN", help="log them as artifacts of this run, such as the parent of the sweep"
    )
    return {"upload": upload, "compare": compare, "scaling": scaling}


def _add_parameters(command: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add one option per declared parameter."""
    for name in names:
        _add_parameter(
            command, name, PARAMETERS[name], default_text(name), " †" if PARAMETERS[name].metadata["sweep"] else ""
        )


def _add_parameter(command: argparse.ArgumentParser, name: str, declared: Field[Any], default: str, mark: str) -> None:
    flag: dict[str, Any] = {"nargs": "?", "const": "true"} if declared.metadata["kind"] == "flag" else {}
    text = f"{declared.metadata['help']}{mark} (default: {default})".replace("%", "%%")
    command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=text, **flag)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for a wrong parameter, 130 if interrupted.

    `gate` and `reproduce` have further exit codes.
    """
    for name in SIGNALS:
        signal.signal(name, _interrupt)
    with (
        contextlib.redirect_stdout(cast(TextIO, Terminal(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, Terminal(sys.stderr))),
    ):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        given = build_parser().parse_args(arguments)
        return COMMANDS[given.command](given)
    except LlmbenchError as error:
        print(f"llmbench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmbench: interrupted before anything was measured.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()  # inside `main`, whose streams redact secrets
        return 1


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command in order: from Ctrl-C, a scheduler, or a closed terminal."""


def _interrupt(*_: object) -> None:
    """Handle the first signal only. Later ones are ignored until every run has ended and its results are saved."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parameters(given: argparse.Namespace) -> dict[str, object]:
    """Return the parameters of the file and the options, checked before anything slow is imported."""
    parameters: dict[str, object] = read_yaml(given.config) if given.config else {}
    parameters |= {name: value for name in PARAMETERS if (value := getattr(given, name, None)) is not None}
    if given.command == "online":
        parameters.setdefault("backend", "openai")
    parse(parameters)
    return parameters


def _plan(given: argparse.Namespace) -> int:
    parameters = _parameters(given)

    from . import preview

    found = preview.preview(**parameters)
    print(preview.format_preview(found))
    if given.json:
        print(json.dumps(preview.preview_json(found), ensure_ascii=False))
    return 0


def _run(given: argparse.Namespace) -> int:
    parameters = _parameters(given)

    from . import sweep
    from .progress import Progress

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

    from . import ab, compare
    from .progress import Progress

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
    print(compare.format_comparison(duel.comparison))
    _print_where(duel.sweep)
    if given.json:
        print(json.dumps({**compare.comparison_json(duel.comparison), **_as_json(duel.sweep)}, ensure_ascii=False))
    return duel.sweep.exit_code


def _warn_of_versions() -> None:
    from .packages import warnings_of_versions

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


def _upload(given: argparse.Namespace) -> int:
    from .upload import upload

    done = upload(given.folder, given.tracking_uri, given.experiment)
    print(f"{done.new} runs uploaded, {done.completed} completed, {done.there} already there. Open them: {done.ui}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    from . import artifacts, compare
    from .evidence import load_results

    allow = frozenset(filter(None, given.allow.split(",")))
    if unknown := sorted(allow - set(compare.ALLOWABLE)):
        raise UsageError(f"Unknown difference to allow: {unknown[0]}. Known: {', '.join(compare.ALLOWABLE)}.")
    results = [result for reference in given.references for result in load_results(reference, given.tracking_uri)]
    if len(results) < 2:
        raise UsageError(
            "A comparison needs two results, and there is one. Give another run, or the folder of a sweep."
        )
    comparisons = [
        compare.compare(results[0], other, noise=given.noise, allow=allow, paired=given.paired) for other in results[1:]
    ]
    for comparison in comparisons:
        print(f"{compare.format_comparison(comparison)}\n")
    _keep(given, lambda folder: artifacts.write_comparisons(comparisons, folder), "comparison")
    if given.json:
        print(json.dumps([compare.comparison_json(comparison) for comparison in comparisons], ensure_ascii=False))
    return 0


def _keep(given: argparse.Namespace, write: Callable[[Path], object], under: str) -> None:
    """Write the findings of a command into a folder (`--output`) and log them on a run under `under` (`--log`)."""
    if given.output:
        write(Path(given.output))
        print(f"Written: {given.output}")
    if given.log:  # from a temporary folder: the other may hold the user's own files
        from . import tracking

        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            tracking.log_folder(
                tracking.open_store(given.tracking_uri), given.log.removeprefix("runs:/"), Path(scratch), under
            )


def _scaling(given: argparse.Namespace) -> int:
    from . import artifacts, scaling_report
    from .evidence import load_results
    from .scaling_study import study_scaling

    places = [place for text in given.at for place in _places(text)]
    results = [result for reference in given.references for result in load_results(reference, given.tracking_uri)]
    study = study_scaling(results, given.share, places)
    print(scaling_report.format_study(study))
    _keep(given, lambda folder: artifacts.write_scaling(study, folder), "scaling")
    if given.json:
        print(json.dumps(scaling_report.study_json(study), ensure_ascii=False))
    return 0


def _study(given: argparse.Namespace) -> int:
    named = _parameters(given)
    asked = any(name == "preset" or name in Cell.__dataclass_fields__ for name in named)

    from . import study, study_report
    from .progress import Progress

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
        print(study_report.format_study(done.found))
    _print_study(done)
    if given.json:
        told: dict[str, Any] = {"run_id": done.run_id, "study_folder": str(done.folder) if done.folder else None}
        told |= {"study": study_report.study_json(done.found, ())} if done.found else {}
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

    from . import qat, training_report
    from .records import to_json

    _warn_of_versions()
    done = qat.train_quantized(
        named,
        tracking_uri=given.tracking_uri,
        experiment=given.experiment,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(training_report.format_trained(done))
    print(f"\nResults: {done.folder}" + (f"\nLogged on run {done.run_id}." if done.run_id else ""))
    if done.checkpoint:
        print(
            f"Run it: llmbench run --model {shlex.quote(done.checkpoint)} --quant int4-wo "
            f"--group-size {done.cell.group_size}"
        )
    if given.json:
        print(json.dumps({**to_json(done), "metrics": training_report.training_figures(done)}, ensure_ascii=False))
    return done.exit_code


def _places(text: str) -> list[tuple[str, float]]:
    """Parse `batch_size=6,12` into (name, value) pairs to predict at. Raises UsageError."""
    name, _, values = text.partition("=")
    if name not in ("batch_size", "prompt_tokens"):
        raise UsageError(f"--at takes batch_size or prompt_tokens and a list: {text}. Give --at batch_size=6,12.")
    try:
        return [(name, float(value)) for value in values.split(",")]
    except ValueError:
        raise UsageError(f"--at has a value that is not a number: {text}. Give --at {name}=6,12.") from None


def _models(given: argparse.Namespace) -> int:
    from . import gpu, memory, model_table

    devices = gpu.gpus()
    room = (memory.available_bytes(), devices[0]["memory_bytes"] if devices else None)
    print(json.dumps(model_table.models_json(*room)) if given.json else model_table.models_table(*room))
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from . import doctor
    from .records import to_json

    if given.worker_python:
        python = str(parse({"worker_python": given.worker_python}).first.worker_python)
        report = doctor.examine_worker(python)
        print(json.dumps(to_json(report)) if given.json else doctor.format_items(report.items))
        return 0
    found = doctor.examine()
    print(json.dumps(to_json(found)) if given.json else doctor.format_report(found))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "online": _run,
    "ab": _ab,
    "upload": _upload,
    "compare": _compare,
    "scaling": _scaling,
    "study": _study,
    "qat": _qat,
    "models": _models,
    "doctor": _doctor,
} | decide.COMMANDS
