"""Executor on a Ray cluster: each load group is a Ray task, alone on a node. Ray does all the scheduling.

This is the only module that imports Ray. A node needs Python, Ray and what a worker needs, but no MLflow; the task
brings this package along. Results come back as journal files, a part whenever a cell ends, so that only unfinished
cells are lost with a node.

Resources that a task requests:

- one unit of `EXCLUSIVE_RESOURCE`, so that no node runs two of our tasks;
- all CPUs of the smallest node that fits, so that on identical nodes no other Ray job gets a core of the same node;
- a GPU, unless the device is the CPU;
- the predicted memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import PACKAGE_DIR
from ..config.choices import WORKLOADS
from ..measure.events import Event
from ..measure.group import measure_apart
from ..measure.journal import append_bytes, parse_events
from ..measure.outcome import GroupOutcome, replay
from ..measure.task import Task
from ..records.cell import Cell, Options
from ..records.errors import (
    JournalError,
    LlmbenchError,
    MeasurementError,
    MissingError,
    NodeLost,
    OutOfMemory,
    UsageError,
    first_line,
)
from ..records.installation import of_extra, pip_install
from ..system import machine
from ..system.estimate import AvailableMemory
from .executor import MachineFacts, NextCell, OnEvent, OnPause

EXCLUSIVE_RESOURCE = "node:__internal_implicit_resource_llmbench"
"""Resource that keeps our tasks on separate nodes.

Ray gives every node one unit of any resource with this prefix; Ray Serve spreads its replicas the same way.
"""

REACH_S = 5.0
"""Longest wait for a connection, in seconds; Ray itself would try for minutes."""

ANSWER_S = 120.0
"""Longest wait for the nodes to describe themselves, in seconds; each may first start a process and fetch this package.
"""

POLL_S = 1.0
"""Seconds between two polls for events of the nodes."""

WITHOUT_NODE_S = 600.0
"""Longest wait in seconds while no node of the cluster can take a task; Ray may bring a lost node back."""

STOP_S = 2.0
"""Longest wait for new events at each poll and at the end, in seconds."""


@dataclass(frozen=True)
class Node:
    """A node that is alive, and the resources that it offers to tasks. `memory` is in bytes."""

    id: str
    name: str
    cpus: float
    gpus: float
    memory: float


@dataclass
class Submission:
    """A task submitted to Ray: its requested resources, future result (`ref`), node, and the files received so far."""

    number: int
    task: Task
    cpus: float
    memory: int
    ref: Any = None
    node_id: str = ""  # empty until a node has begun
    received: dict[str, bytes] = field(default_factory=dict)  # path in the sweep's folder → bytes so far
    unschedulable_since: float | None = None  # monotonic seconds; since then no node could take it

    def so_far(self) -> GroupOutcome:
        """Return what has arrived, as the outcome of a killed worker."""
        path = self.task.folders[0] / "worker.jsonl"
        received = self.received.get(f"{path.parent.name}/{path.name}", b"")
        outcomes = [outcome for _, outcome in replay(parse_events(received, path))]
        return outcomes[-1] if outcomes else GroupOutcome()


def connect(options: Options, device: str, warn: Callable[[str], None]) -> RayExecutor:
    """Join the cluster that `options.on` names, and ask its nodes to describe themselves.

    Raises UsageError for a device that names one GPU or if Ray is connected already, MissingError if Ray is not
    installed or the cluster cannot be reached or used.
    """
    if device.startswith("cuda:"):
        raise UsageError(
            f"device={device} names a GPU of one machine, but on={options.on} has several machines. Give device=cuda."
        )
    try:
        import ray
    except ImportError:
        raise MissingError(
            f"on={options.on} needs Ray, which is not installed. Run: {pip_install(*of_extra('ray', 'ray[client]'))}"
        ) from None
    if ray.is_initialized():
        raise UsageError(
            "This program is connected to a Ray cluster already. Call ray.shutdown() first; on=ray connects by itself."
        )
    _join(ray, options.on)
    try:
        return RayExecutor(ray, options, device, warn)
    except BaseException:
        ray.shutdown()
        raise


def _join(ray: Any, on: str) -> None:
    address = os.environ.get("RAY_ADDRESS", "auto") if on == "ray" else on
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        with _signals_kept():
            ray.init(
                address=address,
                runtime_env={"py_modules": [str(PACKAGE_DIR)]},
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:
        known = address if address != "auto" else "of this machine"
        hint = (
            "ray://HOST:PORT is the address of the Ray Client server, by default port 10001, "
            "and needs 'ray[client]' on both sides."
            if address.startswith("ray://")
            else "Start one with `ray start --head`, name one by RAY_ADDRESS=HOST:PORT, or give on=ray://HOST:PORT."
        )
        raise MissingError(f"The Ray cluster {known} cannot be reached: {first_line(error)}. {hint}") from None


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore our SIGTERM handler, which Ray replaces: the first signal must interrupt and keep all results."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class RayExecutor:
    """Executor on a Ray cluster: as many tasks at once as it has nodes; the others wait in Ray's queue."""

    accepts_more = True

    def __init__(self, ray: Any, options: Options, device: str, warn: Callable[[str], None]) -> None:
        self.ray, self.options, self.warn = ray, options, warn
        self.submissions: list[Submission] = []
        self.submitted = self.events = 0  # numbers of submissions made and of events received
        self.node_of: dict[Cell, str] = {}  # measured cell → node; its further processes run on the same one
        alive = self._alive()
        self.on_gpu = device == "cuda" or (device == "auto" and any(one.gpus >= 1 for one in alive))
        self.nodes = self._fitting(1, 0, alive)
        if not self.nodes:
            what = "a GPU and a CPU" if self.on_gpu else "a CPU"
            raise MissingError(
                f"No node of the Ray cluster offers {what} to tasks (device={device}). "
                "Add one: ray start --address=HOST:PORT"
            )
        found = self._ask_nodes()
        self.git = machine.own_commit()
        self.machine = MachineFacts(
            {**found[0], "git": self.git},
            tuple(dict.fromkeys(one["hashes"]["env"] for one in found)),
            {} if options.force else {device: self._memory([gpu for one in found for gpu in one["gpus"]])},
            machine.known_peaks(),
        )
        self.queue = ray.remote(EventQueue).options(num_cpus=0, resources={"node:__internal_head__": 0.001}).remote()
        own = ray.get_runtime_context().get_node_id()
        if any(one.id == own for one in self.nodes):
            warn(
                f"This command runs, or is served, on the node {self._name(own)}, which also measures and may be "
                "disturbed. Start Ray there with --num-cpus=0."
            )
        self.prints = ray._private.worker.print_to_stdstream
        ray._private.worker.print_to_stdstream = _say_nothing

    def _alive(self) -> list[Node]:
        found = []
        for one in self.ray.nodes():
            has, given = one["Resources"], one.get("NodeName")  # the address, unless started with --node-name
            name = given if given and given != one["NodeManagerAddress"] else one["NodeManagerHostname"]
            if one["Alive"]:
                found.append(Node(one["NodeID"], name, has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0)))
        return found

    def _fitting(self, cpus: float, memory: int, alive: Sequence[Node]) -> list[Node]:
        return [one for one in alive if one.cpus >= cpus and one.gpus >= self.on_gpu and one.memory >= memory]

    def _ask_nodes(self) -> list[dict[str, Any]]:
        """Return the fingerprints of the nodes that answer.

        Raises MissingError if a node cannot run this package, or if none answers.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = self.ray.remote(_describe)
        asked = {
            ask.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(one.id, soft=False)
            ).remote(self.on_gpu): one
            for one in self.nodes
        }
        answered, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        found = []
        for ref in answered:
            try:
                found.append(self.ray.get(ref))
            except self.ray.exceptions.RayError as error:
                if isinstance(problem := self._error(asked[ref].name, error), NodeLost):
                    continue
                raise MissingError(
                    f"{problem} Every node needs Python, Ray and the packages that pip install mlflow-llmbench brings "
                    "(MLflow is not needed)."
                ) from None
        if not found:
            raise MissingError(f"No node of the Ray cluster has answered within {ANSWER_S:g} s. Look at `ray status`.")
        return found

    def _memory(self, gpus: Sequence[Mapping[str, Any]]) -> AvailableMemory:
        """Return the total memory of the largest node or GPU; free memory is known only once a task runs there."""
        if self.on_gpu:
            known = [size for gpu in gpus if (size := gpu["memory_bytes"]) is not None]
            return max(known, default=None), "are on the largest GPU of the cluster"
        largest, limit = int(max(one.memory for one in self.nodes)), self.options.memory_limit
        if limit is not None and limit < largest:
            return limit, "are allowed by memory_limit"
        return largest, "are what the largest node of the cluster lets tasks have"

    @property
    def busy(self) -> bool:
        """True if there are tasks that have not ended."""
        return bool(self.submissions)

    def submit(self, task: Task, next_cell: NextCell | None = None) -> None:
        """Submit a task to Ray, split by the nodes on which its cells were measured before.

        A worker on another machine cannot ask for a next cell; `check_cluster` has refused such a search.
        """
        assert next_cell is None
        nodes = [self.node_of.get(cell) for cell in task.cells]
        for node in dict.fromkeys(nodes):
            self._launch(task.part([number for number, own in enumerate(nodes) if own == node]), node)

    def _launch(self, task: Task, home: str | None) -> None:
        """Submit a task, preferably to the node `home`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        memory = 0 if self.on_gpu or self.options.force else max(size or 0 for size in task.predicted_bytes)
        nodes = self._fitting(1, memory, self._alive()) or self.nodes
        submission = Submission(self.submitted, task, min(one.cpus for one in nodes), memory)
        names = {one.id: one.name for one in nodes}
        texts = {
            cell.workload: Path(cell.workload).read_bytes() for cell in task.cells if cell.workload not in WORKLOADS
        }
        remote = self.ray.remote(_on_node).options(
            num_cpus=submission.cpus,
            num_gpus=int(self.on_gpu),
            memory=memory or None,
            resources={EXCLUSIVE_RESOURCE: 1},
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(home, soft=True) if home else "DEFAULT",
            name=f"llmbench {task.names[0]}",
        )
        submission.ref = remote.remote(task, texts, self.git, names, submission.number, self.queue)
        self.submissions.append(submission)
        self.submitted += 1

    def wait(self, on_event: OnEvent, on_pause: OnPause) -> tuple[Task, GroupOutcome]:
        """Pass the nodes' events to `on_event` until a task has ended. Returns that task and its outcome.

        Its worker does not wait between cells: its answer would have to come from another machine.
        """
        while True:
            with _connected():
                ended, _ = self.ray.wait([one.ref for one in self.submissions], timeout=POLL_S)
            self._receive(on_event)
            if not any(one.node_id for one in self.submissions):
                ended += self._cancel_unschedulable()
            submission = next((one for one in self.submissions if one.ref in ended), None)
            if submission:
                outcome = self._outcome(submission)
                self.submissions.remove(submission)
                for number in outcome.measured:
                    self.node_of.setdefault(submission.task.cells[number], submission.node_id)
                return submission.task, outcome

    def _outcome(self, submission: Submission) -> GroupOutcome:
        if submission.unschedulable_since is not None:
            message = (
                f"No node of the cluster could take it for {WITHOUT_NODE_S:g} s. "
                "Look at `ray status`, and run it again."
            )
            return GroupOutcome(error=MeasurementError(message))
        try:
            with _connected():
                outcome, files = self.ray.get(submission.ref)
        except self.ray.exceptions.RayError as error:
            return dataclasses.replace(submission.so_far(), error=self._error(self._name(submission.node_id), error))
        self._keep(
            submission, {path: content[len(submission.received.get(path, b"")) :] for path, content in files.items()}
        )
        assert isinstance(outcome, GroupOutcome)
        return outcome

    def _receive(self, on_event: OnEvent | None) -> None:
        """Receive the nodes' new events. Those that do not arrive within `STOP_S` arrive at the next call."""
        try:
            with _connected():
                received = self.ray.get(self.queue.after.remote(self.events), timeout=STOP_S)
        except self.ray.exceptions.RayError:
            return
        by_number = {submission.number: submission for submission in self.submissions}
        for number, node_id, event, files in received:
            self.events += 1
            if number in by_number:
                by_number[number].node_id = node_id
                self._keep(by_number[number], files)
                if on_event:
                    on_event(by_number[number].task, dataclasses.replace(event, node=self._name(node_id)))

    def _keep(self, submission: Submission, files: Mapping[str, bytes]) -> None:
        for path, more in files.items():
            submission.received[path] = submission.received.get(path, b"") + more
            try:
                append_bytes(submission.task.folders[0].parent / path, more)
            except JournalError as error:
                self.warn(str(error))

    def _cancel_unschedulable(self) -> list[Any]:
        """Cancel tasks that no node could take for `WITHOUT_NODE_S`, and return their refs; Ray would wait forever.

        Called only while no task is being measured.
        """
        over, now = [], time.monotonic()
        with _connected():
            alive = self._alive()
        for submission in self.submissions:
            if self._fitting(submission.cpus, submission.memory, alive):
                submission.unschedulable_since = None
            elif submission.unschedulable_since is None:
                submission.unschedulable_since = now
                self.warn(
                    f"{submission.task.names[0]}: no node of the cluster can take it now. "
                    f"Waiting up to {WITHOUT_NODE_S:g} s for one."
                )
            elif now - submission.unschedulable_since > WITHOUT_NODE_S:
                self._cancel(submission)
                over.append(submission.ref)
        return over

    def _name(self, node_id: str) -> str:
        return next((one.name for one in self.nodes if one.id == node_id), node_id[:8])

    def _error(self, name: str, error: Exception) -> LlmbenchError:
        kinds = self.ray.exceptions
        if isinstance(error, kinds.OutOfMemoryError):
            return OutOfMemory(
                f"Ray ended the task because the memory of {name} ran out. Try a smaller batch_size or quantization."
            )
        if isinstance(error, kinds.RayTaskError):
            return MeasurementError(
                f"The task failed on {name}: {type(error.cause).__name__}: {first_line(error.cause)}."
            )
        if isinstance(error, (kinds.RuntimeEnvSetupError, kinds.TaskCancelledError)):
            return MeasurementError(f"Ray did not run the task on {name}: {first_line(error)}.")
        return NodeLost(f"The node {name} is lost ({type(error).__name__}).")

    def _cancel(self, submission: Submission) -> None:
        """End a task, its process and the worker. If Ray is gone, they are gone too, and errors are ignored."""
        with contextlib.suppress(Exception):
            self.ray.cancel(submission.ref, force=True)

    def withdraw(self) -> list[Task]:
        """Withdraw the tasks that wait in Ray's queue."""
        waiting = [one for one in self.submissions if not one.node_id]
        for submission in waiting:
            self._cancel(submission)
            self.submissions.remove(submission)
        return [submission.task for submission in waiting]

    def stop(self) -> list[tuple[Task, GroupOutcome]]:
        """End all tasks. Returns those that had not ended, each with the outcome received so far."""
        for submission in self.submissions:
            self._cancel(submission)
        with contextlib.suppress(Exception):
            self._receive(None)
        left, self.submissions = self.submissions, []
        return [(one.task, one.so_far()) for one in left]

    def close(self) -> None:
        """Leave the cluster. Ray then ends everything that this program ran there."""
        with contextlib.suppress(Exception):
            self.ray.shutdown()
        self.ray._private.worker.print_to_stdstream = self.prints


def _say_nothing(*_: Any, **__: Any) -> None:
    """Print nothing: Ray writes dozens of lines about a lost node to standard output; we report it in one line."""


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Turn a broken Ray Client connection into a MeasurementError of one line, which ends the sweep.

    Other connections do not break without ending this process.
    """
    try:
        yield
    except ConnectionError as error:
        raise MeasurementError(
            f"The connection to the Ray cluster is lost: {first_line(error)} The results received so far are kept. "
            "Run the same command again to measure the rest."
        ) from None


class EventQueue:
    """Actor on the head node that keeps the nodes' events, in order, until they have been received."""

    def __init__(self) -> None:
        self.first, self.events = 0, list[Any]()

    def put(self, *event: Any) -> None:
        """Keep an event, with its submission, its node and the files that came with it."""
        self.events.append(event)

    def after(self, known: int) -> list[Any]:
        """Return the events after the first `known` ones, which have been received and are deleted."""
        del self.events[: known - self.first]
        self.first = known
        return self.events


def _describe(on_gpu: bool) -> dict[str, Any]:
    """On a node: return its fingerprint as one of our tasks sees it, with one GPU if `on_gpu`."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    try:
        return machine.environment()
    finally:
        if on_gpu and before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(before)


def _on_node(
    task: Task, texts: Mapping[str, bytes], git: str | None, names: Mapping[str, str], number: int, queue: Any
) -> tuple[GroupOutcome, dict[str, bytes]]:
    """On a node: measure a task, and post its events and files to the command's queue."""
    import ray

    node_id = str(ray.get_runtime_context().get_node_id())

    def post(event: Event, files: Mapping[str, bytes]) -> None:
        queue.put.remote(number, node_id, event, dict(files))

    return measure_apart(task, texts, {"git": git, "node": names.get(node_id, node_id[:8])}, post)
