"""Fit throughput over batch size and prompt length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...records.errors import NotFitted
from ..comparison import RATE
from .cells import Measured, grouped
from .curves import Form, linear, share_of
from .fitting import Fit, fit
from .laws import LawFit
from .ranking import verdict
from .roofline import roofline_limit

if TYPE_CHECKING:
    from .curves import Array


@dataclass(frozen=True)
class Surface:
    """Throughput over batch size and prompt length together: the exponent β of each length, and the joint laws.

    `suspect`: the lengths whose exponent rests on a suspect result.
    """

    where: str
    exponents: tuple[tuple[float, Fit], ...]  # prompt tokens, the fit at that length
    joint: tuple[Fit, ...]  # the paper's (one α for all lengths), one α per length, linear latency, roofline
    suspect: tuple[float, ...] = ()


def fit_surfaces(cells: Sequence[Measured], fitted: Sequence[LawFit]) -> tuple[list[Surface], list[str]]:
    """Fit T(b, s) ≈ α·b^β(s) where the batch size was varied at two or more prompt lengths.

    The paper has one α for all lengths, so that length would not matter at b = 1. The rivals are an α per length,
    linear latency T = b/(a + c·b + d·b·s), and a share of the roofline. Also returns one line for each fit that fails.
    """
    surfaces: list[Surface] = []
    refused: list[str] = []
    for where, group in grouped(cells, ("batch_size", "prompt_tokens")):
        ids = {id(measured) for measured in group}
        own = [f for f in fitted if f.law.key == "throughput_by_batch" and id(f.cells[0]) in ids]
        lengths = [(f.cells[0].variable("prompt_tokens") or 0.0, f.fit) for f in own]
        suspect = [length for (length, _), f in zip(lengths, own, strict=True) if any(m.is_suspect for m in f.cells)]
        if len(lengths) < 2:
            continue
        known = {length for length, _ in lengths}
        placed = [m for m in group if m.variable("prompt_tokens") in known]
        x = [(float(m.cell.batch_size), m.variable("prompt_tokens") or 0.0) for m in placed]
        joint = []
        for form in _joint_forms(sorted(known), placed[0]):
            try:
                joint.append(fit(form, x, [m.metrics[RATE] for m in placed]))
            except NotFitted as error:
                refused.append(f"throughput against batch size and prompt length ({where}): {error}")
        betas = tuple(sorted(lengths, key=lambda pair: pair[0]))
        surfaces.append(Surface(where, betas, tuple(joint), tuple(sorted(suspect))))
    return surfaces, refused


def _joint_forms(lengths: Sequence[float], first: Measured) -> Iterator[Form]:
    """Yield the paper's surface, the same with one α per length, linear latency, and a share of the roofline."""
    import numpy as np

    columns = np.array(lengths)

    def form(formula: str, shared: bool) -> Form:
        count = 1 if shared else len(lengths)
        names = ("α",) if shared else tuple(f"α({length:g})" for length in lengths)

        def basis(x: Array) -> Array:
            at = (x[:, 1:2] == columns).astype(np.float64)
            return np.column_stack([np.ones(len(x)) if shared else at, at * np.log(x[:, :1])])

        def logs(p: Array) -> Array:
            return np.concatenate([np.log(np.maximum(p[:count], 1e-300)), p[count:]])

        def value(p: Array, x: Array) -> Array:
            return np.asarray(np.where((p[:count] > 0).all(), np.exp(basis(x) @ logs(p)), np.nan))

        def gradient(p: Array, x: Array) -> Array:
            return np.asarray(value(p, x)[:, None] * basis(x) / np.concatenate([p[:count], np.ones(len(lengths))]))

        def starts(x: Array, y: Array) -> list[Array]:
            found = np.linalg.lstsq(basis(x), np.log(y), rcond=None)[0]
            return [np.concatenate([np.exp(found[:count]), found[count:]])]

        return Form(
            "joint power", formula, (*names, *(f"β({length:g})" for length in lengths)), value, gradient, starts
        )

    def latency(x: Array) -> Array:
        return np.column_stack([np.ones(len(x)), x[:, 0], x[:, 0] * x[:, 1]])

    yield form("T = α·b^β(s)", shared=True)
    yield form("T = α(s)·b^β(s)", shared=False)
    yield linear("T = b/(a + c·b + d·b·s)", ("a", "c", "d"), latency, lambda x: x[:, 0])
    limit = roofline_limit(RATE, "both", first)
    if limit is not None:
        yield share_of("T = e·roofline", "share of roofline", limit)


def surface_sentence(surface: Surface) -> str:
    """Say how β depends on the prompt length, and which joint law fits best."""
    betas = ", ".join(f"{_exponent(found)} at {length:g}" for length, found in surface.exponents)
    law, *rivals = surface.joint or (None,)
    return (
        f"Exponent β of the batch size by prompt length ({surface.where}): {betas}. "
        f"{verdict(law, rivals) if law else ''}"
    ).strip()


def _exponent(found: Fit) -> str:
    return str(found.parameter("β")).removeprefix("β = ")
