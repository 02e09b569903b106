"""Checks of a request against what the backends that run it declare."""

from __future__ import annotations

from collections.abc import Mapping

from ..records.backends import BACKENDS, RUNTIMES, Capabilities, backend_of, capabilities_of, library_of
from ..records.cell import BACKEND_SPECIFIC, PARAMETERS, Cell
from ..records.errors import UsageError


def requested_capabilities(axes: Mapping[str, tuple[object, ...]]) -> Capabilities:
    """Return what the requested backend declares: the last one, since `twin` adds another before it."""
    return capabilities_of(str(axes["backend"][-1]))


def check_backend(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse quantizations and backend-specific parameters that the backend of a cell does not declare."""
    backend, quants = str(axes["backend"][0]), [str(quant) for quant in axes["quant"]]
    runners = {quant: backend_of(backend, quant) for quant in quants}
    declared = {runner: capabilities_of(runner) for runner in runners.values()}
    for quant, runner in runners.items():
        own = declared[runner]
        if quant not in own.quantizations and not own.online and axes["launch"] == (None,):
            other = next(name for name in RUNTIMES if quant in capabilities_of(name).quantizations)
            raise UsageError(
                f"quant={quant} is a quantization of {library_of(other)}, not of backend={backend}. "
                f"Give backend={other}, or quant={','.join(own.quantizations)}."
            )
    for name in BACKEND_SPECIFIC:
        if axes[name] != (PARAMETERS[name].default,) and any(name not in own.parameters for own in declared.values()):
            other = next(known for known in BACKENDS if name in capabilities_of(known).parameters)
            raise UsageError(
                f"{name} is a setting of {library_of(other)}, which does not run every cell. "
                f"Give backend={other}, or leave it out."
            )


def check_declared(cell: Cell) -> None:
    """Refuse what the backend of a cell does not declare. Raises UsageError.

    Without this check something else could be measured under the requested name.
    """
    backend, own = cell.backend, capabilities_of(cell.backend)
    library = library_of(backend)
    if cell.quant not in own.quantizations and not own.online:
        raise UsageError(
            f"{library} has no quant={cell.quant}. With backend={backend} use {', '.join(own.quantizations)}."
        )
    kind = cell.device.partition(":")[0]
    if kind not in ("auto", *own.devices) and not own.online:
        raise UsageError(f"{library} does not run on device={cell.device}. Use device={','.join(own.devices)}.")
    if cell.weights == "random" and not own.random_weights:
        raise UsageError(f"backend={backend} has no weights=random. Use weights=hub.")
    if cell.attention not in own.attentions:
        raise UsageError(
            f"{library} has no attention={cell.attention}. Use attention={','.join(own.attentions)}."
            if len(own.attentions) > 1
            else f"backend={backend} has its own attention, so attention={cell.attention} cannot be used. Leave it out."
        )
    if cell.decode not in own.decodes:
        raise UsageError(f"backend={backend} has no decode={cell.decode}. Use decode={','.join(own.decodes)}.")
    if cell.history in ("recomputed", "kept") and not own.conversations:
        raise UsageError(
            f"backend={backend} cannot be measured turn by turn with history={cell.history}. Use history=none."
        )
    if cell.batching == "continuous" and not own.continuous:
        raise UsageError(f"backend={backend} has no batching=continuous. Use batching=static or dynamic.")
    if cell.kv_cache is not None and cell.kv_cache not in own.kv_caches:
        raise UsageError(
            f"backend={backend} has no kv_cache={cell.kv_cache}. Use kv_cache={','.join(['auto', *own.kv_caches])}."
        )
