"""Predictions of cells that were not measured, each recomputed by hand from chosen times and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from mlflow_llmbench.analysis.scaling.cells import Measured, select_usable
from mlflow_llmbench.analysis.scaling.curves import share_of
from mlflow_llmbench.analysis.scaling.fitting import fit, left_out_error
from mlflow_llmbench.analysis.scaling.prediction import (
    FIRST_TOKEN,
    FORMULA,
    MEMORY,
    PER_TOKEN,
    THROUGHPUT,
    AskedModel,
    PredictedCell,
    PredictedFigure,
    costs_of,
    predict_cell,
    predict_on,
    rates_of,
    shares_of,
)
from mlflow_llmbench.config.models import PRESETS
from mlflow_llmbench.records.cell import PARAMETERS, Cell
from mlflow_llmbench.records.errors import OutOfRange, UsageError
from mlflow_llmbench.records.hardware import HARDWARE, Hardware, given_hardware, named_hardware
from mlflow_llmbench.records.results import LoadInfo, RunResult
from mlflow_llmbench.stats import t_quantile_975
from mlflow_llmbench.workflows.predict import predict

from .test_laws import LOAD, result, sweep

PEAKS = {"read_bytes_per_s": 1e10, "flops_per_s": 1e12}
ASKED = Cell(model="opt-125m", quant="bf16", batch_size=3, prompt_tokens=128, output_tokens=32, repetitions=6)


def usable(results: Sequence[RunResult]) -> list[Measured]:
    return select_usable(results)[0]


def model_of(costs: LoadInfo | None = None, memory: float | None = None, parameters: float | None = None) -> AskedModel:
    return AskedModel(costs, parameters, "", lambda cell: memory)


def figure(found: PredictedCell, name: str) -> PredictedFigure:
    return next(one for one in found.figures if one.name == name)


def replaced(one: RunResult, **settings: Any) -> RunResult:
    return dataclasses.replace(one, cell=dataclasses.replace(one.cell, **settings))


def no_formula(cell: Cell, result: RunResult) -> float | None:
    return None


def at(batch: int, prompt: int) -> tuple[float, float]:
    """Least ms of prefill and step by hand, for the costs of test_laws: no attention FLOPs, 50,000 bytes a token."""
    prefill = max(1e9 / 1e10, batch * prompt * 2e9 / 1e12)
    step = max((1e9 + batch * 50_000 * (prompt + 16)) / 1e10, batch * 2e9 / 1e12)
    return 1e3 * prefill, 1e3 * step


def rooflined(
    factor: float = 2.0, model: str = "opt-125m", scale: float = 1.0, shapes: Sequence[tuple[int, int]] = ()
) -> list[RunResult]:
    """Cells that take `factor` times the roofline; a model of `scale` has so many times its bytes and FLOPs."""
    load = dataclasses.replace(LOAD, step_bytes=int(1e9 * scale), flops_per_token=2e9 * scale)
    found = []
    for batch, prompt in shapes or ((1, 100), (2, 400), (8, 200), (16, 100)):
        cell = Cell(model=model, quant="bf16", batch_size=batch, prompt_tokens=prompt, output_tokens=32, repetitions=6)
        prefill = factor * scale * at(batch, prompt)[0]
        step = factor * 1e3 * max((1e9 * scale + batch * 5e4 * (prompt + 16)) / 1e10, scale * batch * 2e9 / 1e12)
        found.append(result(cell, prefill, step, sigma=0.0001, load=load, peaks=PEAKS))
    return found


def test_a_law_predicts_between_its_cells() -> None:
    """TTFT = 30 + 0.02·b·s^0.8, TPOT = 20 + 1.5·b, so 3 rows of 32 tokens take TTFT + 31·TPOT."""
    found = predict_cell(usable(sweep(lengths=[128])), ASKED, model_of(), no_formula)
    ttft, tpot = 30 + 0.02 * 3 * 128**0.8, 20 + 1.5 * 3
    for name, truth in ((FIRST_TOKEN, ttft), (PER_TOKEN, tpot), (THROUGHPUT, 3 * 32e3 / (ttft + 31 * tpot))):
        one = figure(found, name)
        assert one.value == pytest.approx(truth, rel=0.01), name
        assert one.low is not None and one.high is not None and one.low < truth < one.high
        assert (one.cells, one.beyond, one.bound) == (6, "", "")
        assert one.error is not None and one.error < 0.02
    assert figure(found, THROUGHPUT).by == "T = b/(a + c·b), throughput against batch size"
    memory = figure(found, MEMORY)  # 1.41 GB and 50,000 bytes of each token held
    assert memory.value == pytest.approx(1.41 + 3 * 160 * 5e-5, rel=1e-3)


def test_nothing_is_predicted_of_a_cell_that_was_measured_or_beyond_a_law() -> None:
    cells = usable(sweep(lengths=[128]))
    measured = dataclasses.replace(ASKED, batch_size=4, repetitions=30)
    assert predict_cell(cells, measured, model_of(), no_formula) == PredictedCell(measured, measured=True)
    larger = predict_cell(cells, dataclasses.replace(ASKED, batch_size=64), model_of(), no_formula)
    assert larger.figures == ()
    [note] = larger.notes
    assert note.startswith("throughput, time to first token, time per output token, peak memory: 6 measured cells have")
    other = predict_cell(cells, dataclasses.replace(ASKED, quant="int8"), model_of(), no_formula)
    assert other.notes[0].partition(": ")[2].startswith("0 measured cells have its quantization and settings")


def test_the_roofline_predicts_another_shape_of_the_model() -> None:
    asked = dataclasses.replace(ASKED, batch_size=4, prompt_tokens=150)
    found = predict_cell(usable(rooflined()), asked, model_of(LOAD), no_formula)
    prefill, step = (2 * least for least in at(4, 150))
    assert figure(found, FIRST_TOKEN).value == pytest.approx(prefill, rel=1e-3)
    assert figure(found, PER_TOKEN).value == pytest.approx(step, rel=1e-3)
    assert figure(found, THROUGHPUT).value == pytest.approx(4 * 32e3 / (prefill + 31 * step), rel=1e-3)
    assert all(one.cells == 4 and not one.beyond for one in found.figures)
    far = dataclasses.replace(ASKED, batch_size=64, prompt_tokens=1000)
    beyond = figure(predict_cell(usable(rooflined()), far, model_of(LOAD), no_formula), FIRST_TOKEN)
    assert beyond.value == pytest.approx(2 * at(64, 1000)[0], rel=1e-3)
    assert beyond.beyond == "40 times the largest"  # 64,000 rows · tokens against 1,600
    late = [dataclasses.replace(one, peaks={**PEAKS, "read_agreement_ratio": 0.5}) for one in rooflined()]
    assert rates_of(usable(late)) == {"flops_per_s": 1e12}  # a probe that is doubted
    assert [one.name for one in predict_cell(usable(late), asked, model_of(LOAD), no_formula).figures] == [MEMORY]


def test_another_model_is_judged_by_leaving_out_whole_models() -> None:
    """Two models at twice and three times the roofline: either predicts the other wrong by a factor of 1.5."""
    shapes = ((1, 100), (8, 200))
    cells = usable([*rooflined(2.0, shapes=shapes), *rooflined(3.0, "pythia-160m", 1.5, shapes)])
    asked = dataclasses.replace(ASKED, model="opt-350m", batch_size=2, prompt_tokens=120)
    costs = dataclasses.replace(LOAD, step_bytes=12 * 10**8, flops_per_token=2.4e9)
    one = figure(predict_cell(cells, asked, model_of(costs), no_formula), FIRST_TOKEN)
    assert one.error == pytest.approx(math.log(1.5), rel=1e-2)
    assert one.value == pytest.approx(math.sqrt(6) * 2 * 120 * 2.4e9 / 1e12 * 1e3, rel=0.02)  # the mean in logarithms
    parameters = 2 if "a + c" in one.by else 1
    half = math.exp(t_quantile_975(4 - parameters) * math.log(1.5))  # wider than by the scatter around the curve
    assert (one.low, one.high) == pytest.approx((one.value / half, one.value * half), rel=0.05)
    known = predict_cell(cells, dataclasses.replace(asked, model="opt-125m"), model_of(LOAD), no_formula)
    assert figure(known, FIRST_TOKEN).error < one.error  # type: ignore[operator]


def test_left_out_groups_are_predicted_by_the_others() -> None:
    form = share_of("y = c·x", "c", lambda x: x)
    x, y = [(1.0,), (2.0,), (3.0,), (4.0,)], [2.0, 4.0, 9.0, 12.0]
    assert left_out_error(form, x, y, ["a", "a", "b", "b"]) == pytest.approx(math.log(1.5))
    singly = [math.log(2 / (2 * 3 * 3) ** (1 / 3))] * 2 + [math.log(3 / (2 * 2 * 3) ** (1 / 3))] * 2
    expected = math.sqrt(sum(error**2 for error in singly) / 4)
    assert left_out_error(form, x, y, range(4)) == pytest.approx(expected)
    assert fit(form, x, y).loo_error == pytest.approx(expected)
    assert left_out_error(form, x, y, ["a"] * 4) is None
    found = fit(form, x, y)
    assert found.predict(8.0, beyond=True).value == pytest.approx(8 * math.sqrt(6))
    with pytest.raises(OutOfRange, match="a law is not extrapolated"):
        found.predict(8.0)


def test_memory_by_formula_is_corrected_by_measured_peaks() -> None:
    """Measured peaks are 1.2 times the formula's."""
    cells = usable(rooflined())
    truth = {id(m.cell): m.metrics["memory/host_needed_gb_peak"] for m in cells}

    def formula(cell: Cell, result: RunResult) -> float | None:
        return truth[id(cell)] / 1.2 * 1e9

    far = dataclasses.replace(ASKED, batch_size=64, prompt_tokens=1000)
    one = figure(predict_cell(cells, far, model_of(memory=5e9), formula), MEMORY)
    assert one.value == pytest.approx(6.0, rel=1e-6)
    assert "times the largest" in one.beyond
    alone = figure(predict_cell(cells, far, model_of(memory=5e9), no_formula), MEMORY)
    assert (alone.value, alone.low, alone.by) == (5.0, None, f"{FORMULA}, unchecked here")


def test_nominal_rates_bound_the_times() -> None:
    """100 GB/s and 10 TFLOP/s: 2 GFLOP a token make 40 ms of 2 rows of 100 tokens, 1 GB takes 10 ms to read."""
    device = Hardware("one", 1e11, 1e13, 4e9, "given")
    asked = dataclasses.replace(ASKED, batch_size=2, prompt_tokens=100, output_tokens=11)
    model = AskedModel(LOAD, None, "", lambda cell: 2e9 + 5e8 * cell.batch_size)
    found = predict_on(device, asked, model, {})
    step = 1e3 * (1e9 + 2 * 50_000 * 105.5) / 1e11
    expected = {
        THROUGHPUT: (2 * 11e3 / (40 + 10 * step), "at most"),
        FIRST_TOKEN: (40.0, "at least"),
        PER_TOKEN: (step, "at least"),
        MEMORY: (3.0, ""),
    }
    assert {one.name: (pytest.approx(one.value), one.bound) for one in found.figures} == expected
    assert all(one.low is None and one.error is None for one in found.figures)
    assert (found.fits, found.largest_batch) == (True, 4)
    small = predict_on(dataclasses.replace(device, memory=2.4e9), asked, model, {})
    assert (small.fits, small.largest_batch) == (False, 0)
    unknown = predict_on(dataclasses.replace(device, memory=None), asked, model, {})
    assert (unknown.fits, unknown.largest_batch) == (None, None)


def test_measured_shares_of_the_roofline_are_taken_to_another_machine() -> None:
    device = Hardware("one", 1e11, 1e13, None, "given")
    found = predict_on(device, ASKED, model_of(LOAD), shares_of(usable(rooflined(2.0))))
    bounds = predict_on(device, ASKED, model_of(LOAD), {})
    for name, factor in ((FIRST_TOKEN, 2.0), (PER_TOKEN, 2.0), (THROUGHPUT, 0.5)):
        one = figure(found, name)
        assert one.value == pytest.approx(factor * figure(bounds, name).value, rel=1e-3)
        assert (one.bound, one.cells) == ("", 4)


@pytest.mark.parametrize("name", ["opt-125m", "pythia-70m", "llama-2-7b"])
def test_a_step_reads_all_weights_but_embeddings_that_it_looks_up(name: str) -> None:
    shape = PRESETS[name].shape
    skipped = shape.weight_bytes("none") - costs_of(shape, "none", "bfloat16").step_bytes  # type: ignore[operator]
    config = PRESETS[name].config
    positions = {"opt-125m": (2048 + 2) * 768, "pythia-70m": 0, "llama-2-7b": 0}[name]
    table = 0 if name == "opt-125m" else config["vocab_size"] * config["hidden_size"]  # OPT's is the head too
    assert skipped == 2 * (table + positions)


def test_known_machines_have_a_source_and_a_vendor_s_rates() -> None:
    assert {"rtx-4090", "rtx-3080", "a100-80gb", "a10", "t4"} <= set(HARDWARE)  # those of the paper
    assert all(one.source.startswith("NVIDIA, ") and len(one.source) > 15 for one in HARDWARE.values())
    card = named_hardware("RTX 4090")
    assert (card.bandwidth, card.flops, card.memory) == (1008e9, 165.2e12, 24e9)
    own = given_hardware("300", "40.5", "8GiB")
    assert (own.bandwidth, own.flops, own.memory) == (3e11, 40.5e12, 8 * 2**30)
    assert given_hardware("300", "40", None).memory is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("300", None, None), "A machine is given by its bandwidth and its FLOP/s. Add --flops with TFLOP/s."),
        ((None, "3", "8GB"), "Add --bandwidth with GB/s."),
        (("fast", "3", None), "--bandwidth is not a rate in GB/s: fast. Give a number above 0"),
        (("nan", "3", None), "--bandwidth is not a rate in GB/s: nan."),
        (("300", "0", None), "--flops is not a rate in TFLOP/s: 0."),
        (("300", "3", "8"), "--memory is not a size: 8. Give a number with its unit, such as 16GB or 12GiB."),
        (("1e-300", "3", None), "--bandwidth is not a rate in GB/s: 1e-300."),
        (("300", "3", "0GB"), "--memory is not a size: 0GB."),
        (("300", "3", "9" * 400 + "GB"), "--memory is not a size: 9999"),
    ],
)
def test_a_machine_that_is_given_wrongly_is_refused(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", "\\(")) as told:
        given_hardware(*given)
    assert len(str(told.value)) < 200


def test_what_is_left_out_is_as_in_most_measured_cells() -> None:
    results = [replaced(one, threads=2) for one in sweep(lengths=[128])]
    found = predict({"batch_size": "3,6", "model": "opt-125m"}, results)
    assert [one.cell.batch_size for one in found.cells] == [3, 6]
    assert {(one.cell.threads, one.cell.quant, one.cell.prompt_tokens) for one in found.cells} == {(2, "bf16", 128)}
    assert (found.count, found.suspect, found.hardware) == (6, 0, None)
    long = predict({"prompt_tokens": "3000", "model": "opt-125m"}, results)
    assert long.cells[0].figures == () and "is more than the context of opt-125m" in long.cells[0].notes[0]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"quant": "int8", "int8_threshold": 5.0}, {"quant": "bf16"}),
        ({"quant": "int4", "double_quant": True}, {"quant": "bf16,int8"}),
        ({"quant": "int4-wo", "group_size": 64}, {"quant": ["bf16"]}),
        ({"quant": "mixed", "quant_budget": "4"}, {"quant": "none"}),
        ({"backend": "llama_cpp", "quant": "q4_0", "gpu_layers": 3}, {"quant": "bf16", "backend": "transformers"}),
        ({"tensor_parallel": 2}, {"backend": "vllm"}),
    ],
)
def test_settings_of_another_quantization_are_not_taken_over(settings: dict[str, Any], asked: dict[str, Any]) -> None:
    results = [replaced(one, **settings) for one in rooflined()]
    cell = predict(asked, results).cells[0].cell
    assert all(getattr(cell, name) == PARAMETERS[name].default for name in settings if name not in ("quant", "backend"))
    same = predict({"batch_size": "3"}, results).cells[0].cell
    assert {name: getattr(same, name) for name in settings} == settings


def test_another_machine_is_one_device() -> None:
    """Cells of two ranks tell nothing of the share of its rates that one device reaches."""
    results = [replaced(one, tensor_parallel=2) for one in rooflined()]
    asked = {"model": "opt-125m", "prompt_tokens": "128"}
    [found] = predict(asked, results, named_hardware("t4")).cells
    [alone] = predict({"quant": "bf16", "output_tokens": "32", **asked}, hardware=named_hardware("t4")).cells
    assert found.cell.tensor_parallel == 1
    assert found.figures == alone.figures
    [reached] = predict(asked, rooflined(), named_hardware("t4")).cells
    assert figure(reached, FIRST_TOKEN).value == pytest.approx(2 * figure(alone, FIRST_TOKEN).value, rel=0.01)


def test_without_cells_or_a_machine_there_is_nothing_to_predict_from() -> None:
    with pytest.raises(UsageError, match="A prediction needs measured cells, or a machine"):
        predict({"model": "opt-125m"})
    with pytest.raises(UsageError, match="There is no model to predict"):
        predict({}, hardware=named_hardware("t4"))
