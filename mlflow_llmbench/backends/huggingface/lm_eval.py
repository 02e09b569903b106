"""Tasks of EleutherAI's lm-evaluation-harness on the loaded model, by name or from a YAML file or folder.

The only module that imports lm_eval. Prompts, few-shot examples, metrics and their standard errors are the harness's
own. No chat template is applied.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...records.errors import MissingError, first_line
from ...records.installation import of_extra, pip_install
from ...records.results import TaskScore
from ..base import Backend, HarnessBackend

Progress = Callable[[int], None]
"""Called with the number of a model call, from 1, before it."""


def require() -> None:
    """Raise MissingError unless the harness is installed; does not import it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingError(
            "quality_tasks needs the package lm_eval, which is not installed. "
            f"Run: {pip_install(*of_extra('lm-eval', 'lm-eval'))}"
        )


@dataclass(frozen=True)
class TaskOutcome:
    """The scores of a task, or the problem, as a sentence, because of which it has none."""

    task: str
    scores: tuple[TaskScore, ...] = ()
    problem: str = ""


def run_tasks(backend: Backend, tasks: Sequence[str], most: int | None, progress: Progress) -> Iterator[TaskOutcome]:
    """Run each task on the loaded model, with at most `most` of its documents, and yield its outcome.

    A folder stands for all tasks in it. After a task that fails, also by an error of the harness, its data sets or the
    network, the others still run.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [task for task in tasks if Path(task).is_dir()]
    try:
        manager = TaskManager(include_path=folders or None)
        model = _wrapped(backend, progress)
        names = [name for task in tasks for name in (_names(task, manager) if task in folders else [task])]
    except Exception as error:
        yield TaskOutcome("", problem=_problem("lm-eval", error))
        return
    for name in names:
        try:
            yield TaskOutcome(name, _run(model, name, manager, most))
        except Exception as error:
            yield TaskOutcome(name, problem=_problem(f"The task {name} of lm-eval", error))


def _problem(what: str, error: Exception) -> str:
    """Return the sentence, on one line, for an error because of which something was not evaluated."""
    if isinstance(error, MemoryError):
        return f"{what} was not evaluated: memory ran out."
    why = first_line(error).rstrip(".")
    advice = "Data sets are downloaded once: check the network, or give the YAML file of a task whose data is here."
    if isinstance(error, KeyError):
        why, advice = (
            "there is no task of that name",
            "Give a name that `lm-eval ls tasks` lists, or the path of a YAML file or of a folder with them.",
        )
    return f"{what} was not evaluated: {why}. {advice}"


def _wrapped(backend: Backend, progress: Progress) -> Any:
    """Wrap the loaded model for the harness; `progress` gets the number of each call of it."""
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):  # type: ignore[misc]
        calls = 0

        def _model_call(self, *arguments: Any, **keywords: Any) -> Any:
            self.count()
            return super()._model_call(*arguments, **keywords)

        def _model_generate(self, *arguments: Any, **keywords: Any) -> Any:
            self.count()
            return super()._model_generate(*arguments, **keywords)

        def count(self) -> None:
            self.calls += 1
            progress(self.calls)

    loaded, tokenizer = cast(HarnessBackend, backend).language_model()
    return Counted(pretrained=loaded, tokenizer=tokenizer, backend="causal", batch_size=1)


def _names(folder: str, manager: Any) -> list[str]:
    """Return the tasks and groups that the YAML files of a folder declare, sorted."""
    root = Path(folder).resolve()
    return sorted(
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path and root in Path(entry.yaml_path).resolve().parents
    )


def _run(model: Any, name: str, manager: Any, most: int | None) -> tuple[TaskScore, ...]:
    """Return the scores of a task, or of a group with all its tasks."""
    from lm_eval import simple_evaluate

    found: Mapping[str, Any] = simple_evaluate(
        model=model, tasks=[name], task_manager=manager, limit=most, log_samples=False, bootstrap_iters=1000
    )
    counts, versions = found.get("n-samples") or {}, found.get("versions") or {}
    whole = any(isinstance(value, float) for value in (found.get("groups") or {}).get(name, {}).values())
    scores = []
    for task, figures in {**found["results"], **(found.get("groups") or {})}.items():
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if (
                metric.endswith("_stderr")
                or isinstance(value, str | bool)
                or not isinstance(value, int | float)
                or not chosen
            ):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            scores.append(
                TaskScore(
                    task,
                    metric if chosen == "none" else f"{metric}.{chosen}",
                    float(value),
                    float(error) if isinstance(error, int | float) else None,
                    (counts.get(task) or {}).get("effective"),
                    str(versions.get(task, "")),
                    whole and task != name,
                )
            )
    return tuple(scores)
