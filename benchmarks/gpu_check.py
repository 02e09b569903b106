"""Confirm our measurement on a CUDA machine within ten minutes: `python benchmarks/gpu_check.py [--seconds 570]`.

Thirteen steps, those of most worth first. Each is a process of its own with a time limit, and prints one line of JSON
as soon as it ends, so that nothing is lost if the machine is taken away: what held (`confirmed`), what did not
(`refuted`), the numbers, and an `error` if the step failed. The last line sums up. Without a GPU it says so and exits
with 0; it exits with 1 if something was refuted or failed. All models have random weights.

    --device cpu     the same steps here without CUDA's part, to try the script itself
    --only a,b       these steps
    --wheels         list what the steps need beside PyTorch, with sizes, for a machine without a network

Needs torch, transformers, accelerate and nvidia-ml-py. Schemes whose library is missing are told as such; the last step
needs mlflow.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.analysis import efficiency, latency, summary
from mlflow_llmbench.backends import accelerator, peak_rates
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.measure import interpreter, supervise
from mlflow_llmbench.measure.batch import compare_decoding, measure_cell, time_request
from mlflow_llmbench.measure.events import Event, StageMemory
from mlflow_llmbench.measure.outcome import stages_of
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import LlmbenchError
from mlflow_llmbench.records.quantizations import KV_CACHES, SCHEMES, schemes_of
from mlflow_llmbench.records.results import Hashes, LoadInfo, RunResult
from mlflow_llmbench.system import gpu, machine
from mlflow_llmbench.workloads.prompts import load_prompts

SMALL, LARGER = "opt-125m", "llama-3.2-1b"
KNOWN_RATES = {"H200": (4.3e12, 790e12)}
"""Part of a GPU's name → bytes per second and FLOP/s in bf16 that were seen on one."""

PACKAGES = ("transformers", "accelerate", "nvidia-ml-py", "bitsandbytes", "torchao", "hqq", "optimum-quanto", "mlflow")


@dataclasses.dataclass
class Findings:
    """What a step found: sentences that held, sentences that did not, and its numbers."""

    confirmed: list[str] = dataclasses.field(default_factory=list)
    refuted: list[str] = dataclasses.field(default_factory=list)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, sentence: str, holds: bool, **values: Any) -> None:
        """Take down a sentence, and the numbers by which it was judged."""
        (self.confirmed if holds else self.refuted).append(sentence)
        self.values.update(values)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step: its work on a device, the most seconds that it may take, and whether it needs a GPU."""

    work: Callable[[str, Findings], None]
    limit_s: float
    needs_gpu: bool = True


def readings(device: str, found: Findings) -> None:
    """Does the driver tell what a run records?"""
    import torch

    devices, read = gpu.gpus(), gpu.read(0)
    found.values.update(gpus=devices, problems=gpu.problems(), reading=vars(read) if read else None)
    found.values.update(torch=torch.__version__, cuda=torch.version.cuda, packages=machine.packages())
    found.check("the driver names the GPU with its UUID and memory", bool(devices and devices[0]["uuid"]))
    found.check("torch has the GPU", torch.cuda.is_available() and torch.cuda.device_count() == len(devices))
    for name in ("energy_j", "clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "utilization_ratio"):
        found.check(f"the driver tells {name}", read is not None and getattr(read, name) is not None)


def identities(device: str, found: Findings) -> None:
    """Is cuda:N of torch GPU N of the driver?"""
    import torch

    of_torch = [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())]
    of_driver = [str(one["uuid"]) for one in gpu.gpus()]
    same = [a.removeprefix("GPU-") == b.removeprefix("GPU-") for a, b in zip(of_torch, of_driver, strict=False)]
    found.check("UUIDs agree in order", all(same) and bool(same), torch=of_torch, driver=of_driver)
    for number, uuid in enumerate(of_torch):
        gpu.check_identity(f"cuda:{number}", uuid)


def probe(device: str, found: Findings) -> None:
    """Are the best rates the same cold and warm, and those that are known of this GPU?"""
    cache = accelerator.cache_bytes(device) or 0
    cold, warm = (peak_rates.measure_peaks(device, cache) for _ in range(2))
    found.values.update(cache_bytes=cache, cold=cold, warm=warm)
    for name in ("read_bytes_per_s", "flops_per_s"):
        found.check(f"{name} is the same cold and warm within 5 %", abs(cold[name] / warm[name] - 1) < 0.05)
    name = (gpu.gpus() or [{"name": ""}])[0]["name"]
    for part, (read, flops) in KNOWN_RATES.items():
        if part in name:
            found.check("the bandwidth is the known one within 15 %", abs(warm["read_bytes_per_s"] / read - 1) < 0.15)
            found.check("FLOP/s are the known ones within 15 %", abs(warm["flops_per_s"] / flops - 1) < 0.15)


def idle_power(device: str, found: Findings) -> None:
    """Is the idle power the same before and right after work?"""
    import torch

    before = machine.idle_power_w(device)
    matrix = torch.ones((4096, 4096), device=device)
    until = time.perf_counter() + 3
    while time.perf_counter() < until:
        (matrix @ matrix).sum().item()
    after = machine.idle_power_w(device)
    found.values.update(before_w=before, after_w=after)
    found.check("idle power settles within 10 % after work", bool(before and after and abs(after / before - 1) < 0.1))


@contextlib.contextmanager
def loaded(cell: Cell) -> Iterator[tuple[TransformersBackend, LoadInfo]]:
    """Load the model of a cell in this process."""
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    backend = TransformersBackend(cell, facts)
    try:
        yield backend, backend.load()
    finally:
        backend.close()


def a_cell(device: str, model: str = SMALL, **settings: Any) -> Cell:
    """The cell of a step: 64 output tokens (4 on a CPU) and five repetitions."""
    tokens = 4 if device == "cpu" else 64
    return Cell(model=model, weights="random", device=device, **{"output_tokens": tokens, "repetitions": 5, **settings})


def stamps(device: str, found: Findings) -> None:
    """Do the host's stamps agree with CUDA's events?"""
    import torch

    with loaded(a_cell(device, quant="bf16")) as (backend, load):
        for batch in (1, 8):
            cell = dataclasses.replace(backend.cell, batch_size=batch)
            prompts = load_prompts("synthetic").batch(cell, 0, load.vocab_size, None)
            time_request(backend, prompts, cell.output_tokens)
            ratios = []
            for _ in range(5):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                record, _ = time_request(backend, prompts, cell.output_tokens)
                end.record()
                torch.cuda.synchronize()
                ratios.append(latency.e2e_ms(record) / float(start.elapsed_time(end)))
            middle = sorted(ratios)[2]
            found.check(f"a request of {batch} rows takes as long as CUDA's events say, within 2 %",
                        abs(middle - 1) < 0.02, **{f"host_over_events_{batch}": ratios})  # fmt: skip


def stages(device: str, found: Findings) -> None:
    """Does the memory of a worker's stages agree with what the driver shows from outside?"""
    cell = a_cell(device, quant="bf16")
    facts = interpreter.resolve(cell)
    free_before, outside = gpu.free_bytes(0), {}

    def report(event: Event) -> None:
        if isinstance(event, StageMemory) and (free := gpu.free_bytes(0)) is not None and free_before is not None:
            outside[event.stage] = free_before - free

    with tempfile.TemporaryDirectory() as scratch:
        job = WorkerJob("prepare", (cell,), facts, (Path(scratch),))
        supervise.run_worker(job, Path(scratch) / "prepare.log")
        outcome = supervise.run_worker(dataclasses.replace(job, task="measure"), Path(scratch) / "log", report)
    if outcome.error:
        raise outcome.error
    memory = stages_of(outcome, 0)
    found.values.update(
        inside=dict(memory.device), outside=outside, load=dataclasses.asdict(outcome.load or LoadInfo(0))
    )
    wanted = {"baseline", "loading", "loaded", "steady", "peak", "unloaded"}
    found.check("the host's memory has its stages", wanted == set(memory.host_needed), host=dict(memory.host_needed))
    for stage in ("loaded",) if outside else ():
        found.check(f"device memory at {stage} is what the driver lost, within 10 %",
                    abs(memory.device[stage] / outside[stage] - 1) < 0.1)  # fmt: skip


def speed(backend: TransformersBackend, load: LoadInfo, batch: int) -> dict[str, Any]:
    """Measure one batch of a loaded model."""
    cell, prompts = dataclasses.replace(backend.cell, batch_size=batch), load_prompts("synthetic")
    ids = prompts.batch(cell, 0, load.vocab_size, None)
    compile_s = backend.compile(ids, len(ids[0]), cell.output_tokens)
    measured = measure_cell(backend, cell, prompts, load.vocab_size, lambda *_, **__: None)
    nothing = Hashes("", "", "", "", "")
    result = RunResult(cell, "ok", 0, 0, nothing, backend.facts, {}, load=load, repetitions=measured.repetitions,
                       peaks=backend.peaks())  # fmt: skip
    figures = summary.summarize(result)
    return {
        "tokens_per_s": figures["throughput/output_tokens_per_s"],
        "ttft_ms": figures["latency/ttft_ms_p50"],
        "itl_ms": figures["latency/itl_ms_p50"],
        "mbu": efficiency.model_bandwidth_utilization(result),
        "cv": figures["trust/cv_ratio"],
        "compile_s": compile_s,
        "same_tokens": compare_decoding(backend, cell, prompts, load.vocab_size),
        "facts": dict(backend.describe().facts),
    }


def utilization(device: str, found: Findings) -> None:
    """Is the share of the bandwidth that a larger model uses between 0.1 and 1?"""
    with loaded(a_cell(device, LARGER, quant="bf16")) as (backend, load):
        told = found.values[LARGER] = speed(backend, load, 1)
    found.check("bandwidth utilization of bf16 lies between 0.1 and 1", 0.1 < (told["mbu"] or 0) < 1)


def compiled(device: str, found: Findings) -> None:
    """Is compiled decoding faster, with CUDA graphs, and does it choose the same tokens?"""
    for quant in ("bf16", "int8-wo", "int4-wo"):
        told: dict[str, Any] = {}
        for decode in ("generate", "compiled"):
            try:
                with loaded(a_cell(device, quant=quant, decode=decode)) as (backend, load):
                    told[decode] = speed(backend, load, 1)
            except LlmbenchError as error:
                told[decode] = {"error": str(error)}
        found.values[quant] = told
        rates = [one.get("tokens_per_s") for one in told.values()]
        found.check(f"compiled {quant} decodes faster", all(rates) and rates[1] > rates[0])


def quantizations(device: str, found: Findings) -> None:
    """Does each scheme load as what it says, and generate in batches of 1 and 32?"""
    for quant in (name for name in schemes_of("transformers") if name != "mixed" and not SCHEMES[name].maker):
        try:
            with loaded(a_cell(device, quant=quant)) as (backend, load):
                told = {"bytes": load.weight_bytes, "facts": dict(load.facts)}
                for batch in (1, 32):
                    cell = dataclasses.replace(backend.cell, batch_size=batch)
                    ids = load_prompts("synthetic").batch(cell, 0, load.vocab_size, None)
                    time_request(backend, ids, cell.output_tokens)
                    told[f"e2e_ms_{batch}"] = latency.e2e_ms(time_request(backend, ids, cell.output_tokens)[0])
            found.confirmed.append(f"{quant} loads as itself and generates with 1 and 32 rows")
        except LlmbenchError as error:
            told = {"error": str(error)}
            found.refuted.append(f"{quant} runs")
        found.values[quant] = told


def caches(device: str, found: Findings) -> None:
    """Do the caches and the other decode paths run?"""
    of_files = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # llama.cpp's
    settings: list[dict[str, Any]] = [{"kv_cache": name} for name in KV_CACHES if name not in of_files]
    settings += [{"decode": "prompt_lookup"}, {"decode": "assisted", "draft_model": SMALL}]
    for chosen in settings:
        name = " ".join(f"{key}={value}" for key, value in chosen.items())
        try:
            with loaded(a_cell(device, quant="bf16", **chosen)) as (backend, load):
                found.values[name] = speed(backend, load, 1)
            found.confirmed.append(f"{name} runs")
        except LlmbenchError as error:
            found.values[name] = {"error": str(error)}
            found.refuted.append(f"{name} runs")


def out_of_memory(device: str, found: Findings) -> None:
    """Does a cell that does not fit end as out of memory, and the next one run?"""
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    ends = []
    for batch in (total // 200_000_000 * 8, 1):  # a row of 2,000 tokens in opt-125m keeps some 70 MB
        cell = a_cell(device, quant="bf16", batch_size=int(batch), prompt_tokens=1900, repetitions=2)
        facts = interpreter.resolve(cell)
        with tempfile.TemporaryDirectory() as scratch:
            job = WorkerJob("measure", (cell,), facts, (Path(scratch),))
            error = supervise.run_worker(job, Path(scratch) / "log").error
        ends.append(f"{type(error).__name__}: {error}" if error else "ok")
    found.check("too many rows end as out of memory", ends[0].startswith("OutOfMemory"), ends=ends)
    found.check("the next cell runs", ends[1] == "ok")


def second_process(device: str, found: Findings) -> None:
    """Is another process on the GPU seen?"""
    import torch

    torch.ones(1, device=device)
    work = f"x = torch.ones(250_000_000, device={device!r}); print('ready', flush=True); time.sleep(60)"
    before = gpu.read(0)
    with subprocess.Popen(
        [sys.executable, "-c", f"import time, torch; {work}"], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout and other.stdout.readline() == "ready\n"
            during = gpu.read(0)
        finally:
            other.kill()
    counts = [one.foreign_processes if one else None for one in (before, during)]
    if counts[0] is None:
        found.check(
            "a container that hides processes makes their number unknown, not 0", counts[1] is None, counts=counts
        )
    else:
        found.check("a second process is counted", counts[1] == counts[0] + 1, counts=counts)


def sweep(device: str, found: Findings) -> None:
    """Does a sweep of two cells reach MLflow, with its verdicts?"""
    import mlflow_llmbench

    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        done = mlflow_llmbench.run(model=SMALL, weights="random", device=device, quant="bf16,int8", repetitions=5,
                                   tracking_uri=f"sqlite:///{scratch}/mlflow.db")  # fmt: skip
        rows = [{"outcome": row.outcome, "verdict": row.verdict and row.verdict.word, "metrics": dict(row.metrics),
                 "message": row.message} for row in done.rows]  # fmt: skip
    found.check("two cells are measured and uploaded", done.outcome == "ok" and not done.not_uploaded, rows=rows)
    wanted = ["memory/device_gb_peak", "energy/joules_per_token"] if device != "cpu" else ["memory/host_needed_gb_peak"]
    for key in wanted:
        found.check(f"{key} is there", all(key in row["metrics"] for row in rows))


STEPS: Mapping[str, Step] = {
    "readings": Step(readings, 40),
    "identities": Step(identities, 30),
    "probe": Step(probe, 60, needs_gpu=False),
    "idle_power": Step(idle_power, 40),
    "stamps": Step(stamps, 60),
    "stages": Step(stages, 90, needs_gpu=False),
    "utilization": Step(utilization, 60, needs_gpu=False),
    "compiled": Step(compiled, 120),
    "quantizations": Step(quantizations, 120, needs_gpu=False),
    "out_of_memory": Step(out_of_memory, 90),
    "second_process": Step(second_process, 40),
    "caches": Step(caches, 90, needs_gpu=False),
    "sweep": Step(sweep, 120, needs_gpu=False),
}
"""All steps, those of most worth first."""

Emit = Callable[[Mapping[str, Any]], None]
Command = Callable[[str], Sequence[str]]


def run_steps(limits: Mapping[str, float], command: Command, seconds: float, emit: Emit) -> list[dict[str, Any]]:
    """Run each step's command and emit its line as soon as it ends. `limits`: most seconds of each; `seconds`: of all.

    A command prints a line of JSON as its last one. A step that fails, or is stopped at its limit, has an `error`.
    """
    begun, lines = time.monotonic(), []
    for name, limit in limits.items():
        left = seconds - (time.monotonic() - begun)
        line: dict[str, Any] = {"step": name, "seconds": 0.0, "error": "not run: no time was left"}
        if left > 1:
            started = time.monotonic()
            line = {"step": name, "seconds": 0.0, **_told_by(command(name), min(limit, left))}
            line["seconds"] = round(time.monotonic() - started, 1)
        lines.append(line)
        emit(line)
    return lines


def _told_by(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Return what the last line of a command says, or the reason why it says nothing."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True) as process,
    ):
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after its limit of {limit:.0f} s"}
        finally:  # also what the step has started, and when we are stopped ourselves
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        words = (log.read().strip() or printed.strip() or "nothing printed").splitlines()[-1]
    try:
        return dict(json.loads(printed.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return {"error": f"exit code {process.returncode}: {words[-300:]}"}


def summed_up(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last line: everything that was confirmed, refuted, and failed or not run."""
    return {
        "step": "summary",
        "confirmed": [sentence for line in lines for sentence in line.get("confirmed", ())],
        "refuted": [sentence for line in lines for sentence in line.get("refuted", ())],
        "failed": {line["step"]: line["error"] for line in lines if line.get("error")},
    }


def wheels() -> Iterator[dict[str, Any]]:
    """Yield what the steps need beside PyTorch, with the size of what is installed here, MB."""
    for name in PACKAGES:
        try:
            files = importlib.metadata.files(name) or []
            size = sum(file.size or 0 for file in files) / 1e6
            libraries = {file.name: round((file.size or 0) / 1e6, 1) for file in files if "cuda13" in file.name}
            yield {"package": f"{name}=={importlib.metadata.version(name)}", "installed_mb": round(size, 1),
                   **({"of_these_for_cuda_13": libraries} if libraries else {})}  # fmt: skip
        except importlib.metadata.PackageNotFoundError:
            yield {"package": name, "installed_mb": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default=",".join(STEPS))
    parser.add_argument("--wheels", action="store_true")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ.update(gpu.PCI_ORDER)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.wheels:
        for line in wheels():
            print(json.dumps(line))
        return 0
    if asked.step:
        found = Findings()
        try:
            STEPS[asked.step].work(asked.device, found)
            told = dataclasses.asdict(found)
        except Exception as error:  # each kind is a finding here
            told = {**dataclasses.asdict(found), "error": f"{type(error).__name__}: {error}"}
        print(f"\n{json.dumps(told, default=str)}")
        return 0
    if asked.device == "cuda" and not gpu.gpus():
        print(json.dumps({"gpu": None, "message": "No NVIDIA GPU answers here, so nothing was checked."}))
        return 0
    if unknown := [name for name in asked.only.split(",") if name not in STEPS]:
        parser.error(f"no step is named {', '.join(unknown)}; there are {', '.join(STEPS)}")
    chosen = {name: STEPS[name] for name in asked.only.split(",")}
    limits = {name: step.limit_s for name, step in chosen.items() if asked.device == "cuda" or not step.needs_gpu}
    if asked.device == "cpu":  # which is slower
        limits = dict.fromkeys(limits, asked.seconds)

    def emit(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    lines = run_steps(
        limits,
        lambda name: [sys.executable, str(Path(__file__).resolve()), "--step", name, "--device", asked.device],
        asked.seconds,
        emit,
    )
    told = summed_up(lines)
    emit(told)
    return 1 if told["refuted"] or told["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
