"""Arrays on disk or in memory, opened as far as shape and dtype; rows are read chunk by chunk when asked for."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.runtime.sessions import Array

UNNAMED = "arr_0"
"""The name of an array that has none (numpy's own choice in a .npz file)."""

HINT = (
    "Data is a .npz file with one array per input name, a .npy file, or a folder of such or of images; "
    "axis 0 of an array is the samples."
)
SUFFIXES = (".npz", ".npy")

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
    """An array of known shape and dtype. ``place`` names it in messages.

    ``chunks(n)`` reads it from the start, n rows at a time (the last chunk may be shorter), and holds one chunk at a
    time; a scalar comes whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: Callable[[int], Iterator[Array]]
    place: str

    def read(self, rows: int | None = None) -> Array:
        """Read the first rows; all of them without a number."""
        return next(self.chunks(max(self.shape[:1], default=1) if rows is None else rows))


Arrays = dict[str, Rows]
"""Arrays by name whose rows belong together."""


def rows_in_memory(array: Array, place: str) -> Rows:
    """Return rows of an array already in memory."""
    return Rows(array.shape, array.dtype, lambda rows: _slices(array, rows), place)


def is_tensor(value: Any) -> bool:
    """Return whether a value is one array, of whichever library."""
    return hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def as_array(value: Any, place: str) -> Array:
    """Return an array, a tensor of torch, tensorflow, jax or CuPy, or nested lists as an array of numpy.

    Args:
        value: tensor, array or list. No library is imported for it: tensors are asked for their numbers.
        place: its name in messages.

    Raises:
        UsageError: it is none of these, or its rows have different lengths.
    """
    try:
        array = _as_array(value)
    except Exception as error:  # whichever exception the library of a tensor raises
        lines = str(error).strip().splitlines()
        ragged = isinstance(error, ValueError) and "inhomogeneous" in str(error)
        why = "its rows have different lengths" if ragged else lines[0] if lines else type(error).__name__
        hint = "Pad them to one length, or give one sample per item." if ragged else HINT
        raise UsageError(f"{place} cannot be read: {why}", hint=hint) from error
    is_new_object = array.dtype.hasobject and not isinstance(value, np.ndarray)
    if is_new_object and not all(isinstance(one, (str, bytes)) for one in array.flat):
        raise UsageError(f"{place} is a {type(value).__name__}, and no array of numbers or texts", hint=HINT)
    return array


def _as_array(value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if isinstance(value, (list, tuple)) and value and is_tensor(value[0]):
        return np.stack([_as_array(one) for one in value])
    for step in ("detach", "cpu"):  # torch: out of the graph of gradients, off the accelerator
        value = getattr(value, step)() if callable(getattr(value, step, None)) else value
    if callable(getattr(value, "numpy", None)):
        try:
            return np.asarray(value.numpy())
        except (TypeError, RuntimeError):  # a type that numpy lacks: bfloat16
            if not callable(getattr(value, "float", None)):
                raise
            return np.asarray(value.float().numpy())
    if hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except TypeError:  # CuPy does not leave its device by itself
            if not callable(getattr(value, "get", None)):
                raise
            return np.asarray(value.get())
    return np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)


def _slices(array: Array, rows: int) -> Iterator[Array]:
    if not array.ndim:
        yield array
        return
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def array_files(folder: Path) -> list[Path]:
    """List the array files of a folder in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and may_be_read(path))


def may_be_read(path: Path) -> bool:
    """Return whether an entry of a folder is a file, or a link to a missing one, which its reader reports."""
    return path.is_file() or not path.exists()


def by_stem(files: Sequence[Path], names: Sequence[str]) -> Arrays | None:
    """One .npy file per name as one set of arrays; None where the files are not that."""
    stems = {path.stem: path for path in files}
    if not names or any(path.suffix != ".npy" for path in files) or not set(names) <= stems.keys():
        return None
    return {name: array_file(stems[name])[UNNAMED] for name in names}


def array_file(path: Path) -> Arrays:
    """Open the arrays of one file as far as their headers."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"data file {str(path)!r} is neither .npz nor .npy nor an image", hint=HINT)
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
    """Turn the errors of a damaged or unreadable file into a typed error."""
    try:
        yield
    except _READ_ERRORS as error:
        lines = str(error).strip().splitlines()
        detail = lines[0] if lines else type(error).__name__
        raise UsageError(f"data file {str(path)!r} cannot be read: {detail}", hint=HINT) from error


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    """Open a .npy file, or a member of a .npz file, as a stream."""
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
        old = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    except Exception as error:  # numpy parses the header as Python source; a damaged one raises what a parser can
        raise ValueError("it has no valid header of numpy's array format") from error
    if any(size < 0 for size in shape):
        raise ValueError(f"its header says shape {list(shape)}")
    return tuple(shape), columns_first, dtype


def _stored(path: Path, member: str) -> Rows:
    """Open an array in a file; never a pickled one."""
    place = f"array {member.removesuffix('.npy')!r} of {str(path)!r}" if member else f"data file {str(path)!r}"
    with _opened(path, member) as stream:
        shape, columns_first, dtype = _header(stream)
    if dtype.hasobject:
        raise UsageError(f"{place} holds pickled objects, which are not loaded", hint="Save plain numbers.")
    size = math.prod(shape) * dtype.itemsize

    def chunks(rows: int) -> Iterator[Array]:
        with _opened(path, member) as stream:
            _header(stream)
            if columns_first and len(shape) > 1:
                with _mapped(stream, shape, dtype) as array:
                    yield from _slices(array, rows)
                return
            num_read = 0
            for start in range(0, shape[0], rows) if shape else (0,):
                chunk_shape = (min(rows, shape[0] - start), *shape[1:]) if shape else ()
                raw = stream.read(math.prod(chunk_shape) * dtype.itemsize)
                num_read += len(raw)
                if len(raw) < math.prod(chunk_shape) * dtype.itemsize:
                    raise UsageError(f"{place} is truncated: {num_read} of {size} bytes are there")
                yield np.frombuffer(raw, dtype).reshape(chunk_shape) if raw else np.zeros(chunk_shape, dtype)

    return Rows(shape, dtype, chunks, place)


@contextmanager
def _mapped(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    """Unpack and map a columns-first array behind its header: its rows are spread over the whole of it."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file)
        file.flush()
        yield np.memmap(file, dtype, "r", shape=shape, order="F")
