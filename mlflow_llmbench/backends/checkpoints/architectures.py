"""Tell from a configuration whether a model generates text token by token, before anything of it is loaded.

transformers loads others too: a masked model as a decoder without its mask, an encoder-decoder without its encoder.
Which architectures it has, and for what, is read from the text of its tables, since importing them imports torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes that generate text."""

TASKS = {
    "ForMaskedLM": "fills in masked words",
    "ForPreTraining": "is a model for pre-training",
    "ForNextSentencePrediction": "compares sentences",
    "ForSequenceClassification": "classifies texts",
    "ForTokenClassification": "classifies words",
    "ForQuestionAnswering": "marks answers in a text",
    "ForMultipleChoice": "chooses between answers",
    "ForImageClassification": "classifies images",
    "ForCTC": "transcribes speech",
    "RewardModel": "rates texts",
}
"""End of a class's name → the model's task."""

GGUF_ENCODERS = ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert",
                 "eurobert", "t5encoder")  # fmt: skip
GGUF_ENCODER_DECODERS = ("t5",)
"""Values of `general.architecture` of GGUF files that llama.cpp runs, but that are no decoders."""

ENCODERS_BESIDE = frozenset({"bert-generation"})
"""Encoders that generate if they are made decoders, and that transformers does not list for masked words."""


def no_generator(config: Mapping[str, Any]) -> str | None:
    """Say why a model with this configuration does not generate text token by token; None if it does.

    A text, such as `its architecture BertForMaskedLM fills in masked words`. None also if that cannot be told.
    """
    kind = str(config.get("model_type") or "")
    name = next(iter(config.get("architectures") or ()), "") or ""
    known, is_decoder = _tables(), bool(config.get("is_decoder") or config.get("causal"))
    called = f"its architecture {name or kind}"
    causal = known.get("CAUSAL_LM", frozenset())
    two_parts = known.get("SEQ_TO_SEQ_CAUSAL_LM", frozenset())
    if config.get("is_encoder_decoder") or (kind in two_parts - causal and "text_config" not in config):
        return f"{called} is an encoder-decoder, whose encoder reads the prompt at once"
    if kind in two_parts & causal and not is_decoder and not name.endswith("ForCausalLM"):
        return f"{called} is an encoder-decoder, whose encoder reads the prompt at once"
    if not is_decoder:
        task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
        if task is not None:
            return f"{called} {task}"
        masked = known.get("MASKED_LM", frozenset()) | ENCODERS_BESIDE
        if kind in masked and (kind in causal or not name.endswith("ForCausalLM")):
            return f"{called} fills in masked words, and its is_decoder is not set"
    seen = causal | known.get("IMAGE_TEXT_TO_TEXT", frozenset())
    said = isinstance(config.get("auto_map"), Mapping) or name.endswith("ForCausalLM")
    if causal and kind not in seen and kind in known.get("ALL", frozenset()) and not said:
        return f"{called} is not among those that transformers generates text with"
    return None


def no_generator_in_gguf(architecture: str) -> str | None:
    """Say the same of a GGUF file, by its `general.architecture`."""
    if architecture in GGUF_ENCODER_DECODERS:
        return f"its architecture {architecture} is an encoder-decoder, whose encoder reads the prompt at once"
    return f"its architecture {architecture} encodes texts" if architecture in GGUF_ENCODERS else None


@functools.cache
def _text_of_plan(kind: str) -> bool | None:
    """Return True if transformers' configuration of a model type has a plan to shard it; None without such a type."""
    for folder in _folders():
        for file in sorted(Path(folder, "models").glob("*/configuration_*.py")):
            text = file.read_text(encoding="utf-8")
            if f'model_type = "{kind}"' not in text:
                continue
            for one in ast.parse(text).body:
                own = {
                    target.id: statement.value
                    for statement in (one.body if isinstance(one, ast.ClassDef) else ())
                    if isinstance(statement, ast.Assign | ast.AnnAssign)
                    for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
                    if isinstance(target, ast.Name)
                }
                named = own.get("model_type")
                if isinstance(named, ast.Constant) and named.value == kind:
                    plan = own.get("base_model_tp_plan")
                    return isinstance(plan, ast.Dict) and bool(plan.keys)
    return None


def has_tensor_plan(config: Mapping[str, Any]) -> bool | None:
    """Return True if transformers knows how to shard the layers of an architecture over devices; None if unknown."""
    kind = str(config.get("model_type") or "")
    return _text_of_plan(kind) if kind and "auto_map" not in config else None


def _folders() -> list[str]:
    """Return the folders of the installed transformers."""
    found = importlib.util.find_spec("transformers")
    return [] if found is None else [*(found.submodule_search_locations or ())]


@functools.cache
def _tables() -> Mapping[str, frozenset[str]]:
    """Return the model types of transformers' tables, by purpose, and all that it has; empty if they cannot be read."""
    tables: dict[str, frozenset[str]] = {}
    for folder in _folders():
        for file in ("modeling_auto.py", "auto_mappings.py", "configuration_auto.py"):
            path = Path(folder, "models", "auto", file)
            if path.is_file():
                for name, kinds in _literals(path.read_text(encoding="utf-8")).items():
                    tables[name] = tables.get(name, frozenset()) | kinds
    return tables


def _literals(text: str) -> dict[str, frozenset[str]]:
    """Return the keys of the literal tables in a module: `OrderedDict([(key, …), …])`, or a dict."""
    tables: dict[str, frozenset[str]] = {}
    for statement in ast.parse(text).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        name = re.fullmatch(r"(?:MODEL_FOR_(\w+)|CONFIG)_MAPPING_NAMES", getattr(target, "id", ""))
        value = getattr(statement, "value", None)
        if name is None or value is None:
            continue
        pairs = [pair.elts[0] for pair in ast.walk(value) if isinstance(pair, ast.Tuple) and len(pair.elts) == 2]
        pairs += [key for one in ast.walk(value) if isinstance(one, ast.Dict) for key in one.keys if key is not None]
        keys = frozenset(one.value for one in pairs if isinstance(one, ast.Constant) and isinstance(one.value, str))
        if keys:
            tables[name[1] or "ALL"] = keys
    return tables
