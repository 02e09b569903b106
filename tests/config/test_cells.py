"""Cells, groups and identities."""

from __future__ import annotations

import dataclasses

import pytest

from mlflow_llmbench.config.cells import cell_name, config_hash, expand_cells, group_cells, needs_no_less, sweep_name
from mlflow_llmbench.config.spec import cell_fields, parse
from mlflow_llmbench.records.cell import Cell, as_text
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


def test_names_say_what_varies() -> None:
    cell = Cell(quant="int4", batch_size=4, prompt_tokens=None, model="/models/my-model/")
    assert cell_name(cell, ["quant", "batch_size"]) == "quant=int4 batch_size=4"
    assert cell_name(cell, ["model", "prompt_tokens"]) == "model=my-model prompt_tokens=auto"
    assert cell_name(cell, []) == "my-model int4 b4"
    assert sweep_name(parse({"quant": "int8,int4", "batch_size": "1,2"})) == "opt-125m: quant × batch_size"


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
