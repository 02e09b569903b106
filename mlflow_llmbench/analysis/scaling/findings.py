"""Findings of one or several sweeps as data: sentences with intervals, claims, recommendations, costs, machines.

Everything is computed from the results; `reports.study` renders it. A missing finding is listed with its reason, so
that it cannot be mistaken for a zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...records.calibration import Calibration
from ...records.errors import UsageError
from ...records.results import RunResult
from ..decisions.candidates import candidates
from ..decisions.dominance import Judge
from ..decisions.equal_memory import Rivals, rivals
from ..summary import hardware_name
from .cells import Measured, models_text
from .choices import Choice, choices_by_model
from .claims import Claim
from .deployment import DeploymentAnswer, LengthAnswers, deployments, deployments_by_length
from .finding_sentences import (
    Across,
    compare_machines,
    cost_sentences,
    energy_sentences,
    machine_sentences,
    measured_sentences,
    quality_sentences,
    quantization_sentences,
    setting_sentences,
    size_sentences,
)
from .focus import Focus, Machine, choose_focus, find_machines
from .paper_claims import QuantEffect, judge_claims, quant_effects
from .study import ScalingStudy, study_scaling


@dataclass(frozen=True)
class Findings:
    """Content of a study's report.

    `sentences`: heading → sentences · `lengths`: the answers of `deployments` at other prompt lengths · `equal_memory`:
    different models at about equal memory · `not_said`: what is missing, and why.
    """

    title: str
    scaling: ScalingStudy
    results: tuple[RunResult, ...]
    cells: tuple[Measured, ...]
    machines: tuple[Machine, ...]
    focus: Focus
    effects: tuple[QuantEffect, ...]
    sentences: Mapping[str, tuple[str, ...]]
    claims: tuple[Claim, ...]
    choices: tuple[Choice, ...]
    deployments: tuple[DeploymentAnswer, ...]
    lengths: tuple[LengthAnswers, ...]
    equal_memory: tuple[Rivals, ...]
    across: tuple[Across, ...]
    not_said: tuple[tuple[str, str], ...]


def find(
    results: Sequence[RunResult],
    *,
    share: float = 0.5,
    prices: Mapping[str, float] | None = None,
    accept_suspect: str | None = None,
    no_energy: str = "",
    calibrations: Sequence[Calibration] = (),
) -> Findings:
    """Study results.

    `prices`: money per hour by part of the hardware's name, "" for all; they replace the recorded prices.
    `accept_suspect`: reason for which suspect results may be recommended. `no_energy`: why energy cannot be read on
    this machine. `calibrations` are as in `compare`. Raises UsageError if no result can be used, or if a price matches
    no machine.
    """
    results = _priced(results, prices or {})
    study = study_scaling(results, share, calibrations=calibrations)
    cells = study.measured
    machines = find_machines(cells)
    focus = choose_focus(cells, machines)
    effects = tuple(quant_effects(cells))
    judge = Judge(calibrations=tuple(calibrations))
    choices = tuple(choices_by_model(focus, accept_suspect, judge))
    across = tuple(compare_machines(cells, machines))
    not_said: list[tuple[str, str]] = []
    sentences = {
        "What was measured": measured_sentences(results, cells, machines),
        "Model size": size_sentences(study),
        "Quantization": quantization_sentences(effects, not_said),
        "Batch size": setting_sentences(focus, "batch_size", "batch size"),
        "Prompt length": setting_sentences(focus, "prompt_tokens", "prompt length"),
        "Quality": quality_sentences(focus, not_said),
        "Energy": energy_sentences(focus, no_energy, not_said),
        "Cost": cost_sentences(cells, machines, not_said),
        "Machines": machine_sentences(across, machines, not_said),
    }
    shown = {heading: tuple(found) for heading, lines in sentences.items() if (found := list(lines))}
    title = f"Study of {models_text(cells)}"
    claims = tuple(judge_claims(study, cells))
    answers = deployments(results, focus, accept_suspect, judge)
    return Findings(
        title,
        study,
        tuple(results),
        tuple(cells),
        machines,
        focus,
        effects,
        shown,
        claims,
        choices,
        answers,
        deployments_by_length(results, focus, answers, accept_suspect, judge),
        rivals(candidates(results)),
        across,
        tuple(not_said),
    )


def _priced(results: Sequence[RunResult], prices: Mapping[str, float]) -> list[RunResult]:
    """Set the price of each result's hardware. Raises UsageError for a name that matches no hardware."""
    names = {hardware_name(result) for result in results}
    for part in prices:
        if not any(part.lower() in name.lower() for name in names):
            raise UsageError(
                f"No machine of the study is called {part}. "
                f"Give the price for one of these, or for a part of its name: {'; '.join(sorted(names))}."
            )
    found = []
    for result in results:
        price = next(
            (p for part, p in prices.items() if part and part.lower() in hardware_name(result).lower()), prices.get("")
        )
        found.append(result if price is None else dataclasses.replace(result, price_per_hour=price))
    return found
