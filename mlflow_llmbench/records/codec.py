"""Records to plain JSON data and back: `to_json` and `from_json`."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Builder = Callable[[Any, str], Any]
"""Builds the value of a field from JSON data; the text is the field's name, for messages."""

_PLAIN = frozenset({int, float, str, bool, type(None)})
_JSON_OF: Mapping[Any, frozenset[type]] = {
    int: frozenset({int}),
    float: frozenset({int, float}),
    str: frozenset({str}),
    bool: frozenset({bool}),
}


def to_json(record: object) -> Any:
    """Convert a record to plain JSON data: dataclasses and mappings become objects, tuples and lists arrays."""
    if type(record) in _PLAIN:  # most of a result are stamps
        return record
    if isinstance(record, list | tuple):
        return [value if type(value) in _PLAIN else to_json(value) for value in record]
    if isinstance(record, Mapping):
        return {str(key): to_json(value) for key, value in record.items()}
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {f: getattr(record, f.name) for f in dataclasses.fields(record)}
        return {f.name: to_json(one) for f, one in values.items() if one is not None or not f.metadata.get("omitted")}
    return record


def from_json(kind: type[T], data: Any) -> T:
    """Build the record of class `kind` from data of `to_json`. Unknown fields of later versions are ignored.

    Raises TypeError, which names the field, if a value has another type than the record.
    """
    return typing.cast(T, _builder(typing.cast(Any, kind))(data, kind.__name__))


@functools.cache
def _builder(kind: Any) -> Builder:
    """Return the function that builds values of a type. Made once per type: a result has ten thousands of values."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _JSON_OF:
        return _plain_builder(_JSON_OF[kind])
    if origin in (typing.Union, types.UnionType):
        return _union_builder([a for a in arguments if a is not type(None)])
    if origin is list or (origin is tuple and arguments[-1:] == (...,)):
        return _sequence_builder(origin, arguments[0])
    if origin is tuple:
        return _fixed_builder([_builder(argument) for argument in arguments])
    if origin in (dict, Mapping):
        return _mapping_builder(_builder(arguments[1]))
    if dataclasses.is_dataclass(kind):
        return _record_builder(kind)
    return lambda data, name: data


def _plain_builder(fitting: frozenset[type]) -> Builder:
    return lambda data, name: data if data is None or type(data) in fitting else _refuse(name, data)


def _union_builder(kinds: list[Any]) -> Builder:
    if len(kinds) == 1:
        build = _builder(kinds[0])
        return lambda data, name: None if data is None else build(data, name)
    fitting = tuple(typing.get_origin(one) or one for one in kinds)
    return lambda data, name: data if data is None or isinstance(data, fitting) else _refuse(name, data)


def _sequence_builder(make: Callable[[Any], Any], item: Any) -> Builder:
    build, fitting = _builder(item), _JSON_OF.get(item, frozenset())

    def sequence(data: Any, name: str) -> Any:
        if data is None:
            return None
        if not isinstance(data, list | tuple):
            _refuse(name, data)
        if fitting and fitting >= set(map(type, data)):
            return make(data)
        return make([build(value, name) for value in data])

    return sequence


def _fixed_builder(builders: list[Builder]) -> Builder:
    def row(data: Any, name: str) -> Any:
        if data is None:
            return None
        if not isinstance(data, list | tuple) or len(data) != len(builders):
            _refuse(name, data)
        return tuple([build(value, name) for build, value in zip(builders, data, strict=True)])

    return row


def _mapping_builder(build: Builder) -> Builder:
    def mapping(data: Any, name: str) -> Any:
        if data is None:
            return None
        if not isinstance(data, Mapping):
            _refuse(name, data)
        return {key: build(value, name) for key, value in data.items()}

    return mapping


def _record_builder(kind: Any) -> Builder:
    absent = {f.name: f.metadata["absent"] for f in dataclasses.fields(kind) if "absent" in f.metadata}

    @functools.cache
    def builders() -> Mapping[str, Builder]:  # when the first one is built, since a record may hold one of its kind
        types_of = typing.get_type_hints(kind)
        return {f.name: _builder(types_of[f.name]) for f in dataclasses.fields(kind)}

    def record(data: Any, name: str) -> Any:
        if not isinstance(data, Mapping):
            _refuse(name, data)
        own = builders()
        return kind(**{**absent, **{key: own[key](value, key) for key, value in data.items() if key in own}})

    return record


def _refuse(name: str, data: object) -> typing.NoReturn:
    raise TypeError(f"{name} cannot be {str(data)[:40]!r}")
