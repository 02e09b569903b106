"""A rank of a sharded model besides the first: a process that makes the same calls as the worker that started it.

`python -m mlflow_llmbench.backends.huggingface.rank` reads its order and then calls as JSON lines from standard input,
and answers each on standard output. Its log is that of the worker. It ends when standard input closes.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from ...records.cell import Cell
from ...records.codec import from_json
from ...records.errors import LlmbenchError, first_line
from ...records.results import ModelFacts
from ...system import machine, memory
from ..libraries import import_libraries
from . import sharding
from .backend import TransformersBackend


class Member:
    """One rank: its part of the model, and the calls that it makes."""

    def __init__(self, order: Mapping[str, Any], answers: TextIO) -> None:
        cell = from_json(Cell, order["cell"])
        import_libraries(TransformersBackend.capabilities, sharding.threads_of(cell))
        self.backend = TransformersBackend(cell, from_json(ModelFacts, order["model"]), order["rank"])
        self.backend.store = order["store"]
        self.answers = answers

    def answer(self, value: Any = None) -> None:
        """Send the answer to a call."""
        self.answers.write(json.dumps({"answer": value}) + "\n")

    def load(self) -> None:
        """Load this rank's part and send its sizes."""
        self.backend.load()
        self.backend.trim()
        memory.trim()
        gc.freeze()  # what stays makes later collections long
        self.answer(dataclasses.asdict(self.backend.parts[0]))

    def generate(self, prompts: list[list[int]], output_tokens: int) -> None:
        """Generate what the first rank generates."""
        self._meet()
        self.backend.generate(prompts, output_tokens, lambda _: None)
        self.answer()

    def logits(self, ids: list[int], last: int) -> None:
        """Compute the logits that the first rank computes."""
        self._meet()
        self.backend.logits(ids, last)
        self.answer()

    def device_memory(self, reset: bool) -> None:
        """Send the device memory of this process."""
        found = self.backend.device_memory(reset)
        self.answer(None if found is None else dataclasses.asdict(found))

    def trim(self) -> None:
        """Free cached memory."""
        self.backend.trim()
        memory.trim()
        self.answer()

    def close(self) -> None:
        """Free the model."""
        self.backend.close()
        memory.trim()
        self.answer()

    def _meet(self) -> None:
        """Say that the call is about to be made, and wait for the other ranks."""
        gc.collect()
        self.answer()
        sharding.meet()


CALLS: Mapping[str, Callable[..., None]] = {
    "load": Member.load,
    "generate": Member.generate,
    "logits": Member.logits,
    "device_memory": Member.device_memory,
    "trim": Member.trim,
    "close": Member.close,
}
"""Name of a call → what a rank does for it. Each sends its own answers."""


def main() -> int:
    """Make the calls that come on standard input. Return the exit code: 0 once it is closed, 1 after a failure."""
    machine.die_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for name in ("SIGINT", "SIGHUP"):  # as in the worker: the command decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        order = json.loads(sys.stdin.readline() or "null")
        if order is None:
            return 0
        logging.basicConfig(format=f"rank {order['rank']}: %(levelname)s %(name)s: %(message)s", force=True)
        logging.captureWarnings(True)
        member = Member(order, answers)
        gc.disable()  # a collection here would delay all ranks
        member.answer()
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            CALLS[name](member, *arguments)
    except (LlmbenchError, MemoryError) as error:
        kind = type(error).__name__ if isinstance(error, LlmbenchError) else "OutOfMemory"
        answers.write(json.dumps({"failed": kind, "message": str(error) or "Memory ran out."}) + "\n")
        return 1
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"failed": "MeasurementError", "message": first_line(error)}) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # an orderly end of a process group waits for ranks that may be gone
