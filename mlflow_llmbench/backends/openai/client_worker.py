"""Send one load from several client processes, if one core is not enough.

`python -m mlflow_llmbench.backends.openai.client_worker` starts one such process. A load is divided before it begins,
and nothing is shared while it runs. Each process builds its requests, opens its connections, reports that it is ready,
and starts at a common instant of the monotonic clock. All processes of a machine share that clock, so their stamps can
be merged. Requests keep the numbers, times, lengths and prompts that they have in a single process.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys

from ...records.errors import first_line
from ...records.results import ModelFacts
from ...system import machine
from ...workloads.prompts import load_prompts
from .client_processes import ClientTask


def main() -> int:
    """Send the loads of the tasks on standard input until it ends. Results go to the original standard output."""
    machine.die_with_parent()
    for name in ("SIGINT", "SIGHUP"):  # they reach the whole group; the parent decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    tasks, out = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(what: object) -> None:
        pickle.dump(what, out)
        out.flush()

    def ready() -> int:
        tell(None)
        start: int = pickle.load(tasks)
        return start

    from .backend import OpenAIBackend

    backend: OpenAIBackend | None = None
    while True:
        try:
            task: ClientTask = pickle.load(tasks)
        except EOFError:
            return 0
        try:
            backend = backend or OpenAIBackend(task.first, ModelFacts("", "none", "", ""))
            tell(backend.send_share(load_prompts(task.cell.workload), task, ready))
        except EOFError:
            return 0
        except Exception as error:
            tell(f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    sys.exit(main())
