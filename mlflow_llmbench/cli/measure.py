"""Commands that measure: quickstart, run, online, tune, ab, study, calibrate, qat."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.spec import parse, with_backend
from ..config.training import parse_training
from ..records.backends import SERVER_BACKEND
from ..records.cell import Cell, split_list
from ..records.invocation import DEPLOYMENT
from .options import (
    ACCEPT_SUSPECT,
    CONFIG,
    EXPERIMENT,
    GOAL,
    JSON,
    LIMITS,
    NOISE,
    ONLINE_OPTIONS,
    RUN_OPTIONS,
    SHARE,
    SINGLE_OPTIONS,
    TRACKING_URI,
    TUNE_OPTIONS,
    WORDS,
    Option,
    checked_parameters,
    command,
    given_parameters,
    named_options,
    parameter_options,
    training_options,
)
from .output import known, print_json, print_version_warnings, progress


@command(
    "quickstart",
    "from nothing to a decision, with a small model",
    Option(
        "--model",
        "preset, Hub id or local folder (default: auto, the smallest real model that can be had here)",
        "MODEL|auto",
        default="auto",
    ),
    Option(
        "--quant",
        "two or more quantizations (default: auto, which is bf16,int4, and q4_k_m if llama.cpp is installed)",
        "SCHEME,…|auto",
        default="auto",
        words=("auto", *WORDS["quant"]),
        listed=True,
    ),
    *parameter_options(("backend", "output_dir", "rerun"), lists=False),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="Says what it will do and what that takes, measures, and ends with the configuration to deploy and the "
    "next commands. It works without a network. Called again, it measures what is not valid yet.",
    examples=("quickstart", "quickstart --model gemma-3-270m --quant bf16,int8,int4"),
    entry_point="quickstart",
    store="later",
)
def quickstart(
    model: str, quant: str, backend: str | None, output_dir: str | None, rerun: str | None, json: bool,
    tracking_uri: str | None, experiment: str | None,
) -> int:  # fmt: skip
    """Measure a small model in a few configurations and print which one to deploy."""
    given = named_options({"backend": backend, "output_dir": output_dir, "rerun": rerun})
    checked_parameters(given | ({"quant": quant} if quant != "auto" else {}))

    from ..reports.quickstart import format_quickstart, format_quickstart_plan, quickstart_json
    from ..workflows import quickstart

    print_version_warnings()
    prepared = quickstart.prepare(model, quant, given)
    print(f"{format_quickstart_plan(prepared.plan)}\n", flush=True)
    with progress() as shown:
        done = quickstart.quickstart(prepared, tracking_uri=tracking_uri, experiment=experiment, watcher=shown)
    print(format_quickstart(done))
    if json:
        print_json(quickstart_json(done))
    return done.sweep.exit_code


@command(
    "run",
    "measure one configuration, or a sweep",
    *RUN_OPTIONS,
    CONFIG,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    first="model quant batch_size prompt_tokens output_tokens",
    examples=(
        "run --model opt-125m --weights random --quant bf16,int4 --batch-size 1,4",
        "run --model gemma-3-270m --quant none,int8-wo --workload qa --prompt-tokens auto --quality auto",
    ),
    entry_point="main",
    store="later",
)
def run(config: str | None, json: bool, tracking_uri: str | None, experiment: str | None, **given: str | None) -> int:
    """Measure and print the table of cells."""
    return _run(checked_parameters(given, config), json, tracking_uri, experiment)


@command(
    "online",
    "measure a model behind an OpenAI-compatible server",
    *ONLINE_OPTIONS,
    CONFIG,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="The API key comes from the environment: LLMBENCH_API_KEY or OPENAI_API_KEY.",
    first="url launch model concurrency request_rate",
    examples=(
        "online --url http://127.0.0.1:8000 --model NAME --concurrency 1,4,16",
        "online --launch 'vllm serve {model} --port {port}' --model facebook/opt-125m --request-rate 1,2,4",
    ),
    entry_point="online",
    store="later",
)
def online(
    config: str | None, json: bool, tracking_uri: str | None, experiment: str | None, **given: str | None
) -> int:
    """Measure a server and print the table of cells."""
    if str(given.get("url")).startswith(DEPLOYMENT):
        from ..workflows.deployments import address_of

        given["url"] = address_of(str(given["url"]))
    return _run(checked_parameters(given, config, backend=SERVER_BACKEND), json, tracking_uri, experiment)


@command(
    "tune",
    "search configurations for the best one, with few measurements",
    GOAL,
    *LIMITS,
    Option("--trials", "most configurations to measure (default: a third of the grid)", "N", optional=True),
    ACCEPT_SUSPECT,
    *TUNE_OPTIONS,
    CONFIG,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="Lists make the grid, as for run, or with --launch or --url as for online. Each trial is a cell of one "
    "sweep, and the winner is chosen as by recommend. The same command again goes on where it was stopped.",
    first="model quant batch_size goal max_tpot",
    examples=(
        "tune --model opt-125m --quant bf16,int8,int4 --batch-size 1,2,4,8,16 --max-tpot 60ms",
        "tune --launch 'A --port {port} ; B --port {port}' --model NAME --concurrency 1,4,16 --max-ttft p95=500ms",
    ),
    entry_point="tune",
    store="later",
)
def tune(
    goal: str, max_memory: str | None, max_ttft: str | None, max_tpot: str | None, min_quality: str | None,
    trials: str | None, accept_suspect: str | None, config: str | None, json: bool, tracking_uri: str | None,
    experiment: str | None, **given: str | None,
) -> int:  # fmt: skip
    """Say what will be measured, measure it, and print the winner and how far the search goes."""
    parameters = given_parameters(given, config)
    parse(with_backend(parameters))  # before anything slow is imported

    from ..analysis.decisions.limits import read_limits
    from ..reports.tuning import format_tuning, format_tuning_plan, tuning_result_json
    from ..workflows import tune

    limits = read_limits(max_memory, max_ttft, max_tpot, min_quality)
    own = {
        "goal": goal, "max_memory": max_memory, "max_ttft": max_ttft, "max_tpot": max_tpot, "min_quality": min_quality,
        "trials": trials, "accept_suspect": accept_suspect,
    }  # fmt: skip
    print_version_warnings()
    with progress(plans=False) as shown:
        done = tune.search(
            parameters,
            named_options(own),
            limits,
            destination=(tracking_uri, experiment),
            listener=shown,
            on_plan=lambda told: print(f"{format_tuning_plan(told)}\n", flush=True),
        )
    print(format_tuning(done))
    if json:
        print_json(tuning_result_json(done))
    return done.exit_code


@command(
    "ab",
    "measure two configurations in turns and compare them",
    Option("a", "parameters of this side: name=value, or several in quotes", "A"),
    Option("b", "the same for the other side; two equal sides show the noise of the machine", "B"),
    Option("--pairs", "fresh processes per side (default: 6)", "N", default=6, type=int),
    *(option for option in SINGLE_OPTIONS if option.argument != "processes"),
    NOISE,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="Each process is a fresh one. This is the most sensitive comparison.",
    first="pairs model weights batch_size output_tokens",
    examples=(
        "ab quant=bf16 quant=int4 --model opt-125m --weights random",
        "ab 'quant=int4 threads=1' 'quant=int4 threads=2' --model opt-125m --pairs 10",
    ),
    store="later",
)
def ab(
    a: str, b: str, pairs: int, noise: float, json: bool, tracking_uri: str | None, experiment: str | None,
    **given: str | None,
) -> int:  # fmt: skip
    """Measure both sides and print their comparison."""
    common = checked_parameters(given)

    from ..reports import comparison
    from ..reports.sweep_result import format_locations, sweep_json
    from ..workflows import ab

    print_version_warnings()
    with progress() as shown:
        done = ab.run_ab(
            ab.parse_side(a),
            ab.parse_side(b),
            common,
            pairs=pairs,
            noise=noise,
            tracking_uri=tracking_uri,
            experiment=experiment,
            watcher=shown,
        )
    print(f"{comparison.format_comparison(done.comparison)}\n\n{format_locations(done.sweep)}")
    if json:
        print_json({**comparison.comparison_json(done.comparison), **sweep_json(done.sweep)})
    return done.sweep.exit_code


@command(
    "study",
    "measure a grid of models: laws, trade-offs, recommendations",
    Option("--of", "existing results to include: sweeps, run ids, runs:/ID or results folders", "LIST", many=True),
    SHARE,
    Option(
        "--price",
        "price in money per hour: 0.5, or by part of the hardware's name: EPYC=0.5,A100=2.4; or what it cost over its "
        "years: 1600/3y (default: none)",
        "LIST",
        optional=True,
    ),
    Option(
        "--accept-suspect",
        "also recommend suspect results, for this reason; none = do not",
        "REASON",
        optional=True,
    ),
    Option(
        "--output",
        "write study/ and scaling/ into this folder (default: the folder of the measured sweep)",
        "FOLDER",
        panel="results",
    ),
    Option("--log", "log them as artifacts of this run (default: the sweep's run)", "RUN", panel="results"),
    *RUN_OPTIONS,
    CONFIG,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="Measures a sweep (preset quick unless another is given) and studies it together with existing "
    "results (--of). With --of and no sweep parameters, it studies only the existing results.",
    first="model weights preset of price",
    examples=(
        "study --model opt-125m,pythia-70m --weights random",
        "study --of SWEEP_A,SWEEP_B --price EPYC=0.5,A100=2.4",
    ),
    entry_point="study",
    store="later",
)
def study(
    of: Sequence[str], share: float, price: str | None, accept_suspect: str | None, output: str | None, log: str | None,
    config: str | None, json: bool, tracking_uri: str | None, experiment: str | None, **given: str | None,
) -> int:  # fmt: skip
    """Study the results and print the findings."""
    parameters = checked_parameters(given, config)
    measures = any(name == "preset" or name in Cell.__dataclass_fields__ for name in parameters)

    from ..reports.study import study_json
    from ..reports.study_result import format_study_result
    from ..reports.sweep_result import sweep_json
    from ..workflows import study

    references = _references(of, tracking_uri, experiment)
    prices = study.parse_prices(price or "none")
    print_version_warnings()
    with progress() as shown:
        done = study.run_study(
            parameters if measures or not references else None,
            of=references,
            share=share,
            prices=prices,
            accept_suspect=accept_suspect,
            output=output,
            log=log,
            tracking_uri=tracking_uri,
            experiment=experiment,
            watcher=shown,
        )
    print(format_study_result(done))
    if json:
        told: dict[str, Any] = {"run_id": done.run_id, "study_folder": str(done.folder) if done.folder else None}
        told |= {"study": study_json(done.found, ())} if done.found else {}
        print_json({**told, **(sweep_json(done.sweep) if done.sweep else {})})
    return done.exit_code


@command(
    "calibrate",
    "measure the noise between processes on this machine",
    Option(
        "--of",
        "use existing results of 3 or more processes instead: runs, runs:/ID or results folders",
        "LIST",
        many=True,
    ),
    *SINGLE_OPTIONS,
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="Measures one configuration in fresh processes (10 processes of 20 repetitions unless given) and keeps "
    "their noise, by hardware, backend and device. Comparisons of single processes then use it. Choose a model of about"
    " the size that you compare.",
    first="model weights quant processes of",
    examples=("calibrate --model opt-125m --weights random", "calibrate --of RUN_A,RUN_B,RUN_C"),
    store="later",
)
def calibrate(
    of: Sequence[str], json: bool, tracking_uri: str | None, experiment: str | None, **given: str | None
) -> int:
    """Measure, keep and print the noise between processes."""
    parameters = checked_parameters(given)

    from ..records.codec import to_json
    from ..reports.calibration import format_calibration
    from ..reports.sweep_result import format_locations
    from ..workflows import calibrate

    print_version_warnings()
    with progress() as shown:
        done = calibrate.calibrate(
            parameters,
            of=_references(of, tracking_uri, experiment),
            tracking_uri=tracking_uri,
            experiment=experiment,
            watcher=shown,
        )
    print(format_calibration(done.calibration))
    print(f"Kept: {done.file}")
    if done.sweep:
        print(f"\n{format_locations(done.sweep)}")
    if json:
        print_json({**to_json(done.calibration), "file": str(done.file)})
    return 0


@command(
    "qat",
    "train a model for int4-wo: how much quality that recovers",
    *training_options(),
    JSON,
    TRACKING_URI,
    EXPERIMENT,
    description="Quantization-aware training on your own text. Reports how much of the lost quality it recovers. The "
    "checkpoint can be measured like any other model.",
    first="model data steps learning_rate output",
    examples=(
        "qat --model gemma-3-270m --data my-text.txt --steps 200 --output gemma-qat",
        "run --model gemma-qat --quant int4-wo",
    ),
    entry_point="qat",
    store="first",
)
def qat(json: bool, tracking_uri: str | None, experiment: str | None, **given: str | None) -> int:
    """Train and print the quality before and after."""
    named = named_options(given)
    parse_training(named)  # before anything slow is imported

    from ..records.codec import to_json
    from ..reports.qat import format_trained, training_figures
    from ..workflows import qat

    print_version_warnings()
    done = qat.train_quantized(
        named,
        tracking_uri=tracking_uri,
        experiment=experiment,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(format_trained(done))
    if json:
        print_json({**to_json(done), "metrics": training_figures(done)})
    return done.exit_code


COMMANDS = (quickstart, run, online, tune, ab, study, calibrate, qat)


def _references(texts: Sequence[str], tracking_uri: str | None, experiment: str | None) -> list[str]:
    """Return the references in lists such as `RUN,SWEEP`; a path that exists may contain commas. `none` is none."""
    parts = [part for text in texts for part in ([text] if os.path.exists(text) else split_list(text))]
    return known([part for part in parts if part != "none"], tracking_uri, experiment)


def _run(parameters: Mapping[str, object], json: bool, tracking_uri: str | None, experiment: str | None) -> int:
    from ..reports.sweep_result import format_sweep_result, sweep_json

    print_version_warnings()
    with progress() as shown:
        from ..sweeps import sweep

        result = sweep.run(tracking_uri=tracking_uri, experiment=experiment, watcher=shown, **parameters)
    print(format_sweep_result(result))
    if json:
        print_json(sweep_json(result))
    return result.exit_code
