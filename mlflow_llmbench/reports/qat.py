"""The gain of a quantization-aware training as figures, sentences and tables.

Three models are compared: unquantized, quantized without training, and quantized with training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..analysis.figures import Figures, interval_figures
from ..analysis.quality import ESTIMATES, Estimate, figures, kl_reduction, sentences
from ..config.training import QUANT, Training
from ..records.cell import Cell
from ..records.invocation import command_text
from ..records.metric import Metric
from ..records.metrics import (
    KL,
    KL_RECOVERED,
    KL_REDUCTION,
    PERPLEXITY,
    TOP1,
    UNQUANTIZED_PERPLEXITY,
    UNTRAINED_KL,
    UNTRAINED_PERPLEXITY,
    UNTRAINED_TOP1,
)
from ..records.results import Quality
from ..records.text import short_number_text
from .escaping import markdown, plain
from .tables import markdown_table, split_table, text_table

UNQUANTIZED, UNTRAINED, TRAINED = "unquantized", "untrained", "trained"
"""The three compared models: unquantized, quantized without training for it, and quantized after training for it."""

SCORES = {KL: UNTRAINED_KL, TOP1: UNTRAINED_TOP1, PERPLEXITY: UNTRAINED_PERPLEXITY}
"""Compared metric → the same of the quantization without training."""

HEADING = ("model", *(metric.label for metric in SCORES))


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    `outcome` is `ok`, `error` or `interrupted`. `losses` has one loss per step, in nats per token. `qualities` is keyed
    by the names above. `plan` counts parameters `trained` and `frozen`, `layers`, bytes `needed`, and `sequences` of
    the data.
    """

    cell: Cell
    training: Training
    data_digest: str
    outcome: str = "error"
    message: str = ""  # why it ended early
    folder: str = ""  # of the results
    checkpoint: str | None = None  # its folder, once it is complete
    run_id: str | None = None
    plan: Mapping[str, int] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    qualities: Mapping[str, Quality] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 0, 130 if interrupted, else 1."""
        return {"ok": 0, "interrupted": 130}.get(self.outcome, 1)


def training_figures(done: Trained) -> dict[str, float]:
    """Return the summary metrics under their MLflow keys: `quality/…` of the trained quantization, and `qat/…`.

    Metrics that were not measured are absent.
    """
    found: Figures = dict(figures(done.qualities[TRAINED])) if TRAINED in done.qualities else {}
    for name, metrics in ((UNTRAINED, SCORES), (UNQUANTIZED, {PERPLEXITY: UNQUANTIZED_PERPLEXITY})):
        if name in done.qualities:
            for metric, own in metrics.items():
                found |= _ends(own, ESTIMATES[metric](done.qualities[name]))
    reduction, before = _reduction(done), found.get(UNTRAINED_KL.key())
    found |= _ends(KL_REDUCTION, reduction)
    if reduction and before:
        found[KL_RECOVERED.key()] = reduction.value / before
    return {key: value for key, value in found.items() if value is not None}


def _ends(metric: Metric, estimate: Estimate | None) -> Figures:
    return interval_figures(metric, estimate.value, estimate.low, estimate.high) if estimate else {}


def _reduction(done: Trained) -> Estimate | None:
    if UNTRAINED not in done.qualities or TRAINED not in done.qualities:
        return None
    return kl_reduction(done.qualities[UNTRAINED], done.qualities[TRAINED])


def conclusion(done: Trained) -> str:
    """Return one sentence on how the training changed the divergence. It claims no more than the interval supports."""
    reduction, found = _reduction(done), training_figures(done)
    if reduction is None or reduction.low is None or reduction.high is None:
        return "The effect of the training could not be measured."
    ends = (
        f"{short_number_text(reduction.value)} nats "
        f"[{short_number_text(reduction.low)}, {short_number_text(reduction.high)}]"
    )
    if reduction.low > 0:
        share = f"{100 * found[KL_RECOVERED.key()]:.0f} % of the KL divergence that {QUANT} costs without it"
        return f"Training recovered {share}: {ends}, 95 % interval over prompts, on text held out from training."
    if reduction.high < 0:
        return f"Training made the KL divergence larger: {ends}. Use a smaller learning_rate, or more text."
    return (
        f"It cannot be told whether training helped: the KL divergence fell by {ends}, 95 % interval over prompts. "
        "Train longer, or hold out more text."
    )


def table_body(done: Trained) -> list[list[str]]:
    """Return one line for each measured model: figures with their 95 % intervals."""
    groups = f"group_size={done.cell.group_size}"
    names = {UNQUANTIZED: "unquantized", UNTRAINED: f"{QUANT}, {groups}", TRAINED: f"{QUANT}, {groups}, trained"}
    body = []
    for name, title in names.items():
        if name in done.qualities:
            body.append([title, *(_shown(ESTIMATES[metric](done.qualities[name])) for metric in SCORES)])
    return body


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    value = short_number_text(estimate.value)
    return (
        value
        if estimate.low is None or estimate.high is None
        else f"{value} [{short_number_text(estimate.low)}, {short_number_text(estimate.high)}]"
    )


def format_trained(done: Trained) -> str:
    """Format the result for a terminal: the comparison, where the files are, and how to run the checkpoint."""
    lines = [plain(done.message)] if done.message else []
    body = table_body(done)
    if body:
        lines.append(text_table(HEADING, body))
        lines += ["", conclusion(done)]
        lines += [plain(why) for why in dict.fromkeys(why for one in done.qualities.values() for why in one.withheld)]
    lines += ["", f"Results: {done.folder}", *([f"Logged on run {done.run_id}."] if done.run_id else [])]
    if done.checkpoint:
        run_it = command_text("run", model=done.checkpoint, quant=QUANT, group_size=str(done.cell.group_size))
        lines.append(f"Run it: {run_it}")
    return "\n".join(lines)


def training_markdown(done: Trained) -> str:
    """Return the description of the run, which is also its report.md."""
    t, plan = done.training, done.plan
    lines = [f"**{markdown(done.cell.model)}** trained for `{QUANT}`, groups of {done.cell.group_size}"]
    if done.message:
        lines += ["", f"**{done.outcome}**: {markdown(done.message)}"]
    if done.qualities:
        lines += ["", markdown_table(HEADING, table_body(done)), "", f"**{markdown(conclusion(done))}**"]
        told = next((one for one in (done.qualities.get(TRAINED), done.qualities.get(UNTRAINED)) if one), None)
        lines += (
            ["", *(f"- {markdown(sentence)}" for sentence in sentences(told) if "memory stage" not in sentence)]
            if told
            else []
        )
    if plan:
        lines += [
            "",
            f"{len(done.losses)} of {t.steps} steps of {t.batch_size} × {t.sequence_tokens} tokens, loss `{t.loss}`, "
            f"learning rate {t.learning_rate:g}, seed {done.cell.seed}; {plan['trained']:,} parameters trained in "
            f"float32, {plan['frozen']:,} frozen.",
        ]
    if done.checkpoint:
        lines += [
            "",
            f"Run it: `llmbench run --model {plain(done.checkpoint)} --quant {QUANT} "
            f"--group-size {done.cell.group_size}`",
        ]
    return "\n".join(lines) + "\n"


def quality_table(done: Trained) -> dict[str, Any]:
    """Return tables/quality.json, which the MLflow UI shows and compares."""
    return split_table(HEADING, table_body(done))
