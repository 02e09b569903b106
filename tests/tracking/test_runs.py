"""Tags of the run of a cell."""

from __future__ import annotations

import dataclasses

import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.quantizations import COLOURS
from mlflow_llmbench.records.results import LoadInfo, Verdict
from mlflow_llmbench.tracking.runs import cell_tags, run_color

from ..results import made

PACKAGES = {
    "torch": "2.13.0", "bitsandbytes": "0.50.2", "optimum": "2.1.0", "gptqmodel": "7.6.0", "nncf": "2.18.0",
    "llama-cpp-python": "0.3.16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "quant", "method", "named"),
    [
        ("transformers", "int4", "bitsandbytes", "bitsandbytes 0.50.2"),
        ("transformers", "mixed", "mixed", "bitsandbytes 0.50.2"),
        ("transformers", "gptq", "gptq", "optimum 2.1.0, gptqmodel 7.6.0"),
        ("transformers", "none", "bitsandbytes", "bitsandbytes 0.50.2"),  # a checkpoint that is quantized already
        ("transformers", "hqq4", "hqq", None),  # its package is not in the environment
        ("transformers", "bf16", "none", None),
        ("llama_cpp", "q4_k_m", "gguf", "llama-cpp-python 0.3.16"),
        ("openvino", "int8", "nncf", "nncf 2.18.0"),
        ("fake", "int8", "fake", None),
    ],
)
def test_the_package_that_quantized_is_a_tag_with_its_version(
    backend: str, quant: str, method: str, named: str | None
) -> None:
    plain = made(quant)
    one = dataclasses.replace(
        plain,
        cell=dataclasses.replace(plain.cell, backend=backend),
        load=LoadInfo(1.0, facts={"quant.method": method}),
        environment={"packages": PACKAGES},
    )
    assert cell_tags(one, Verdict("valid")).get("llmbench.quant_package") == named


def test_a_run_tells_the_commit_and_with_a_gpu_the_libraries_that_torch_used() -> None:
    software = {"git": "abc-dirty", "cuda": "13.1", "cuda_runtime": "13.0", "cudnn": "9.20.0.48", "packages": PACKAGES}
    plain = dataclasses.replace(made(), environment={**software, "gpus": [{"name": "NVIDIA X"}]})
    tags = cell_tags(plain, Verdict("valid"))
    assert tags["llmbench.git_commit"] == "abc-dirty"
    assert not {"llmbench.cuda_runtime", "llmbench.cudnn"} & tags.keys()  # it was measured on the CPU
    on_gpu = dataclasses.replace(plain, load=LoadInfo(1.0, facts={"model.device": "cuda:0"}))
    tags = cell_tags(on_gpu, Verdict("valid"))
    assert (tags["llmbench.cuda_runtime"], tags["llmbench.cudnn"]) == ("13.0", "9.20.0.48")


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_a_run_has_the_colour_of_its_quantization_and_is_darker_with_more_rows(quant: str) -> None:
    colours = [run_color(Cell(quant=quant, batch_size=rows)) for rows in (1, 2, 4, 16, 64, 256)]
    brightness = [sum(bytes.fromhex(colour[1:])) for colour in colours]
    assert colours[0] == COLOURS[quant] and brightness == sorted({*brightness}, reverse=True)
    served = Cell(quant=quant, backend="openai", launch="serve {quant}", concurrency=4)
    assert run_color(served) == colours[2]
