"""Resolve models of the Hugging Face Hub, or of its local cache if the Hub does not answer, and download one commit."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ...records.cell import Cell
from ...records.errors import ModelError, UsageError, first_line
from ...records.invocation import parameter_text
from ...records.results import ModelFacts
from . import gguf_file
from .files import is_complete, read_facts, refuse_pickle, refuse_requantization, weight_names

HUB_TIMEOUT_S = 12.0
"""Longest wait for the Hub before a run, in seconds. An unreachable Hub must be reported within 15 s."""

T = TypeVar("T")


def is_hub_id(name: str) -> bool:
    """Return True if a name is a valid Hub id, owner/name.

    The rules are those of `huggingface_hub.utils.validate_repo_id`.
    """
    return (
        len(name) <= 96
        and re.fullmatch(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?", name, re.ASCII) is not None
    )


def gguf_name(name: str) -> tuple[str, str] | None:
    """Split `owner/name:file.gguf` into repository and file; None if the name has another form."""
    repository, colon, file = name.partition(":")
    if not colon or not is_hub_id(repository) or file.startswith("/") or ".." in file.split("/"):
        return None
    return repository, file


def find_checkpoint(cell: Cell, repository: str, source: str) -> ModelFacts:
    """Return commit and configuration of a Hub model, from the local cache if the Hub does not answer.

    Raises ModelError or UsageError.
    """
    from huggingface_hub import constants, errors

    _check_revision(cell)
    without = f"or measure speed and memory without the weights: {parameter_text('weights', 'random')}"
    hint = f"Check the network, give a local folder, {without}"
    hint += "." if source == "preset" else " (presets only)."
    cached = _cached(repository, cell.revision)
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        commit, config_file, sizes = _with_timeout(HUB_TIMEOUT_S, lambda: _ask_hub(repository, cell.revision))
    except errors.RevisionNotFoundError:
        raise _no_revision(cell, repository) from None
    except Exception as error:  # connection errors come in many classes, from httpx and from the system
        if cached is not None:
            refuse_pickle(cell, source, weight_names(file.name for file in cached.iterdir()))
            return read_facts(cell, source, repository, cached.name, cached / "config.json", None)
        if isinstance(error, errors.EntryNotFoundError):
            message = (
                f"The repository {repository} has no config.json, so it is not a transformers model. For a GGUF "
                "repository download the .gguf file and give its path."
            )
            raise ModelError(message) from None
        raise _hub_error(error, repository, repository, hint, f"; {without}") from None
    refuse_pickle(cell, source, sizes)
    return read_facts(cell, source, repository, commit, Path(config_file), sum(sizes.values()) or None)


@functools.cache
def _ask_hub(repository: str, revision: str) -> tuple[str, str, Mapping[str, int]]:
    """Return the commit, the path of config.json, and the weight files with their bytes.

    Cached, so that all cells of a sweep use one commit.
    """
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S / 2, files_metadata=True)
    # Ask by the revision's name, so that the cache records its commit. The folder is named by the commit.
    config = hf_hub_download(repository, "config.json", revision=revision, etag_timeout=HUB_TIMEOUT_S / 2)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
    return Path(config).parent.name, config, {name: sizes[name] for name in weight_names(sizes)}


def find_gguf(cell: Cell, repository: str, file: str) -> ModelFacts:
    """Return the facts of a GGUF file on the Hub, from the local cache if the Hub does not answer.

    Raises ModelError or UsageError.
    """
    from huggingface_hub import constants, errors, try_to_load_from_cache

    _check_revision(cell)
    refuse_requantization(cell, file)
    location = f"{repository}:{file}"
    try:
        if constants.is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        commit, sizes = _with_timeout(HUB_TIMEOUT_S, lambda: _ask_hub_files(repository, cell.revision))
    except errors.RevisionNotFoundError:
        raise _no_revision(cell, repository) from None
    except Exception as error:
        cached = try_to_load_from_cache(repository, file, revision=cell.revision)
        if isinstance(cached, str):
            folder = next(parent for parent in Path(cached).parents if parent.parent.name == "snapshots")
            return ModelFacts(cell.model, "hub_gguf", location, folder.name, files_bytes=os.path.getsize(cached))
        raise _hub_error(error, repository, location, "Check the network, or give a local file.") from None
    parts = [(Path(file).parent / part.name).as_posix() for part in gguf_file.parts_of(Path(file))]
    absent = [part for part in parts if part not in sizes]
    if absent:
        files = ", ".join(sorted(name for name in sizes if name.endswith(".gguf"))[:8]) or "none"
        raise ModelError(f"The repository {repository} has no file {absent[0]}. Its GGUF files: {files}.")
    return ModelFacts(cell.model, "hub_gguf", location, commit, files_bytes=sum(sizes[part] for part in parts) or None)


@functools.cache
def _ask_hub_files(repository: str, revision: str) -> tuple[str, Mapping[str, int]]:
    """Return a repository's commit, and its files with their bytes.

    Cached, so that all cells of a sweep use one commit.
    """
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, timeout=HUB_TIMEOUT_S / 2, files_metadata=True)
    return str(info.sha), {s.rfilename: s.size or 0 for s in info.siblings or []}


def _cached(repository: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return folder if is_complete(folder) else None


def snapshot(model: ModelFacts) -> Path:
    """Return the cache's folder of exactly this commit. It has at least a configuration, since the model was found."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.location, revision=model.revision, local_files_only=True))


def download(model: ModelFacts) -> None:
    """Download weights, configuration and tokenizer of exactly the resolved commit. Raises ModelError if that fails."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(model.location, revision=model.revision)
        other = [
            n for n in names if "/" not in n and n.endswith((".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"))
        ]
        snapshot_download(model.location, revision=model.revision, allow_patterns=[*weight_names(names), *other])
    except Exception as error:
        raise ModelError(
            f"The download of {model.location} failed: {first_line(error)}. Run the same command again: complete files "
            "are kept."
        ) from None


def cached_gguf(model: ModelFacts) -> Path | None:
    """Return the first file of a GGUF model in the local cache; None if a part is missing."""
    from huggingface_hub import try_to_load_from_cache

    repository, names = _gguf_names(model)
    found = [try_to_load_from_cache(repository, name, revision=model.revision) for name in names]
    return Path(str(found[0])) if all(isinstance(path, str) for path in found) else None


def download_gguf(cell: Cell, model: ModelFacts) -> None:
    """Download all parts at exactly the resolved commit. Raises ModelError.

    The commit of the revision is recorded in the cache, as a download by the revision's name would do.
    """
    from huggingface_hub import hf_hub_download

    repository, names = _gguf_names(model)
    try:
        first, *_ = (Path(hf_hub_download(repository, name, revision=model.revision)) for name in names)
    except Exception as error:
        raise ModelError(
            f"The download of {model.location} failed: {first_line(error)}. Run the same command again: complete files "
            "are kept."
        ) from None
    root = next(parent.parent for parent in first.parents if parent.name == "snapshots")
    if cell.revision != model.revision:
        note = root / "refs" / cell.revision
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(model.revision, encoding="utf-8")


def _gguf_names(model: ModelFacts) -> tuple[str, list[str]]:
    """Return the repository of a GGUF model and the names of all its parts."""
    repository, _, file = model.location.partition(":")
    return repository, [part.as_posix() for part in gguf_file.parts_of(Path(file))]


def _check_revision(cell: Cell) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", cell.revision, re.ASCII) or ".." in cell.revision:
        raise UsageError(
            f"revision is not the name of a branch, tag or commit: {cell.revision}. Use revision=main, or one of that "
            "repository."
        )


def _no_revision(cell: Cell, repository: str) -> ModelError:
    return ModelError(
        f"The model {repository} has no revision {cell.revision}. Use revision=main, or a commit or tag of that "
        "repository."
    )


def _hub_error(error: Exception, repository: str, location: str, hint: str, without: str = "") -> ModelError:
    """Return the error for a failed request for `location`.

    `hint` is the advice if the Hub does not answer, `without` the advice if the terms of the model are not accepted.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"The model {repository} is gated. Accept its terms at https://huggingface.co/{repository}, then run "
            f"`hf auth login`{without}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"There is no model {repository} on the Hub, or it is private. Check the name, or run `hf auth login`."
        )
    return ModelError(
        f"The Hub cannot be reached for {location}, and it is not in the local cache: {first_line(error)}. {hint}"
    )


def _with_timeout(seconds: float, ask: Callable[[], T]) -> T:
    """Return the result of `ask`, or raise TimeoutError after `seconds`. A name lookup has no time limit of its own."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(ask())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]
