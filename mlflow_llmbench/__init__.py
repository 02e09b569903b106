"""mlflow-llmbench: honest benchmarks of quantized language models, each one an MLflow run.

    from mlflow_llmbench import run

    result = run(model="opt-125m", weights="random", quant="int8,int4", batch_size=[1, 4])
    print(result.table())

Importing the package loads nothing heavy: torch, transformers and mlflow are imported when something runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records.errors import LlmbenchError

if TYPE_CHECKING:
    from .sweeps.sweep import SweepResult

__version__ = "0.1.0"
PACKAGE_DIR = Path(__file__).resolve().parent
"""Folder of this package; its parent goes on a worker's PYTHONPATH."""

__all__ = ["LlmbenchError", "__version__", "run"]


def run(**parameters: Any) -> SweepResult:
    """Measure one configuration, or a sweep; see `mlflow_llmbench.sweeps.sweep.run` for the parameters and errors."""
    from .sweeps import sweep

    return sweep.run(**parameters)
