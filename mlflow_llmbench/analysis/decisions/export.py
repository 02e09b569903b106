"""Export a registered configuration: command or manifest to serve it elsewhere, with its measurements as a comment.

Another engine is not the measured one: batching, kernels and memory differ, and the comment says so. If an engine
cannot serve a configuration as measured (bitsandbytes in vLLM, a checkpoint in llama.cpp), that is an error: the
quantization is never replaced silently.

The options are those of vLLM 0.33 and SGLang 0.5.23, from their packages; of llama.cpp, from the sources in
llama-cpp-python 0.3.36; and of text-generation-inference, from its published list. None of these servers was started.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...records.backends import CHECKPOINT, GGUF_FILE, library_of, recorded_capabilities
from ...records.errors import UsageError
from ...records.metric import ExportComment
from ...records.metrics import shown_in
from ...records.quantizations import BITSANDBYTES, MIXED, SCHEMES, UNPACKED, Scheme
from ...records.text import known_words

Config = Mapping[str, Any]
TGI_THRESHOLD = 6.0
"""TGI computes activations above this in 16 bits: a constant there, like the double quantization of 4-bit weights.

Source: `server/…/layers/bnb.py`.
"""

Options = dict[str, str | None]
"""Option → its value, None for a flag; in the order of the command."""


def export(config: Config, requirements: tuple[str, ...] = (), *, uri: str, target: str) -> str:
    """Return the text of `target` for the `model_config` of a version at `uri`.

    Raises UsageError for an unknown target and for configurations that the target cannot serve.
    """
    if target not in TARGETS:
        raise UsageError(f"Unknown target: {target}. {known_words(target, TARGETS)}")
    kind, gguf = TARGETS[target], _engine(config) == GGUF_FILE.engine
    if not _engine(config):
        raise UsageError(
            f"{uri} was measured with backend={config['backend']}, and there is nothing to serve. Register a run of a "
            "real model."
        )
    if gguf and kind.form == "script":
        raise UsageError(
            f"{uri} was measured with llama.cpp, and {target} would unpack its file. Export for llama.cpp or a "
            "container."
        )
    if config["quant"] == MIXED:
        raise UsageError(
            f"{uri} is quantized block by block, which {target} cannot be told. Serve it with: mlflow models serve -m "
            f"{uri}"
        )
    if _quantizes(config) and not _scheme(config).engines and kind.reads_checkpoints:
        raise UsageError(
            f"{target} cannot be told to make quant={config['quant']} as it was measured. Serve it with: mlflow models "
            f"serve -m {uri}"
        )
    if config.get("tokenizer") and kind.form == "server" and kind.reads_checkpoints:
        raise UsageError(
            f"{uri} runs a checkpoint that was made here and has no tokenizer of its own. Serve it with: mlflow models "
            f"serve -m {uri}"
        )
    if gguf and config["device"] != "cpu" and kind.form == "container":
        raise UsageError(
            f"{uri} was measured on a GPU, and the image of this {target} has no CUDA build of llama.cpp. Export for "
            "llama.cpp."
        )
    comment = "".join(f"# {line}\n" for line in _measured(config, uri, target))
    return comment + kind.write(config, uri, requirements)


def _scheme(config: Config) -> Scheme:
    """The scheme of a version; `none` if this program does not know it (a version of a later one)."""
    return SCHEMES.get(config["quant"], SCHEMES["none"])


def _quantizes(config: Config) -> bool:
    """Return True if the version's checkpoint is quantized while it is loaded."""
    return config["quantization"] not in ({}, UNPACKED)


def _engine(config: Config) -> str:
    """What serves a version; versions of earlier releases name only the backend. Empty if nothing does."""
    serving = recorded_capabilities(config["backend"]).serving
    return str(config.get("engine") or (serving.engine if serving else ""))


def _measured(config: Config, uri: str, target: str) -> list[str]:
    """Lines of a comment with the measurements."""
    found, needs = config["measured"], config["needs"]
    figures = [
        f"{found[entry.key] * entry.scale:.4g} {entry.words}" for entry in shown_in(ExportComment) if entry.key in found
    ]
    peak = needs["peak_memory_bytes"]
    figures += [f"{peak / 1e9:.3g} GB of {needs['memory_of']} memory"] if peak else []
    shape = f"{config['batch_size']} rows, up to {config['max_prompt_tokens']} + {config['max_new_tokens']} tokens"
    lines = [
        f"{uri}: {config['model']}, quant={config['quant']}, revision {config['revision']}",
        f"Measured with {library_of(config['backend'])} on {needs['measured_on']}: {', '.join(figures)} ({shape}).",
        f"Evidence: run {config['evidence']['run_id']}, verdict {config['evidence']['verdict']}.",
    ]
    if TARGETS[target].form != "server":
        return lines
    if target == library_of(config["backend"]):
        lines.append(
            "Measured in one process; the server adds its own time and batches requests as they come: `llmbench "
            "online` measures that."
        )
    else:
        lines.append(f"{target} is another engine: these figures are not its own. Measure it before you rely on them.")
    return lines


def _command(program: list[str], options: Options) -> str:
    """A shell command, one option a line."""
    lines = [" ".join(map(shlex.quote, program))]
    lines += [name if value is None else f"{name} {shlex.quote(value)}" for name, value in options.items()]
    return " \\\n  ".join(lines) + "\n"


def _from_hub(config: Config) -> bool:
    return config["source"] in ("hub", "preset", "hub_gguf")


def _tokens(config: Config) -> int:
    return int(config["max_prompt_tokens"] or 0) + int(config["max_new_tokens"])


def _no_gguf(config: Config, target: str) -> None:
    if config["gguf_file"]:
        raise UsageError(f"{target} is not offered for GGUF files. Export for llama.cpp or transformers.")


def _cannot(config: Config, target: str, why: str) -> UsageError:
    return UsageError(
        f"{target} cannot serve quant={config['quant']} as it was measured: {why}. Export for transformers, or measure "
        "another quantization."
    )


def _dtype(config: Config) -> str:
    """The compute dtype, because `auto` in these engines turns a float32 checkpoint into float16."""
    return str(config["compute_dtype"] or config["dtype"])


def _vllm(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    _no_gguf(config, "vllm")
    if _scheme(config).library is BITSANDBYTES or config.get("method") == BITSANDBYTES.method:
        raise _cannot(config, "vllm", "it has no bitsandbytes any more (seen in 0.33)")
    options: Options = {"--revision": config["revision"]} if _from_hub(config) else {}
    options |= {
        "--dtype": _dtype(config),
        "--max-model-len": str(_tokens(config)),
        "--max-num-seqs": str(config["batch_size"]),
    }
    options |= {"--generation-config": "vllm"}  # as measured: without the checkpoint's sampling defaults
    options |= {"--trust-remote-code": None} if config["trust_remote_code"] else {}
    return _command(["vllm", "serve", config["location"]], options)


def _double_quantized(config: Config, engine: str) -> str:
    """Comment for an engine that also quantizes the block maxima of 4-bit weights, if the measured model does not."""
    if config["quantization"].get("bnb_4bit_use_double_quant"):
        return ""
    kind = str(config["quantization"]["bnb_4bit_quant_type"]).upper()
    return (
        f"# {engine} makes {kind} with block maxima that are quantized too, which was not measured: a little smaller "
        "and less exact.\n"
    )


def _sglang(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    _no_gguf(config, "sglang")
    kind = _scheme(config).engines.get("sglang")
    if _quantizes(config) and not kind:
        raise _cannot(config, "sglang", "of bitsandbytes it makes NF4 only")
    note = _double_quantized(config, "SGLang") if kind else ""
    options: Options = {"--model-path": config["location"]} | (
        {"--revision": config["revision"]} if _from_hub(config) else {}
    )
    options |= {
        "--dtype": _dtype(config),
        "--context-length": str(_tokens(config)),
        "--max-running-requests": str(config["batch_size"]),
    }
    options |= {"--quantization": kind, "--load-format": kind} if kind else {}
    options |= {"--sampling-defaults": "openai"}
    options |= {"--trust-remote-code": None} if config["trust_remote_code"] else {}
    return note + _command(["python", "-m", "sglang.launch_server"], options)


def _tgi(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    _no_gguf(config, "tgi")
    kind = _scheme(config).engines.get("tgi")
    options: Options = {"--model-id": config["location"]} | (
        {"--revision": config["revision"]} if _from_hub(config) else {}
    )
    threshold = config["quantization"].get("llm_int8_threshold", TGI_THRESHOLD)
    if threshold != TGI_THRESHOLD:
        raise _cannot(config, "tgi", f"its threshold of LLM.int8 is {TGI_THRESHOLD:g}, and {threshold:g} was measured")
    note = _double_quantized(config, "TGI") if "bnb_4bit_quant_type" in config["quantization"] else ""
    if kind:
        options["--quantize"] = kind  # without --dtype: only one of them may be given
    elif _dtype(config) in ("float16", "bfloat16"):
        options["--dtype"] = _dtype(config)
    else:
        raise _cannot(config, "tgi", "it computes in float16 or bfloat16")
    prompt, batch = int(config["max_prompt_tokens"] or 1), int(config["batch_size"])
    options |= {
        "--max-input-tokens": str(prompt),
        "--max-total-tokens": str(_tokens(config)),
        "--max-batch-size": str(batch),
    }
    options |= {
        "--max-batch-prefill-tokens": str(prompt * batch),
        "--max-batch-total-tokens": str(_tokens(config) * batch),
    }
    options |= {"--trust-remote-code": None} if config["trust_remote_code"] else {}
    return note + _command(["text-generation-launcher"], options)


def _llama_cpp(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    if not config["gguf_file"]:
        raise UsageError(
            f"llama.cpp serves GGUF files, and {uri} was measured from {config['location']}. Measure a .gguf file, or "
            "export for another target."
        )
    slots = int(config["batch_size"])
    note = f"# --hf-file takes the newest revision; {config['revision']} was measured.\n" if _from_hub(config) else ""
    options: Options = (
        {"--hf-repo": config["location"], "--hf-file": config["gguf_file"]}
        if _from_hub(config)
        else {"--model": f"{config['location']}/{config['gguf_file']}"}
    )
    options |= {"--parallel": str(slots), "--ctx-size": str(_tokens(config) * slots)}
    options |= {"--n-predict": str(config["max_new_tokens"]), "--temp": "0"}
    options |= {"--threads": str(config["threads"])} if config["threads"] else {}
    layers = 0 if config["device"] == "cpu" else config.get("gpu_layers")
    options |= {} if layers is None else {"--n-gpu-layers": str(layers)}
    if _engine(config) == CHECKPOINT.engine:
        note += "# transformers unpacked this file; llama.cpp runs it packed, with other memory use and speed.\n"
        return note + _command(["llama-server"], options)
    options |= (
        {"--cache-type-k": config["kv_cache"], "--cache-type-v": config["kv_cache"]}
        if config["kv_cache"] != "f16"
        else {}
    )
    options |= {"--flash-attn": "off"} if config["attention"] == "eager" else {}
    options |= {} if config["mmap"] else {"--load-mode": "none"}
    return note + _command(["llama-server"], options)


def _transformers(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    """A Python script that loads and generates as measured."""
    settings = dict(config["quantization"])
    kind = settings.pop("class", None)
    named = {"revision": config["revision"]} if _from_hub(config) else {}
    named |= {"gguf_file": config["gguf_file"]} if config["gguf_file"] else {}
    arguments = [f"dtype={config['dtype']!r}", f"device_map={{'': {config['device']!r}}}"]
    arguments += [f"attn_implementation={config['attention']!r}"] if config["attention"] != "auto" else []
    arguments += [f"quantization_config={kind}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"] if kind else []
    arguments += ["trust_remote_code=True"] if config["trust_remote_code"] else []
    arguments += [f"{name}={value!r}" for name, value in named.items()]
    names = ", ".join(sorted(["AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", *([kind] if kind else [])]))
    threads = f"torch.set_num_threads({config['threads']})\n" if config["threads"] else ""
    texts, words = "location", named
    if other := config.get("tokenizer"):
        texts, words = repr(other["location"]), {"revision": other["revision"]} if other["revision"] else {}
    files = "".join(f", {name}={value!r}" for name, value in words.items())
    return f"""{"import torch" + chr(10) if threads else ""}from transformers import {names}

{threads}location = {config["location"]!r}
tokenizer = AutoTokenizer.from_pretrained({texts}{files})
model = AutoModelForCausalLM.from_pretrained(location, {", ".join(arguments)})
end = model.generation_config.eos_token_id
model.generation_config = GenerationConfig()  # as measured: greedy, without the checkpoint's sampling and penalties
prompt = tokenizer("Hello", return_tensors="pt").to(model.device)
output = model.generate(
    **prompt,
    max_new_tokens={config["max_new_tokens"]},
    do_sample=False,
    eos_token_id=end,
    pad_token_id=tokenizer.pad_token_id or 0,
)
print(tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _serving(config: Config, uri: str, requirements: tuple[str, ...]) -> list[str]:
    """Shell command of a container that serves the registered version itself."""
    packages = " ".join(map(shlex.quote, requirements))
    serve = f"mlflow models serve -m {shlex.quote(uri)} --env-manager local -h 0.0.0.0 -p 5000 -w 1"
    return ["sh", "-c", f"pip install --no-cache-dir {packages} && exec {serve}"]


def _image(config: Config) -> str:
    return "python:3.11" if _engine(config) == GGUF_FILE.engine else "python:3.11-slim"  # llama-cpp-python is compiled


def _memory_mib(config: Config) -> int:
    """Memory to reserve in MiB: the measured peak plus 25 %.

    It is not a limit, because memory for loading and for the server was not measured.
    """
    return int((config["needs"]["peak_memory_bytes"] or 0) * 1.25 / 2**20) + 1


def _docker_compose(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    on_gpu = config["device"] != "cpu"
    service: dict[str, Any] = {
        "image": _image(config),
        "command": [part.replace("$", "$$") for part in _serving(config, uri, requirements)],
        "environment": {"MLFLOW_TRACKING_URI": "${MLFLOW_TRACKING_URI:?the MLflow server that holds the version}"},
        "ports": ["5000:5000"],
        "volumes": ["huggingface:/root/.cache/huggingface", *_local_volume(config)],
    }
    if on_gpu:
        service["deploy"] = {
            "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}}
        }
    else:
        service["mem_reservation"] = f"{_memory_mib(config)}m"
    return _yaml({"services": {"model": service}, "volumes": {"huggingface": None}})


def _local_volume(config: Config) -> list[str]:
    other = config.get("tokenizer")
    places = [] if _from_hub(config) else [config["location"]]
    places += [other["location"]] if other and not other["revision"] else []
    return [f"{place}:{place}:ro" for place in places]


def _kubernetes(config: Config, uri: str, requirements: tuple[str, ...]) -> str:
    if not _from_hub(config):
        raise UsageError(
            f"{uri} was measured from local files, {config['location']}, which a cluster does not have. Measure the "
            "model from the Hub."
        )
    needs = (
        {"memory": f"{_memory_mib(config)}Mi"} if config["needs"]["memory_of"] == "host" else {"nvidia.com/gpu": "1"}
    )
    labels = {"app": "llmbench-model"}
    container = {
        "name": "model",
        "image": _image(config),
        "command": _serving(config, uri, requirements),
        "env": [
            {"name": "MLFLOW_TRACKING_URI", "valueFrom": {"configMapKeyRef": {"name": "mlflow", "key": "tracking-uri"}}}
        ],
        "ports": [{"containerPort": 5000}],
        "readinessProbe": {"httpGet": {"path": "/ping", "port": 5000}},
        "resources": {"requests": needs} if "memory" in needs else {"limits": needs},
    }
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "llmbench-model"},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "llmbench-model"},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 5000}]},
    }
    return "---\n".join(_yaml(part) for part in (deployment, service))


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(json.loads(json.dumps(data)), sort_keys=False, width=140, allow_unicode=True))


@dataclass(frozen=True)
class Target:
    """A target of the export.

    `write`: function that writes its text. `form`: a command of a `server`, a Python `script`, or a `container` that
    serves the registered version itself. `reads_checkpoints`: it loads a checkpoint, and quantizes it if told so.
    """

    write: Callable[[Config, str, tuple[str, ...]], str]
    form: str
    reads_checkpoints: bool = False


TARGETS = {
    "vllm": Target(_vllm, "server", reads_checkpoints=True),
    "tgi": Target(_tgi, "server", reads_checkpoints=True),
    "sglang": Target(_sglang, "server", reads_checkpoints=True),
    "llama.cpp": Target(_llama_cpp, "server"),
    "transformers": Target(_transformers, "script", reads_checkpoints=True),
    "docker-compose": Target(_docker_compose, "container"),
    "kubernetes": Target(_kubernetes, "container"),
}
