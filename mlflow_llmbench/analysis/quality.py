"""Quality metrics from raw scores: perplexity, KL divergence from the unquantized model, next-token agreement. Pure.

Tokens of one prompt, or of one window of a text, are correlated. The unit of each interval is therefore the prompt or
the window, a *cluster*; the estimates are means over all tokens.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..records.metric import interval_keys
from ..records.metrics import BITS_PER_BYTE, KL, PERPLEXITY, PERPLEXITY_RATIO, TOP1
from ..records.results import Quality, TaskScore, TextScores
from ..stats import t_quantile_975
from .figures import Figures, distribution, interval_figures

Clusters = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """Mean over all tokens, 95 % interval over clusters; `low` and `high` are None with fewer than two clusters."""

    value: float
    low: float | None = None
    high: float | None = None


def cluster_mean(clusters: Clusters) -> Estimate | None:
    """Mean over all values, with Student's interval over clusters; None without any value.

    Clusters differ in size, so the mean is the ratio Σyⱼ/Σnⱼ of their sums and sizes. Its variance is that of the
    linearised ratio, J/(J − 1) · Σ(yⱼ − nⱼ·mean)² / (Σnⱼ)², with J − 1 degrees of freedom (Cochran, Sampling
    Techniques, 3rd edition 1977, sections 2.11 and 9A.4). With clusters of equal size it is `stats.t_interval` of
    their means.
    """
    kept = [cluster for cluster in clusters if cluster]
    return cluster_ratio([math.fsum(cluster) for cluster in kept], [len(cluster) for cluster in kept])


def cluster_ratio(sums: Sequence[float], sizes: Sequence[int]) -> Estimate | None:
    """Return Σ sums ÷ Σ sizes with its interval over clusters, as `cluster_mean` does; None if all sizes are 0."""
    total, number = sum(sizes), len(sizes)
    if not total:
        return None
    mean = math.fsum(sums) / total
    if number < 2:
        return Estimate(mean)
    half = t_quantile_975(number - 1) * math.sqrt(_ratio_variance(sums, sizes, mean))
    return Estimate(mean, mean - half, mean + half)


def _ratio_variance(sums: Sequence[float], sizes: Sequence[int], mean: float) -> float:
    """Variance of a ratio of sums over clusters (formula in `cluster_mean`)."""
    residuals = [own - size * mean for own, size in zip(sums, sizes, strict=True)]
    return len(sizes) / (len(sizes) - 1) * math.fsum(r * r for r in residuals) / sum(sizes) ** 2


def cluster_proportion(clusters: Sequence[Sequence[bool]]) -> Estimate | None:
    """Share of true values, with Wilson's interval (1927) at the effective sample size; None without any value.

    The effective size is p(1 − p) ÷ the variance over clusters, corrected for its few degrees of freedom and at most
    the number of values (Korn & Graubard, Survey Methodology 24, 1998; with Wilson's interval instead of theirs as in
    Franco et al., Journal of Survey Statistics and Methodology 7, 2019). If all values agree there is no variance to
    estimate, and each cluster counts as one value: 20 prompts without a disagreement show at least 84 %, not 100 %.
    """
    kept = [[float(value) for value in cluster] for cluster in clusters if cluster]
    count, number = sum(map(len, kept)), len(kept)
    if not count:
        return None
    share = math.fsum(value for cluster in kept for value in cluster) / count
    if number < 2:
        return Estimate(share)
    variance = _ratio_variance([math.fsum(cluster) for cluster in kept], [len(cluster) for cluster in kept], share)
    size = float(number)
    if 0 < share < 1 and variance > 0:
        size = min(
            share * (1 - share) / variance * (t_quantile_975(count - 1) / t_quantile_975(number - 1)) ** 2, float(count)
        )
    z = t_quantile_975(10**9)  # the normal quantile
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    # If all values agree, one end is exactly 0 or 1, which rounding misses.
    return Estimate(share, 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half)


def perplexity(quality: Quality) -> Estimate | None:
    """Perplexity: exp of the mean negative log-likelihood per token (nats), over sliding windows of a text.

    The interval is over windows.
    """
    return _exp(cluster_mean(quality.scores.nll)) if quality.scores else None


def perplexity_ratio(quality: Quality) -> Estimate | None:
    """Perplexity ÷ the reference's on the same windows: exp of the mean log-likelihood difference, paired by token.

    Difficulty common to both cancels, so the interval is far narrower than either one's (compare llama.cpp's
    `PPL(Q)/PPL(base)`).
    """
    scores = quality.scores
    if scores is None or not scores.reference_nll:
        return None
    pairs = zip(scores.nll, scores.reference_nll, strict=True)
    return _exp(cluster_mean([[own - its for own, its in zip(a, b, strict=True)] for a, b in pairs]))


def bits_per_byte(quality: Quality) -> Estimate | None:
    """Bits per UTF-8 byte of a text: −Σ log₂ p(token) ÷ bytes of the tokens; the interval is over windows.

    It measures what the model says of the text, however its tokenizer cuts it (Gao et al. 2020, The Pile,
    arXiv:2101.00027, section 3.1). None in results of earlier versions, which did not count bytes.
    """
    scores = quality.scores
    if scores is None or not scores.token_bytes:
        return None
    return cluster_ratio([math.fsum(window) / math.log(2) for window in scores.nll], [*map(sum, scores.token_bytes)])


BLOCKS = 24
"""Blocks of equal bytes that two models of different tokenizers are compared in."""


def bits_per_byte_difference(one: Quality, other: Quality) -> Estimate | None:
    """Bits per byte of `one` − those of `other` on the same text; below 0, `one` is better. None if not comparable.

    Tokens of two tokenizers end at different bytes, so both are read at the same `BLOCKS` places of the text, in equal
    distances. The difference of a block is paired, so that difficulty common to both cancels; Student's interval is
    over blocks.
    """
    if one.scores is None or other.scores is None or one.text_digest != other.text_digest:
        return None
    curves = [_bits_by_byte(quality.scores) for quality in (one, other) if quality.scores]
    if not all(curves):
        return None
    begin, end = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    places = [begin + (end - begin) * number / BLOCKS for number in range(BLOCKS + 1)]
    own, its = ([_at(curve, place) for place in places] for curve in curves)
    each = (end - begin) / BLOCKS
    gaps = [((own[i + 1] - own[i]) - (its[i + 1] - its[i])) / each for i in range(BLOCKS)]
    return cluster_mean([[gap] for gap in gaps])


def _bits_by_byte(scores: TextScores) -> list[tuple[float, float]]:
    """Return (bytes, bits) from the beginning of the scored text to the end of each token; empty without bytes."""
    if not scores.token_bytes:
        return []
    sizes, nll = itertools.chain(*scores.token_bytes), itertools.chain(*scores.nll)
    bits = itertools.accumulate((value / math.log(2) for value in nll), initial=0.0)
    return [*zip(itertools.accumulate(sizes, initial=0), bits, strict=True)]


def _at(curve: Sequence[tuple[float, float]], place: float) -> float:
    """Return the bits at a place in the text; within a token they are spread evenly over its bytes."""
    for (left, below), (right, above) in itertools.pairwise(curve):
        if place <= right:
            return below + (above - below) * (place - left) / (right - left) if right > left else above
    return curve[-1][1]


def _exp(found: Estimate | None) -> Estimate | None:
    if found is None or found.low is None or found.high is None:
        return found and Estimate(math.exp(found.value))
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high))


def kl_divergence(quality: Quality) -> Estimate | None:
    """Mean KL(reference‖this model) of the next token over positions, nats, at least 0. The interval is by prompt."""
    found = cluster_mean(quality.divergence.kl) if quality.divergence else None
    if found is None or found.low is None:
        return found
    return Estimate(found.value, max(found.low, 0.0), found.high)


def top1_agreement(quality: Quality) -> Estimate | None:
    """Share of positions where this model's most probable token is the reference's; the interval is over prompts."""
    return cluster_proportion(quality.divergence.agrees) if quality.divergence else None


def kl_reduction(before: Quality, after: Quality) -> Estimate | None:
    """Decrease of the mean KL divergence from the unquantized model, `before` − `after`, nats; above 0 is better.

    Paired by position, so difficulty common to both cancels; the interval is over prompts. None unless both were given
    the same ids.
    """
    one, other = before.divergence, after.divergence
    if one is None or other is None or one.digest != other.digest:
        return None
    pairs = zip(one.kl, other.kl, strict=True)
    return cluster_mean([[a - b for a, b in zip(own, its, strict=True)] for own, its in pairs])


def task_estimate(score: TaskScore) -> Estimate:
    """Score of lm-eval with its 95 % interval over documents, 1.96 standard errors to each side.

    No interval if the error is unknown or 0: an error of 0, where all documents agree, says nothing about the next one.
    The interval of a share is cut to 0 … 1.
    """
    if not score.stderr:
        return Estimate(score.value)
    half = t_quantile_975(10**9) * score.stderr
    low, high = score.value - half, score.value + half
    if score.metric.startswith(SHARES):
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(score.value, low, high)


SHARES = ("acc", "exact_match", "em")
"""Prefixes of the lm-eval metrics that are shares."""


def task_key(score: TaskScore) -> str:
    """MLflow key of a score; characters that a key cannot have become dashes."""
    return (
        "quality/lm_eval/"
        + re.sub(r"[^\w.-]", "-", score.task, flags=re.ASCII)
        + "/"
        + re.sub(r"[^\w.-]", "-", score.metric, flags=re.ASCII)
    )


ESTIMATES = {
    KL: kl_divergence,
    TOP1: top1_agreement,
    PERPLEXITY: perplexity,
    BITS_PER_BYTE: bits_per_byte,
    PERPLEXITY_RATIO: perplexity_ratio,
}
"""Metric → its estimate."""


def figures(quality: Quality) -> Figures:
    """Summary metrics by MLflow key; a metric not measured is absent, an unknown end of an interval is None."""
    found: Figures = {}
    for metric, estimate_of in ESTIMATES.items():
        if (estimate := estimate_of(quality)) is not None:
            found |= interval_figures(metric, estimate.value, estimate.low, estimate.high)
    for score in quality.tasks:
        if score.part:
            continue
        own, key = task_estimate(score), task_key(score)
        found |= {key: own.value, **dict(zip(interval_keys(key), (own.low, own.high), strict=True))}
    pool = [value for prompt in quality.divergence.kl for value in prompt] if quality.divergence else []
    return found | distribution(KL, pool)


def sentences(quality: Quality) -> list[str]:
    """Sentences on how the quality metrics were obtained, and why one is missing."""
    found = []
    if quality.divergence:
        d = quality.divergence
        positions = sum(map(len, d.kl))
        found.append(
            f"The reference is {d.reference}, unquantized. Both models were given its own greedy continuations of "
            f"{len(d.kl)} prompts, and their probabilities of the whole vocabulary were compared at {positions} "
            "positions; intervals are over prompts."
        )
        if d.is_reference:
            found.append(
                "This is the reference itself, computed a second time: its divergence is the noise floor of the "
                "comparison here, 0 if the machine repeats itself exactly, and says nothing about quality."
            )
    if quality.scores:
        s = quality.scores
        scored = sum(map(len, s.nll))
        found.append(
            f"Perplexity is over {scored:,} of the {s.tokens:,} tokens of the text {s.text}, in {len(s.nll)} windows "
            f"of at most {s.window} tokens with a stride of {s.stride}; the interval is over windows. It depends on "
            "the text and the tokenizer: compare it within one model. Bits per byte, over the same windows, compare "
            "models with different tokenizers."
        )
    if quality.tasks:
        counts = {
            score.task: score.documents for score in quality.tasks if score.documents is not None and not score.part
        }
        listed = ", ".join(f"{task} ({count:,} documents)" for task, count in counts.items())
        found.append(
            f"Tasks of lm-eval, with the harness's own prompts and no chat template: {listed}; intervals are over "
            "documents."
        )
    if found:
        found.append(
            "The memory stage unloaded is absent: the evaluation ran before it and left allocations that do not belong "
            "to the measurement."
        )
    return found + list(quality.withheld)
