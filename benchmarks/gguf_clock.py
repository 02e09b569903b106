"""Compare our stamps with llama.cpp's own clock: `python benchmarks/gguf_clock.py [FILE.gguf] [--out FILE]`.

The goal is agreement within 3 %. `llama_perf_context` counts the time inside `llama_decode`, of prompts and of single
tokens. Our time is the wait of a caller: it also includes the choice of the most probable token and Python, so the
ratios are a little above 1. Both clocks time the same calls, so the machine's noise is in both. Without a file, a Llama
with random weights is written, large enough for a step to take milliseconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.backends.llamacpp.backend import LlamaCppBackend
from mlflow_llmbench.measure.batch import time_request
from mlflow_llmbench.records.cell import Cell

GOAL = 0.03


@dataclass(frozen=True)
class Agreement:
    """Ours ÷ llama.cpp's, medians over the repeats: time to the first token, and mean time of the tokens after it."""

    prompt_ratio: float
    step_ratio: float
    ttft_ms: float
    tpot_ms: float
    repeats: int


def write_model(target: Path, layers: int = 8, hidden: int = 1024, words: int = 32_000) -> Path:
    """A Llama of random 16-bit weights with no vocabulary."""
    import gguf
    import numpy as np

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, "llama")
    for add, value in (
        (writer.add_context_length, 4096), (writer.add_embedding_length, hidden), (writer.add_block_count, layers),
        (writer.add_feed_forward_length, 3 * hidden), (writer.add_head_count, 16), (writer.add_head_count_kv, 4),
        (writer.add_vocab_size, words),
        (writer.add_rope_dimension_count, hidden // 16),
    ):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(
            f"{name}.weight", (draw.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16)
        )

    matrix("token_embd", words, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in (
            ("attn_q", hidden, hidden), ("attn_k", hidden // 4, hidden), ("attn_v", hidden // 4, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", 3 * hidden, hidden), ("ffn_up", 3 * hidden, hidden), ("ffn_down", hidden, 3 * hidden),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def compare(file: Path, prompt_tokens: int, output_tokens: int, repeats: int, threads: int | None = None) -> Agreement:
    """Time the same calls with both clocks."""
    cell = Cell(
        model=str(file),
        backend="llama_cpp",
        device="cpu",
        threads=threads,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    backend = LlamaCppBackend(cell, LlamaCppBackend.resolve(cell))
    backend.load()
    prompt = [list(range(100, 100 + prompt_tokens))]
    time_request(backend, prompt, output_tokens)
    prompts, steps, firsts, gaps = [], [], [], []
    for _ in range(repeats):
        backend.timings(reset=True)
        record, _ids = time_request(backend, prompt, output_tokens)
        own = backend.timings()
        assert own is not None and own.steps == output_tokens - 1 and own.prompt_tokens == prompt_tokens
        first = (record.stamps_ns[0] - record.t0_ns) / 1e6
        gap = (record.stamps_ns[-1] - record.stamps_ns[0]) / 1e6 / (output_tokens - 1)
        prompts.append(first / own.prompt_ms)
        steps.append(gap / (own.step_ms / own.steps))
        firsts.append(first)
        gaps.append(gap)
    backend.close()
    return Agreement(median(prompts), median(steps), median(firsts), median(gaps), repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print("Skipped: llama-cpp-python is not installed. Run: pip install -c constraints.txt -e '.[gguf]'")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(
            arguments.file or write_model(Path(scratch) / "model.gguf"), prompt_tokens=256, output_tokens=64, repeats=10
        )
    print(f"time to first token: {found.ttft_ms:.1f} ms, {found.prompt_ratio:.4f} of llama.cpp's own")
    print(f"per token after it:  {found.tpot_ms:.2f} ms, {found.step_ratio:.4f} of llama.cpp's own")
    good = abs(found.prompt_ratio - 1) < GOAL and abs(found.step_ratio - 1) < GOAL
    print(f"goal, within {GOAL:.0%}: {'met' if good else 'MISSED'}")
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(found), indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
