"""The gate: its verdicts and exit codes, its records, and the promotion that it guards."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from mlflow import MlflowClient

from mlflow_llmbench import run
from mlflow_llmbench.analysis.decisions import gate as analysis
from mlflow_llmbench.analysis.decisions.gate import Gate, missing, parse_limits, parse_ratio, single_checks
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.cli.main import main, parse
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import Hashes, MemoryStages, Quality, RunResult, TextScores
from mlflow_llmbench.reports.gate import gate_cells, gate_junit, gate_markdown
from mlflow_llmbench.system import calibrations
from mlflow_llmbench.tracking.promotion import promote
from mlflow_llmbench.tracking.registry import register, result_of
from mlflow_llmbench.tracking.store import open_store

from ...results import GB, WIGGLE, known_noise, made, stored, write_sweep

ROOT = Path(__file__).resolve().parents[3]
CHAMPION = made()
AGAIN = made(ended_ms=3000)
"""The champion's configuration, measured again with the same figures."""


def decide(champion: RunResult, candidate: RunResult, *given: Any, **arguments: Any) -> Gate:
    """Decide on a machine whose processes are known not to differ."""
    return analysis.decide(champion, candidate, *given, **{"calibrations": [known_noise(champion)], **arguments})


def states(candidate: RunResult, **arguments: object) -> dict[str, str]:
    return {check.key: check.state for check in decide(CHAMPION, candidate, **arguments).checks}  # type: ignore[arg-type]


def test_the_champion_passes_when_it_is_measured_again() -> None:
    gate = decide(CHAMPION, AGAIN)
    assert (gate.verdict, gate.exit_code) == ("pass", 0)
    assert {check.state for check in gate.checks} == {"ok"}
    assert [check.key for check in gate.checks] == [
        "throughput/output_tokens_per_s",
        "latency/ttft_ms_mean",
        "latency/itl_ms_p50",
        "latency/tpot_ms_mean",
        "latency/e2e_ms_mean",
        "memory/host_needed_gb_peak",
    ]


def test_a_slower_candidate_is_a_regression_in_what_became_slower() -> None:
    gate = decide(CHAMPION, made(step=12))
    assert (gate.verdict, gate.exit_code) == ("regression", 1)
    assert {check.key: check.state for check in gate.checks} == {
        "throughput/output_tokens_per_s": "regression",
        "latency/ttft_ms_mean": "ok",
        "latency/itl_ms_p50": "regression",
        "latency/tpot_ms_mean": "regression",
        "latency/e2e_ms_mean": "regression",
        "memory/host_needed_gb_peak": "ok",
    }
    rate = gate.checks[0]
    assert rate.worse == pytest.approx(1 - 60 / 68, rel=1e-3)  # 20 + 4 · 12 ms against 20 + 4 · 10 ms
    assert "latency/itl_ms_p50 is 20.0% worse (limit 5.0%)" in gate.why


def test_worse_within_the_limit_and_better_pass() -> None:
    assert set(states(made(step=10.3)).values()) == {"ok"}
    assert states(made(step=10.3), limits={"latency/itl_ms_p50": 0.02})["latency/itl_ms_p50"] == "regression"
    assert states(made(step=8))["latency/itl_ms_p50"] == "improved"
    assert states(made(step=12), limit=0.5)["latency/itl_ms_p50"] == "ok"


def test_what_chance_may_explain_passes_and_is_called_not_settled() -> None:
    wide = (0.85, 0.93, 1.0, 1.07, 1.15)
    gate = decide(made(factors=wide), made(factors=wide, step=10.8), accept_suspect="wide on purpose")
    assert gate.verdict == "pass"
    assert "not settled" in {check.state for check in gate.checks}
    assert any(
        note.startswith("Not settled, since they may be worse by more than their limits, or not: ")
        for note in gate.notes
    )


def test_a_limit_below_the_noise_threshold_is_held() -> None:
    quiet = (0.9999, 1.0, 1.0001, 0.99995, 1.00005)
    slower = made(step=10.08, ttft=20.16, factors=quiet)
    assert decide(made(factors=quiet), slower).verdict == "pass"
    gate = decide(made(factors=quiet), slower, limit=0.005)
    assert gate.verdict == "regression"
    assert "latency/itl_ms_p50 is 0.8% worse (limit 0.5%)" in gate.why
    assert {check.state for check in decide(made(factors=quiet), slower, limit=0.009).checks} == {"ok"}


def test_one_repetition_within_its_limit_is_not_settled() -> None:
    gate = decide(made(factors=(1.0,)), made(factors=(1.0,), step=10.3), accept_suspect="a first look")
    assert [check.state for check in gate.checks] == ["not settled"] * 5 + ["ok"]
    assert gate.why == "No regression is shown in 6 metrics, of which 5 are not settled."
    assert any(note.endswith("Measure more repetitions.") for note in gate.notes)


@pytest.mark.parametrize("limit", ["kl=1%", "ttft=1%,perplexity=0", "itl=1%"])
def test_a_limit_for_what_was_not_measured_stops_the_gate(limit: str) -> None:
    one_token = dataclasses.replace(
        CHAMPION,
        cell=dataclasses.replace(CHAMPION.cell, output_tokens=1),
        repetitions=tuple(
            dataclasses.replace(
                r, requests=tuple(dataclasses.replace(q, stamps_ns=q.stamps_ns[:1]) for q in r.requests)
            )
            for r in CHAMPION.repetitions
        ),
    )
    gate = decide(
        one_token, dataclasses.replace(one_token, ended_ms=3000), parse_limits(limit), accept_suspect="made by hand"
    )
    assert (gate.verdict, gate.exit_code) == ("not_comparable", 2)
    assert f"A limit is given for {parse_limits(limit).popitem()[0]}, and not both runs have it." in gate.why
    assert decide(CHAMPION, AGAIN, parse_limits("memory=1%,weights=1%,load=1%,ttft=1%")).verdict == "pass"


def test_memory_regresses_beyond_its_limit() -> None:
    assert states(made(memory=4.1))["memory/host_needed_gb_peak"] == "ok"
    assert states(made(memory=4.1), limits={"memory": 0.02})["memory/host_needed_gb_peak"] == "regression"
    assert states(made(memory=5))["memory/host_needed_gb_peak"] == "regression"
    on_gpu = dataclasses.replace(CHAMPION, memory=MemoryStages(host_needed={"peak": GB}, device={"peak": GB}))
    larger = dataclasses.replace(CHAMPION, memory=MemoryStages(host_needed={"peak": 9 * GB}, device={"peak": GB}))
    assert {check.key for check in decide(on_gpu, larger).checks if check.key.startswith("memory")} == {
        "memory/device_gb_peak"
    }
    assert decide(on_gpu, CHAMPION).verdict == "not_comparable"


def test_a_version_against_itself_has_no_verdict() -> None:
    reused = dataclasses.replace(CHAMPION, sweep="a later sweep", linked="its run")
    for candidate in (CHAMPION, reused):
        gate = decide(CHAMPION, candidate)
        assert (gate.verdict, gate.exit_code, gate.checks) == ("not_comparable", 2, ())
        assert gate.why.startswith("Both sides are the same evidence: the candidate's run is the champion's")


def test_single_processes_regress_only_beyond_the_noise_between_processes() -> None:
    """12 % slower: a regression on a machine of known quiet, not settled on one of which nothing is known."""
    slower = made(step=11.2, ttft=22.4)
    assert decide(CHAMPION, slower).verdict == "regression"
    gate = decide(CHAMPION, slower, calibrations=())
    assert (gate.verdict, {check.state for check in gate.checks[:5]}) == ("pass", {"not settled"})
    assert gate.why == "No regression is shown in 6 metrics, of which 5 are not settled."
    assert "llmbench calibrate" in gate.notes[0] and "--measure" in gate.notes[0]
    assert "a standard deviation of 3 %, which is assumed" in gate.notes[-1]


def test_the_gate_shows_the_figures_of_the_runs_under_their_names() -> None:
    skewed = made(factors=(1.0, 1.0, 1.0, 1.0, 1.4))
    metrics = summarize(CHAMPION), summarize(skewed)
    for check in decide(CHAMPION, skewed, accept_suspect="skewed").checks:
        assert (check.a, check.b) == (metrics[0][check.key], metrics[1][check.key])


def test_quality_is_held_too() -> None:
    def state(champion: dict[str, float], candidate: dict[str, float], limits: str = "") -> list[str]:
        before, after = ({f"quality/{name}": value for name, value in given.items()} for given in (champion, candidate))
        return [check.state for check in single_checks(before, after, parse_limits(limits), 0.05)]

    assert state({"perplexity": 10.0}, {"perplexity": 10.4}) == ["ok"]
    assert state({"perplexity": 10.0}, {"perplexity": 10.4}, "perplexity=1%") == ["regression"]
    assert state({"perplexity": 10.0}, {"perplexity": 8.0}) == ["ok"]
    assert state(
        {"top1_agreement": 0.99, "kl_vs_reference": 0.0}, {"top1_agreement": 0.9, "kl_vs_reference": 0.01}
    ) == ["regression", "regression"]
    assert state({"kl_vs_reference": 0.0}, {"kl_vs_reference": 0.01}, "kl=0.02") == [
        "ok"
    ]  # nats, because there is no ratio to 0
    assert state({"kl_vs_reference": 0.0}, {"kl_vs_reference": 0.03}, "kl=0.02") == ["regression"]
    assert state({"kl_vs_reference": 0.0, "top1_agreement": 0.0}, {"kl_vs_reference": 0.0, "top1_agreement": 0.5}) == [
        "ok",
        "ok",
    ]
    assert state({"kl_vs_reference": 0.01}, {"kl_vs_reference": 0.03}, "kl=0.05") == ["regression"]
    assert state({}, {"perplexity": 10.0}) == []
    from_reference = single_checks(
        {"quality/kl_vs_reference": 0.0}, {"quality/kl_vs_reference": 0.03}, parse_limits("kl=0.02"), 0.05
    )
    assert gate_cells(from_reference)[0][3:] == ["+0.03 nats", "–", "–", "0.02 nats", "regression"]
    shown = gate_cells(single_checks({"quality/top1_agreement": 1.0}, {"quality/top1_agreement": 0.891}, {}, 0.05))
    assert [row[1:3] for row in shown] == [["1", "0.891"]]
    assert missing({"quality/perplexity": 10.0, "memory/device_gb_peak": 1.0}, {}) == [
        "memory/device_gb_peak",
        "quality/perplexity",
    ]


def test_perplexities_of_two_texts_are_not_comparable() -> None:
    def scored(text: str, ended_ms: int = 3000) -> RunResult:
        return dataclasses.replace(
            CHAMPION, ended_ms=ended_ms, quality=Quality(text, TextScores(text, 3, 8, 4, ((1.0, 2.0),)))
        )

    assert decide(scored("a"), scored("a", 4000)).verdict == "pass"
    gate = decide(scored("a"), scored("b"))
    assert (gate.verdict, gate.why) == (
        "not_comparable",
        "The perplexities are of two texts. Measure the candidate with the quality_text of the champion.",
    )


def test_a_stream_that_comes_faster_is_another_workload() -> None:
    def stream(rate: float, batching: str = "dynamic") -> RunResult:
        return dataclasses.replace(
            CHAMPION, cell=dataclasses.replace(CHAMPION.cell, batching=batching, request_rate=rate)
        )

    gate = decide(stream(5.0), stream(8.0), accept_suspect="made by hand")
    assert (gate.verdict, gate.exit_code) == ("not_comparable", 2)
    assert "request_rate 5 → 8" in gate.why
    assert decide(stream(5.0), stream(5.0, "static"), accept_suspect="made by hand").verdict == "pass"


def test_another_machine_is_not_comparable_and_other_software_is_named() -> None:
    elsewhere = made(hashes=Hashes("none1", "w", "other", "s", "e2"), environment={"cpu": {"name": "Xeon"}})
    gate = decide(CHAMPION, elsewhere)
    assert (gate.verdict, gate.exit_code, gate.checks) == ("not_comparable", 2, ())
    assert "CPU AMD EPYC → Xeon" in gate.why
    newer = made(
        step=12,
        hashes=Hashes("none1", "w", "h", "s2", "e2"),
        environment={"cpu": {"name": "AMD EPYC"}, "packages": {"torch": "2.13"}},
    )
    assert decide(CHAMPION, newer).verdict == "regression"
    assert decide(CHAMPION, newer).notes[0] == "The software differs: torch 2.12.0+cpu → 2.13, transformers 5.0 → none."


def test_invalid_and_suspect_candidates() -> None:
    short = dataclasses.replace(CHAMPION, cell=dataclasses.replace(CHAMPION.cell, output_tokens=6))
    gate = decide(CHAMPION, short, accept_suspect="all of it")
    assert (gate.verdict, gate.exit_code) == ("invalid", 3)
    assert gate.why == "The candidate is invalid (wrong_token_count). Measure it again."
    few = made(factors=WIGGLE[:3])
    assert decide(CHAMPION, few).exit_code == 3
    assert decide(CHAMPION, few, accept_suspect="a first look").verdict == "pass"
    assert decide(few, CHAMPION).verdict == "pass"  # it was accepted when it was registered


def test_limits_are_read() -> None:
    assert parse_limits("ttft=10%, memory=0.02") == {"latency/ttft_ms_mean": 0.1, "memory": 0.02}
    with pytest.raises(UsageError, match="Unknown metric in --limit: speed. Known: throughput, ttft"):
        parse_limits("speed=1%")
    for text in ("much", "-5%", "nan", ""):
        with pytest.raises(UsageError, match=r"--limit ttft is not a ratio: .*. Give for example 5% or 0.05."):
            parse_ratio("--limit ttft", text)


def test_the_junit_file_and_the_markdown() -> None:
    gate = decide(CHAMPION, made(step=12))
    suite = ElementTree.fromstring(gate_junit(gate, "models:/bot/1", "run <x>").encode())[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "4", "0")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == [
        "throughput/output_tokens_per_s",
        "latency/itl_ms_p50",
        "latency/tpot_ms_mean",
        "latency/e2e_ms_mean",
    ]
    markdown = html.unescape(gate_markdown(gate, "models:/bot/1", "run x"))
    assert markdown.startswith("## REGRESSION: run x against models:/bot/1\n")
    assert "| latency/itl_ms_p50 | 10 ms | 12 ms | +20.0% |" in markdown
    short = dataclasses.replace(CHAMPION, cell=dataclasses.replace(CHAMPION.cell, output_tokens=6))
    [case] = ElementTree.fromstring(gate_junit(decide(CHAMPION, short), "a", "b").encode())[0]
    error = case.find("error")
    assert error is not None and error.get("type") == "invalid"


# The commands, on a real store


@pytest.fixture
def champion(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered champion, support-bot version 1; its run. The machine's processes are known not to differ."""
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path / "cache"))
    calibrations.keep(known_noise(CHAMPION))
    [run] = stored(tmp_path / "first", store_uri, CHAMPION)
    store = open_store(store_uri)
    register(store, run, "support-bot")
    promote(store, "models:/support-bot@candidate")
    return run


def gate_of(candidate: str, *more: str) -> int:
    return main(["gate", candidate, "--against", "models:/support-bot@champion", *more])


def test_exit_codes_tags_and_files(
    champion: str, store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(store_uri)
    [again] = stored(tmp_path / "again", store_uri, AGAIN)
    assert gate_of(again, "--json") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"PASSED: run {again} against models:/support-bot/1. The candidate is not worse")
    assert json.loads(out.splitlines()[-1])["exit_code"] == 0
    assert client.get_run(again).data.tags["llmbench.gate"] == "pass"
    assert gate_of(champion) == 2
    out = capsys.readouterr().out
    assert out.startswith(
        f"NOT COMPARABLE: run {champion} against models:/support-bot/1. Both sides are the same evidence"
    )
    assert client.get_run(champion).data.tags["llmbench.gate"] == "not_comparable"
    [slow] = stored(tmp_path / "second", store_uri, made(step=12))
    assert gate_of(slow, "--junit", "gate.xml", "--markdown", "gate.md") == 1
    assert "REGRESSION" in capsys.readouterr().out
    tags = client.get_run(slow).data.tags
    assert (tags["llmbench.gate"], tags["llmbench.gate_against"]) == ("regression", "models:/support-bot/1")
    assert {item.path for item in client.list_artifacts(slow, "gate")} == {
        f"gate/{n}" for n in ("gate.md", "gate.json", "junit.xml", "table.json")
    }
    assert ElementTree.parse("gate.xml").getroot().get("failures") == "4"
    assert Path("gate.md").read_text().startswith("## REGRESSION")
    [elsewhere] = stored(
        tmp_path / "third",
        store_uri,
        made(hashes=Hashes("c", "w", "other", "s", "e2"), environment={"cpu": {"name": "Xeon"}}),
    )
    assert gate_of(elsewhere) == 2
    assert client.get_run(elsewhere).data.tags["llmbench.gate"] == "not_comparable"
    [short] = stored(
        tmp_path / "fourth",
        store_uri,
        dataclasses.replace(CHAMPION, cell=dataclasses.replace(CHAMPION.cell, output_tokens=6)),
    )
    assert gate_of(short) == 3
    assert client.get_run(short).data.tags["llmbench.gate"] == "invalid"


def test_of_a_sweep_the_cell_with_the_champions_configuration_is_meant(
    champion: str, store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(tmp_path / "again", store_uri, made(step=12), made("int8"))
    assert gate_of(str(tmp_path / "again")) == 1
    stored(tmp_path / "other", store_uri, made("int8"), made("int4"))
    capsys.readouterr()
    assert gate_of(str(tmp_path / "other")) == 2
    assert (
        "has 2 cells, and 0 of them have the champion's configuration. Give the run of one cell."
        in capsys.readouterr().err
    )


def test_the_verdict_is_kept_with_the_run_that_was_named(
    measured_champion: str, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gate of the champion against itself compares one configuration of one sweep."""
    more = ("--accept-suspect", "a test", "--default-limit", "90%")
    assert gate_of(measured_champion, "--pairs", "2", "--json", *more) == 0
    client = MlflowClient(store_uri)
    parent = json.loads(capsys.readouterr().out.splitlines()[-1])["measured"]
    sides = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    for side in sides:
        assert gate_of(f"runs:/{side.info.run_id}", *more) in (0, 1)
        assert "llmbench.gate" in client.get_run(side.info.run_id).data.tags
    assert len(sides) == 2


def test_a_folder_that_no_store_has_is_gated_and_not_logged(
    champion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path / "local", [AGAIN])
    assert gate_of(str(folder)) == 0
    assert "Not logged: the store" in capsys.readouterr().out


def test_a_store_that_is_away_is_no_regression(capsys: pytest.CaptureFixture[str]) -> None:
    assert gate_of("0" * 32, "--tracking-uri", "http://127.0.0.1:9") == 4
    assert capsys.readouterr().err.startswith("llmbench: The MLflow server http://127.0.0.1:9 does not answer.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gate", "x", "--against", "support-bot"],
            "Not a registered version: support-bot. Give models:/NAME@champion or models:/NAME/VERSION.",
        ),
        (["gate", "x", "--against", "models:/none@champion"], "There is no models:/none@champion in the store"),
        (
            ["gate", "x", "--against", "models:/support-bot@champion", "--limit", "speed=1"],
            "Unknown metric in --limit: speed.",
        ),
        (
            ["promote", "models:/support-bot@champion"],
            "models:/support-bot/1 is the champion already. Nothing was moved.",
        ),
        (["promote", "models:/support-bot/7"], "There is no models:/support-bot/7 in the store"),
    ],
)
def test_wrong_use_is_one_line(
    champion: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_only_what_passed_against_the_present_champion_is_promoted(
    champion: str, store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(store_uri)

    def aliases() -> dict[str, str]:
        return {
            name: str(version) for name, version in store.client.get_registered_model("support-bot").aliases.items()
        }

    slow, fast = stored(tmp_path / "second", store_uri, made("int8", step=12), made("int4", step=8))
    for one in (slow, fast):
        register(store, one, "support-bot", alias=f"from-{one[:4]}")
    assert main(["promote", "models:/support-bot/2"]) == 2
    assert (
        "models:/support-bot/2 has not been gated, and the champion is models:/support-bot/1. Nothing was moved."
        in capsys.readouterr().err
    )
    assert gate_of("models:/support-bot/2") == 1
    assert main(["promote", "models:/support-bot/2"]) == 2
    assert "did not pass its gate (regression)" in capsys.readouterr().err
    assert aliases()["champion"] == "1"
    assert gate_of("models:/support-bot/3") == 0
    capsys.readouterr()
    assert main(["promote", "models:/support-bot/3", "--json"]) == 0
    out = capsys.readouterr().out
    assert "Version 1 is kept as previous. To go back: llmbench promote models:/support-bot@previous" in out
    assert (aliases()["champion"], aliases()["previous"]) == ("3", "1")
    [newest] = stored(tmp_path / "third", store_uri, made("fp4", step=8))
    register(store, newest, "support-bot")
    store.client.set_tag(newest, "llmbench.gate", "pass")
    store.client.set_tag(newest, "llmbench.gate_against", "models:/support-bot/1")
    assert main(["promote", "models:/support-bot/4"]) == 2
    assert (
        "was gated against models:/support-bot/1, and the champion is models:/support-bot/3" in capsys.readouterr().err
    )
    assert main(["promote", "models:/support-bot@previous"]) == 0
    assert (aliases()["champion"], aliases()["previous"]) == ("1", "3")


def test_the_github_actions_example_uses_options_that_exist() -> None:
    """Each llmbench command of the example is parsed by the real parser."""
    steps = yaml.safe_load((ROOT / "examples" / "github-actions-gate.yml").read_text())["jobs"]["gate"]["steps"]
    lines = [step["run"] for step in steps if str(step.get("run", "")).startswith("llmbench")]
    assert [line.split()[1] for line in lines] == ["run", "gate"]
    for line in lines:
        plain = re.sub(
            r'"\$\([^)]*\)"|"\$\w+"',
            "models:/x@champion",
            line.partition("|")[0] if " | " in line and "$(" not in line else line,
        )
        assert parse(shlex.split(plain)[1:])


# Both measured again


CELL = {"backend": "fake", "prompt_tokens": 4, "output_tokens": 8, "repetitions": 5, "warmup": 1}
FAST, SLOW = "fake:ttft_ms=6+itl_ms=3", "fake:ttft_ms=6+itl_ms=6"


@pytest.fixture
def measured_champion(store_uri: str) -> str:
    """A champion really measured on this machine; its run."""
    [run_id] = run(model=FAST, **CELL).run_ids
    store = open_store(store_uri)
    register(store, run_id, "support-bot", accept_suspect="a test")
    promote(store, "models:/support-bot@candidate")
    return run_id


def test_both_are_measured_again_in_turns(
    measured_champion: str, store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The candidate's run claims to be fast and is not: the new measurement decides."""
    [slow_run] = run(model=SLOW, **CELL).run_ids
    fast = result_of(open_store(store_uri), measured_champion)
    slow = result_of(open_store(store_uri), slow_run)
    [liar] = stored(
        tmp_path / "liar", store_uri, dataclasses.replace(fast, cell=slow.cell, model=slow.model, hashes=slow.hashes)
    )
    more = ("--accept-suspect", "a test", "--default-limit", "30%")
    assert gate_of(liar, *more) == 0
    capsys.readouterr()
    assert gate_of(liar, "--measure", "--pairs", "4", "--output-dir", str(tmp_path / "gated"), "--json", *more) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    checks = {check["key"]: check["state"] for check in told["checks"]}
    assert checks["latency/itl_ms_p50"] == "regression" != checks["latency/ttft_ms_mean"]
    client = MlflowClient(store_uri)
    tags = client.get_run(liar).data.tags
    assert (tags["llmbench.gate"], tags["llmbench.gate_measured"]) == ("regression", told["measured"])
    sides = [
        one
        for one in client.search_runs([client.get_run(liar).info.experiment_id])
        if one.data.tags.get("mlflow.parentRunId") == told["measured"]
    ]
    assert sorted(one.data.params["model"] for one in sides) == [FAST, SLOW]
    assert {one.data.params["processes"] for one in sides} == {"4"}
    folder = tmp_path / "gated" / sides[0].data.tags["llmbench.sweep"]
    assert (
        json.loads((folder / "sweep.json").read_text())["parameters"]["rerun"] == "true"
    )  # never taken from an earlier sweep


def test_the_champion_passes_against_itself_measured_again_and_again(
    measured_champion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--measure", "--pairs", "3", "--accept-suspect", "a test", "--default-limit", "40%")
    assert gate_of(measured_champion, *more) == 0
    assert gate_of("models:/support-bot@champion", *more) == 0
    assert "PASSED: models:/support-bot/1 against models:/support-bot/1." in capsys.readouterr().out


def test_a_run_of_another_machine_is_measured_here_and_named(
    measured_champion: str, store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = result_of(open_store(store_uri), measured_champion)
    elsewhere = {**here.environment, "cpu": {**here.environment["cpu"], "name": "Z80"}}
    [other] = stored(
        tmp_path / "other",
        store_uri,
        dataclasses.replace(here, environment=elsewhere, hashes=dataclasses.replace(here.hashes, hardware="x")),
    )
    assert gate_of(other, "--accept-suspect", "a test") == 2
    capsys.readouterr()
    assert gate_of(other, "--measure", "--pairs", "3", "--accept-suspect", "a test", "--default-limit", "40%") == 0
    assert "software differs from where the candidate was measured before: CPU Z80 → " in capsys.readouterr().out


def test_what_is_not_measured_again(
    measured_champion: str, store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [longer] = run(model=FAST, **CELL | {"output_tokens": 9}).run_ids
    before = len(list((tmp_path / "llmbench-results").iterdir()))
    capsys.readouterr()
    assert gate_of(longer, "--measure") == 2
    assert "NOT COMPARABLE" in capsys.readouterr().out
    here = result_of(open_store(store_uri), measured_champion)
    trusting = dataclasses.replace(
        here,
        cell=dataclasses.replace(here.cell, trust_remote_code=True),
        hashes=dataclasses.replace(here.hashes, config="t"),
    )
    [run_id] = stored(tmp_path / "trusting", store_uri, trusting)
    assert gate_of(run_id, "--measure") == 2
    assert "add --trust-remote-code" in capsys.readouterr().err
    assert gate_of(measured_champion, "--measure", "--pairs", "1") == 2
    assert len(list((tmp_path / "llmbench-results").iterdir())) == before


def test_in_turns_what_drifts_meets_both_sides_alike() -> None:
    drifting = made(factors=(0.8, 0.9, 1.0, 1.1, 1.2))
    slower = made(factors=(0.8, 0.9, 1.0, 1.1, 1.21), step=11.5, ttft=23)
    assert decide(drifting, slower, accept_suspect="drifts").verdict == "pass"  # not settled
    assert decide(drifting, slower, accept_suspect="drifts", in_turns=True).verdict == "regression"


def test_a_champion_that_is_suspect_now_is_not_believed_either() -> None:
    few = made(factors=WIGGLE[:3])
    assert decide(few, CHAMPION).verdict == "pass"
    again = dataclasses.replace(few, ended_ms=3000)
    assert decide(few, again, in_turns=True).verdict == "invalid"
    assert decide(few, again, in_turns=True, accept_suspect="a first look").verdict == "pass"
