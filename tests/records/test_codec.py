from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from mlflow_llmbench.records.codec import from_json, to_json


@dataclass(frozen=True)
class Leaf:
    name: str
    ratio: float | None = None
    inner: Leaf | None = None
    late: bool | None = field(default=None, metadata={"omitted": True})


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...] = ()
    stamps: tuple[int, ...] = ()
    pairs: tuple[tuple[int, float | None], ...] = ()
    named: dict[str, Leaf] = field(default_factory=dict)
    word: str | bool | None = None
    rules: int = field(default=2, metadata={"absent": 1})


TREE = Tree((Leaf("a", 1.5, Leaf("b")),), (1, 2), ((1, None), (2, 0.5)), {"c": Leaf("c", late=True)}, True)


def test_a_record_comes_back_from_its_json() -> None:
    data = to_json(TREE)
    assert from_json(Tree, data) == TREE
    assert "late" not in data["leaves"][0] and data["named"]["c"]["late"] is True


def test_absent_and_unknown_fields() -> None:
    assert from_json(Tree, {"of_later_versions": [1]}) == Tree(rules=1)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ([], "Tree"),
        (None, "Tree"),
        ({"leaves": {}}, "leaves"),
        ({"leaves": [None]}, "leaves"),
        ({"leaves": [{"name": 3}]}, "name"),
        ({"leaves": [{"name": "a", "ratio": True}]}, "ratio"),
        ({"leaves": [{"name": "a", "inner": []}]}, "inner"),
        ({"stamps": "12"}, "stamps"),
        ({"stamps": [1, 2.5]}, "stamps"),
        ({"stamps": [1, True]}, "stamps"),
        ({"pairs": [[1]]}, "pairs"),
        ({"named": []}, "named"),
        ({"word": 3}, "word"),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_name_of_its_field(data: object, field: str) -> None:
    with pytest.raises(TypeError, match=f"^{field} cannot be "):
        from_json(Tree, data)
