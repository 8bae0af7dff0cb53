"""The user's own inputs: arrays from files and mappings (see ``stored``), matched to a model, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest
from onnxprune.graph.binding import InputSpec
from onnxprune.runtime.floats import eps
from onnxprune.runtime.sessions import Array, Feed
from onnxprune.runtime.stored import HINT, UNNAMED, Rows, by_stem, joined, read_parts

_BATCH = 16
_CASTS = (
    "Floats are cast to floats and integers to integers; anything else (scaling pixels, say) has to be done before."
)


def load_data(
    source: str | Path | Array | Mapping[str, Array] | Iterable[Mapping[str, Array]],
    specs: Sequence[InputSpec],
    *,
    limit: int = 256,
    batch_size: int | None = None,
) -> list[Feed]:
    """The user's data as calls of the model; no more than ``limit`` samples (at least one batch) are read into memory.

    ``source`` is a .npz file (arrays by input name), a .npy file, a folder of such files (or of one .npy per input
    name), an array, a mapping of input names to arrays or an iterable of them. Axis 0 of every array is the samples;
    an array that lacks it is one sample. A model with one input takes a single array without a name; arrays that are
    no input are ignored beside those that are (labels). Batches have the input's fixed leading size, else
    ``batch_size`` (16). Scalars, and arrays that fill a fully fixed input while other inputs hold more, go into every
    batch. Floats are cast to the model's float type, integers to its integer type where every value fits; nothing else
    is cast.

    Raises:
        UsageError: missing, empty or damaged file, pickled objects, no samples, an input without an array (with the
            nearest name), a shape, dtype or number of samples that does not fit.
    """
    if limit < 1 or (batch_size is not None and batch_size < 1):
        raise UsageError(f"data limit {limit} and batch size {batch_size} must be 1 or more")
    if not specs:
        return [{}]
    batches: list[Feed] = []
    left = limit
    for part in _parts(source, specs):
        feeds, used = _split(part, specs, left, batch_size)
        batches += feeds
        left -= used
        if left <= 0:
            break
    if not batches:
        raise UsageError("the data holds no arrays", hint=HINT)
    return batches


def _parts(source: Any, specs: Sequence[InputSpec]) -> Iterator[dict[str, Rows]]:
    """Sets of arrays by input name; the files of a folder as one set where they fit together."""
    named = by_stem(source, [spec.name for spec in specs])
    if named is not None:
        yield _match(named, specs)
        return
    if not isinstance(source, (str, Path)):
        yield from (_match(part, specs) for part in read_parts(source))
        return
    parts = [_match(part, specs) for part in read_parts(source)]
    tails = {tuple((rows.shape[1:], rows.dtype) for rows in part.values()) for part in parts}
    if len(parts) > 1 and len(tails) == 1 and all(rows.shape for rows in parts[0].values()):
        yield {name: joined([part[name] for part in parts]) for name in parts[0]}
    else:
        yield from parts


def _match(part: Mapping[str, Rows], specs: Sequence[InputSpec]) -> dict[str, Rows]:
    """The array of every input, its shape and dtype checked."""
    if len(specs) == 1 and len(part) == 1 and UNNAMED in part:
        part = {specs[0].name: part[UNNAMED]}
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in part]
    if missing:
        strangers = [name for name in part if name not in names]
        if not strangers:
            raise UsageError(f"data has no array for input {missing[0]!r}", hint=HINT)
        raise UsageError(
            f"data has array {strangers[0]!r}, which is no input, and none for input {missing[0]!r}",
            hint=nearest(strangers[0], names),
        )
    matched = {spec.name: _with_samples(part[spec.name], spec) for spec in specs}
    for spec in specs:
        _check(matched[spec.name], spec)
    return matched


def _with_samples(rows: Rows, spec: InputSpec) -> Rows:
    """The array with axis 0 as samples: an array one rank short of its input is one sample."""
    if len(rows.shape) != len(spec.shape) - 1:
        return rows
    return Rows((1, *rows.shape), rows.dtype, lambda _: rows.read(max(rows.shape, default=1))[None], rows.place)


def _check(rows: Rows, spec: InputSpec) -> None:
    """Shape (but for the number of samples) and kind of dtype fit the input."""
    # the empty shape of a spec may be an unknown rank
    fits = not spec.shape or len(rows.shape) == len(spec.shape)
    pairs = list(zip(rows.shape, spec.shape, strict=False))[1:]
    if not fits or any(isinstance(want, int) and want != have for have, want in pairs):
        wanted = ", ".join("?" if dim is None else str(dim) for dim in ("samples", *spec.shape[1:]))
        raise UsageError(f"{rows.place} has shape {list(rows.shape)}; input {spec.name!r} needs [{wanted}]")
    if 0 in rows.shape:
        raise UsageError(f"{rows.place} holds no samples: its shape is {list(rows.shape)}")
    if not _castable(rows.dtype, spec.dtype):
        wanted = "strings" if spec.dtype.kind == "O" else str(spec.dtype)
        raise UsageError(f"{rows.place} has dtype {rows.dtype}; input {spec.name!r} needs {wanted}", hint=_CASTS)


def _kind(dtype: np.dtype[Any]) -> str:
    """``f`` for every float type, narrow ones included, ``i`` for integers, ``s`` for text, else numpy's own letter."""
    if dtype.kind in "iu":
        return "i"
    if dtype.kind in "OUS":
        return "s"
    return "f" if dtype.kind != "c" and eps(dtype) else dtype.kind


def _raw(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Whether these are the bytes of a bfloat16 or float8 array: numpy's files forget the type and keep the width."""
    return _kind(have) == "V" and have.names is None and want.kind == "V" and have.itemsize == want.itemsize


def _castable(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    return _raw(have, want) or _kind(have) == _kind(want)


def _cast(array: Array, spec: InputSpec, place: str) -> Array:
    """The array in the input's dtype; numbers that do not fit are an error."""
    if _raw(array.dtype, spec.dtype):
        array = np.ascontiguousarray(array).view(spec.dtype)
    if array.dtype == spec.dtype:
        return np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", errors="replace")
    takes = f"input {spec.name!r} ({spec.dtype})"
    if spec.dtype.kind in "iu":
        info = np.iinfo(spec.dtype)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise UsageError(f"{place} holds values {low}..{high}; {takes} takes {info.min}..{info.max}")
    with np.errstate(over="ignore"):
        cast: Array = np.ascontiguousarray(array.astype(spec.dtype)).reshape(array.shape)
    if _kind(spec.dtype) == "f" and not np.array_equal(np.isfinite(cast), np.isfinite(array)):
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise UsageError(f"{place} holds values up to {largest:g}, too large for {takes}")
    return cast


def _split(
    part: Mapping[str, Rows], specs: Sequence[InputSpec], limit: int, batch_size: int | None
) -> tuple[list[Feed], int]:
    """One set of arrays as batches of no more than ``limit`` samples together, and the number of samples used."""
    steps, count = _steps(part, specs, batch_size)
    count = min(count, -(-limit // max(steps.values(), default=limit)))
    # only where every leading size is free can the last batch be cut short
    free = not any(spec.shape and isinstance(spec.shape[0], int) for spec in specs if spec.name in steps)
    feeds: list[Feed] = [{} for _ in range(count)]
    used = 1
    for spec in specs:
        rows, step = part[spec.name], steps.get(spec.name)
        if step is None:
            whole = _cast(rows.read(max(rows.shape, default=1)), spec, rows.place)
            for feed in feeds:
                feed[spec.name] = whole
            continue
        array = _cast(rows.read(min(count * step, limit) if free else count * step), spec, rows.place)
        used = max(used, len(array))
        for index, feed in enumerate(feeds):
            feed[spec.name] = array[index * step : (index + 1) * step]
    return feeds, used


def _steps(part: Mapping[str, Rows], specs: Sequence[InputSpec], batch_size: int | None) -> tuple[dict[str, int], int]:
    """Rows per batch for every input that is split, and the number of batches."""
    split = [spec for spec in specs if part[spec.name].shape and (spec.shape or len(specs) == 1)]
    samples = {spec.name: part[spec.name].shape[0] for spec in split}
    fixed = {spec.name: spec.shape[0] for spec in split if spec.shape and isinstance(spec.shape[0], int)}
    for name, size in fixed.items():
        if samples[name] < size:
            raise UsageError(f"{part[name].place} has {samples[name]} samples; input {name!r} takes {size} at a time")
    whole = {spec.name for spec in split if part[spec.name].shape == spec.shape}
    if any(name not in whole and n > fixed.get(name, 1) for name, n in samples.items()):
        samples = {name: n for name, n in samples.items() if name not in whole}
        fixed = {name: size for name, size in fixed.items() if name not in whole}
    if not samples:
        return {}, 1
    if not fixed:
        _same(samples, "samples")
        step = min(batch_size or _BATCH, *samples.values())
        return dict.fromkeys(samples, step), -(-next(iter(samples.values())) // step)
    calls = {name: samples[name] // size for name, size in fixed.items()}
    _same(calls, "batches of samples")
    count = next(iter(calls.values()))
    return {name: fixed.get(name) or _step_beside(name, samples, fixed, count) for name in samples}, count


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
        shown = ", ".join(f"{name!r}: {n}" for name, n in sorted(counts.items())[:6])
        raise UsageError(f"data holds different numbers of {what} per input: {shown}")
