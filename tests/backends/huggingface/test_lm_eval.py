"""Tasks of lm-eval on a tiny model: a local one that really runs, and unavailable ones."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.analysis import quality
from mlflow_llmbench.backends.huggingface import lm_eval
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import journal, quality_order
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, UsageError
from mlflow_llmbench.records.results import Quality, TaskScore
from mlflow_llmbench.sweeps import resume

from ...results import made

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Norway": "Oslo", "Peru": "Lima", "Egypt": "Cairo"}
FAST = {"prompt_tokens": "8", "output_tokens": "4", "warmup": "1", "repetitions": "5", "device": "cpu"}


@pytest.fixture
def task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a task of six questions with two choices each, and its data, in a folder of their own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    names = list(CAPITALS.values())
    rows = [
        {"question": f"The capital of {country} is", "choices": [capital, names[i - 1]], "answer": 0}
        for i, (country, capital) in enumerate(CAPITALS.items())
    ]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "capitals.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / "capitals.yaml").write_text(yaml.safe_dump(declared))
    return folder / "capitals.yaml"


# Figures


def test_a_score_has_the_interval_of_its_standard_error() -> None:
    scores = (
        TaskScore("arc easy", "acc", 0.95, 0.04, 30),
        TaskScore("gsm8k", "exact_match.strict-match", 0.5, 0.1, 25),
        TaskScore("wikitext", "word_perplexity", 20.0, None),
        TaskScore("all right", "acc", 1.0, 0.0, 6),
        TaskScore("mmlu_law", "acc", 0.3, 0.1, 9, part=True),
    )
    found = quality.figures(Quality(tasks=scores))
    assert found["quality/lm_eval/arc-easy/acc"] == 0.95
    assert found["quality/lm_eval/arc-easy/acc_ci_low"] == pytest.approx(0.95 - 1.96 * 0.04, abs=1e-4)
    assert found["quality/lm_eval/arc-easy/acc_ci_high"] == 1.0
    assert found["quality/lm_eval/gsm8k/exact_match.strict-match_ci_high"] == pytest.approx(0.696, abs=1e-3)
    assert found["quality/lm_eval/wikitext/word_perplexity_ci_low"] is None
    assert found["quality/lm_eval/all-right/acc_ci_low"] is None
    assert not [key for key in found if "mmlu_law" in key]


# Parameters


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"quality_tasks": "arc_easy,,x"}, "quality_tasks has an empty name: arc_easy,,x. Give names such as"),
        ({"quality_tasks": "arc_easy,mine.yaml"}, "There is no task file mine.yaml. Give quality_tasks a YAML file"),
        ({"quality_limit": "0"}, "quality_limit is too small: 0. The smallest is 1 or none."),
    ],
)
def test_wrong_parameters_are_one_line(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(parameters)
    assert str(caught.value).startswith(message)


def test_without_the_package_nothing_starts(monkeypatch: pytest.MonkeyPatch, store_uri: str) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        MissingError,
        match=r"quality_tasks needs the package lm_eval, which is not installed. "
        r"Run: pip install 'lm-eval>=0.4.9'",
    ):
        run(model="fake:", backend="fake", quality_tasks="arc_easy")


def test_a_result_without_the_tasks_that_are_asked_for_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine")
    asked = parse({"quality_tasks": str(tmp_path / "mine.yaml")})
    digest = quality_order.tasks_digest(asked.options)
    of_tasks = Quality(tasks_digest=digest, tasks=(TaskScore("mine", "acc", 0.5),))
    cases = [
        (None, False),
        (Quality(tasks_digest=digest), False),
        (of_tasks, True),
        (dataclasses.replace(of_tasks, tasks_digest="other"), False),
    ]
    for found, there in cases:
        result = dataclasses.replace(made(), cell=Cell(), quality=found)
        assert resume._quality_is_there(result, asked) is there
        assert resume._quality_is_there(result, parse({}))
    (tmp_path / "mine.yaml").write_text("task: mine\ntest_split: test")
    assert quality_order.tasks_digest(asked.options) != digest
    assert quality_order.tasks_digest(parse({}).options) == ""


# The harness itself


class Spoken:
    """A loaded tiny model, and the number of its calls by the harness."""

    def __init__(self, folder: Path) -> None:
        from mlflow_llmbench.backends.huggingface.backend import TransformersBackend

        cell = Cell(model=str(folder), device="cpu")
        self.backend = TransformersBackend(cell, TransformersBackend.resolve(cell))
        self.backend.load()
        self.calls: list[int] = []

    def run(self, *tasks: str, most: int | None = None) -> tuple[list[TaskScore], list[str]]:
        self.calls.clear()
        found = list(lm_eval.run_tasks(self.backend, tasks, most, self.calls.append))
        return [score for one in found for score in one.scores], [one.problem for one in found if one.problem]


@pytest.mark.filterwarnings("ignore::")  # the harness and its libraries are not ours
@pytest.mark.slow
def test_a_local_task_is_scored_as_by_hand_and_others_cost_it_nothing(tiny_model: Path, task_file: Path) -> None:
    pytest.importorskip("lm_eval")
    spoken = Spoken(tiny_model)
    scores, withheld = spoken.run("no_such_task", str(task_file), "arc_easy")
    [score] = scores
    assert (score.task, score.metric, score.documents, score.version, score.part) == (
        "capitals",
        "acc",
        6,
        "1.0",
        False,
    )
    right = by_hand(spoken.backend, task_file.with_name("capitals.jsonl"))
    assert score.value == pytest.approx(sum(right) / 6)
    share = sum(right) / 6
    assert score.stderr == pytest.approx(math.sqrt(share * (1 - share) / 5))
    missing, unreachable = withheld
    assert missing == (
        "The task no_such_task of lm-eval was not evaluated: there is no task of that name. "
        "Give a name that `lm-eval ls tasks` lists, or the path of a YAML file or of a folder with them."
    )
    assert unreachable.startswith("The task arc_easy of lm-eval was not evaluated: ") and "\n" not in unreachable
    assert spoken.calls == [*range(1, len(spoken.calls) + 1)] and len(spoken.calls) >= 6
    scores, withheld = spoken.run(str(task_file.parent), most=3)
    assert [(score.task, score.documents) for score in scores] == [("capitals", 3)]
    assert withheld == []


def by_hand(backend: Any, file: Path) -> list[bool]:
    """Return for each question if the right answer is the more probable one, token by token."""
    import torch

    found = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        context = len(backend.encode(row["question"]))
        sums = []
        for choice in row["choices"]:
            ids = list(backend.encode(f"{row['question']} {choice}"))
            logits = torch.log_softmax(backend.logits(ids[:-1], len(ids) - context), -1)
            sums.append(sum(float(logits[i, token]) for i, token in enumerate(ids[context:])))
        found.append(sums[0] > sums[1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_logs_the_scores_and_measures_as_without(tiny_model: Path, task_file: Path, store_uri: str) -> None:
    pytest.importorskip("lm_eval")
    done = run(model=str(tiny_model), quality_tasks=f"{task_file},no_such_task", **FAST)
    assert done.outcome == "ok"
    [result] = [journal.read_result(folder) for folder in done.folder.glob("*/artifacts")]
    assert result.quality and [score.task for score in result.quality.tasks] == ["capitals"]
    assert result.quality.scores is None and result.quality.divergence is None
    [withheld] = result.quality.withheld
    assert withheld.startswith("The task no_such_task of lm-eval was not evaluated: there is no task of that name.")
    logged = MlflowClient(store_uri).get_run(done.run_ids[0])
    assert logged.data.metrics["quality/lm_eval/capitals/acc"] == result.quality.tasks[0].value
    assert "no_such_task" in logged.data.tags["mlflow.note.content"]
    artifacts = next(done.folder.glob("*/artifacts"))
    assert yaml.safe_load((artifacts / "config.yaml").read_text())["quality_tasks"] == f"{task_file},no_such_task"
    assert (
        "Tasks of lm-eval, with the harness's own prompts and no chat template: capitals (6 documents)"
        in (artifacts / "report.md").read_text()
    )
