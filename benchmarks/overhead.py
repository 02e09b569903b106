"""Overhead of the harness, as ratios of interleaved pairs in one run: `python benchmarks/overhead.py [--out FILE]`.

A shared machine can be three times slower a minute later, so ratios are measured: each pair runs back to back, and the
median of the pairs' ratios is compared with a goal. Only the statistics of 100,000 values have goals in CPU seconds and
megabytes. Takes about two minutes; needs no network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mlflow_llmbench import stats
from mlflow_llmbench.analysis import latency, summary
from mlflow_llmbench.analysis.summary import Point
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.huggingface.streamer import Streamer
from mlflow_llmbench.measure.batch import time_request
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import Hashes, ModelFacts, Repetition, RequestRecord, RunResult
from mlflow_llmbench.system import machine
from mlflow_llmbench.tracking import runs
from mlflow_llmbench.tracking.store import open_store
from mlflow_llmbench.workloads.prompts import load_prompts

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 21
TOKENS = 48
PARAMS, FIGURES, SERIES, STEPS = 60, 80, 20, 350


def ratio(ours: Callable[[], float], other: Callable[[], float], pairs: int = PAIRS) -> tuple[float, list[float]]:
    """Median and all values of ours ÷ other, measured in turns; the order is swapped from pair to pair."""
    found = []
    for number in range(pairs):
        first, second = (ours, other) if number % 2 == 0 else (other, ours)
        a, b = first(), second()
        found.append(a / b if number % 2 == 0 else b / a)
    return median(found), found


def seconds(work: Callable[[], object]) -> float:
    """Time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stamp_costs(tokenizer: Any) -> dict[str, tuple[float, list[float], float]]:
    """Host time per token of our streamer ÷ a logits processor, and ÷ TextIteratorStreamer from token 450 to 512."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

    class Stamp(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            stamps.append(time.perf_counter_ns())
            return scores

    stamps: list[int] = []
    step, ids, scores = torch.tensor([300]), torch.ones((1, 8), dtype=torch.long), torch.zeros((1, 1000))
    processors = LogitsProcessorList([Stamp()])

    def ours() -> float:
        emitted: list[Any] = []

        def emit(value: Any) -> None:
            stamps.append(time.perf_counter_ns())
            emitted.append(value)

        streamer = Streamer(emit)
        streamer.put(step)
        return seconds(lambda: [streamer.put(step) for _ in range(2000)]) / 2000

    def processor() -> float:
        return seconds(lambda: [processors(ids, scores) for _ in range(2000)]) / 2000

    def text_streamer() -> float:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=False)
        words = [
            torch.tensor([i])
            for i in tokenizer("the quick brown fox jumps over it and runs away from the dog " * 60)["input_ids"][:512]
        ]
        for word in words[:450]:
            streamer.put(word)
        return seconds(lambda: [streamer.put(word) for word in words[450:]]) / len(words[450:])

    return {
        "our stamp ÷ a logits processor": (*ratio(ours, processor), 0.10),
        "our stamp ÷ TextIteratorStreamer near token 512": (*ratio(ours, text_streamer), 0.02),
    }


def decode_costs(
    backend: TransformersBackend, cell: Cell, vocabulary: int
) -> dict[str, tuple[float, list[float], float]]:
    """Our measured path against generate() with the barest streamer, and against generate() alone."""
    import torch
    from transformers import GenerationConfig

    prompts = load_prompts("synthetic").batch(cell, 0, vocabulary, None)
    settings = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    ids = torch.tensor(prompts)

    class Bare:
        def __init__(self) -> None:
            self.stamps: list[int] = []

        def put(self, value: Any) -> None:
            self.stamps.append(time.perf_counter_ns())

        def end(self) -> None: ...

    def ours_gap() -> float:
        return median(latency.gaps_ms(time_request(backend, prompts, TOKENS)[0]))

    def bare_gap() -> float:
        streamer: Any = Bare()
        with torch.inference_mode():
            backend.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
            )
        stamps = streamer.stamps[1:]
        return median((b - a) / 1e6 for a, b in itertools.pairwise(stamps))

    def ours_whole() -> float:
        return latency.e2e_ms(time_request(backend, prompts, TOKENS)[0])

    def alone() -> float:
        with torch.inference_mode():
            return 1000 * seconds(
                lambda: backend.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            )

    time_request(backend, prompts, TOKENS)
    return {
        "ITL through our path ÷ ITL of a bare loop": (*ratio(ours_gap, bare_gap), 1.02),
        "one request through our path ÷ generate() alone": (*ratio(ours_whole, alone), 1.02),
    }


def upload_costs() -> dict[str, tuple[float, list[float], float]]:
    """Time to log the values of a full run as `tracking` does ÷ with one call for each value, on SQLite.

    Also ÷ MLflow's own `log_batch` of them: that is most of it, so the first ratio follows from MLflow and the disk.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    params = {f"parameter_{number}": "value" for number in range(PARAMS)}
    points = [Point(f"latency/figure_{number}", 0, 1.5, 0) for number in range(FIGURES)]
    points += [Point(f"steps/series_{number}", step, 1.5, 0) for number in range(SERIES) for step in range(STEPS)]

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"sqlite:///{folder}/mlflow.db", "overhead")

        def batches() -> float:
            run = runs.begin_run(store, "batches", {})
            return seconds(lambda: runs.log_values(store, run, params, points))

        def single() -> float:
            run = runs.begin_run(store, "single", {})
            client = store.client
            return seconds(
                lambda: [
                    *(client.log_param(run, name, value) for name, value in params.items()),
                    *(client.log_metric(run, point.key, point.value, step=point.step) for point in points),
                ]
            )

        def bare() -> float:
            run, client = runs.begin_run(store, "bare", {}), MlflowClient(store.uri)
            metrics = [Metric(point.key, point.value, point.wall_ms, point.step) for point in points]
            named = [Param(name, value) for name, value in params.items()]
            return seconds(lambda: client.log_batch(run, metrics, named))

        return {
            "log_batch ÷ one call per value": (*ratio(batches, single, pairs=2), 0.04),
            "our upload of values ÷ log_batch alone": (*ratio(batches, bare, pairs=11), 1.1),
        }


def start_costs() -> dict[str, tuple[float, list[float], float]]:
    """`llmbench --help` against importing torch and mlflow."""

    def of(*arguments: str) -> float:
        return seconds(
            lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        )

    return {
        "--help ÷ import torch, mlflow": (
            *ratio(lambda: of("-m", "mlflow_llmbench", "--help"), lambda: of("-c", "import torch, mlflow"), pairs=5),
            0.15,
        )
    }


def analysis_costs() -> dict[str, tuple[float, list[float], float]]:
    """CPU seconds and memory of the statistics of 100,000 gaps: 2,000 block resamples, and all statistics of such a
    run."""
    rng = np.random.default_rng(0)
    gaps = np.empty(100_000)
    gaps[0] = 0.0
    for number, shock in enumerate(rng.normal(size=gaps.size - 1)):
        gaps[number + 1] = 0.8 * gaps[number] + shock
    values = (20 + gaps).tolist()
    stamps = [
        tuple(int(ns) for ns in 10_000_000 + 1e6 * np.cumsum([0.0, *values[start : start + 100]]))
        for start in range(0, len(values), 100)
    ]
    repetitions = tuple(Repetition(i, 0, (RequestRecord(0, own, 1, 8),)) for i, own in enumerate(stamps))
    facts, hashes = ModelFacts("m", "none", "m", "r"), Hashes(*["0" * 16] * 5)
    result = RunResult(Cell(output_tokens=101), "ok", 0, 1, hashes, facts, {}, repetitions=repetitions)
    works = {
        "mean, block bootstrap": lambda: stats.block_bootstrap_interval(values),
        "median, block bootstrap": lambda: stats.block_bootstrap_interval(values, statistic="median"),
        "mean, bootstrap": lambda: stats.bootstrap_interval(values, "mean"),
        "all statistics of a run": lambda: summary.statistics(result),
    }
    found = {}
    for name, work in works.items():
        spent = []
        for _ in range(3):
            started = time.process_time()
            work()
            spent.append(time.process_time() - started)
        found[f"CPU s for 100,000 gaps, 2,000 resamples: {name}"] = (median(spent), spent, 2.0)
        tracemalloc.start()
        work()
        megabytes = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        found[f"MB for 100,000 gaps, 2,000 resamples: {name}"] = (megabytes, [megabytes], 200.0)
    return found


def byte_tokenizer() -> Any:
    """A real byte-level tokenizer without a download; decoding cost grows with the text, as with any tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> int:
    """Measure all, print one line each and one JSON object; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    cell = Cell(model="pythia-160m", weights="random", prompt_tokens=64, output_tokens=TOKENS)
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    backend = TransformersBackend(cell, facts)
    load = backend.load()
    found = decode_costs(backend, cell, load.vocab_size or 1000)
    backend.close()
    found |= stamp_costs(byte_tokenizer()) | upload_costs() | start_costs() | analysis_costs()
    for name, (value, _, goal) in found.items():
        print(f"{'met   ' if value <= goal else 'MISSED'}  {value:8.4f}  goal {goal:<5g} {name}")
    environment = machine.environment()
    where = {"cpu": environment["cpu"], "packages": environment["packages"], "python": environment["python"]}
    results = {name: {"ratio": value, "goal": goal, "pairs": pairs} for name, (value, pairs, goal) in found.items()}
    text = json.dumps({"machine": where, "ratios": results})
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0 if all(value <= goal for value, _, goal in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
