"""Measure from Python: one configuration or a sweep, in this process or behind a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config.parameter_types import OnlineParameters, RunParameters
from ..config.signatures import with_parameters
from ..config.spec import COMMANDS
from ..records.backends import SERVER_BACKEND
from ..records.invocation import DEPLOYMENT
from ..reports.sweep_result import SweepResult
from ..sweeps.progress import ProgressListener, listening

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_parameters(RunParameters, COMMANDS["run"])
def run(
    *,
    progress: bool | ProgressListener | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    **parameters: Unpack[RunParameters],
) -> SweepResult:
    """Measure one configuration, or a sweep if a parameter has several values: a list, or a text with commas.

        result = run(model="opt-125m", weights="random", quant="int8,int4", batch_size=[1, 4])
        result.best("throughput")

    Parameters have the names, values and defaults of `llmbench run`, which are also those of `mlflow run`. Each
    configuration becomes an MLflow run in `experiment` (default: llmbench) of the store `tracking_uri` (default:
    MLFLOW_TRACKING_URI, or a SQLite file here). `progress`: True shows it, False does not, None shows it in notebooks;
    a `ProgressListener` of your own hears of it.

    Raises LlmbenchError, with a message of one line, for an error found before anything is measured. A cell that fails
    later is a row of the result with its outcome.
    """
    return _measure(progress, tracking_uri, experiment, dict(parameters))


@with_parameters(OnlineParameters, COMMANDS["online"])
def online(
    *,
    progress: bool | ProgressListener | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    **parameters: Unpack[OnlineParameters],
) -> SweepResult:
    """Measure a model behind an OpenAI-compatible server: one that runs (`url`), or that is started (`launch`).

        online(url="http://127.0.0.1:8000", model="my-model", concurrency=[1, 8])

    A deployment on this machine is `url="deployments:/NAME"`. The other arguments, the result and the errors are those
    of `run`.
    """
    given: dict[str, object] = {"backend": SERVER_BACKEND, **parameters}
    if isinstance(url := given.get("url"), str) and url.startswith(DEPLOYMENT):
        from .deployments import address_of

        given["url"] = address_of(url)
    return _measure(progress, tracking_uri, experiment, given)


def _measure(
    progress: bool | ProgressListener | None,
    tracking_uri: str | None,
    experiment: str | None,
    parameters: dict[str, object],
) -> SweepResult:
    from ..sweeps import sweep

    with listening(progress) as listener:
        return sweep.run(tracking_uri=tracking_uri, experiment=experiment, watcher=listener, **parameters)
