"""The model that a registered version runs. MLflow copies this file into each version, so it uses nothing of mlflow_llmbench.

Everything comes from `model_config`: what to load, how it is quantized, the batch size and the limits, all as they were
measured; each key can be overridden when the model is loaded. The weights are loaded with the first request.
One request may hold any number of prompts; they are generated greedily, `batch_size` at a time.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel  # type: ignore[attr-defined]


def refused(message: str) -> MlflowException:
    """What the caller did wrong, as an answer with status 400."""
    return MlflowException(message, error_code=INVALID_PARAMETER_VALUE)


def quantized(linear: Any, scheme: str, device: str, threshold: float) -> Any:
    """A linear layer as LLM.int8 (int8) or NF4 (int4): what `backends.mixed.quantized` makes, which this file cannot import."""
    import bitsandbytes
    import torch

    nn: Any = bitsandbytes.nn
    sizes, biased = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.data.to("cpu")
    form: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    with torch.device("meta"):
        made: Any = (
            nn.Linear8bitLt(*sizes, biased, has_fp16_weights=False, threshold=threshold)
            if scheme == "int8"
            else nn.Linear4bit(*sizes, biased, compute_dtype=weight.dtype, **form)
        )
    if scheme == "int8":
        made.weight = nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        made.weight = nn.Params4bit(weight, requires_grad=False, module=made, **form).to(device)
    made.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return made.requires_grad_(False).eval()


# Recorded, so not shown: the advice to add a type hint. With one, MLflow derives the signature from it and drops the request's parameters.
with warnings.catch_warnings(record=True):

    class MeasuredModel(PythonModel):
        """Prompts → texts, with the quantization and the limits of the registered configuration."""

        def load_context(self, context: Any) -> None:
            """Keep the configuration; nothing is loaded yet."""
            self.config: dict[str, Any] = dict(context.model_config)
            self.lock = threading.Lock()
            self.model: Any = None
            self.tokenizer: Any = None
            self.stops: set[int] = set()

        def predict(self, context: Any, model_input, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
            """Answer each row's `prompt`: its text, the tokens of prompt and output, and whether it ended by itself (`stop`) or by `length`."""
            rows = model_input.to_dict("records") if hasattr(model_input, "to_dict") else model_input
            prompts = [str(row["prompt"]) if isinstance(row, dict) else str(row) for row in rows]
            most, size = int(self.config["max_new_tokens"]), int(self.config["batch_size"])
            wanted = int((params or {}).get("max_new_tokens") or most)
            if not 1 <= wanted <= most:
                raise refused(
                    f"max_new_tokens is not from 1 to {most}, which was measured: {wanted}. Ask for less, or load with another max_new_tokens."
                )
            with self.lock:  # one generation at a time: the figures were measured so
                if self.model is None:
                    self._load()
                ids = [self._encode(prompt) for prompt in prompts]
                return [answer for start in range(0, len(ids), size) for answer in self._generate(ids[start : start + size], wanted)]

        def _load(self) -> None:
            import torch
            import transformers

            config = self.config
            if config["backend"] != "transformers":
                raise refused(f"This version was measured with backend={config['backend']}, which has no answers to give.")
            if config["threads"]:
                torch.set_num_threads(int(config["threads"]))
            named: dict[str, Any] = {"trust_remote_code": config["trust_remote_code"]}
            if config["source"] in ("hub", "preset"):
                named["revision"] = config["revision"]
            if config["gguf_file"]:
                named["gguf_file"] = config["gguf_file"]
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(config["location"], **named)
            settings = dict(config["quantization"])
            layers = settings.get("layers")
            if settings and layers is None:
                named["quantization_config"] = getattr(transformers, settings.pop("class"))(**settings)
            if config["attention"] != "auto":
                named["attn_implementation"] = config["attention"]
            dtype = config["dtype"] if config["dtype"] == "auto" else getattr(torch, config["dtype"])
            place = config["device"] if layers is None else "cpu"
            model = transformers.AutoModelForCausalLM.from_pretrained(config["location"], dtype=dtype, device_map={"": place}, **named)
            if layers is not None:
                for scheme, names in layers.items():
                    for name in names:
                        linear = model.get_submodule(name)
                        model.set_submodule(name, quantized(linear, scheme, config["device"], settings["llm_int8_threshold"]))
                model.to(config["device"])
            self._verify(model.eval())
            ends = model.generation_config.eos_token_id
            ends = self.tokenizer.eos_token_id if ends is None else ends
            self.stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
            # Neutral, as it was measured: generate() would fill in the checkpoint's sampling and penalties.
            model.generation_config = transformers.GenerationConfig()
            self.model = model

        def _verify(self, model: Any) -> None:
            """Refuse a model whose linear layers are not of the classes that were measured: it would be another quantization."""
            head = model.get_output_embeddings()
            layers = [m for m in model.modules() if m is not head and hasattr(m, "in_features") and next(m.children(), None) is None]
            counts = Counter(type(layer).__name__ for layer in layers)
            kernel = ", ".join(f"{name} × {count}" for name, count in sorted(counts.items()))
            if self.config["kernel"] and kernel != self.config["kernel"]:
                raise MlflowException(f"The model was measured with the layers {self.config['kernel']}, and has been loaded with {kernel}.")

        def _encode(self, prompt: str) -> list[int]:
            ids: list[int] = self.tokenizer(prompt)["input_ids"]
            most = self.config["max_prompt_tokens"]
            if not ids:
                raise refused("A prompt has no tokens. Give prompts with text.")
            if most and len(ids) > most:
                raise refused(
                    f"A prompt has {len(ids)} tokens, and {most} are the most that was measured. Shorten it, or load with another max_prompt_tokens."
                )
            return ids

        def _generate(self, batch: list[list[int]], most: int) -> list[dict[str, Any]]:
            import torch
            from transformers import GenerationConfig

            tokenizer, stops = self.tokenizer, self.stops
            pad = next((i for i in (tokenizer.pad_token_id, *sorted(stops)) if i is not None), 0)
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=self.model.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=self.model.device)
            settings = GenerationConfig(max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(stops) or None)
            with torch.inference_mode():
                found = self.model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
            answers = []
            for prompt, row in zip(batch, found, strict=True):
                end = next((place for place, token in enumerate(row) if token in stops), None)
                tokens = row if end is None else row[: end + 1]
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                finish = "length" if end is None else "stop"
                answers.append({"text": text, "prompt_tokens": len(prompt), "output_tokens": len(tokens), "finish": finish})
            return answers


set_model(MeasuredModel())
