"""Parameters as text: accepted values, and the error line for all others."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_llmbench.config.cells import asked_params
from mlflow_llmbench.config.spec import parse, read_yaml
from mlflow_llmbench.records.cell import PARAMETERS, default_text, split_list
from mlflow_llmbench.records.errors import UsageError


def test_defaults_are_those_of_the_vocabulary() -> None:
    assert {name: default_text(name) for name in PARAMETERS} == {
        "model": "opt-125m",
        "weights": "hub",
        "revision": "main",
        "backend": "transformers",
        "quant": "none",
        "group_size": "128",
        "quant_budget": "none",
        "quant_plan": "none",
        "prune": "none",
        "int8_threshold": "6",
        "double_quant": "false",
        "kv_cache": "auto",
        "assistant": "none",
        "draft_tokens": "10",
        "batch_size": "1",
        "prompt_tokens": "128",
        "output_tokens": "128",
        "workload": "synthetic",
        "history": "none",
        "warmup": "auto",
        "repetitions": "auto",
        "max_repetitions": "100",
        "precision_target": "0.02",
        "processes": "1",
        "device": "auto",
        "threads": "auto",
        "tensor_parallel": "1",
        "placement": "single",
        "worker_python": "none",
        "attention": "auto",
        "decode": "generate",
        "seed": "0",
        "trust_remote_code": "false",
        "allow_pickle": "false",
        "preset": "none",
        "output_dir": "llmbench-results",
        "on": "here",
        "price_per_hour": "none",
        "nominal_bandwidth": "none",
        "quality": "none",
        "quality_text": "bundled",
        "quality_reference": "none",
        "gpu_layers": "auto",
        "mmap": "true",
        "force": "false",
        "rerun": "false",
        "memory_limit": "auto",
        "load_timeout_s": "3600",
        "first_token_timeout_s": "3600",
        "repetition_timeout_s": "3600",
        "cell_timeout_s": "none",
        "batching": "none",
        "batch_wait_ms": "100",
        "quality_tasks": "none",
        "quality_limit": "none",
        "url": "none",
        "endpoint": "completions",
        "temperature": "0",
        "ignore_eos": "auto",
        "thinking": "auto",
        "max_tokens_field": "auto",
        "extra_body": "none",
        "headers": "none",
        "tls_ca": "none",
        "tls_cert": "none",
        "tls_key": "none",
        "proxy": "none",
        "concurrency": "1",
        "request_rate": "none",
        "arrival": "poisson",
        "burstiness": "1",
        "trace": "none",
        "prefix_tokens": "none",
        "prefix_count": "1",
        "ramp_to": "none",
        "client_processes": "auto",
        "launch": "none",
        "twin": "false",
        "find": "none",
        "attainment": "0.9",
        "slo": "none",
        "requests": "auto",
        "duration_s": "none",
        "request_timeout_s": "600",
        "slo_ttft_ms": "none",
        "slo_tpot_ms": "none",
        "slo_e2e_ms": "none",
    }


def test_lists_make_axes_and_repeated_values_count_once() -> None:
    spec = parse({"quant": "fp16,int8, int4 ,int8", "batch_size": [1, 4], "prompt_tokens": 32})
    assert spec.axes["quant"] == ("fp16", "int8", "int4")
    assert spec.axes["batch_size"] == (1, 4)
    assert spec.axes["prompt_tokens"] == (32,)
    assert spec.varied == ["quant", "batch_size"]


def test_auto_none_and_flags() -> None:
    spec = parse(
        {"threads": "auto", "price_per_hour": "none", "trust_remote_code": "yes", "repetitions": "10", "warmup": "1"}
    )
    assert spec.axes["threads"] == (None,)
    assert spec.options.price_per_hour is None
    assert spec.axes["trust_remote_code"] == (True,)
    assert spec.axes["repetitions"] == (10,)
    assert spec.axes["warmup"] == (1,)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"quant": "int44"}, (
            r"Unknown quant: int44\. Did you mean int4\? Known: none, fp32, fp16, bf16, int8, int4, fp4, gptq, "
            r"gptq3, gptq8"
        )),
        ({"backend": "tgi"}, r"Unknown backend: tgi\. Known: transformers, llama_cpp, vllm, openvino, fake"),
        ({"workload": "summarisation"}, r"Unknown workload: summarisation\. Did you mean summarization\?"),
        ({"workload": "missing.jsonl"}, r"There is no workload file missing\.jsonl"),
        ({"batch_size": "abc"}, r"batch_size is not a whole number: abc\. Give a whole number from 1\."),
        ({"batch_size": "2.5"}, r"batch_size is not a whole number: 2\.5"),
        ({"batch_size": "0"}, r"batch_size is too small: 0\. The smallest is 1\."),
        ({"output_tokens": "-3"}, r"output_tokens is too small: -3"),
        ({"batch_size": "99999999"}, r"batch_size is too large: 99999999\. The largest is 4,096\."),
        ({"precision_target": "nan"}, r"precision_target is not a number: nan"),
        ({"prompt_tokens": "inf"}, r"prompt_tokens is not a whole number: inf\. Give a whole number from 1 or auto\."),
        ({"device": "tpu"}, r"Unknown device: tpu\. Give auto, cpu, cuda, cuda:N, xpu, xpu:N or mps\."),
        ({"seed": "1,2"}, r"seed is not a whole number: 1,2"),
        ({"repetitions": [5, 6]}, r"repetitions takes one value: 5,6\. Lists are allowed for model, quant"),
        ({"quant": "int8,,int4"}, (
            r"quant has an empty value: 'int8,,int4'\. Leave the parameter out for its default \(none\)\."
        )),
        ({"quantt": "int8"}, r"Unknown parameter: quantt\. Did you mean quant\?"),
        ({"trust_remote_code": "maybe"}, r"trust_remote_code is neither true nor false: maybe"),
        ({"model": "a\nb"}, r"model has control characters"),
        ({"weights": "random", "workload": "qa"}, r"workload=qa needs a tokenizer, and weights=random has none"),
        ({"prompt_tokens": "auto"}, r"prompt_tokens=auto has no meaning for workload=synthetic"),
    ],
)  # fmt: skip
def test_bad_values_get_one_clear_line(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(parameters)
    assert re.match(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_yaml_files(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text('model: opt-125m\nquant: [int8, "int4"]\nbatch_size: 4\n')
    assert parse(read_yaml(str(file))).axes["quant"] == ("int8", "int4")
    file.write_text("- a list")
    with pytest.raises(UsageError, match="No parameters in"):
        read_yaml(str(file))
    file.write_text("on: ray\n")  # YAML 1.1 reads the name as true
    assert parse(read_yaml(str(file))).options.on == "ray"
    with pytest.raises(UsageError, match="Cannot read parameters from nowhere.yaml"):
        read_yaml("nowhere.yaml")


def test_a_comma_within_a_value_is_written_with_a_backslash(tmp_path: Path) -> None:
    assert parse({"model": r"/a\,b, opt-125m,c\,\,d"}).axes["model"] == ("/a,b", "opt-125m", "c,,d")
    assert parse({"model": ["/a,b", "opt-125m"]}).axes["model"] == ("/a,b", "opt-125m")
    asked = asked_params(parse({"model": ["/a,b", "opt-125m"], "quality_tasks": "arc_easy"}))
    assert asked["model"] == r"/a\,b,opt-125m"
    assert parse({"model": asked["model"]}).axes["model"] == ("/a,b", "opt-125m")
    (tmp_path / "x,y").mkdir()
    assert parse({"model": f"{tmp_path}/x,y"}).axes["model"] == (f"{tmp_path}/x,y",)  # since it exists
    assert parse({"model": f"{tmp_path}/x,z"}).axes["model"] == (f"{tmp_path}/x", "z")
    file = tmp_path / "a,b.yaml"
    file.write_text("task: x")
    tasks = parse({"quality_tasks": rf"{tmp_path}/a\,b.yaml, arc_easy"}).options.quality_tasks
    assert split_list(str(tasks)) == [str(file), "arc_easy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_size: [[1, 2], 3]", r"batch_size has a value that is neither a text nor a number: \[1, 2\]\. Give"),
        ("batch_size: {1: 2}", r"batch_size has a value that is neither a text nor a number: \{1: 2\}\. Give"),
        ("batch_size: [1, null]", r"batch_size has a value that is neither a text nor a number: None\. Give"),
        ("model: !!binary abcd", r"model has a value that is neither a text nor a number: b'i"),
        ("model: []", r"model has an empty value: '\[\]'\."),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(9)
        ) + "model: *j", r"Cannot read parameters from p\.yaml: it has more than 100,000 values"),
    ],
)  # fmt: skip
def test_values_in_a_yaml_file_that_are_none(content: str, message: str) -> None:
    Path("p.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        parse(read_yaml("p.yaml"))


@pytest.mark.parametrize("name", ["batch_size", "prompt_tokens", "draft_tokens", "price_per_hour", "memory_limit"])
@pytest.mark.parametrize("value", ["1" + "0" * 400, "9" * 5000, "1e999", "-1e999", "²", "1_0" * 400])
def test_numbers_beyond_all_bounds(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({name: value})
    assert len(str(caught.value)) < 800


hostile = st.sampled_from(
    ["", " ", ",", "\\,", "\\", "-1", "1e400", "nan", "²", "9" * 5000, "1" + "0" * 400, "true", "none", "auto", "'",
     "\u2028", "\udcff", "/dev/zero", "/dev/stdin", "http://[::1", "http://a:99999999", "ray://x:0", "cuda:9999",
     "6e400GB", "--", "a.gguf", "o/n:../f.gguf", "x.jsonl", "fake:ttft_ms=nan", "1,1,1", "½", "python -c 1 ; ;",
     "a/../b", "~", None, 3, 10**400, float("inf"), [], [[]], {}, [None], b"x", True, ["a,b", 1]]
) | st.text(max_size=6)  # fmt: skip


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.dictionaries(st.sampled_from([*PARAMETERS]), hostile, min_size=1, max_size=3))
def test_fuzz_hostile_parameters_are_parsed_or_refused_in_one_line(values: dict[str, object]) -> None:
    with contextlib.suppress(UsageError):  # whose message is one line in any case
        spec = parse(values)
        assert parse(asked_params(spec)).axes["model"] == spec.axes["model"]


@pytest.mark.parametrize("on", ["ray", "ray://head:10001"])
def test_a_search_is_refused_on_a_cluster(on: str) -> None:
    asked = {"backend": "openai", "url": "http://h", "find": "goodput", "slo_ttft_ms": "200", "request_rate": "1"}
    assert parse(asked).options.find == "goodput"
    with pytest.raises(UsageError) as error:
        parse({**asked, "on": on})
    assert str(error.value) == (
        f"find=goodput chooses each rate from the results before it, which on={on} cannot. "
        "Leave on out, or give the rates yourself: request_rate=1,2,4."
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6_000_000_000), ("800 MiB", 800 * 2**20), ("1.5g", 1_500_000_000), ("250000000", 250_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse({"memory_limit": text}).options.memory_limit == size


@pytest.mark.parametrize("text", ["six", "6XB", "-1GB", "6", "nan"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(UsageError, match=r"memory_limit is (not a size|out of range): "):
        parse({"memory_limit": text})
