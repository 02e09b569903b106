"""Commands and manifests for other servers: exact text, refusals, and the Python script run for real."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of
from mlflow_llmbench.analysis.decisions.export import TARGETS, export
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import LoadInfo, ModelFacts, Verdict
from mlflow_llmbench.tracking.registry import register
from mlflow_llmbench.tracking.store import open_store

from ...results import made, stored

OPTIONS = {
    "vllm": ["--revision", "--dtype", "--max-model-len", "--max-num-seqs", "--generation-config",
             "--trust-remote-code"],
    "sglang": ["--model-path", "--revision", "--dtype", "--context-length", "--max-running-requests", "--quantization",
               "--load-format", "--sampling-defaults", "--trust-remote-code"],
    "tgi": ["--model-id", "--revision", "--quantize", "--dtype", "--max-input-tokens", "--max-total-tokens",
            "--max-batch-size", "--max-batch-prefill-tokens", "--max-batch-total-tokens", "--trust-remote-code"],
    "llama.cpp": ["--model", "--parallel", "--ctx-size", "--n-predict", "--temp", "--threads", "--n-gpu-layers",
                  "--hf-repo", "--hf-file", "--cache-type-k", "--cache-type-v", "--load-mode", "--flash-attn"],
}  # fmt: skip
"""Options of the programs, from the packages vllm 0.33.0 and sglang 0.5.23, llama.cpp's sources, TGI's own list."""

REFUSED = {"vllm": ("int8", "int4", "fp4"), "sglang": ("int8", "fp4")}

FACTS = {
    "int4": {"quant.type": "nf4", "quant.compute_dtype": "bfloat16"},
    "fp4": {"quant.type": "fp4", "quant.compute_dtype": "bfloat16"},
    "int8": {"quant.threshold": 6.0},
}


def config(quant: str = "bf16", source: str = "hub", dtype: str = "bfloat16", **cell: Any) -> dict[str, Any]:
    location = {"hub": "google/gemma-3-270m", "folder": "/models/own", "gguf": "/models/gemma.gguf"}[source]
    result = made(
        batch=4,
        cell=Cell(model=location, quant=quant, batch_size=4, prompt_tokens=8, output_tokens=5, **cell),
        model=ModelFacts(location, source, location, "c0ffee"),
        load=LoadInfo(1.0, facts={"model.dtype": dtype, **FACTS.get(quant, {})}),
    )
    return dict(deployment_of(result, summarize(result), Evidence("r" * 32, "s", Verdict("valid"))).config)


def packed(source: str = "folder", **cell: Any) -> dict[str, Any]:
    """The configuration of a file that llama.cpp made of a checkpoint, or of one on the Hub."""
    location = {"folder": "/models/own", "hub_gguf": "ggml-org/gemma-3-270m-GGUF:sub/gemma-Q4_K_M.gguf"}[source]
    facts = {
        "quant.type": "Q4_K - Medium",
        "kv_cache.type": cell.get("kv_cache", "f16"),
        "llama_cpp.threads": 2,
        "model.device": "cpu",
    }
    result = made(
        batch=4,
        model=ModelFacts(location, source, location, "c0ffee"),
        cell=Cell(
            model="own", backend="llama_cpp", quant="q4_k_m", batch_size=4, prompt_tokens=8, output_tokens=5, **cell
        ),
        load=LoadInfo(1.0, facts=facts, made="/cache/own-q4_k_m.gguf"),
    )
    return dict(deployment_of(result, summarize(result), Evidence("r" * 32, "s", Verdict("valid"))).config)


def write(target: str, *arguments: Any, **named: Any) -> str:
    return export(
        config(*arguments, **named), ("mlflow==3.17.2", "torch==2.13.0"), uri="models:/support-bot/3", target=target
    )


def command(text: str) -> list[str]:
    return shlex.split(
        "".join(line for line in text.replace("\\\n", " ").splitlines(keepends=True) if not line.startswith("#"))
    )


def test_the_comment_says_what_was_measured_and_that_another_engine_was_not() -> None:
    lines = write("vllm").splitlines()
    assert lines[0] == "# models:/support-bot/3: google/gemma-3-270m, quant=bf16, revision c0ffee"
    assert lines[1].startswith(
        "# Measured with transformers on AMD EPYC: 333.4 output tokens/s, 20 ms to the first token (median), "
        "10 ms per token after it (mean), 4 GB"
    )
    assert lines[1].endswith("(4 rows, up to 8 + 5 tokens).")
    assert lines[3] == "# vllm is another engine: these figures are not its own. Measure it before you rely on them."
    assert "another engine" not in write("transformers")


@pytest.mark.parametrize("target", ["llama.cpp", "docker-compose"])
def test_a_version_of_an_earlier_release_names_only_its_backend(target: str) -> None:
    now = packed()
    before = {name: value for name, value in now.items() if name != "engine"}
    assert export(before, (), uri="models:/m/1", target=target) == export(now, (), uri="models:/m/1", target=target)


def test_the_commands() -> None:
    assert command(write("vllm", trust_remote_code=True)) == shlex.split(
        "vllm serve google/gemma-3-270m --revision c0ffee --dtype bfloat16 --max-model-len 13 --max-num-seqs 4 "
        "--generation-config vllm --trust-remote-code"
    )
    assert command(write("sglang", "int4", "folder")) == shlex.split(
        "python -m sglang.launch_server --model-path /models/own --dtype bfloat16 --context-length 13 "
        "--max-running-requests 4 --quantization bitsandbytes --load-format bitsandbytes --sampling-defaults openai"
    )
    assert "block maxima that are quantized too" in write("sglang", "int4")
    assert command(write("tgi", "int8")) == shlex.split(
        "text-generation-launcher --model-id google/gemma-3-270m --revision c0ffee --quantize bitsandbytes "
        "--max-input-tokens 8 --max-total-tokens 13 --max-batch-size 4 --max-batch-prefill-tokens 32 "
        "--max-batch-total-tokens 52"
    )
    assert command(write("llama.cpp", "bf16", "gguf", threads=2, device="cpu")) == shlex.split(
        "llama-server --model /models/gemma.gguf --parallel 4 --ctx-size 52 --n-predict 5 --temp 0 --threads 2 "
        "--n-gpu-layers 0"
    )


def test_settings_of_bitsandbytes_that_an_engine_does_not_take_are_said_or_refused() -> None:
    """TGI has one threshold for LLM.int8 and, like SGLang, quantizes the block maxima of 4-bit weights."""
    for target in ("sglang", "tgi"):
        assert "makes NF4 with block maxima that are quantized too, which was not measured" in write(target, "int4")
        double = config("int4") | {
            "quantization": {**config("int4")["quantization"], "bnb_4bit_use_double_quant": True}
        }
        assert "block maxima" not in export(double, uri="models:/bot/1", target=target)
    assert "# TGI makes FP4 with block maxima that are quantized too" in write("tgi", "fp4")
    other = config("int8") | {"quantization": {**config("int8")["quantization"], "llm_int8_threshold": 0.0}}
    with pytest.raises(
        UsageError,
        match=r"tgi cannot serve quant=int8 as it was measured: its threshold of LLM\.int8 is 6, and 0 was measured",
    ):
        export(other, uri="models:/bot/1", target="tgi")
    assert "llm_int8_threshold=0.0" in export(other, uri="models:/bot/1", target="transformers")


def test_what_llama_cpp_ran_is_exported_for_its_own_server() -> None:
    text = export(packed(kv_cache="q8_0", mmap=False), uri="models:/bot/1", target="llama.cpp")
    assert "# Measured with llama.cpp on AMD EPYC" in text
    assert "another engine" not in text
    assert command(text) == shlex.split(
        "llama-server --model /cache/own-q4_k_m.gguf --parallel 4 --ctx-size 52 --n-predict 5 --temp 0 --threads 2 "
        "--n-gpu-layers 0 --cache-type-k q8_0 --cache-type-v q8_0 --load-mode none"
    )
    hub = export(packed("hub_gguf"), uri="models:/bot/1", target="llama.cpp")
    assert "--hf-repo ggml-org/gemma-3-270m-GGUF \\\n  --hf-file sub/gemma-Q4_K_M.gguf" in hub
    assert "takes the newest revision; c0ffee was measured" in hub
    assert {part for part in command(text) + command(hub) if part.startswith("--")} <= set(OPTIONS["llama.cpp"])
    compose = yaml.safe_load(
        export(packed(), ("llama-cpp-python==0.3.36",), uri="models:/bot/1", target="docker-compose")
    )["services"]["model"]
    assert (compose["image"], compose["volumes"][-1]) == ("python:3.11", "/cache:/cache:ro")
    assert "--flash-attn off" in export(packed(attention="eager"), uri="models:/bot/1", target="llama.cpp").replace(
        " \\\n  ", " "
    )
    on_gpu = packed() | {"device": "cuda"}
    with pytest.raises(
        UsageError, match="was measured on a GPU, and the image of this docker-compose has no CUDA build"
    ):
        export(on_gpu, uri="models:/bot/1", target="docker-compose")
    with pytest.raises(UsageError, match="was measured with llama.cpp, and transformers would unpack its file"):
        export(packed(), uri="models:/bot/1", target="transformers")


def test_a_checkpoint_that_was_made_here_takes_its_tokenizer_from_where_it_came() -> None:
    result = made(
        cell=Cell(model="m", quant="gptq", output_tokens=5),
        model=ModelFacts("m", "folder", "/models/own", "c0ffee"),
        load=LoadInfo(1.0, facts={"model.dtype": "bfloat16", "quant.method": "gptq"}, made="/cache/own-gptq"),
    )
    settings = dict(deployment_of(result, summarize(result), Evidence("r" * 32, "s", Verdict("valid"))).config)
    script = export(settings, uri="models:/bot/1", target="transformers")
    assert "AutoTokenizer.from_pretrained('/models/own')" in script
    assert "location = '/cache/own-gptq'" in script
    compose = yaml.safe_load(export(settings, uri="models:/bot/1", target="docker-compose"))["services"]["model"]
    assert compose["volumes"][1:] == ["/cache/own-gptq:/cache/own-gptq:ro", "/models/own:/models/own:ro"]
    with pytest.raises(
        UsageError,
        match="was made here and has no tokenizer of its own. Serve it with: mlflow models serve -m models:/bot/1",
    ):
        export(settings, uri="models:/bot/1", target="vllm")


def test_a_checkpoint_of_its_own_dtype_is_not_left_to_what_an_engine_calls_auto() -> None:
    assert "--dtype float32" in write("vllm", "none", dtype="float32")
    assert "--dtype float16" in write("tgi", "none", dtype="float16")


@pytest.mark.parametrize("target", OPTIONS)
@pytest.mark.parametrize("quant", ["none", "bf16", "int8", "int4", "fp4"])
def test_every_option_is_one_that_the_program_has(target: str, quant: str) -> None:
    source = "gguf" if target == "llama.cpp" else "hub"
    if quant in REFUSED.get(target, ()):
        with pytest.raises(UsageError, match=f"{target} cannot serve quant={quant} as it was measured"):
            write(target, quant)
    else:
        parts = command(write(target, quant, source, trust_remote_code=True))
        assert {part for part in parts if part.startswith("--")} <= set(OPTIONS[target])


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("vllm", ("int4",), "vllm cannot serve quant=int4 as it was measured: it has no bitsandbytes any more"),
        ("sglang", ("int8",), "sglang cannot serve quant=int8 as it was measured: of bitsandbytes it makes NF4 only"),
        (
            "tgi",
            ("fp32", "hub", "float32"),
            "tgi cannot serve quant=fp32 as it was measured: it computes in float16 or bfloat16",
        ),
        ("vllm", ("bf16", "gguf"), "vllm is not offered for GGUF files"),
        (
            "llama.cpp",
            ("bf16",),
            "llama.cpp serves GGUF files, and models:/support-bot/3 was measured from google/gemma-3-270m",
        ),
        ("kubernetes", ("bf16", "folder"), "was measured from local files, /models/own, which a cluster does not have"),
        (
            "ollama",
            (),
            r"Unknown target: ollama. Did you mean llama.cpp\? Known: vllm, tgi, sglang, llama.cpp, transformers",
        ),
    ],
)
def test_what_a_target_cannot_do_is_refused(target: str, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write(target, *arguments)


def test_the_manifests_are_yaml_that_serves_exactly_this_version() -> None:
    compose = yaml.safe_load(write("docker-compose", "bf16", "folder", device="cpu"))["services"]["model"]
    assert compose["command"][2] == (
        "pip install --no-cache-dir mlflow==3.17.2 torch==2.13.0 && exec mlflow models serve "
        "-m models:/support-bot/3 --env-manager local -h 0.0.0.0 -p 5000 -w 1"
    )
    assert compose["mem_reservation"] == "4769m"  # 4 GB and a quarter
    assert "/models/own:/models/own:ro" in compose["volumes"]
    deployment, service = yaml.safe_load_all(write("kubernetes", device="cpu"))
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"memory": "4769Mi"}}
    assert container["command"] == compose["command"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_the_script_for_transformers_answers(tiny_model: Path, tmp_path: Path) -> None:
    given = config("int8", "folder", device="cpu", threads=1) | {"location": str(tiny_model)}
    script = tmp_path / "serve.py"
    script.write_text(export(given, uri="models:/support-bot/3", target="transformers"))
    assert "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)" in script.read_text()
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_the_command_reads_the_registered_version(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = made(
        cell=Cell(model="owner/name", quant="bf16", prompt_tokens=8, output_tokens=5),
        model=ModelFacts("owner/name", "hub", "owner/name", "c0ffee"),
        load=LoadInfo(1.0, facts={"model.dtype": "bfloat16"}),
    )
    [run] = stored(tmp_path / "sweep", store_uri, result)
    register(open_store(store_uri), run, "support-bot")
    capsys.readouterr()
    assert main(["export", "models:/support-bot@candidate", "--for", "vllm", "--output", "serve.sh"]) == 0
    assert capsys.readouterr().out == "Written: serve.sh\n"
    assert command(Path("serve.sh").read_text())[:5] == ["vllm", "serve", "owner/name", "--revision", "c0ffee"]
    assert main(["export", "models:/support-bot/1", "--for", "docker-compose"]) == 0
    assert "torch==2.12.0 transformers==5.0 &&" in " ".join(capsys.readouterr().out.split())
    assert main(["export", "models:/support-bot/1", "--for", "ollama"]) == 2
    [fake] = stored(tmp_path / "fake", store_uri, made())
    register(open_store(store_uri), fake, "other")
    capsys.readouterr()
    assert main(["export", "models:/other/1", "--for", "vllm"]) == 2
    assert "measured with backend=fake, and there is nothing to serve" in capsys.readouterr().err


def test_help_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    assert all(target in text for target in TARGETS)
