"""Gate: compare a candidate with the champion, metric by metric: pass, regression, not comparable or invalid.

A metric of every repetition regresses if it is worse beyond chance (p below 0.05 after Holm over the tested metrics, in
`compare`) and by more than its limit. A metric that a run has once (memory, quality, load) regresses if it is worse by
more than its limit. If the limit lies inside the interval and the difference is not shown, the metric passes as *not
settled*; so does a metric of a single repetition within its limit. A limit for a metric that was not measured stops the
gate: the metric would pass unseen. Different software is noted and does not stop the gate, since it is often what a
gate checks; different hardware or another workload does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...records.calibration import Calibration
from ...records.errors import UsageError
from ...records.metric import Gated
from ...records.metrics import KEYS, PERPLEXITY, by_name, shown_in
from ...records.results import RunResult, Verdict
from ...records.text import known_words
from ..comparability import Difference, differences, same_evidence
from ..comparison import (
    BETTER,
    COMPARED,
    DEVICE_PEAK,
    HOST_PEAK,
    SIGNIFICANCE,
    Comparison,
    Effect,
    advice,
    compare,
    noise_sentences,
)
from ..summary import summarize
from ..verdict import judge

PASS, REGRESSION, NOT_COMPARABLE, INVALID = "pass", "regression", "not_comparable", "invalid"
EXIT_CODES = {PASS: 0, REGRESSION: 1, NOT_COMPARABLE: 2, INVALID: 3}
OK, IMPROVED, REGRESSED, UNSETTLED = "ok", "improved", "regression", "not settled"
DEFAULT_LIMIT = 0.05
"""Default limit: how much worse a metric may be, as a ratio (5 %)."""

GATED = {entry.key: entry for entry in shown_in(Gated)}
"""Key of a metric that the gate checks → its entry."""

NAMES = {name: name if len(entries) > 1 else entries[0].key for name, entries in by_name(Gated).items()}
"""Name in a limit → the metric that it limits; `memory` is the device's peak, else the host's."""

SINGLE = tuple(key for key in GATED if key not in {entry.key for entry in COMPARED})
"""Checked metrics that `compare` does not compare: a run has them once, and they are compared by their value."""


@dataclass(frozen=True)
class Check:
    """Check of one metric. `a` is the champion's value, `b` the candidate's.

    `worse`: by which share of `a` it is worse (0.1 = 10 %, negative = better). A value of 0 has no share: `worse` and
    `limit` are then in `unit`.
    """

    key: str
    a: float
    b: float
    worse: float
    limit: float
    state: str
    low: float | None = None  # 95 % interval of the ratio b ÷ a
    high: float | None = None
    p_holm: float | None = None
    unit: str = ""

    def worse_text(self) -> str:
        """`worse` with its sign: `+6.2%`, or `+0.0187 nats`."""
        return f"{self.worse:+.4g} {self.unit}" if self.unit else f"{self.worse:+.1%}"

    def limit_text(self) -> str:
        """The limit as given: `5.0%`, or `0.05 nats`."""
        return f"{self.limit:g} {self.unit}" if self.unit else f"{self.limit:.1%}"


@dataclass(frozen=True)
class Gate:
    """Gate result: verdict (`pass`, `regression`, `not_comparable`, `invalid`), its reason, and its checks."""

    verdict: str
    why: str
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """Exit code: 0 pass, 1 regression, 2 not comparable, 3 invalid."""
        return EXIT_CODES[self.verdict]


def parse_limits(text: str) -> dict[str, float]:
    """Parse `ttft=10%,memory=0.02` into key → ratio. Raises UsageError for an unknown name or an invalid number."""
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, amount = part.partition("=")
        key = NAMES.get(name, name)
        if key not in NAMES.values():
            raise UsageError(f"Unknown metric in --limit: {name}. {known_words(name, NAMES)}")
        found[key] = parse_ratio(f"--limit {name}", amount)
    return found


def parse_ratio(option: str, text: str) -> float:
    """Parse `5%` or `0.05` into 0.05. Raises UsageError if it is not a finite ratio of at least 0."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if not 0 <= value < math.inf:
            raise ValueError
    except ValueError:
        raise UsageError(f"{option} is not a ratio: {text}. Give for example 5% or 0.05.") from None
    return value


def decide(
    champion: RunResult,
    candidate: RunResult,
    limits: Mapping[str, float] | None = None,
    *,
    limit: float = DEFAULT_LIMIT,
    noise: float = 0.01,
    accept_suspect: str | None = None,
    in_turns: bool = False,
    calibrations: Sequence[Calibration] = (),
) -> Gate:
    """Compare a candidate with the champion. It never raises for measured results: the verdict says what is wrong.

    `limits` are ratios by metric, `limit` is that of all others. `in_turns`: both were measured now, process by process
    in turns, so they are compared in pairs, and neither was accepted before. `calibrations` are as in `compare`.
    """
    metrics = summarize(champion), summarize(candidate)
    verdicts = judge(champion, metrics[0]), judge(candidate, metrics[1])
    for name, result, verdict in (("champion", champion, verdicts[0]), ("candidate", candidate, verdicts[1])):
        if why := _untrusted(name, result, verdict, accept_suspect, known=name == "champion" and not in_turns):
            return Gate(INVALID, why)
    unlike = differences(champion, candidate)
    if refused := _refused(unlike, ("software",)) or _refused_metrics(champion, candidate, metrics):
        return refused
    if same_evidence(champion, candidate):
        return Gate(
            NOT_COMPARABLE,
            "Both sides are the same evidence: the candidate's run is the champion's, so nothing could differ. Measure "
            "the candidate again and gate that run, or measure both in turns with --measure.",
        )
    comparison = compare(
        champion,
        candidate,
        noise=noise,
        allow=frozenset(["software"]),
        paired=in_turns,
        called=("the champion", "the candidate"),
        calibrations=calibrations,
    )
    checks = (*_timed(comparison, limits or {}, limit), *single_checks(*metrics, limits or {}, limit))
    if unheld := [name for name in limits or {} if name not in {_limited_as(check.key) for check in checks}]:
        listed = ", ".join(unheld)
        return Gate(
            NOT_COMPARABLE,
            f"A limit is given for {listed}, and not both runs have it. Measure both with it, or leave the limit out.",
        )
    notes = tuple(_notes(unlike, verdicts, checks, comparison))
    if worse := [check for check in checks if check.state == REGRESSED]:
        listed = ", ".join(
            f"{check.key} is {check.worse_text().lstrip('+')} worse (limit {check.limit_text()})" for check in worse
        )
        return Gate(REGRESSION, f"The candidate is worse than the champion: {listed}.", checks, notes)
    open_ = sum(check.state == UNSETTLED for check in checks)
    why = (
        f"No regression is shown in {len(checks)} metrics, of which {open_} are not settled."
        if open_
        else f"The candidate is not worse than the champion in any of {len(checks)} metrics beyond their limits."
    )
    return Gate(PASS, why, checks, notes)


def _refused_metrics(
    champion: RunResult, candidate: RunResult, metrics: tuple[Mapping[str, float], Mapping[str, float]]
) -> Gate | None:
    """The gate of a candidate whose perplexity is of another text, or that lacks metrics of the champion."""
    if quality_text(champion) != quality_text(candidate) and all(PERPLEXITY.key() in found for found in metrics):
        return Gate(
            NOT_COMPARABLE,
            "The perplexities are of two texts. Measure the candidate with the quality_text of the champion.",
        )
    if lacking := missing(*metrics):
        listed = ", ".join(lacking)
        return Gate(
            NOT_COMPARABLE,
            f"The candidate lacks metrics of the champion: {listed}. Measure the candidate like the champion.",
        )
    return None


def _notes(
    unlike: Sequence[Difference], verdicts: tuple[Verdict, Verdict], checks: Sequence[Check], comparison: Comparison
) -> Iterator[str]:
    """Yield what the reader of a verdict has to know: other software, suspect results, checks that are not settled."""
    if unlike:
        yield f"The software differs: {_listed(unlike)}."
    for name, verdict in zip(("champion", "candidate"), verdicts, strict=True):
        if verdict.word == "suspect":
            yield f"The verdict on the {name} is suspect ({_codes(verdict)})."
    if unsettled := [check.key for check in checks if check.state == UNSETTLED]:
        yield (
            f"Not settled, since they may be worse by more than their limits, or not: {', '.join(unsettled)}. "
            f"{_remedy(comparison)}"
        )
    yield from noise_sentences(comparison)


def _remedy(comparison: Comparison) -> str:
    """Sentence on how to settle a check: where processes may differ by more than was seen, more of them."""
    if any(comparison.process_noise) and all(effect.p_value is not None for effect in _repeated(comparison)):
        return f"{advice(comparison)} `--measure` of the gate does the second."
    return "Measure more repetitions."


def _repeated(comparison: Comparison) -> list[Effect]:
    return [effect for effect in comparison.effects if effect.is_repeated]


def refuse_unlike_work(champion: RunResult, candidate: RunResult) -> Gate | None:
    """The gate of two results that would stay incomparable if both were measured again here; None if they would not."""
    return _refused(differences(champion, candidate), ("software", "hardware"))


def _refused(unlike: list[Difference], allowed: tuple[str, ...]) -> Gate | None:
    refused = [difference for difference in unlike if difference.kind not in allowed]
    if not refused:
        return None
    return Gate(
        NOT_COMPARABLE,
        f"The champion and the candidate were not measured alike: {_listed(refused)}. Measure both on one machine, in "
        "one way.",
    )


def _untrusted(name: str, result: RunResult, verdict: Verdict, accept_suspect: str | None, known: bool) -> str | None:
    """Return why a result cannot be used, or None. `known`: a suspect champion was accepted at its registration."""
    if result.failure:
        return (
            f"The {name} has no result: it ended with {result.outcome} at stage {result.failure.stage}. Measure it "
            "again."
        )
    if verdict.word == "invalid":
        return f"The {name} is invalid ({_codes(verdict)}). Measure it again."
    if verdict.word == "suspect" and not known and not accept_suspect:
        return f'The {name} is suspect ({_codes(verdict)}). Measure it again, or add --accept-suspect "REASON".'
    return None


def _codes(verdict: Verdict) -> str:
    return ", ".join(reason.code for reason in verdict.reasons)


def _listed(unlike: Sequence[Difference]) -> str:
    return ", ".join(map(str, unlike))


def missing(champion: Mapping[str, float], candidate: Mapping[str, float]) -> list[str]:
    """Quality and device memory metrics that the candidate lacks: what was not measured has not passed."""
    return [key for key in (DEVICE_PEAK, *SINGLE) if key in champion and key not in candidate]


def quality_text(result: RunResult) -> str:
    """Digest of the text of a result's perplexity; empty if there is none."""
    return result.quality.text_digest if result.quality else ""


def _timed(comparison: Comparison, limits: Mapping[str, float], limit: float) -> list[Check]:
    """Checks of the metrics of `compare`, each with its limit."""
    found = []
    for effect in comparison.effects:
        key = effect.key
        if key not in GATED or (GATED[key].place.only_if_limited and key not in limits):
            continue
        if key == HOST_PEAK and comparison.effect(DEVICE_PEAK):
            continue
        allowed = limits.get(_limited_as(key), limit)
        higher = KEYS[key].better == "higher"
        worse = _loss(effect.ratio, higher)
        shown = effect.p_holm is None or effect.p_holm < SIGNIFICANCE
        if shown and worse > allowed:
            state = REGRESSED
        elif effect.p_holm is None:
            state = UNSETTLED if effect.is_repeated else OK
        else:
            end = effect.low if higher else effect.high
            farthest = 0.0 if end is None else _loss(end, higher)
            state = (
                IMPROVED
                if effect.effect == BETTER
                else UNSETTLED
                if farthest > allowed and not (shown and worse > 0)
                else OK
            )
        found.append(Check(key, effect.a, effect.b, worse, allowed, state, effect.low, effect.high, effect.p_holm))
    return found


def _limited_as(key: str) -> str:
    """Name under which a limit for a metric is given."""
    return NAMES[GATED[key].name]


def single_checks(
    champion: Mapping[str, float], candidate: Mapping[str, float], limits: Mapping[str, float], limit: float
) -> list[Check]:
    """Checks of the metrics in `SINGLE` that the champion has.

    A champion that is the reference itself has a divergence of 0, which has no ratio: the candidate's value is then
    compared with its limit in nats, and without a limit any divergence is a regression.
    """
    found = []
    for key in SINGLE:
        if key not in champion:
            continue
        a, b, higher = champion[key], candidate[key], KEYS[key].better == "higher"
        unit = KEYS[key].unit if a <= 0 and not higher else ""
        allowed = limits.get(key, 0.0 if unit else limit)
        worse = b - a if unit else _loss(b / a, higher) if a > 0 else 0.0
        found.append(Check(key, a, b, worse, allowed, REGRESSED if worse > allowed else OK, unit=unit))
    return found


def _loss(ratio: float, higher: bool) -> float:
    """Convert a ratio b ÷ a to how much b is worse: 0.9 gives 0.1 if higher is better, −0.1 if lower is better."""
    return 1 - ratio if higher else ratio - 1
