"""Read files that anybody may have written: JSON, JSON Lines, YAML and text, bounded in size and depth.

Only regular files are opened, so no read waits for a pipe or never ends. Every reader raises `Unreadable`, whose text
says what is wrong, such as `it is a pipe, not a file`; the caller adds the file's name and what to do.
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 200_000_000
"""Largest file that is read unless the caller says otherwise: texts, prompts, traces, results of other programs."""

MOST_RESULT_BYTES = 1 << 30
"""Largest record of ours with stamps, in bytes."""

MOST_YAML_BYTES = 300_000
"""Largest YAML file. PyYAML reads about 100 kB per second."""

MOST_DEPTH = 100
"""Deepest nesting of JSON and YAML. Files of the field have fewer than 20 levels."""

MOST_DIGITS = 300
"""Most digits of a whole number, so that each can become a float."""

MOST_CONTAINERS = 5_000_000
"""Most objects and arrays in a JSON text. Each takes about 70 bytes of memory and needs three in the file."""

MOST_NODES = 100_000
"""Most values in a YAML text, counting those that aliases repeat."""

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small text that Git leaves in place of a file kept by its Large File Storage."""

FROM_LFS = "it is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"

_KINDS = (
    (stat.S_ISDIR, "it is a folder"),
    (stat.S_ISFIFO, "it is a pipe, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
    (stat.S_ISCHR, "it is a device, not a file"),
    (stat.S_ISBLK, "it is a device, not a file"),
)
_WIDE = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
_STEPS = bytes({0x5B: 2, 0x7B: 2, 0x5D: 0, 0x7D: 0}.get(byte, 1) for byte in range(256))  # brackets: one up, one down
_DIGITS = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Unreadable(ValueError):
    """A file or text cannot be read. The message says why, in words that fit after the file's name and a colon.

    `advises`: it also says what to do.
    """

    advises = False


class Advised(Unreadable):
    """A file cannot be read, and the message says what to do."""

    advises = True


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading bytes. Raises Unreadable for anything else, without waiting for it."""
    try:
        _require_regular(os.stat(path).st_mode)  # before it is opened: that alone acts on some devices
        # A pipe that takes the file's place now is not waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            _require_regular(os.fstat(descriptor).st_mode)
        except Unreadable:
            os.close(descriptor)
            raise
        return os.fdopen(descriptor, "rb")
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from None
    except Unreadable:
        raise
    except ValueError as error:  # a NUL in the name
        raise Unreadable(str(error)) from None


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Unreadable(next((told for is_kind, told in _KINDS if is_kind(mode)), "it is not a file"))


def read_bytes(path: str | os.PathLike[str], most: int = MOST_BYTES, text: bool = True) -> bytes:
    """Return the content of a file. Raises Unreadable, with `text` for a file that begins with binary data too."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise Unreadable(f"it has {size:,} bytes, and at most {most:,} are read")
            head = file.read(4096)
            if head.startswith(LFS_POINTER):
                raise Advised(FROM_LFS)
            if text and b"\0" in head and not head.startswith(tuple(mark for mark, _ in _WIDE)):
                raise Unreadable("it is no text: it holds zero bytes")
            return head + file.read(max(0, size - len(head)))
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from None
    except MemoryError:
        raise Unreadable("there is not enough memory to read it") from None


def decode(content: bytes) -> str:
    """Return the text of UTF-8, or of UTF-16 or UTF-32 with a byte order mark. Raises Unreadable."""
    wide = next((encoding for mark, encoding in _WIDE if content.startswith(mark)), None)
    try:
        return content.decode(wide or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"it is not {wide or 'UTF-8'}: byte {error.start + 1} cannot be decoded") from None
    except MemoryError:
        raise Unreadable("there is not enough memory to read it") from None


def read_facts(path: str | os.PathLike[str]) -> dict[str, str | int | float]:
    """Return the facts in a JSON file beside a model: its texts and numbers. Raises Unreadable, naming the file."""
    try:
        data = read_own_json(path)
        if not isinstance(data, dict):
            raise Unreadable("it is not a JSON object")
    except Unreadable as error:
        raise Unreadable(f"The record {path} cannot be read: {error}. Delete it.") from None
    return {name: value for name, value in data.items() if isinstance(value, str | int | float)}


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    r"""Return a text file's content with `\n` at the end of lines. Raises Unreadable."""
    return decode(read_bytes(path, most)).replace("\r\n", "\n").replace("\r", "\n")


def read_json(
    path: str | os.PathLike[str], most: int = MOST_BYTES, surrogates: bool = False, unique: bool = False
) -> Any:
    """Return the value in a JSON file. Raises Unreadable. See `parse_json`."""
    return parse_json(read_bytes(path, most), surrogates, unique)


def read_own_json(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file of ours. File names that are not UTF-8 are in it as lone surrogates.

    Raises Unreadable.
    """
    return read_json(path, MOST_RESULT_BYTES, surrogates=True)


def parse_json(content: str | bytes, surrogates: bool = False, unique: bool = False) -> Any:
    r"""Return the value of a JSON text of at most `MOST_DEPTH` levels.

    `surrogates` accepts halves of surrogate pairs (`"\ud800"`), which no encoding can write; `unique` refuses an object
    in which a name stands twice. Raises Unreadable.
    """
    text = decode(content) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        hooks: dict[str, Any] = {"object_pairs_hook": _unique} if unique else {}
        if len(text) > MOST_DEPTH:  # else nothing in it can be too long or too deep
            plain = isinstance(content, bytes) and not content.startswith(tuple(mark for mark, _ in _WIDE))
            raw: bytes = content if plain else text.encode("utf-8", "surrogatepass")  # type: ignore[assignment]
            if b"0" * MOST_DIGITS in raw.translate(_DIGITS):
                hooks["parse_int"] = _bounded_int  # a text may have as many digits
            if raw.count(b"[") + raw.count(b"{") > MOST_DEPTH:
                _require_bounded(raw)
            del raw
        data = json.loads(text, **hooks)
        if not surrogates and _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except Unreadable:
        raise
    except UnicodeEncodeError:
        raise Unreadable("a text in it has half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise Unreadable("it is nested too deep") from None
    except MemoryError:
        raise Unreadable("there is not enough memory to read it") from None
    except ValueError as error:
        raise Unreadable(f"it is not JSON: {error}") from None
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise Unreadable(f"{next(name for name in names if names.count(name) > 1)[:60]!r} stands in it twice")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Unreadable(f"a number in it has {len(digits):,} digits")
    return int(digits)


def _require_bounded(text: bytes) -> None:
    """Raise Unreadable if JSON is too deep, or has too many objects, before it is parsed; about 3 ns a byte."""
    parts = text.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE).split(b'"')
    structure = b"".join(parts[::2])  # what is outside of strings
    count = structure.count(b"[") + structure.count(b"{")
    if count > MOST_CONTAINERS:
        raise Unreadable(f"it has {count:,} objects and lists, and at most {MOST_CONTAINERS:,} are read")
    depth = max(itertools.accumulate(step - 1 for step in structure.translate(_STEPS)), default=0)
    if depth > MOST_DEPTH:
        raise Unreadable(f"it is nested {depth:,} levels deep, and at most {MOST_DEPTH} are read")


def json_lines(text: str) -> Iterator[tuple[int, str, Any]]:
    """Yield number, text and value of each line that is not empty; the value is None for a line that cannot be read.

    A line ends at a line feed only: JSON may hold other line separators, such as U+2028.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, line, parse_json(line)
            except Unreadable:
                yield number, line, None


def read_json_lines(path: str | os.PathLike[str], most: int = MOST_BYTES) -> Iterator[tuple[int, str, Any]]:
    """Yield number, text and value of each line of a JSON Lines file; see `json_lines`. Raises Unreadable."""
    return json_lines(decode(read_bytes(path, most)))


def read_yaml(path: str | os.PathLike[str], most: int = MOST_YAML_BYTES) -> Any:
    """Return the value in a YAML file of plain values. Raises Unreadable."""
    return parse_yaml(decode(read_bytes(path, most)))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text of plain values, at most `MOST_NODES` of them.

    A value that aliases repeat counts each time, so that a small text cannot become a large one. Raises Unreadable.
    """
    import yaml

    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        waiting = [(node, 1)] if node is not None else []
        seen = 0
        while waiting:
            one, depth = waiting.pop()
            seen += 1
            if depth > MOST_DEPTH:
                raise Unreadable(f"it is nested more than {MOST_DEPTH} levels deep")
            if seen > MOST_NODES:
                raise Unreadable(f"it has more than {MOST_NODES:,} values, with those that aliases repeat")
            if isinstance(one, yaml.MappingNode):
                waiting += [(part, depth + 1) for pair in one.value for part in pair]
            elif isinstance(one, yaml.SequenceNode):
                waiting += [(part, depth + 1) for part in one.value]
        return None if node is None else loader.construct_document(node)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(f"it is nested more than {MOST_DEPTH} levels deep") from None
    except MemoryError:
        raise Unreadable("there is not enough memory to read it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" in line {mark.line + 1}" if mark else ""
        raise Unreadable(f"it is not YAML: {error.problem or error.context}{line}") from None
    except Exception as error:  # PyYAML raises many kinds for values that look like dates or numbers and are none
        raise Unreadable(f"it is not YAML: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def require_file(path: Path, most: int = MOST_BYTES) -> None:
    """Raise Unreadable unless another library can read a file without waiting or running out of memory."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise Unreadable(f"it has {size:,} bytes, and at most {most:,} are read")
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise Advised(FROM_LFS)
