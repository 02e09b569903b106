"""Evaluate the quality of the loaded model in a worker, and report each result as soon as it is there."""

from __future__ import annotations

from pathlib import Path

from ..backends.base import Backend
from ..backends.huggingface import lm_eval, scoring
from ..records.errors import NotFinite, UsageError
from ..records.results import ModelFacts
from ..workloads.prompts import Text, load_text
from .events import (
    EvaluationBegun,
    QualityWithheld,
    Report,
    ScoringProgress,
    TaskScored,
    TextScored,
    WorkloadCompared,
)
from .task import QualityOrder


def evaluate(backend: Backend, order: QualityOrder, context: int | None, send: Report) -> None:
    """Score the text, compare with each reference, and run the tasks of an order (`quality_order.order`).

    This runs after every cell is measured and its memory is read, so it does not affect their figures. `context`: most
    tokens of the model, if known.
    """
    send(EvaluationBegun(order.digest))
    if order.withheld:
        send(QualityWithheld(order.withheld))
    if order.text is not None:
        _evaluate_texts(backend, order, load_text(order.text), context, send)
    if order.tasks:
        _run_tasks(backend, order, send)


def _evaluate_texts(backend: Backend, order: QualityOrder, text: Text, context: int | None, send: Report) -> None:
    references = {workload: scoring.read_reference(Path(path)) for workload, path in order.references.items()}
    known = next(iter(references.values()), None)

    def progress(number: int, limit: int) -> None:
        send(ScoringProgress(number, limit))

    if known and not scoring.same_words(backend, known):
        why = f"The model does not have the vocabulary of {known.name}: the same ids mean other words, so the two are "
        send(QualityWithheld(f"{why}not compared."))
        references, known = {}, None
    try:
        send(TextScored(scoring.score_text(backend, text, context, progress, known)))
    except UsageError as error:
        send(QualityWithheld(str(error)))
    except NotFinite as error:
        send(QualityWithheld(str(error), nonfinite=True))
    for workload, reference in references.items():
        try:
            send(WorkloadCompared(workload, scoring.compare(backend, reference, progress, order.is_reference)))
        except NotFinite as error:
            send(QualityWithheld(str(error), nonfinite=True))


def _run_tasks(backend: Backend, order: QualityOrder, send: Report) -> None:
    """Run the tasks of lm-eval; the number of model calls that they need is unknown."""
    for found in lm_eval.run_tasks(
        backend, order.tasks, order.most_documents, lambda calls: send(ScoringProgress(calls))
    ):
        send(QualityWithheld(found.problem) if found.problem else TaskScored(found.task, found.scores))


def write_references(backend: Backend, order: QualityOrder, facts: ModelFacts, send: Report) -> None:
    """Write the reference files that an order lists. The loaded model must be the unquantized one."""
    assert order.text
    scoring.write_references(
        backend,
        load_text(order.text),
        {workload: Path(path) for workload, path in order.references.items()},
        facts,
        f"{facts.name} {facts.revision[:12]}",
        lambda number, limit: send(ScoringProgress(number, limit)),
    )
