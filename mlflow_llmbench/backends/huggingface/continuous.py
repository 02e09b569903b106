"""Continuous batching by transformers in this process.

Requests join the running batch at any step and leave it when they have their tokens. The library generates in a thread
of its own: `add_request` submits a request, and the tokens of each step go to an output router as soon as they are on
the host. The router of this module replaces the library's queue, so that no token waits for another thread.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ...records.errors import MeasurementError
from ..base import Token
from .logits import Watch

PAGE_TOKENS = 256
"""Tokens per page of the KV cache (the library's default)."""

PASS_TOKENS = 2048
"""Maximum number of prompt tokens in a pass; longer prompts are processed in parts.

Without flash attention, the mask has as many rows and is allocated as a whole.
"""

LOOK_S = 1.0
"""Seconds between two checks that the engine's thread is still running."""


class _Router:
    """Replaces the library's output queue: the engine's thread calls it with the tokens of each step."""

    def __init__(self, on_step: Callable[[Sequence[Token]], None]) -> None:
        self.on_step = on_step
        self.open = 0
        self.errors: list[str] = []
        self.idle = threading.Event()
        self.lock = threading.Lock()

    def begin(self) -> None:
        with self.lock:
            self.open += 1
            self.idle.clear()

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        """Pass on one step: an output of each request that has a new token."""
        self.on_step(
            [Token(int(one.request_id), one.generated_tokens[-1], int(one.timestamps[-1] * 1e9)) for one in outputs]
        )
        self._end(sum(one.is_finished() for one in outputs))

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Record a request that the engine gave up."""
        self.errors.append(f"{type(error).__name__}: {error}")
        self._end(1)

    def _end(self, number: int) -> None:
        with self.lock:
            self.open -= number
            if self.open <= 0:
                self.idle.set()


class ContinuousEngine:
    """A running `ContinuousBatchingManager` of a loaded model with room for `rows` requests of `longest` tokens each.

    Prefix sharing is off, because no other way of batching has it. The model keeps its attention; only eager attention
    is replaced by its paged form. A `watch` sees the logits of each pass. Raises the library's own errors, also for a
    model or an attention that it cannot batch continuously.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        longest: int,
        on_step: Callable[[Sequence[Token]], None],
        watch: Watch | None = None,
    ) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        settings = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=rows * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=max(rows, min(rows * longest, PASS_TOKENS)),
            max_requests_per_batch=rows,
            safety_margin=0.0,  # there is room for all rows, so none has to wait for blocks of others
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=longest, pad_token_id=0, eos_token_id=-1)
        self.router = _Router(on_step)
        self.manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=settings)
        self.manager.output_router = self.router
        self.manager.warmup()  # allocates the cache, so that its errors are raised here
        # A replayed CUDA graph calls no hook.
        self.counted = not any(self.manager.continuous_batching_config.cuda_graph_booleans)
        self.positions = 0
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.watching = model.register_forward_hook(watch.look_at_pass) if watch and self.counted else None
        self.manager.start()

    def submit(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Submit a request; it ends after exactly `output_tokens` tokens, whatever they are."""
        self.router.begin()
        given = self.manager.add_request(
            list(prompt),
            str(number),
            max_new_tokens=output_tokens,
            streaming=True,
            record_timestamps=True,
            eos_token_id=-1,
        )
        if given is None:
            raise self._error("takes no more requests")

    def wait(self) -> None:
        """Wait until all requests are answered. Raises MeasurementError if the engine gave one up or ended."""
        while not self.router.idle.wait(LOOK_S):
            if not self.manager.is_running():
                raise self._error("has ended")
        if self.router.errors:
            raise self._error("gave a request up")

    def take_positions(self) -> int | None:
        """Return the token positions of all passes since the last call; None if they cannot be counted."""
        counted, self.positions = self.positions, 0
        return counted if self.counted else None

    def close(self) -> None:
        """End the thread, free the cache and restore the model's attention."""
        self.hook.remove()
        if self.watching:
            self.watching.remove()
        self.manager.stop(block=True, timeout=60, hard_stop=True)
        self.manager.destroy()

    def _count(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.positions += int(keywords["input_ids"].numel())

    def _error(self, what: str) -> MeasurementError:
        why = next(itertools.chain(self.router.errors, [str(self.manager.background_thread_status.fatal_error)]))
        return MeasurementError(f"Continuous batching {what}: {why} Use batching=static,dynamic, or another attention.")
