"""One configuration behind a server and without it: the difference, worked out by hand and on a real model."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis import server_overhead
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.cells import (
    asked_params,
    cell_name,
    expand_cells,
    group_cells,
    option_params,
    without_server,
)
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell, Options
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import MemoryStages, Repetition, RunResult
from mlflow_llmbench.sweeps.cross_cell import cross_findings
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.tracking.view import TAG
from mlflow_llmbench.workloads.prompts import WORDS

from ..measure.test_online import request, result

LAUNCH = "serve {model} --port {port} --q {quant}"
SERVED = {"backend": "openai", "launch": LAUNCH, "twin": "true"}
SERVING = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai"))
PLAIN = "transformers serve {model} --port {port} --device cpu"
BATCHING = f"{PLAIN} --continuous-batching --cb-block-size 32 --cb-num-blocks 64 --cb-max-batch-tokens 256"


def pair(served_start: float = 30, served_tokens: int = 4) -> tuple[RunResult, RunResult]:
    """10 ms to the first token and 5 ms per token without a server; 30 ms and 7 ms behind it."""
    cell = Cell(backend="openai", launch=LAUNCH, model="m", prompt_tokens=10, output_tokens=4)
    served = request(0, *(served_start + 7 * n for n in range(served_tokens)))
    alone = dataclasses.replace(request(0, 10, 15, 20, 25), tokens=None)
    offline = dataclasses.replace(
        result(alone, cell=without_server(cell)), memory=MemoryStages(host_needed={"peak": 100})
    )
    return offline, dataclasses.replace(result(served, cell=cell), memory=MemoryStages(host_needed={"peak": 140}))


def test_a_worked_example() -> None:
    found = server_overhead.added(*pair())
    assert found == pytest.approx(
        {
            **dict.fromkeys(("twin/added_ttft_ms", "twin/added_ttft_ms_ci_low", "twin/added_ttft_ms_ci_high"), 20),
            **dict.fromkeys(("twin/added_tpot_ms", "twin/added_tpot_ms_ci_low", "twin/added_tpot_ms_ci_high"), 2),
            **dict.fromkeys(("twin/added_e2e_ms", "twin/added_e2e_ms_ci_low", "twin/added_e2e_ms_ci_high"), 26),
            "twin/throughput_ratio": 25 / 51,
            "twin/added_host_needed_gb": 40e-9,
        }
    )
    told = server_overhead.sentence("m", found)
    assert told.startswith(
        "m: the server adds +20 ms to the first token (+20 to +20), +2 ms to each token after it (+2 to +2)"
    )
    assert told.endswith("throughput × 0.49.")


def test_the_difference_has_an_interval_over_repetitions() -> None:
    offline, served = pair()
    spread = [request(0, *(start + 7 * n for n in range(4))) for start in (28, 29, 30, 31, 32)]
    repetitions = tuple(
        Repetition(i, 1000 * i, (one,), client=served.repetitions[0].client) for i, one in enumerate(spread)
    )
    found = server_overhead.added(offline, dataclasses.replace(served, repetitions=repetitions))
    half = 2.776 * (2.5 / 5) ** 0.5  # Welch with one side without variance: t of 4 degrees
    assert found["twin/added_ttft_ms_ci_low"] == pytest.approx(20 - half, abs=0.01)
    assert found["twin/added_ttft_ms_ci_high"] == pytest.approx(20 + half, abs=0.01)


def test_what_rests_on_lengths_that_differ_is_absent() -> None:
    shorter = server_overhead.added(*pair(served_tokens=3))
    assert shorter["twin/added_ttft_ms"] == 20
    assert "twin/added_e2e_ms" not in shorter
    assert "twin/throughput_ratio" not in shorter
    offline, served = pair()
    longer = dataclasses.replace(served, repetitions=tuple(_with_prompt(one, 20) for one in served.repetitions))
    assert "twin/added_ttft_ms" not in server_overhead.added(offline, longer)


def _with_prompt(repetition: Repetition, tokens: int) -> Repetition:
    return dataclasses.replace(
        repetition, requests=tuple(dataclasses.replace(r, prompt_tokens=tokens) for r in repetition.requests)
    )


def test_each_cell_has_its_twin_and_two_commands_share_one() -> None:
    spec = parse(
        {
            **SERVED,
            "launch": f"{LAUNCH} ; {LAUNCH} --continuous-batching",
            "concurrency": "1,4",
            "quant": "none,bnb-8bit",
        }
    )
    cells = expand_cells(spec)
    offline, served = (
        [cell for cell in cells if cell.scenario == "offline"],
        [cell for cell in cells if cell.scenario == "online"],
    )
    assert {(cell.backend, cell.batch_size, cell.quant) for cell in offline} == {
        ("transformers", rows, quant) for rows in (1, 4) for quant in ("none", "int8")
    }
    assert (len(offline), len(served)) == (4, 8)
    assert {without_server(cell) for cell in served} == set(offline)
    assert len(group_cells(cells)) == 6
    assert "backend" in spec.varied
    names = [cell_name(cell, spec.varied) for cell in cells]
    assert len(set(names)) == 12
    assert names[0] == "opt-125m backend=transformers none b1"


def test_the_parameters_of_a_twin_can_be_read_again() -> None:
    spec = parse({**SERVED, "concurrency": "1,4"})
    assert parse(asked_params(spec) | option_params(spec)) == spec


def test_pairs_are_related() -> None:
    offline, served = pair()
    related = cross_findings([offline, served], ["offline", "served"], Options(twin=True))
    assert related.added[0] == {}
    assert related.added[1] == server_overhead.added(offline, served)
    assert related.sentences[0].startswith("served: ")
    assert cross_findings([served], ["served"], Options(twin=True)).added == ({},)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backend": "openai", "url": "http://h", "twin": "true"},
            "twin measures a server that launch starts, and the same without it. Give launch=COMMAND",
        ),
        (
            {**SERVED, "request_rate": "4"},
            "twin compares with one batch of one length, as many rows as concurrency, and request_rate does not "
            "fit that",
        ),
        (
            {**SERVED, "endpoint": "chat"},
            "twin compares with one batch of one length, as many rows as concurrency, and endpoint does not fit that",
        ),
        (
            {**SERVED, "workload": "mixed"},
            "twin compares with one batch of one length, as many rows as concurrency, and workload=mixed does "
            "not fit that",
        ),
        ({**SERVED, "quant": "bnb-4bit"}, "quant=bnb-4bit is the server's own word, and twin cannot load it here."),
        (
            {**SERVED, "find": "goodput", "slo_ttft_ms": "9"},
            "find=goodput searches among rates of an open loop, and twin is another load",
        ),
    ],
)
def test_a_twin_that_cannot_be_is_refused_by_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(settings)
    assert str(error.value).startswith(message)


@pytest.fixture(scope="module")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with seeded weights and Gemma's vocabulary size, whose tokens are words, so that each shows.

    Such a model repeats its last word again and again, so the words of the chat template are among them.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words") / "word-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262_144,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = [
        f"\u2581{word}"
        for word in dict.fromkeys(["user", "assistant", *WORDS, *(f"w{n}" for n in range(config.vocab_size))])
    ]
    vocabulary = {
        token: number for number, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *words][: config.vocab_size])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"
    fast.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not SERVING, reason="pip install 'transformers[serving]'")
def test_transformers_serve_with_and_without_batching_in_one_view(
    word_model: Path, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["online", "--launch", f"{PLAIN} ; {BATCHING}", "--model", str(word_model), "--concurrency", "2"]
    arguments += "--prompt-tokens 16 --output-tokens 8 --repetitions 5 --warmup 1 --requests 4".split()
    assert main([*arguments, "--tracking-uri", store_uri]) == 0
    client = MlflowClient(store_uri)
    experiment = client.get_experiment_by_name("llmbench")
    [view] = [name.removeprefix(TAG) for name in experiment.tags if name.startswith(TAG)]
    assert view in capsys.readouterr().out
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"report.html", "report.md"}
    served = [
        one
        for one in runs
        if one.data.tags.get("llmbench.scenario") == "online" and "mlflow.parentRunId" in one.data.tags
    ]
    assert {one.data.params["launch"] for one in served} == {PLAIN, BATCHING}
    for one in served:
        assert one.info.status == "FINISHED"
        assert one.data.tags["llmbench.outcome"] == "ok"
        assert one.data.metrics["errors/failed_ratio"] == 0
        assert one.data.metrics["latency/ttft_ms_p50"] > 0
        assert "server.log" in {file.path for file in client.list_artifacts(one.info.run_id)}


@pytest.mark.slow
@pytest.mark.skipif(not SERVING, reason="pip install 'transformers[serving]'")
def test_transformers_serve_with_and_without_batching_beside_its_twin(
    word_model: Path, store_uri: str, store_template: Path, tmp_path: Path
) -> None:
    arguments = [
        "online",
        "--launch",
        f"{PLAIN} ; {BATCHING}",
        "--model",
        str(word_model),
        *"--twin --concurrency 2".split(),
    ]
    arguments += "--prompt-tokens 32 --output-tokens 16 --repetitions 5 --warmup 1 --requests 8".split()
    assert main([*arguments, "--tracking-uri", store_uri]) == 0
    client = MlflowClient(store_uri)
    runs = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    [parent] = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    [offline] = [one for one in runs if one.data.tags.get("llmbench.scenario") == "offline"]
    served = [one for one in runs if one.data.tags.get("llmbench.scenario") == "online"]
    assert {one.data.params["launch"] for one in served} == {PLAIN, BATCHING}
    for one in served:
        assert one.data.metrics["errors/failed_ratio"] == 0
        low, added, high = (one.data.metrics[f"twin/added_ttft_ms{end}"] for end in ("_ci_low", "", "_ci_high"))
        assert low <= added <= high  # its sign is the machine's where others use it too
        assert one.data.metrics["memory/host_needed_gb_loaded"] > 0.05
        assert one.data.metrics["memory/host_needed_gb_unloaded"] == 0
        assert one.data.params["server.ignore_eos"] in ("asked", "refused")
        assert "server.log" in {file.path for file in client.list_artifacts(one.info.run_id)}
    assert offline.data.params["batch_size"] == "2"
    assert parent.info.status == "FINISHED"
    shutil.copy(store_template, tmp_path / "second.db")
    [folder] = (tmp_path / "llmbench-results").iterdir()
    assert upload(str(folder), f"sqlite:///{tmp_path}/second.db").new == 4
    again = MlflowClient(f"sqlite:///{tmp_path}/second.db")
    copies = again.search_runs([again.get_experiment_by_name("llmbench").experiment_id])
    assert sum("twin/added_ttft_ms" in one.data.metrics for one in copies) == 2


@pytest.mark.slow
@pytest.mark.skipif(not SERVING, reason="pip install 'transformers[serving]'")
def test_transformers_serve_with_chats(word_model: Path, store_uri: str) -> None:
    common = ["online", "--launch", PLAIN, "--model", str(word_model), "--endpoint", "chat"]
    common += [*"--output-tokens 8 --repetitions 5 --warmup 1 --requests 3 --tracking-uri".split(), store_uri]
    assert main([*common, "--workload", "chat", "--history", "sent", "--prompt-tokens", "auto"]) == 0
    client = MlflowClient(store_uri)
    [one] = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    assert one.data.metrics["errors/failed_ratio"] == 0
    assert {point.step for point in client.get_metric_history(one.info.run_id, "steps/turn_ttft_ms")} >= {1, 2}
    for history in ("kept", "recomputed"):
        assert main([*common, "--workload", "chat", "--history", history, "--prompt-tokens", "auto"]) == 2
