"""Documentation of the quantization schemes, from their table."""

from __future__ import annotations

from ..records.quantizations import ESTIMATED_GROUP, LIBRARIES, QUANTIZATIONS, SCHEMES, Library, Scheme
from .tables import table_of_markdown

HEAD = ("`quant`", "definition", "bits stored", "settings", "library", "needs")


def schemes_markdown() -> str:
    """Return the page `docs/reference/schemes.md`."""
    table = table_of_markdown(HEAD, [_row(SCHEMES[name]) for name in QUANTIZATIONS])
    ready = "\n".join(f"- {library.name}: {_installed_by(library)}" for library in LIBRARIES if library.ready)
    groups = f"groups of {ESTIMATED_GROUP}"
    return f"""# Quantization schemes
Values of `quant`. *Bits stored* are those of a weight with the scale and zero point of its group, as in estimates of
memory; with `group_size`, they are for {groups}. The result of a run has the measured ones. llama.cpp's schemes
quantize everything, the others the linear layers but not the output head. [method.md](../method.md#quantizations)
describes how a loaded model is checked. This page is generated from the table in
`mlflow_llmbench/records/quantizations.py`.

{table}

Checkpoints that are quantized already run with `quant=none`. Loading them needs:

{ready}
"""


def _row(scheme: Scheme) -> tuple[str, ...]:
    settings = [f"`{name}`" for name in scheme.settings if name not in ("dtype", "layers")]
    needs = [_installed_by(scheme.library)] if scheme.library else []
    if scheme.library and scheme.library.compiler:
        needs.append("a C++ compiler")
    if scheme.capability:
        where = "on a GPU: " if scheme.runs_on_cpu else "a GPU of "
        needs.append(f"{where}compute capability {'.'.join(map(str, scheme.capability))}")
    return (
        f"`{scheme.name}`",
        scheme.definition,
        f"{8 * scheme.storage.bytes_per_weight():.4g}" if scheme.storage else str(scheme.bits or ""),
        ", ".join(settings),
        scheme.library.name if scheme.library else "",
        ", ".join(needs),
    )


def _installed_by(library: Library) -> str:
    return f"extra `{library.extra}`" if library.extra else ", ".join(f"package `{name}`" for name in library.packages)
