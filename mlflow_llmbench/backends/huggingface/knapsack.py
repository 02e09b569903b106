"""Exact multiple-choice knapsack: choose one option of each item, at the least total cost, within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence

Option = tuple[int, int]
"""Bytes and cost of one option; whole numbers, so that sums are exact."""


def choose(items: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...] | None:
    """Return the index of the chosen option of each item; None if even the smallest options exceed the budget (bytes).

    Dynamic programming over the undominated totals (Nemhauser & Ullmann, Management Science 15, 1969): after each
    item, only those (bytes, cost) are kept that no other beats in both. A total is also dropped if the remaining items
    cannot fit any more, or if even their Lagrangian bound, Σ min(cost + λ·bytes) − λ·room for any λ ≥ 0, is no better
    than a known solution (Pisinger, European Journal of Operational Research 83, 1995). Of several solutions with the
    same cost, the one with the fewest bytes is chosen.
    """
    if sum(min(size for size, _ in item) for item in items) > budget:
        return None
    price, known = _priced(items, budget)
    least, bound = [0], [0.0]
    for item in reversed(items):
        least.append(least[-1] + min(size for size, _ in item))
        bound.append(bound[-1] + min(cost + price * size for size, cost in item))
    least.reverse()
    bound.reverse()
    tables: list[list[tuple[int, int, int, int]]] = [[(0, 0, -1, -1)]]  # bytes, cost, state before, option
    for number, item in enumerate(items, 1):
        reached = [
            (size + more, cost + added, before, option)
            for before, (size, cost, _, _) in enumerate(tables[-1])
            for option, (more, added) in enumerate(item)
            if size + more + least[number] <= budget
            and cost + added + bound[number] - price * (budget - size - more)
            <= known * (1 + 1e-9) + 1  # tolerance for rounding of the bound
        ]
        kept: list[tuple[int, int, int, int]] = []
        for state in sorted(reached):
            if not kept or state[1] < kept[-1][1]:
                kept.append(state)
        tables.append(kept)
    chosen, place = [], len(tables[-1]) - 1  # the totals are undominated, so the last one has the least cost
    for table in reversed(tables[1:]):
        _, _, place, option = table[place]
        chosen.append(option)
    return tuple(reversed(chosen))


def _priced(items: Sequence[Sequence[Option]], budget: int) -> tuple[float, int]:
    """Return nearly the lowest price λ per byte at which the cheapest options fit, and the cost of those options."""
    low, high = 0.0, 1.0

    def at(price: float) -> tuple[int, int]:
        taken = [min(item, key=lambda option: (option[1] + price * option[0], option[0])) for item in items]
        return sum(size for size, _ in taken), sum(cost for _, cost in taken)

    while at(high)[0] > budget:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= budget else (middle, high)
    return high, at(high)[1]
