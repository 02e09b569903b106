"""GGUF files without llama.cpp: headers, refused settings, estimates, and making a file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mlflow_llmbench.backends.checkpoints import gguf_file, hub, sources
from mlflow_llmbench.backends.huggingface import scoring
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.llamacpp import gguf_convert, gguf_quantize
from mlflow_llmbench.backends.llamacpp.backend import (
    KV_TYPES,
    LlamaCppBackend,
    buffers_in,
    mapped_weights,
    offloaded_in,
)
from mlflow_llmbench.config import model_shape, models
from mlflow_llmbench.config.cells import config_hash, expand_cells, group_cells
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure import quality_order, quality_reference, runtime
from mlflow_llmbench.measure.supervise import Limits
from mlflow_llmbench.measure.task import Task
from mlflow_llmbench.records.cell import Cell, Options
from mlflow_llmbench.records.errors import MissingError, ModelError, UsageError
from mlflow_llmbench.records.quantizations import GGUF_CACHES, SCHEMES, schemes_of
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.system import estimate, machine, memory
from mlflow_llmbench.workloads.prompts import load_text
from tests.gguf_files import write_llama


@pytest.fixture(scope="module")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf", kind="Q8_0")


# The file


def test_the_table_of_types_is_that_of_the_package_gguf() -> None:
    import gguf

    theirs = {kind.value: (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind: (name.lower(), block, size) for kind, (name, block, size) in gguf_file.TYPES.items()}
    assert ours.items() <= theirs.items()


def test_a_header_is_read_as_the_package_gguf_reads_it(tiny_gguf: Path) -> None:
    import gguf

    header, reader = gguf_file.read_header(tiny_gguf), gguf.GGUFReader(tiny_gguf)
    assert {(t.name, t.shape, t.kind, t.stored_bytes) for t in header.tensors} == {
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.value, int(t.n_bytes)) for t in reader.tensors
    }
    assert (header.architecture, header.context, header.vocab_size) == ("llama", 256, 512)
    assert header.lengths["tokenizer.ggml.tokens"] == 512
    assert header.metadata["tokenizer.ggml.tokens"] == 512  # counted, not kept
    assert header.has_tokenizer
    assert header.linear_types == "q8_0 × 14"
    assert header.linear_bits == 8.5
    assert not header.tied
    embedding = 512 * 128 * 34 // 32
    assert header.weight_bytes - header.step_bytes == embedding
    assert header.kv_values_per_token() == 2 * 2 * 2 * 32  # layers, keys and values, heads, their size


def test_the_sizes_in_a_header_are_those_of_the_configuration(tiny_gguf: Path, tiny_model: Path) -> None:
    from_file = model_shape.Shape.from_config(gguf_file.read_header(tiny_gguf).as_config())
    assert from_file == model_shape.Shape.from_config(json.loads((tiny_model / "config.json").read_text()))


def test_tables_that_are_looked_up_are_no_part_of_a_step() -> None:
    """Gemma 3n has a second table, the per-layer embeddings, which is larger than all that a step reads."""
    names = ("token_embd", "per_layer_token_embd", "output", "blk.0.attn_q")
    header = gguf_file.Header({}, {}, tuple(gguf_file.Tensor(f"{name}.weight", (32, 64), 8, 2176) for name in names))
    assert (header.weight_bytes, header.step_bytes) == (4 * 2176, 2 * 2176)


def test_a_mixture_of_experts_is_known_by_its_header() -> None:
    mixture = {"general.architecture": "qwen3moe", "qwen3moe.expert_count": 128, "qwen3moe.expert_used_count": 8}
    assert model_shape.read_by_step(gguf_file.Header(mixture, {}, ()).as_config(), 7) is None
    assert (
        model_shape.read_by_step(
            gguf_file.Header({"general.architecture": "llama", "llama.expert_count": 0}, {}, ()).as_config(), 7
        )
        == 7
    )


@pytest.mark.filterwarnings("ignore")  # of mlflow
def test_the_served_model_knows_the_types_of_the_cache() -> None:
    from mlflow_llmbench.tracking.serving_model import GgufFile

    assert GgufFile.KV_TYPES == KV_TYPES
    assert set(KV_TYPES) == set(GGUF_CACHES)


def test_the_cache_of_llama_cpp_is_estimated_in_its_own_16_bits() -> None:
    shape, model = models.PRESETS["smollm2-1.7b"].shape, ModelFacts("m", "folder", "/m", "r", {}, "float32")
    cells = [
        Cell(backend="llama_cpp", quant="q4_0", prompt_tokens=900, output_tokens=100, kv_cache=kind)
        for kind in (None, "f16", "f32")
    ]
    own, same, wide = (estimate.predicted_bytes(cell, model, shape) or 0 for cell in cells)
    assert own == same == wide - shape.kv_bytes(1000, 2)
    rates = {"read_bytes_per_s": 1e9, "flops_per_s": 1e15}
    assert estimate.least_seconds(cells[0], model, shape, rates) == estimate.least_seconds(
        cells[1], model, shape, rates
    )


@pytest.mark.parametrize("end", [2, 20, 2000, -100])
def test_a_damaged_file_is_one_line(tiny_gguf: Path, tmp_path: Path, end: int) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny_gguf.read_bytes()[:end])
    with pytest.raises(ModelError, match=r"damaged\.gguf is not a readable GGUF file: .+\. Download it again\."):
        gguf_file.read_header(damaged)


def test_a_length_that_cannot_be_is_refused_before_it_is_read(tmp_path: Path) -> None:
    damaged = tmp_path / "long.gguf"
    damaged.write_bytes(
        b"GGUF"
        + (3).to_bytes(4, "little")
        + (0).to_bytes(8, "little")
        + (1).to_bytes(8, "little")
        + (1 << 60).to_bytes(8, "little")
    )
    with pytest.raises(ModelError, match="a text in it claims"):
        gguf_file.read_header(damaged)


def test_a_split_model_is_all_its_parts(tiny_gguf: Path, tmp_path: Path) -> None:
    names = [f"m-{number:05d}-of-00002.gguf" for number in (1, 2)]
    assert [part.name for part in gguf_file.parts_of(tmp_path / names[0])] == names
    with pytest.raises(ModelError, match=r"is not the first part of a split model\. Give m-00001-of-00002\.gguf"):
        gguf_file.parts_of(tmp_path / names[1])
    (tmp_path / names[0]).write_bytes(tiny_gguf.read_bytes())
    with pytest.raises(ModelError, match=r"its part m-00002-of-00002\.gguf is not beside it"):
        sources.find_model(Cell(model=str(tmp_path / names[0])))
    (tmp_path / names[1]).write_bytes(tiny_gguf.read_bytes())
    found = sources.find_model(Cell(model=str(tmp_path / names[0])))
    assert found.files_bytes == 2 * tiny_gguf.stat().st_size


# What can be asked


def test_a_quantization_of_llama_cpp_names_its_backend() -> None:
    cells = expand_cells(parse({"quant": "bf16,q8_0,q4_k_m"}))
    assert [(cell.quant, cell.backend) for cell in cells] == [
        ("bf16", "transformers"),
        ("q8_0", "llama_cpp"),
        ("q4_k_m", "llama_cpp"),
    ]
    assert [cell.backend for cell in expand_cells(parse({"quant": "none,q8_0", "backend": "llama_cpp"}))] == [
        "llama_cpp"
    ] * 2
    with pytest.raises(UsageError, match=r"quant=q8_0 is a quantization of llama\.cpp, not of backend=fake"):
        parse({"quant": "q8_0", "backend": "fake", "model": "fake:"})


@pytest.mark.parametrize("own", [{"gpu_layers": "4"}, {"mmap": "false"}])
def test_settings_of_llama_cpp_are_asked_of_it_alone(own: dict[str, str]) -> None:
    assert parse({**own, "backend": "llama_cpp"})
    assert parse({**own, "quant": "q8_0,q4_0"})
    name = next(iter(own))
    for other in ({"quant": "bf16,q8_0"}, {"backend": "fake", "model": "fake:"}):
        with pytest.raises(UsageError, match=rf"{name} is a setting of llama\.cpp, which does not run every cell"):
            parse({**own, **other})


def test_its_settings_are_of_the_load_and_of_its_own_cells_identity_only() -> None:
    model = ModelFacts("m", "folder", "/m", "c0ffee")
    ours, theirs = Cell(backend="llama_cpp"), Cell()
    changes = ({"kv_cache": "q8_0"}, {"gpu_layers": 3}, {"mmap": False})
    for change in changes:
        assert config_hash(ours, model) != config_hash(dataclasses.replace(ours, **change), model)
        if "kv_cache" not in change:  # transformers has one too
            assert config_hash(theirs, model) == config_hash(dataclasses.replace(theirs, **change), model)
    assert len(group_cells([ours, *(dataclasses.replace(ours, **change) for change in changes)])) == 4


def test_without_the_package_the_line_says_how_to_get_it(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(gguf_quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingError,
        match=r"backend=llama_cpp needs the package llama-cpp-python.* pip install 'llama-cpp-python>=0.3.36'",
    ):
        LlamaCppBackend.resolve(Cell(model=str(tiny_gguf), backend="llama_cpp"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant": "int8"},
            r"llama\.cpp has no quant=int8\. With backend=llama_cpp use none, fp32, fp16, bf16, q8_0",
        ),
        ({"attention": "sdpa"}, r"llama\.cpp has no attention=sdpa"),
        ({"gpu_layers": 2, "device": "cpu"}, "gpu_layers=2 needs a GPU, but the device is cpu"),
        ({"quant": "q4_0"}, r"quant=q4_0 cannot be made from tiny-q8_0\.gguf, which is quantized already"),
        ({"quant": "bf16"}, r"quant=bf16 cannot be made from a GGUF file"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(gguf_quantize, "require", lambda: None)
    with pytest.raises(UsageError, match=message):
        LlamaCppBackend.resolve(Cell(**{"model": str(tiny_gguf), "backend": "llama_cpp", "device": "cpu", **settings}))


def test_a_gguf_files_facts_come_from_its_header(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_quantize, "require", lambda: None)
    found = LlamaCppBackend.resolve(Cell(model=str(tiny_gguf), backend="llama_cpp", device="cpu"))
    assert (found.source, found.context, found.files_bytes) == ("gguf", 256, tiny_gguf.stat().st_size)
    assert found.config
    cell, shape = (
        Cell(backend="llama_cpp", prompt_tokens=8, output_tokens=8),
        model_shape.Shape.from_config(found.config),
    )
    needed = estimate.predicted_bytes(cell, found, shape)
    assert needed
    assert 0 < needed - model_shape.PROCESS_BYTES - tiny_gguf.stat().st_size < 1_000_000
    assert estimate.beyond_context(dataclasses.replace(cell, output_tokens=300), found)


def test_a_name_of_a_file_on_the_hub_has_one_form(tmp_path: Path) -> None:
    assert hub.gguf_name("owner/name:sub/file.gguf") == ("owner/name", "sub/file.gguf")
    for other in (
        "file.gguf",
        "C:file.gguf",
        "owner/name/file.gguf",
        "owner/name:../file.gguf",
        "owner/name:/file.gguf",
    ):
        assert hub.gguf_name(other) is None
    with pytest.raises(
        ModelError, match=r"There is no file nowhere\.gguf\. Give the path of a \.gguf file, or OWNER/NAME:FILE\.gguf"
    ):
        sources.find_model(Cell(model="nowhere.gguf"))


# Estimates and the reference


def test_bits_of_made_files_are_estimated_in_their_order() -> None:
    made = schemes_of("llama_cpp")
    assert [SCHEMES[quant].backend for quant in made] == ["llama_cpp"] * 7
    shape = models.PRESETS["smollm2-1.7b"].shape
    sizes = [shape.weight_bytes(quant) for quant in made]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == round(shape.parameters * 8.5 / 8)
    assert all(model_shape.load_memory_estimate(shape, quant) == shape.weight_bytes(quant) for quant in made)


def test_quality_is_measured_against_the_checkpoint_in_transformers() -> None:
    made = quality_reference.sibling(Cell(model="/models/m", quant="q4_k_m", backend="llama_cpp", kv_cache="q8_0"))
    assert made == quality_reference.sibling(Cell(model="/models/m", quant="int8"))
    named = quality_reference.sibling(Cell(model="/models/m.gguf", backend="llama_cpp", revision="v1"), "owner/name")
    assert (named.model, named.backend, named.revision, named.quant) == ("owner/name", "transformers", "main", "none")


def test_a_model_with_a_quantized_cache_is_not_the_reference_itself(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path))
    environment = {"hashes": {"env": "e"}}
    found = {}
    for cache in (None, "fp8"):
        cell = Cell(model=str(tiny_model), kv_cache=cache, workload="qa")
        facts = TransformersBackend.resolve(cell)
        file = quality_reference._file(cell, facts, load_text("bundled"), "e")
        file.parent.mkdir(exist_ok=True)
        file.touch()  # it is there, so that nothing is computed
        order = quality_order.order(
            Task((cell,), facts, (tmp_path / "cell",), Options(quality="auto")),
            lambda event: None,
            environment,
            Limits(),
        )
        assert order and order.references == {"qa": str(file)}
        found[cache] = order.is_reference
    assert found == {None: True, "fp8": False}


class Spelling:
    """A tokenizer whose ids are letters, from `first` on."""

    def __init__(self, first: str) -> None:
        self.first = first

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {chr(ord(self.first) + i)}" for i in ids)


def test_models_whose_ids_mean_other_words_are_told_apart(tmp_path: Path) -> None:
    known = scoring.Reference(
        tmp_path, "the checkpoint", "", (), (), ((), ()), {str(i): chr(97 + i) for i in range(26)}
    )
    assert scoring.same_words(Spelling("a"), known)
    assert not scoring.same_words(Spelling("b"), known)


# Memory


def test_layers_on_the_gpu_are_a_fact_of_their_own() -> None:
    lines = ["load_tensors: offloading output layer to GPU", "load_tensors: offloaded 33/33 layers to GPU"]
    assert offloaded_in(lines) == {"model.gpu_layers": "33/33"}  # the device stays a device: cuda:1
    assert offloaded_in([]) == {}


def test_weights_in_the_mapping_are_those_with_no_buffer_of_their_own() -> None:
    log = [
        "load_tensors:   CPU_Mapped model buffer size =   200.00 MiB",
        "load_tensors:   CPU_REPACK model buffer size =    50.25 MiB",
        "llama_context:        CPU  output buffer size =     1.00 MiB",
    ]
    mib = 1024 * 1024
    assert buffers_in(log) == {"CPU_Mapped": 200 * mib, "CPU_REPACK": round(50.25 * mib)}
    assert mapped_weights(buffers_in(log), 210 * mib) == 210 * mib - round(50.25 * mib)
    assert mapped_weights({"CPU_Mapped": 200 * mib}, 210 * mib) == 200 * mib
    assert mapped_weights({"CPU": 210 * mib}, 210 * mib) == 0


def test_every_page_of_a_mapping_becomes_resident(tmp_path: Path) -> None:
    import mmap

    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(40_000_000))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = memory.read()
        assert memory.touch_mapped([tmp_path / "other.bin"]) == 0
        assert memory.touch_mapped([file]) >= len(mapped)
        after = memory.read()
        assert before
        assert after
        assert after.rss - before.rss > 35_000_000
        assert (after.anonymous or 0) - (before.anonymous or 0) < 5_000_000


# Making one


def source_package(folder: Path) -> Path:
    """A source package with a converter that knows two architectures."""
    files = {
        "convert_hf_to_gguf.py": "",
        "conversion/__init__.py": (
            'TEXT_MODEL_MAP: dict[str, str] = {"LlamaForCausalLM": "llama", "Gemma3ForCausalLM": "gemma"}\n'
        ),
        "src/other.cpp": "",
    }
    package = folder / "llama_cpp_python-0.0.1.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-0.0.1/vendor/llama.cpp/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return package


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(gguf_quantize.SOURCE_VARIABLE, raising=False)
    monkeypatch.setattr(gguf_quantize, "version", lambda: "0.0.1")
    (tmp_path / "cache").mkdir()
    return machine.cache_folder()


def test_the_converter_comes_from_the_source_package(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        MissingError,
        match=(
            r"Run: pip download --no-deps --no-binary llama-cpp-python -d \S+ llama-cpp-python==0\.0\.1 "
            r"\(or set LLMBENCH"
        ),
    ):
        gguf_quantize.source_tree()
    assert runtime.converter_item().status == "missing"
    source_package(own_cache)
    tree = gguf_quantize.source_tree()
    assert tree.is_relative_to(own_cache)
    assert not (tree / "src").exists()
    assert gguf_quantize.architectures(tree) == {"LlamaForCausalLM", "Gemma3ForCausalLM"}
    assert runtime.converter_item().found.endswith("2 architectures")
    gguf_quantize.check_architecture(Cell(), "LlamaForCausalLM")
    with pytest.raises(ModelError, match=r"llama\.cpp has no architecture OPTForCausalLM, so opt-125m cannot"):
        gguf_quantize.check_architecture(Cell(), "OPTForCausalLM")
    monkeypatch.setenv(gguf_quantize.SOURCE_VARIABLE, str(tmp_path))
    with pytest.raises(MissingError, match="is neither a source tree of llama.cpp"):
        gguf_quantize.source_tree()
    monkeypatch.setenv(gguf_quantize.SOURCE_VARIABLE, str(tree))
    assert gguf_quantize.source_tree() == tree


def test_a_broken_source_package_is_one_line(own_cache: Path) -> None:
    (own_cache / "llama_cpp_python-0.0.1.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(MissingError, match=r"The source package \S+ cannot be read: .*Download it again"):
        gguf_quantize.source_tree()


def test_a_made_file_is_named_by_what_decides_its_content(own_cache: Path) -> None:
    model = ModelFacts("m", "folder", "/m", "c0ffee", dtype="bfloat16")
    cell = Cell(backend="llama_cpp", model="/m")
    assert gguf_quantize.out_type(cell, model) == "bf16"
    assert gguf_quantize.file_of(cell, model) == gguf_quantize.file_of(dataclasses.replace(cell, quant="bf16"), model)
    files = {
        gguf_quantize.file_of(dataclasses.replace(cell, quant=quant), model)
        for quant in ("bf16", "fp16", *schemes_of("llama_cpp"))
    }
    assert len(files) == 9
    other = dataclasses.replace(model, revision="other")
    assert gguf_quantize.file_of(cell, other) != gguf_quantize.file_of(cell, model)


def test_a_checkpoint_without_a_tokenizer_gets_one_that_only_counts(tiny_model: Path, tmp_path: Path) -> None:
    folder = gguf_convert._without_tokenizer(tiny_model, tmp_path)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 512


def test_a_tokenizers_own_code_does_not_run_because_the_converter_trusts_it(tiny_model: Path, tmp_path: Path) -> None:
    """llama.cpp's converter gives `trust_remote_code=True` for some architectures."""
    folder, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Tokenizer: ...\n")
    own = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    code = (
        "import contextlib, sys; from mlflow_llmbench.backends.llamacpp.gguf_convert import trust_code\n"
        "from transformers import AutoTokenizer\n"
        "trusted = sys.argv[2] == 'true'\n"
        "trust_code(trusted)\n"
        "with contextlib.suppress(Exception):\n"
        "    AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=not trusted)\n"
    )
    for trusted in ("false", "true"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), trusted],
            env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
        )
        assert trace.exists() == (trusted == "true"), done.stderr


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    def fail(scratch: Path) -> dict[str, str | int | float]:
        scratch.write_bytes(b"half")
        raise ModelError("No.")

    with pytest.raises(ModelError):
        gguf_quantize._write(tmp_path / "m.gguf", fail)
    assert not list(tmp_path.iterdir())
