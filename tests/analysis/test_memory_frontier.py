"""The memory frontier: exact cases, and its definition over random sweeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlflow_llmbench.analysis.memory_frontier import TRIED, UNTRIED, Attempt, Frontier, frontiers, is_within, tokens
from mlflow_llmbench.config.cells import LOADED
from mlflow_llmbench.records.cell import Cell


def tried(batch: int, prompt: int | None, output: int, outcome: str = "ok", **given: object) -> Attempt:
    settings = {name: given.pop(name) for name in ("quant", "threads", "workload", "model") if name in given}
    return Attempt(Cell(batch_size=batch, prompt_tokens=prompt, output_tokens=output, **settings), outcome, **given)  # type: ignore[arg-type]


def only(*attempts: Attempt) -> Frontier:
    [found] = frontiers(attempts, LOADED)
    return found


def shapes(attempts: tuple[Attempt, ...]) -> list[tuple[int, int | None, int]]:
    return [(a.cell.batch_size, a.cell.prompt_tokens, a.cell.output_tokens) for a in attempts]


def test_the_largest_that_fits_and_the_smallest_that_failed() -> None:
    found = only(
        tried(1, 128, 128),
        tried(4, 128, 128, peak_bytes=900),
        tried(8, 128, 128, "oom"),
        tried(16, 128, 128, "skipped"),
    )
    assert shapes(found.fits) == [(4, 128, 128)]
    assert found.fits[0].peak_bytes == 900
    assert shapes(found.failed) == [(8, 128, 128)]
    assert found.untried == ()  # larger than the failed shape: nothing new
    assert found.boundary == "measured"


def test_a_staircase_where_shapes_are_incomparable() -> None:
    found = only(
        tried(1, 1024, 16),
        tried(4, 256, 16),
        tried(2, 512, 16),
        tried(1, 256, 16),
        tried(2, 256, 16),
        tried(4, 1024, 16, "oom"),
        tried(2, 1024, 16, "oom"),
        tried(8, 256, 16, "crashed"),
        tried(8, 512, 16, "oom"),
    )
    assert shapes(found.fits) == [(4, 256, 16), (2, 512, 16), (1, 1024, 16)]  # 1088, 1056 and 1040 tokens
    assert shapes(found.failed) == [(2, 1024, 16), (8, 256, 16)]
    assert [a.outcome for a in found.failed] == ["oom", "crashed"]


def test_prompt_and_output_are_two_dimensions() -> None:
    """Both have 1010 tokens, but a long prompt needs more activations and a long output more steps."""
    found = only(tried(1, 1000, 10), tried(1, 10, 1000), tried(1, 500, 5, "oom"))
    assert shapes(found.fits) == [(1, 1000, 10), (1, 10, 1000)]
    assert shapes(found.contradicted) == [(1, 500, 5)]


def test_all_fit() -> None:
    found = only(tried(1, 8, 8), tried(2, 8, 8), tried(2, 16, 8))
    assert (shapes(found.fits), found.failed, found.untried, found.boundary) == ([(2, 16, 8)], (), (), "not reached")


def test_none_fits() -> None:
    found = only(tried(2, 8, 8, "oom"), tried(1, 8, 8, "oom"), tried(1, 8, 16, "timeout"))
    assert (found.fits, shapes(found.failed), found.boundary) == ((), [(1, 8, 8)], "measured")


def test_a_prediction_is_not_called_a_measurement() -> None:
    found = only(
        tried(1, 8, 8),
        tried(2, 8, 8, "refused", predicted_bytes=10),
        tried(4, 8, 8, "refused"),
        tried(4, 8, 16, "skipped"),
    )
    assert (found.failed, shapes(found.untried), found.boundary) == ((), [(2, 8, 8)], "predicted")
    assert found.untried[0].predicted_bytes == 10


def test_refused_below_what_failed_is_told_beside_it() -> None:
    """A refused cell does not hide a larger one that ran out of memory, nor the other way round."""
    found = only(
        tried(1, 8, 8),
        tried(2, 8, 8, "refused"),
        tried(4, 8, 8, "oom"),
        tried(1, 64, 8, "skipped"),
        tried(8, 8, 8, "skipped"),
    )
    assert (shapes(found.failed), shapes(found.untried)) == ([(4, 8, 8)], [(2, 8, 8), (1, 64, 8)])
    assert found.boundary == "measured and predicted"


def test_what_failed_although_a_larger_one_fits_is_no_boundary() -> None:
    found = only(tried(4, 8, 8), tried(2, 8, 8, "crashed"), tried(4, 8, 8, "refused"), tried(8, 8, 8, "oom"))
    assert (shapes(found.fits), shapes(found.failed), found.untried) == ([(4, 8, 8)], [(8, 8, 8)], ())
    assert [(a.cell.batch_size, a.outcome) for a in found.contradicted] == [(2, "crashed"), (4, "refused")]


def test_an_invalid_result_and_an_interrupted_cell_prove_nothing() -> None:
    found = only(tried(4, 8, 8, trusted=False, predicted_bytes=2, peak_bytes=1), tried(2, 8, 8, "interrupted"))
    assert found == Frontier(found.load)
    assert found.boundary == "unknown"
    assert shapes(only(tried(1, 8, 8), tried(4, 8, 8, trusted=False)).fits) == [(1, 8, 8)]


def test_prompts_of_unknown_length_compare_within_their_workload() -> None:
    found = only(
        tried(1, None, 8, workload="qa"),
        tried(2, None, 8, workload="qa"),
        tried(1, None, 8, workload="chat"),
        tried(1, 128, 8, workload="qa"),
        tried(4, None, 8, "oom", workload="qa"),
        tried(1, 512, 8, "oom", workload="qa"),
    )
    assert [(a.cell.workload, a.cell.batch_size, a.cell.prompt_tokens) for a in found.fits] == [
        ("qa", 1, 128),
        ("qa", 2, None),
        ("chat", 1, None),
    ]
    assert shapes(found.failed) == [(4, None, 8), (1, 512, 8)]
    assert not is_within(Cell(prompt_tokens=None, workload="qa"), Cell(prompt_tokens=1000, workload="qa"))
    assert not is_within(Cell(prompt_tokens=1, workload="qa"), Cell(prompt_tokens=None, workload="qa"))


def test_one_frontier_per_model_quantization_and_threads_in_the_order_given() -> None:
    attempts = [
        tried(b, 8, 8, "ok" if b < 4 else "oom", quant=q, threads=t)
        for q in ("int8", "int4")
        for t in (2, 1)
        for b in (1, 2, 4)
    ]
    found = frontiers(attempts, LOADED)
    assert [(f.load["quant"], f.load["threads"]) for f in found] == [("int8", 2), ("int8", 1), ("int4", 2), ("int4", 1)]
    assert {(f.fits[0].cell.batch_size, f.failed[0].cell.batch_size, len(f.fits), len(f.failed)) for f in found} == {
        (2, 4, 1, 1)
    }


def test_how_far_prediction_and_measurement_lie_apart() -> None:
    """All measured cells count, not only the largest; a failed cell's peak is a lower bound and does not count."""
    found = only(
        tried(1, 8, 8, peak_bytes=1000, predicted_bytes=1500),
        tried(2, 8, 8, peak_bytes=2000, predicted_bytes=1800),
        tried(3, 8, 8),
        tried(4, 8, 8, "oom", peak_bytes=100, predicted_bytes=4000),
    )
    assert found.prediction == (0.9, 1.5)
    assert found.failed[0].peak_bytes == 100
    assert only(tried(1, 8, 8, peak_bytes=0, predicted_bytes=5)).prediction is None


def test_one_shape_measured_twice_is_shown_once_with_its_higher_peak() -> None:
    found = only(
        tried(1, 8, 8, peak_bytes=5),
        tried(1, 8, 8, peak_bytes=7, workload="qa"),
        tried(1, 8, 8, peak_bytes=6, workload="chat"),
    )
    assert [a.peak_bytes for a in found.fits] == [7]


def test_no_attempts_no_frontier() -> None:
    assert frontiers([], LOADED) == []


SIZES = st.sampled_from([1, 2, 3, 4])
ATTEMPTS = st.lists(
    st.builds(
        tried,
        SIZES,
        st.one_of(st.none(), SIZES),
        SIZES,
        st.sampled_from(["ok", *TRIED, *UNTRIED, "interrupted"]),
        trusted=st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@given(ATTEMPTS)
def test_the_staircases_are_what_their_definition_says(attempts: list[Attempt]) -> None:
    """Compare with the definition, written as plain loops over all pairs."""
    found = only(*attempts)

    def strictly(a: Cell, b: Cell) -> bool:
        return is_within(a, b) and not is_within(b, a)

    measured = [a.cell for a in attempts if a.outcome == "ok" and a.trusted]
    fits = {c for c in measured if not any(strictly(c, d) for d in measured)}
    beyond = [a for a in attempts if not any(is_within(a.cell, c) for c in measured)]
    failing = [a.cell for a in beyond if a.outcome in TRIED]
    guessed = [a.cell for a in beyond if a.outcome in UNTRIED and not any(is_within(c, a.cell) for c in failing)]
    assert {a.cell for a in found.fits} == fits
    assert {a.cell for a in found.failed} == {c for c in failing if not any(strictly(d, c) for d in failing)}
    assert {a.cell for a in found.untried} == {c for c in guessed if not any(strictly(d, c) for d in guessed)}
    assert len(found.fits) == len(fits)
    assert [tokens(a.cell) for a in found.fits] == sorted((tokens(c) for c in fits), reverse=True)
