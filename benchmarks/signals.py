"""Signals at random moments: `python benchmarks/signals.py [--times N] [--seed S] [--jobs J] [--out FILE]`.

Each time a real `llmbench run` (fake backend, SQLite store) gets SIGINT, SIGTERM or SIGKILL: at any moment, while a
cell is measured, or while its results are written and uploaded. Then the documented next command is run: `llmbench
upload FOLDER`, or the same command again. Counts false states (a run with a good status and without its figures, a run
that is RUNNING for ever, one that ends before it begins), measurements that were on the disk and did not arrive,
processes left behind, and tracebacks. All must be 0. Needs Linux; 100 signals take half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

from mlflow_llmbench.measure import journal
from mlflow_llmbench.measure.events import CellCompleted
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.system import machine

ROOT = Path(__file__).resolve().parent.parent
CELL = "--backend fake --model fake:ttft_ms=2+itl_ms=2 --prompt-tokens 4 --output-tokens 8 --repetitions 10 --warmup 1"
SWEEPS = {
    "one cell": "",
    "two cells": "--batch-size 1,2",
    "two loads": "--threads 1,2",
    "three processes": "--processes 3",
    "two cells, three processes": "--batch-size 1,2 --processes 3",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MOMENTS = ("any", "measuring", "uploading")
MARK = "LLMBENCH_ATTACK"
LONG_S = 240.0
BAD = ("false_states", "lost", "left", "tracebacks")


def begin(sweep: str, folder: Path, mark: str) -> subprocess.Popen[str]:
    """Start the measuring command in a folder, which gets the store and the results too."""
    command = [sys.executable, "-m", "mlflow_llmbench", "run", *CELL.split(), *SWEEPS[sweep].split()]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder, mark),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def environment(folder: Path, mark: str) -> dict[str, str]:
    """Return the variables of a command. `MARK` is inherited by all of its processes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true", MARK: mark}
    return kept | own | {"PYTHONPATH": str(ROOT)}


def left_behind(mark: str) -> list[int]:
    """Return the processes of a command that are alive."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            is_ours = f"{MARK}={mark}".encode() in file.read_bytes().split(b"\0")
            if is_ours and "\nState:\tZ" not in (file.parent / "status").read_text():
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def is_reached(moment: str, folder: Path) -> bool:
    """Return True if a command has come to a phase: its first cell is being measured, or has its result."""
    pattern = {"any": "*", "measuring": "llmbench-results/*/*/events.jsonl"}.get(moment)
    return any(folder.glob(pattern or "llmbench-results/*/*/artifacts/result.json"))


def attack(
    sweep: str, how: signal.Signals, moment: str, after_s: float, template: Path, mark: str, again: bool
) -> dict[str, Any]:
    """Send one signal, run the next command, and return what was found."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        shutil.copy(template, folder / "mlflow.db")
        process = begin(sweep, folder, mark)
        deadline = time.monotonic() + LONG_S
        while process.poll() is None and not is_reached(moment, folder) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(after_s)
        ended_before = process.poll() is not None
        process.send_signal(how)
        said = process.communicate(timeout=LONG_S)[0]
        deadline = time.monotonic() + 5
        while left_behind(mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        found: dict[str, Any] = {"left": len(left_behind(mark)), "tracebacks": int("Traceback" in said)}
        found["trace"] = said[said.find("Traceback") :][:6000] if "Traceback" in said else ""
        found["code"] = process.returncode
        found["phase"] = "ended before" if ended_before else phase(folder)
        sweeps = sorted(file.parent for file in folder.glob("llmbench-results/*/sweep.json"))
        measured = {file: completed(file) for one in sweeps for file in one.glob("*/events.jsonl")}
        found["false"] = good_without_figures(folder)
        if again or not sweeps:
            process = begin(sweep, folder, mark)
            said = process.communicate(timeout=LONG_S)[0]
            found["next"], found["next_code"] = "run", process.returncode
        else:
            done = subprocess.run(
                [sys.executable, "-m", "mlflow_llmbench", "upload", str(sweeps[0])],
                cwd=folder,
                env=environment(folder, mark),
                capture_output=True,
                text=True,
                check=False,
                timeout=LONG_S,
            )
            said = done.stdout + done.stderr
            found["next"], found["next_code"] = "upload", done.returncode
        found["tracebacks"] += int("Traceback" in said)
        found["false"] += good_without_figures(folder) + open_runs(folder)
        found["measured"] = sum(measured.values())
        found["lost"] = sum(max(0, count - arrived(file.parent, folder)) for file, count in measured.items())
        found["said"] = said.strip().splitlines()[-3:] if found["lost"] or found["false"] else []
        return found


def phase(folder: Path) -> str:
    """Say how far a command had come when it ended."""
    for name, pattern in {
        "ended": "*/ended.json",
        "results": "*/*/artifacts/result.json",
        "measuring": "*/*/events.jsonl",
        "begun": "*/sweep.json",
    }.items():
        if any(folder.glob(f"llmbench-results/{pattern}")):
            return name
    return "starting"


def completed(file: Path) -> int:
    """Return the number of processes that have measured a cell, by its own journal."""
    return sum(isinstance(event, CellCompleted) for event in journal.read_events(file))


def runs_of(folder: Path) -> list[Any]:
    """Return all runs of the store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return list(client.search_runs([one.experiment_id for one in client.search_experiments()]))


def good_without_figures(folder: Path) -> list[str]:
    """Return the runs that look good and lack figures or files, and those that end before they begin."""
    found = []
    for run in runs_of(folder):
        tags, info = run.data.tags, run.info
        is_good = info.status == "FINISHED" or tags.get("llmbench.outcome") == "ok" or "llmbench.verdict" in tags
        is_measured = "llmbench.cell" in tags and tags.get("llmbench.outcome") == "ok"
        if is_good and "llmbench.uploaded" not in tags:
            found.append(f"{info.run_name}: {info.status} and not whole")
        elif is_measured and "trust/repetitions" not in run.data.metrics:
            found.append(f"{info.run_name}: {info.status} without figures")
        if info.end_time and info.end_time < info.start_time:
            found.append(f"{info.run_name}: lasted {info.end_time - info.start_time} ms")
    return found


def open_runs(folder: Path) -> list[str]:
    """Return the runs that are open after the next command, and the cells that are not whole."""
    runs = runs_of(folder)
    return [f"{run.info.run_name}: RUNNING" for run in runs if run.info.status == "RUNNING"] + [
        f"{run.info.run_name}: not whole"
        for run in runs
        if "llmbench.cell" in run.data.tags and "llmbench.uploaded" not in run.data.tags
    ]


def arrived(cell: Path, folder: Path) -> int:
    """Return the number of processes of a cell whose measurements are in the store, by the result that it holds."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    for run in runs_of(folder):
        if (run.data.tags.get("llmbench.sweep"), run.data.tags.get("llmbench.cell")) == (cell.parent.name, cell.name):
            kept = Path(client.download_artifacts(run.info.run_id, "result.json"))
            result: RunResult = journal.read_result(kept.parent)
            processes = len({one.process for one in result.repetitions})
            is_told = run.data.metrics.get("trust/repetitions") == len(result.repetitions)
            return processes if is_told else 0
    return 0


def main() -> int:
    """Print one JSON object; exit code 1 if anything was false, lost or left behind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--jobs", type=int, default=1, help="commands at the same time")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    counts: Counter[str] = Counter()
    table: dict[str, Counter[str]] = {}
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch).resolve() / "mlflow.db"
        process = begin("two cells", template.parent, "template")  # makes the store, and shows how long it takes
        started = time.monotonic()
        process.communicate()
        usual_s = time.monotonic() - started
        clean = template.with_name("clean.db")
        code = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{clean}').search_experiments()"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=scratch)
        drawn = []
        for number in range(given.times):
            sweep, how = draw.choice(list(SWEEPS)), draw.choice(SIGNALS)
            moment, again = draw.choices(MOMENTS, (1, 1, 2))[0], draw.random() < 0.4
            after_s = draw.uniform(0, {"any": usual_s, "measuring": 2.0, "uploading": 4.0}[moment])
            drawn.append((sweep, how, moment, after_s, clean, f"{os.getpid()}-{number}", again))
        with ThreadPoolExecutor(given.jobs) as threads:
            attacks = threads.map(lambda one: attack(*one), drawn)
            for number, ((sweep, how, moment, after_s, *_), found) in enumerate(zip(drawn, attacks, strict=True), 1):
                found["false_states"] = len(found["false"])
                row = table.setdefault(f"{how.name}, {moment}", Counter())
                for key in ("measured", *BAD):
                    counts[key] += found[key]
                    row[key] += found[key]
                row["signals"] += 1
                row[f"then {found['next']}"] += 1
                counts[f"at {found['phase']}"] += 1
                line = {"sweep": sweep, "signal": how.name, "moment": moment, "after_s": round(after_s, 2), **found}
                print(f"{number}: {json.dumps(line)}", file=sys.stderr, flush=True)
                if any(found[key] for key in BAD):
                    problems.append(line)
    result = {
        "command": f"python benchmarks/signals.py --times {given.times} --seed {given.seed} --jobs {given.jobs}",
        "signals": given.times,
        **{key: counts[key] for key in ("measured", *BAD)},
        "phases": {key: counts[key] for key in sorted(counts) if key.startswith("at ")},
        "table": {name: dict(table[name]) for name in sorted(table)},
        "problems": problems,
        "environment": machine.environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
