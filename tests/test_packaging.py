"""Declarations in two places are the same in both: requirements, versions, parameters, backends."""

import ast
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlflow_llmbench
from mlflow_llmbench.cli.main import COMMANDS, main, parse
from mlflow_llmbench.config import spec, training
from mlflow_llmbench.config.choices import GRIDS
from mlflow_llmbench.records import backends
from mlflow_llmbench.records.quantizations import SCHEMES
from mlflow_llmbench.workflows import study

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MLPROJECT: dict[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
DISTRIBUTIONS = {"yaml": "PyYAML", "pynvml": "nvidia-ml-py", "IPython": "ipykernel", "sklearn": "scikit-learn"}
"""Import names that differ from the name of the distribution, or of the one that brings it."""


def requirements() -> list[Requirement]:
    extras = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *extras]]


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]


def pinned(one: Requirement) -> str:
    (specifier,) = one.specifier
    assert specifier.operator == "=="
    return specifier.version


def third_party_imports() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "mlflow_llmbench").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"mlflow_llmbench"}


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == mlflow_llmbench.__version__


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_conda_has_the_requirements_of_the_package_and_of_the_papers_grid_and_nothing_that_uv_would_drop() -> None:
    *plain, pip = CONDA["dependencies"]
    assert pip == {"pip": [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gptq"]]}
    assert plain == ["python=3.11", "pip"]


def test_the_environment_of_the_project_has_what_the_papers_grid_quantizes_with() -> None:
    named = {canonicalize_name(Requirement(text).name) for text in CONDA["dependencies"][-1]["pip"]}
    for quant in GRIDS["effillm"]["quant"].split(","):
        assert {canonicalize_name(name) for name in SCHEMES[quant].packages} <= named, quant


def test_every_import_is_of_a_declared_requirement() -> None:
    declared = {canonicalize_name(one.name) for one in requirements()}
    missing = {
        name for name in third_party_imports() if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in declared
    }
    assert not missing


@pytest.mark.parametrize("constraint", constraints(), ids=str)
def test_a_constraint_is_one_version_within_the_range_of_a_requirement(constraint: Requirement) -> None:
    asked = [one for one in requirements() if canonicalize_name(one.name) == canonicalize_name(constraint.name)]
    assert asked, "nothing requires it"
    assert all(one.specifier.contains(pinned(constraint)) for one in asked)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_once(python: str) -> None:
    def here(marker: Marker | None) -> bool:
        return marker is None or marker.evaluate({"python_version": python})

    pins = [canonicalize_name(one.name) for one in constraints() if here(one.marker)]
    assert sorted(pins) == sorted({canonicalize_name(one.name) for one in requirements() if here(one.marker)})


def test_the_entry_points_are_the_table_of_backends() -> None:
    context = {"mlflow.run_context_provider": {"llmbench": "mlflow_llmbench.tracking.run_context:RunContext"}}
    deployments = {"mlflow.deployments": {"llmbench": "mlflow_llmbench.workflows.mlflow_deployments"}}
    assert PROJECT["entry-points"] == {backends.ENTRY_POINTS: backends.BACKENDS, **context, **deployments}
    assert PROJECT["scripts"] == {"llmbench": "mlflow_llmbench.cli.main:main"}


ENTRIES = {"main": "run", "online": "online"}
DECISIONS = ("recommend", "register", "gate", "reproduce")


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_project_has_the_declared_parameters_with_their_defaults(entry: str) -> None:
    parameters = MLPROJECT["entry_points"][entry]["parameters"]
    names = spec.COMMANDS[ENTRIES[entry]]
    assert parameters == {name: {"type": "string", "default": spec.default_text(name)} for name in names}
    assert list(parameters) == list(names)


def test_every_parameter_is_one_of_an_entry_point() -> None:
    assert set(spec.COMMANDS["run"]) | set(spec.COMMANDS["online"]) == set(spec.PARAMETERS)
    assert set(MLPROJECT["entry_points"]) == {*ENTRIES, "quickstart", "tune", "study", "qat", *DECISIONS}


@pytest.mark.parametrize("entry", DECISIONS)
def test_an_entry_point_of_the_decision_is_its_command_with_the_same_defaults(entry: str) -> None:
    declared: dict[str, dict[str, str]] = MLPROJECT["entry_points"][entry]["parameters"]
    command = MLPROJECT["entry_points"][entry]["command"]
    first, *others = declared
    assert command == " ".join(
        [
            f"python -m mlflow_llmbench {entry} {{{first}}}",
            *(f"--{name.replace('_', '-')} {{{name}}}" for name in others),
        ]
    )
    required = [name for name, one in declared.items() if "default" not in one]
    given = parse(
        shlex.split(command.format(**{name: one.get("default", "given") for name, one in declared.items()}))[3:]
    ).values
    options = [part for name in required if name != first for part in (f"--{name}", "given")]
    alone = parse([entry, "given", *options]).values
    for name, one in declared.items():
        default = one.get("default", "given")
        assert shlex.quote(default) == default
        if name != first and name not in required:
            assert given[name] == (alone[name] or "none")


@pytest.mark.parametrize("entry", MLPROJECT["entry_points"])
def test_an_entry_point_that_measures_says_where_its_journal_lies(
    entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mlflow run` works in the project's folder; for a project in Git it works in a temporary copy."""
    command = ENTRIES.get(entry, entry)
    assert main([command, "--help-all" if COMMANDS[command].first else "--help"]) == 0
    measures = "--output-dir" in capsys.readouterr().out
    assert measures == ("output_dir" in MLPROJECT["entry_points"][entry]["parameters"])
    assert measures == (entry not in ("recommend", "register"))


def test_a_quickstart_takes_its_own_options_with_their_defaults() -> None:
    entry = MLPROJECT["entry_points"]["quickstart"]
    defaults = {"model": "auto", "quant": "auto"}
    defaults |= {name: spec.default_text(name) for name in ("backend", "output_dir", "rerun")}
    assert entry["parameters"] == {name: {"type": "string", "default": text} for name, text in defaults.items()}
    options = [f"--{name.replace('_', '-')} {{{name}}}" for name in defaults]
    assert entry["command"] == " ".join(["python -m mlflow_llmbench quickstart", *options])
    own = {option.argument for option in COMMANDS["quickstart"].options} - {"json", "tracking_uri", "experiment"}
    assert own == set(defaults)


def test_a_study_takes_what_a_run_takes_and_what_is_its_own() -> None:
    entry, own = (
        MLPROJECT["entry_points"]["study"],
        {"of": "none", "share": "0.5", "price": "none", "accept_suspect": "none"},
    )
    defaults = {name: spec.default_text(name) for name in spec.COMMANDS["run"]} | {"preset": study.PRESET} | own
    assert entry["parameters"] == {name: {"type": "string", "default": text} for name, text in defaults.items()}
    options = [f"--{name.replace('_', '-')} {{{name}}}" for name in defaults]
    assert entry["command"] == " ".join(["python -m mlflow_llmbench study", *options])


def test_a_tuning_takes_what_a_cell_takes_and_what_a_recommendation_does() -> None:
    entry, own = MLPROJECT["entry_points"]["tune"], {"goal": "throughput", "trials": "none"}
    own |= dict.fromkeys(("max_memory", "max_ttft", "max_tpot", "min_quality", "accept_suspect"), "none")
    defaults = {name: spec.default_text(name) for name in spec.COMMANDS["tune"]} | own
    assert entry["parameters"] == {name: {"type": "string", "default": text} for name, text in defaults.items()}
    options = [f"--{name.replace('_', '-')} {{{name}}}" for name in entry["parameters"]]
    assert entry["command"] == " ".join(["python -m mlflow_llmbench tune", *options])
    taken = {option.argument for option in COMMANDS["tune"].options}
    assert taken - set(defaults) == {"config", "json", "tracking_uri", "experiment"}
    assert parse(shlex.split(entry["command"].format(**defaults))[3:]).values["trials"] == "none"


def test_a_training_takes_the_parameters_that_it_declares() -> None:
    entry = MLPROJECT["entry_points"]["qat"]
    assert entry["parameters"] == {
        name: {"type": "string", "default": training.default_text(name)} for name in training.NAMES
    }
    assert list(entry["parameters"]) == [*spec.COMMANDS["qat"], *training.TRAINING]
    options = [f"--{name.replace('_', '-')} {{{name}}}" for name in training.NAMES]
    assert entry["command"] == " ".join(["python -m mlflow_llmbench qat", *options])
    assert all(shlex.quote(one["default"]) == one["default"] for one in entry["parameters"].values())


@pytest.mark.parametrize("name", spec.PARAMETERS)
def test_a_default_passes_through_the_shell_unchanged(name: str) -> None:
    """`mlflow run` logs the quoted form of a value, so a default that needs quotes would be logged with them."""
    entry = "main" if name in spec.COMMANDS["run"] else "online"
    default = MLPROJECT["entry_points"][entry]["parameters"][name]["default"]
    assert default
    assert shlex.quote(default) == default


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_command_passes_every_parameter_on(entry: str) -> None:
    options = [f"--{name.replace('_', '-')} {{{name}}}" for name in spec.COMMANDS[ENTRIES[entry]]]
    assert MLPROJECT["entry_points"][entry]["command"] == " ".join(
        [f"python -m mlflow_llmbench {ENTRIES[entry]}", *options]
    )
    assert MLPROJECT["name"] == PROJECT["name"]
    assert MLPROJECT["conda_env"] == "conda.yaml"
