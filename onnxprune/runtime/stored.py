"""Arrays on disk or in memory, opened as far as shape and dtype; rows are read when asked for, and no more of them."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.runtime.sessions import Array

UNNAMED = "arr_0"
"""The name of an array that has none (numpy's own choice in a .npz file)."""

HINT = "Data is a .npz file with one array per input name, a .npy file, or a folder of such; axis 0 is the samples."

_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,  # an encrypted member, an unknown compression
    OverflowError,  # a damaged header that asks for more than there can be
    MemoryError,
)


@dataclass(frozen=True, slots=True)
class Rows:
    """An array of known shape and dtype; ``read(n)`` gives its first n rows (a scalar whole). ``place`` names it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int], Array]
    place: str


def held(array: Array, place: str) -> Rows:
    """An array already in memory."""
    return Rows(array.shape, array.dtype, lambda rows: array[:rows] if array.ndim else array, place)


def joined(pieces: Sequence[Rows]) -> Rows:
    """The rows of several arrays, equal in dtype and in every axis but the first, one after the other."""

    def read(rows: int) -> Array:
        arrays: list[Array] = []
        for piece in pieces:
            if rows <= 0:
                break
            arrays.append(piece.read(rows))
            rows -= len(arrays[-1])
        return np.concatenate(arrays)

    first = pieces[0]
    place = f"{first.place} and {len(pieces) - 1} more" if len(pieces) > 1 else first.place
    return Rows((sum(piece.shape[0] for piece in pieces), *first.shape[1:]), first.dtype, read, place)


def read_parts(source: Any) -> Iterator[dict[str, Rows]]:
    """A source as sets of arrays by name: one set per file of a folder or item of an iterable, else a single one.

    Raises:
        UsageError: missing, empty or damaged file, pickled objects, an item that is no mapping.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise UsageError(f"data {str(path)!r} does not exist", hint=HINT)
        yield from map(_file, _files(path) if path.is_dir() else [path])
    elif isinstance(source, np.ndarray):
        yield {UNNAMED: held(source, "the array")}
    elif isinstance(source, Mapping):
        yield {str(name): held(np.asarray(array), f"array {name!r}") for name, array in source.items()}
    elif hasattr(source, "__iter__"):
        for index, item in enumerate(source):
            if not isinstance(item, (Mapping, np.ndarray)):
                raise UsageError(f"data item {index} is a {type(item).__name__}, not a mapping of arrays")
            yield from read_parts(item)
    else:
        raise UsageError(f"data is a {type(source).__name__}: no path, mapping or iterable of mappings", hint=HINT)


def _files(folder: Path) -> list[Path]:
    """The array files of a folder in the order of their names."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".npy"))
    if not files:
        raise UsageError(f"data folder {str(folder)!r} holds no .npz or .npy file", hint=HINT)
    return files


def by_stem(source: Any, names: Sequence[str]) -> dict[str, Rows] | None:
    """A folder that holds one .npy file per name, as one set of arrays; None for any other source."""
    if not isinstance(source, (str, Path)) or not Path(source).is_dir():
        return None
    files = _files(Path(source))
    stems = {path.stem: path for path in files}
    if not names or any(path.suffix != ".npy" for path in files) or not set(names) <= stems.keys():
        return None
    return {name: _file(stems[name])[UNNAMED] for name in names}


def _file(path: Path) -> dict[str, Rows]:
    """The arrays of one file, opened as far as their headers."""
    if path.suffix not in (".npz", ".npy"):
        raise UsageError(f"data file {str(path)!r} is neither .npz nor .npy", hint=HINT)
    with _readable(path):
        if path.stat().st_size == 0:
            raise UsageError(f"data file {str(path)!r} is empty")
        if path.suffix == ".npy":
            return {UNNAMED: _stored(path, "")}
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
        return {member.removesuffix(".npy"): _stored(path, member) for member in members}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what a damaged or unreadable file raises into a typed error."""
    try:
        yield
    except _READ_ERRORS as error:
        lines = str(error).strip().splitlines()
        detail = lines[0] if lines else type(error).__name__
        raise UsageError(f"data file {str(path)!r} cannot be read: {detail}", hint=HINT) from error


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    """A .npy file, or a member of a .npz file, as a stream."""
    with _readable(path):
        if member:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                yield stream
        else:
            with path.open("rb") as stream:
                yield stream


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and dtype, from the head of a stream in numpy's format."""
    try:
        if np.lib.format.read_magic(stream) == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)
    except Exception as error:  # numpy parses the header as Python source; a damaged one raises what a parser can
        raise ValueError("it has no valid header of numpy's array format") from error


def _stored(path: Path, member: str) -> Rows:
    """An array in a file; never a pickled one."""
    place = f"array {member.removesuffix('.npy')!r} of {str(path)!r}" if member else f"data file {str(path)!r}"
    with _opened(path, member) as stream:
        shape, columns_first, dtype = _header(stream)
    if dtype.hasobject:
        raise UsageError(f"{place} holds pickled objects, which are not loaded", hint="Save plain numbers.")

    def read(rows: int) -> Array:
        # columns-first order spreads a row over the whole file
        wanted = shape if columns_first or not shape else (min(rows, shape[0]), *shape[1:])
        size = math.prod(wanted) * dtype.itemsize
        with _opened(path, member) as stream:
            _header(stream)
            raw = stream.read(size)
            if len(raw) < size:
                raise UsageError(f"{place} is truncated: {len(raw)} of {size} bytes are there")
            array = np.frombuffer(raw, dtype).reshape(wanted, order="F" if columns_first else "C")
        return array[:rows] if shape else array

    return Rows(tuple(shape), dtype, read, place)
