"""Quantizations of torchao, HQQ, quanto and bitsandbytes on the CPU: stored bytes, logits and missing packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlflow_llmbench.backends.huggingface import mixed, quantization, recipe
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.huggingface.inspection import inspect_model, verify
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import runtime
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, MissingError, NotRealised, UsageError
from mlflow_llmbench.records.quantizations import LIBRARIES, SCHEMES, install_command, resolve, schemes_of, schemes_with
from mlflow_llmbench.system import gpu
from tests.loading import loaded

GROUP = 64
LINEAR = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
ROWS = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128)
REST = 2 * (2 * 512 * 128 + 5 * 128) + 2 * 16 * 4  # head, embedding and norms in bf16, rotary frequencies in fp32


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needs(package: str) -> Any:
    return pytest.mark.skipif(not installed(package), reason=f"needs the package {package}")


@pytest.mark.filterwarnings("ignore")  # warnings of the libraries, which otherwise run in a process of their own
@pytest.mark.parametrize(
    ("quant", "kernel", "method", "stored", "closeness"),
    [
        pytest.param("int8-wo", "Linear(Int8Tensor) × 14", "torchao", LINEAR + 4 * ROWS, 0.999, marks=needs("torchao")),
        pytest.param(
            "int8-dq", "Linear(Int8Tensor, dynamic) × 14", "torchao", LINEAR + 4 * ROWS, 0.999, marks=needs("torchao")
        ),
        pytest.param(
            "int4-wo",
            "Linear(Int4OpaqueTensor) × 14",
            "torchao",
            LINEAR // 2 + 4 * LINEAR // GROUP,
            0.97,
            marks=needs("torchao"),
        ),
        pytest.param("hqq8", "HQQLinear × 14", "hqq", LINEAR + 4 * LINEAR // GROUP, 0.999, marks=needs("hqq")),
        pytest.param("hqq4", "HQQLinear × 14", "hqq", LINEAR // 2 + 4 * LINEAR // GROUP, 0.97, marks=needs("hqq")),
        pytest.param("hqq2", "HQQLinear × 14", "hqq", LINEAR // 4 + 4 * LINEAR // GROUP, 0.5, marks=needs("hqq")),
        pytest.param(
            "quanto8",
            "QLinear(WeightQBytesTensor) × 14",
            "quanto",
            LINEAR + 2 * ROWS,
            0.999,
            marks=needs("optimum-quanto"),
        ),
    ],
)
def test_what_is_stored_is_what_was_asked(
    tiny_model: Path, quant: str, kernel: str, method: str, stored: int, closeness: float
) -> None:
    """Bytes are counted by hand, and logits compared with those of the unquantized model."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(100, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with loaded(Cell(model=str(tiny_model), quant=quant, group_size=GROUP)) as (backend, info), torch.inference_mode():
        assert info.facts["quant.kernel"] == kernel
        assert info.facts["quant.method"] == method
        assert info.facts["model.parameters"] == 426_624
        assert info.facts["model.dtype"] == "bfloat16"
        assert info.weight_bytes == pytest.approx(REST + stored, rel=0.005)
        assert info.facts["quant.bits_per_weight"] == pytest.approx(8 * stored / LINEAR, rel=0.01)
        near = torch.nn.functional.cosine_similarity(
            exact(ids).logits.flatten(), backend.model(ids).logits.flatten().float(), dim=0
        )
        steps: list[Any] = []
        backend.generate([[5, 6, 7]], 4, steps.append)
    assert closeness < float(near) < 1
    assert len(steps) == 4


@needs("torchao")
@pytest.mark.filterwarnings("ignore")
def test_groups_that_do_not_fit_are_told_and_not_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """A hidden size of 96 has no groups of 64; torchao silently leaves such a layer unquantized."""
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "odd")
    with (
        pytest.raises(
            NotRealised,
            match=r"quant=int4-wo was asked for, but the linear layers are .*'Linear': 6.*"
            r"Use a group_size that divides the inputs",
        ),
        loaded(Cell(model=str(tmp_path / "odd"), quant="int4-wo", group_size=64)),
    ):
        pass
    with pytest.raises(UsageError, match=r"quant=int4-wo has no kernel for group_size=96\. Use group_size=32,64,128\."):
        TransformersBackend.resolve(Cell(model=str(tiny_model), quant="int4-wo", group_size=96))


def test_the_threshold_and_the_second_quantization_are_those_that_were_asked(tiny_model: Path) -> None:
    for threshold in (6.0, 0.0):
        with loaded(Cell(model=str(tiny_model), quant="int8", int8_threshold=threshold)) as (backend, info):
            assert info.facts["quant.threshold"] == threshold
            assert backend.model.model.layers[0].mlp.up_proj.state.threshold == threshold
    for double in (False, True):
        with loaded(Cell(model=str(tiny_model), quant="int4", double_quant=double)) as (backend, info):
            assert info.facts["quant.double_quant"] == str(double).lower()
            assert backend.model.model.layers[0].mlp.up_proj.weight.quant_state.nested is double


@pytest.mark.parametrize("quant", [quant for quant in schemes_of("transformers") if SCHEMES[quant].packages])
def test_a_missing_package_is_named_with_its_command(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    monkeypatch.setattr(quantization, "installed", lambda package: False)
    package = SCHEMES[quant].packages[0]
    with pytest.raises(MissingError) as caught:
        TransformersBackend.resolve(Cell(model=str(tiny_model), quant=quant))
    assert (
        str(caught.value)
        == f"quant={quant} needs the package {package}, which is not installed. Run: {install_command(package)}"
    )


@needs("torchao")
@pytest.mark.parametrize(
    ("capability", "why"), [(None, "this machine has none"), ((8, 0), "GPU 0 has 8.0")], ids=["no GPU", "an old GPU"]
)  # fmt: skip
def test_8_bit_floats_need_a_gpu_that_multiplies_them(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, why: str
) -> None:
    monkeypatch.setattr(gpu, "compute_capability", lambda index: capability)
    with pytest.raises(
        MissingError,
        match=rf"quant=fp8 needs a GPU of compute capability 8\.9 or newer, and {why}\. Use quant=int8-wo or int8-dq\.",
    ):
        TransformersBackend.resolve(Cell(model=str(tiny_model), quant="fp8"))
    [item] = [item for item in runtime.quantization_items(lambda package: True) if item.name == "fp8"]
    assert (item.status, item.advice) == ("missing", "Use quant=int8-wo or int8-dq.")
    assert why in item.found
    monkeypatch.setattr(gpu, "compute_capability", lambda index: (9, 0))
    assert quantization.lacking_device("fp8") is None


@needs("torchao")
def test_4_bit_kernels_of_a_gpu_need_bfloat16(tiny_model: Path, nvml: Callable[[str], None]) -> None:
    nvml("gpu GPU-1 NVIDIA T4\ncapability 7 5\n")
    with pytest.raises(
        MissingError, match=r"quant=int4-wo needs a GPU of compute capability 8\.0 or newer, and GPU 0 "
    ):
        TransformersBackend.resolve(Cell(model=str(tiny_model), quant="int4-wo", device="cuda"))
    assert quantization.lacking_device("int4-wo", "cpu") is None
    nvml("gpu GPU-1 NVIDIA A100\ncapability 8 0\n")
    assert quantization.lacking_device("int4-wo", "cuda:0") is None
    nvml("gpu GPU-1 NVIDIA A100\n")  # the driver does not tell
    assert quantization.lacking_device("int4-wo", "cuda:0") is None


@needs("torchao")
@pytest.mark.parametrize(("group_size", "stored"), [(128, 8.5), (32, 10.0)])
def test_padding_to_the_tiles_of_a_gpu_is_no_other_quantization(
    monkeypatch: pytest.MonkeyPatch, group_size: int, stored: float
) -> None:
    """Layers of 512 inputs, as in pythia-70m, take twice their room. The meta device has shapes and no values."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    choice = resolve(SCHEMES["int4-wo"].recipe["quant_type"], {"group_size": group_size})
    importlib.import_module("torchao.quantization").quantize_(model.model, recipe.made(choice, "cuda"))
    found = inspect_model(model)
    assert found.linear_classes == {"Linear(Int4TilePackedTo4dTensor)": 7}
    assert found.linear_bits == pytest.approx(stored)
    verify("int4-wo", "meta", found)
    layers = {name: dataclasses.replace(one, padding=0) for name, one in found.layers.items()}
    with pytest.raises(NotRealised, match="the linear layers hold"):
        verify("int4-wo", "meta", dataclasses.replace(found, layers=layers))


@pytest.mark.parametrize(("method", "package"), [(one.method, one.ready[0]) for one in LIBRARIES if one.ready])
def test_what_a_ready_checkpoint_needs_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "ready")
    config = json.loads((tmp_path / "ready" / "config.json").read_text())
    (tmp_path / "ready" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method}})
    )
    monkeypatch.setattr(quantization, "installed", lambda package: False)
    with pytest.raises(MissingError) as caught:
        TransformersBackend.resolve(Cell(model=str(tmp_path / "ready"), device="cpu"))
    start = (
        f"ready is quantized with {method}, and loading it needs the package {package}, which is not installed. Run: "
    )
    assert str(caught.value) == start + install_command(package)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_stay_as_they_are_are_not_called_quantized(tmp_path: Path) -> None:
    """transformers 5 holds experts in three-dimensional parameters, which libraries that replace linear layers miss."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mixture")
    with loaded(Cell(model=str(tmp_path / "mixture"))) as (_, info):
        assert info.facts["quant.bits_per_weight"] == 16
        # A step reads two of four experts.
        assert info.step_bytes is None and (info.weight_bytes or 0) > 2 * 4 * 3 * 64 * 128
    message = (
        r"quant=int4 was asked for, but the experts of this model are not linear layers .*: "
        r"98,304 of its 1\d\d,\d{3} weights stay as they are"
    )
    with pytest.raises(NotRealised, match=message), loaded(Cell(model=str(tmp_path / "mixture"), quant="int4")):
        pass
    cell = Cell(model=str(tmp_path / "mixture"), quant="mixed", quant_budget="6", workload="synthetic", weights="hub")
    with pytest.raises(MeasurementError, match="is a mixture of experts, .* 98,304 of its"):
        mixed.make(cell, TransformersBackend.resolve(cell), str(tmp_path / "mixture"), lambda: None)


def test_a_size_of_groups_is_asked_of_those_that_have_groups() -> None:
    assert parse({"quant": "int4,hqq4", "group_size": "64"})
    for other in ("int4", "quanto4", "int8-wo"):
        with pytest.raises(
            UsageError,
            match=f"group_size is a setting of quant={','.join(schemes_with('group_size'))}; "
            "others have their own groups",
        ):
            parse({"quant": other, "group_size": "64"})


@needs("compressed-tensors")
@pytest.mark.filterwarnings("ignore")
def test_a_ready_checkpoint_of_compressed_tensors_runs_and_says_what_it_holds(tiny_model: Path, tmp_path: Path) -> None:
    meant = write_compressed(tiny_model, tmp_path / "packed")
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    exact.load_state_dict(meant, strict=False)
    ids = torch.randint(100, 500, (1, 64), generator=torch.Generator().manual_seed(0))
    with loaded(Cell(model=str(tmp_path / "packed"))) as (backend, info), torch.inference_mode():
        assert info.facts["quant.method"] == "compressed-tensors"
        assert float(info.facts["quant.bits_per_weight"]) < 9
        assert info.facts["model.parameters"] == sum(parameter.numel() for parameter in exact.parameters())
        near = torch.nn.functional.cosine_similarity(
            exact(ids).logits.flatten(), backend.model(ids).logits.flatten().float(), dim=0
        )
        unpacked = backend.describe()
    assert float(near) > 0.999
    # transformers unpacks it in the first call, so the measured model does not have 8 bits, and is not said to.
    assert float(unpacked.facts["quant.bits_per_weight"]) >= 16


@needs("compressed-tensors")
@pytest.mark.filterwarnings("ignore")
def test_a_ready_checkpoint_without_all_its_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """transformers would initialize missing weights at random, log it, and continue."""
    from safetensors.torch import load_file, save_file

    write_compressed(tiny_model, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if "1.mlp.up_proj" not in name},
        file,
        metadata={"format": "pt"},
    )
    with (
        pytest.raises(
            NotRealised,
            match=r"The checkpoint packed cannot be loaded\. The files lack \d of the model's tensors: "
            r"model\.layers\.1\.mlp\.up_proj\.weight_packed.*cannot read compressed-tensors",
        ),
        loaded(Cell(model=str(tmp_path / "packed"))),
    ):
        pass


def write_compressed(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint with 8-bit weights per output row, in the published layout; return its dequantized weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        levels = (weight / scale).round().clamp(-128, 127)
        bytes_ = (levels + 128).to(torch.int32)
        packed = sum(bytes_[:, place::4] << (8 * place) for place in range(4))
        assert isinstance(packed, torch.Tensor)
        stored |= {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}
        meant[name] = levels * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": scheme,
        "input_activations": None,
        "output_activations": None,
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return meant
