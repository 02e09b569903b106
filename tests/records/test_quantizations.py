"""The table of quantization schemes: it is complete, and its values are those that many places declared before."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.scaling import memory_account
from mlflow_llmbench.backends.packages import OPTIONAL
from mlflow_llmbench.config import cells, model_shape, models
from mlflow_llmbench.records.backends import backend_of
from mlflow_llmbench.records.cell import DEPENDS_ON, PARAMETERS, Cell
from mlflow_llmbench.records.quantizations import (
    COLOURS,
    LIBRARIES,
    QUANTIZATIONS,
    SCHEMES,
    install_command,
    library_of_method,
    listed,
    resolve,
    schemes_with,
)
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.reports.schemes import schemes_markdown
from mlflow_llmbench.system import machine

ROOT = Path(__file__).resolve().parents[2]
BEFORE: dict[str, Any] = json.loads(Path(__file__).with_name("schemes_before.json").read_text(encoding="utf-8"))
"""Values before the schemes had one table. A new scheme need not be in this file."""

PRESET = models.PRESETS["opt-125m"]
FACTS = ModelFacts(
    "opt-125m", "preset", "facebook/opt-125m", "c0ffee", dict(PRESET.config), "float16", 2048, 250_000_000
)


def cell_of(quant: str) -> Cell:
    backend = backend_of("transformers", quant)
    return cells._settled(Cell(quant=quant, batch_size=4, group_size=64, device="cpu", backend=backend))


@pytest.mark.parametrize("quant", BEFORE["schemes"])
def test_a_scheme_is_what_it_was(quant: str) -> None:
    scheme, before = SCHEMES[quant], BEFORE["schemes"][quant]
    assert scheme.colour == COLOURS[quant] == before["colour"]
    assert set(scheme.packages) == set(before["packages"])
    assert scheme.backend == backend_of("transformers", quant) == before["backend"]
    assert (scheme.library is not None) == before["made"]
    assert ("group_size" in scheme.settings) == before["grouped"]
    assert memory_account.nominal_bits(quant) == before["bits"]
    if before["expected"]:
        layers, low, high = before["expected"]
        assert (sorted(scheme.layers) or None, scheme.held_bits) == (layers, (low, high))
    else:
        assert scheme.held_bits is None
    assert cells.config_hash(cell_of(quant), FACTS) == before["config_hash"]
    for name, (half, single) in before.get("bytes", {}).items():
        shape = models.PRESETS[name].shape
        for dtype, expected in (("float16", half), ("float32", single)):
            assert [
                shape.weight_bytes(quant, dtype),
                model_shape.memory_estimate(shape, quant, dtype, 8, 256, 64),
            ] == expected


def test_the_order_of_lists_and_of_charts_is_what_it_was() -> None:
    assert [quant for quant in QUANTIZATIONS if quant in BEFORE["schemes"]] == BEFORE["quantizations"]
    assert [quant for quant in COLOURS if quant in BEFORE["schemes"]] == BEFORE["charts"]


def test_the_libraries_are_what_they_were() -> None:
    for method, packages in BEFORE["methods"].items():
        library = library_of_method(method)
        assert library and sorted(library.packages) == packages
    assert {library.method for library in LIBRARIES if library.packed} >= set(BEFORE["packed"])
    assert {one.method: sorted(one.ready) for one in LIBRARIES if one.ready}.items() >= BEFORE["ready"].items()
    assert {package: install_command(package) for package in BEFORE["install"]} == BEFORE["install"]
    assert {package for packages, _ in OPTIONAL for package in packages} >= set(BEFORE["install"])
    assert set(machine.PACKAGES) >= set(BEFORE["fingerprint"])
    assert {name: [parameter, list(values)] for name, (parameter, values) in DEPENDS_ON.items()}.items() >= BEFORE[
        "meant_with"
    ].items()


@pytest.mark.parametrize("quant", QUANTIZATIONS)
def test_a_scheme_is_complete(quant: str) -> None:
    """Each has an estimate, unless a plan or the checkpoint decides, and what it needs can be found."""
    scheme = SCHEMES[quant]
    assert scheme.definition
    assert quant == "mixed" or model_shape.memory_estimate(PRESET.shape, quant, "float16") > 0
    assert scheme.library is None or scheme.library in LIBRARIES
    if scheme.held_bits and scheme.storage:
        low, high = scheme.held_bits
        assert low <= 8 * scheme.storage.bytes_per_weight() <= high
        assert 8 * scheme.storage.bytes_per_weight(16) <= high
    if scheme.maker:
        assert importlib.util.find_spec(f"mlflow_llmbench.backends.huggingface.{scheme.maker}")
    if scheme.made_while_loading:
        assert scheme.recipe and scheme.layers, "what is made while loading is checked after it"
    assert set(scheme.settings) <= {*PARAMETERS, "dtype", "layers"}


def test_colours_are_distinct() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_fewer_bits_take_less_memory() -> None:
    sizes = [PRESET.shape.weight_bytes(quant, "float16") for quant in ("bf16", "hqq8", "hqq4", "hqq3", "hqq2")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_a_recipe_gets_the_settings_of_a_cell_and_is_plain_data() -> None:
    settings = vars(Cell(group_size=32)) | {"dtype": "bfloat16"}
    found = resolve(SCHEMES["int4-wo"].recipe, settings)
    assert found["quant_type"]["by_device"]["cpu"] == {
        "class": "torchao.prototype.quantization.int4.PrototypeInt4WeightOnlyConfig",
        "group_size": 32,
    }
    plain = resolve(SCHEMES["int4"].recipe, settings)
    assert "bnb_4bit_use_double_quant" not in plain and plain["bnb_4bit_compute_dtype"] == "bfloat16"
    assert resolve(SCHEMES["int4"].recipe, settings | {"double_quant": True})["bnb_4bit_use_double_quant"] is True
    for name in QUANTIZATIONS:
        made = resolve(SCHEMES[name].recipe, settings | {"layers": {"int8": ["a.b"]}})
        assert json.loads(json.dumps(made)) == made
        assert "$" not in json.dumps(made)
    calibrated = {"bits": 3, "group_size": 32, "desc_act": False, "sym": True}  # arguments of optimum's GPTQQuantizer
    assert resolve(SCHEMES["gptq3"].recipe, settings) == calibrated
    with pytest.raises(KeyError, match="group_size"):
        resolve(SCHEMES["hqq4"].recipe, {})


def test_the_settings_of_schemes_are_parameters_with_a_list_of_them() -> None:
    known = {
        setting: [name for name in schemes_with(setting) if name in BEFORE["schemes"]]
        for setting in ("group_size", "int8_threshold", "double_quant")
    }
    assert known == {
        "group_size": ["gptq", "gptq3", "gptq8", "int4-wo", "hqq8", "hqq4", "hqq3", "hqq2"],
        "int8_threshold": ["int8"],
        "double_quant": ["int4", "fp4"],
    }


def test_the_help_lists_every_scheme_by_library() -> None:
    text = PARAMETERS["quant"].metadata["help"]
    assert text == listed()
    assert text.startswith("none (the checkpoint's dtype), fp32, fp16, bf16; bitsandbytes: int8, int4 (NF4), fp4")
    assert "; HQQ: hqq8, hqq4, hqq3, hqq2" in text
    names = text.replace(";", ",").replace(": ", ", ").split(", ")
    assert {name.partition(" (")[0] for name in names} >= set(QUANTIZATIONS)


def test_the_page_of_schemes_is_the_table() -> None:
    page = ROOT / "docs" / "reference" / "schemes.md"
    assert page.read_text(encoding="utf-8") == schemes_markdown(), (
        "docs/reference/schemes.md differs from the table of schemes. Write it again: make reference"
    )


def test_a_scheme_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES["int8"].bits = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        SCHEMES["other"] = SCHEMES["int8"]  # type: ignore[index]
