"""The user's arrays against the inputs of a model: names, shapes, dtypes, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, permutations, repeat
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest
from onnxprune.graph.probes import InputSpec, format_shape, inner_sample_axes
from onnxprune.runtime.arrays import HINT, UNNAMED, Arrays, Rows
from onnxprune.runtime.sessions import Array, eps

_CASTS = (
    "Floats are cast to floats and integers to integers; anything else (scaling pixels, say) has to be done before."
)


def match(part: Mapping[str, Rows], specs: Sequence[InputSpec]) -> Arrays:
    """Match an array to every input, its shape and dtype checked; other arrays are left out.

    Raises:
        UsageError: an input without an array (with the nearest name), a shape or dtype that does not fit.
    """
    if len(specs) == 1 and len(part) == 1 and UNNAMED in part:
        part = {specs[0].name: part[UNNAMED]}
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in part]
    if missing:
        unexpected = [name for name in part if name not in names]
        if not unexpected:
            raise UsageError(f"data has no array for input {missing[0]!r}", hint=HINT)
        raise UsageError(
            f"data has array {unexpected[0]!r}, which is no input, and none for input {missing[0]!r}",
            hint=nearest(unexpected[0], names),
        )
    axes = inner_sample_axes(specs)
    result = {spec.name: _with_samples(part[spec.name], spec, axes.get(spec.name, 0)) for spec in specs}
    for spec in specs:
        _check(result[spec.name], spec)
    # An empty cache is data; nothing but empty arrays is not.
    if all(0 in rows.shape for rows in result.values()):
        rows = next(iter(result.values()))
        raise UsageError(f"{rows.place} holds no numbers: its shape is {list(rows.shape)}")
    return _samples_first(result, specs, axes) if axes else result


def _with_samples(rows: Rows, spec: InputSpec, axis: int) -> Rows:
    """Return the array with an axis of samples: an array one rank short of its input is one sample."""
    if len(rows.shape) != len(spec.shape) - 1:
        return rows
    shape = (*rows.shape[:axis], 1, *rows.shape[axis:])
    return Rows(shape, rows.dtype, lambda _: iter([rows.read().reshape(shape)]), rows.place)


def spec_samples_first(spec: InputSpec, axis: int) -> InputSpec:
    """Return the input with its axis of samples in front."""
    return replace(spec, shape=(spec.shape[axis], *spec.shape[:axis], *spec.shape[axis + 1 :])) if axis else spec


def _samples_first(arrays: Arrays, specs: Sequence[InputSpec], axes: Mapping[str, int]) -> Arrays:
    """Return the arrays with the samples of states in front too, and one state for all samples repeated.

    States of several calls stand one behind the other along their first axis, as joined recordings give them. Arrays
    that are all cut to one number of rows then hold whole states for the first samples only, which are taken.

    Raises:
        UsageError: a state lacks some of its rows.
    """
    lengths = {rows.shape[0] for rows in arrays.values() if rows.shape}
    result = dict(arrays)
    for spec in specs:
        if spec.name in axes:
            result[spec.name] = _state_by_sample(arrays[spec.name], spec, axes[spec.name])
    samples = max((arrays[s.name].shape[0] for s in specs if s.name not in axes and arrays[s.name].shape), default=1)
    states = {name: result[name].shape[0] for name in axes}
    least = min(states.values())
    for name, rows in result.items():
        if states.get(name) == 1 < samples:
            result[name] = _repeated(rows, samples)
        elif rows.shape and len(lengths) == 1 and 1 < least < rows.shape[0]:
            result[name] = replace(rows, shape=(least, *rows.shape[1:]), chunks=_first(rows, least))
    return result


def _state_by_sample(rows: Rows, spec: InputSpec, axis: int) -> Rows:
    """Return an array [calls * layers, ..., samples, ...], of an input [layers, ..., samples, ...], samples first."""
    layers = spec.shape[0]
    assert isinstance(layers, int)
    calls, each = rows.shape[0] // layers, rows.shape[axis]
    if not calls:
        raise UsageError(
            f"{rows.place} has shape {list(rows.shape)}; input {spec.name!r} takes {format_shape(spec.shape)}",
            hint=f"Axis 0 holds {layers} rows of every state, axis {axis} the samples.",
        )

    def chunks(number: int) -> Iterator[Array]:
        remainder: Array | None = None
        for part in rows.chunks(layers * max(1, number // each)):
            num_states = len(part) // layers
            states = np.moveaxis(part[: num_states * layers].reshape(num_states, layers, *part.shape[1:]), axis + 1, 1)
            states = states.reshape(num_states * each, *states.shape[2:])
            states = states if remainder is None else np.concatenate([remainder, states])
            for start in range(0, len(states) - number + 1, number):
                yield states[start : start + number]
            remainder = states[len(states) // number * number :]
        if remainder is not None and len(remainder):
            yield remainder

    others = (n for a, n in enumerate(rows.shape) if a not in (0, axis))
    return Rows((calls * each, layers, *others), rows.dtype, chunks, rows.place)


def _repeated(rows: Rows, samples: int) -> Rows:
    """Return one sample repeated."""

    def chunks(number: int) -> Iterator[Array]:
        one = rows.read()
        full, short = divmod(samples, number)
        sizes = chain(repeat(number, full), (short,) * bool(short))
        return (np.repeat(one, size, axis=0) for size in sizes)

    return replace(rows, shape=(samples, *rows.shape[1:]), chunks=chunks)


def _first(rows: Rows, samples: int) -> Callable[[int], Iterator[Array]]:
    """Return a reader of the first samples."""

    def chunks(number: int) -> Iterator[Array]:
        remaining = samples
        for part in rows.chunks(number):
            yield part[:remaining]
            remaining -= len(part)
            if remaining <= 0:
                return

    return chunks


def _check(rows: Rows, spec: InputSpec) -> None:
    """Shape (but for the number of samples) and kind of dtype fit the input."""
    if spec.scalar and len(rows.shape) > 1:
        allowed = "one number, or one per sample"
        raise UsageError(f"{rows.place} has shape {list(rows.shape)}; input {spec.name!r} takes {allowed}")
    # the empty shape of a spec may be an unknown rank
    has_rank = not spec.shape or len(rows.shape) == len(spec.shape)
    pairs = list(zip(rows.shape, spec.shape, strict=False))[1:]
    if not has_rank or any(
        isinstance(expected_size, int) and expected_size != actual_size for actual_size, expected_size in pairs
    ):
        allowed = ", ".join("?" if dim is None else str(dim) for dim in ("samples", *spec.shape[1:]))
        raise UsageError(
            f"{rows.place} has shape {list(rows.shape)}; input {spec.name!r} needs [{allowed}]",
            hint=_transposition(rows.shape, spec.shape) if has_rank else "",
        )
    if rows.shape[:1] == (0,):
        raise UsageError(f"{rows.place} holds no samples: its shape is {list(rows.shape)}")
    if not _castable(rows.dtype, spec.dtype):
        allowed = "strings" if spec.dtype.kind == "O" else str(spec.dtype)
        raise UsageError(f"{rows.place} has dtype {rows.dtype}; input {spec.name!r} needs {allowed}", hint=_CASTS)


def _transposition(shape: Sequence[int], expected: Sequence[int | str | None]) -> str:
    """Return a hint where the axes behind the samples only stand in another order, as in pictures; else nothing."""
    axes = range(1, len(shape))
    free = [not isinstance(size, int) for size in expected]
    orders = [o for o in permutations(axes) if all(free[i] or expected[i] == shape[o[i - 1]] for i in axes)]
    # channels first or last: the order of the other axes stays
    orders = [order for order in orders if order[1:] == tuple(axes)[:-1] or order[:-1] == tuple(axes)[1:]]
    if len(shape) < 3 or len(orders) != 1:
        return ""
    return f"The axes fit in another order: array.transpose({', '.join(map(str, (0, *orders[0])))})."


def _kind(dtype: np.dtype[Any]) -> str:
    """``f`` for every float type, narrow ones included, ``i`` for integers, ``s`` for text, else numpy's own letter."""
    if dtype.kind in "iu":
        return "i"
    if dtype.kind in "OUS":
        return "s"
    return "f" if dtype.kind != "c" and eps(dtype) else dtype.kind


def _raw(actual: np.dtype[Any], expected: np.dtype[Any]) -> bool:
    """Return whether these are bytes of a bfloat16 or float8 array: numpy's files store the width, not the type."""
    return (
        _kind(actual) == "V" and actual.names is None and expected.kind == "V" and actual.itemsize == expected.itemsize
    )


def _castable(actual: np.dtype[Any], expected: np.dtype[Any]) -> bool:
    return _raw(actual, expected) or _kind(actual) == _kind(expected)


def cast(array: Array, spec: InputSpec, place: str, first: int | None = None) -> Array:
    """Cast the array to the input's dtype.

    Args:
        array: values of one or several samples.
        spec: the input that takes them.
        place: name of the array in messages.
        first: number of the first sample in ``array``, counted from 0; None where axis 0 is not the samples.

    Raises:
        UsageError: numbers that do not fit, NaN or infinity.
    """
    if _raw(array.dtype, spec.dtype):
        array = np.ascontiguousarray(array).view(spec.dtype)
    _check_finite(array, spec, place, first)
    if array.dtype == spec.dtype:
        return np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", errors="replace")
    target_text = f"input {spec.name!r} ({spec.dtype})"
    if spec.dtype.kind in "iu" and array.size:
        info = np.iinfo(spec.dtype)
        low, high = int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            raise UsageError(f"{place} holds values {low}..{high}; {target_text} takes {info.min}..{info.max}")
    with np.errstate(over="ignore"):
        result: Array = np.ascontiguousarray(array.astype(spec.dtype)).reshape(array.shape)
    if _kind(spec.dtype) == "f" and not np.array_equal(np.isfinite(result), np.isfinite(array)):
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise UsageError(f"{place} holds values up to {largest:g}, too large for {target_text}")
    return result


def _check_finite(array: Array, spec: InputSpec, place: str, first: int | None) -> None:
    """Reject NaN and infinity: outputs that depend on them can neither be scored nor compared.

    An additive mask may hold minus infinity, which hides a position.

    Raises:
        UsageError: there are some; with the input, the sample and how many.
    """
    if _kind(array.dtype) not in ("f", "c"):
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    if "mask" in spec.name.lower() and not np.isnan(array).any() and bool((array[~finite] < 0).all()):
        return
    what = "NaN" if np.isnan(array).any() else "infinity"
    bad_rows = np.flatnonzero(~finite.reshape(len(array), -1).all(axis=1)) if first is not None and array.ndim else None
    sample = f" in sample {(first or 0) + int(bad_rows[0])}" if bad_rows is not None else ""
    raise UsageError(
        f"{place} holds {what}{sample} ({int((~finite).sum())} of the {finite.size} values read are not finite); "
        f"input {spec.name!r} takes finite numbers",
        hint="Remove those samples or correct their preparation; in a mask, -1e9 acts like minus infinity.",
    )
