"""Executor on a Ray cluster: each group is a Ray task, alone on a node. Ray does all the scheduling.

This is the only module that imports Ray. A node needs Python, Ray and what a worker needs, but no MLflow; the task
brings this package along. Results come back as journal files, a part whenever a cell ends, so that only unfinished
cells are lost with a node.

Resources that a task requests:

- one unit of `ALONE`, so that no node runs two of our tasks;
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
from ..system import machine
from .executor import Group, Tell
from .local_executor import task_of

ALONE = "node:__internal_implicit_resource_llmbench"
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
"""Longest wait in seconds while no node of the cluster can take a group; Ray may bring a lost node back."""

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
class Flight:
    """A group submitted to Ray: its requested resources, future result (`ref`), node, and the files received so far."""

    number: int
    group: Group
    cpus: float
    memory: int
    ref: Any = None
    node_id: str = ""  # empty until a node has begun
    received: dict[str, bytes] = field(default_factory=dict)  # path in the sweep's folder → bytes so far
    homeless_since: float | None = None  # monotonic seconds; since then no node could take it

    def so_far(self) -> GroupOutcome:
        """Return what has arrived, as the outcome of a killed worker."""
        path = self.group[0].folder / "worker.jsonl"
        received = self.received.get(f"{path.parent.name}/{path.name}", b"")
        outcomes = [outcome for _, outcome in replay(parse_events(received, path))]
        return outcomes[-1] if outcomes else GroupOutcome()


def connect(options: Options, device: str, warn: Callable[[str], None]) -> Cluster:
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
            f"on={options.on} needs Ray, which is not installed. Run: pip install 'mlflow-llmbench[ray]'"
        ) from None
    if ray.is_initialized():
        raise UsageError(
            "This program is connected to a Ray cluster already. Call ray.shutdown() first; on=ray connects by itself."
        )
    _join(ray, options.on)
    try:
        return Cluster(ray, options, device, warn)
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


class Cluster:
    """Executor (`Place`) on a Ray cluster: as many groups at once as it has nodes; the others wait in Ray's queue."""

    takes_more = True

    def __init__(self, ray: Any, options: Options, device: str, warn: Callable[[str], None]) -> None:
        self.ray, self.options, self.warn = ray, options, warn
        self.flights: list[Flight] = []
        self.given = self.letters = 0  # numbers of groups given and of letters read
        self.homes: dict[Cell, str] = {}  # measured cell → node; its further processes run on the same one
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
        self.git = machine.git_commit(str(PACKAGE_DIR))
        self.environment: Mapping[str, Any] = {**found[0], "git": self.git}
        self.env_hashes: Sequence[str] = tuple(dict.fromkeys(one["hashes"]["env"] for one in found))
        self.gpu_bytes = [gpu["memory_bytes"] for one in found for gpu in one["gpus"]]
        self.mailbox = ray.remote(Mailbox).options(num_cpus=0, resources={"node:__internal_head__": 0.001}).remote()
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

    def room(self, device: str) -> tuple[int | None, str]:
        """Return the total bytes of the largest node or GPU; free memory is known only once a group runs there."""
        if self.on_gpu:
            return max(self.gpu_bytes, default=None), "are on the largest GPU of the cluster"
        largest, limit = int(max(one.memory for one in self.nodes)), self.options.memory_limit
        if limit is not None and limit < largest:
            return limit, "are allowed by memory_limit"
        return largest, "are what the largest node of the cluster lets tasks have"

    @property
    def busy(self) -> bool:
        """True if there are groups that have not ended."""
        return bool(self.flights)

    def give(self, group: Group) -> None:
        """Submit a group to Ray, split by the nodes on which its cells were measured before."""
        for home in dict.fromkeys(self.homes.get(job.cell) for job in group):
            self._launch([job for job in group if self.homes.get(job.cell) == home], home)

    def _launch(self, group: Group, home: str | None) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        memory = 0 if self.on_gpu or self.options.force else max(job.predicted or 0 for job in group)
        nodes = self._fitting(1, memory, self._alive()) or self.nodes
        flight = Flight(self.given, group, min(one.cpus for one in nodes), memory)
        names = {one.id: one.name for one in nodes}
        texts = {
            job.cell.workload: Path(job.cell.workload).read_bytes()
            for job in group
            if job.cell.workload not in WORKLOADS
        }
        task = self.ray.remote(_on_node).options(
            num_cpus=flight.cpus,
            num_gpus=int(self.on_gpu),
            memory=memory or None,
            resources={ALONE: 1},
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(home, soft=True) if home else "DEFAULT",
            name=f"llmbench {group[0].name}",
        )
        flight.ref = task.remote(
            task_of(group, self.options, prepare=True), texts, self.git, names, flight.number, self.mailbox
        )
        self.flights.append(flight)
        self.given += 1

    def wait(self, tell: Tell) -> tuple[Group, GroupOutcome]:
        """Pass the nodes' events to `tell` until one of the groups has ended. Returns that group and its outcome."""
        while True:
            with _connected():
                ended, _ = self.ray.wait([flight.ref for flight in self.flights], timeout=POLL_S)
            self._read_letters(tell)
            if not any(flight.node_id for flight in self.flights):
                ended += self._homeless()
            flight = next((one for one in self.flights if one.ref in ended), None)
            if flight:
                outcome = self._land(flight)
                self.flights.remove(flight)
                for number in outcome.measured:
                    self.homes.setdefault(flight.group[number].cell, flight.node_id)
                return flight.group, outcome

    def _land(self, flight: Flight) -> GroupOutcome:
        if flight.homeless_since is not None:
            message = (
                f"No node of the cluster could take it for {WITHOUT_NODE_S:g} s. "
                "Look at `ray status`, and run it again."
            )
            return GroupOutcome(error=MeasurementError(message))
        try:
            with _connected():
                outcome, files = self.ray.get(flight.ref)
        except self.ray.exceptions.RayError as error:
            return dataclasses.replace(flight.so_far(), error=self._error(self._name(flight.node_id), error))
        self._keep(flight, {path: content[len(flight.received.get(path, b"")) :] for path, content in files.items()})
        assert isinstance(outcome, GroupOutcome)
        return outcome

    def _read_letters(self, tell: Tell | None) -> None:
        """Fetch the nodes' new events (letters). Those that do not arrive within `STOP_S` arrive at the next call."""
        try:
            with _connected():
                letters = self.ray.get(self.mailbox.take.remote(self.letters), timeout=STOP_S)
        except self.ray.exceptions.RayError:
            return
        by_number = {flight.number: flight for flight in self.flights}
        for number, node_id, event, files in letters:
            self.letters += 1
            if number in by_number:
                by_number[number].node_id = node_id
                self._keep(by_number[number], files)
                if tell:
                    tell(by_number[number].group, dataclasses.replace(event, node=self._name(node_id)))

    def _keep(self, flight: Flight, files: Mapping[str, bytes]) -> None:
        for path, more in files.items():
            flight.received[path] = flight.received.get(path, b"") + more
            try:
                append_bytes(flight.group[0].folder.parent / path, more)
            except JournalError as error:
                self.warn(str(error))

    def _homeless(self) -> list[Any]:
        """Cancel groups that no node could take for `WITHOUT_NODE_S`, and return their refs; Ray would wait forever.

        Called only while no group is being measured.
        """
        over, now = [], time.monotonic()
        with _connected():
            alive = self._alive()
        for flight in self.flights:
            if self._fitting(flight.cpus, flight.memory, alive):
                flight.homeless_since = None
            elif flight.homeless_since is None:
                flight.homeless_since = now
                self.warn(
                    f"{flight.group[0].name}: no node of the cluster can take it now. "
                    f"Waiting up to {WITHOUT_NODE_S:g} s for one."
                )
            elif now - flight.homeless_since > WITHOUT_NODE_S:
                self._cancel(flight)
                over.append(flight.ref)
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

    def _cancel(self, flight: Flight) -> None:
        """End a task, its process and the worker. If Ray is gone, they are gone too, and errors are ignored."""
        with contextlib.suppress(Exception):
            self.ray.cancel(flight.ref, force=True)

    def recall(self) -> list[Group]:
        """Take back the groups that wait in Ray's queue."""
        waiting = [flight for flight in self.flights if not flight.node_id]
        for flight in waiting:
            self._cancel(flight)
            self.flights.remove(flight)
        return [flight.group for flight in waiting]

    def stop(self) -> list[tuple[Group, GroupOutcome]]:
        """End all tasks. Returns the groups that had not ended, each with the outcome received so far."""
        for flight in self.flights:
            self._cancel(flight)
        with contextlib.suppress(Exception):
            self._read_letters(None)
        left, self.flights = self.flights, []
        return [(flight.group, flight.so_far()) for flight in left]

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


class Mailbox:
    """Actor on the head node that keeps the nodes' events (letters), in order, until they have been received."""

    def __init__(self) -> None:
        self.first, self.letters = 0, list[Any]()

    def put(self, *letter: Any) -> None:
        """Keep a letter."""
        self.letters.append(letter)

    def take(self, known: int) -> list[Any]:
        """Return the letters after the first `known` ones, which have been received and are deleted."""
        del self.letters[: known - self.first]
        self.first = known
        return self.letters


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
    task: Task, texts: Mapping[str, bytes], git: str | None, names: Mapping[str, str], number: int, mailbox: Any
) -> tuple[GroupOutcome, dict[str, bytes]]:
    """On a node: measure a group, and post its events and files to the command's mailbox."""
    import ray

    node_id = str(ray.get_runtime_context().get_node_id())

    def post(event: Event, files: Mapping[str, bytes]) -> None:
        mailbox.put.remote(number, node_id, event, dict(files))

    return measure_apart(task, texts, {"git": git, "node": names.get(node_id, node_id[:8])}, post)
