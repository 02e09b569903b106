"""Declared capabilities: no code compares names of backends, and a backend of another package is treated like ours."""

import ast
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of
from mlflow_llmbench.analysis.decisions.export import export
from mlflow_llmbench.backends.base import backend_class
from mlflow_llmbench.config import spec
from mlflow_llmbench.config.cells import config_hash, expand_cells
from mlflow_llmbench.measure import journal, quality_order
from mlflow_llmbench.measure.events import QualityWithheld
from mlflow_llmbench.measure.supervise import Limits
from mlflow_llmbench.measure.task import Task
from mlflow_llmbench.records.backends import (
    BACKENDS,
    CHECKPOINT,
    RUNTIMES,
    Capabilities,
    backend_of,
    capabilities_of,
    known_backends,
    recorded_capabilities,
)
from mlflow_llmbench.records.cell import BACKEND_SPECIFIC, Cell, Options
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.quantizations import QUANTIZATIONS
from mlflow_llmbench.records.results import LoadInfo, ModelFacts, Verdict

from ..results import made

PACKAGE = Path(__file__).resolve().parents[2] / "mlflow_llmbench"
TABLE = PACKAGE / "records" / "backends.py"
NAMED = ("DEFAULT_BACKEND", "SERVER_BACKEND", "CALLBACK_BACKEND")


# No code compares names


def names_in(node: ast.AST) -> bool:
    """Return True if an expression is, or contains as an element, a string equal to a backend's name."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(names_in, node.elts))
    if isinstance(node, ast.Dict):
        return any(key is not None and names_in(key) for key in node.keys)
    return (isinstance(node, ast.Constant) and node.value in BACKENDS) or (
        isinstance(node, ast.Name) and node.id in NAMED
    )


def mentions_backend(node: ast.AST) -> bool:
    """Return True for `cell.backend`, `config["backend"]`, a variable `backend`, and expressions with one of them."""
    return any(
        (isinstance(part, ast.Attribute) and part.attr == "backend")
        or (isinstance(part, ast.Name) and part.id in ("backend", "backends"))
        or (isinstance(part, ast.Constant) and part.value == "backend")
        for part in ast.walk(node)
    )


def tables_of(tree: ast.Module) -> set[str]:
    """Names of the tuples and dictionaries of a module whose elements or keys are names of backends."""
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and names_in(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }


def name_checks(source: str) -> Iterator[int]:
    """Lines that compare a backend with a name, test it against names, or look it up in a table of names."""
    tree = ast.parse(source)
    tables = tables_of(tree)

    def named(node: ast.AST) -> bool:
        return names_in(node) or (isinstance(node, ast.Name) and node.id in tables)

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(named, sides)) and any(map(mentions_backend, sides)):
                yield node.lineno
        elif isinstance(node, ast.Subscript) and named(node.value) and mentions_backend(node.slice):
            yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and named(node.func.value):
            if any(map(mentions_backend, node.args)):
                yield node.lineno
        elif isinstance(node, ast.Match) and mentions_backend(node.subject):
            yield node.lineno


@pytest.mark.parametrize(
    "source",
    [
        'cell.backend == "vllm"',
        'cell.backend in ("llama_cpp", "vllm")',
        'config["backend"] != "transformers"',
        '"fake" not in axes["backend"]',
        "backend == DEFAULT_BACKEND",
        'SERVED = ("transformers",)\nserved = cell.backend in SERVED',
        'ENGINES = {"transformers": 1}\nENGINES[config["backend"]]',
        '{"vllm": 1}.get(cell.backend)',
        'match cell.backend:\n    case "vllm": pass',
    ],
)
def test_a_check_of_a_name_is_found(source: str) -> None:
    assert list(name_checks(source))


@pytest.mark.parametrize("source", ['target == "vllm"', '"transformers" in packages', 'versions["vllm"]'])
def test_names_of_packages_and_targets_are_no_backends(source: str) -> None:
    assert not list(name_checks(source))


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if "backends" not in file.relative_to(PACKAGE).parts[:1]]


@pytest.mark.parametrize("file", [f for f in FILES if f != TABLE], ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_code_outside_the_backends_checks_a_name(file: Path) -> None:
    assert list(name_checks(file.read_text(encoding="utf-8"))) == []


# Ours declare what the program needs to know


@pytest.mark.parametrize("name", BACKENDS)
def test_declared_values_are_values_of_parameters(name: str) -> None:
    own = capabilities_of(name)
    for parameter, values in (("quant", own.quantizations), ("attention", own.attentions), ("decode", own.decodes)):
        for value in values:
            spec.PARSERS[spec.PARAMETERS[parameter].metadata["kind"]](parameter, value, {})
    assert set(own.parameters) <= set(BACKEND_SPECIFIC)
    assert {*own.delegates, *filter(None, [own.reference, own.offline_baseline])} <= set(RUNTIMES)


def test_every_quantization_and_every_specific_parameter_has_a_backend() -> None:
    declared = [capabilities_of(name) for name in RUNTIMES]
    assert {quant for own in declared for quant in own.quantizations} == set(QUANTIZATIONS)
    assert {name for own in declared for name in own.parameters} == set(BACKEND_SPECIFIC)


def test_a_delegate_runs_what_a_backend_lacks() -> None:
    assert [backend_of("transformers", quant) for quant in ("int4", "q4_k_m")] == ["transformers", "llama_cpp"]
    assert backend_of("fake", "q4_k_m") == "fake"  # and is refused there


def test_a_result_of_a_backend_that_is_not_installed_can_be_read() -> None:
    assert recorded_capabilities("gone") == Capabilities()
    with pytest.raises(UsageError, match=r"Unknown backend: gone\. Known: callback, "):
        capabilities_of("gone")


def test_an_engine_of_the_served_model_is_one_that_answers() -> None:
    tree = ast.parse((PACKAGE / "tracking" / "serving_model.py").read_text(encoding="utf-8"))
    [engines] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "ENGINES"
    ]
    assert isinstance(engines, ast.Dict)
    served = {serving.engine for name in BACKENDS if (serving := capabilities_of(name).serving)}
    assert {key.value for key in engines.keys if isinstance(key, ast.Constant)} == served - {""}


def test_tasks_of_the_harness_are_withheld_from_a_backend_that_gives_it_no_model(tmp_path: Path) -> None:
    cell, model = Cell(backend="llama_cpp"), ModelFacts("m", "folder", "/m", "c0ffee")
    reported: list[object] = []
    task = Task((cell,), model, (tmp_path,), Options(quality_tasks="arc_easy"))
    assert quality_order.order(task, reported.append, None, Limits()) is None
    assert reported == [QualityWithheld("backend=llama_cpp gives lm-eval no model. Leave quality_tasks out.")]


# Another package's backend


MINIMAL = '''
from mlflow_llmbench.backends.base import Capabilities
from mlflow_llmbench.records.results import LoadInfo, ModelFacts

class Minimal:
    """Emits the token 7. It inherits nothing, and declares one quantization and one parameter."""

    capabilities = Capabilities(library="Minimal", quantizations=("none", "bf16"), parameters=("mmap",))

    @classmethod
    def resolve(cls, cell):
        return ModelFacts(cell.model, "none", "minimal", "c0ffee", dtype="float32")

    @classmethod
    def prepare(cls, cell, model): ...

    @classmethod
    def is_prepared(cls, cell, model):
        return True

    def __init__(self, cell, model):
        self.cell, self.device = cell, "cpu"

    def load(self):
        return self.describe()

    def describe(self):
        facts = {"model.dtype": "float32", "minimal.mmap": str(self.cell.mmap)}
        return LoadInfo(0.1, weight_bytes=4096, vocab_size=100, facts=facts)

    def generate(self, prompts, output_tokens, emit, history=None):
        for _ in range(output_tokens):
            emit([7] * len(prompts))

    def encode(self, text): ...
    def decode(self, ids):
        return ""

    def device_memory(self, reset=False): ...

    def peaks(self):
        return {}

    def trim(self): ...
    def close(self): ...

class Undeclared:
    pass
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with an installed package that has nothing but entry points."""
    folder = tmp_path / "site"
    info = folder / "minimal_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "minimal_backend.py").write_text(MINIMAL)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: minimal-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mlflow_llmbench.backends]\nminimal = minimal_backend:Minimal\nbare = minimal_backend:Undeclared\n"
        "absent = minimal_backend:Absent\nfake = minimal_backend:Minimal\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    sys.modules.pop("minimal_backend", None)


CELL = {"model": "m", "backend": "minimal", "prompt_tokens": "4", "output_tokens": "4", "repetitions": "5"}


@pytest.mark.usefixtures("installed")
def test_it_is_found_and_cannot_replace_one_of_ours() -> None:
    assert known_backends()["minimal"] == "minimal_backend:Minimal"
    assert known_backends()["fake"] == BACKENDS["fake"]
    assert backend_class("minimal").resolve(Cell(model="m", backend="minimal")).revision == "c0ffee"


@pytest.mark.usefixtures("installed")
def test_it_runs_a_cell_from_parameters_to_files() -> None:
    result = run(**CELL, warmup="1", quant="bf16", mmap="false")
    assert result.outcome == "ok", result.rows[0].failure
    measured = journal.read_result(next(result.folder.glob("*/artifacts")))
    assert measured.cell.backend == "minimal"
    assert measured.load and measured.load.facts["minimal.mmap"] == "False"
    report = json.loads(next(result.folder.glob("*/artifacts/result.json")).read_text(encoding="utf-8"))
    assert report["metrics"]["throughput/output_tokens_per_s"] > 0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant": "int4"}, r"quant=int4 is a quantization of transformers, not of backend=minimal\. "
         r"Give backend=transformers, or quant=none,bf16\."),
        ({"quant": "q8_0"}, r"quant=q8_0 is a quantization of llama\.cpp, not of backend=minimal\. "
         r"Give backend=llama_cpp, or quant=none,bf16\."),
        ({"gpu_layers": "4"}, r"gpu_layers is a setting of llama\.cpp, which does not run every cell\. "
         r"Give backend=llama_cpp, or leave it out\."),
        ({"weights": "random"}, r"backend=minimal has no weights=random\. Use weights=hub\."),
        ({"attention": "eager"}, r"backend=minimal has its own attention, so attention=eager cannot be used\."),
        ({"decode": "compiled"}, r"backend=minimal has no decode=compiled\. Use decode=generate\."),
        ({"kv_cache": "int8"}, r"backend=minimal has no kv_cache=int8\. Use kv_cache=auto\."),
        ({"history": "kept", "prompt_tokens": "auto", "workload": "chat"},
         r"backend=minimal cannot be measured turn by turn with history=kept\. Use history=none\."),
        ({"batching": "continuous", "request_rate": "5"}, r"backend=minimal has no batching=continuous\."),
        ({"url": "http://127.0.0.1:9"}, r"url is given, and backend=minimal runs the model in this process\."),
        ({"launch": "serve {port}"}, r"launch is given, and backend=minimal runs the model in this process\."),
    ],
)  # fmt: skip
def test_what_it_does_not_declare_is_refused_in_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(**CELL | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_parameter_that_it_declares_is_part_of_its_cells_identity() -> None:
    model = ModelFacts("m", "none", "minimal", "c0ffee")
    plain, read = (expand_cells(spec.parse(CELL | {"mmap": mmap}))[0] for mmap in ("true", "false"))
    assert config_hash(plain, model) != config_hash(read, model)


@pytest.mark.usefixtures("installed")
def test_it_is_registered_only_if_it_declares_what_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    load = LoadInfo(1.0, facts={"model.dtype": "bfloat16"})
    model = ModelFacts("owner/model", "hub", "owner/model", "c0ffee")
    result = made(cell=Cell(model="owner/model", backend="minimal"), model=model, load=load)
    valid = Evidence("r" * 32, "s", Verdict("valid"))
    with pytest.raises(
        UsageError, match=r"backend=minimal cannot be registered: .* run by transformers or llama\.cpp\."
    ):
        deployment_of(result, {}, valid)
    declared = dataclasses.replace(capabilities_of("minimal"), serving=CHECKPOINT)
    monkeypatch.setattr(backend_class("minimal"), "capabilities", declared)
    config = deployment_of(result, {}, valid).config
    assert (config["backend"], config["engine"]) == ("minimal", "checkpoint")
    text = export(config, (), uri="models:/m/1", target="vllm")
    assert "Measured with Minimal on " in text


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bare", r"Backend bare declares no capabilities: minimal_backend:Undeclared has no attribute `capabilities`"),
        ("absent", r"Backend absent cannot be imported from minimal_backend:Absent: .*Check the package"),
    ],
)
def test_a_broken_one_is_named_with_its_package(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec.parse(CELL | {"backend": name})
