"""Commands about this machine: models and doctor."""

from __future__ import annotations

import argparse
import json

from ..config.spec import parse


def _models(given: argparse.Namespace) -> int:
    from ..reports import presets
    from ..system import gpu, memory

    devices = gpu.gpus()
    room = (memory.available_bytes(), devices[0]["memory_bytes"] if devices else None)
    print(json.dumps(presets.models_json(*room)) if given.json else presets.models_table(*room))
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from ..records.results import to_json
    from ..workflows import doctor

    if given.worker_python:
        python = str(parse({"worker_python": given.worker_python}).first.worker_python)
        report = doctor.examine_worker(python)
        print(json.dumps(to_json(report)) if given.json else doctor.format_items(report.items))
        return 0
    found = doctor.examine()
    print(json.dumps(to_json(found)) if given.json else doctor.format_report(found))
    return 0
