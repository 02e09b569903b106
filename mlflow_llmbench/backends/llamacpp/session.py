"""Call llama.cpp's C functions: a loaded model, and a context in which rows of tokens are decoded together.

This uses the low-level interface of llama-cpp-python. The high-level one does not batch and checks each token in
Python. One `llama_decode` makes one token for every row. It reads numpy arrays that are filled without a loop over
tokens.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...records.errors import MeasurementError, OutOfMemory, UsageError, first_line
from ...records.redaction import excerpt

if TYPE_CHECKING:
    import numpy as np


PAD = 256
"""llama.cpp rounds the KV cache up to a multiple of this many tokens per row."""

CHUNK = 2048
"""Maximum tokens per `llama_decode` call. Both this and the 512 tokens computed at once are llama.cpp's defaults."""

LOG_LINES = 5000
WARNING, ERROR = 3, 4
_NO_MEMORY = ("failed to allocate", "out of memory", "unable to allocate", "cannot allocate", "can't allocate")
_log: deque[tuple[int, str]] = deque(maxlen=LOG_LINES)
_kept: list[Any] = []
"""The log callback. It must stay alive, because llama.cpp would still call it after it is freed."""


@dataclass(frozen=True)
class Timings:
    """Timings by llama.cpp itself since the last reset.

    Milliseconds and token count of calls with several tokens (prompts), and milliseconds and count of calls with one
    token (steps).
    """

    prompt_ms: float
    prompt_tokens: int
    step_ms: float
    steps: int


def library() -> Any:
    """Return the C functions, with llama.cpp's log redirected: warnings and errors to `logging`, all to `log_lines`."""
    lib = importlib.import_module("llama_cpp.llama_cpp")
    if not _kept:
        logger = logging.getLogger("llama.cpp")

        def take(level: int, text: bytes, _: Any) -> None:
            line = text.decode("utf-8", errors="replace").rstrip("\n")
            if line.strip(" ."):
                _log.append((level, line))
                if level in (WARNING, ERROR):
                    logger.warning("%s", line)

        _kept.append(lib.llama_log_callback(take))
        lib.llama_log_set(_kept[0], ctypes.c_void_p(0))
        lib.llama_backend_init()
    return lib


def log_lines() -> list[str]:
    """Return the last lines of llama.cpp's log, at most `LOG_LINES`."""
    return [line for _, line in _log]


def forget_log() -> None:
    """Clear the kept log."""
    _log.clear()


def failure(doing: str) -> MeasurementError | OutOfMemory:
    """Return the error for a failed call of llama.cpp, with the first error line of its log."""
    said = [line for level, line in _log if level == ERROR]
    why = excerpt(re.sub(r"^\w+:\s*", "", said[0].strip()), 300) if said else "it gave no reason"
    text = f"llama.cpp failed while {doing}: {why}"
    return (
        OutOfMemory(text)
        if any(word in line.lower() for line in said for word in _NO_MEMORY)
        else MeasurementError(text)
    )


class Model:
    """A loaded model, with `gpu_layers` of its layers on GPU number `gpu` (−1: all layers; `gpu` None: CPU only)."""

    def __init__(self, path: str, mmap: bool, gpu: int | None, gpu_layers: int) -> None:
        self.lib = library()
        forget_log()
        settings = self.lib.llama_model_default_params()
        settings.load_mode = self.lib.LLAMA_LOAD_MODE_MMAP if mmap else self.lib.LLAMA_LOAD_MODE_NONE
        settings.n_gpu_layers = gpu_layers if gpu is not None else 0
        none = (ctypes.c_void_p * 1)(None)
        if gpu is None:
            # An empty list of devices. Without it, a build for GPUs computes long prompts on the GPU.
            settings.devices = ctypes.cast(none, ctypes.c_void_p)
        else:
            settings.split_mode, settings.main_gpu = 0, gpu
        self.on_gpu = gpu is not None
        self.handle = self.lib.llama_model_load_from_file(path.encode(), settings)
        if not self.handle:
            raise failure(f"loading {path}")
        self.vocabulary = self.lib.llama_model_get_vocab(self.handle)
        self.words = int(self.lib.llama_vocab_n_tokens(self.vocabulary))

    @property
    def has_tokenizer(self) -> bool:
        """True if the model has a vocabulary. Without one, llama.cpp would end the process on a text to tokenize."""
        return int(self.lib.llama_vocab_type(self.vocabulary)) != int(self.lib.LLAMA_VOCAB_TYPE_NONE)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokenize a text, with the model's own leading tokens if `special`. Raises MeasurementError.

        Special tokens in the text are parsed as such, as transformers does.
        """
        data = text.encode("utf-8")
        room = len(data) + 16
        found = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocabulary, data, len(data), found, room, special, True)
        if count < 0:
            raise MeasurementError(f"llama.cpp cannot tokenize a text of {len(data)} bytes.")
        return list(found[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 64 + 32 * len(ids)
        while True:
            text = ctypes.create_string_buffer(room)
            count = self.lib.llama_detokenize(self.vocabulary, tokens, len(ids), text, room, True, False)
            if count >= 0:
                return text.raw[:count].decode("utf-8", errors="replace")
            room = -count

    def chat_renderer(self) -> Callable[[list[dict[str, str]]], str] | None:
        """Return a function that renders messages with the file's chat template; None if the file has no template."""
        template = self.lib.llama_model_chat_template(self.handle, None)
        if not template:
            return None
        formats = importlib.import_module("llama_cpp.llama_chat_format")
        names = [self._word(getattr(self.lib, f"llama_vocab_{name}")(self.vocabulary)) for name in ("eos", "bos")]
        formatter = formats.Jinja2ChatFormatter(template.decode("utf-8"), *names)

        def render(chat: list[dict[str, str]]) -> str:
            try:
                return str(formatter(messages=chat).prompt)
            except Exception as error:  # templates raise any class
                raise MeasurementError(
                    f"The chat template of the file fails: {first_line(error)}. Use history=none."
                ) from None

        return render

    def _word(self, number: int) -> str:
        return str(self.lib.llama_vocab_get_text(self.vocabulary, number).decode("utf-8")) if number >= 0 else ""

    def describe(self) -> str:
        """Return llama.cpp's description of the model: architecture, size, file type."""
        text = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.handle, text, 256)
        return text.value.decode(errors="replace")

    def parameters(self) -> int:
        """Return the number of weights."""
        return int(self.lib.llama_model_n_params(self.handle))

    def file_type(self) -> str:
        """Return the name of the file's quantization, such as `Q4_K - Medium`."""
        name = self.lib.llama_ftype_name(self.lib.llama_model_ftype(self.handle))
        return name.decode(errors="replace") if name else "unknown"

    def close(self) -> None:
        """Free the model. Its contexts must be closed first."""
        if self.handle:
            self.lib.llama_model_free(self.handle)
            self.handle = None


class Session:
    """A context: a KV cache for `rows` rows of `max_tokens` tokens, and the compute buffers.

    With `all_logits`, logits of all tokens can be requested, which takes room for 512 rows of the vocabulary. The cache
    of layers with a sliding window holds only that window, as in llama.cpp's own programs.
    Raises UsageError, MeasurementError or OutOfMemory.
    """

    def __init__(
        self, model: Model, rows: int, max_tokens: int, threads: int, kv_type: int, flash: int, all_logits: bool = False
    ) -> None:
        import numpy

        self.model, self.lib = model, model.lib
        most = int(self.lib.llama_max_parallel_sequences())
        if rows > most:
            raise UsageError(
                f"batch_size={rows} is more than the {most} sequences that llama.cpp supports. Use at most {most}."
            )
        self.rows, self.max_tokens = rows, -(-max_tokens // PAD) * PAD
        self.chunk = 512 if all_logits else CHUNK
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = rows * self.max_tokens, rows, self.chunk
        settings.n_outputs_max, settings.n_outputs_max_per_seq = (0, 0) if all_logits else (rows, 1)
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = kv_type
        settings.flash_attn_type = flash
        settings.offload_kqv = settings.op_offload = model.on_gpu
        settings.swa_full, settings.kv_unified, settings.no_perf = False, False, False
        self.handle = self.lib.llama_init_from_model(model.handle, settings)
        if not self.handle:
            raise failure(f"making room for {rows} rows of {max_tokens} tokens")
        self._sequences = numpy.arange(rows, dtype=numpy.int32)
        self._addresses = (self._sequences.ctypes.data + 4 * numpy.arange(rows)).astype(numpy.uint64)
        self._steps = _Batch(
            self.lib,
            numpy.zeros(rows, numpy.int32),
            numpy.zeros(rows, numpy.int32),
            self._addresses,
            numpy.ones(rows, numpy.int8),
        )

    def prefill(self, prompts: Sequence[Sequence[int]], kept: int = 0) -> np.ndarray[Any, Any]:
        """Empty the cache, compute one prompt per row, and return the most probable next token of each row.

        If `kept` is not 0, the cache is not emptied: it already holds the first `kept` tokens of each prompt.
        """
        import numpy

        if not kept:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.handle), False)
        lengths = numpy.array([len(prompt) - kept for prompt in prompts])
        tokens = numpy.concatenate([numpy.asarray(prompt[kept:], numpy.int32) for prompt in prompts])
        positions = numpy.concatenate([numpy.arange(kept, kept + length, dtype=numpy.int32) for length in lengths])
        sequence_ids = numpy.repeat(self._addresses[: len(prompts)], lengths)
        logit_flags = numpy.zeros(len(tokens), numpy.int8)
        logit_flags[lengths.cumsum() - 1] = 1
        chosen = [
            self._run(_Batch(self.lib, tokens[part], positions[part], sequence_ids[part], logit_flags[part]))
            for part in (slice(start, start + self.chunk) for start in range(0, len(tokens), self.chunk))
        ]
        first: np.ndarray[Any, Any] = numpy.concatenate(chosen)
        self._steps.resize(len(prompts))
        self._steps.positions[: len(prompts)] = lengths + kept
        return first

    def step(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Compute the next token of each row from its last one."""
        self._steps.tokens[: len(tokens)] = tokens
        chosen = self._run(self._steps)
        self._steps.positions += 1
        return chosen

    def _run(self, batch: _Batch) -> np.ndarray[Any, Any]:
        """Compute a batch. Return the most probable next token for each token with requested logits, in batch order."""
        self._decode(batch)
        found: np.ndarray[Any, Any] = self._logits(batch.logit_count).argmax(axis=1)
        return found

    def _decode(self, batch: _Batch) -> None:
        code = self.lib.llama_decode(self.handle, batch.struct)
        if code == 1:
            raise MeasurementError(
                f"llama.cpp found no room in its KV cache of {self.rows} rows with {self.max_tokens} tokens each."
            )
        if code:
            raise failure("computing a batch")

    def _logits(self, count: int) -> np.ndarray[Any, Any]:
        """Wait for the last batch's logits and return them as a view of llama.cpp's memory, (count, vocabulary)."""
        import numpy

        if not count:
            self.lib.llama_synchronize(self.handle)
            return numpy.empty((0, self.model.words), numpy.float32)
        pointer = self.lib.llama_get_logits(self.handle)
        if not pointer:
            raise failure("reading the logits")
        return numpy.ctypeslib.as_array(pointer, shape=(count, self.model.words))

    def logits(self, ids: Sequence[int], last: int) -> np.ndarray[Any, Any]:
        """Return the logits after each of the `last` last ids of one text, shape (last, vocabulary).

        Needs `all_logits`.
        """
        import numpy

        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.handle), False)
        tokens, positions = numpy.asarray(ids, numpy.int32), numpy.arange(len(ids), dtype=numpy.int32)
        sequence_ids, logit_flags = (
            numpy.repeat(self._addresses[:1], len(ids)),
            (positions >= len(ids) - last).astype(numpy.int8),
        )
        found = []
        for start in range(0, len(ids), self.chunk):
            part = slice(start, start + self.chunk)
            batch = _Batch(self.lib, tokens[part], positions[part], sequence_ids[part], logit_flags[part])
            self._decode(batch)
            found.append(self._logits(batch.logit_count).copy())
        return numpy.concatenate(found)

    def timings(self) -> Timings:
        """Return llama.cpp's own timings since the last reset."""
        told = self.lib.llama_perf_context(self.handle)
        return Timings(told.t_p_eval_ms, told.n_p_eval, told.t_eval_ms, told.n_eval)

    def reset_timings(self) -> None:
        """Reset llama.cpp's timings."""
        self.lib.llama_perf_context_reset(self.handle)

    def close(self) -> None:
        """Free the cache and the buffers."""
        if self.handle:
            self.lib.llama_free(self.handle)
            self.handle = None


class _Batch:
    """A batch in numpy arrays and as llama.cpp's struct.

    Tokens, their positions in their rows, the address of each row's number, and flags for the tokens that need logits.
    """

    def __init__(self, lib: Any, tokens: Any, positions: Any, sequence_ids: Any, logit_flags: Any) -> None:
        import numpy

        self.tokens, self.positions, self.sequence_ids, self.logit_flags = (
            numpy.ascontiguousarray(array) for array in (tokens, positions, sequence_ids, logit_flags)
        )
        self.ones = numpy.ones(len(self.tokens), numpy.int32)
        self.logit_count = int(self.logit_flags.sum())
        fields = dict(lib.llama_batch._fields_)
        self.struct = lib.llama_batch(
            n_tokens=len(self.tokens),
            token=self.tokens.ctypes.data_as(fields["token"]),
            embd=None,
            pos=self.positions.ctypes.data_as(fields["pos"]),
            n_seq_id=self.ones.ctypes.data_as(fields["n_seq_id"]),
            seq_id=self.sequence_ids.ctypes.data_as(fields["seq_id"]),
            logits=self.logit_flags.ctypes.data_as(fields["logits"]),
        )

    def resize(self, count: int) -> None:
        """Use the first `count` tokens only, all with logits."""
        self.struct.n_tokens = self.logit_count = count
