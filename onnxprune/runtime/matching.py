"""The user's arrays against the inputs of a model: names, shapes, dtypes, values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, nearest
from onnxprune.graph.probes import InputSpec
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
    result = {spec.name: _with_samples(part[spec.name], spec) for spec in specs}
    for spec in specs:
        _check(result[spec.name], spec)
    # An empty cache is data; nothing but empty arrays is not.
    if all(0 in rows.shape for rows in result.values()):
        rows = next(iter(result.values()))
        raise UsageError(f"{rows.place} holds no numbers: its shape is {list(rows.shape)}")
    return result


def _with_samples(rows: Rows, spec: InputSpec) -> Rows:
    """Return the array with axis 0 as samples: an array one rank short of its input is one sample."""
    if len(rows.shape) != len(spec.shape) - 1:
        return rows
    return Rows((1, *rows.shape), rows.dtype, lambda _: iter([rows.read()[None]]), rows.place)


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
    """Whether these are the bytes of a bfloat16 or float8 array: numpy's files forget the type and keep the width."""
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
