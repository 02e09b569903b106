"""Reproducing a run: basis of the verdict, refusals before anything is measured, and the command on a real store."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.analysis import comparison as analysis
from mlflow_llmbench.analysis.comparison import Comparison
from mlflow_llmbench.analysis.decisions.equivalence import Reproduction, changed_facts, judge_reproduction
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.cells import config_hash, expand_cells
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.errors import NotComparable, UsageError
from mlflow_llmbench.records.results import LoadInfo, Quality, RunResult, TextScores
from mlflow_llmbench.reports.reproduction import reproduction_json, reproduction_markdown
from mlflow_llmbench.stats import equivalence, required_sample_size
from mlflow_llmbench.sweeps.planning import plan
from mlflow_llmbench.system import calibrations
from mlflow_llmbench.tracking.registry import register, result_of
from mlflow_llmbench.tracking.store import open_store
from mlflow_llmbench.workflows.reproduce import (
    Original,
    _judged,
    find_original,
    parameters_again,
    require_same,
    unlike_here,
)

from ..results import GB, WIGGLE, known_noise, made, stored

ORIGINAL = made()
CELL = {
    "backend": "fake",
    "model": "fake:ttft_ms=20+itl_ms=10",
    "prompt_tokens": 8,
    "output_tokens": 5,
    "repetitions": 5,
    "warmup": 1,
}


def compare(a: RunResult, b: RunResult) -> Comparison:
    """Compare on a machine whose processes are known not to differ."""
    return analysis.compare(a, b, calibrations=[known_noise(a)])


def weighed(**again: object) -> Reproduction:
    return judge_reproduction(compare(ORIGINAL, made(**again)), 0.05)  # type: ignore[arg-type]


def states(found: Reproduction) -> dict[str, str]:
    return {finding.key.partition("/")[2]: finding.state for finding in found.findings}


def test_the_two_one_sided_tests_are_those_of_scipy() -> None:
    from scipy import stats

    a, b, margin = [1.0, 1.2, 0.9, 1.1, 1.05], [1.3, 1.1, 1.25, 1.2], 0.4
    found = equivalence(a, b, margin)
    assert found
    lower = stats.ttest_ind([v + margin for v in b], a, equal_var=False, alternative="greater").pvalue
    upper = stats.ttest_ind([v - margin for v in b], a, equal_var=False, alternative="less").pvalue
    assert found.p_within == pytest.approx(max(lower, upper))
    interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert equivalence(a, [1.0], margin) is None
    exact = equivalence([1.0, 1.0], [1.5, 1.5], 0.4)
    assert exact and (exact.p_within, exact.p_beyond) == (1.0, 0.0)


@pytest.mark.parametrize(("difference", "tests"), [(0.0, 1), (0.01, 1), (0.03, 1), (0.08, 1), (0.08, 5)])
def test_as_many_repetitions_as_are_said_to_tell_do_tell_nine_times_in_ten(difference: float, tests: int) -> None:
    import numpy as np

    spread, margin = 0.04, 0.05
    needed = required_sample_size(difference, margin, (spread**2, spread**2), tests=tests)
    assert needed
    random = np.random.default_rng(0)
    told = 0
    for _ in range(1000):
        found = equivalence(random.normal(0.0, spread, needed), random.normal(difference, spread, needed), margin)
        told += found is not None and (found.p_within if difference < margin else found.p_beyond * tests) < 0.05
    assert 0.87 < told / 1000 < 0.94


def test_no_number_of_repetitions_is_named_where_none_would_tell() -> None:
    assert (
        required_sample_size(0.0, 0.05, (0.04**2, 0.04**2), first=3) is None
    )  # the first sample alone is too uncertain
    assert required_sample_size(-0.05, 0.05, (0.04**2, 0.04**2)) is None
    assert required_sample_size(0.1, 0.05, (0.0, 0.0)) == 2


def test_the_same_again_is_equivalent() -> None:
    found = weighed(step=10.1)
    assert (found.verdict, found.exit_code) == ("equivalent", 0)
    assert found.why == "Equivalent within ±5 % in all of 7 metrics."
    assert set(states(found).values()) == {"equivalent"}
    assert all(f.p_within is not None and f.p_within < 0.05 for f in found.findings if f.key.startswith("latency"))


def test_slower_beyond_the_margin_is_different_and_within_it_is_not() -> None:
    found = weighed(step=12)
    assert (found.verdict, found.exit_code) == ("different", 1)
    assert found.why.startswith("Different by more than ±5 %: tokens/s 0.8")
    assert states(found)["ttft_ms_mean"] == "equivalent" and states(found)["itl_ms_p50"] == "different"
    assert weighed(step=10.2).verdict == "equivalent"  # a difference that is seen, and small
    assert weighed(memory=5).verdict == "different"


def test_what_cannot_be_told_says_how_many_repetitions_would() -> None:
    def wide(**fields: Any) -> RunResult:
        """Five processes of one repetition each, which differ much."""
        one = made(factors=(0.9, 0.95, 1.0, 1.05, 1.1), **fields)
        repetitions = tuple(dataclasses.replace(r, process=r.index) for r in one.repetitions)
        return dataclasses.replace(one, repetitions=repetitions)

    few = dataclasses.replace(wide(), repetitions=wide().repetitions[1:4])
    quiet = tuple(dataclasses.replace(r, process=r.index) for r in ORIGINAL.repetitions)
    found = judge_reproduction(compare(dataclasses.replace(ORIGINAL, repetitions=quiet), few), 0.05)
    assert (found.verdict, found.exit_code) == ("cannot_tell", 4)
    assert "processes of the reproduction would tell, with a chance of 90 %" in found.why
    both = judge_reproduction(compare(wide(), wide(ended_ms=3000)), 0.05)
    needed = max(f.needed_each or 0 for f in both.findings)
    assert f"about {needed} on each side would tell" in both.why and needed > 10
    near = judge_reproduction(compare(wide(), wide(step=10.5, ttft=21)), 0.05)
    assert near.verdict == "cannot_tell" and "no sensible number" in near.why
    single = judge_reproduction(compare(ORIGINAL, made(factors=(1.0,))), 0.05)
    assert single.verdict == "cannot_tell" and "at least 2 repetitions" in single.why


def test_single_processes_are_equivalent_only_where_their_noise_is_known() -> None:
    """A difference of 1 % within ±5 %: shown where processes are known not to differ."""
    again = made(step=10.1)
    assert judge_reproduction(compare(ORIGINAL, again), 0.05).verdict == "equivalent"
    found = judge_reproduction(analysis.compare(ORIGINAL, again), 0.05)
    assert found.verdict == "cannot_tell"
    assert (
        "processes on each side would tell, with a chance of 90 %. The noise between processes is assumed" in found.why
    )
    assert "`llmbench calibrate`" in found.why
    assert any("a standard deviation of 3 %, which is assumed" in note for note in found.notes)


def test_quality_is_held_against_the_margin_too() -> None:
    def verdict(now: float) -> str:
        return judge_reproduction(
            compare(ORIGINAL, made(ended_ms=3000)), 0.05, ({"quality/perplexity": 10.0}, {"quality/perplexity": now})
        ).verdict

    assert (verdict(10.1), verdict(11.0)) == ("equivalent", "different")


def test_the_texts() -> None:
    found = weighed(step=12)
    text = html.unescape(reproduction_markdown(found))
    assert text.startswith("## Different by more than ±5 %") and "| ITL p50 ms | 10.00 | 12.00 | 1.200 |" in text
    told = reproduction_json(found)
    assert (told["verdict"], told["exit_code"], len(told["findings"])) == ("different", 1, 7)
    json.dumps(told, allow_nan=False)


# Rebuilding cells, and refusals


def test_the_parameters_are_those_of_the_run_with_the_commit_that_was_measured() -> None:
    hub = dataclasses.replace(ORIGINAL, model=dataclasses.replace(ORIGINAL.model, source="hub", revision="abc"))
    hub = dataclasses.replace(hub, cell=dataclasses.replace(hub.cell, backend="transformers", model="a/b"))
    parameters = parameters_again(hub)
    assert (parameters["model"], parameters["revision"], parameters["repetitions"]) == (["a/b"], ["abc"], ["5"])


@pytest.mark.parametrize(
    "settings",
    [
        {
            "batching": "dynamic",
            "batch_wait_ms": 50.0,
            "request_rate": 40.0,
            "arrival": "gamma",
            "burstiness": 2.0,
            "requests": 6,
            "batch_size": 2,
        },
        {
            "batching": "continuous",
            "batch_wait_ms": 100.0,
            "request_rate": 40.0,
            "burstiness": 1.0,
            "workload": "mixed",
        },
        {"workload": "chat", "history": "kept", "prompt_tokens": None},
        {"quant": "gptq", "group_size": 64},
        {"threads": 1, "attention": "eager", "processes": 2, "seed": 3},
    ],
)
def test_every_parameter_of_a_cell_is_measured_again(settings: dict[str, Any]) -> None:
    cell = dataclasses.replace(ORIGINAL.cell, **settings)
    [again] = expand_cells(parse(parameters_again(made(cell=cell))))
    assert again == cell
    assert (
        config_hash(again, ORIGINAL.model)
        == config_hash(cell, ORIGINAL.model)
        != config_hash(ORIGINAL.cell, ORIGINAL.model)
    )


@pytest.mark.parametrize("grant", ["trust_remote_code", "allow_pickle"])
def test_what_a_run_may_do_is_not_taken_over_from_it(grant: str) -> None:
    trusting = dataclasses.replace(ORIGINAL, cell=dataclasses.replace(ORIGINAL.cell, **{grant: True}))
    with pytest.raises(
        UsageError, match=f"{grant}=true, which is not taken over from a run.*add --{grant.replace('_', '-')}"
    ):
        parameters_again(trusting)
    assert parameters_again(trusting, frozenset({grant}))[grant] == ["true"]


def test_a_servers_address_is_not_taken_over() -> None:
    served = dataclasses.replace(
        ORIGINAL, cell=dataclasses.replace(ORIGINAL.cell, url="http://10.0.0.1:8000", backend="openai")
    )
    with pytest.raises(UsageError, match="an address is not taken over from a run. Add --url http://10.0.0.1:8000"):
        parameters_again(served)
    assert parameters_again(served, url="http://127.0.0.1:1")["url"] == ["http://127.0.0.1:1"]
    with pytest.raises(UsageError, match="no server was measured"):
        parameters_again(ORIGINAL, url="http://127.0.0.1:1")


def test_another_model_or_workload_is_no_reproduction(tmp_path: Path) -> None:
    result = run(**CELL, output_dir=str(tmp_path / "r"), tracking_uri=f"sqlite:///{tmp_path}/m.db")
    original = find_original(str(result.folder), f"sqlite:///{tmp_path}/m.db").result
    again = plan(parse(parameters_again(original)))
    require_same(original, again.cells[0])
    other = dataclasses.replace(original, model=dataclasses.replace(original.model, revision="0" * 16))
    with pytest.raises(NotComparable, match="has changed since the run was measured: .* 0000000000000000 → "):
        require_same(other, again.cells[0])
    changed = dataclasses.replace(original, hashes=dataclasses.replace(original.hashes, workload="another"))
    with pytest.raises(NotComparable, match="The workload synthetic has changed since"):
        require_same(changed, again.cells[0])
    in_turns = dataclasses.replace(again.spec, axes={**again.spec.axes, "processes": (6,)})
    require_same(original, plan(in_turns).cells[0])  # the number of processes is no other model


def test_every_difference_of_the_environment_is_named() -> None:
    elsewhere = made(environment={"cpu": {"name": "Z80"}, "packages": {"torch": "0.1"}})
    again = plan(parse(CELL))
    told = {
        difference.name: (difference.a, difference.b)
        for difference in unlike_here(elsewhere, again.cells[0], again.machine)
    }
    assert told["CPU"][0] == "Z80" and told["CPU"][1] not in ("none", "Z80")
    assert told["torch"][0] == "0.1"


# The command


def test_a_run_is_measured_again_linked_and_judged(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(**CELL, experiment="mine")
    code = main(["reproduce", first.run_ids[0], "--margin", "40%", "--json"])
    out = capsys.readouterr().out
    assert out.startswith(f"This machine and its software are those of run {first.run_ids[0]}.\n")
    assert "Welch's t test on the logarithms of 5 and 5 repetitions" in out
    told = json.loads(out.splitlines()[-1])
    assert told["original_run_id"] == first.run_ids[0]
    assert (code, told["verdict"]) in ((0, "equivalent"), (4, "cannot_tell"))  # the latter on a busy machine
    client = MlflowClient(store_uri)
    new, old = client.get_run(told["run_id"]), client.get_run(first.run_ids[0])
    assert new.info.experiment_id == old.info.experiment_id
    assert (new.data.tags["llmbench.reproduces"], new.data.tags["llmbench.reproduction"]) == (
        old.info.run_id,
        told["verdict"],
    )
    assert old.data.tags["llmbench.reproduced_by"] == new.info.run_id
    assert new.data.tags["llmbench.config_hash"] == old.data.tags["llmbench.config_hash"]
    assert "llmbench.linked_run" not in new.data.tags  # it was measured, not found
    files = {item.path for item in client.list_artifacts(told["run_id"], "reproduction")}
    assert {
        f"reproduction/{name}" for name in ("reproduction.json", "reproduction.md", "comparison.md", "table.json")
    } <= files


def test_a_registered_version_whose_figures_are_not_met_is_exit_code_1(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faster = run(**CELL | {"model": "fake:ttft_ms=10+itl_ms=5"})
    measured = find_original(str(faster.folder)).result
    slow = dataclasses.replace(
        measured,
        cell=dataclasses.replace(measured.cell, model=CELL["model"]),
        model=dataclasses.replace(measured.model, **_named(CELL["model"])),
    )
    [run_id] = stored(tmp_path / "claimed", store_uri, slow)
    register(open_store(store_uri), run_id, "bot", accept_suspect="a test")
    code = main(["reproduce", "models:/bot@candidate"])
    out = capsys.readouterr().out
    assert code in (1, 4)  # the latter on a busy machine, on which twice the time may be chance
    assert code == 4 or "Different by more than ±5 %: tokens/s 0." in out


def _named(script: str) -> dict[str, str]:
    from mlflow_llmbench.records.results import hash16

    return {"name": script, "revision": hash16(script)}


def test_a_stream_that_was_batched_here_is_measured_again(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    stream = {"batching": "dynamic", "batch_wait_ms": 5, "batch_size": 2, "request_rate": 200, "requests": 4}
    done = run(**(CELL | stream), tracking_uri=store_uri)
    assert main(["reproduce", done.run_ids[0], "--margin", "0.9", "--json"]) in (0, 1, 4)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    before, again = (result_of(open_store(store_uri), run_id) for run_id in (told["original_run_id"], told["run_id"]))
    assert again.cell == before.cell and again.hashes.config == before.hashes.config
    assert (again.cell.batching, again.cell.batch_wait_ms) == ("dynamic", 5.0)


def test_another_text_is_no_other_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path))
    calibrations.keep(known_noise(ORIGINAL))

    def scored(text: str, nll: float) -> RunResult:
        return dataclasses.replace(
            ORIGINAL,
            ended_ms=round(1000 * nll),
            quality=Quality(text, TextScores(text, 3, 8, 4, ((nll, nll),))),
            sweep="s",
        )

    def found(text: str) -> Reproduction:
        original = Original(scored("a", 1.0), None, "a")
        return _judged(original, scored(text, 2.0), None, 0.05).found  # type: ignore[arg-type]

    assert found("a").verdict == "different"
    assert found("b").verdict == "equivalent"
    assert any("Perplexity is not compared: a run does not keep the text" in note for note in found("b").notes)


def test_another_machine_is_named_and_not_refused(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = find_original(str(run(**CELL).folder)).result
    elsewhere = dataclasses.replace(
        first,
        environment={**first.environment, "cpu": {**first.environment["cpu"], "name": "Xeon"}},
        hashes=dataclasses.replace(first.hashes, hardware="other"),
        cell=dataclasses.replace(first.cell, warmup=None),
        steady=False,
    )
    [run_id] = stored(tmp_path / "elsewhere", store_uri, elsewhere)
    assert main(["reproduce", run_id, "--margin", "0.4"]) in (0, 4)  # the latter on a busy machine
    out = capsys.readouterr().out
    assert "The verdict on the original is suspect (not_steady" in out and "on A is" not in out
    assert out.startswith(f"This machine or its software differs from where run {run_id} was measured: CPU Xeon → ")
    assert "The environment differs from the original's: CPU Xeon → " in out


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        (
            {"cell": dataclasses.replace(ORIGINAL.cell, output_tokens=6)},
            3,
            "The original is invalid (wrong_token_count). There is nothing to reproduce.",
        ),
        (
            {"cell": dataclasses.replace(ORIGINAL.cell, trust_remote_code=True)},
            2,
            "If you trust the model fake:x, add --trust-remote-code.",
        ),
    ],
)
def test_what_is_not_measured_again(
    fields: dict[str, object],
    code: int,
    message: str,
    store_uri: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    [run_id] = stored(tmp_path / "s", store_uri, dataclasses.replace(ORIGINAL, **fields))  # type: ignore[arg-type]
    assert main(["reproduce", run_id]) == code
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
    assert len(MlflowClient(store_uri).search_runs([MlflowClient(store_uri).get_run(run_id).info.experiment_id])) == 1


def test_a_workload_that_has_changed_is_told_before_anything_is_measured(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one two three"}\n')
    first = run(**CELL | {"workload": str(prompts), "repetitions": 2})
    prompts.write_text('{"prompt": "another text here"}\n')
    assert main(["reproduce", first.run_ids[0]]) == 2
    assert "has changed since the run was measured. Restore the file" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "llmbench-results").iterdir()] == [first.folder.name]


def test_wrong_use_and_a_failed_measurement(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several = stored(tmp_path / "s", store_uri, made(), made("int8"))
    assert main(["reproduce", str(tmp_path / "s")]) == 2
    assert "has 2 cells, but only one can be measured again at a time. Give the run" in capsys.readouterr().err
    for margin in ("0", "much"):
        assert main(["reproduce", several[0], "--margin", margin]) == 2
    capsys.readouterr()
    script = "fake:fail=error"
    broken = made(
        cell=dataclasses.replace(ORIGINAL.cell, model=script),
        model=dataclasses.replace(ORIGINAL.model, **_named(script)),
    )
    broken = dataclasses.replace(broken, hashes=dataclasses.replace(broken.hashes, workload=_workload_of(broken)))
    [run_id] = stored(tmp_path / "b", store_uri, broken)
    assert main(["reproduce", run_id]) == 4
    assert "It could not be measured again: error: " in capsys.readouterr().err


def _workload_of(result: RunResult) -> str:
    return plan(parse(parameters_again(result))).cells[0].hashes.workload


def test_a_wide_spread_is_not_called_equivalent_for_want_of_a_difference() -> None:
    """Two one-sided tests avoid this flaw: compare finds no difference, which does not prove equivalence."""
    wide = made(factors=(0.8, 0.9, 1.0, 1.1, 1.2))
    comparison = compare(wide, made(factors=WIGGLE))
    assert {effect.effect for effect in comparison.effects if effect.p_holm is not None} == {"no difference seen"}
    assert judge_reproduction(comparison, 0.05).verdict == "cannot_tell"


def test_what_was_loaded_otherwise_is_named() -> None:
    def loaded(**facts: str) -> RunResult:
        return made(load=LoadInfo(1.0, facts={"quant.kernel": "marlin", "model.dtype": "bf16"} | facts))

    assert changed_facts(loaded(), loaded()) == ""
    assert changed_facts(loaded(), loaded(**{"quant.kernel": "exllama", "attention": "sdpa"})) == (
        "What was loaded differs: attention none → sdpa, quant.kernel marlin → exllama."
    )
    assert changed_facts(loaded(), made(load=None)) == (
        "What was loaded differs: model.dtype bf16 → none, quant.kernel marlin → none."
    )
    several = made()
    several = dataclasses.replace(
        several, repetitions=tuple(dataclasses.replace(r, process=r.index // 2) for r in several.repetitions)
    )
    assert changed_facts(made(), several) == "What was loaded differs: processes 1 → 3."


def test_changed_facts_are_a_note_of_the_reproduction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path))
    before = dataclasses.replace(ORIGINAL, load=LoadInfo(1.0, weight_bytes=GB, facts={"quant.kernel": "marlin"}))
    after = made(load=LoadInfo(1.0, weight_bytes=GB, facts={"quant.kernel": "exllama"}), ended_ms=9000)
    found = _judged(Original(before, None, "a"), after, None, 0.05).found  # type: ignore[arg-type]
    assert "What was loaded differs: quant.kernel marlin → exllama." in found.notes


def test_a_verdict_is_a_note_of_its_own_and_no_difference_of_the_environment() -> None:
    invalid = dataclasses.replace(ORIGINAL, cell=dataclasses.replace(ORIGINAL.cell, output_tokens=6), ended_ms=9000)
    allowed = analysis.compare(ORIGINAL, invalid, calibrations=[known_noise(ORIGINAL)], allow=frozenset({"verdict"}))
    notes = judge_reproduction(allowed, 0.05).notes
    assert [note for note in notes if "invalid (wrong_token_count)" in note] == [notes[0]]
    assert notes[0].startswith("The verdict on ")
