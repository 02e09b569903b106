"""Judge a repeated measurement, per metric and as a whole: equivalent within a margin, different, or cannot tell.

"No difference seen" does not prove sameness: few or noisy repetitions show nothing. So each metric of every repetition
is compared with the margin by two one-sided t tests on the logarithms (Schuirmann, J. Pharmacokinet. Biopharm. 15,
1987). It is *equivalent* if the ratio is shown to lie within 1 ÷ (1 + margin) to 1 + margin, *different* if it is shown
to lie outside (Holm over the metrics), else *cannot tell*, with the number of repetitions that would tell. The whole is
equivalent if every metric is, which needs no adjustment (an intersection–union test, Berger 1982). A metric that a run
has once (memory, weights, quality) is compared by its value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import variance

from ...records.invocation import command_text
from ...records.metrics import KEYS, LOAD_TIME, PERPLEXITY, TOP1
from ...records.results import RunResult
from ...stats import Equivalence, holm, required_sample_size, tost
from ..comparability import Difference
from ..comparison import SIGNIFICANCE, Comparison, Effect, noise_sentences, units_text
from ..process_noise import ASSUMPTION, ProcessNoise
from ..repetitions import process_count

EQUIVALENT, DIFFERENT, INCONCLUSIVE, INVALID = "equivalent", "different", "cannot_tell", "invalid"
EXIT_CODES = {EQUIVALENT: 0, DIFFERENT: 1, INVALID: 3, INCONCLUSIVE: 4}
DEFAULT_MARGIN = 0.05
"""Default margin within which a reproduction is equivalent, as a ratio (5 %)."""

NOT_HELD = (LOAD_TIME.key(),)
"""Metrics not compared with the margin: a single load is mostly the disk and its cache."""

WORDS = {EQUIVALENT: "equivalent", DIFFERENT: "different", INCONCLUSIVE: "cannot tell"}


@dataclass(frozen=True)
class Finding:
    """One metric: both values, the ratio again ÷ original with its 90 % interval, and its state.

    `needed`: repetitions (processes, if several) of the reproduction that would tell, with the original as it is; else
    `needed_each` on both sides. Both are None if no sensible number would tell, or nothing needs to be told. Tests are
    None for a metric that a run has once.
    """

    key: str
    label: str
    original: float
    again: float
    ratio: float
    state: str
    low: float | None = None
    high: float | None = None
    p_within: float | None = None
    p_beyond: float | None = None
    needed: int | None = None
    needed_each: int | None = None


@dataclass(frozen=True)
class Reproduction:
    """Verdict (`equivalent`, `different`, `cannot_tell`, `invalid`), its sentence, the metrics behind it, and notes."""

    verdict: str
    why: str
    margin: float
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    rests_on: str = ""

    @property
    def exit_code(self) -> int:
        """Exit code: 0 equivalent, 1 different, 3 invalid, 4 cannot tell."""
        return EXIT_CODES[self.verdict]


def judge_reproduction(
    comparison: Comparison,
    margin: float = DEFAULT_MARGIN,
    quality: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
) -> Reproduction:
    """Judge from a comparison of the reproduction (B) with the original (A) if they are equivalent within `margin`.

    `margin` is a ratio; `quality` holds the metrics of original and reproduction that include quality.
    """
    held = [effect for effect in comparison.effects if effect.key not in NOT_HELD]
    limit = math.log1p(margin)
    tests = [tost(math.log(effect.ratio), effect.parts, limit) if effect.parts else None for effect in held]
    adjusted = iter(holm([test.p_beyond for test in tests if test]))
    findings = [
        _tested(effect, test, next(adjusted), limit, sum(map(bool, tests)), comparison.process_noise)
        if test
        else _single(effect.key, effect.entry.heading, effect.a, effect.b, limit)
        for effect, test in zip(held, tests, strict=True)
    ]
    findings += [
        _single(key, KEYS[key].label, quality[0][key], quality[1][key], limit)
        for key in (PERPLEXITY.key(), TOP1.key())
        if quality[0].get(key) and quality[1].get(key)
    ]
    verdict = _verdict(findings)
    return Reproduction(
        verdict,
        _why(verdict, findings, margin, comparison),
        margin,
        tuple(findings),
        tuple(_notes(comparison)),
        units_text(comparison),
    )


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def _single(key: str, label: str, original: float, again: float, limit: float) -> Finding:
    """Finding of a metric without a test: inside or outside by its value; cannot tell if it has too few values."""
    ratio = again / original if original > 0 else math.inf
    inside = 0 < ratio < math.inf and abs(math.log(ratio)) <= limit
    if key not in KEYS or KEYS[key].section in ("latency", "throughput"):
        return Finding(key, label, original, again, ratio, INCONCLUSIVE)
    return Finding(key, label, original, again, ratio, EQUIVALENT if inside else DIFFERENT)


def _tested(
    effect: Effect,
    test: Equivalence,
    p_beyond: float,
    limit: float,
    tests: int,
    noises: tuple[ProcessNoise | None, ProcessNoise | None],
) -> Finding:
    state = EQUIVALENT if test.p_within < SIGNIFICANCE else DIFFERENT if p_beyond < SIGNIFICANCE else INCONCLUSIVE
    found = Finding(
        effect.key,
        effect.entry.heading,
        effect.a,
        effect.b,
        effect.ratio,
        state,
        math.exp(test.low),
        math.exp(test.high),
        test.p_within,
        p_beyond,
    )
    if state != INCONCLUSIVE:
        return found
    spread = variance(_logs(effect.values_a)), variance(_logs(effect.values_b))
    if any(noises):  # of one process: further repetitions of it do not help, further processes do
        each = [
            own / len(values) + noise.spread(effect.key).variance if noise else own
            for own, values, noise in zip(spread, (effect.values_a, effect.values_b), noises, strict=True)
        ]
        return dataclasses.replace(
            found, needed_each=required_sample_size(test.difference, limit, (each[0], each[1]), tests=tests)
        )
    needed = required_sample_size(test.difference, limit, spread, len(effect.values_a), tests)
    return dataclasses.replace(
        found,
        needed=needed,
        needed_each=None if needed else required_sample_size(test.difference, limit, spread, tests=tests),
    )


def _verdict(findings: Sequence[Finding]) -> str:
    states = {finding.state for finding in findings}
    return DIFFERENT if DIFFERENT in states else INCONCLUSIVE if INCONCLUSIVE in states or not states else EQUIVALENT


def _why(verdict: str, findings: Sequence[Finding], margin: float, comparison: Comparison) -> str:
    """The verdict as a sentence with its numbers."""
    within = f"±{100 * margin:.3g} %"
    if verdict == EQUIVALENT:
        return f"Equivalent within {within} in all of {len(findings)} metrics."
    if verdict == DIFFERENT:
        listed = ", ".join(
            f"{f.label or f.key} {f.ratio:.3f} times the original's" for f in findings if f.state == DIFFERENT
        )
        return f"Different by more than {within}: {listed}."
    inconclusive = [f for f in findings if f.state == INCONCLUSIVE]
    if not findings or any(f.p_within is None for f in inconclusive):
        return (
            f"Cannot tell whether it is equivalent within {within}: a test needs at least 2 repetitions on each side."
        )
    names = ", ".join(f.label for f in inconclusive)
    told = f"Cannot tell whether it is equivalent within {within} in {names}."
    if any(comparison.process_noise):
        return f"{told} {_advice_on_processes(inconclusive, comparison)}"
    noun = "processes" if max(comparison.processes) > 1 else "repetitions"
    return f"{told} {_advice(inconclusive, noun)}"


def _advice_on_processes(inconclusive: Sequence[Finding], comparison: Comparison) -> str:
    """Number of processes that would tell, where a result of one process was compared."""
    if not all(f.needed_each for f in inconclusive):
        return _advice(inconclusive, "processes")
    most = max(f.needed_each or 0 for f in inconclusive)
    calibrate = (
        f" The noise between processes is assumed: `{command_text('calibrate')}` measures that of this machine."
        if any(noise and noise.source == ASSUMPTION for noise in comparison.process_noise)
        else ""
    )
    return (
        f"One process may differ from the next; about {most} processes on each side would tell, with a chance of "
        f"90 %.{calibrate}"
    )


def _advice(inconclusive: Sequence[Finding], noun: str) -> str:
    """Number of repetitions that would tell, if the observed values are the true ones."""
    if all(f.needed for f in inconclusive):
        return (
            f"About {max(f.needed or 0 for f in inconclusive)} {noun} of the reproduction would tell, with a chance of "
            "90 % if the observed ratios are the true ones."
        )
    if all(f.needed or f.needed_each for f in inconclusive):
        most = max(max(f.needed or 0, f.needed_each or 0) for f in inconclusive)
        return (
            f"The original is too uncertain for any number of {noun} here; about {most} on each side would tell, with "
            "a chance of 90 %."
        )
    return (
        f"The observed ratio is so near to the margin that no sensible number of {noun} would tell. Give another "
        "margin."
    )


def _notes(comparison: Comparison) -> list[str]:
    """Sentences on what weakens the answer: unlike environments, verdicts other than valid, noise of processes."""
    unlike = _listed(comparison.labels)
    found = [f"The environment differs from the original's: {unlike}."] if unlike else []
    found += [f"The verdict on {doubt}." for doubt in comparison.doubts]
    return found + noise_sentences(comparison)


def _listed(unlike: Sequence[Difference]) -> str:
    return ", ".join(str(difference) for difference in unlike if difference.kind != "verdict")


def changed_facts(original: RunResult, again: RunResult) -> str:
    """Changed facts of the loaded model (`quant.kernel a → b`), as a sentence; empty if none."""
    facts = [dict(result.load.facts) if result.load else {} for result in (original, again)]
    changed = [
        f"{name} {facts[0].get(name, 'none')} → {facts[1].get(name, 'none')}"
        for name in sorted({*facts[0], *facts[1]})
        if facts[0].get(name) != facts[1].get(name)
    ]
    if process_count(original) != process_count(again):
        changed.append(f"processes {process_count(original)} → {process_count(again)}")
    return f"What was loaded differs: {', '.join(changed)}." if changed else ""
