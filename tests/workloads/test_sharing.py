"""Shared beginnings of prompts: who shares what, with how many tokens, and what an ideal cache would find."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from mlflow_llmbench.config.cells import config_hash, expand_cells
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.workloads.prompts import PromptSet, lengths_of, load_prompts
from mlflow_llmbench.workloads.sharing import Part, PrefixTree, group_of, parts_of, shares_prefixes
from mlflow_llmbench.workloads.traces import read_trace

SERVED = {"url": "http://h", "backend": "openai"}
CELL = Cell(**SERVED, prompt_tokens=100, prefix_tokens=60, prefix_count=3)  # type: ignore[arg-type]

# The two samples of Mooncake's own description, and a third whose last block goes on in the fourth.
MOONCAKE = (
    (27482, 6955, 52, [46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 2353, 2354]),
    (30535, 6472, 26, [46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 2366]),
    (30600, 700, 4, [7, 8]),
    (30700, 1500, 4, [7, 8, 9]),
)
SHARED = (0, 12 * 512, 0, 700)


def trace_of(path: Path, requests: tuple[tuple[float, int, int, list[int] | None], ...]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(names, one, strict=True))) for one in requests))
    return path


def words_of(cell: Cell, number: int, repetition: int = 0, unique: str = "", per_word: float = 1.0) -> list[str]:
    count = round((lengths_of(cell, number)[0]) / per_word)
    return PromptSet("synthetic").words(cell, repetition, number, count, unique, per_word).split()


def common(one: list[str], other: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_groups_are_equally_frequent_and_come_from_the_seed() -> None:
    groups = [group_of(CELL, number) for number in range(300)]
    assert set(Counter(groups).values()) == {100}
    assert groups == [group_of(CELL, number) for number in range(300)]
    assert groups != [group_of(dataclasses.replace(CELL, seed=1), number) for number in range(300)]
    assert len({tuple(groups[i : i + 3]) for i in range(0, 300, 3)}) == math.factorial(3)


@pytest.mark.parametrize("unique", ["", "abc"])
def test_requests_of_a_group_share_exactly_the_prefix(unique: str) -> None:
    prompts = [words_of(CELL, number, unique=unique) for number in range(12)]
    assert {len(words) for words in prompts} == {100}
    for a in range(12):
        for b in range(a):
            same = group_of(CELL, a) == group_of(CELL, b)
            # The word after the prefix may be the same by chance, one of 64.
            assert 60 <= common(prompts[a], prompts[b]) < 64 if same else common(prompts[a], prompts[b]) < 5


def test_repetitions_and_runs_with_unique_prompts_have_prefixes_of_their_own() -> None:
    first = words_of(CELL, 0)
    assert common(first, words_of(CELL, 0, repetition=1)) < 5
    assert common(first, words_of(CELL, 0, repetition=-1)) < 5
    assert common(words_of(CELL, 0, unique="a"), words_of(CELL, 0, unique="b")) < 5
    assert first == words_of(CELL, 0)


def test_words_of_several_tokens_end_nearest_to_the_prefix() -> None:
    cell = dataclasses.replace(CELL, prefix_count=1)
    prompts = [words_of(cell, number, per_word=1.5) for number in (0, 1)]
    assert 40 <= common(*prompts) < 44 and len(prompts[0]) == 67


def test_texts_come_after_the_prefix() -> None:
    qa = load_prompts("qa")
    cell = dataclasses.replace(CELL, workload="qa", prompt_tokens=None, prefix_count=1)
    one, other = (qa.words(cell, 0, number, 1, "") for number in (0, 1))
    assert one.endswith(qa.texts[0]) and other.endswith(qa.texts[1])
    assert common(one.split(), other.split()) >= 60
    assert len(one.split()) == 60 + len(qa.texts[0].split())


def test_short_prompts_of_mixed_lengths_have_a_token_of_their_own() -> None:
    cell = dataclasses.replace(CELL, workload="mixed", prefix_tokens=99, prefix_count=1)
    lengths = [lengths_of(cell, number)[0] for number in range(200)]
    assert min(lengths) < 99 < max(lengths)
    assert [sum(p.tokens for p in parts_of(cell, n, lengths[n])) for n in range(200)] == [
        min(99, length - 1) for length in lengths
    ]


def test_a_tree_finds_what_earlier_prompts_began_with() -> None:
    tree = PrefixTree()
    a, b, c = Part("a", 512), Part("b", 512), Part("c", 512)
    assert tree.take([a, b, Part("c", 100)]) == 0
    assert tree.take([a, b, Part("c", 40)]) == 1064
    assert tree.take([a, b, c]) == 1124
    assert tree.take([a, b, c, Part("d", 7)]) == 1536
    assert tree.take([b, c]) == 0  # known, but not at the beginning
    assert tree.take([a, c]) == 512
    assert tree.take([]) == 0
    assert tree.take([Part("e", 10), Part("f", 512)]) == 0
    assert tree.take([Part("e", 512), Part("f", 512)]) == 10  # what followed the shorter part was at another place


def test_a_recorded_trace_shares_its_blocks_and_nothing_else(tmp_path: Path) -> None:
    cell = Cell(**SERVED, trace=str(trace_of(tmp_path / "t.jsonl", MOONCAKE)))  # type: ignore[arg-type]
    prompts = [words_of(cell, number) for number in range(4)]
    assert [len(words) for words in prompts] == [one[1] for one in MOONCAKE]
    assert 12 * 512 <= common(prompts[0], prompts[1]) < 12 * 512 + 4
    assert common(prompts[2], prompts[3]) == 700
    assert common(prompts[0], prompts[2]) < 4
    tree = PrefixTree()
    assert tuple(tree.take(parts_of(cell, number, None)) for number in range(4)) == SHARED
    assert shares_prefixes(cell)


def test_blocks_are_part_of_a_workload_and_their_absence_changes_nothing(tmp_path: Path) -> None:
    plain = tuple((at, prompt, output, None) for at, prompt, output, _ in MOONCAKE)
    other = tuple((at, prompt, output, [n + 1 for n in ids]) for at, prompt, output, ids in MOONCAKE)
    with_blocks, without, others = (
        read_trace(str(trace_of(tmp_path / f"{i}.jsonl", one))) for i, one in enumerate((MOONCAKE, plain, other))
    )
    assert len({with_blocks.digest, without.digest, others.digest}) == 3
    assert without.digest == "d5c15c6005e841f2"  # as before blocks were read
    cell = Cell(**SERVED, trace=str(tmp_path / "1.jsonl"))  # type: ignore[arg-type]
    assert not shares_prefixes(cell) and parts_of(cell, 0, None) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prefix_tokens": "128"}, "prefix_tokens=128 is not less than prompt_tokens=128."),
        ({"prefix_tokens": "60", "prompt_tokens": "200,50"}, "prefix_tokens=60 is not less than prompt_tokens=50."),
        ({"prefix_count": "4"}, "prefix_count is a number of prefixes, and none has tokens."),
        ({"prefix_tokens": "0"}, "prefix_tokens is too small: 0."),
        ({"prefix_tokens": "9", "url": "none", "backend": "fake"}, "prefix_tokens has a meaning only if a server"),
    ],
)
def test_prefixes_that_have_no_meaning_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({"url": "http://h", "backend": "openai"} | given)
    assert message in str(caught.value)


def test_a_trace_has_its_own_prefixes(tmp_path: Path) -> None:
    trace = str(trace_of(tmp_path / "t.jsonl", MOONCAKE))
    with pytest.raises(UsageError, match="and prefix_tokens is given too"):
        parse({"url": "http://h", "backend": "openai", "trace": trace, "prefix_tokens": "9"})


def test_prefixes_are_part_of_the_identity_of_those_cells_only() -> None:
    facts, prompts = ModelFacts("m", "none", "", ""), PromptSet("synthetic")
    plain = dataclasses.replace(CELL, prefix_tokens=None)
    assert config_hash(CELL, facts) != config_hash(dataclasses.replace(CELL, prefix_tokens=50), facts)
    assert config_hash(CELL, facts) != config_hash(dataclasses.replace(CELL, prefix_count=4), facts)
    assert config_hash(plain, facts) == config_hash(dataclasses.replace(plain, prefix_count=1), facts)
    assert len({prompts.digest(one, None) for one in (CELL, plain, dataclasses.replace(CELL, prefix_count=4))}) == 3


def test_cells_without_a_prefix_differ_in_no_number_of_prefixes() -> None:
    given = {"url": "http://h", "backend": "openai", "prefix_tokens": "none,60", "prefix_count": "1,3"}
    cells = expand_cells(parse(given))
    assert [(cell.prefix_tokens, cell.prefix_count) for cell in cells] == [(None, 1), (60, 1), (60, 3)]
