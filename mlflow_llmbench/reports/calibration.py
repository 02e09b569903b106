"""Format a calibration for a terminal."""

from __future__ import annotations

from ..analysis.comparison import COMPARED
from ..records.calibration import Calibration
from .escaping import plain
from .tables import text_table


def format_calibration(found: Calibration) -> str:
    """The noise between processes by metric, and what was measured."""
    body = [
        [entry.heading, *(f"{100 * spread.sd:.2f} %" for spread in spreads), f"{spreads[-1].degrees:.3g}"]
        for entry in COMPARED
        if (spreads := found.spreads.get(entry.key))
    ]
    sizes = next(iter(found.spreads.values()), ())
    heading = ["sd between processes", *(f"{one.repetitions} repetitions" for one in sizes), "degrees of freedom"]
    suspect = [word for word in found.verdicts if word != "valid"]
    lines = [
        plain(
            f"Noise between {found.processes} processes of {found.of}, by {found.backend} on {found.device}, "
            f"{found.repetitions} repetitions together:"
        ),
        "",
        text_table(heading, body, range(1, len(heading))),
        "",
    ]
    if suspect:
        lines.append(
            "The measurement is suspect, so the noise may be larger than that of the machine when it is quiet. "
            "Calibrate again when it is."
        )
    return "\n".join(lines)
