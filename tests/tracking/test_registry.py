"""The Model Registry: content of a version, refusals, and answers to prompts, in this process and in a served one."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of, version_tags
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import LoadInfo, ModelFacts, RunResult, Verdict
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.tracking import registry
from mlflow_llmbench.tracking.promotion import promote
from mlflow_llmbench.tracking.registry import digest_of, register, result_of, save
from mlflow_llmbench.tracking.search import cells_of_sweep
from mlflow_llmbench.tracking.store import open_store

from ..results import WIGGLE, made, stored

ROOT = Path(__file__).resolve().parents[2]
BUSY = "a busy test machine"
SWEEP = "20260101T000000Z-aaaaaa"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, store_template: Path) -> Path:
    return measured_sweep(tmp_path_factory.mktemp("measured"), tiny_model, store_template)


def measured_sweep(folder: Path, tiny_model: Path, store_template: Path) -> Path:
    """The folder of a real sweep: the tiny model as int8, two rows of 16 + 8 tokens."""
    shutil.copy(store_template, folder / "mlflow.db")
    options = (
        "--quant int8 --batch-size 2 --workload qa --prompt-tokens 16 --output-tokens 8 "
        "--repetitions 2 --warmup 1 --device cpu --threads 1"
    )
    command = [sys.executable, "-m", "mlflow_llmbench", "run", "--model", str(tiny_model), *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return next((folder / "llmbench-results").iterdir())


@pytest.fixture
def run_id(measured: Path, store_uri: str) -> str:
    """The real run, uploaded into this test's store."""
    upload(str(measured), store_uri)
    [found] = cells_of_sweep(open_store(store_uri), measured.name)
    return found


def test_a_version_holds_the_configuration_its_figures_and_its_evidence(
    run_id: str, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["register", run_id, "--name", "support-bot", "--accept-suspect", BUSY, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Registered models:/support-bot/1, alias candidate. Its evidence is the run {run_id}.\n")
    assert json.loads(out.splitlines()[-1]) == {
        "name": "support-bot",
        "version": "1",
        "alias": "candidate",
        "run_id": run_id,
        "new": True,
    }
    client = MlflowClient(store_uri)
    version = client.get_model_version_by_alias("support-bot", "candidate")
    result = result_of(open_store(store_uri), run_id)
    metrics = summarize(result)
    assert version.run_id == run_id
    assert version.tags["llmbench.quant"] == "int8"
    assert float(version.tags["llmbench.output_tokens_per_s"]) == pytest.approx(
        metrics["throughput/output_tokens_per_s"], rel=1e-5
    )
    assert version.tags["llmbench.config_hash"] == result.hashes.config
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "support-bot", "version": "1"}]
    measured = {one.key: one for one in model.metrics}
    assert {key: one.value for key, one in measured.items()} == {key: metrics[key] for key in measured}
    assert {"throughput/output_tokens_per_s", "latency/ttft_ms_p50", "memory/host_needed_gb_peak"} <= measured.keys()
    [prompts] = [given.dataset for given in client.get_run(run_id).inputs.dataset_inputs]
    assert {(one.dataset_name, one.dataset_digest) for one in measured.values()} == {(prompts.name, prompts.digest)}
    again = client.get_metric_history(run_id, "throughput/output_tokens_per_s")
    assert [point.value for point in again] == [metrics["throughput/output_tokens_per_s"]]  # the run has it once
    assert "up to 16 prompt tokens, 8 output tokens, 2 rows at a time" in version.description
    assert "| output throughput |" in version.description and f"run `{run_id}`" in version.description
    assert client.get_run(run_id).data.tags["llmbench.registered"] == "models:/support-bot/1"
    assert client.get_run(run_id).info.status == "FINISHED"
    config = mlflow.pyfunc.load_model("models:/support-bot@candidate").unwrap_python_model().config
    assert config["quantization"] == {"class": "BitsAndBytesConfig", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    assert (config["batch_size"], config["max_prompt_tokens"], config["max_new_tokens"], config["device"]) == (
        2,
        16,
        8,
        "cpu",
    )
    assert config["revision"] == result.model.revision
    assert config["evidence"]["run_id"] == run_id


def test_a_version_has_no_weights_and_pins_what_was_measured(run_id: str, store_uri: str, tmp_path: Path) -> None:
    store = open_store(store_uri)
    register(store, run_id, "bot", accept_suspect=BUSY)
    [logged] = [i.model_id for i in store.client.get_run(run_id).outputs.model_outputs]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{logged}", dst_path=str(tmp_path / "m")))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 40_000
    lines = (folder / "requirements.txt").read_text().splitlines()
    packages = result_of(store, run_id).environment["packages"]
    assert f"torch=={packages['torch'].partition('+')[0]}" in lines
    assert f"bitsandbytes=={packages['bitsandbytes']}" in lines
    assert not [line for line in lines if "+" in line]
    saved = mlflow.models.get_model_info(str(folder)).signature
    assert [(one.name, one.default) for one in saved.params] == [("max_new_tokens", 8)]
    assert saved.inputs.input_names() == ["prompt"]


def test_a_configuration_that_was_changed_where_it_is_stored_is_neither_served_nor_promoted(
    run_id: str, store_uri: str, tmp_path: Path
) -> None:
    store = open_store(store_uri)
    found = register(store, run_id, "bot", accept_suspect=BUSY)
    tags = store.client.get_model_version("bot", "1").tags
    assert tags["llmbench.configuration_digest"] == digest_of(registry.stored_config(store, found)[0])
    [logged] = [i.model_id for i in store.client.get_run(run_id).outputs.model_outputs]
    stored = Path(store.client.get_logged_model(logged).artifact_location.removeprefix("file://"))
    as_registered = (stored / "MLmodel").read_text()
    trace, model = tmp_path / "ran", tmp_path / "model"
    model.mkdir()
    (model / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    for key, value in (("trust_remote_code", True), ("location", str(model)), ("kernel", None), ("extra", 1)):
        changed = yaml.safe_load(as_registered)
        changed["flavors"]["python_function"]["config"][key] = value
        (stored / "MLmodel").write_text(yaml.safe_dump(changed))
        with pytest.raises(MlflowException, match=f"was changed after its registration: {key}\\. {key} is "):
            mlflow.pyfunc.load_model("models:/bot/1")
        with pytest.raises(UsageError, match="The configuration of models:/bot/1 was changed after its registration"):
            promote(store, "models:/bot/1")
    (stored / "MLmodel").write_text(as_registered)
    with pytest.raises(MlflowException, match="trust_remote_code is true, and false was measured"):
        mlflow.pyfunc.load_model("models:/bot/1", model_config={"trust_remote_code": True, "location": str(model)})
    assert mlflow.pyfunc.load_model("models:/bot/1", model_config={"batch_size": 1})
    code = stored / "serving_model.py"
    code.write_text(code.read_text().replace("MEASURED = json", "MEASURED = None and json"))
    with pytest.raises(UsageError, match="The code of models:/bot/1 was changed after its registration"):
        promote(store, "models:/bot/1")
    assert not trace.exists()


def test_the_loaded_model_answers_within_its_limits(run_id: str, store_uri: str) -> None:
    register(open_store(store_uri), run_id, "bot", accept_suspect=BUSY)
    model = mlflow.pyfunc.load_model("models:/bot@candidate")
    answers = model.predict(
        [{"prompt": text} for text in ("One two", "Three", "Four five six")], params={"max_new_tokens": 5}
    )
    assert [answer["prompt_tokens"] for answer in answers] == [7, 5, 13]
    assert all(1 <= answer["output_tokens"] <= 5 for answer in answers)
    inner = model.unwrap_python_model()
    assert {type(layer).__name__ for layer in inner.engine.model.modules() if hasattr(layer, "in_features")} == {
        "Linear8bitLt",
        "Linear",
    }
    for prompts, params, message in (
        ([{"prompt": "x" * 17}], {}, "A prompt has 17 tokens, and 16 are the most that was measured"),
        ([{"prompt": ""}], {}, "A prompt has no tokens"),
        ([{"prompt": None}], {}, "A prompt is not a text: None. Give each row a prompt."),
        ([{"prompt": "x"}], {"max_new_tokens": 9}, "max_new_tokens is not from 1 to 8, which was measured: 9"),
    ):
        with pytest.raises(MlflowException, match=message):
            model.predict(prompts, params=params)
    none = mlflow.pyfunc.load_model("models:/bot@candidate", model_config={"batch_size": -1})
    with pytest.raises(MlflowException, match="batch_size is not at least 1: -1"):
        none.predict([{"prompt": "x"}])


def test_rows_are_generated_up_to_the_registered_batch_size(run_id: str, store_uri: str) -> None:
    """The same greedy answers for any batch size, since padding is masked; as many calls as the batch size needs."""
    register(open_store(store_uri), run_id, "bot", accept_suspect=BUSY)
    prompts = [{"prompt": text} for text in ("One two", "Three", "Four five six")]
    sizes: dict[int, list[int]] = {}
    answers = {}
    for size in (2, 1):
        model = mlflow.pyfunc.load_model(
            "models:/bot@candidate", model_config={"batch_size": size, "quantization": {}, "kernel": None}
        )
        inner = model.unwrap_python_model()
        generate, sizes[size] = inner._answers, []

        def counting(batch: Any, most: int, generate: Any = generate, seen: list[int] = sizes[size]) -> Any:
            seen.append(len(batch))
            return generate(batch, most)

        inner._answers = counting
        answers[size] = model.predict(prompts)
    assert sizes == {2: [2, 1], 1: [1, 1, 1]}
    assert answers[1] == answers[2]


def test_a_model_that_is_not_quantized_as_measured_is_refused(run_id: str, store_uri: str) -> None:
    register(open_store(store_uri), run_id, "bot", accept_suspect=BUSY)
    model = mlflow.pyfunc.load_model("models:/bot@candidate", model_config={"quantization": {}})
    with pytest.raises(
        MlflowException, match="measured with the layers Linear8bitLt × 14, and has been loaded with Linear × 14"
    ):
        model.predict([{"prompt": "x"}])


def test_answers_are_greedy_and_end_where_the_checkpoint_says(run_id: str, store_uri: str, tmp_path: Path) -> None:
    """Sampling and penalties of a checkpoint were not measured, so they are not served; its end tokens are."""
    register(open_store(store_uri), run_id, "bot", accept_suspect=BUSY)
    plain = mlflow.pyfunc.load_model("models:/bot@candidate").predict([{"prompt": "Hello"}])
    folder = tmp_path / "llama"
    shutil.copytree(result_of(open_store(store_uri), run_id).model.location, folder)
    own = json.loads((folder / "generation_config.json").read_text())

    def answer(**settings: Any) -> dict[str, Any]:
        (folder / "generation_config.json").write_text(json.dumps(own | settings))
        [found] = mlflow.pyfunc.load_model("models:/bot@candidate", model_config={"location": str(folder)}).predict(
            [{"prompt": "Hello"}]
        )
        return dict(found)

    assert [answer(do_sample=True, temperature=9.0, repetition_penalty=50.0)] == plain
    inner = mlflow.pyfunc.load_model("models:/bot@candidate").unwrap_python_model()
    inner.predict(None, ["Hello"])
    inner = inner.engine
    first = inner.model.generate(
        inner.tokenizer("Hello", return_tensors="pt")["input_ids"], max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    stopped = answer(eos_token_id=[1, int(first[0, -1])])
    assert (stopped["output_tokens"], stopped["finish"]) == (1, "stop")


@contextmanager
def served(uri: str, store_uri: str, log: Path) -> Iterator[str]:
    """The address of `mlflow models serve` for a version, in its own processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        *"-m mlflow models serve -m".split(),
        uri,
        *"--env-manager local -p".split(),
        str(port),
        "-h",
        "127.0.0.1",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": path, "MLFLOW_TRACKING_URI": store_uri, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "-w", "1"], env=environment, stdout=output, stderr=output, cwd=log.parent, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the group that was started here: mlflow's command and its worker
        server.wait(60)


def ask(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.slow
def test_a_served_version_answers_over_http(run_id: str, store_uri: str, tmp_path: Path) -> None:
    register(open_store(store_uri), run_id, "support-bot", accept_suspect=BUSY)
    expected = mlflow.pyfunc.load_model("models:/support-bot@candidate").predict(
        [{"prompt": "Hello"}, {"prompt": "Why is that?"}]
    )
    with served("models:/support-bot@candidate", store_uri, tmp_path / "serve.log") as address:
        records = [{"prompt": "Hello"}, {"prompt": "Why is that?"}]
        assert ask(address, {"dataframe_records": records})["predictions"] == expected
        [short] = ask(address, {"dataframe_records": records[:1], "params": {"max_new_tokens": 2}})["predictions"]
        assert short["output_tokens"] <= 2
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, {"dataframe_records": [{"prompt": "x" * 40}]})
        with caught.value as answer:
            assert answer.code == 400
            assert "A prompt has 40 tokens, and 16 are the most that was measured" in answer.read().decode()


# Refusals and valid references, with results of chosen time stamps


def test_a_second_registration_of_a_run_makes_no_second_version(store_uri: str, tmp_path: Path) -> None:
    [one] = stored(tmp_path / "sweep", store_uri, made())
    store = open_store(store_uri)
    first, second = register(store, one, "bot"), register(store, f"runs:/{one}", "bot", alias="cheapest")
    assert (first.version, first.new) == ("1", True)
    assert (second.version, second.new) == ("1", False)
    assert sorted(store.client.get_model_version("bot", "1").aliases) == ["candidate", "cheapest"]


def test_the_winner_of_a_recommendation_is_registered(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = stored(tmp_path / "sweep", store_uri, made("int8", step=20), made("int4", step=5))
    store = open_store(store_uri)
    parent = store.client.get_run(slow).data.tags["mlflow.parentRunId"]
    assert main(["register", parent, "--name", "bot"]) == 2
    assert f"holds neither a result nor a recommendation. Run `llmbench recommend {parent}`" in capsys.readouterr().err
    assert main(["recommend", parent, "--output", "out"]) == 0
    assert register(store, parent, "bot").run_id == fast
    assert register(store, str(tmp_path / "out" / "recommendation.json"), "other").run_id == fast
    assert main(["recommend", parent, "--max-memory", "1MB", "--output", "none"]) == 1
    assert f"Not logged: the run {parent} keeps its earlier recommendation" in capsys.readouterr().out
    assert register(store, parent, "third").run_id == fast
    assert main(["register", "none/recommendation.json", "--name", "fourth"]) == 2
    told = capsys.readouterr().err
    assert "has no winner. Refused int4: " in told and "Recommend again with other limits" in told
    assert [found.name for found in store.client.search_registered_models()] == ["bot", "other", "third"]


def test_suspect_results_that_were_not_recommended_are_told_with_the_command_that_accepts_them(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path / SWEEP, store_uri, made(factors=WIGGLE[:3]), made("int8", factors=WIGGLE[:3]))
    assert main(["recommend"]) == 1
    capsys.readouterr()
    assert main(["register", "--name", "bot", "--accept-suspect", "a busy machine"]) == 2
    told = capsys.readouterr().err
    assert f"The recommendation {SWEEP} has no winner. Refused " in told
    assert ": Its verdict is suspect (too_few_samples" in told
    command = f"llmbench recommend {SWEEP} --accept-suspect 'a busy machine'"
    assert told.endswith(f"recommend again: `{command}`.\n") and "limits" not in told
    assert main(shlex.split(command)[1:]) == 0
    assert main(["register", "--name", "bot"]) == 0


def test_invalid_runs_are_refused_and_suspect_ones_need_a_reason(store_uri: str, tmp_path: Path) -> None:
    short = made("int4")
    short = dataclasses.replace(short, cell=dataclasses.replace(short.cell, output_tokens=6))
    few = made("int8", factors=WIGGLE[:3])
    invalid, suspect = stored(tmp_path / "sweep", store_uri, short, few)
    store = open_store(store_uri)
    with pytest.raises(UsageError, match=rf"The run {invalid} is invalid \(wrong_token_count\), and is not registered"):
        register(store, invalid, "bot", accept_suspect="anything")
    with pytest.raises(
        UsageError, match=rf'The run {suspect} is suspect \(too_few_samples\).*--accept-suspect "REASON"'
    ):
        register(store, suspect, "bot")
    assert list(store.client.search_registered_models()) == []
    register(store, suspect, "bot", accept_suspect="a first look")
    version = store.client.get_model_version("bot", "1")
    assert version.tags["llmbench.accepted_suspect"] == "a first look"
    assert "Suspect, and accepted: a first look" in version.description


@pytest.mark.parametrize(
    ("name", "alias", "reference", "message"),
    [
        ("a/b", "candidate", "", "Not a name for a registered model: a/b. Give letters"),
        (
            "a@b",
            "candidate",
            "",
            "Not a name for a registered model: a@b. Give letters",
        ),  # models:/a@b@candidate is not a valid address
        ("bot", "v1", "", "Not an alias: v1. Give letters"),
        ("bot", "champion", "", "Only `llmbench promote` moves the alias champion"),
        ("bot", "candidate", "nonsense", "nonsense is neither a run id, nor a sweep of this store"),
        ("bot", "candidate", "0" * 32, "The run 0{32} is not in the store"),
        ("bot", "candidate", "none.json", "Cannot read the recommendation none.json"),
    ],
)
def test_bad_names_and_references(name: str, alias: str, reference: str, message: str, store_uri: str) -> None:
    with pytest.raises(UsageError, match=message):
        register(open_store(store_uri), reference or "0" * 32, name, alias)


def deploy(result: RunResult) -> Any:
    return deployment_of(result, summarize(result), Evidence("r", "s", Verdict("valid"))).config


def real(quant: str, source: str = "folder", **facts: Any) -> RunResult:
    model = ModelFacts("m", source, "/models/m.gguf" if source == "gguf" else "/models/m", "c0ffee")
    return made(
        cell=Cell(model="m", quant=quant, output_tokens=5),
        model=model,
        load=LoadInfo(1.0, facts={"model.dtype": "bfloat16", **facts}),
    )


def test_each_quantization_becomes_its_recipe() -> None:
    four = deploy(real("fp4", **{"quant.type": "fp4", "quant.compute_dtype": "bfloat16"}))
    assert four["quantization"] == {
        "class": "BitsAndBytesConfig",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    assert four["dtype"] == "bfloat16"
    twice = deploy(
        real("int4", **{"quant.type": "nf4", "quant.compute_dtype": "bfloat16", "quant.double_quant": "true"})
    )
    assert twice["quantization"]["bnb_4bit_use_double_quant"] is True
    assert (deploy(real("none"))["dtype"], deploy(real("none"))["quantization"]) == ("auto", {})
    assert deploy(real("fp16"))["dtype"] == "float16"
    unpacked = deploy(real("bf16", "gguf"))
    assert (unpacked["location"], unpacked["gguf_file"]) == ("/models", "m.gguf")
    assert unpacked["quantization"] == {"class": "GgufConfig", "dequantize": True}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weights", "random", "has random weights, whose answers mean nothing"),
        ("backend", "openai", "backend=openai cannot be registered"),
        ("decode", "compiled", "decode=compiled cannot be served yet"),
        ("kv_cache", "fp8", "kv_cache=fp8 cannot be served yet"),
        ("tensor_parallel", 2, "tensor_parallel=2 cannot be served yet: the registered model runs in one process"),
        ("placement", "auto", "placement=auto cannot be served yet: the registered model lies on one device"),
        ("quant", "int8-wo", "quant=int8-wo cannot be registered yet"),  # its load says no method
        ("quant", "gptq", "does not say where its model files are"),
        (
            "batching",
            "dynamic",
            "batching=dynamic cannot be served: the registered model batches the prompts of one request",
        ),
        ("history", "kept", "history=kept cannot be served: .* Measure with history=recomputed"),
    ],
)
def test_what_cannot_be_served_is_not_registered(field: str, value: object, message: str) -> None:
    result = real("none")
    with pytest.raises(UsageError, match=message):
        deploy(dataclasses.replace(result, cell=dataclasses.replace(result.cell, **{field: value})))


def test_a_gguf_file_without_a_tokenizer_is_not_registered() -> None:
    """llama.cpp would end the process if asked to tokenize a text with such a file."""
    facts = {"quant.type": "Q4_0", "kv_cache.type": "f16", "model.tokenizer": "none"}
    cell = Cell(model="m", backend="llama_cpp", quant="q4_0", output_tokens=5)
    result = made(
        cell=cell,
        model=ModelFacts("m", "folder", "/models/m", "c"),
        load=LoadInfo(1.0, facts=facts, made="/cache/m.gguf"),
    )
    with pytest.raises(UsageError, match="has no tokenizer, so it cannot answer texts"):
        deploy(result)


def test_recomputed_conversations_are_served_up_to_their_longest_history() -> None:
    """A client sends the whole conversation with each turn, as it was measured."""
    result = real("none")
    turns = tuple(
        dataclasses.replace(r, requests=tuple(dataclasses.replace(one, prompt_tokens=40) for one in r.requests))
        for r in result.repetitions
    )
    cell = dataclasses.replace(result.cell, workload="chat", history="recomputed", prompt_tokens=None)
    config = deploy(dataclasses.replace(result, cell=cell, repetitions=turns))
    assert (config["workload"], config["history"], config["max_prompt_tokens"]) == ("chat", "recomputed", 40)
    tags = version_tags(deployment_of(result, summarize(result), Evidence("r", "s", Verdict("valid"))))
    assert (tags["llmbench.workload"], tags["llmbench.history"]) == ("synthetic", "none")


def test_the_figures_of_a_version_come_before_its_evidence() -> None:
    result = real("none")
    names = list(version_tags(deployment_of(result, summarize(result), Evidence("r", "s", Verdict("valid")))))
    order = [
        names.index(f"llmbench.{name}")
        for name in ("model", "quant", "output_tokens_per_s", "verdict", "run_id", "config_hash", "schema")
    ]
    assert order == sorted(order)


def test_a_checkpoint_that_is_quantized_already_pins_what_loads_it() -> None:
    packages = {"torch": "2.13.0+cpu", "gptqmodel": "7.6.0", "optimum": "2.1.0", "bitsandbytes": "0.50.2"}
    ready = dataclasses.replace(real("none", **{"quant.method": "bitsandbytes"}), environment={"packages": packages})
    assert (
        "bitsandbytes==0.50.2"
        in deployment_of(ready, summarize(ready), Evidence("r", "s", Verdict("valid"))).requirements
    )
    for method, pinned in (("awq", True), ("gptq", True), ("none", False)):
        result = dataclasses.replace(real("none", **{"quant.method": method}), environment={"packages": packages})
        found = deployment_of(result, summarize(result), Evidence("r", "s", Verdict("valid"))).requirements
        assert set(found) == {"torch==2.13.0", *(("gptqmodel==7.6.0", "optimum==2.1.0") if pinned else ())}


def test_a_fake_version_says_that_it_has_no_answers(tmp_path: Path) -> None:
    result = made()
    save(deployment_of(result, summarize(result), Evidence("r", "s", Verdict("valid"))), tmp_path / "model")
    with pytest.raises(MlflowException, match="measured with backend=fake, which has no answers to give"):
        mlflow.pyfunc.load_model(str(tmp_path / "model")).predict([{"prompt": "x"}])


def test_register_is_an_entry_point_of_the_project(store_uri: str, tmp_path: Path) -> None:
    [one] = stored(tmp_path / "sweep", store_uri, made())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    parameters = ["-P", f"run={one}", "-P", "name=support-bot"]
    command = [
        sys.executable,
        *"-m mlflow run".split(),
        str(ROOT),
        *"-e register --env-manager local".split(),
        *parameters,
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": store_uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    client = MlflowClient(store_uri)
    assert client.get_model_version_by_alias("support-bot", "candidate").run_id == one
    [own] = client.search_runs(["0"])
    assert own.data.tags["llmbench.registered"] == "models:/support-bot/1"
    assert own.info.status == "FINISHED"


def test_tables_are_named_where_the_ui_sets_them_side_by_side(run_id: str, store_uri: str) -> None:
    """MLflow's evaluation view knows only the tables named in this tag; texts come first."""
    client = MlflowClient(store_uri)
    named = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert {item["type"] for item in named} == {"table"}
    paths = [item["path"] for item in named]
    assert sorted(paths) == sorted(
        item.path for item in client.list_artifacts(run_id, "tables") if item.path.endswith(".json")
    )
    assert paths[0] == "tables/texts.json" or "tables/texts.json" not in paths
    data = json.loads(Path(client.download_artifacts(run_id, paths[0])).read_text())
    assert {"columns", "data"} <= data.keys()
