"""Commands about this machine: models and doctor."""

from __future__ import annotations

from .options import ONLY_JSON, Option, command
from .output import print_json


@command(
    "models",
    "list the model presets and which of them fit on this machine",
    ONLY_JSON,
    description="List the model presets and which of them fit on this machine.",
)
def models(json: bool) -> int:
    """Print the presets."""
    from ..reports import presets
    from ..workflows import doctor

    memory = doctor.memory_here()
    if json:
        print_json(presets.models_json(*memory), ensure_ascii=True)
    else:
        print(presets.models_table(*memory))
    return 0


@command(
    "doctor",
    "report what this machine and environment can do, and what is missing",
    ONLY_JSON,
    Option(
        "--worker-python",
        "examine this Python interpreter for workers, instead of the current one",
        "PATH",
        optional=True,
    ),
    description="Report what this machine and environment can do, and what is missing.",
)
def doctor(json: bool, worker_python: str | None) -> int:
    """Print the report."""
    from ..records.codec import to_json
    from ..reports.doctor import format_items, format_report
    from ..workflows import doctor

    report = doctor.examine_worker(worker_python) if worker_python else doctor.examine()
    if json:
        print_json(to_json(report), ensure_ascii=True)
    else:
        print(format_items(report.items) if worker_python else format_report(report.items))
    return 0


COMMANDS = (models, doctor)
