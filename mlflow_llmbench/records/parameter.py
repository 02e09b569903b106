"""Declaration of a parameter, as a field of a frozen dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

PANELS = {
    "model": "Model and runtime",
    "quantization": "Quantization",
    "workload": "Workload",
    "measurement": "Measurement",
    "quality": "Quality",
    "server": "Server and service levels",
    "limits": "Limits and permissions",
    "results": "Where results go",
}
"""Panel → its title, in the order of the help of the command line."""


@dataclass(frozen=True)
class Parameter:
    """Everything about a parameter but its name and type.

    `kind`: key of `parsers.PARSERS`. `panel`: key of `PANELS`, "" for a parameter of one command only. `metavar`: what
    stands for the value in the help, such as its unit, if the kind does not tell it. `sweep`: lists are allowed.
    `unset`: word for None. `low`, `high`: bounds. `scenarios`: those in which it has a meaning; other runs do not log
    it (see `Cell.scenario`). `only_with`: settings with which it has a meaning, as values of other parameters: all of
    `quant=int4,fp4 repetitions=auto`; a name alone stands for any value but the word for None. `separator`: stands
    between the values of a list. `backend_specific`: only backends that declare it take it.
    """

    default: object
    help: str
    kind: str
    panel: str = ""
    metavar: str = ""
    sweep: bool = False
    unset: str = ""
    low: float = 1
    high: float = 1e9
    scenarios: str = "offline batching online"
    only_with: str = ""
    separator: str = ","
    backend_specific: bool = False

    def field(self) -> Any:
        """Return a dataclass field with the default, and the rest as its metadata."""
        return dataclasses.field(default=self.default, metadata=vars(self) | {"scenarios": self.scenarios.split()})
