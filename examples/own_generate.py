"""Measure a `generate` function of your own with the method of mlflow-llmbench, in five lines.

    python examples/own_generate.py
    mlflow ui

The function gets prompts as token ids and calls `emit` with one new id per prompt, each time when a step is really there. Whatever
streams tokens can be measured so: an engine's iterator, as here, or a streamer that transformers calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from mlflow_llmbench.callback import measure


def my_engine(prompts: Sequence[Sequence[int]], output_tokens: int) -> Iterator[list[int]]:
    """Stands for an engine: 20 ms for the prompts, then 5 ms a step."""
    time.sleep(0.015)
    for step in range(output_tokens):
        time.sleep(0.005)
        yield [(sum(prompt) + step) % 1000 for prompt in prompts]


def generate(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Callable[[list[int]], None]) -> None:
    """What is measured."""
    for ids in my_engine(prompts, output_tokens):
        emit(ids)


if __name__ == "__main__":
    with measure(model="my-engine", batch_size=[1, 4], prompt_tokens=64, output_tokens=16, repetitions=5) as bench:
        result = bench.run(generate)
    print(result.table())
