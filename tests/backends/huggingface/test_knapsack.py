"""The multiple-choice knapsack, compared with all combinations, and at the size of the largest models."""

import itertools
import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.backends.huggingface.knapsack import Option, choose

OPTIONS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=3)


def totals(items: list[list[Option]], chosen: tuple[int, ...]) -> tuple[int, int]:
    """Cost and bytes of a choice."""
    taken = [item[number] for item, number in zip(items, chosen, strict=True)]
    return sum(cost for _, cost in taken), sum(size for size, _ in taken)


@settings(max_examples=300, deadline=None)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 70))
def test_it_is_the_best_of_all_combinations(items: list[list[Option]], budget: int) -> None:
    every = [totals(items, chosen) for chosen in itertools.product(*(range(len(item)) for item in items))]
    fitting = [(cost, size) for cost, size in every if size <= budget]
    chosen = choose(items, budget)
    assert (None if chosen is None else totals(items, chosen)) == min(fitting, default=None)


def test_a_greedy_choice_would_be_worse() -> None:
    """Greedy choice by gain per byte leaves room in which nothing fits."""
    items = [[(1, 100), (6, 40)], [(1, 100), (5, 50)], [(1, 100), (5, 50)]]
    assert choose(items, 11) == (0, 1, 1)


def test_a_model_of_eighty_layers_is_chosen_at_once() -> None:
    draw = random.Random(0)
    items = []
    for _ in range(80):
        for weights in (150_000_000, 700_000_000):
            cost = int(draw.lognormvariate(0, 1) * 1e9)
            items.append(
                [
                    (2 * weights, 0),
                    (weights + draw.randrange(9999), cost),
                    (weights * 9 // 16, int(cost * draw.uniform(5, 40))),
                ]
            )
    started = time.process_time()
    chosen = choose(items, sum(item[0][0] for item in items) * 11 // 32)
    assert chosen and len(set(chosen)) > 1
    assert time.process_time() - started < 30  # without its bounds it would not end
