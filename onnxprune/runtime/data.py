"""The user's own inputs as a stream of calls of the model, in bounded memory, as often as there are passes."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, argument
from onnxprune.graph.binding import InputSpec
from onnxprune.runtime.batches import Cutter, Totals, too_few
from onnxprune.runtime.images import ImageOptions
from onnxprune.runtime.matching import match
from onnxprune.runtime.sessions import Array, Feed
from onnxprune.runtime.sources import Source, open_source
from onnxprune.runtime.stored import HINT, Part

_BATCH = 16


class Samples:
    """Data for a model: iterating gives its calls, one batch after the other, and every pass gives the same.

    Inputs whose leading size the model fixes get batches of that size, and samples that fill none are dropped; all
    others get ``batch_size`` (16) samples at a time, any number will do for them, and the last batch may be short.
    About one batch is in memory, besides what the source itself holds.

    Attributes:
        samples: how many one pass gives, None where the source does not tell before it was read.
        name: the data as messages and reports call it.
    """

    def __init__(
        self, source: Source, specs: Sequence[InputSpec], samples: int | None, batch_size: int | None, name: str
    ) -> None:
        self.specs, self.batch_size, self.name = tuple(specs), batch_size, name
        self._source, self._limit, self._needed = source, samples, samples
        self._totals: Totals | None = None
        if source.known and specs:
            cutter = Cutter(self.specs, batch_size or _BATCH)
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
        """The same data, but no more than this many samples of it (rounded up to a batch of a fixed size)."""
        if samples < 1:
            raise UsageError(f"number of samples {samples} must be 1 or more")
        part = copy.copy(self)
        part._limit = samples if self._limit is None else min(samples, self._limit)
        part._needed = None if self._needed is None else min(samples, self._needed)
        return part

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
        cutter = Cutter(self.specs, size if limit is None else min(size, limit))
        used = 0
        for batch in cutter.batches(self._parts()):
            short = batch if limit is None else batch.first(limit - used)
            used += short.rows
            yield short.feed
            if limit is not None and used >= limit:
                return
        self._enough(used + cutter.dropped, used, cutter)

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

    def _parts(self) -> Iterator[Part]:
        return (match(part, self.specs) for part in self._source.parts())

    def _enough(self, rows: int, usable: int, cutter: Cutter) -> None:
        """Raise where there is nothing to feed, or less than was asked for."""
        if not rows:
            raise UsageError("the data holds no arrays", hint=HINT)
        if not usable:
            name = next(spec.name for spec in self.specs if spec.shape and spec.shape[0] == cutter.fixed)
            raise too_few(cutter.place, rows, name, cutter.fixed)
        have = rows // self._source.unit
        if self._needed is not None and have < self._needed:
            raise UsageError(
                f"the data holds {have} samples, {self._needed} were asked for",
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
    """The user's data as a stream of calls of a model with the inputs ``specs``.

    Args:
        source: a .npz file (arrays by input name), a .npy file, a folder of such files (or of one .npy per input name),
            a folder of images (or one image), an array, a mapping of input names to arrays, an iterable of arrays or
            mappings, or a reader like onnxruntime's ``CalibrationDataReader`` (``get_next``, and ``rewind`` where it
            has one). Axis 0 of every array is the samples; an array that lacks it is one sample. A model with one
            input takes arrays without a name; arrays that are no input are ignored beside those that are (labels).
            An iterable that gives a fresh iterator each time is iterated in every pass; of an iterator, and of a
            reader without ``rewind``, the first pass keeps what it reads, beyond 64 MiB in a temporary file.
        samples: use this many, no more and no less; None: all. Give it for a source without an end.
        batch_size: samples per call where the model leaves that open; 16.
        images: how images become arrays.

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
    opened = open_source(source, specs, images) if specs else Source(lambda: iter(()))
    return Samples(opened, specs, samples, batch_size, name)


def load_data(
    source: Any, specs: Sequence[InputSpec], *, limit: int = 256, batch_size: int | None = None
) -> list[Feed]:
    """The first ``limit`` samples of the data (at least one batch) in memory, see :func:`open_data`.

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
    """An array's values as bytes; strings with their lengths in front."""
    if array.dtype.kind != "O":
        return array.tobytes()
    texts = [text if isinstance(text, bytes) else str(text).encode() for text in np.ravel(array)]
    return b"".join(len(text).to_bytes(8, "little") + text for text in texts)
