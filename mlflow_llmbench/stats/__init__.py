"""Statistics over plain lists of numbers: no I/O, no state.

The unit of inference is the process or the repetition (`repetitions.inference_units`), never the token: tokens of one
request are correlated, and pooling them gives 95 % intervals that cover the truth 35–50 % of the time.
"""

from .bootstrap import block_bootstrap_interval, block_length, bootstrap_interval
from .descriptive import (
    classify_outliers,
    coefficient_of_variation,
    is_steady,
    mad,
    percentile,
    supports,
    t_interval,
    t_quantile_975,
)
from .inference import (
    RankTest,
    Trend,
    equivalence,
    holm,
    mann_whitney,
    pair_differences,
    paired,
    required_sample_size,
    trend,
    welch,
)
from .sequence import (
    LEAST_CORRELATED,
    Finding,
    autocorrelation,
    effective_size,
    is_correlated,
    judge_sequence,
    sequence_interval,
)
from .variance import Equivalence, MeanDifference, Part, mean_part, t_test, tost

__all__ = [
    "LEAST_CORRELATED",
    "Equivalence",
    "Finding",
    "MeanDifference",
    "Part",
    "RankTest",
    "Trend",
    "autocorrelation",
    "block_bootstrap_interval",
    "block_length",
    "bootstrap_interval",
    "classify_outliers",
    "coefficient_of_variation",
    "effective_size",
    "equivalence",
    "holm",
    "is_correlated",
    "is_steady",
    "judge_sequence",
    "mad",
    "mann_whitney",
    "mean_part",
    "pair_differences",
    "paired",
    "percentile",
    "required_sample_size",
    "sequence_interval",
    "supports",
    "t_interval",
    "t_quantile_975",
    "t_test",
    "tost",
    "trend",
    "welch",
]
