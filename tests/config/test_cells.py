"""Cells, groups and identities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlflow_llmbench.config.cells import (
    asked_params,
    cell_name,
    config_hash,
    expand_cells,
    group_cells,
    needs_no_less,
    sweep_name,
)
from mlflow_llmbench.config.spec import cell_fields, parse
from mlflow_llmbench.records.cell import Cell, as_text
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import ModelFacts

MODEL = ModelFacts("opt-125m", "preset", "facebook/opt-125m", "abc")


def test_product_in_given_order_and_groups_largest_first() -> None:
    cells = expand_cells(parse({"quant": "int8,int4", "batch_size": "1,16,4"}))
    assert [(c.quant, c.batch_size) for c in cells] == [
        ("int8", 1),
        ("int8", 16),
        ("int8", 4),
        ("int4", 1),
        ("int4", 16),
        ("int4", 4),
    ]
    groups = group_cells(cells)
    assert [[c.batch_size for c in group.cells] for group in groups] == [[16, 4, 1], [16, 4, 1]]
    assert [group.first.quant for group in groups] == ["int8", "int4"]


def test_what_is_loaded_decides_the_group() -> None:
    cells = expand_cells(parse({"threads": "1,2", "output_tokens": "8,16", "prompt_tokens": "32,64"}))
    assert sorted(len(group.cells) for group in group_cells(cells)) == [4, 4]


def test_config_hash_is_stable_and_knows_what_decides() -> None:
    cell = Cell()
    assert config_hash(cell, MODEL) == config_hash(dataclasses.replace(cell, max_repetitions=99), MODEL)
    changed = [
        dataclasses.replace(cell, quant="int8"),
        dataclasses.replace(cell, seed=1),
        dataclasses.replace(cell, repetitions=10),
    ]
    assert len({config_hash(c, MODEL) for c in [cell, *changed]}) == 4
    assert config_hash(cell, MODEL) != config_hash(cell, dataclasses.replace(MODEL, revision="def"))
    assert config_hash(cell, MODEL) == config_hash(dataclasses.replace(cell, model="facebook/opt-125m"), MODEL)


def test_names_say_the_model_and_what_varies() -> None:
    cell = Cell(quant="int4", batch_size=4, prompt_tokens=64, model="/models/my-model/")
    assert cell_name(cell, ["quant", "batch_size"]) == "my-model int4 b4"
    assert cell_name(cell, ["model"]) == "my-model"
    assert cell_name(cell, ["model", "quant", "prompt_tokens"]) == "my-model int4 prompt_tokens=64"
    assert cell_name(cell, ["prompt_tokens", "output_tokens", "threads"]) == "my-model 64+128 threads=auto"
    assert cell_name(cell, ["quant", "int8_threshold"]) == "my-model int4"
    assert cell_name(dataclasses.replace(cell, tensor_parallel=2), ["tensor_parallel"]) == "my-model tp2"
    assert sweep_name(parse({"quant": "int8,int4", "batch_size": "1,2"})) == "opt-125m: quant × batch_size"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"quant": "int4", "batch_size": 4}, "opt-125m int4 b4 128+128"),
        ({"prompt_tokens": None, "workload": "data/qa.jsonl", "output_tokens": 64}, "opt-125m none b1 qa.jsonl+64"),
        ({"tensor_parallel": 2}, "opt-125m none b1 tp2 128+128"),
        ({"batching": "dynamic", "batch_size": 8, "request_rate": 2.5}, "opt-125m none dynamic b8 2.5/s 128+128"),
        ({"backend": "openai", "url": "http://h", "concurrency": 2}, "opt-125m online c2 128+128"),
        ({"backend": "openai", "launch": "serve {quant}", "quant": "q4"}, "opt-125m q4 online c1 128+128"),
    ],
)
def test_a_single_cell_is_named_by_model_quantization_load_and_lengths(given: dict[str, Any], name: str) -> None:
    assert cell_name(Cell(**given)) == name


def test_names_that_are_cut_still_tell_cells_apart() -> None:
    names = [cell_name(Cell(model="x" * 999, batch_size=rows), ["batch_size"]) for rows in (1, 2)]
    assert [name[-5:] for name in names] == ["x… b1", "x… b2"] and {len(name) for name in names} == {250}


OFFLINE = {
    "model", "weights", "revision", "backend", "quant", "batch_size", "prompt_tokens", "output_tokens", "workload",
    "history", "warmup", "repetitions", "max_repetitions", "precision_target", "processes", "device", "threads",
    "tensor_parallel", "placement", "attention", "kv_cache", "decode", "seed", "trust_remote_code", "allow_pickle",
}  # fmt: skip
ONLINE = {
    "model", "backend", "prompt_tokens", "output_tokens", "workload", "history", "warmup", "repetitions",
    "max_repetitions", "precision_target", "processes", "seed", "url", "endpoint", "concurrency", "client_processes",
    "requests", "request_timeout_s", "temperature", "ignore_eos", "max_tokens_field",
}  # fmt: skip
SERVED = {"backend": "openai", "url": "http://h"}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, OFFLINE),
        ({"weights": "random", "repetitions": 5}, OFFLINE - {"revision", "max_repetitions", "precision_target"}),
        ({"quant": "int8"}, OFFLINE | {"int8_threshold"}),
        ({"quant": "gptq"}, OFFLINE | {"group_size"}),
        ({"quant": "mixed", "quant_budget": "5"}, OFFLINE | {"quant_budget"}),
        ({"decode": "assisted", "assistant": "m"}, OFFLINE | {"assistant", "draft_tokens"}),
        ({"backend": "llama_cpp"}, OFFLINE - {"tensor_parallel", "placement"} | {"gpu_layers", "mmap"}),
        ({"batching": "static", "request_rate": 1.0}, OFFLINE | {"batching", "request_rate", "arrival", "requests"}),
        (SERVED, ONLINE),
        ({**SERVED, "endpoint": "chat", "headers": "{}"}, ONLINE | {"thinking", "headers"}),
        ({**SERVED, "request_rate": 1.0}, ONLINE - {"concurrency"} | {"request_rate", "arrival"}),
        ({**SERVED, "request_rate": 1.0, "ramp_to": 5.0, "arrival": "gamma"},
         ONLINE - {"concurrency"} | {"request_rate", "arrival", "ramp_to", "burstiness"}),
        ({**SERVED, "trace": "t.jsonl"}, ONLINE - {"concurrency", "prompt_tokens", "output_tokens"} | {"trace"}),
        ({**SERVED, "prefix_tokens": 64}, ONLINE | {"prefix_tokens", "prefix_count"}),
        ({**SERVED, "endpoint": "embeddings"},
         ONLINE - {"output_tokens", "temperature", "ignore_eos", "max_tokens_field"}),
    ],
)  # fmt: skip
def test_a_cell_has_the_parameters_that_mean_something_in_it(given: dict[str, Any], fields: set[str]) -> None:
    assert set(cell_fields(Cell(**given))) == fields


def test_a_request_has_the_parameters_that_mean_something_in_any_of_its_cells() -> None:
    assert {"int8_threshold", "double_quant", "mmap"} <= {*asked_params(parse({"quant": "none,int8,int4,q8_0"}))}
    assert not {"int8_threshold", "double_quant", "mmap", "ramp_to"} & {*asked_params(parse({"quant": "bf16"}))}


@pytest.mark.parametrize(
    "asked",
    [
        {"quant": "bf16,mixed,q8_0", "quant_budget": "5.5"},
        {"quant": "int8,int4", "int8_threshold": "0,6", "double_quant": "true"},
        {"decode": "generate,prompt_lookup", "draft_tokens": "4"},
    ],
)
def test_each_cell_of_a_sweep_can_be_asked_for_alone(asked: dict[str, str]) -> None:
    """Each cell can be requested by its own parameters, as `reproduce` does: settings without effect on it are not
    kept."""
    cells = expand_cells(parse(asked))
    assert len(cells) > 1
    for cell in cells:
        alone = {name: [as_text(name, getattr(cell, name))] for name in cell_fields(cell)}
        assert expand_cells(parse(alone)) == [cell]


def test_another_attention_may_fit_where_one_did_not() -> None:
    """`eager` stores the whole score matrix, so `sdpa` may fit if `eager` did not. Loading needs the same for both."""
    eager, sdpa = (Cell(attention=attention, prompt_tokens=4096) for attention in ("eager", "sdpa"))
    assert not needs_no_less(sdpa, eager)
    assert needs_no_less(sdpa, eager, ignore_shape=True)
    assert needs_no_less(dataclasses.replace(eager, batch_size=2), eager)


def test_a_smaller_budget_may_fit_where_a_larger_one_did_not() -> None:
    large, small = (Cell(quant="mixed", quant_budget=budget) for budget in ("7", "4.5"))
    for any_shape in (False, True):
        assert not needs_no_less(small, large, ignore_shape=any_shape)


def test_more_threads_may_be_in_time_and_need_no_less_memory() -> None:
    one, two = (Cell(threads=threads) for threads in (1, 2))
    assert needs_no_less(two, one)
    assert not needs_no_less(two, one, compare_time=True)
    assert needs_no_less(dataclasses.replace(one, output_tokens=one.output_tokens + 1), one, compare_time=True)


def test_ranks_are_part_of_a_configuration_and_of_its_load() -> None:
    one, two = expand_cells(parse({"model": "m", "tensor_parallel": "1,2"}))
    model = ModelFacts("m", "folder", "/m", "r")
    assert config_hash(one, model) != config_hash(two, model)
    assert config_hash(one, model) == "51901ddb4abe0414"  # as before there were ranks
    assert len(group_cells([one, two])) == 2
    assert not needs_no_less(two, one) and not needs_no_less(one, two)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "fake"}, r"^tensor_parallel is a setting of transformers, which does not run every cell\. Give "
                              r"backend=transformers, or leave it out\.$"),
        ({"quant": "none,q8_0"}, r"^tensor_parallel is a setting of transformers, which does not run every cell\."),
        ({"on": "ray"}, r"^tensor_parallel=2 starts its ranks on this machine, and on=ray measures on others\."),
        ({"batching": "dynamic", "request_rate": "5"}, r"^tensor_parallel=2 works for single batches only"),
        ({"history": "none,kept", "workload": "chat", "prompt_tokens": "auto"}, r"^tensor_parallel=2 keeps no history"),
        ({"quality_tasks": "arc_easy"}, r"^lm-eval calls the model in one process, and tensor_parallel=2 runs it in "),
    ],
)  # fmt: skip
def test_what_is_not_measured_in_ranks(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse({"tensor_parallel": "1,2", **given})
    parse({"tensor_parallel": "1", **({} if "backend" in given else given)})


def test_a_placement_is_left_out_of_an_identity_at_its_default_and_loads_apart() -> None:
    one, two = expand_cells(parse({"model": "m", "placement": "single,auto"}))
    assert (one.placement, two.placement) == ("single", "auto") and len(group_cells([one, two])) == 2
    facts = ModelFacts("m", "folder", "/m", "r")
    assert config_hash(one, facts) == config_hash(Cell(model="m"), facts) != config_hash(two, facts)
    assert cell_name(two) == "m none b1 placement=auto 128+128" and not needs_no_less(two, one)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "fake"}, r"^placement is a setting of transformers, which does not run every cell\. Give "),
        ({"on": "ray"}, r"^placement=auto lays a model out over the free memory of this machine, and on=ray measures "),
        ({"quality_tasks": "arc_easy"}, r"^lm-eval moves the model to one device, and placement=auto keeps it in "),
        ({"placement": "single,everywhere"}, r"^Unknown placement: everywhere\. Known: single, auto\."),
    ],
)
def test_what_a_placement_excludes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse({"placement": "single,auto", **given})
