"""Model of a registered version.

`model_config` holds all settings as they were measured: the checkpoint, the library, the quantization, the batch size
and the limits. Each key can be overridden when the model is loaded, but code that comes with the checkpoint runs only
if it was measured so. A configuration that was changed where it is stored is refused. The weights are loaded with the
first request. One request may hold any number of prompts; they are generated greedily, `batch_size` at a time.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel  # type: ignore[attr-defined]

# The only import of ours. In the file of a version its place is taken by the module itself (`registry.serving_code`).
from ..backends.huggingface.recipe import IncompleteCheckpoint, kernel, layer_classes, load

MEASURED: dict[str, Any] | None = None
"""The configuration that was measured. In the file of a version its value is written here."""


def require_measured(measured: dict[str, Any] | None, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise MlflowException if a version's stored configuration, or what it is loaded with, is not as measured.

    `stored` is that of the file MLmodel; `asked` also has what the caller of `load_model` overrides.
    """
    if measured is None:
        return
    stored = json.loads(json.dumps(stored))
    changed = [name for name in sorted({*measured, *stored}) if measured.get(name) != stored.get(name)]
    if changed:
        name = changed[0]
        raise MlflowException(
            f"The configuration of this version was changed after its registration: {', '.join(changed)}. "
            f"{name} is {json.dumps(stored.get(name))[:200]}, and {json.dumps(measured.get(name))[:200]} was measured. "
            "Register the measured run again, and find out who changed it."
        )
    if asked.get("trust_remote_code") and not measured.get("trust_remote_code"):
        raise MlflowException(
            "trust_remote_code is true, and false was measured, so no code of the checkpoint is run. "
            "Measure with trust_remote_code=true and register that run."
        )


def refused(message: str) -> MlflowException:
    """Return an error of the caller, which MLflow answers with status 400."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


class Checkpoint:
    """A checkpoint run by transformers."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch
        import transformers

        self.config = config
        if config["threads"]:
            torch.set_num_threads(int(config["threads"]))
        named: dict[str, Any] = {"trust_remote_code": config["trust_remote_code"]}
        if config["source"] in ("hub", "preset"):
            named["revision"] = config["revision"]
        if config["gguf_file"]:
            named["gguf_file"] = config["gguf_file"]
        other = config["tokenizer"]  # a file made from a checkpoint has no tokenizer of its own
        words = {
            name: value
            for name, value in (named | {"revision": other["revision"]} if other else named).items()
            if value is not None
        }
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            other["location"] if other else config["location"], **words
        )
        if config["attention"] != "auto":
            named["attn_implementation"] = config["attention"]
        try:
            model, _ = load(
                config["location"], config["quantization"], device=config["device"], dtype=config["dtype"], **named
            )
        except IncompleteCheckpoint as error:
            raise MlflowException(f"{config['location']} is not the measured checkpoint. {error}.") from error
        self._verify(model)
        ends = model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        # Neutral settings, as measured: generate() would otherwise use the checkpoint's sampling and penalties.
        model.generation_config = transformers.GenerationConfig()
        self.model: Any = model

    def _verify(self, model: Any) -> None:
        """Raise MlflowException if the linear layers' classes differ from those measured: another quantization."""
        found = kernel(layer_classes(model))
        if self.config["kernel"] and found != self.config["kernel"]:
            raise MlflowException(
                f"The model was measured with the layers {self.config['kernel']}, and has been loaded with {found}."
            )

    def encode(self, text: str) -> list[int]:
        """Text → ids."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def generate(self, batch: Sequence[list[int]], most: int) -> list[tuple[list[int], bool]]:
        """Return each prompt's output ids, up to and including the first end of sequence, and True if there was one."""
        import torch
        from transformers import GenerationConfig

        stops = self.stops
        pad = next((i for i in (self.tokenizer.pad_token_id, *sorted(stops)) if i is not None), 0)
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=self.model.device)
        settings = GenerationConfig(
            max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(stops) or None
        )
        with torch.inference_mode():
            found = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        ends = [next((place for place, token in enumerate(row) if token in stops), None) for row in found]
        return [(row if end is None else row[: end + 1], end is not None) for row, end in zip(found, ends, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Ids → text, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class GgufFile:
    """A GGUF file run by llama.cpp's C functions. Rows are decoded together, as in `backends.llamacpp.session`."""

    ROOM = 256  # llama.cpp allocates a multiple of this many tokens per row
    CHUNK = 2048  # tokens per call of llama_decode
    # ggml's numbers, since the package has no name for bf16
    KV_TYPES: ClassVar[dict[str, int]] = {
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q5_0": 6,
        "q5_1": 7,
        "q8_0": 8,
        "bf16": 30,
    }

    def __init__(self, config: dict[str, Any]) -> None:
        self.lib: Any = importlib.import_module("llama_cpp.llama_cpp")
        lib = self.lib
        lib.llama_backend_init()
        on_gpu = config["device"] != "cpu"
        settings = lib.llama_model_default_params()
        settings.load_mode = lib.LLAMA_LOAD_MODE_MMAP if config["mmap"] else lib.LLAMA_LOAD_MODE_NONE
        settings.n_gpu_layers = (-1 if config["gpu_layers"] is None else int(config["gpu_layers"])) if on_gpu else 0
        no_device = (ctypes.c_void_p * 1)(None)
        if not on_gpu:
            settings.devices = ctypes.cast(no_device, ctypes.c_void_p)
        elif not lib.llama_supports_gpu_offload():
            raise MlflowException(
                f"This was measured on {config['device']}, and this build of llama-cpp-python has no GPU support. "
                "Build it again: "
                "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python"
            )
        else:
            settings.split_mode, settings.main_gpu = 0, int(config["device"].partition(":")[2] or 0)
        file = self._file(config)
        self.model = lib.llama_model_load_from_file(file.encode(), settings)
        if not self.model:
            raise MlflowException(f"llama.cpp cannot load {file}. Its log says why.")
        kind = (lib.llama_ftype_name(lib.llama_model_ftype(self.model)) or b"unknown").decode()
        if kind != config["file_type"]:
            raise MlflowException(f"The model was measured as {config['file_type']}, and {file} is {kind}.")
        self.vocabulary = lib.llama_model_get_vocab(self.model)
        # Without a tokenizer, llama.cpp would end the process when it tokenizes a text.
        if int(lib.llama_vocab_type(self.vocabulary)) == int(lib.LLAMA_VOCAB_TYPE_NONE):
            raise MlflowException(f"{file} has no tokenizer, so it cannot answer texts.")
        self.words = int(lib.llama_vocab_n_tokens(self.vocabulary))
        self.rows = int(config["batch_size"])
        if self.rows > int(lib.llama_max_parallel_sequences()):
            raise MlflowException(
                f"batch_size={self.rows} is more than llama.cpp's {int(lib.llama_max_parallel_sequences())} sequences."
            )
        most = int(config["max_prompt_tokens"] or lib.llama_model_n_ctx_train(self.model)) + int(
            config["max_new_tokens"]
        )
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_seq_max, context.n_batch = (
            self.rows * -(-most // self.ROOM) * self.ROOM,
            self.rows,
            self.CHUNK,
        )
        if config["threads"]:
            context.n_threads = context.n_threads_batch = int(config["threads"])
        context.type_k = context.type_v = self.KV_TYPES[config["kv_cache"]]
        context.flash_attn_type = 0 if config["attention"] == "eager" else -1
        context.offload_kqv = context.op_offload = on_gpu
        context.swa_full, context.kv_unified = False, False
        context.n_outputs_max, context.n_outputs_max_per_seq = self.rows, 1
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise MlflowException(
                f"llama.cpp has no memory for {self.rows} rows of {most} tokens. Load with a smaller batch_size."
            )

    @staticmethod
    def _file(config: dict[str, Any]) -> str:
        if config["source"] == "hub_gguf":
            from huggingface_hub import snapshot_download

            parts = config["gguf_file"].replace("-00001-of-", "-*-of-")
            return str(
                Path(
                    snapshot_download(config["location"], revision=config["revision"], allow_patterns=[parts]),
                    config["gguf_file"],
                )
            )
        file = Path(config["location"], config["gguf_file"])
        if not file.is_file():
            raise MlflowException(
                f"{file}, which was measured, is not here. Copy it, or make it again: llmbench run --backend llama_cpp "
                f"--model {config['model']} --quant {config['quant']}; then load with the folder as location and its "
                "name as gguf_file."
            )
        return str(file)

    def encode(self, text: str) -> list[int]:
        """Text → ids, with the tokens that the model adds before every text."""
        data = text.encode()
        room = len(data) + 16
        found = (ctypes.c_int32 * room)()
        return list(found[: max(self.lib.llama_tokenize(self.vocabulary, data, len(data), found, room, True, True), 0)])

    def generate(self, batch: Sequence[list[int]], most: int) -> list[tuple[list[int], bool]]:
        """Return each prompt's output ids, up to and including the first end of sequence, and True if there was one."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        outputs: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        asked = [
            (row, place, token, place == len(ids) - 1)
            for row, ids in enumerate(batch)
            for place, token in enumerate(ids)
        ]
        while asked:
            chosen = {
                row: token
                for start in range(0, len(asked), self.CHUNK)
                for row, token in self._compute(asked[start : start + self.CHUNK])
            }
            asked = []
            for row, token in chosen.items():
                outputs[row].append(token)
                ended[row] = bool(self.lib.llama_vocab_is_eog(self.vocabulary, token))
                if not ended[row] and len(outputs[row]) < most:
                    asked.append((row, len(batch[row]) + len(outputs[row]) - 1, token, True))
        return list(zip(outputs, ended, strict=True))

    def _compute(self, asked: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Decode tokens, given as (row, position, id, whether the next token is wanted).

        Returns (row, most probable next token) for each token whose next one is wanted.
        """
        import numpy

        count = len(asked)
        rows, places, tokens, wanted = zip(*asked, strict=True)
        owners = (ctypes.c_int32 * count)(*rows)
        fields = dict(self.lib.llama_batch._fields_)
        addresses = (fields["seq_id"]._type_ * count)(
            *(ctypes.pointer(ctypes.c_int32.from_buffer(owners, 4 * place)) for place in range(count))
        )
        code = self.lib.llama_decode(
            self.context,
            self.lib.llama_batch(
                n_tokens=count,
                token=(ctypes.c_int32 * count)(*tokens),
                embd=None,
                pos=(ctypes.c_int32 * count)(*places),
                n_seq_id=(ctypes.c_int32 * count)(*([1] * count)),
                seq_id=addresses,
                logits=(ctypes.c_int8 * count)(*wanted),
            ),
        )
        if code:
            raise MlflowException(f"llama.cpp failed while computing {count} tokens (code {code}). Its log says why.")
        ids = [row for row, want in zip(rows, wanted, strict=True) if want]
        if not ids:
            return []
        logits = numpy.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape=(len(ids), self.words))
        return list(zip(ids, logits.argmax(axis=1).tolist(), strict=True))

    def decode(self, ids: list[int]) -> str:
        """Ids → text, without special tokens."""
        room = 64 + 32 * len(ids)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        while True:
            text = ctypes.create_string_buffer(room)
            count = self.lib.llama_detokenize(self.vocabulary, tokens, len(ids), text, room, True, False)
            if count >= 0:
                return text.raw[:count].decode("utf-8", errors="replace")
            room = -count


ENGINES: dict[str, Any] = {"checkpoint": Checkpoint, "gguf": GgufFile}
"""Value of the key `engine` → class that answers."""


# MLflow advises a type hint here; the warning is recorded, so it is not shown. With a type hint, MLflow would derive
# the signature from it and drop the request's parameters.
with warnings.catch_warnings(record=True):

    class MeasuredModel(PythonModel):
        """Answers prompts with the quantization and the limits of the registered configuration."""

        def load_context(self, context: Any) -> None:
            """Keep the configuration; nothing is loaded yet. Raises MlflowException if it is not as measured."""
            self.config: dict[str, Any] = dict(context.model_config)
            if MEASURED is not None:
                text = Path(__file__).with_name("MLmodel").read_text(encoding="utf-8")
                stored = yaml.safe_load(text)["flavors"]["python_function"].get("config") or {}
                require_measured(MEASURED, stored, self.config)
            self.lock = threading.Lock()
            self.engine: Any = None

        def predict(  # type: ignore[no-untyped-def]
            self, context: Any, model_input, params: dict[str, Any] | None = None
        ) -> list[dict[str, Any]]:
            """Answer each row's `prompt`.

            Returns for each row the text, the numbers of prompt and output tokens, and the reason why it ended: `stop`
            or `length`. Raises MlflowException (status 400) for prompts or parameters outside the measured limits.
            """
            rows = model_input.to_dict("records") if hasattr(model_input, "to_dict") else model_input
            prompts = [row["prompt"] if isinstance(row, dict) else row for row in rows]
            if unlike := [prompt for prompt in prompts if not isinstance(prompt, str)]:
                raise refused(f"A prompt is not a text: {unlike[0]!r}. Give each row a prompt.")
            most, size = int(self.config["max_new_tokens"]), int(self.config["batch_size"])
            if size < 1:
                raise refused(f"batch_size is not at least 1: {size}. Load with another batch_size.")
            asked = (params or {}).get("max_new_tokens")
            wanted = most if asked is None else int(asked)
            if not 1 <= wanted <= most:
                raise refused(
                    f"max_new_tokens is not from 1 to {most}, which was measured: {wanted}. "
                    "Ask for less, or load with another max_new_tokens."
                )
            with self.lock:  # one generation at a time, as in the measurement
                if self.engine is None:
                    self.engine = self._engine()
                ids = [self._encode(prompt) for prompt in prompts]
                return [
                    answer
                    for start in range(0, len(ids), size)
                    for answer in self._answers(ids[start : start + size], wanted)
                ]

        def _engine(self) -> Any:
            if self.config["engine"] not in ENGINES:
                raise refused(
                    f"This version was measured with backend={self.config['backend']}, which has no answers to give."
                )
            return ENGINES[self.config["engine"]](self.config)

        def _encode(self, prompt: str) -> list[int]:
            ids: list[int] = self.engine.encode(prompt)
            most = self.config["max_prompt_tokens"]
            if not ids:
                raise refused("A prompt has no tokens. Give prompts with text.")
            if most and len(ids) > most:
                raise refused(
                    f"A prompt has {len(ids)} tokens, and {most} are the most that was measured. "
                    "Shorten it, or load with another max_prompt_tokens."
                )
            return ids

        def _answers(self, batch: list[list[int]], most: int) -> list[dict[str, Any]]:
            return [
                {
                    "text": self.engine.decode(tokens),
                    "prompt_tokens": len(prompt),
                    "output_tokens": len(tokens),
                    "finish": "stop" if ended else "length",
                }
                for prompt, (tokens, ended) in zip(batch, self.engine.generate(batch, most), strict=True)
            ]


set_model(MeasuredModel())
