"""The mutator on a function of a few lines, and on modules of the package."""

from __future__ import annotations

import ast

import pytest

from .mutations import MODULES, PACKAGE, ROOT, files_of, mutations

SOURCE = '''
def clip(value: int | None, most: int = 9) -> int:
    """Return at most 9."""
    if value is None or not value > 0:
        return 0
    return min(value, most - 1)
'''


def test_each_operator_constant_and_branch_is_changed_alone() -> None:
    found = mutations(SOURCE)
    assert [(one.line, one.before, one.after) for one in found] == [
        (2, "9", "10"),
        (2, "9", "8"),
        (4, "if value is None or not value > 0:", "if False:"),
        (4, "value is None or not value > 0", "value is None and (not value > 0)"),
        (4, "value is None", "value is not None"),
        (4, "not value > 0", "value > 0"),
        (4, "value > 0", "value >= 0"),
        (4, "0", "1"),
        (4, "0", "-1"),
        (5, "return 0", "return None"),
        (5, "0", "1"),
        (5, "0", "-1"),
        (6, "return min(value, most - 1)", "return None"),
        (6, "min(value, most - 1)", "max(value, most - 1)"),
        (6, "most - 1", "most + 1"),
        (6, "1", "2"),
        (6, "1", "0"),
    ]


def test_each_mutation_is_a_module_of_its_own_that_differs() -> None:
    plain = ast.unparse(ast.parse(SOURCE))
    sources = [one.source for one in mutations(SOURCE)]
    assert plain not in sources and len(set(sources)) == len(sources)
    for source in sources:
        differing = [a for a, b in zip(plain.splitlines(), source.splitlines(), strict=True) if a != b]
        assert len(differing) == 1


@pytest.mark.parametrize("module", MODULES)
def test_every_listed_module_and_its_tests_exist(module: str) -> None:
    assert (ROOT / PACKAGE / f"{module}.py").exists()
    assert files_of(module) and all((ROOT / file).exists() for file in files_of(module))
