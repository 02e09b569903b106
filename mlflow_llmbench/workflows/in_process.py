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
from collections.abc import Callable, Iterator, Sequence

from ..backends.callback import Generate
from ..config.spec import BenchSpec, parse
from ..records.backends import CALLBACK_BACKEND
from ..records.cell import DRAWN
from ..records.errors import UsageError
from ..records.results import ModelFacts
from ..sweeps.callback_executor import CallbackExecutor
from ..sweeps.planning import plan
from ..sweeps.progress import ProgressListener, listening
from ..sweeps.run_recorder import Destination
from ..sweeps.sweep import SweepResult, execute
from ..system import machine
from ..tracking.store import open_store

PARAMETERS = (
    "model", "revision", "quant", "batch_size", "prompt_tokens", "output_tokens", "workload", "warmup",
    "repetitions", "max_repetitions", "precision_target", "device", "seed", "output_dir", "price_per_hour",
)  # fmt: skip
"""Accepted parameters; the others have a meaning only if we load the model."""


class Bench:
    """Object that `measure` yields: `run` measures a function. `result` is None until then."""

    def __init__(
        self,
        spec: BenchSpec,
        executor: CallbackExecutor,
        destination: Destination,
        progress: bool | ProgressListener | None,
    ) -> None:
        self.spec, self.executor, self.destination, self.progress = spec, executor, destination, progress
        self.result: SweepResult | None = None

    def run(self, generate: Generate) -> SweepResult:
        """Measure every requested cell; a failed one is a row with its outcome. Raises UsageError on a second call."""
        if self.result:
            raise UsageError("This measurement is already done. Begin another one: with measure(…) as bench.")
        self.executor.function = generate
        facts = ModelFacts(str(self.spec.axes["model"][0]), "none", "", str(self.spec.axes["revision"][0]))
        planned = plan(self.spec, self.executor.machine, model=facts, vocab_size=self.executor.vocab_size)
        with listening(self.progress) as listener:
            self.result = execute(planned, self.executor, self.destination, listener)
        return self.result


@contextlib.contextmanager
def measure(
    model: str,
    *,
    encode: Callable[[str], Sequence[int]] | None = None,
    vocab_size: int = 32_000,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    progress: bool | ProgressListener | None = None,
    **parameters: object,
) -> Iterator[Bench]:
    """Check parameters and store before you load your model, and yield a `Bench` whose `run` measures.

    `parameters` are the ones of `llmbench run` that are in `PARAMETERS`; lists make a sweep. `encode` (text → ids) is
    needed for workloads with texts; randomly drawn prompts have ids below `vocab_size`. `progress` is as in `run`.
    Raises LlmbenchError for an error found here, UsageError at the end if nothing was measured.
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
    bench = Bench(spec, CallbackExecutor(device, encode, vocab_size), (tracking_uri, experiment), progress)
    yield bench
    if bench.result is None:
        raise UsageError("Nothing was measured: bench.run(generate) was not called.")
