"""Files that appear whole or not at all, and folders of a run's own that the next run removes where it was killed.

Locks say who is at work: a file or folder whose lock can be taken belongs to a run that is over. Where a file system
has no locks, nothing of other runs is removed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import platformdirs

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
_SECONDS = 60  # in which a run has taken the lock of a file that it made


def user_cache() -> Path:
    """Where measurements are kept between runs: ``onnxprune`` in the cache folder that the system gives the user."""
    # XDG_CACHE_HOME is asked on every system: who sets it means it.
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "onnxprune" if home else Path(platformdirs.user_cache_dir("onnxprune", appauthor=False))


def is_text(name: str) -> bool:
    """Whether a name of a file is UTF-8."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)


def shortened(name: str, limit: int) -> str:
    """The beginning of a name, at most ``limit`` bytes of it as the file system counts them."""
    while len(os.fsencode(name)) > limit:
        name = name[:-1]
    return name


def beside(target: Path, suffix: str) -> Path:
    """The path with ``suffix`` behind its name; of a name that is no text, or too long for that, a part is a digest."""
    name = "".join("_" if "\ud800" <= sign <= "\udfff" else sign for sign in target.name)
    if name != target.name or len(os.fsencode(name + suffix)) > LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:_DIGEST]
        name = f"{shortened(name, LONGEST_NAME - len(suffix) - _DIGEST - 1)}-{digest}"
    return target.with_name(name + suffix)


def may_be_data_of(target: Path, name: str) -> bool:
    """Whether a name is one that data of ``target`` get."""
    start, end = beside(target, f".{'0' * _DIGEST}.data").name.rsplit("0" * _DIGEST, 1)
    digest = rf"{re.escape(start)}[0-9a-f]{{{_DIGEST}}}{re.escape(end)}"
    return name == beside(target, ".data").name or bool(re.fullmatch(digest, name))


def write(target: Path, data: bytes) -> None:
    """Write a file whole or not at all; a link is followed. Raises OSError."""
    with replacing(target) as files, files.open() as file:
        file.write(data)


def clone(source: Path, target: Path) -> None:
    """Copy a file, without a second copy on the disk where the file system can share it. Raises OSError."""
    if fcntl is not None:
        with suppress(OSError), source.open("rb") as one, target.open("wb") as other:
            fcntl.ioctl(other, _FICLONE, one.fileno())
            return
    shutil.copyfile(source, target)


class Replacement:
    """A file to be written under a temporary name and to take the place of ``target``, with what belongs to it.

    Whatever moment a run is killed at, ``target`` is the old file or the new one, and the data it refers to are there:
    new data never take the name of others. Their name is ``target`` with ``.data`` behind it where that is free, else
    it has a digest of them in it too; those that only the old file referred to are removed behind it.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        self._main: Path | None = None
        self._data: Path | None = None
        self._write: Callable[[BinaryIO, str], None] | None = None
        self._companions: dict[Path, Path] = {}  # target -> temporary
        self._set_aside: dict[Path, Path] = {}  # companion -> where its former file waits
        self._temporaries: list[Path] = []
        self._locks = ExitStack()

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file that will be ``target``. Raises OSError."""
        with self._open(self.target) as (path, file):
            yield file
            self._main = path

    @contextmanager
    def open_data(self, write: Callable[[BinaryIO, str], None]) -> Iterator[BinaryIO]:
        """A file of data that the main one refers to by its name. Raises OSError.

        Args:
            write: writes the main file, given the name of its data.
        """
        with self._open(self.target) as (path, file):
            yield file
            self._data, self._write = path, write

    @contextmanager
    def open_companion(self, target: Path) -> Iterator[BinaryIO]:
        """A file that describes the main one: an old one is never left beside a new main file. Raises OSError."""
        target = Path(os.path.realpath(target))
        with self._open(target) as (path, file):
            yield file
            self._companions[target] = path

    @contextmanager
    def _open(self, target: Path) -> Iterator[tuple[Path, BinaryIO]]:
        """A new temporary file and its path; on leaving, its bytes are on the disk."""
        # Not tempfile: its files are readable by their owner only, these are to have the usual permissions.
        path = _beside(target, "tmp")
        unlocked = path.with_suffix(".new")  # a run that cleans up must not take it for a leftover
        with unlocked.open("xb") as file:
            self._temporaries += [unlocked, path]
            if _lock(file.fileno()):
                self._locks.callback(os.close, os.dup(file.fileno()))
            unlocked.rename(path)
            yield path, file
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Put every file in its target's place. Raises OSError, with every target as it was before."""
        with _folder_lock(self.target.parent) as alone:
            data = self._data_target()
            made = data is not None and not data.exists()
            try:
                if data is not None and self._write is not None and self._data is not None:
                    with self.open() as file:
                        self._write(file, data.name)
                referred = [path for path in self._candidates() if path != data and _mentions(self.target, path.name)]
                self._announce([*([data] if made and data is not None else []), *referred])
                if made and data is not None and self._data is not None:
                    self._data.rename(data)
                self._set_companions_aside()
                assert self._main is not None
                self._main.replace(self.target)
            except BaseException:
                if self._main is None or self._main.exists():
                    if made and data is not None:
                        data.unlink(missing_ok=True)
                    for target, aside in self._set_aside.items():
                        aside.replace(target)
                    self._set_aside.clear()
                else:  # an interrupt came a moment too late
                    self._place_companions()
                raise
            self._place_companions()
            if alone:
                self._remove_leftovers(data, referred)

    def _data_target(self) -> Path | None:
        """Where the data go: to a name that is free, or whose file is the same."""
        if self._data is None:
            return None
        plain = beside(self.target, ".data")
        if not plain.exists() or _same(plain, self._data):
            return plain
        return beside(self.target, f".{_digest(self._data)}.data")

    def _candidates(self) -> list[Path]:
        """Files with names that data of ``target`` may have."""
        names = [entry.name for entry in os.scandir(self.target.parent) if entry.name.endswith(".data")]
        return [self.target.with_name(name) for name in names if may_be_data_of(self.target, name)]

    def _announce(self, data: Sequence[Path]) -> None:
        """Note on the disk which data are about to appear or to go, so that a later run can finish that."""
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

    def _remove_leftovers(self, data: Path | None, referred: Iterable[Path]) -> None:
        """Remove data that the old file referred to, and what runs that were killed have left of these targets."""
        unused = set(referred)
        for target in (self.target, *self._companions):
            pattern = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{{_DIGEST}}}\.(?:tmp|new)")
            for entry in os.scandir(target.parent):
                path = target.with_name(entry.name)
                if pattern.fullmatch(entry.name) and path not in self._temporaries:
                    with suppress(OSError):
                        unused |= _remove_if_free(path)
        for path in unused - {data}:
            with suppress(OSError):
                path.unlink()

    def clean(self) -> None:
        """Remove whatever temporary file there still is."""
        with self._locks:
            for leftover in (*self._temporaries, *self._set_aside.values()):
                with suppress(OSError):
                    leftover.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[Replacement]:
    """Files that take their targets' places when the block ends well, and leave no trace when it does not."""
    files = Replacement(target)
    try:
        yield files
        files.commit()
    finally:
        files.clean()


def _stem(target: Path) -> str:
    return shortened(target.name, LONGEST_NAME - _DIGEST - len("...tmp"))


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{_stem(target)}.{secrets.token_hex(_DIGEST // 2)}.{kind}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same."""
    return one.stat().st_size == other.stat().st_size and _digest(one) == _digest(other)


def _mentions(path: Path, name: str) -> bool:
    """Whether a file has a name somewhere in it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(os.fsencode(name)) >= 0
    except (OSError, ValueError):  # no such file, or an empty one
        return False


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take the lock of an open file; False where another has it, or where there are no locks."""
    if fcntl is None:  # pragma: no cover - Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def _folder_lock(folder: Path) -> Iterator[bool]:
    """Hold off other runs that replace files of a folder; whether that could be done."""
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
    """Remove a file that no run holds the lock of, or is about to take it of; the files of data that it announced."""
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
    """A folder of the run's own for a while. It goes when the block ends, or with the next run where this is killed."""
    _remove_stale_once()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        unlocked = folder / "lock"
        with unlocked.open("xb") as file:
            _lock(file.fileno())
            unlocked.rename(folder / _LOCK)  # now a run that cleans up may look at it
            yield folder


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
    """Remove a working folder of this user whose run is over; raises OSError where it is none."""
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        return
    with (folder / _LOCK).open("rb") as file:
        # An empty folder is one that is being made.
        if _lock(file.fileno()):
            shutil.rmtree(folder, ignore_errors=True)
