"""Write files whole or not at all, and read them with a message for every fault.

Locks show which runs are active: a file or folder whose lock is free belongs to a run that has ended. Where a file
system has no locks, files of other runs are never removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, TypeVar, Union, get_args, get_origin, get_type_hints

import platformdirs

from onnxprune.errors import UsageError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_NAME = 255
"""Bytes that a file system allows for one name."""

_PREFIX, _LOCK = "onnxprune-", ".onnxprune-lock"
_DIGEST = 8
_ANNOUNCED = b"onnxprune is about to write or remove"
_FICLONE = 0x40049409  # of Linux: one file shares the blocks of another until either is changed
_SECONDS = 60  # marks a folder in which a run has locked a file of its own


def user_cache() -> Path:
    """Return the folder for measurements kept between runs: ``onnxprune`` in the system's cache folder of the user."""
    # XDG_CACHE_HOME is read on every system: whoever sets it means it.
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "onnxprune" if home else Path(platformdirs.user_cache_dir("onnxprune", appauthor=False))


def is_text(name: str) -> bool:
    """Return whether a file's name is UTF-8."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)


def shorten(name: str, limit: int) -> str:
    """Return the beginning of a name, at most ``limit`` bytes in the file system's encoding."""
    while len(os.fsencode(name)) > limit:
        name = name[:-1]
    return name


def append_suffix(target: Path, suffix: str) -> Path:
    """Return the path with ``suffix`` appended; a name that is not UTF-8 or too long is partly replaced by a digest."""
    name = "".join("_" if "\ud800" <= sign <= "\udfff" else sign for sign in target.name)
    if name != target.name or len(os.fsencode(name + suffix)) > LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:_DIGEST]
        name = f"{shorten(name, LONGEST_NAME - len(suffix) - _DIGEST - 1)}-{digest}"
    return target.with_name(name + suffix)


def may_be_data_of(target: Path, name: str) -> bool:
    """Return whether a name is one of those given to data of ``target``."""
    start, end = append_suffix(target, f".{'0' * _DIGEST}.data").name.rsplit("0" * _DIGEST, 1)
    digest = rf"{re.escape(start)}[0-9a-f]{{{_DIGEST}}}{re.escape(end)}"
    return name == append_suffix(target, ".data").name or bool(re.fullmatch(digest, name))


def write(target: Path, data: bytes) -> None:
    """Write a file whole or not at all; a link is followed. Raises OSError."""
    with replacing(target) as files, files.open() as file:
        file.write(data)


def clone(source: Path, target: Path) -> None:
    """Copy a file, without a second copy on the disk where the file system can share it. Raises OSError."""
    if fcntl is not None:
        with suppress(OSError), source.open("rb") as reader, target.open("wb") as writer:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
            return
    shutil.copyfile(source, target)


class Replacement:
    """A file written under a temporary name that takes the place of ``target`` with its companions.

    Whenever a run is killed, ``target`` is the old file or the new one, and the data that it refers to exist: new data
    never take the name of existing data. Their name is ``target`` with ``.data`` appended where that is free, else with
    a digest of the data as well; data that only the old file referred to are removed afterwards.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        self._main: Path | None = None
        self._data: Path | None = None
        self._write: Callable[[BinaryIO, str], None] | None = None
        self._companions: dict[Path, Path] = {}  # target -> temporary
        self._set_aside: dict[Path, Path] = {}  # companion -> backup of its former file
        self._temporaries: list[Path] = []
        self._locks = ExitStack()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file that becomes ``target``. Raises OSError."""
        with self._open(self.target) as (path, file):
            yield file
            self._main = path

    @contextmanager
    def open_data(self, write: Callable[[BinaryIO, str], None]) -> Iterator[BinaryIO]:
        """Open a file of data that the main one refers to by its name. Raises OSError.

        Args:
            write: writes the main file, given the name of its data.
        """
        with self._open(self.target) as (path, file):
            yield file
            self._data, self._write = path, write

    @contextmanager
    def open_companion(self, target: Path) -> Iterator[BinaryIO]:
        """Open a file that describes the main one: a new main file never stays beside an old one. Raises OSError."""
        target = Path(os.path.realpath(target))
        with self._open(target) as (path, file):
            yield file
            self._companions[target] = path

    @contextmanager
    def _open(self, target: Path) -> Iterator[tuple[Path, BinaryIO]]:
        """Open a temporary file and yield it with its path; on exit, its bytes are on the disk."""
        # tempfile makes files that only their owner can read; these need the usual permissions.
        path = _beside(target, "tmp")
        unlocked_path = path.with_suffix(".new")  # a run that cleans up must not take it for a leftover
        with unlocked_path.open("xb") as file:
            self._temporaries += [unlocked_path, path]
            if _lock(file.fileno()):
                self._locks.callback(os.close, os.dup(file.fileno()))
            unlocked_path.rename(path)
            yield path, file
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Move every file to its target's place. Raises OSError, with every target restored."""
        with _folder_lock(self.target.parent) as exclusive:
            data = self._data_target()
            is_new = data is not None and not data.exists()
            try:
                if data is not None and self._write is not None and self._data is not None:
                    with self.open() as file:
                        self._write(file, data.name)
                referenced_files = [
                    path for path in self._candidates() if path != data and _mentions(self.target, path.name)
                ]
                self._announce([*([data] if is_new and data is not None else []), *referenced_files])
                if is_new and data is not None and self._data is not None:
                    self._data.rename(data)
                self._set_companions_aside()
                assert self._main is not None
                self._main.replace(self.target)
            except BaseException:
                if self._main is None or self._main.exists():
                    if is_new and data is not None:
                        data.unlink(missing_ok=True)
                    for target, aside in self._set_aside.items():
                        aside.replace(target)
                    self._set_aside.clear()
                else:  # an interrupt came too late
                    self._place_companions()
                raise
            self._place_companions()
            if exclusive:
                self._remove_leftovers(data, referenced_files)

    def _data_target(self) -> Path | None:
        """Return the path of the data: a free name, or one whose file has the same content."""
        if self._data is None:
            return None
        plain = append_suffix(self.target, ".data")
        if not plain.exists() or _same(plain, self._data):
            return plain
        return append_suffix(self.target, f".{_digest(self._data)}.data")

    def _candidates(self) -> list[Path]:
        """Return files with names that data of ``target`` may have."""
        names = [entry.name for entry in os.scandir(self.target.parent) if entry.name.endswith(".data")]
        return [self.target.with_name(name) for name in names if may_be_data_of(self.target, name)]

    def _announce(self, data: Sequence[Path]) -> None:
        """Record on the disk which data are to be added or removed, so that a later run can finish the work."""
        if data:
            with self._open(self.target) as (_, file):
                file.write(b"\0".join([_ANNOUNCED, *(os.fsencode(path.name) for path in data)]))

    def _set_companions_aside(self) -> None:
        for target in self._companions:
            if target.is_file():
                aside = _beside(target, "tmp")
                target.rename(aside)
                self._set_aside[target] = aside

    def _place_companions(self) -> None:
        for target, temporary in self._companions.items():
            temporary.replace(target)

    def _remove_leftovers(self, data: Path | None, referenced_files: Iterable[Path]) -> None:
        """Remove data that only the old file referred to, and files that killed runs left for these targets."""
        unused_files = set(referenced_files)
        for target in (self.target, *self._companions):
            pattern = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{{_DIGEST}}}\.(?:tmp|new)")
            for entry in os.scandir(target.parent):
                path = target.with_name(entry.name)
                if pattern.fullmatch(entry.name) and path not in self._temporaries:
                    with suppress(OSError):
                        unused_files |= _remove_if_free(path)
        for path in unused_files - {data}:
            with suppress(OSError):
                path.unlink()

    def clean(self) -> None:
        """Remove all remaining temporary files."""
        with self._locks:
            for leftover in (*self._temporaries, *self._set_aside.values()):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Replacement]:
    """Yield a replacement: files take their targets' places when the block succeeds, and are removed when it fails."""
    files = Replacement(target)
    try:
        yield files
        files.commit()
    finally:
        files.clean()


def _stem(target: Path) -> str:
    return shorten(target.name, LONGEST_NAME - _DIGEST - len("...tmp"))


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{_stem(target)}.{secrets.token_hex(_DIGEST // 2)}.{kind}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]


def _same(first: Path, second: Path) -> bool:
    """Return whether two files have the same content."""
    return first.stat().st_size == second.stat().st_size and _digest(first) == _digest(second)


def _mentions(path: Path, name: str) -> bool:
    """Return whether a file contains a name."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(os.fsencode(name)) >= 0
    except (OSError, ValueError):  # no such file, or an empty one
        return False


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take the lock of an open file; return False where another run has it, or where there are no locks."""
    if fcntl is None:  # pragma: no cover - Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def _folder_lock(folder: Path) -> Iterator[bool]:
    """Lock a folder against other runs that replace its files; return whether that is possible."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # no folder can be opened on Windows
        yield False
        return
    try:
        yield _lock(descriptor, wait=True)
    finally:
        os.close(descriptor)


def _remove_if_free(path: Path) -> set[Path]:
    """Remove a file that no run has locked or is about to lock, and the files of data that it recorded."""
    with path.open("rb") as file:
        fresh = path.suffix == ".new" and time.time() - os.fstat(file.fileno()).st_mtime < _SECONDS
        if fresh or not _lock(file.fileno()):
            return set()
        announced = file.read().split(b"\0")[1:] if file.read(len(_ANNOUNCED)) == _ANNOUNCED else []
        path.unlink(missing_ok=True)
    names = map(os.fsdecode, announced)
    return {path.with_name(name) for name in names if name.endswith(".data") and os.sep not in name}


@contextmanager
def workspace() -> Iterator[Path]:
    """Yield a working folder of the run. The end of the block removes it, or the next run if this one is killed."""
    _remove_stale_once()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        unlocked_path = folder / "lock"
        with unlocked_path.open("xb") as file:
            _lock(file.fileno())
            unlocked_path.rename(folder / _LOCK)  # from now on a run that cleans up may examine it
            yield folder


def is_working_file(path: Path) -> bool:
    """Return whether a file lies in a working folder, so that its name means nothing to users."""
    return any(part.startswith(_PREFIX) for part in path.parent.parts) and path.is_relative_to(tempfile.gettempdir())


@cache
def _remove_stale_once() -> None:
    remove_stale()


def remove_stale() -> None:
    """Remove working folders of runs that were killed."""
    with suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_stale(Path(entry.path))


def _remove_if_stale(folder: Path) -> None:
    """Remove a working folder of this user whose run has ended; raises OSError where it is none."""
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        return
    with (folder / _LOCK).open("rb") as file:
        # An empty folder is being created.
        if _lock(file.fileno()):
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str, what: str = "") -> None:
    """Write a text file whole or not at all; ``what`` names it in the error, such as "the plan".

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        write(path, encode_text(text))
    except OSError as error:
        named = f"{what} to {str(path)!r}" if what else repr(str(path))
        raise UsageError(f"Cannot write {named}: {error.strerror}.") from None


def encode_text(text: str) -> bytes:
    """Encode text as UTF-8; parts of file names that are not UTF-8 are written as their escapes."""
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path, what: str, kind: str, *, missing: str = "", hint: str = "") -> Any:
    """Read the data of a JSON file.

    Args:
        path: the file.
        what: content of the file, such as "the plan".
        kind: kind of file, such as "plan file".
        missing: the next step where the file does not exist.
        hint: the next step where the file is not JSON.

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
        raise ValueError(f"the key {_shorten_value(next(n for n in data if names.count(n) > 1))} occurs twice")
    return data


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _depth(data: Any) -> int:
    """Return the depth to which lists and objects are nested."""
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
    """Convert plain data to an object of a declared type.

    Args:
        kind: a dataclass, whose fields may be missing where they have a default, ``int`` (of 64 bits), ``float``
            (finite), ``str``, ``bool``, ``list[...]``, ``dict[..., ...]``, ``tuple[...]``, ``... | None`` or ``Any``.
        data: decoded JSON.
        where: owner of the data, such as "the plan".
        hint: the next step where they have another form.

    Raises:
        UsageError: a value is missing or has another type; the message names its place.
    """
    try:
        result: _T = _parse(kind, data, "")
    except _Misfit as misfit:
        place = f"{misfit.place} of {where}" if misfit.place else where
        raise UsageError(f"{place} {misfit.problem}.", hint=hint) from None
    return result


def check_model(claim: str, recorded: str, sha256: str, hint: str) -> None:
    """Check that a file was written for a model.

    Args:
        claim: start of the message where it was not, such as "The plan belongs to another model".
        recorded: SHA-256 in the file.
        sha256: SHA-256 of the model.
        hint: the next step then.

    Raises:
        UsageError: the digests differ.
    """
    if recorded != sha256:
        raise UsageError(f"{claim} (SHA-256 {recorded[:12]}..., this one is {sha256[:12]}...).", hint=hint)


class _Misfit(Exception):
    """Data that do not have their declared form: the place, and the fault."""

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
            raise _Misfit(place, f"is {_shorten_value(data)}, a list was expected")
        if origin is list:
            return [_parse(inner[0], item, f"{place}[{i}]") for i, item in enumerate(data)]
        if len(data) != len(inner):
            raise _Misfit(place, f"has {len(data)} entries, {len(inner)} were expected")
        return tuple(_parse(k, item, f"{place}[{i}]") for i, (k, item) in enumerate(zip(inner, data, strict=True)))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise _Misfit(place, f"is {_shorten_value(data)}, an object was expected")
        key = inner[0]
        return {_key(key, name, place): _parse(inner[1], item, f"{place}.{name}"[:80]) for name, item in data.items()}
    return _parse_plain(kind, data, place)


def _parse_fields(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, Mapping):
        raise _Misfit(place, f"is {_shorten_value(data)}, an object was expected")
    types, arguments = get_type_hints(kind), {}
    for entry in fields(kind):
        if entry.name in data:
            arguments[entry.name] = _parse(types[entry.name], data[entry.name], f"{place}.{entry.name}")
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise _Misfit(place, f"has no {entry.name!r}")
    return kind(**arguments)


def _key(kind: type, name: Any, place: str) -> Any:
    """Convert a key of an object: in JSON, numbers are written as text."""
    if kind is int and isinstance(name, str) and len(name) < 19 and name.removeprefix("-").isdecimal():
        return int(name)
    return _parse_plain(kind, name, f"a key of {place.lstrip('.')}")


def _parse_plain(kind: type, data: Any, place: str) -> Any:
    is_plain = isinstance(data, bool) == (kind is bool) and isinstance(data, (int, float) if kind is float else kind)
    if is_plain and kind is int:
        is_plain = -(1 << 63) <= data < 1 << 63
    if is_plain and kind is float:
        try:
            data = float(data)
        except OverflowError:
            is_plain = False
        else:
            is_plain = math.isfinite(data)
    if not is_plain:
        raise _Misfit(place, f"is {_shorten_value(data)}, {_WORDS[kind]} was expected")
    return data


def _shorten_value(value: Any) -> str:
    """Return a value as shown in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or more levels, than Python writes
        return f"too large {'a number' if isinstance(value, int) else 'to show'}"
    return text if len(text) <= 60 else f"{text[:57]}..."
