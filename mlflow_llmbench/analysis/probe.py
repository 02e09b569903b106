"""Trust in the probe of a device's best rates, of which MBU and MFU are shares. Pure.

A disturbed probe measures too little, and a utilization is then too high: a tenth of the bandwidth made an MBU of 0.73
of 0.07. The probe therefore records how well its two best rounds agree, and what else the machine did meanwhile, as
further numbers among its rates.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..records.noise import Noise
from ..records.text import finite
from ..records.verdicts import FOREIGN_CPU_LIMIT
from .contention import RUN_DELAY_LIMIT, share, unseen_cpus

LEAST_AGREEMENT = 0.95
"""Second best round ÷ best round from which a rate was reached twice."""

READ, FLOPS = "read_bytes_per_s", "flops_per_s"
AGREEMENT = {READ: "read_agreement_ratio", FLOPS: "flops_agreement_ratio"}
OTHERS, WAITING = "probe_others_cpus", "probe_waiting_ratio"
EVIDENCE = (*AGREEMENT.values(), OTHERS, WAITING)
"""Names of the probe's evidence about itself."""


def evidence(noise: Noise) -> dict[str, float]:
    """Return CPUs that others used during a probe, less their uncertainty, and the share of the time that it waited."""
    others, waited = share([noise], lambda n: n.others_s), share([noise], lambda n: n.run_delay_s)
    found = {OTHERS: None if others is None else max(others - unseen_cpus([noise]), 0.0), WAITING: waited}
    return {name: value for name, value in found.items() if value is not None}


def doubt(peaks: Mapping[str, float], rate: str = READ) -> str | None:
    """Return why a rate is doubtful, or None. A probe of an earlier version has no evidence, and is not doubted."""
    agreement, others, waited = (finite(peaks.get(name)) for name in (AGREEMENT[rate], OTHERS, WAITING))
    if agreement is not None and agreement < LEAST_AGREEMENT:
        return f"its two best rounds differ by {1 - agreement:.0%} (limit {1 - LEAST_AGREEMENT:.0%})"
    if others is not None and others > FOREIGN_CPU_LIMIT:
        return f"others used {others:.2f} CPUs while it ran (limit {FOREIGN_CPU_LIMIT:.2f})"
    if waited is not None and waited > RUN_DELAY_LIMIT:
        return f"it waited for a CPU for {waited:.2g} s in each second (limit {RUN_DELAY_LIMIT:g})"
    return None
