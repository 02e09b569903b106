"""Print on the terminal: one line of JSON, and warnings of versions."""

from __future__ import annotations

import json
import sys


def print_json(data: object, ensure_ascii: bool = False) -> None:
    """Print data as one line of JSON."""
    print(json.dumps(data, ensure_ascii=ensure_ascii))


def print_version_warnings() -> None:
    """Print a line on stderr for each package that is older than its oldest safe version."""
    from ..backends.packages import warnings_of_versions

    for line in warnings_of_versions():
        print(f"llmbench: {line}", file=sys.stderr)
