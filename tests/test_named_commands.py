"""Every command that a page, a help text or a message names works as printed.

What reads a store runs against a prepared one. What measures runs with the fake backend, and its parameters are checked
as they stand. What installs, or needs a server, a cluster or the network, is parsed by the program it is for.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement

import mlflow_llmbench
from mlflow_llmbench.cli.main import COMMANDS, main, parse
from mlflow_llmbench.cli.options import Option
from mlflow_llmbench.config import spec
from mlflow_llmbench.config.training import TRAINING, parse_training
from mlflow_llmbench.records.backends import capabilities_of
from mlflow_llmbench.records.cell import PARAMETERS, Cell
from mlflow_llmbench.records.quantizations import MIXED
from mlflow_llmbench.records.results import LoadInfo, ModelFacts, RunResult
from mlflow_llmbench.workflows.versions import promote, register

from .analysis.decisions.test_capacity import LOADS, kept, recorded
from .named_commands import ROOT, Composed, Named, collected, composed
from .results import made, stored

A, B, C = "20261121T101500Z-3f2a91", "20261121T113000Z-77ab01", "20261120T090000Z-0c0ffe"
FILES = {
    "llama.json": "llama_bench",
    "llama-bench.json": "llama_bench",
    "guidellm.json": "guidellm_benchmarks",
    "vllm-results.json": "vllm_serve_detailed",
    "FILE": "llama_bench",
}
MEASURE = ("run", "online", "tune", "ab", "study", "calibrate", "qat", "quickstart", "reproduce")
ANSWERS = {"recommend": (0, 1), "tune": (0, 1), "gate": (0, 1), "reproduce": (0, 1, 4)}
"""Command → exit codes that are answers; 0 of all others."""

ALL = collected()
LLMBENCH = [one for one in ALL if one.words[0] == "llmbench"]
ALONE = [one for one in LLMBENCH if one.alone]
GIVEN = [one for one in LLMBENCH if not one.alone]


def measures(words: Sequence[str]) -> bool:
    """True for a command line that measures, or examines the machine for seconds."""
    name = words[1]
    only_studies = name in ("study", "calibrate") and "--of" in words and "--model" not in words
    return (name in MEASURE and not only_studies and "--help-all" not in words) or "--measure" in words


READ = [one for one in GIVEN if not measures(one.words) and one.words[1] != "doctor"]
MEASURED = [one for one in GIVEN if measures(one.words)]
OTHERS = [one for one in ALL if one.words[0] != "llmbench"]


def ids(some: Sequence[Named]) -> list[str]:
    return [re.sub(r"[^\w .,=@:/-]", "", one.text)[:90] for one in some]


def real(quant: str, batch: int, step: float = 10.0, processes: int = 1) -> RunResult:
    """A result as of opt-125m by transformers, whose versions can be exported."""
    cell = Cell(model="opt-125m", quant=quant, batch_size=batch, prompt_tokens=8, output_tokens=5, repetitions=5)
    model = ModelFacts("opt-125m", "preset", "facebook/opt-125m", "c0ffee")
    load = LoadInfo(1.0, weight_bytes=10**9, facts={"model.dtype": "bfloat16"})
    result = made(
        quant, batch, step, cell=replace(cell, processes=processes), model=model, load=load, memory=2.0 + batch
    )
    several = tuple(replace(one, process=number % processes) for number, one in enumerate(result.repetitions))
    return replace(result, repetitions=several)


def packed() -> RunResult:
    """A result as of a GGUF file by llama.cpp."""
    facts = {"quant.type": "Q4_0", "kv_cache.type": "f16", "llama_cpp.threads": 2, "model.tokenizer": "llama"}
    load = LoadInfo(1.0, facts=facts, made="/models/m.gguf")
    cell = replace(real("none", 1).cell, model="m.gguf", backend="llama_cpp")
    return made(cell=cell, model=ModelFacts("m.gguf", "gguf", "/models/m.gguf", "c0ffee"), load=load, memory=1.0)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, store_template: Path) -> Path:
    """A folder with three sweeps, in a store and in `llmbench-results`, and three versions of `support-bot`."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copy(store_template, folder / "mlflow.db")
    uri, before = f"sqlite:///{folder}/mlflow.db", Path.cwd()
    os.chdir(folder)
    try:
        results = folder / "llmbench-results"
        runs = stored(results / C, uri, *(real(quant, 1, processes=5) for quant in ("fp32", "bf16", "fp16")))
        runs += stored(results / B, uri, real("bf16", 1, 8.0), real("bf16", 2, 8.0), packed())
        runs += stored(results / A, uri, *(real("bf16", n) for n in (1, 4, 16)), real("fp16", 1))
        for run_id in (runs[6], runs[4], runs[3]):
            register(run_id, "support-bot", tracking_uri=uri)
        register(runs[5], "packed", tracking_uri=uri)
        assert main(["recommend", A, "--tracking-uri", uri]) == 0
    finally:
        os.chdir(before)
    (folder / "runs.txt").write_text("\n".join(runs))
    return folder


@pytest.fixture
def prepared(template: Path, store_uri: str, tmp_path: Path) -> list[str]:
    """Copy the prepared store and results into the folder of this test; return the runs."""
    shutil.copy(template / "mlflow.db", tmp_path / "mlflow.db")
    shutil.copytree(template / "llmbench-results", tmp_path / "llmbench-results")
    for name, source in FILES.items():
        shutil.copy(ROOT / "tests" / "golden" / "foreign" / f"{source}.json", tmp_path / name)
    return (template / "runs.txt").read_text().split()


def filled(words: Sequence[str], runs: Sequence[str]) -> list[str]:
    """Return the words of a command with its placeholders filled in, without the program."""
    of_processes, own = runs[:3], runs[6:]
    first, second, third = of_processes if words[1] == "calibrate" else (own[0], own[3], own[1])
    first = second if words[1] == "gate" else first  # the champion's own evidence shows nothing against it
    known = {
        "SWEEP": A, "SWEEP_A": A, "SWEEP_B": B, "SWEEP1": A, "SWEEP2": B, "SWEEP3": A, "SWEEP4": B, "$SWEEP": A,
        "RUN": first, "RUN_A": first, "RUN_B": second, "RUN_C": third, "A": first, "B": second,
        "$SLOW": own[3], "$FAST": own[0], "$CHAMPION": "models:/support-bot@champion", "VERSION": "models:/packed/1",
        "FOLDER": f"llmbench-results/{A}", "EPYC=0.5,A100=2.4": "EPYC=0.5",
    }  # fmt: skip
    pattern = re.compile(rf"(?<![\w$])(?:{'|'.join(sorted(map(re.escape, known), key=len, reverse=True))})(?!\w)")
    return [word if word.startswith("-") else pattern.sub(lambda m: known[m[0]], word) for word in words[1:]]


def test_the_collection_has_what_pages_help_and_messages_name() -> None:
    texts = {one.text: one for one in ALL}
    for text in (
        "make demo", "llmbench quickstart", "llmbench compare RUN_A RUN_B", "llmbench doctor -v",
        "mlflow models serve -m models:/X@ALIAS --env-manager local", "ray start --head",
        "mlflow run . -e register -P run=RUN -P name=support-bot",
    ):  # fmt: skip
        assert text in texts, text
    assert {one.name for one in composed()} >= {"register", "gate", "recommend", "quickstart", "upload", "models"}
    assert len(READ) > 25 and len(MEASURED) > 40


@pytest.mark.parametrize("name", sorted({one.words[1] for one in ALONE}))
def test_a_command_that_is_named_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name] if name.startswith("--") else [name, "--help"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("one", READ, ids=ids(READ))
def test_a_command_that_reads_works_as_printed(
    one: Named, prepared: list[str], store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = filled(one.words, prepared)
    if words[0] == "promote" and "previous" in words[-1]:
        promote("models:/support-bot/1", tracking_uri=store_uri)
        assert main(["gate", "models:/support-bot/3", "--against", "models:/support-bot@champion"]) == 0
        promote("models:/support-bot/3", tracking_uri=store_uri)
    elif words[0] != "promote":
        promote("models:/support-bot/1", tracking_uri=store_uri)
    if "http://127.0.0.1:5000" in words:
        words[words.index("http://127.0.0.1:5000")] = store_uri
    if "$M" in words or words[0] == "plan":
        if "--model" in words:
            del words[(at := words.index("--model")) : at + 2]
        words += ["--backend", "fake", "--model", "fake:ttft_ms=1"]
    if words[0] == "capacity":
        words = [kept(LOADS) if word == A else word for word in words]
        recorded(range(100))
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    assert code in ANSWERS.get(words[0], (0,)), f"{one.place}: {captured.err}"
    assert captured.out


STANDS_FOR = {"DIR", "MODEL", "NAME", "X"}
"""Values of parameters that stand for others."""


@pytest.mark.parametrize("one", MEASURED, ids=ids(MEASURED))
def test_the_parameters_of_a_command_that_measures_are_accepted(one: Named, tmp_path: Path) -> None:
    words = [word.replace("$M", "opt-125m") for word in one.words[1:]]
    call = parse(words)
    assert call.command.name == words[0]
    given = {
        name: value
        for name, value in call.values.items()
        if (name in PARAMETERS or name in TRAINING) and value not in (None, "auto", *STANDS_FOR)
    }
    if words[0] == "qat":
        (tmp_path / "my-text.txt").write_text("Some text.")
        parse_training(given)
    else:
        given = {name: value for name, value in given.items() if name in PARAMETERS}
        spec.parse(spec.with_backend(given) if words[0] in ("online", "tune") else given, recorded=True)


QUICK = "--backend fake --prompt-tokens 4 --output-tokens 4 --repetitions 2 --warmup 1".split()
FAKE = "fake:ttft_ms=1+itl_ms=1"
KEPT = (
    "quant",
    "batch_size",
    "pairs",
    "of",
    "price",
    "share",
    "preset",
    "margin",
    "accept_suspect",
    "against",
    "measure",
)
"""Options of a command that measures that mean the same with the fake backend."""


def faked(words: Sequence[str]) -> list[str]:
    """Return a command that measures with a fake model and short cells."""
    call = parse(words)
    known = {*capabilities_of("fake").quantizations} - {MIXED}  # which a budget has to come with
    kept: list[str] = []
    for option in call.command.options:
        value = call.values[option.argument]
        if option.argument not in KEPT or value in (None, (), False, "auto"):
            continue
        if option.argument == "quant":
            value = ",".join(quant for quant in str(value).split(",") if quant in known) or "none"
            value = value if "," in value or words[0] != "quickstart" else "bf16,int4"
        kept += _option(option, value)
    values = [str(call.values[o.argument]) for o in call.command.positional]
    if words[0] == "reproduce":
        return [words[0], *values, *kept]
    if words[0] == "gate":
        return [words[0], *values, *kept, "--pairs", "2"]
    if words[0] == "ab":
        values = [value if "=" in value and "worker_python" not in value else "quant=bf16" for value in values]
    model = FAKE + (f",{FAKE}+row_ms=1" if "," in str(call.values.get("model")) else "")
    shape = QUICK[:2] if words[0] == "quickstart" else QUICK
    return [words[0], *values, *kept, *shape, "--model", model]


def _option(option: Option, value: object) -> Iterator[str]:
    for one in value if isinstance(value, tuple) else [value]:
        yield from ([option.name] if one is True else [option.name, str(one)])


SLOW = [
    one for one in MEASURED if one.words[1] not in ("online", "qat") and not {"--config", "--launch"} & {*one.words}
]


@pytest.mark.slow
@pytest.mark.parametrize("one", SLOW, ids=ids(SLOW))
def test_a_command_that_measures_works_with_the_fake_backend(
    one: Named, prepared: list[str], store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMBENCH_CHARTS", "0")
    words = [word.replace("$M", "opt-125m") for word in filled(one.words, prepared)]
    if words[0] in ("reproduce", "gate"):
        cell = ["run", *QUICK, "--model", FAKE, "--output-dir", "own", "--repetitions", "5"]
        assert main(cell) == 0
        [folder] = Path("own").iterdir()
        for name in ("support-bot", "first"):
            main(["register", "--name", name, "--alias", "candidate", "--accept-suspect", "a test"])
        words = [re.sub("models:/support-bot.*", "models:/first@candidate", word) for word in words]
        words = [folder.name if word in prepared else word for word in words]
        words += ["--accept-suspect", "a test"] if words[0] == "gate" else []
    code = main(faked(words))
    assert code in ANSWERS.get(words[0], (0,)), one.place


@pytest.mark.slow
@pytest.mark.parametrize("one", [one for one in GIVEN if one.words[1] == "doctor"], ids=lambda one: one.text)
def test_what_examines_the_machine_works(one: Named) -> None:
    words = [word if "envs/" not in word else sys.executable for word in one.words[1:]]
    assert main(words) in (0, 1)


@pytest.mark.parametrize("one", composed(), ids=lambda one: f"{one.name} {one.place}")
def test_a_command_that_a_message_composes_is_parsed(one: Composed) -> None:
    """A command alone is a name; with values it stands as it is called."""
    command = COMMANDS[one.name]
    names = {option.argument: option for option in command.options}
    assert set(one.options) <= set(names)
    if one.positional or one.options:
        options = [part for name in one.options for part in (names[name].name, "X")]
        assert parse([one.name, *one.positional, *options]).command is command


# Commands of other programs


def project_command(words: Sequence[str]) -> list[str]:
    """Return the command of ours that `mlflow run` calls, as MLflow composes it from the MLproject."""
    from mlflow.projects import _project_spec

    entry, given = "main", {}
    for option, value in itertools.pairwise(words):
        if option == "-e":
            entry = value
        elif option == "-P":
            name, _, text = value.partition("=")
            given[name] = text
    project = _project_spec.load_project(str(ROOT))
    point = project.get_entry_point(entry)
    given |= {name: "X" for name, one in point.parameters.items() if one.default is None and name not in given}
    assert set(given) <= set(point.parameters), "MLflow would append it to the command"
    return shlex.split(point.compute_command(given, None))[3:]


def parsed_by(program: click.Command, words: Sequence[str]) -> None:
    """Parse a command line by the click program that it is for, and run nothing."""
    command, rest, context = program, [*words[1:]], click.Context(program, info_name=words[0])
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        assert found is not None, f"{command.name} has no command {rest[0]}"
        command, rest = found, rest[1:]
        context = click.Context(command, context, info_name=command.name)
    if rest or not isinstance(command, click.Group):
        command.make_context(command.name, rest, parent=context.parent, resilient_parsing=len(words) < 4)


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")  # by MLflow, of its own functions
@pytest.mark.parametrize("one", OTHERS, ids=ids(OTHERS))
def test_a_command_of_another_program_is_one_that_it_has(one: Named) -> None:
    words = one.words
    if words[:2] == ["mlflow", "run"] and len(words) > 2:
        if words[2] == "." and words[-1] != "X":
            parse(project_command(words))
    elif words[0] == "mlflow":
        import mlflow.cli

        parsed_by(mlflow.cli.cli, words)
    elif words[0] == "ray":
        parsed_by(pytest.importorskip("ray.scripts.scripts").cli, words)
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif words[0] == "pip":
        installed(words)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["python", "-m"]:
        known = (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        assert known or words[2] in ("venv", "mlflow_llmbench", "sglang.launch_server")
    else:
        assert one.text.startswith(("curl localhost:5000/invocations", "python -c", "hf auth login"))


def installed(words: Sequence[str]) -> None:
    """Check the requirements of a `pip` command; it is not run, since it would change this environment."""
    valued = ("-c", "-d", "--no-binary", "--find-links")
    rest = [word for before, word in itertools.pairwise(words[1:]) if before not in valued]
    for word in rest:
        if word.startswith((".", "-e")):
            extra = re.search(r"\[(.*)\]", word)
            declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert extra is None or f"\n{extra[1]} = [" in declared
        elif not word.startswith("-") and word != "X":
            Requirement(word)


# From an installed wheel


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_from_an_installed_wheel(tmp_path: Path) -> None:
    if "LLMBENCH_FROM_WHEEL" in os.environ:
        assert not Path(mlflow_llmbench.__file__).is_relative_to(ROOT)
        return
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path / "wheels"), str(ROOT)], check=True)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(own), str(wheel)], check=True)
    (own / "here.pth").write_text(sysconfig.get_path("purelib"))  # torch, MLflow and the others, after our own
    tree = tmp_path / "tree"
    for name in ("tests", "docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "MLproject",
        "conda.yaml",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, tree / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LLMBENCH_CACHE")}
    chosen = "not with_the_fake_backend or quickstart"  # what they measure is the same; that they start is not
    command = [tmp_path / "venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, f"tests/{Path(__file__).name}"],
        cwd=tree,
        env={**environment, "LLMBENCH_FROM_WHEEL": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
