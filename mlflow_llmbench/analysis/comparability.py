"""Comparability of two results: differences that were not asked about, and results of one and the same measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records.cell import DRAWN, Cell
from ..records.environment import GPU_SOFTWARE, QUOTA, not_recorded, quota_text
from ..records.results import RunResult

ALLOWABLE = ("hardware", "software", "workload", "scenario", "schema", "verdict")
"""Kinds of differences that the guard refuses and `allow` can accept."""

STREAM = ("request_rate", "ramp_to", "arrival", "burstiness", "seed", "requests")
"""Parameters that set when the requests of an open loop come."""

ANSWERS = ("temperature", "ignore_eos", "thinking", "extra_body", "headers")
"""Parameters of requests that change what a server has to answer, or which one answers behind a router."""

MEASURED = ("cell", "hashes", "started_ms", "ended_ms", "first_call_ms", "memory", "repetitions")
"""Fields of a result that two measurements cannot have in common, all together."""


@dataclass(frozen=True)
class Difference:
    """Difference between two results: its kind (one of `ALLOWABLE`), its name, and both values as text."""

    kind: str
    name: str
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.name} {self.a} → {self.b}"


def same_evidence(a: RunResult, b: RunResult) -> bool:
    """Return True if two results are one measurement: the same run, loaded twice or reused by a later sweep.

    Two measurements never share their time stamps, which are nanoseconds of a clock that only goes on.
    """
    return bool(a.repetitions) and all(getattr(a, name) == getattr(b, name) for name in MEASURED)


def differences(a: RunResult, b: RunResult) -> list[Difference]:
    """Differences between two results that were not asked about: hardware, software, workload, scenario, schema.

    Hashes decide; the readable facts behind them explain. If no fact differs, the hashes are shown. A fact that an
    earlier version did not record is no difference, although the other result's hash includes it.
    """
    unknown = not_recorded(a.environment) | not_recorded(b.environment)
    described = {"hardware": _hardware, "software": _software, "workload": _workload}
    found: list[Difference] = []
    for kind, describe in described.items():
        hash_a, hash_b = getattr(a.hashes, kind), getattr(b.hashes, kind)
        if hash_a != hash_b:
            found += _unlike(kind, describe(a), describe(b), unknown) or (
                []
                if _explained(unknown, describe(a), describe(b))
                else [Difference(kind, f"{kind} hash", hash_a, hash_b)]
            )
    named = {difference.name for difference in found}
    found += [
        difference
        for difference in (*_streams(a.cell, b.cell), *_answers(a.cell, b.cell))
        if difference.name not in named
    ]
    for kind, word_a, word_b in (
        ("scenario", a.cell.scenario, b.cell.scenario),
        ("schema", str(a.schema), str(b.schema)),
    ):
        if word_a != word_b:
            found.append(Difference(kind, kind, word_a, word_b))
    return found


def _unlike(
    kind: str, facts_a: Mapping[str, str], facts_b: Mapping[str, str], unknown: Collection[str]
) -> list[Difference]:
    """Facts in which two results differ, without those that are unknown for one of them."""
    known = [name for name in dict.fromkeys([*facts_a, *facts_b]) if name not in unknown]
    readable = [Difference(kind, name, facts_a.get(name, "none"), facts_b.get(name, "none")) for name in known]
    return [difference for difference in readable if difference.a != difference.b]


def _explained(unknown: Collection[str], *facts: Mapping[str, str]) -> bool:
    """Return True if only one of two results has a fact, so that their hashes differ by it."""
    return any((name in facts[0]) != (name in facts[1]) for name in unknown)


def _streams(a: Cell, b: Cell) -> list[Difference]:
    """Differences between two open loops in the load put on the system: when their requests come.

    None between closed loops: their number of users is a choice, like a batch size. A trace has its times in
    `workload_hash`.
    """
    if a.scenario != b.scenario or a.trace or b.trace or not (a.open_loop or b.open_loop):
        return []
    return _unlike_settings(a, b, STREAM if a.open_loop and b.open_loop else STREAM[:1])


def _answers(a: Cell, b: Cell) -> list[Difference]:
    """Differences between the answers that two servers are asked for."""
    return _unlike_settings(a, b, ANSWERS) if a.scenario == b.scenario == "online" else []


def _unlike_settings(a: Cell, b: Cell, names: Sequence[str]) -> list[Difference]:
    pairs = [(name, value_text(name, getattr(a, name)), value_text(name, getattr(b, name))) for name in names]
    return [Difference("workload", name, first, second) for name, first, second in pairs if first != second]


def _gpu_text(gpu: Mapping[str, Any]) -> str:
    """Return name, memory and share of a GPU, as far as its driver told them."""
    told = (
        f"{gpu['memory_bytes'] / 1e9:.0f} GB" if gpu["memory_bytes"] else None,
        "MIG" if gpu.get("mig") else None,
        f"{gpu['multiprocessors']} multiprocessors" if gpu.get("multiprocessors") else None,
    )
    facts = ", ".join(filter(None, told))
    return f"{gpu['name']} ({facts})" if facts else str(gpu["name"])


def _hardware(result: RunResult) -> dict[str, str]:
    """Readable facts behind `hardware_hash`."""
    cpu: Mapping[str, Any] = result.environment.get("cpu") or {}
    total = (result.environment.get("memory") or {}).get("total_bytes")
    found: Sequence[Mapping[str, Any]] = result.environment.get("gpus") or []
    gpus = Counter(map(_gpu_text, found))
    facts = {
        "CPU": cpu.get("name"),
        "architecture": cpu.get("architecture"),
        "usable CPUs": cpu.get("usable_cpus"),
        "physical cores": cpu.get("physical_cores"),
        QUOTA: quota_text(result.environment),
        "memory": f"{round(total / 2**30)} GiB" if total else None,
        "GPU": " + ".join(f"{count} × {name}" if count > 1 else name for name, count in gpus.items()) or None,
    }
    return _stated(facts)


def _software(result: RunResult) -> dict[str, str]:
    """Readable facts behind `software_hash`."""
    environment = result.environment
    system: Mapping[str, Any] = environment.get("os") or {}
    facts = {
        **{name: environment.get(key) for key, name in GPU_SOFTWARE.items()},
        "OS": " ".join(filter(None, [system.get("system"), system.get("release")])) or None,
        "libc": system.get("libc"),
        "Python": environment.get("python"),
    }
    return _stated({**facts, **(environment.get("packages") or {})})


def _workload(result: RunResult) -> dict[str, str]:
    """Readable facts behind `workload_hash`; the texts themselves are not in the result."""
    facts: dict[str, Any] = {
        name: value_text(name, getattr(result.cell, name)) for name in ("workload", "prompt_tokens", "output_tokens")
    }
    if result.cell.prefix_tokens:
        facts["shared prefix"] = f"{result.cell.prefix_tokens} tokens, {result.cell.prefix_count} in all"
    facts["conversations"] = "as one prompt" if result.cell.history == "none" else "turn by turn"
    if result.cell.workload in DRAWN:
        size = (
            result.load.vocab_size
            if result.load and result.load.vocab_size
            else (result.model.config or {}).get("vocab_size")
        )
        facts |= {"seed": result.cell.seed, "vocabulary": f"{size} tokens" if size else None}
    return _stated(facts)


def _stated(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def value_text(name: str, value: object) -> str:
    """A parameter value as on the command line: `auto` for None, `true` and `false`, 5 for 5.0."""
    if value is None:
        return str(Cell.__dataclass_fields__[name].metadata["unset"])
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
