"""Where samples come from, and whether they can be read again: files, arrays, iterables, calibration data readers."""

from __future__ import annotations

import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.graph.binding import InputSpec
from onnxprune.runtime import images
from onnxprune.runtime.stored import HINT, SUFFIXES, UNNAMED, Part, array_file, array_files, by_stem, held, may_be_read

_IN_MEMORY = 64 << 20  # bytes kept of a source that can be read once; the rest goes to a temporary file


@dataclass(frozen=True, slots=True)
class Source:
    """Sets of arrays, one after the other, as often as asked for.

    Args:
        parts: a fresh pass.
        known: shapes are known without doing anyone's work, so that all can be checked before the first pass.
        again: a pass reads the source itself, not what was kept of it.
        unit: rows that make up one sample, where a model takes one at a time and has no axis for it.
        stamp: bytes that stand for the content of the first n samples, where there are cheaper ones than the arrays.
    """

    parts: Callable[[], Iterator[Part]]
    known: bool = True
    again: bool = True
    unit: int = 1
    stamp: Callable[[int], Iterator[bytes]] | None = None


def open_source(source: Any, specs: Sequence[InputSpec], options: images.ImageOptions | None = None) -> Source:
    """The source behind what the user gave as data.

    Raises:
        UsageError: a missing path, a folder without data or with both images and arrays, image options for arrays,
            an object that is no data.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise UsageError(f"data {str(path)!r} does not exist", hint=HINT)
        arrays, pictures = _files(path)
        if pictures:
            folder = images.Folder(path, pictures, specs, options)
            return Source(lambda: iter([folder.part()]), unit=folder.unit, stamp=folder.stamp)
        found: Source | None = Source(lambda: _from_files(path, arrays, [spec.name for spec in specs]))
    elif isinstance(source, (np.ndarray, Mapping)):
        found = Source(lambda: iter([_part(source)]))
    else:
        found = _from_object(source)
    if found is None:
        raise UsageError(f"data is a {type(source).__name__}: no path, mapping or iterable of mappings", hint=HINT)
    if options is not None:
        raise UsageError(
            "image options (size, mean, std, layout, ...) have no meaning for data of arrays",
            hint="Arrays go into the model as they are: drop these options, or give a folder of images.",
        )
    return found


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The array files and the images at a path, one of them empty."""
    if not path.is_dir():
        if not may_be_read(path):
            raise UsageError(f"data {str(path)!r} is no ordinary file", hint="Give a file that can be read twice.")
        return ([], [path]) if path.suffix.lower() in images.SUFFIXES else ([path], [])
    arrays, pictures = array_files(path), images.image_files(path)
    if arrays and pictures:
        raise UsageError(
            f"data folder {str(path)!r} holds both arrays ({arrays[0].name}) and images ({pictures[0].name})",
            hint="Give a folder with one kind of data.",
        )
    if not arrays and not pictures:
        kinds = ", ".join(images.SUFFIXES)
        raise UsageError(f"data folder {str(path)!r} holds no {' or '.join(SUFFIXES)} file, and no image ({kinds})")
    return arrays, pictures


def _from_files(path: Path, files: Sequence[Path], names: Sequence[str]) -> Iterator[Part]:
    """One set per file, or one of a folder's files where they are called like the inputs."""
    named = by_stem(files, names) if path.is_dir() else None
    if named is not None:
        yield named
    else:
        yield from map(array_file, files)


def _from_object(source: Any) -> Source | None:
    """Iterables and readers; None for anything else."""
    if hasattr(source, "get_next"):
        if hasattr(source, "rewind"):
            return Source(lambda: map(_part, _rewound(source)), known=False)
        return _once(iter(source.get_next, None))
    if not hasattr(source, "__iter__"):
        return None
    if isinstance(source, Iterator):
        return _once(source)
    return Source(lambda: _items(source), known=isinstance(source, (list, tuple)))


def _rewound(reader: Any) -> Iterator[Any]:
    """One pass over a reader that can go back to its start."""
    reader.rewind()
    yield from iter(reader.get_next, None)


def _items(source: Iterable[Any]) -> Iterator[Part]:
    """Every item as a set of arrays."""
    for index, item in enumerate(source):
        yield _part(item, index)


def _part(item: Any, index: int | None = None) -> Part:
    """One item as a set of arrays by name; ``index`` names it in messages where it is one of several."""
    where = "" if index is None else f" of data item {index}"
    if isinstance(item, Mapping):
        return {str(name): held(np.asarray(array), f"array {name!r}{where}") for name, array in item.items()}
    if hasattr(item, "__array__"):
        return {UNNAMED: held(np.asarray(item), f"the array{where}")}
    raise UsageError(
        f"data item {index or 0} is a {type(item).__name__}, not a mapping of arrays",
        hint="Give {input name: array} per item; axis 0 of an array is the samples.",
    )


def _once(items: Iterator[Any]) -> Source:
    """A source that can be read once: what a pass has read is kept for the next."""
    kept = _Kept(items)
    return Source(kept.parts, known=False, again=False)


class _Kept:
    """Items of an iterator, read from it once, as far as a pass has come, and after that from a copy.

    The copy is in memory while it is small, else in a temporary file without a name.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = _items(items)
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115
        self._offsets: list[int] = []
        weakref.finalize(self, self._file.close)

    def parts(self) -> Iterator[Part]:
        """One pass; several may be under way at once."""
        index = 0
        while index < len(self._offsets) or self._more():
            self._file.seek(self._offsets[index])
            # nobody else has the file, so that what is unpickled is what was pickled here
            arrays = pickle.load(self._file)
            yield {name: held(array, place) for name, (array, place) in arrays.items()}
            index += 1

    def _more(self) -> bool:
        """Keep one more item; False when there is none."""
        part = next(self._items, None)
        if part is None:
            return False
        self._offsets.append(self._file.seek(0, 2))
        pickle.dump({name: (rows.read(), rows.place) for name, rows in part.items()}, self._file, protocol=5)
        return True
