"""Documentation of the metrics and series, from their table."""

from __future__ import annotations

from ..records.metric import Metric, Series
from ..records.metrics import METRICS, SCHEMA, SECTIONS, SERIES
from .tables import table_of_markdown

HEAD = ("key", "unit", "better", "definition", "shown in")


def metrics_markdown() -> str:
    """Return the page `docs/reference/metrics.md`."""
    sections = "\n\n".join(
        f"## {name}\n{words[:1].upper()}{words[1:]}.\n\n"
        + table_of_markdown(HEAD, [_row(metric) for metric in METRICS if metric.section == name])
        for name, words in SECTIONS.items()
    )
    series = table_of_markdown(("key", "unit", "definition"), [_series_row(one) for one in SERIES.values()])
    return f"""# Metrics
Keys of the metrics of an MLflow run, one section per prefix. A key with braces stands for several:
`ttft_ms_{{mean, p50}}` is `ttft_ms_mean` and `ttft_ms_p50`. An ending stands for the key before it with this ending.
A value that is not known or not defined is absent, never 0. A percentile is absent if the sample does not support it.
A request is sent at t0, and its output tokens arrive at t1 … tN; P is the number of prompt tokens, N that of output
tokens. `sd`, `mean_ci_low` and `mean_ci_high` are the standard deviation and the 95 % interval of a mean over
repetitions (over processes if several). GB are 10⁹ bytes. These are the names of runs with the tag
`llmbench.schema` = {SCHEMA}. This page is generated from the table in `mlflow_llmbench/records/metrics.py`.

{sections}

## Series
A series has one value per step, with its own time.

{series}
"""


def _row(metric: Metric) -> tuple[str, ...]:
    places = dict.fromkeys(place.where for place in metric.places)
    return _keys(metric), metric.unit, metric.better, metric.definition, ", ".join(places)


def _keys(metric: Metric) -> str:
    """All keys of a metric: `latency/tpot_ms_{mean, p50, p95}`, or the key and its endings."""
    first, *others = metric.statistics
    if others and first:
        return f"`{metric.section}/{metric.name}_{{{', '.join(metric.statistics)}}}`"
    return ", ".join([f"`{metric.key(first)}`", *(f"`_{statistic}`" for statistic in others)])


def _series_row(one: Series) -> tuple[str, ...]:
    return f"`{one.key}`", one.unit, one.definition
