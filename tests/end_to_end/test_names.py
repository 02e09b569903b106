"""Hostile names on the command line: each gives one clear line or an ordinary run.

Nothing is written outside the run's folder.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.redaction import CONTROLS

FAST = ("run", "--output-tokens", "2", "--prompt-tokens", "2", "--repetitions", "2", "--warmup", "1")

NAMES = (
    "../../x", "../../../../tmp/llmbench-hostile", "/etc/llmbench-hostile", "/dev/full/x", "..", ".", "x/..", "~",
    "~root/x", "~nobody-of-this-name/x",
    "</script><img src=x onerror=alert(1)>", "<b>bold</b>", "[link](//host/x)", "| pipe | `code` |", "x" * 300,
    "x/" * 150, "x" * 1001,
    "a\x1b[31mred\x1b[0m", "a\rb", "two\nlines", "nul\0byte", "bell\x07\x9b", "CON", "NUL.json", "COM1", "aux.gguf",
    "-rf", "--help", "\u202egnp.exe",
    "\U0001f642 \U0001f469\u200d\U0001f4bb", "\"quotes\" and 'more'", "%s %d {0} {x}", "$(touch x)",
    "`touch x`; touch y", "$\\frac{1}$", "\udce9\udcff", "a b\u00a0c",
)  # fmt: skip

REFUSED = [name for name in NAMES if CONTROLS.search(name) or len(name) > 1000]
FOLDERS = [
    "../../x",
    "..",
    "~",
    "~nobody-of-this-name/x",
    "x" * 300,
    "x/" * 150,
    "CON",
    "-rf",
    "$(touch x)",
    "\U0001f642",
]


def test_there_are_at_least_thirty() -> None:
    assert len(set(NAMES)) >= 30


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder deep enough for `../../x`, with its own home; the command runs in `a/b/c` below it."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path.parent / "matplotlib"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    monkeypatch.chdir(tmp_path / "a/b/c")
    return tmp_path


def check(code: int, err: str) -> None:
    """Check that this is an ordinary run, or one line that says what is wrong."""
    lines = [line for line in err.splitlines() if line.startswith("llmbench:")]
    assert "Traceback" not in err, err
    if code:
        assert code in (1, 2)
        assert len(err.splitlines()) == len(lines) == 1, err
    assert not CONTROLS.search(err.replace("\n", "").replace("\r", ""))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_as_a_model_of_transformers(
    name: str, outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    before = tree(outside)
    for arguments in (
        (f"--model={name}",),
        (f"--model={name}", "--weights=random"),
        ("--model=opt-125m", f"--revision={name}"),
    ):
        code = main([*FAST, *arguments, "--tracking-uri", store_uri])
        assert code
        check(code, capsys.readouterr().err)
    assert tree(outside) == before


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_names_that_no_run_may_have(
    name: str, outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    before = tree(outside)
    assert main([*FAST, "--backend=fake", f"--model={name}", "--output-dir=out", "--tracking-uri", store_uri]) == 2
    check(2, capsys.readouterr().err)
    assert tree(outside) == before


@pytest.mark.charts
@pytest.mark.slow
def test_as_models_that_run(outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str) -> None:
    """The fake backend accepts any name, so the name appears in every name and file of a run."""
    names = [name for name in NAMES if name not in REFUSED]
    before = tree(outside)
    code = main(
        [
            *FAST,
            "--backend=fake",
            f"--model={','.join(names)}",
            "--output-dir=out",
            "--tracking-uri",
            store_uri,
            "--json",
        ]
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    assert not CONTROLS.search((out + err).replace("\n", "").replace("\r", ""))
    new = tree(outside) - before
    assert not [path for path in new if path != "a/b/c/out" and not path.startswith(("a/b/c/out/", "a/b/c/mlruns"))], (
        new
    )
    assert not [path for path in new if not re.fullmatch(r"[\w./-]+", path)]  # no name became a path
    last = json.loads(out.splitlines()[-1])
    runs = {run.info.run_id: run for run in MlflowClient(store_uri).search_runs([last["experiment_id"]])}
    assert len(runs) == len(names) + 1
    for run in runs.values():
        assert 0 < len(run.info.run_name) <= 250
        assert not CONTROLS.search(run.info.run_name)
        assert run.data.tags["llmbench.uploaded"] == "true"
    assert [runs[one["run_id"]].data.params["model"] for one in last["runs"]] == names


@pytest.mark.parametrize("parameter", ["workload", "backend", "quant", "device", "attention", "config"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_as_another_parameter(name: str, parameter: str, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(outside)
    code = main(
        [
            *FAST,
            *(() if parameter == "backend" else ("--backend=fake", "--model=fake:ttft_ms=1")),
            f"--{parameter}={name}",
        ]
    )
    assert code == 2
    check(code, capsys.readouterr().err)
    assert tree(outside) == before


@pytest.mark.parametrize("name", [*REFUSED, *FOLDERS], ids=ascii)
def test_as_a_part_of_the_output_folder(
    name: str, outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    before = tree(outside)
    asked = f"out/{name}"
    code = main(
        [*FAST, "--backend=fake", "--model=fake:ttft_ms=1", f"--output-dir={asked}", "--tracking-uri", store_uri]
    )
    check(code, capsys.readouterr().err)
    new = {outside / path for path in tree(outside) - before}
    folder = Path(os.path.realpath(asked)) if code == 0 else None
    for path in new:
        inside = folder is not None and (path.is_relative_to(folder) or folder.is_relative_to(path))
        assert inside or "mlruns" in path.parts or path.name == "out", path


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_as_what_is_compared_uploaded_or_named(
    name: str, outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    before = tree(outside)
    for arguments in (
        ("compare", "--", name, name),
        ("upload", "--", name),
        (*FAST, "--backend=fake", "--model=fake:bad=1", f"--experiment={name}"),
        ("compare", f"--log={name}", "--", "absent", "absent"),
        ("ab", f"--a=model={name}", f"--b=quant={name}", "--backend=fake"),
    ):
        code = main([*arguments])
        assert code, arguments
        check(code, capsys.readouterr().err)
    assert tree(outside) == before


def test_a_name_of_an_experiment_with_control_characters_is_refused(
    outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    assert (
        main([*FAST, "--backend=fake", "--model=fake:ttft_ms=1", "--experiment=a\x1b[31m", "--tracking-uri", store_uri])
        == 2
    )
    expected = r"llmbench: The name of the experiment has control characters: a\x1b[31m. Give a plain name."
    assert capsys.readouterr().err.splitlines() == [expected]


def test_a_result_of_another_machine_cannot_write_to_the_terminal(
    outside: Path, capsys: pytest.CaptureFixture[str], store_uri: str
) -> None:
    assert (
        main(
            [
                *FAST,
                *"--backend=fake --model=fake:ttft_ms=1,fake:ttft_ms=2 --output-dir=out --tracking-uri".split(),
                store_uri,
            ]
        )
        == 0
    )
    for file in Path("out").glob("*/*/artifacts/result.json"):
        file.write_text(file.read_text().replace("fake:ttft_ms=", r"\u001b[2Jhostile\u202e"))
    capsys.readouterr()
    [folder] = Path("out").iterdir()
    assert main(["compare", str(folder)]) in (0, 2)
    shown = "".join(capsys.readouterr())
    assert "hostile" in shown
    assert not CONTROLS.search(shown.replace("\n", ""))
