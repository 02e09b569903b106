"""Claims that compare laws and figures, in worlds that follow power laws with chosen exponents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest

from mlflow_llmbench.analysis.scaling.cells import select_usable
from mlflow_llmbench.analysis.scaling.claims import CONFIRMED, NOT_CONFIRMED, UNSAID, Claim
from mlflow_llmbench.analysis.scaling.fitting import Parameter
from mlflow_llmbench.analysis.scaling.study import study_scaling
from mlflow_llmbench.analysis.scaling.trend_claims import _difference, trend_claims
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import LoadInfo, RunResult

from .test_laws import result

SIZES = {"pythia-70m": 0.07, "pythia-410m": 0.41}
BATCHES, LENGTHS = (1, 2, 4), (64, 128, 256, 512)

Time = Callable[[float, int, int], float]
"""A time in ms over the model's size (10⁹ parameters), batch size and prompt length."""


def world(ttft: Time, tpot: Time, quant: str = "bf16") -> list[RunResult]:
    found = []
    for number, (model, size) in enumerate(SIZES.items()):
        load = LoadInfo(1.0, weight_bytes=int(2e9 * size), facts={"model.parameters": int(size * 1e9)})
        for batch in BATCHES:
            for prompt in LENGTHS:
                cell = Cell(model=model, quant=quant, batch_size=batch, prompt_tokens=prompt, output_tokens=9)
                times = ttft(size, batch, prompt), tpot(size, batch, prompt)
                found.append(result(cell, *times, seed=number, sigma=0.001, load=load))
    return found


def judged(results: list[RunResult]) -> dict[str, Claim]:
    return {one.key: one for one in trend_claims(study_scaling(results), select_usable(results)[0])}


def power(
    size: float, batch: int, prompt: int, beta: Callable[[float, int], float], mu: Callable[[float], float]
) -> float:
    """All 9 tokens come in equal times, so that the throughput is batch^β · prompt^(−μ) / size^0.5."""
    return batch ** (1 - beta(size, prompt)) * prompt ** mu(size) * size**0.5


@pytest.mark.parametrize(("large", "small", "verdict"), [(0.8, 0.5, CONFIRMED), (0.65, 0.65, UNSAID)])
def test_exponents_of_two_sizes_are_compared_with_their_intervals(large: float, small: float, verdict: str) -> None:
    both = partial(
        power,
        beta=lambda size, _: large if size > 0.1 else small,
        mu=lambda size: (large if size > 0.1 else small) - 0.4,
    )
    found = judged(world(both, both))
    assert found["batching_by_size"].verdict == verdict
    assert found["length_by_size"].verdict == verdict
    low, _, high = (found["batching_by_size"].measured + " to ").partition(" to ")
    assert float(low) == pytest.approx(large - small, abs=0.02) and high


@pytest.mark.parametrize(("long", "verdict"), [(0.4, CONFIRMED), (0.9, NOT_CONFIRMED)])
def test_the_gain_of_batching_at_the_longest_and_the_shortest_prompt(long: float, verdict: str) -> None:
    bent = partial(power, beta=lambda _, prompt: long if prompt == 512 else 0.7, mu=lambda _: 0.3)
    assert judged(world(bent, bent))["batching_by_length"].verdict == verdict


@pytest.mark.parametrize(("omega", "phi", "verdict"), [(0.9, 0.3, CONFIRMED), (0.5, 0.95, NOT_CONFIRMED)])
def test_the_first_token_grows_more_with_length_or_with_batch(omega: float, phi: float, verdict: str) -> None:
    def first(size: float, batch: int, prompt: int) -> float:
        return 40 * size * batch**phi * prompt**omega

    assert judged(world(first, lambda size, batch, prompt: 5.0))["length_over_batch"].verdict == verdict


def test_prompt_tokens_are_priced_in_output_tokens() -> None:
    """512 more prompt tokens at 0.01 ms each are 5.12 ms: 5.12 output tokens of 1 ms, or 0.512 of 10 ms."""

    def first(size: float, batch: int, prompt: int) -> float:
        return 5 + 0.01 * prompt

    cheap = judged(world(first, lambda *_: 10.0))["prompt_cost"]
    dear = judged(world(first, lambda *_: 0.2))["prompt_cost"]
    assert (cheap.verdict, dear.verdict) == (CONFIRMED, NOT_CONFIRMED)
    assert cheap.measured.startswith("0.51") and dear.measured.startswith("25")


def test_the_share_after_the_first_token_and_memory_beside_int4() -> None:
    slow = judged(world(lambda *_: 10.0, lambda *_: 30.0))["output_dominates"]
    assert (slow.verdict, slow.measured[:5]) == (CONFIRMED, "0.96 ")
    fast = judged(world(lambda *_: 300.0, lambda *_: 10.0))["output_dominates"]
    assert fast.verdict == NOT_CONFIRMED
    both = [*world(lambda *_: 10.0, lambda *_: 30.0, "int4"), *world(lambda *_: 10.0, lambda *_: 30.0, "gptq")]
    assert judged(both)["gptq_memory"].verdict == CONFIRMED


def test_what_was_not_measured_is_not_judged_and_says_what_it_needs() -> None:
    [one] = world(lambda *_: 10.0, lambda *_: 5.0)[:1]
    claims = judged([one])
    assert {claim.verdict for key, claim in claims.items() if key != "output_dominates"} == {UNSAID}
    assert all(claim.why for claim in claims.values())
    assert claims["batching_by_size"].why == "It needs cells of two models at several batch sizes."


def test_the_interval_of_a_difference_by_hand() -> None:
    a, b = Parameter("β", 0.8, 0.7, 0.95), Parameter("β", 0.5, 0.46, 0.53)
    found = _difference(a, b)
    assert found == pytest.approx((0.3, 0.3 - (0.1**2 + 0.03**2) ** 0.5, 0.3 + (0.15**2 + 0.04**2) ** 0.5))
    assert _difference(a, Parameter("β", 0.5, None, 0.53)) is None


@pytest.mark.parametrize(("price", "verdict", "shown"), [(0.4, CONFIRMED, "0.4"), (1.5, NOT_CONFIRMED, "1.5")])
def test_consumer_hardware_is_cheaper_if_its_tokens_are(price: float, verdict: str, shown: str) -> None:
    """The consumer's card makes half the tokens of a data centre's at half of `price` of its price per hour."""
    here = world(*(lambda size, batch, prompt: 10 * size for _ in range(2)))

    def on(name: str, price: float, speed: float, env: str) -> list[RunResult]:
        found = world(*(lambda size, batch, prompt: 10 * size / speed for _ in range(2)))
        return [
            dataclasses.replace(
                one,
                environment={"gpus": [{"name": name}]},
                load=dataclasses.replace(one.load, facts={**one.load.facts, "model.device": "cuda:0"}),  # type: ignore[type-var, union-attr]
                hashes=dataclasses.replace(one.hashes, env=env, config=same.hashes.config),
                price_per_hour=price,
            )
            for one, same in zip(found, here, strict=True)
        ]

    centre, dear = on("NVIDIA A100-SXM4-80GB", 2.0, 2.0, "b"), on("NVIDIA H100", 50.0, 2.0, "c")
    consumer = on("NVIDIA GeForce RTX 4090", price, 1.0, "a")
    found = judged([*consumer, *centre, *dear])["consumer_cost"]
    assert (found.verdict, found.measured.startswith(shown)) == (verdict, True), found
    other = on("NVIDIA RTX A6000", price, 1.0, "a")  # a workstation's card
    assert judged([*other, *centre])["consumer_cost"].verdict == UNSAID
    assert judged([*centre, *dear])["consumer_cost"].why == (
        "It needs configurations that both kinds of hardware have measured, each with its price."
    )


def in_ranks(gain: Callable[[int, int], float], lengths: tuple[int, ...] = LENGTHS) -> list[RunResult]:
    """Cells whose first token comes `gain(ranks, prompt)` times as soon with several ranks."""
    found = []
    for ranks in (1, 2, 4):
        for prompt in lengths:
            cell = Cell(model="pythia-70m", quant="bf16", prompt_tokens=prompt, output_tokens=9, tensor_parallel=ranks)
            found.append(result(cell, prompt / gain(ranks, prompt), 5.0, seed=ranks * prompt, sigma=0.001))
    return found


@pytest.mark.parametrize(
    ("gain", "verdict", "measured"),
    [
        (lambda ranks, prompt: 1 if ranks == 1 else ranks * (0.5 + prompt / 1024), CONFIRMED, 1.0 / 0.5625),
        (lambda ranks, prompt: 1 if ranks == 1 else 0.7, UNSAID, 1.0),
        (lambda ranks, prompt: 1 if ranks == 1 else 1.0 - prompt / 1024, NOT_CONFIRMED, 0.5 / 0.9375),
    ],
)
def test_the_gain_of_ranks_at_the_longest_and_the_shortest_prompt(
    gain: Callable[[int, int], float], verdict: str, measured: float
) -> None:
    found = judged(in_ranks(gain))["ranks_by_length"]
    assert found.verdict == verdict and float(found.measured.split()[0]) == pytest.approx(measured, rel=0.01)


def test_one_length_or_one_rank_says_nothing_of_ranks() -> None:
    assert judged(in_ranks(lambda ranks, _: ranks, (64,)))["ranks_by_length"].verdict == UNSAID
    alone = [one for one in in_ranks(lambda ranks, _: ranks) if one.cell.tensor_parallel == 1]
    assert judged(alone)["ranks_by_length"].why == (
        "It needs cells with one and with several ranks (tensor_parallel=1,2) at two prompt lengths."
    )
