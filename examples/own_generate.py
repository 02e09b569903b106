"""Measure a `generate` function of your own with the method of mlflow-llmbench, in five lines.

    python examples/own_generate.py
    mlflow ui

The function gets prompts as token ids and calls `emit` with one new id per prompt as soon as each step is complete.
Anything that streams tokens can be measured: an engine's iterator, as here, or a streamer that transformers calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from mlflow_llmbench.callback import measure


def my_engine(prompts: Sequence[Sequence[int]], output_tokens: int) -> Iterator[list[int]]:
    """Imitate an engine: 20 ms to the first token, then 5 ms per step."""
    time.sleep(0.015)
    for step in range(output_tokens):
        time.sleep(0.005)
        yield [(sum(prompt) + step) % 1000 for prompt in prompts]


def generate(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Callable[[list[int]], None]) -> None:
    """Run the engine and emit each step; this is the function that is measured."""
    for ids in my_engine(prompts, output_tokens):
        emit(ids)


if __name__ == "__main__":
    with measure(model="my-engine", batch_size=[1, 4], prompt_tokens=64, output_tokens=16, repetitions=5) as bench:
        result = bench.run(generate)
    print(result.table())
