"""Check that an environment can run a backend, a quantization and a decode path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..backends.huggingface import decoding, quantization
from ..backends.llamacpp import gguf_quantize
from ..backends.packages import NEEDED, OPTIONAL, below_floor, is_written_for, version
from ..config.choices import DECODES
from ..records.backends import capabilities_of, known_backends
from ..records.cell import Cell
from ..records.errors import MissingError, UsageError, first_line
from ..records.installation import pip_install
from ..records.quantizations import QUANTIZATIONS, SCHEMES, install_command
from ..system import machine
from . import interpreter


@dataclass(frozen=True)
class Item:
    """One item of the report. `status`: `ok`, `missing`, or `limited` (present, but not everything works).

    `found` says what is there, `advice` what to do about a problem. Without a `needed` item nothing can be measured.
    """

    section: str
    name: str
    status: str
    found: str
    advice: str | None = None
    needed: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)


def runtime_items() -> list[Item]:
    """Return the items that depend on this interpreter's packages: backends, quantizations, decode paths."""
    return [
        *_guarded("Backends", "backends", backend_items),
        *_guarded("Quantizations", "quantizations", lambda: quantization_items(lambda name: version(name) is not None)),
        *_guarded("Decode paths", "decode paths", decode_items),
    ]


def _guarded(section: str, name: str, check: Callable[[], Iterable[Item]]) -> list[Item]:
    """Return the items of a check, or one item with the error if the check itself fails."""
    try:
        return list(check())
    except Exception as error:
        advice = "Please report this line; nothing else depends on it."
        return [Item(section, name, "limited", f"could not be examined: {first_line(error)}", advice)]


def package_item(name: str, installed: str | None) -> Item:
    """Return the item of a required package; `installed` is its version, None if it is not installed."""
    wanted = ",".join(filter(None, NEEDED[name]))
    install = f"Run: {pip_install(name + wanted)}"
    if installed is None:
        return Item("Software", name, "missing", "not installed", install, needed=True)
    if not is_written_for(name, installed):
        found = below_floor(name, installed) or f"{installed}, but this program was written for {wanted}"
        return Item("Software", name, "limited", found, install, needed=True, data={"version": installed})
    return Item("Software", name, "ok", installed, needed=True, data={"version": installed})


def backend_items() -> Iterator[Item]:
    """Yield every declared backend: whether it can be imported, and whether the modules that it needs are installed."""
    for name, where in sorted(known_backends().items()):
        try:
            own = capabilities_of(name)
            lacking = interpreter.lacking_here(own.heavy)
        except UsageError as error:
            yield Item("Backends", name, "missing", str(error), f"Reinstall the package that declares {where}.")
            continue
        status, found = ("missing", f"needs {', '.join(lacking)}") if lacking else ("ok", where)
        install = " && ".join(map(install_command, lacking))
        if own.own_environment:
            install = f"{own.own_environment}, then give worker_python=ENVIRONMENT/bin/python"
        yield Item("Backends", name, status, found, f"Run: {install}" if lacking else None)
    if version("llama-cpp-python"):
        yield converter_item()


def converter_item() -> Item:
    """Return the item of llama.cpp's converter, which makes GGUF files and is not in an installed llama-cpp-python."""
    try:
        tree = gguf_quantize.source_tree()
    except MissingError as error:
        wrong, _, command = str(error).partition(". ")
        return Item("Backends", "llama.cpp's converter", "missing", wrong, command)
    return Item(
        "Backends", "llama.cpp's converter", "ok", f"{tree}, {len(gguf_quantize.architectures(tree))} architectures"
    )


def quantization_items(installed: Callable[[str], bool]) -> Iterator[Item]:
    """Yield every value of `quant`, with the packages that it needs besides torch and transformers."""
    for quant in QUANTIZATIONS:
        packages = ("torch", "transformers", *SCHEMES[quant].packages)
        lacking = [package for package in packages if not installed(package)]
        if lacking:
            run = " && ".join(dict.fromkeys(map(install_command, lacking)))
            yield Item("Quantizations", quant, "missing", f"needs {', '.join(lacking)}", f"Run: {run}")
        elif lack := quantization.lacking_device(quant):
            yield _missing("Quantizations", quant, lack)
        else:
            yield Item("Quantizations", quant, "ok", " + ".join(packages[2:]) or "torch")


def decode_items() -> Iterator[Item]:
    """Yield every value of `decode` and of `kv_cache`, on the device that `device=auto` selects."""
    device = machine.require_device("auto")
    asked = [(f"decode={decode}", Cell(decode=decode)) for decode in DECODES]
    asked += [(f"kv_cache={cache}", Cell(kv_cache=cache)) for cache in decoding.KV_BACKENDS]
    for name, cell in asked:
        try:
            decoding.require(cell, device)
            yield Item("Decode paths", name, "ok", f"on {device}")
        except MissingError as error:
            yield _missing("Decode paths", name, str(error).removeprefix(f"{name} "))


def _missing(section: str, name: str, sentences: str) -> Item:
    """Return a missing item: the first sentence says why, the rest what to do."""
    found, _, advice = sentences.partition(". ")
    return Item(section, name, "missing", found, advice)


def optional_items() -> Iterator[Item]:
    """Yield the optional packages and what each of them gives."""
    for packages, gives in OPTIONAL:
        versions = {package: version(package) for package in packages}
        lacking = [package for package, found in versions.items() if found is None]
        name = " + ".join(packages)
        if lacking:
            yield Item("Optional", name, "missing", f"gives {gives}", f"Run: {install_command(packages[0])}")
        else:
            yield Item(
                "Optional",
                name,
                "ok",
                f"{', '.join(str(installed) for installed in versions.values())}: {gives}",
                data=versions,
            )
