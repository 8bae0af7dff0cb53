"""The user's inputs as a stream of calls of the model, in bounded memory, as often as there are passes."""

from __future__ import annotations

import copy
import hashlib
import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from onnxprune.errors import UsageError, argument
from onnxprune.graph.probes import InputSpec, inner_sample_axes
from onnxprune.runtime import images
from onnxprune.runtime.arrays import (
    HINT,
    SUFFIXES,
    UNNAMED,
    Arrays,
    array_file,
    array_files,
    as_array,
    by_stem,
    is_tensor,
    may_be_read,
    rows_in_memory,
)
from onnxprune.runtime.images import ImageOptions
from onnxprune.runtime.matching import cast, match, spec_samples_first
from onnxprune.runtime.sessions import Array, Feed

_IN_MEMORY = 64 << 20  # bytes kept of a source that can be read once; the rest goes to a temporary file
_MAPPED_FROM, _ALIGN = 1 << 16, 64  # bytes of an array that is worth a mapping of its own, and of its place


@dataclass(frozen=True, slots=True)
class Source:
    """Sets of arrays, one after the other, as often as asked for.

    Args:
        parts: a fresh pass.
        known: shapes are known without doing anyone's work, so that all can be checked before the first pass.
        again: a pass reads the source itself, not a stored copy.
        unit: rows that make up one sample, where a model takes one at a time and has no axis for it.
        stamp: bytes that stand for the content of the first n samples, where there are cheaper ones than the arrays.
    """

    parts: Callable[[], Iterator[Arrays]]
    known: bool = True
    again: bool = True
    unit: int = 1
    stamp: Callable[[int], Iterator[bytes]] | None = None


def open_source(source: Any, specs: Sequence[InputSpec], options: images.ImageOptions | None = None) -> Source:
    """Return the source behind the user's data.

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
        opened_source: Source | None = Source(lambda: _from_files(path, arrays, [spec.name for spec in specs]))
    elif isinstance(source, Mapping) or is_tensor(source):
        _check_splits(source, specs)
        opened_source = Source(lambda: iter([_part(source, specs)]))
    else:
        opened_source = _from_object(source, specs)
    if opened_source is None:
        raise UsageError(f"data is a {type(source).__name__}: no path, mapping or iterable of mappings", hint=HINT)
    if options is not None:
        raise UsageError(
            "image options (size, mean, std, layout, ...) have no meaning for data of arrays",
            hint="Arrays go into the model as they are: drop these options, or give a folder of images.",
        )
    return opened_source


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """List the array files and the images at a path, one of them empty."""
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


def _from_files(path: Path, files: Sequence[Path], names: Sequence[str]) -> Iterator[Arrays]:
    """One set per file, or one of a folder's files where they are called like the inputs."""
    files_by_name = by_stem(files, names) if path.is_dir() else None
    if files_by_name is not None:
        yield files_by_name
    else:
        yield from map(array_file, files)


def _check_splits(source: Any, specs: Sequence[InputSpec]) -> None:
    """Check that a mapping holds arrays, not whole data sets by name; raises UsageError."""
    if not isinstance(source, Mapping) or not source or any(spec.name in source for spec in specs):
        return
    if all(hasattr(one, "__getitem__") and hasattr(one, "features") for one in source.values()):
        raise UsageError(
            f"data holds data sets {', '.join(map(repr, list(source)[:4]))}, and one is wanted",
            hint=f"Give one of them: {argument('data')} = datasets[{next(iter(source))!r}].",
        )


def _from_object(source: Any, specs: Sequence[InputSpec]) -> Source | None:
    """Open an iterable, a reader, a loader of batches or a data set as a source; None for anything else."""
    if hasattr(source, "get_next"):
        if hasattr(source, "rewind"):
            return Source(lambda: (_part(item, specs) for item in _rewound(source)), known=False)
        return _iterate_once(iter(source.get_next, None), specs)
    if hasattr(source, "as_numpy_iterator"):  # tensorflow's data sets may be shuffled anew in every pass
        return _iterate_once(iter(source.as_numpy_iterator()), specs)
    if hasattr(source, "batch_sampler") and hasattr(source, "__iter__"):  # so may torch's loaders
        return _iterate_once(iter(source), specs)
    if not hasattr(source, "__iter__"):
        if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
            return None
        return Source(lambda: _items((source[i] for i in range(len(source))), specs), known=False)
    if isinstance(source, Iterator):
        return _iterate_once(source, specs)
    return Source(lambda: _items(source, specs), known=isinstance(source, (list, tuple)))


def _rewound(reader: Any) -> Iterator[Any]:
    """One pass over a reader that can go back to its start."""
    reader.rewind()
    yield from iter(reader.get_next, None)


def _items(source: Iterable[Any], specs: Sequence[InputSpec]) -> Iterator[Arrays]:
    """Every item as a set of arrays."""
    for index, item in enumerate(source):
        yield _part(item, specs, index)


def _part(item: Any, specs: Sequence[InputSpec], index: int | None = None) -> Arrays:
    """Return one item as a set of arrays by name; ``index`` names it in messages where it is one of several.

    A tuple or list, as loaders of (inputs, labels) give them, holds the inputs first, in the model's order.
    """
    where = "" if index is None else f" of data item {index}"
    if is_tensor(item):
        return {UNNAMED: rows_in_memory(as_array(item, f"the array{where}"), f"the array{where}")}
    if isinstance(item, Mapping):
        return _named_arrays(item, specs, where)
    if isinstance(item, (tuple, list)) and item:
        if all(isinstance(one, (bool, int, float)) for one in item):
            return {UNNAMED: rows_in_memory(as_array(item, f"the array{where}"), f"the array{where}")}
        if isinstance(item[0], Mapping) or (isinstance(item[0], (tuple, list)) and not _is_plain(item[0])):
            return _part(item[0], specs, index)
        if len(item) < len(specs):
            raise UsageError(
                f"data item {index or 0} holds {len(item)} arrays, and the model has {len(specs)} inputs: "
                f"{', '.join(repr(spec.name) for spec in specs[:6])}",
                hint="Give {input name: array} per item, or the arrays in this order.",
            )
        return _named_arrays({spec.name: one for spec, one in zip(specs, item, strict=False)}, specs, where)
    raise UsageError(
        f"data item {index or 0} is a {type(item).__name__}, not a mapping of arrays",
        hint="Give {input name: array} per item; axis 0 of an array is the samples.",
    )


def _is_plain(item: Any) -> bool:
    """Return whether nested lists hold plain numbers, which make one array."""
    return isinstance(item, (bool, int, float, str)) or (
        isinstance(item, (list, tuple)) and all(_is_plain(one) for one in item)
    )


def _named_arrays(item: Mapping[Any, Any], specs: Sequence[InputSpec], where: str) -> Arrays:
    """Return the arrays of a mapping; entries that are no input (texts, uneven labels) need not be arrays."""
    inputs = {spec.name for spec in specs}
    arrays: Arrays = {}
    for key, value in item.items():
        name, place = str(key), f"array {str(key)!r}{where}"
        try:
            arrays[name] = rows_in_memory(as_array(value, place), place)
        except UsageError:
            if name in inputs:
                raise
    return arrays


def _iterate_once(items: Iterator[Any], specs: Sequence[InputSpec]) -> Source:
    """Return a source that can be read once: a pass stores its items for the next."""
    stored = _StoredParts(items, specs)
    return Source(stored.parts, known=False, again=False)


class _StoredParts:
    """Items of an iterator, read from it once, as far as a pass has come, and after that from a copy.

    The copy is in memory while it is small, else in a temporary file without a name.
    """

    def __init__(self, items: Iterator[Any], specs: Sequence[InputSpec]) -> None:
        self._items = _items(items, specs)
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115
        self._offsets: list[int] = []
        weakref.finalize(self, self._file.close)

    def parts(self) -> Iterator[Arrays]:
        """One pass; several may be under way at once."""
        index = 0
        while index < len(self._offsets) or self._more():
            self._file.seek(self._offsets[index])
            # nobody else has the file, so that what is unpickled is what was pickled here
            arrays = pickle.load(self._file)
            yield {name: rows_in_memory(array, place) for name, (array, place) in arrays.items()}
            index += 1

    def _more(self) -> bool:
        """Keep one more item; False when there is none."""
        part = next(self._items, None)
        if part is None:
            return False
        self._offsets.append(self._file.seek(0, 2))
        pickle.dump({name: (rows.read(), rows.place) for name, rows in part.items()}, self._file, protocol=5)
        return True


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of a model. ``split`` are the inputs that change from batch to batch; the first one counts samples."""

    feed: Feed
    split: Sequence[str]
    free: bool

    @property
    def rows(self) -> int:
        """Return the number of rows of the input that counts samples; a scalar is one."""
        return max(self.feed[self.split[0]].shape[:1], default=1) if self.split else 1

    def first(self, rows: int) -> Batch:
        """Return the batch cut short, where the model takes any number."""
        if rows >= self.rows or not self.free:
            return self
        return Batch({n: a[:rows] if n in self.split else a for n, a in self.feed.items()}, self.split, True)


@dataclass(slots=True)
class Totals:
    """The content of sets of arrays: ``rows``, ``usable`` of them in whole batches of ``step`` (1: any number)."""

    rows: int = 0
    usable: int = 0
    step: int = 1


class Cutter:
    """Cuts sets of arrays into batches of ``size`` samples, or of the leading sizes that the model fixes.

    Sets of equal shapes that follow one another are joined, so that a batch can hold samples of several sets; samples
    left at the end makes a short batch where leading sizes are free and is dropped where they are not. Sets whose
    inputs differ in their numbers of rows (states, constants beside samples) are cut each for itself: scalars, and
    arrays that fill a fully fixed input while other inputs hold more, go into every batch. A scalar input that gets
    one value per sample makes every sample a call.
    """

    def __init__(self, specs: Sequence[InputSpec], size: int) -> None:
        self.specs, self.size = specs, size
        self.dropped = 0
        """Samples that filled no batch."""
        self.place = ""
        fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
        self.fixed = max((size for size in fixed if isinstance(size, int)), default=0)
        self._joins = len(fixed) <= 1 and (len(specs) == 1 or all(spec.shape for spec in specs))

    def batches(self, parts: Iterable[Arrays]) -> Iterator[Batch]:
        """Every batch; no more than about two are in memory.

        Raises:
            UsageError: numbers of samples that do not fit each other, values that do not fit an input.
        """
        for tail_shapes, run in groupby(parts, self._tails):
            if tail_shapes is None:
                for part in run:
                    yield from self._alone(part)
            else:
                yield from self._joined(run)

    def totals(self, parts: Iterable[Arrays]) -> Totals:
        """Count the samples that can be split into batches; only shapes are read."""
        sums = Totals()
        for tail_shapes, run in groupby(parts, self._tails):
            rows = 0
            for part in run:
                self.place = next(iter(part.values())).place
                if tail_shapes is not None:
                    rows += next(iter(part.values())).shape[0]
                    continue
                steps, count = _steps(part, self.specs, self.size)
                sums.rows += part[next(iter(steps))].shape[0] if steps else 1
                sums.step = self._step(steps)
                sums.usable += part[next(iter(steps))].shape[0] if steps and sums.step == 1 else count * sums.step
            if tail_shapes is not None:
                sums.rows, sums.step = sums.rows + rows, self.fixed or 1
                sums.usable += rows // sums.step * sums.step
        return sums

    def _step(self, steps: Mapping[str, int]) -> int:
        """Return the number of which the number of samples is a multiple."""
        return 1 if self._free(steps) else next(iter(steps.values()), 1)

    def _free(self, steps: Mapping[str, int]) -> bool:
        """Return whether the last batch can be cut short: every leading size is free."""
        fixed = (spec.name in steps and spec.shape and isinstance(spec.shape[0], int) for spec in self.specs)
        return not any(fixed)

    def _tails(self, part: Arrays) -> tuple[tuple[int, ...], ...] | None:
        """Return the shapes that have to be equal in joined sets; None for a set with rows of its own kind."""
        lengths = {rows.shape[:1] for rows in part.values()}
        filled = sum(part[spec.name].shape == spec.shape for spec in self.specs)
        if not self._joins or len(lengths) > 1 or () in lengths or 0 < filled < len(self.specs):
            return None
        return tuple(part[spec.name].shape[1:] for spec in self.specs)

    def _joined(self, run: Iterable[Arrays]) -> Iterator[Batch]:
        """Batches across sets, all of whose arrays have the same number of rows."""
        step = self.fixed or self.size
        names = [spec.name for spec in self.specs]
        remainder: Feed = {}
        for part in run:
            self.place = next(iter(part.values())).place
            for chunk in self._read(part, dict.fromkeys(names, step)):
                feed = {n: np.concatenate([remainder[n], chunk[n]]) for n in names} if remainder else chunk
                if len(feed[names[0]]) >= step:
                    yield Batch({n: a[:step] for n, a in feed.items()}, names, not self.fixed)
                    feed = {n: a[step:] for n, a in feed.items()}
                # a copy: a view would keep the whole set in memory, and some iterators fill one array again and again
                remainder = {n: a.copy() for n, a in feed.items()} if len(feed[names[0]]) else {}
        if remainder and not self.fixed:
            yield Batch(remainder, names, True)
        elif remainder:
            self.dropped += len(remainder[names[0]])

    def _alone(self, part: Arrays) -> Iterator[Batch]:
        """Iterate over the batches of one set."""
        steps, count = _steps(part, self.specs, self.size)
        by_name = {spec.name: spec for spec in self.specs}
        same = {n: _scalar(cast(r.read(), by_name[n], r.place), by_name[n]) for n, r in part.items() if n not in steps}
        if not steps:
            yield Batch(same, (), False)
            return
        free, num_used = self._free(steps), 0
        for chunk in islice(self._read(part, steps), count):
            feed = {n: same[n] if n in same else _scalar(chunk[n], spec) for n, spec in by_name.items()}
            batch = Batch(feed, tuple(steps), free)
            num_used += batch.rows
            yield batch
        self.dropped += part[next(iter(steps))].shape[0] - num_used

    def _read(self, part: Arrays, steps: Mapping[str, int]) -> Iterator[Feed]:
        """Read the arrays of a set side by side, in the model's dtypes, each by its own number of rows."""
        specs = [spec for spec in self.specs if spec.name in steps]
        readers = [part[spec.name].chunks(steps[spec.name]) for spec in specs]
        for number, arrays in enumerate(zip(*readers, strict=False)):
            pairs = zip(specs, arrays, strict=True)
            yield {s.name: cast(a, s, part[s.name].place, number * steps[s.name]) for s, a in pairs}


def _steps(part: Arrays, specs: Sequence[InputSpec], batch_size: int) -> tuple[dict[str, int], int]:
    """Rows per batch for every input that is split, and the number of batches."""
    scalars = {s.name: part[s.name].shape[0] for s in specs if s.scalar and part[s.name].shape not in ((), (1,))}
    if scalars:
        return _steps_beside_scalars(part, specs, scalars)
    split = [spec for spec in specs if part[spec.name].shape and (spec.shape or len(specs) == 1)]
    samples = {spec.name: part[spec.name].shape[0] for spec in split}
    fixed = {spec.name: spec.shape[0] for spec in split if spec.shape and isinstance(spec.shape[0], int)}
    for name, size in fixed.items():
        if samples[name] < size:
            raise too_few(part[name].place, samples[name], name, size)
    unsplit = {spec.name for spec in split if part[spec.name].shape == spec.shape}
    if any(name not in unsplit and n > fixed.get(name, 1) for name, n in samples.items()):
        samples = {name: n for name, n in samples.items() if name not in unsplit}
        fixed = {name: size for name, size in fixed.items() if name not in unsplit}
    if not samples:
        return {}, 1
    if not fixed:
        _same(samples, "samples")
        return dict.fromkeys(samples, batch_size), -(-next(iter(samples.values())) // batch_size)
    calls = {name: samples[name] // size for name, size in fixed.items()}
    if len(set(samples.values())) == 1 and min(calls.values()) > 0:
        # Recordings of several calls, joined and all cut to one length: the first calls are whole in all of them.
        calls = dict.fromkeys(calls, min(calls.values()))
    _same(calls, "batches of samples")
    count = next(iter(calls.values()))
    return {name: fixed.get(name) or _step_beside(name, samples, fixed, count) for name in samples}, count


def _steps_beside_scalars(
    part: Arrays, specs: Sequence[InputSpec], scalars: dict[str, int]
) -> tuple[dict[str, int], int]:
    """Rows per batch where scalar inputs have a value per call: one row of every input whose leading size is free."""
    others = [spec for spec in specs if spec.name not in scalars]
    steps, count = _steps(part, others, 1) if others else ({}, 0)
    calls = {**({others[0].name: count} if steps else {}), **scalars}
    _same(calls, "samples")
    return {**steps, **dict.fromkeys(scalars, 1)}, next(iter(scalars.values()))


def _scalar(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Return the one number of a scalar input."""
    return array.reshape(()) if spec.scalar else array


def too_few(place: str, rows: int, name: str, size: int) -> UsageError:
    """Return the error for data that do not fill one batch."""
    return UsageError(
        f"{place} has {rows} samples; input {name!r} takes {size} at a time",
        hint=f"Give at least {size} samples; the model's own leading size is fixed.",
    )


def _step_beside(name: str, samples: Mapping[str, int], fixed: Mapping[str, int], count: int) -> int:
    """Rows per batch of an input with a free leading size; inputs with fixed ones give ``count`` batches."""
    for other, size in fixed.items():
        if samples[other] == samples[name]:
            return size
    if samples[name] % count:
        _same({name: samples[name], **{other: samples[other] for other in fixed}}, "samples")
    return samples[name] // count


def _same(counts: Mapping[str, int], what: str) -> None:
    """Every input holds the same number."""
    if len(set(counts.values())) > 1:
        counts_text = ", ".join(f"{name!r}: {n}" for name, n in sorted(counts.items())[:6])
        raise UsageError(f"data holds different numbers of {what} per input: {counts_text}")


_BATCH = 16


class Samples:
    """Data for a model: iterating gives its calls, one batch after the other, and every pass gives the same.

    Inputs whose leading size the model fixes get batches of that size, and samples that fill none are dropped; all
    others get ``batch_size`` (16) samples at a time, any number will do for them, and the last batch may be short.
    About one batch is in memory, besides the source's own arrays.

    Attributes:
        samples: number of samples per pass; None where it is known only after reading.
        name: the data as messages and reports call it.
    """

    def __init__(
        self, source: Source, specs: Sequence[InputSpec], samples: int | None, batch_size: int | None, name: str
    ) -> None:
        self.specs, self.batch_size, self.name = tuple(specs), batch_size, name
        self._source, self._limit, self._min_samples = source, samples, samples
        self._change: Callable[[Feed], Feed] | None = None
        self._totals: Totals | None = None
        self._axes = inner_sample_axes(self.specs)
        # Samples are counted and cut along axis 0 of every array; a call gets them where its inputs have them.
        self._split_specs = [spec_samples_first(spec, self._axes.get(spec.name, 0)) for spec in self.specs]
        if source.known and specs:
            cutter = Cutter(self._split_specs, batch_size or _BATCH)
            self._totals = cutter.totals(self._parts())
            self._enough(self._totals.rows, self._totals.usable, cutter)

    @property
    def samples(self) -> int | None:
        """Samples of one pass, None where they are not known before."""
        if not self.specs:
            return 1
        if self._totals is None:
            return None
        usable = self._totals.usable
        if self._limit is not None:
            usable = min(usable, _ceil(self._limit * self._source.unit, self._totals.step))
        return usable // self._source.unit

    def first(self, samples: int) -> Samples:
        """Return the same data with no more than this many samples (rounded up to a batch of a fixed size)."""
        if samples < 1:
            raise UsageError(f"number of samples {samples} must be 1 or more")
        part = copy.copy(self)
        part._limit = samples if self._limit is None else min(samples, self._limit)
        part._min_samples = None if self._min_samples is None else min(samples, self._min_samples)
        return part

    def through(self, change: Callable[[Feed], Feed]) -> Samples:
        """Return the same data with a function applied to every call."""
        other = copy.copy(self)
        other._change = change
        return other

    def __iter__(self) -> Iterator[Feed]:
        """One pass in batches of ``batch_size``."""
        return self.batches()

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """One pass, with another number of samples per batch where the model takes any number.

        Raises:
            UsageError: a damaged file, an array or its values that do not fit the model, too few samples.
        """
        size = _positive(batch_size, "batch size") or self.batch_size or _BATCH
        if not self.specs:
            yield {}
            return
        unit = self._source.unit
        limit = None if self._limit is None else self._limit * unit
        cutter = Cutter(self._split_specs, size if limit is None else min(size, limit))
        num_used = 0
        for batch in cutter.batches(self._parts()):
            cropped = batch if limit is None else batch.first(limit - num_used)
            num_used += cropped.rows
            feed = self._call(cropped.feed)
            yield feed if self._change is None else self._change(feed)
            if limit is not None and num_used >= limit:
                return
        self._enough(num_used + cutter.dropped, num_used, cutter)

    def fingerprint(self, batch_size: int | None = None) -> str | None:
        """SHA-256 of the content: names, shapes, dtypes, values, batch size, image options; reads the data once.

        Of images the files are read, not the pixels. None for sources that can be read only once.
        """
        if not self._source.again:
            return None
        size = batch_size or self.batch_size or _BATCH
        digest = hashlib.sha256(repr((size, self.specs)).encode())
        if self._source.stamp is not None:
            for block in self._source.stamp(self.samples or 0):
                digest.update(block)
            return digest.hexdigest()
        for feed in self.batches(size):
            for name, array in feed.items():
                digest.update(repr((name, array.shape, array.dtype.name)).encode())
                digest.update(_content(array))
        return digest.hexdigest()

    def _call(self, feed: Feed) -> Feed:
        """Return the arrays of a call with samples along the axes where the inputs have them."""
        if not self._axes:
            return feed
        moved = {n: np.ascontiguousarray(np.moveaxis(feed[n], 0, axis)) for n, axis in self._axes.items()}
        return {**{n: array for n, array in feed.items() if n not in moved}, **moved}

    def _parts(self) -> Iterator[Arrays]:
        return (match(part, self.specs) for part in self._source.parts())

    def _enough(self, rows: int, usable: int, cutter: Cutter) -> None:
        """Raise where there is nothing to feed, or less than was asked for."""
        if not rows:
            raise UsageError("the data holds no arrays", hint=HINT)
        if not usable:
            name = next(s.name for s in self._split_specs if s.shape and s.shape[0] == cutter.fixed)
            raise too_few(cutter.place, rows, name, cutter.fixed)
        num_units = rows // self._source.unit
        if self._min_samples is not None and num_units < self._min_samples:
            raise UsageError(
                f"the data holds {num_units} samples, {self._min_samples} were asked for",
                hint=f"Give more data, or ask for fewer samples ({argument('samples')}).",
            )


def open_data(
    source: Any,
    specs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
) -> Samples:
    """Open the user's data as a stream of calls of a model with the inputs ``specs``.

    Args:
        source: a .npz file (arrays by input name), a .npy file, a folder of such files (or of one .npy per input name),
            a folder of images (or one image), an array, a mapping of input names to arrays, an iterable of arrays or
            mappings, tensors of torch, tensorflow or jax in their place, a loader of (inputs, labels), a data set that
            is indexed, or a reader like onnxruntime's ``CalibrationDataReader`` (``get_next``, and ``rewind`` where it
            has one). Axis 0 of every array is the samples; an array that lacks it is one sample. A model with one input
            takes arrays without a name; arrays that are no input are ignored beside those that are (labels). An
            iterable that gives a fresh iterator each time is iterated in every pass; of an iterator, and of a reader
            without ``rewind``, the first pass stores its samples, beyond 64 MiB in a temporary file.
        specs: inputs of the model.
        samples: exact number of samples to use, 1 or more; None: all. Required for an endless source.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.

    Floats are cast to the model's float type, integers to its integer type where every value fits; nothing else is
    cast. Files, arrays and lists are checked at once as far as shapes go, other sources while they are read.

    Raises:
        UsageError: missing, empty or damaged file, pickled objects, no samples or too few, an input without an array
            (with the nearest name), a shape, dtype or number of samples that does not fit, images for a model that
            takes none.
    """
    _positive(samples, "number of samples")
    _positive(batch_size, "batch size")
    name = str(source) if isinstance(source, (str, Path)) else "data"
    data_source = open_source(source, specs, images) if specs else Source(lambda: iter(()))
    return Samples(data_source, specs, samples, batch_size, name)


class StoredFeeds(Sequence[Feed]):
    """Calls of a model to go through again and again: small ones in memory, what is beyond in a temporary file.

    Arrays of the file are mapped anew whenever a call is asked for, and take memory as long as they are held: a pass
    that holds one call at a time takes that of one.

    Args:
        feeds: the calls.
        limit: bytes to hold in memory; None: 64 MiB.
    """

    def __init__(self, feeds: Iterable[Feed], limit: int | None = None) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._owner: StoredFeeds | None = None
        self._calls: list[dict[str, Array | _Place]] = []
        held_bytes, limit = 0, _IN_MEMORY if limit is None else limit
        for feed in feeds:
            call: dict[str, Array | _Place] = dict(feed)
            for name, array in feed.items():
                held_bytes += array.nbytes
                if held_bytes > limit and array.nbytes >= _MAPPED_FROM and not array.dtype.hasobject:
                    held_bytes -= array.nbytes
                    call[name] = _Place(self._file.seek(_ceil(self._file.tell(), _ALIGN)), array.dtype, array.shape)
                    self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._calls.append(call)
        self._file.flush()

    def part(self, indices: Iterable[int]) -> StoredFeeds:
        """Return some of the calls; nothing is copied."""
        result = copy.copy(self)
        result._calls, result._owner = [self._calls[i] for i in indices], self
        return result

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> Feed: ...

    @overload
    def __getitem__(self, index: slice) -> StoredFeeds: ...

    def __getitem__(self, index: int | slice) -> Feed | StoredFeeds:
        if isinstance(index, slice):
            return self.part(range(*index.indices(len(self))))
        return {n: v.mapped(self._file) if isinstance(v, _Place) else v for n, v in self._calls[index].items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """An array in a file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def mapped(self, file: Any) -> Array:
        """Map the array, read-only."""
        return np.asarray(np.memmap(file, self.dtype, "r", self.offset, self.shape))


def load_data(
    source: Any, specs: Sequence[InputSpec], *, limit: int = 256, batch_size: int | None = None
) -> list[Feed]:
    """Load the first ``limit`` samples of the data (at least one batch) into memory, see :func:`open_data`.

    Raises:
        UsageError: as :func:`open_data`, and values that do not fit.
    """
    return list(open_data(source, specs, batch_size=batch_size).first(limit))


def _positive(number: int | None, what: str) -> int | None:
    if number is not None and number < 1:
        raise UsageError(f"{what} {number} must be 1 or more")
    return number


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step


def _content(array: Array) -> bytes:
    """Return an array's values as bytes; strings with their lengths in front."""
    if array.dtype.kind != "O":
        return array.tobytes()
    texts = [text if isinstance(text, bytes) else str(text).encode() for text in np.ravel(array)]
    return b"".join(len(text).to_bytes(8, "little") + text for text in texts)
