"""Measure a `generate` function of your own, with the method that measures ours:

    from mlflow_llmbench.callback import measure

    with measure(model="my-engine", batch_size=[1, 4], prompt_tokens=64, output_tokens=32) as bench:
        result = bench.run(generate)
    print(result.table())

`generate(prompts, output_tokens, emit)` must call `emit(ids)`, with one id per prompt, as soon as each step is on the
host.

Warm-up until steady, repetitions until the interval is narrow, stamps, noise, verdict, journal, runs and sweeps are
those of `llmbench run`. The differences: the function runs in this process, so memory and load time are absent (this
process holds more than the model), the loaded model is not verified (`quant` is your own statement), and a crash ends
your program. Earlier results are never reused, since the function may have changed; name your version in `revision`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from ..backends.callback import CallbackBackend, Generate
from ..config.spec import BenchSpec, parse
from ..measure.batch import measure_cell
from ..measure.events import CellBegun, CellCompleted, CellMeasured, CellProgress, FirstToken, GroupBegun
from ..measure.journal import EventLog, write_bytes
from ..measure.outcome import GroupOutcome
from ..records.backends import CALLBACK_BACKEND
from ..records.cell import DRAWN, Cell
from ..records.errors import LlmbenchError, OutOfMemory, UsageError
from ..records.results import ModelFacts
from ..sweeps.executor import Group, OneAtATime, Tell
from ..sweeps.progress import Watcher
from ..sweeps.sweep import SweepResult, run_in
from ..system import machine
from ..tracking.store import open_store
from ..workloads.prompts import load_prompts

PARAMETERS = (
    "model", "revision", "quant", "batch_size", "prompt_tokens", "output_tokens", "workload", "warmup",
    "repetitions", "max_repetitions", "precision_target", "device", "seed", "output_dir", "price_per_hour",
)  # fmt: skip
"""Accepted parameters; the others have a meaning only if we load the model."""


class Bench:
    """Object that `measure` yields: `run` measures a function. `result` is None until then."""

    def __init__(
        self, spec: BenchSpec, place: InThisProcess, store: tuple[str | None, str | None], watcher: Watcher | None
    ) -> None:
        self.spec, self.place, self.store, self.watcher = spec, place, store, watcher
        self.result: SweepResult | None = None

    def run(self, generate: Generate) -> SweepResult:
        """Measure every requested cell; a failed one is a row with its outcome. Raises UsageError on a second call."""
        if self.result:
            raise UsageError("This measurement is already done. Begin another one: with measure(…) as bench.")
        self.place.function = generate
        facts = ModelFacts(str(self.spec.axes["model"][0]), "none", "", str(self.spec.axes["revision"][0]))
        self.result = run_in(self.place, self.spec, facts, self.store, self.watcher)
        return self.result


@contextlib.contextmanager
def measure(
    model: str,
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
    vocab_size: int = 32_000,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: Watcher | None = None,
    **parameters: object,
) -> Iterator[Bench]:
    """Check parameters and store before you load your model, and yield a `Bench` whose `run` measures.

    `parameters` are the ones of `llmbench run` that are in `PARAMETERS`; lists make a sweep. `encode` (text → ids) is
    needed for workloads with texts; randomly drawn prompts have ids below `vocab_size`. Raises LlmbenchError for an
    error found here, UsageError at the end if nothing was measured.
    """
    if "," in model:
        raise UsageError(f"model is a name for one function, but it has a comma: {model}. Give one name.")
    unknown = [name for name in parameters if name not in PARAMETERS]
    if unknown:
        raise UsageError(f"{unknown[0]} has no meaning for a function of your own. Known: {', '.join(PARAMETERS)}.")
    asked = {name: value for name, value in parameters.items() if value is not None}
    spec = parse({"model": model, **asked, "backend": CALLBACK_BACKEND, "rerun": True})
    texts = [workload for workload in spec.axes["workload"] if workload not in DRAWN]
    if texts and encode is None:
        raise UsageError(
            f"workload={texts[0]} has texts, but the function takes ids. Give encode=…, a function from text to ids."
        )
    device = machine.require_device(str(spec.axes["device"][0]))
    open_store(tracking_uri, experiment)
    bench = Bench(spec, InThisProcess(device, encode, vocab_size), (tracking_uri, experiment), watcher)
    yield bench
    if bench.result is None:
        raise UsageError("Nothing was measured: bench.run(generate) was not called.")


class InThisProcess(OneAtATime):
    """Executor (`place.Place`) that measures a function in this process."""

    def __init__(self, device: str, encode: Callable[[str], Sequence[int]] | None, vocab_size: int) -> None:
        super().__init__()
        self.device, self.encode, self.vocab_size = device, encode, vocab_size
        self.function: Generate | None = None

    def room(self, device: str) -> tuple[int | None, str]:
        """Return no limit: the memory need of the function is unknown."""
        return None, ""

    def wait(self, tell: Tell) -> tuple[Group, GroupOutcome]:
        """Measure the given group, as a worker would."""
        group = self.take()
        tell(group, GroupBegun())
        backend = self._backend(group)
        outcome = GroupOutcome(load=backend.describe())
        try:
            for number in range(len(group)):
                self._measure(backend, group, number, outcome, tell)
        except KeyboardInterrupt:
            outcome.interrupted = True
        except MemoryError:
            outcome.fail(OutOfMemory("Memory ran out."))
        except LlmbenchError as error:
            outcome.fail(error)
        if backend.raised:
            write_bytes(group[0].folder / "worker.log", backend.raised.encode())
        outcome.ended = True
        return group, outcome

    def _backend(self, group: Group) -> CallbackBackend:
        backend = CallbackBackend(group[0].cell, group[0].model)
        backend.function, backend.encoder, backend.device, backend.vocab_size = (
            self.function,
            self.encode,
            self.device,
            self.vocab_size,
        )
        backend.capabilities = dataclasses.replace(backend.capabilities, tokenizer=self.encode is not None)
        return backend

    def _measure(self, backend: CallbackBackend, group: Group, number: int, outcome: GroupOutcome, tell: Tell) -> None:
        job = group[number]
        cell: Cell = job.cell
        prompts = load_prompts(cell.workload)
        job.hashes = dataclasses.replace(job.hashes, workload=prompts.digest(cell, self.vocab_size))
        begun = CellBegun(number, t_ns=time.perf_counter_ns())
        outcome.take(begun)
        tell(group, begun)
        with contextlib.closing(EventLog(job.folder / "events.jsonl")) as log:

            def report(event: CellProgress) -> None:
                if not isinstance(event, FirstToken):
                    log.append(event)
                tell(group, event.of_cell(number))

            measured = measure_cell(backend, cell, prompts, self.vocab_size, report)
            outcome.take(CellMeasured(number, measured))
            log.append(CellCompleted(measured.steady, measured.first_call_ms))
        tell(group, CellMeasured(number))
