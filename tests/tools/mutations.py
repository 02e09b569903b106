"""Single mutations of the modules that carry truth and safety: does a test fail if one operator or branch is wrong?

    python -m tests.tools.mutations --sample 40 --seed 18          # some of all modules
    python -m tests.tools.mutations --module stats/variance        # every mutation of one

The package, its tests and what they read are copied. Each mutation is written into the copy, and the tests of its
module run there (`pytest -x -m "not slow"`). `detected` means that a test failed that passes without the mutation, or
that the tests took longer than the limit. Ctrl-C ends the run and keeps what was tried. `--output` writes the counts
and the survivors, and keeps the reasons that stand in the file.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mlflow_llmbench"

STATS = ("test_stats.py", "analysis/test_order.py", "workflows/test_reproduce.py")
FIGURES = ("analysis/test_summary.py", "measure/test_online.py", "analysis/test_overload.py")
MODULES: dict[str, tuple[str, ...]] = {
    "stats/bootstrap": STATS[:1],
    "stats/descriptive": STATS[:1],
    "stats/inference": STATS,
    "stats/sequence": STATS[:2],
    "stats/variance": (*STATS[:1], "analysis/test_process_noise.py"),
    "analysis/collapsed_gaps": (),
    "analysis/comparability": ("analysis/test_comparison.py",),
    "analysis/comparison": (),
    "analysis/contention": ("analysis/test_summary.py",),
    "analysis/latency": FIGURES,
    "analysis/online_metrics": (*FIGURES[1:], "loadgen/test_server_metrics.py"),
    "analysis/online_validity": (*FIGURES[1:], "loadgen/test_server_metrics.py"),
    "analysis/order": (),
    "analysis/overload": FIGURES[1:2],
    "analysis/process_noise": ("analysis/test_comparison.py",),
    "analysis/repetitions": (*FIGURES[:2], "analysis/test_comparison.py"),
    "analysis/scaling/tradeoffs": (),
    "analysis/summary": (*FIGURES[1:2], "reports/test_golden_figures.py"),
    "analysis/verdict": (*FIGURES, "reports/test_golden_figures.py"),
    "measure/journal": ("measure/test_events.py",),
    "measure/outcome": ("measure/test_events.py",),
    "measure/stopping": ("measure/test_batch.py", "analysis/test_order.py"),
    "records/codec": ("records/test_results.py",),
    "records/reading": (),
    "records/redaction": (),
    "sweeps/resume": ("end_to_end/test_survival.py",),
    "tracking/runs": ("sweeps/test_upload.py", "sweeps/test_sweep.py"),
}
"""Module → test files that cover it, besides `tests/<folder>/test_<module>.py`."""

COPIED = (PACKAGE, "tests", "benchmarks", "pyproject.toml", "MLproject", "README.md", "docs")
PYTEST = ("-x", "-q", "-m", "not slow", "-p", "no:cacheprovider")

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"any": "all", "all": "any", "min": "max", "max": "min"}
NO_ARITHMETIC = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)
"""Operands whose sum is a concatenation: its difference would only raise a TypeError."""


@dataclass(frozen=True)
class Mutation:
    """One change of a module: its line, the code before and after, and the whole mutated source."""

    module: str
    line: int
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """Name without the line, which other changes move."""
        return f"{self.module}: {self.before} → {self.after}"


def mutations(source: str, module: str = "") -> list[Mutation]:
    """Return every single mutation of a module's source, in the order of its lines."""
    tree = ast.parse(source)
    found = []
    for parent, field, place, node in list(_places(tree)):
        for other in _variants(node):
            _put(parent, field, place, other)
            text = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, place, node)
            found.append(Mutation(module, _line(node), _short(node), _short(other), text))
    return sorted(found, key=lambda one: one.line)


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below another with its place in its parent; annotations, decorators and type imports left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params", "format_spec"):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or "TYPE_CHECKING" in ast.dump(getattr(child, "test", ast.Pass())):
                continue
            yield node, field, place, child
            yield from _places(child)


def _put(parent: ast.AST, field: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[place] = node


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """Mutated forms of one node."""
    match node:
        case ast.Compare(left, operators, right):
            for place, operator in enumerate(operators):
                other = SWAPPED[type(operator)]()
                yield ast.Compare(left, [*operators[:place], other, *operators[place + 1 :]], right)  # type: ignore[list-item]
        case ast.BinOp(left, operator, right) if type(operator) in SWAPPED and not _is_text(left, right):
            yield ast.BinOp(left, SWAPPED[type(operator)](), right)  # type: ignore[arg-type]
        case ast.BoolOp(operator, values):
            yield ast.BoolOp(SWAPPED[type(operator)](), values)  # type: ignore[arg-type]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Call(ast.Name(name), arguments, keywords) if name in CALLS:
            yield ast.Call(ast.Name(CALLS[name], ast.Load()), arguments, keywords)
        case ast.Return(ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.If(_, body, others):
            yield ast.If(ast.Constant(False), body, others)
        case ast.IfExp(_, body, other):
            yield from (body, other)
        case ast.AugAssign(target, operator, value) if type(operator) in SWAPPED and not _is_text(value):
            yield ast.AugAssign(target, SWAPPED[type(operator)](), value)  # type: ignore[arg-type]
        case ast.comprehension(target, values, [_, *_] as tests, is_async):
            yield from (
                ast.comprehension(target, values, [*tests[:place], *tests[place + 1 :]], is_async)
                for place in range(len(tests))
            )
        case ast.Raise() | ast.Expr(ast.Call()):
            yield ast.Pass()


def _is_text(*operands: ast.AST) -> bool:
    return any(
        isinstance(one, NO_ARITHMETIC) or (isinstance(one, ast.Constant) and isinstance(one.value, str))
        for one in operands
    )


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", None) or _line(node.target)  # type: ignore[attr-defined]  # a comprehension has none


def _short(node: ast.AST) -> str:
    """The code of a node in one line; of a branch only its condition."""
    text = f"if {ast.unparse(node.test)}:" if isinstance(node, ast.If) else ast.unparse(node)
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:60]} … {line[-35:]}"


def files_of(module: str) -> list[str]:
    """Test files of a module, relative to the root: its own, if there is one, and those of `MODULES`."""
    folder, _, name = module.rpartition("/")
    own = [f"{folder}/test_{name}.py"] if (ROOT / "tests" / folder / f"test_{name}.py").exists() else []
    return [f"tests/{file}" for file in dict.fromkeys([*own, *MODULES.get(module, ())])]


class Copy:
    """A copy of the package and its tests, in which one module at a time is mutated."""

    def __init__(self, folder: Path, limit_s: float) -> None:
        self.folder, self.limit_s = folder, limit_s
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)

    def is_detected(self, mutation: Mutation) -> bool:
        """Return True if a test fails with this mutation, or takes longer than the limit.

        Raises RuntimeError if the test that failed fails without it too.
        """
        file = self.folder / PACKAGE / f"{mutation.module}.py"
        plain = file.read_text("utf-8")
        _replace(file, mutation.source)
        try:
            code, output = self._pytest(files_of(mutation.module))
        finally:
            _replace(file, plain)
        if code in (0, None):
            return code is None
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        known = failed and self._pytest([failed[0]] if "::" in failed[0] else ["--collect-only", failed[0]])[0] == 0
        if not known:
            raise RuntimeError(f"Tests fail without a mutation of {mutation.module}: {failed or output[-1000:]}")
        return True

    def _pytest(self, arguments: Sequence[str]) -> tuple[int | None, str]:
        """Exit code and output of the tests; no exit code if they took longer than the limit."""
        with tempfile.TemporaryDirectory() as scratch:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *PYTEST, f"--basetemp={scratch}/tests", *arguments],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(self.folder)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=self.limit_s)
                return process.returncode, output
            except subprocess.TimeoutExpired:
                return None, ""
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _replace(module: Path, source: str) -> None:
    """Write a module and remove its compiled form, which is taken for the new one if both are of one second."""
    module.write_text(source, "utf-8")
    for compiled in module.parent.glob(f"__pycache__/{module.stem}.*"):
        compiled.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make mutations and run the tests; print a table of them. Returns 1 if fewer than 90 % were detected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", help="like stats/variance; by default all of the list")
    parser.add_argument("--sample", type=int, help="number of mutations; by default every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="seconds for the tests of one mutation")
    parser.add_argument("--output", type=Path, help="JSON file for counts and survivors")
    given = parser.parse_args(arguments)
    modules = given.module or list(MODULES)
    if unknown := [module for module in modules if not files_of(module)]:
        parser.error(f"No test file is known for {unknown[0]}. Add it to MODULES.")
    every = [one for m in modules for one in mutations((ROOT / PACKAGE / f"{m}.py").read_text("utf-8"), m)]
    wanted = len(every) if given.sample is None else min(given.sample, len(every))
    chosen = random.Random(given.seed).sample(every, wanted)  # in random order: a part of it is a sample too
    tried: list[Mutation] = []
    alive: list[Mutation] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        copy = Copy(Path(folder), given.limit)
        for mutation in chosen:
            detected = copy.is_detected(mutation)
            tried.append(mutation)
            alive += [] if detected else [mutation]
            print("detected" if detected else "ALIVE   ", f"{mutation.line:4}", mutation.name, flush=True)
    share = 1 - len(alive) / len(tried) if tried else 1.0
    print(f"{len(tried) - len(alive)} of {len(tried)} detected ({share:.0%}); {len(every)} are possible.")
    if given.output:
        counts = {"modules": modules, "seed": given.seed, "possible": len(every), "tried": len(tried)}
        _write_json(given.output, counts | {"detected": len(tried) - len(alive)}, alive)
    return 0 if share >= 0.9 else 1


def _write_json(file: Path, counts: Mapping[str, object], alive: Sequence[Mutation]) -> None:
    before = json.loads(file.read_text("utf-8")).get("survivors", []) if file.exists() else []
    reasons = {(one["module"], one["before"], one["after"]): one.get("reason", "") for one in before}
    survivors = [
        {"module": m.module, "line": m.line, "before": m.before, "after": m.after}
        | {"reason": reasons.get((m.module, m.before, m.after), "")}
        for m in alive
    ]
    text = json.dumps({**counts, "survivors": survivors}, indent=1, ensure_ascii=False)
    file.write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
