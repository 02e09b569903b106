"""Quantization-aware training as an MLflow run: train in a worker, then measure lost and recovered quality.

Quality is measured on text that was not trained on. The resulting checkpoint is measured like any other model:
`llmbench run --model FOLDER --quant int4-wo`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.summary import Point
from ..backends.base import backend_class
from ..config.spec import BenchSpec
from ..config.training import NAMES, QUANT, TRAINING, Training, as_text, parse_training
from ..measure import quality_order, supervise
from ..measure.events import CheckpointSaved, Event, QualityWithheld, Stage, TrainingPlanned, TrainingStep
from ..measure.journal import new_sweep, write_bytes, write_json, write_text
from ..measure.outcome import GroupOutcome
from ..measure.supervise import Limits
from ..measure.task import Task, WorkerJob
from ..records.cell import Cell, Options
from ..records.codec import to_json
from ..records.errors import LlmbenchError, UsageError, first_line
from ..records.metrics import TRAINING_LOSS
from ..records.quantizations import COLOURS
from ..records.redaction import redact
from ..records.results import ModelFacts, Quality, hash16
from ..reports.qat import TRAINED, UNQUANTIZED, UNTRAINED, Trained, quality_table, training_figures, training_markdown
from ..sweeps.executor import MachineFacts
from ..sweeps.planning import Plan, plan
from ..system import estimate, machine
from ..tracking import runs
from ..tracking.run_context import fingerprint_tags
from ..tracking.store import Store, open_store
from ..workloads.training_texts import Texts, read_texts

Say = Callable[[str], None]

SETTINGS = tuple(name for name in NAMES if name in TRAINING or name in Cell.__dataclass_fields__)
"""Parameters that affect the result."""

LINES = 20
"""About how many progress lines are written for all training steps."""


def train_quantized(
    values: Mapping[str, object],
    *,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    say: Say = lambda line: None,
) -> Trained:
    """Train a model for int4-wo, measure it beside the unquantized and the untrained model, and log everything.

    `values` are parameters by name. A failure or interruption after the training has begun is recorded in the result,
    and the run ends FAILED or KILLED. Before that, raises UsageError, ModelError, MissingError or TrackingError.
    """
    cell, options, training = parse_training(values)
    texts = read_texts(training)
    planned = plan_evaluation([dataclasses.replace(cell, quant="none"), cell], options)
    checkpoint = _new_folder(training.output) if training.output else None
    store = open_store(tracking_uri, experiment)
    folder = new_sweep(options.output_dir)
    job = _Job(cell, options, training, texts, planned, folder, checkpoint or folder / "checkpoint", store, say)
    job.asked = {name: str(value) for name, value in values.items()} if store.given_run_id else {}
    return job.run()


def plan_evaluation(cells: Sequence[Cell], options: Options, machine: MachineFacts | None = None) -> Plan:
    """Plan the evaluation of cells of one model: resolve it, and raise MissingError if a package is missing.

    Text is scored in windows that fit the model, so a short context is no reason to refuse: lengths are set to 1.
    """
    short = [dataclasses.replace(cell, prompt_tokens=1, output_tokens=1) for cell in cells]
    planned = plan(BenchSpec.of(short, options), machine)
    planned.require_packages()
    return planned


def _new_folder(text: str) -> Path:
    """Return the absolute path for a new checkpoint. Raises UsageError if it exists and is not an empty folder."""
    folder = Path(os.path.expanduser(text)).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"output={text} exists already. Name a new folder, so that no checkpoint is overwritten.")
    return folder


@dataclasses.dataclass
class _Job:
    """State of one training: its inputs, and its results so far."""

    cell: Cell
    options: Options
    training: Training
    texts: Texts
    planned: Plan  # of the unquantized and the untrained model
    folder: Path
    checkpoint: Path
    store: Store
    say: Say
    asked: Mapping[str, str] = dataclasses.field(default_factory=dict)  # params as `mlflow run` logged them
    run_id: str | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    losses: list[Point] = dataclasses.field(default_factory=list)
    saved: bool = False
    qualities: dict[str, Quality] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> ModelFacts:
        """The model that is trained."""
        return self.planned.cells[1].model

    @property
    def environment(self) -> Mapping[str, Any]:
        """Fingerprint of this machine."""
        return self.planned.machine.environment

    @property
    def limits(self) -> Limits:
        """Limits of a worker: bytes of host memory, and the name of that limit."""
        most, called = estimate.memory_limit(self.options.memory_limit)
        return Limits(memory_bytes=None if self.options.force else most, memory_limit=called)

    def run(self) -> Trained:
        """Train, measure and log. The run is ended whatever happens."""
        outcome, message = "error", ""
        try:
            self._prepare()
            self._train()
            self._measure()
            outcome = "ok"
        except KeyboardInterrupt:
            outcome, message = "interrupted", "Interrupted." + ("" if self.saved else " No checkpoint was written.")
        except LlmbenchError as error:
            if self.run_id is None:
                raise
            message = str(error)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
            done = self._result(outcome, message)
            self._keep(done)
        return done

    @property
    def _scratch(self) -> Path:
        """Temporary folder of an unfinished checkpoint, beside its final path so that it can be renamed."""
        return self.checkpoint.with_name(f".{self.checkpoint.name}-{self.folder.name}")

    def _prepare(self) -> None:
        """Download the model's files, and write the training and held-out text for the worker."""
        write_bytes(self.folder / "training.txt", self.texts.training.encode())
        write_bytes(self.folder / "held_out.txt", self.texts.held_out.encode())
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        if not backend_class(self.cell.backend).is_prepared(self.cell, self.model):
            self.say("Preparing the files.")
            self._work("prepare", self.cell, self.model)

    def _train(self) -> None:
        training = self.training
        recipe = {
            "base": self.model.name,
            "base_revision": self.model.revision,
            "data": redact(self.texts.name),
            "data_hash": self.texts.digest,
            "quant": QUANT,
            "group_size": self.cell.group_size,
            "seed": self.cell.seed,
            "steps": training.steps,
            "batch_size": training.batch_size,
            "sequence_tokens": training.sequence_tokens,
            "learning_rate": training.learning_rate,
            "loss": training.loss,
            "freeze_embeddings": as_text("freeze_embeddings", training.freeze_embeddings),
            "torch": machine.packages().get("torch", ""),
            "torchao": machine.packages().get("torchao", ""),
        }
        order = {
            "training": to_json(training),
            "learned": str(self.folder / "training.txt"),
            "held_out": str(self.folder / "held_out.txt"),
            "room": self.planned.machine.memory.get(self.cell.device, (None, "")),
            "scratch": str(self._scratch),
            "folder": str(self.checkpoint),
            "recipe": recipe,
        }
        self._work("train", self.cell, self.model, training=order)

    def _measure(self) -> None:
        """Measure the quality of all three models on the held-out text and on continuations of its passages."""
        base = dataclasses.replace(self.cell, quant="none")
        options = dataclasses.replace(self.options, quality="auto", quality_text=str(self.folder / "held_out.txt"))
        plain = self.planned.cells[0].model
        trained = dataclasses.replace(self.cell, model=str(self.checkpoint), revision="main")
        self.say("Measuring quality on the held-out text.")
        order = quality_order.order(
            Task((base,), plain, (self.folder / UNQUANTIZED,), options), self._show, self.environment, self.limits
        )
        if order is None:  # a backend without logits
            return
        for name, cell, model in (
            (UNQUANTIZED, base, plain),
            (UNTRAINED, self.cell, self.model),
            (TRAINED, trained, plan_evaluation([trained], self.options, self.planned.machine).cells[0].model),
        ):
            outcome = self._work(
                "evaluate", cell, model, name, quality=dataclasses.replace(order, is_reference=name == UNQUANTIZED)
            )
            self.qualities[name] = quality_order.quality_of(options, cell, outcome) or Quality()

    def _work(self, task: str, cell: Cell, model: ModelFacts, name: str = "", **orders: Any) -> GroupOutcome:
        """Run one task in a worker. Raises its error, or KeyboardInterrupt if it was interrupted."""
        folder = self.folder / (name or task)
        job = WorkerJob(task, (cell,), model, (folder,), **orders)
        outcome = supervise.run_worker(job, folder / "worker.log", self._show, self.limits)
        if outcome.interrupted:
            raise KeyboardInterrupt
        if outcome.error:
            raise outcome.error
        return outcome

    def _show(self, event: Event) -> None:
        """Handle an event of a worker; the MLflow run begins with the training."""
        match event:
            case TrainingPlanned():
                names = ("trained", "frozen", "layers", "needed", "sequences")
                self.counts = {name: getattr(event, name) for name in names}
                self._begin()
            case Stage(stage="reference"):
                self.say("Computing the unquantized reference.")
            case Stage(stage="saving"):
                self.say("Writing the checkpoint.")
            case TrainingStep(number=number, limit=limit, loss=loss):
                self.losses.append(Point(TRAINING_LOSS.key, number, loss, int(time.time() * 1000)))
                if number in (1, limit) or number % max(limit // LINES, 1) == 0:
                    self.say(f"Step {number}/{limit}: loss {loss:.4f}")
            case CheckpointSaved():
                self.saved = True
            case QualityWithheld(message=message):
                self.say(message)

    def _begin(self) -> None:
        counts, training = self.counts, self.training
        frozen = (
            "the embeddings and the output head stay as they are" if training.freeze_embeddings else "nothing is frozen"
        )
        self.say(
            f"Training {counts['trained']:,} parameters of {self.cell.model} in float32, with {counts['layers']} "
            f"linear layers rounded as by {QUANT}; {frozen} ({counts['frozen']:,} parameters). It needs about "
            f"{counts['needed'] / 1e9:.1f} GB of memory, and sees {counts['sequences']:,} sequences "
            f"{training.steps * training.batch_size / counts['sequences']:.2g} times each."
        )
        name = f"qat {Path(self.cell.model).name} {QUANT}"
        self.run_id = runs.begin_run(self.store, name, {"qat": self.folder.name})

    # Result and logging

    def _result(self, outcome: str, message: str) -> Trained:
        return Trained(
            self.cell,
            self.training,
            self.texts.digest,
            outcome,
            message,
            str(self.folder),
            str(self.checkpoint) if self.saved else None,
            self.run_id,
            self.counts,
            tuple(point.value for point in self.losses),
            self.qualities,
        )

    def _keep(self, done: Trained) -> None:
        """Write the result to the disk, then log it and end the run. The files remain if logging fails."""
        files = self.folder / "artifacts"
        write_json(files / "qat.json", {**to_json(done), "base": self.model.identity, "data": self.texts.name})
        write_text(files / "report.md", training_markdown(done))
        write_json(files / "tables" / "quality.json", quality_table(done))
        write_json(files / "environment.json", self.environment)
        if self.run_id is None:
            return
        try:
            self._log(done, self.run_id, files)
        except Exception as error:  # an error of the store must not lose hours of training
            self.say(f"Not logged: {first_line(error)}. The result is in {files}.")
        finally:
            with contextlib.suppress(Exception):
                runs.end_run(self.store, self.run_id, done.outcome)

    def _log(self, done: Trained, run_id: str, files: Path) -> None:
        """Log params, tags, datasets, metrics and artifacts."""
        now = int(time.time() * 1000)
        figures = [Point(key, 0, value, now) for key, value in training_figures(done).items()]
        runs.log_values(self.store, run_id, {**self._params(), **self.asked}, [*self.losses, *figures])
        for context, text in (("training", self.texts.training), ("evaluation", self.texts.held_out)):
            name = self.texts.name if context == "training" else f"{self.texts.name}, held out"
            runs.log_dataset(
                self.store, run_id, name, hash16(text), self.training.data, context, {"characters": len(text)}
            )
        runs.log_tags(self.store, run_id, self._tags(done))
        runs.log_folder(self.store, run_id, files, "")
        runs.set_tags(self.store, run_id, {"uploaded": "true"})  # last, so that an incomplete upload can be recognised

    def _params(self) -> dict[str, str]:
        known = {
            name: as_text(name, getattr(self.training if name in TRAINING else self.cell, name)) for name in SETTINGS
        }
        counts = {f"qat.{name}": str(count) for name, count in self.counts.items()}
        return {
            **known,
            "quant": QUANT,
            "model.revision": self.model.revision,
            "qat.data_hash": self.texts.digest,
            "qat.dtype": "float32",
            **counts,
        }

    def _tags(self, done: Trained) -> dict[str, str]:
        from .. import __version__

        gpus = self.environment.get("gpus") or []
        device = machine.require_device(self.cell.device)
        used = gpus[int(device.partition(":")[2] or 0)] if device.startswith("cuda") and gpus else None
        ours = {**fingerprint_tags(self.environment, used), "version": __version__, "qat_checkpoint": done.checkpoint}
        found = {f"llmbench.{name}": str(value) for name, value in ours.items() if value}
        return found | {"mlflow.runColor": COLOURS[QUANT], "mlflow.note.content": training_markdown(done)}
