"""Claimed bits and errors of quantizations, compared with affine quantization as the paper defines it."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional

from mlflow_llmbench.backends.huggingface import gptq, inspection, mixed, recipe
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.quantizations import GPTQ
from tests.affine import bits_per_weight, dequantize, quantize

ROWS, WIDTH = 96, 512
"""A weight matrix: output rows and input columns."""


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Normally distributed weights whose rows differ in size, with a few large ones, as in trained models."""
    generator = torch.Generator().manual_seed(0)
    found = (
        torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
        * torch.logspace(-2, 0, ROWS, dtype=torch.float64)[:, None]
    )
    found[:, 7] *= 4
    return found.to(torch.float16).double()  # LLM.int8 takes fp16, so its rounding is not counted


def affine(x: torch.Tensor, bits: int, group: int | None = None) -> torch.Tensor:
    return dequantize(*quantize(x, bits, group), x.shape)


def rms(x: torch.Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("group", [None, WIDTH, 64])
def test_the_reference_is_off_by_half_a_step_at_most(weight: torch.Tensor, bits: int, group: int | None) -> None:
    codes, low, step = quantize(weight, bits, group)
    assert codes.min() == 0 and codes.max() == 2**bits - 1 and torch.equal(codes, codes.round())
    error = (affine(weight, bits, group) - weight).reshape(codes.shape).abs()
    assert bool((error <= step / 2 * (1 + 1e-9)).all())
    ends = affine(weight, bits, group).reshape(codes.shape)
    assert torch.allclose(ends.amin(1), low[:, 0]) and torch.allclose(ends.amax(1), weight.reshape(codes.shape).amax(1))
    # Errors are then uniform over a step, with variance step²/12; over the whole matrix its small rows are near 0.
    if bits > 3 and group:
        assert rms(error / step) == pytest.approx(1 / math.sqrt(12), rel=0.05)


def test_smaller_groups_and_more_bits_lose_less(weight: torch.Tensor) -> None:
    by_group = [rms(affine(weight, 4, group) - weight) for group in (None, WIDTH, 128, 64, 32)]
    assert by_group == sorted(by_group, reverse=True)
    by_bits = [rms(affine(weight, bits, 64) - weight) for bits in range(2, 9)]
    ratios = [more / less for less, more in zip(by_bits[1:], by_bits, strict=False)]
    assert all(
        ratio == pytest.approx((2 ** (bits + 1) - 1) / (2**bits - 1), rel=0.06) for bits, ratio in enumerate(ratios, 2)
    )


def test_llm_int8_is_off_by_half_a_step_of_its_row(weight: torch.Tensor) -> None:
    """Codes from −127 to 127 with one scale per row: a step of max|x|/127, while the affine one wastes no range."""
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    back = codes.double() * scale[:, None].double() / 127
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((back - weight).abs() <= step / 2 * (1 + 1e-4)).all())
    its, best = rms((back - weight) / step), rms((affine(weight, 8, WIDTH) - weight) / step)
    assert its == pytest.approx(1 / math.sqrt(12), rel=0.03)
    assert 0.9 * best < its < 1.6 * best
    assert rms(back - weight) > rms(affine(weight, 9, WIDTH) - weight)


def test_nf4_is_off_by_half_a_gap_of_its_codebook_and_beats_affine_codes_of_as_many_bits(weight: torch.Tensor) -> None:
    """16 values at normal quantiles, times the largest magnitude of each block of 64 (Dettmers et al. 2023)."""
    packed, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=False)
    back = functional.dequantize_4bit(packed, state).double()
    blocks, its = weight.reshape(-1, 64), back.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    book = state.code.double()
    nearest = (its[..., None] / largest[..., None] - book).abs().amin(-1)
    assert book.numel() == 16 and bool((nearest < 1e-6).all())
    assert bool(((its - blocks).abs() <= book.diff().max() / 2 * largest * (1 + 1e-4)).all())
    exact = book[(blocks[..., None] / largest[..., None] - book).abs().argmin(-1)] * largest
    assert rms(its - blocks) == pytest.approx(rms(exact - blocks), rel=1e-3)  # each weight has the nearest of the 16
    smooth = torch.randn(256, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = functional.dequantize_4bit(
        *functional.quantize_4bit(smooth.float(), blocksize=64, quant_type="nf4", compress_statistics=False)
    ).double()
    # A scale for 64 weights, or a scale and a minimum for 128.
    assert bits_per_weight(4, 64, 32) == bits_per_weight(4, 128, 64)
    assert rms(affine(smooth, 5, 128) - smooth) < rms(made - smooth) < 0.95 * rms(affine(smooth, 4, 128) - smooth)


@pytest.mark.parametrize(
    ("scheme", "claimed"),
    [("int8", bits_per_weight(8, WIDTH, 32)), ("int4", bits_per_weight(4, 64, 32) + 16 * 32 / (ROWS * WIDTH))],
    ids=["int8", "int4"],
)
def test_bits_that_are_claimed_are_codes_scales_and_codebook(weight: torch.Tensor, scheme: str, claimed: float) -> None:
    linear = torch.nn.Linear(WIDTH, ROWS, bias=True, dtype=torch.bfloat16)
    linear.weight.data = weight.bfloat16()
    assert inspection.layer_bytes(linear) * 8 == 16 * weight.numel()
    assert (
        inspection.layer_bytes(recipe.quantized(linear, scheme, "cpu", mixed.THRESHOLD)) * 8 / weight.numel() == claimed
    )


@pytest.mark.parametrize(("scheme", "bits", "group"), [("int8", 8, WIDTH), ("int4", 4, 64)])
def test_a_layer_computes_what_its_bits_allow(weight: torch.Tensor, scheme: str, bits: int, group: int) -> None:
    """The product's error is about that of affine weights with as many bits; LLM.int8 rounds its input as well."""
    linear = torch.nn.Linear(WIDTH, ROWS, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight.bfloat16()
    x = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.double() @ linear.weight.data.double().T
    with torch.inference_mode():
        its = rms(recipe.quantized(linear, scheme, "cpu", mixed.THRESHOLD)(x).double() - exact)
    own = rms(x.double() @ affine(linear.weight.data.double(), bits, group).T - exact)
    assert 0.5 * own < its < 4 * own


installed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in GPTQ.packages) or not shutil.which("g++"),
    reason="needs mlflow-llmbench[gptq] and g++",
)


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # warnings of optimum and GPTQModel, which otherwise run in their own process
@pytest.mark.parametrize(("quant", "bits"), [("gptq", 4), ("gptq8", 8)])
def test_gptq_holds_an_affine_grid_for_each_group(tiny_model: Path, quant: str, bits: int) -> None:
    """Codes, with a step and a zero point per group and output; the weights are less exact, the products more so."""
    from safetensors.torch import load_file

    cell = Cell(model=str(tiny_model), quant=quant, group_size=64)
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    folder = gptq.folder_of(cell, facts)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == bits
    made, original = load_file(folder / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in made if key.endswith(".qweight")]:
        exact = original[f"{name}.weight"].double()
        stored = sum(
            made[f"{name}.{part}"].numel() * made[f"{name}.{part}"].element_size()
            for part in ("qweight", "qzeros", "scales")
        )
        assert 8 * stored / exact.numel() == bits_per_weight(bits, 64, 16 + bits)
        steps = made[f"{name}.scales"].double().T.repeat_interleave(64, 1)
        codes = torch.stack(list(unpacked(made[f"{name}.qweight"], bits)), 1).flatten(0, 1).T
        zeros = (
            torch.stack(list(unpacked(made[f"{name}.qzeros"].T.contiguous(), bits)), 1)
            .flatten(0, 1)
            .repeat_interleave(64, 1)
        )
        # Version 1 of the format stores the zero point minus 1.
        off = min((steps * (codes - zeros - shift) - exact for shift in (0, 1)), key=rms)
        affine_off = rms(affine(exact, bits, 64) - exact)
        assert affine_off * 0.9 < rms(off) < 4 * affine_off, name


def unpacked(packed: torch.Tensor, bits: int) -> Iterator[torch.Tensor]:
    """Yield the numbers in each int32, lowest bits first: one tensor of the same shape for each position."""
    for place in range(32 // bits):
        yield (packed >> (bits * place)) & (2**bits - 1)
