"""Check of a verdict that rests on the values that were computed: logits that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

from ..records.results import Reason, RunResult

ADVICE = "Use quant=bf16 or fp32 if it overflows in 16-bit floats, else another checkpoint."


def logits(result: RunResult, metrics: dict[str, float]) -> Iterator[Reason]:
    """Check that the model computed numbers: at the timed shape, and on the texts of the quality evaluation."""
    seen = result.logits
    if seen and seen.nonfinite:
        weights = f" The weights {', '.join(seen.weights)} are not finite themselves." if seen.weights else ""
        since = f", from output token {seen.first_token} on" if seen.first_token else ""
        yield Reason(
            "nonfinite_logits",
            f"{seen.nonfinite} of {seen.checked} logits of the timed shape were NaN or infinite{since} (limit 0): "
            f"the tokens mean nothing, and other values can take another time.{weights} {ADVICE}",
        )
    elif result.quality and result.quality.nonfinite:
        yield Reason(
            "nonfinite_logits", f"In the evaluation of the quality (limit 0): {result.quality.nonfinite} {ADVICE}"
        )
