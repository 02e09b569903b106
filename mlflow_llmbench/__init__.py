"""mlflow-llmbench: honest benchmarks of quantized language models, each one an MLflow run.

    from mlflow_llmbench import compare, recommend, run

    result = run(model="opt-125m", weights="random", quant="int8,int4", batch_size=[1, 4])
    print(result.table())
    best = recommend(result).found.winner

Importing the package loads nothing heavy: torch, transformers and mlflow are imported when something runs.
`mlflow_llmbench.callback.measure` measures a generate function of your own. `load_results`, `summarize`, `judge` and
`compare` are how results are read, summed up, judged and compared; they are stable, and need no MLflow store.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .records.errors import LlmbenchError

if TYPE_CHECKING:
    from .analysis.summary import summarize
    from .analysis.verdict import judge
    from .tracking.load_results import load_results
    from .workflows.calibrate import calibrate
    from .workflows.compare import compare
    from .workflows.gate import gate
    from .workflows.recommend import recommend
    from .workflows.reproduce import reproduce
    from .workflows.run import online, run
    from .workflows.scaling import scaling
    from .workflows.tune import tune
    from .workflows.versions import export, promote, register

__version__ = "0.1.0"
PACKAGE_DIR = Path(__file__).resolve().parent
"""Folder of this package; its parent goes on a worker's PYTHONPATH."""

__all__ = [
    "LlmbenchError",
    "__version__",
    "calibrate",
    "compare",
    "export",
    "gate",
    "judge",
    "load_results",
    "online",
    "promote",
    "recommend",
    "register",
    "reproduce",
    "run",
    "scaling",
    "summarize",
    "tune",
]

_MODULES = {
    "judge": "analysis.verdict",
    "load_results": "tracking.load_results",
    "summarize": "analysis.summary",
    "export": "workflows.versions",
    "online": "workflows.run",
    "promote": "workflows.versions",
    "register": "workflows.versions",
    **{
        name: f"workflows.{name}"
        for name in ("calibrate", "compare", "gate", "recommend", "reproduce", "run", "scaling", "tune")
    },
}
"""Public function → its module, which is imported when the name is used first."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
