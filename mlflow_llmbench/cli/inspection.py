"""Commands that show what would be measured and what is here, and bring results into a store."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..records.text import plural
from .options import (
    CONFIG,
    EXPERIMENT,
    JSON,
    ONLY_JSON,
    RUN_OPTIONS,
    TRACKING_URI,
    Option,
    checked_parameters,
    command,
)
from .output import print_json


@command(
    "plan",
    "show what `run` would measure, and start nothing",
    *RUN_OPTIONS,
    CONFIG,
    JSON,
    description="Cells, needed memory and minimum time. It takes the same parameters.",
    first="model quant batch_size prompt_tokens preset",
    examples=(
        "plan --preset quick --model opt-125m",
        "plan --model llama-2-7b --quant fp16,int8,int4 --batch-size 1,16",
    ),
)
def plan(config: str | None, json: bool, **given: str | None) -> int:
    """Print the planned cells."""
    parameters = checked_parameters(given, config)

    from ..workflows import preview

    found = preview.preview(**parameters)
    print(preview.format_preview(found))
    if json:
        print_json(preview.preview_json(found))
    return 0


@command(
    "models",
    "list the model presets and which of them fit here",
    ONLY_JSON,
    examples=("models", "models --json"),
)
def models(json: bool) -> int:
    """Print the presets."""
    from ..reports import presets
    from ..workflows import doctor

    memory = doctor.memory_here()
    if json:
        print_json(presets.models_json(*memory), ensure_ascii=True)
    else:
        print(presets.models_table(*memory))
    return 0


@command(
    "doctor",
    "say what this machine can run, and what is missing",
    Option("--verbose", "show every item, with advice for what is missing", flag=True, short="-v"),
    ONLY_JSON,
    Option(
        "--worker-python",
        "examine this Python interpreter for workers, instead of the current one",
        "PATH",
        optional=True,
    ),
    examples=("doctor -v", "doctor --worker-python ~/envs/vllm/bin/python"),
)
def doctor(verbose: bool, json: bool, worker_python: str | None) -> int:
    """Print the report."""
    from ..records.codec import to_json
    from ..reports.doctor import format_items, format_report, format_summary
    from ..workflows import doctor

    report = doctor.examine_worker(worker_python) if worker_python else doctor.examine()
    if json:
        print_json(to_json(report), ensure_ascii=True)
    else:
        written = format_items if worker_python else format_report if verbose else format_summary
        print(written(report.items))
    return 0


@command(
    "upload",
    "upload what an MLflow store lacks of a results folder",
    Option("folder", "a sweep's folder, as printed by `llmbench run`", "FOLDER"),
    TRACKING_URI,
    EXPERIMENT,
    examples=("upload llmbench-results/SWEEP", "upload llmbench-results/SWEEP --tracking-uri http://127.0.0.1:5000"),
    store="first",
)
def upload(folder: str, tracking_uri: str | None, experiment: str | None) -> int:
    """Upload and print the counts of runs."""
    from ..sweeps.upload import upload

    done = upload(folder, tracking_uri, experiment)
    for problem in done.problems:
        print(f"llmbench: {problem}", file=sys.stderr)
    print(f"{done.new} runs uploaded, {done.completed} completed, {done.there} already there. Open them: {done.ui}")
    return int(bool(done.problems))


@command(
    "import",
    "import results of other benchmark programs",
    Option("files", "JSON file that the program wrote", "FILE", many=True),
    EXPERIMENT,
    JSON,
    TRACKING_URI,
    description="Reads files of vllm bench serve, GuideLLM, AIPerf, llama-bench and optimum-benchmark.",
    examples=("import vllm-results.json", "import guidellm.json llama-bench.json --experiment servers"),
    store="first",
)
def import_(files: Sequence[str], experiment: str | None, json: bool, tracking_uri: str | None) -> int:
    """Print the imported measurements of each file."""
    from ..workflows.import_results import import_file

    told = []
    for file in files:
        done = import_file(file, tracking_uri, experiment)
        count = plural(len(done.found), "measurement")
        print(f"{file}: {count} of {done.found[0].source}, {done.new} of them new.")
        for one, run_id in zip(done.found, done.run_ids, strict=True):
            ours = ", ".join(sorted(one.metrics)) or "nothing"
            print(f"  {run_id}  {one.name}: {plural(len(one.own), 'figure')} under its own names; under ours: {ours}")
            figures = {"metrics": dict(one.metrics), "own": dict(one.own)}
            told.append({"file": file, "source": one.source, "run_id": run_id, **figures})
    if json:
        print_json(told)
    return 0


@command(
    "completion",
    "print the completion script of your shell",
    Option("shell", "bash, zsh or fish", "[bash|zsh|fish]", words=("bash", "zsh", "fish")),
    description='For bash, add to ~/.bashrc: eval "$(llmbench completion bash)". For zsh, add the same with zsh to '
    "~/.zshrc, after compinit. For fish: llmbench completion fish > ~/.config/fish/completions/llmbench.fish.",
    examples=("completion bash", "completion fish"),
)
def completion(shell: str) -> int:
    """Print the script."""
    from .completion import script

    print(script(shell))
    return 0


COMMANDS = (plan, models, doctor, upload, import_, completion)
