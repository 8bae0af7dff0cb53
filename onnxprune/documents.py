"""Text files that people keep: written whole or not at all, read with a word for everything that can be wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from onnxprune import files
from onnxprune.errors import UsageError


def write(path: Path, text: str, what: str = "") -> None:
    """Write a text file whole or not at all; ``what`` names it in the error, such as "the plan".

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        files.write(path, encoded(text))
    except OSError as error:
        named = f"{what} to {str(path)!r}" if what else repr(str(path))
        raise UsageError(f"Cannot write {named}: {error.strerror}.") from None


def encoded(text: str) -> bytes:
    """UTF-8; parts of file names that are not UTF-8 are written as their escapes."""
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path, what: str, kind: str, *, missing: str = "", hint: str = "") -> Any:
    """The data of a JSON file.

    Args:
        what, kind: it and what it is, such as "the plan" and "plan file". missing, hint: the next step where there is
            no such file, and where it is not JSON.

    Raises:
        UsageError: missing, unreadable, or not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"No such {kind}: {str(path)!r}.", hint=missing) from None
    except OSError as error:
        raise UsageError(f"Cannot read {what} {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}.", hint=hint) from None
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
        if _depth(data) > _DEEPEST:
            raise RecursionError
        return data
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}.", hint=hint) from None
    except RecursionError:
        raise UsageError(f"{str(path)!r} is no {kind}: its lists are nested too deeply.", hint=hint) from None


_DEEPEST = 32
_T = TypeVar("_T")
_WORDS: dict[type, str] = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {_shown(next(n for n in data if names.count(n) > 1))} is there twice")
    return data


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number that JSON has")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _depth(data: Any) -> int:
    """How deeply lists and objects are nested."""
    depth, level = 0, [data]
    while level:
        depth += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (list, dict)):
                inner.extend(item.values() if isinstance(item, dict) else item)
        level = inner
    return depth


def parse(kind: type[_T], data: Any, where: str, hint: str = "") -> _T:
    """Plain data as an object of the type that it is declared to be.

    Args:
        kind: a dataclass, whose fields may be missing where they have a default, ``int`` (of 64 bits), ``float``
            (finite), ``str``, ``bool``, ``list[...]``, ``dict[..., ...]``, ``tuple[...]``, ``... | None`` or ``Any``.
        data: what JSON gives. where: what it is of, such as "the plan". hint: the next step where it has another form.

    Raises:
        UsageError: something is missing or has another type; says where it stands.
    """
    try:
        result: _T = _parse(kind, data, "")
    except _Misfit as misfit:
        place = f"{misfit.place} of {where}" if misfit.place else where
        raise UsageError(f"{place} {misfit.problem}.", hint=hint) from None
    return result


class _Misfit(Exception):
    """Data that do not have their declared form: where, and what is wrong."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(place, problem)
        self.place, self.problem = place.lstrip("."), problem


def _parse(kind: Any, data: Any, place: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, UnionType):
        other = next(k for k in inner if k is not type(None))
        return None if data is None else _parse(other, data, place)
    if is_dataclass(kind):
        return _parse_fields(kind, data, place)
    if origin in (list, tuple):
        if not isinstance(data, (list, tuple)):
            raise _Misfit(place, f"is {_shown(data)}, a list was expected")
        if origin is list:
            return [_parse(inner[0], item, f"{place}[{i}]") for i, item in enumerate(data)]
        if len(data) != len(inner):
            raise _Misfit(place, f"has {len(data)} entries, {len(inner)} were expected")
        return tuple(_parse(k, item, f"{place}[{i}]") for i, (k, item) in enumerate(zip(inner, data, strict=True)))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise _Misfit(place, f"is {_shown(data)}, an object was expected")
        key = inner[0]
        return {_key(key, name, place): _parse(inner[1], item, f"{place}.{name}"[:80]) for name, item in data.items()}
    return _parse_plain(kind, data, place)


def _parse_fields(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, Mapping):
        raise _Misfit(place, f"is {_shown(data)}, an object was expected")
    types, given = get_type_hints(kind), {}
    for entry in fields(kind):
        if entry.name in data:
            given[entry.name] = _parse(types[entry.name], data[entry.name], f"{place}.{entry.name}")
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise _Misfit(place, f"has no {entry.name!r}")
    return kind(**given)


def _key(kind: type, name: Any, place: str) -> Any:
    """A key of an object; JSON makes texts of numbers."""
    if kind is int and isinstance(name, str) and len(name) < 19 and name.removeprefix("-").isdecimal():
        return int(name)
    return _parse_plain(kind, name, f"a key of {place.lstrip('.')}")


def _parse_plain(kind: type, data: Any, place: str) -> Any:
    fits = isinstance(data, bool) == (kind is bool) and isinstance(data, (int, float) if kind is float else kind)
    if fits and kind is int:
        fits = -(1 << 63) <= data < 1 << 63
    if fits and kind is float:
        try:
            data = float(data)
        except OverflowError:
            fits = False
        else:
            fits = math.isfinite(data)
    if not fits:
        raise _Misfit(place, f"is {_shown(data)}, {_WORDS[kind]} was expected")
    return data


def _shown(value: Any) -> str:
    """A value in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or more levels, than Python writes
        return f"too large {'a number' if isinstance(value, int) else 'to show'}"
    return text if len(text) <= 60 else f"{text[:57]}..."
