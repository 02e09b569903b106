"""mlflow-llmbench: honest benchmarks of quantized language models, each one an MLflow run.

    from mlflow_llmbench import run

    result = run(model="opt-125m", weights="random", quant="int8,int4", batch_size=[1, 4])
    print(result.table())

Importing the package loads nothing heavy: torch, transformers and mlflow are imported when something runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import LlmbenchError

if TYPE_CHECKING:
    from .sweep import SweepResult

__version__ = "0.1.0"

__all__ = ["LlmbenchError", "__version__", "run"]


def run(**parameters: Any) -> SweepResult:
    """Measure one configuration, or a sweep; see `mlflow_llmbench.sweep.run` for the parameters and errors."""
    from . import sweep

    return sweep.run(**parameters)
