"""Fidelity: how close the outputs of two models are, batch by batch, without keeping any output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.report.facts import Fidelity, OutputFidelity
from onnxprune.runtime.sessions import Array, Feed, Openable, Progress, eps, measures, open_session, run

# How far a row may be from adding up to 1, per class and in machine epsilons.
_ROUNDING = 64.0


def are_probabilities(values: NDArray[Any]) -> bool:
    """Whether rows along the last axis are probabilities of two or more classes: none below 0, all adding up to 1.

    Args:
        values: [samples, classes] or [samples, positions, classes], float; of another rank they are no class scores.
    """
    least = eps(values.dtype)
    if values.ndim not in (2, 3) or values.dtype.kind == "c" or not least or values.shape[-1] < 2 or not values.size:
        return False
    with np.errstate(invalid="ignore", over="ignore"):
        low, sums = values.min(), values.sum(axis=-1, dtype=np.float64)
    within = min(0.01, _ROUNDING * least * values.shape[-1])
    return bool(low >= 0 and np.abs(sums - 1.0).max() <= within)


def roots(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Square roots of probabilities, in float64: their squared distance, halved, is the squared Hellinger distance.

    H^2(p, q) = 1/2 sum_c (p_c^1/2 - q_c^1/2)^2, from 0 to 1. Unlike a difference of probabilities it does not go by the
    most probable class alone. What is not finite, or below 0, counts as 0. Le Cam and Yang, Asymptotics in Statistics,
    2nd edition, 2000.
    """
    known = np.nan_to_num(probabilities.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return np.sqrt(np.maximum(known, 0.0))


_SNR_LIMIT = 300.0  # dB; equal outputs would be infinite, which JSON cannot hold


@dataclass(slots=True)
class _Sums:
    """Running sums of one output: products of original a, final b and their difference d; elements; rows of scores.

    ``apart``: squared Hellinger distances of rows of probabilities; NaN for what is none.
    """

    numeric: bool
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    equal: int = 0
    elements: int = 0
    agree: int = 0
    rows: int = 0
    apart: float = 0.0
    broken: str = ""


def fidelity(
    original: Openable,
    final: Openable,
    feeds: Iterable[Feed],
    source: str = "synthetic",
    *,
    together: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Compare the final model with the original on ``feeds``, output by output, over all batches together.

    Cosine is ``a·b / (|a| |b|)`` and signal-to-noise ``10 log10(|a|² / |a - b|²)`` in dB (within ±300), in float64.
    Where rows of the original are class probabilities, their Hellinger distance is told as well: see
    :mod:`onnxprune.runtime.fidelity`. Top-1 is the share of rows with the same argmax over the last axis, for
    float outputs of rank 2 or 3 whose last axis has 2 or more entries. Positions where the original is not finite are
    left out; where only the final model is not, its value counts as 0. For integers wider than 8 bits, booleans and
    strings (classes, indices) cosine and top-1 are the share of equal elements. An output whose shape or presence
    differs counts as cosine 0 (``note`` says so).
    With ``together`` both models are open at once and outputs are compared batch by batch; without, the original's
    outputs are kept and only one model is in memory at a time, for which ``feeds`` is iterated twice.

    Raises:
        ModelError: one of the models does not load or run.
    """
    sums: dict[str, _Sums] = {}
    total, samples = len(feeds) if isinstance(feeds, Sized) else 0, 0
    before: Any = open_session(original, threads=threads)
    kept: Iterable[Feed | None] = repeat(None)
    if not together:
        kept = [run(before, feed) for feed in feeds]
        before = None
    after = open_session(final, threads=threads)
    for index, (feed, want) in enumerate(zip(feeds, kept, strict=False)):
        _add(run(before, feed) if want is None else want, run(after, feed), sums)
        samples += next((int(array.shape[0]) for array in feed.values() if array.ndim), 1)
        if progress and total:
            progress("fidelity", (index + 1) / total)
    notes = [f"{name}: {s.broken}" for name, s in sums.items() if s.broken]
    silent = [name for name, s in sums.items() if not s.elements and not s.broken]
    if silent:
        notes.append(f"left out, the original has no finite value there: {', '.join(silent[:6])}")
    outputs = [_finish(name, s) for name, s in sums.items() if name not in silent]
    if not outputs:
        notes.append("no output could be compared")
    return Fidelity(outputs, samples, source, "; ".join(notes))


def _add(want: Feed, have: Feed, sums: dict[str, _Sums]) -> None:
    """Add one batch to the running sums."""
    for name in [*want, *(n for n in have if n not in want)]:
        array = want[name] if name in want else have[name]
        s = sums.setdefault(name, _Sums(numeric=measures(array.dtype)))
        if name not in want or name not in have:
            s.broken = f"only the {'original' if name in want else 'final model'} has it"
            continue
        a, b = want[name], have[name]
        if a.shape != b.shape:
            s.broken = f"shape {list(a.shape)} became {list(b.shape)}"
        elif s.numeric:
            _add_numbers(s, a, b)
        else:
            s.equal += int((a == b).sum())
            s.elements += a.size


def _add_numbers(s: _Sums, a: Array, b: Array) -> None:
    """Add the products of one pair of numeric arrays, and its rows' argmax when they look like logits."""
    # Codes on three axes are more likely an image than scores.
    ranks = (2, 3) if eps(a.dtype) > 0 else (2,)
    scores = a.dtype.kind != "c" and a.ndim in ranks and a.shape[-1] >= 2
    if a.dtype.kind == "c":
        a, b = a.view(a.real.dtype), b.view(b.real.dtype)
    probable = are_probabilities(a)
    a, b = a.astype(np.float64), b.astype(np.float64)
    if scores and a.size:
        order_a, order_b = (np.where(np.isnan(x), -np.inf, x).argmax(-1) for x in (a, b))
        s.agree += int((order_a == order_b).sum())
        s.rows += order_a.size
    s.apart += 0.5 * float(np.square(roots(a) - roots(b)).sum()) if probable else math.nan
    known = np.isfinite(a)
    a, b = a[known], b[known]
    b = np.where(np.isfinite(b), b, 0.0)
    s.elements += a.size
    s.aa += float(a @ a)
    s.bb += float(b @ b)
    s.ab += float(a @ b)
    s.dd += float((a - b) @ (a - b))


def _finish(name: str, s: _Sums) -> OutputFidelity:
    """Compute the figures of one output from its sums."""
    if s.broken:
        return OutputFidelity(name, 0.0, -_SNR_LIMIT)
    if not s.numeric:
        share = s.equal / s.elements
        snr = _SNR_LIMIT if share == 1 else -10 * math.log10(1 - share)
        return OutputFidelity(name, share, snr, share)
    top1 = s.agree / s.rows if s.rows else None
    apart = None if math.isnan(s.apart) or not s.rows else min(1.0, s.apart / s.rows)
    if not s.dd:
        return OutputFidelity(name, 1.0, _SNR_LIMIT, top1, apart)
    cosine = s.ab / math.sqrt(s.aa) / math.sqrt(s.bb) if s.aa and s.bb else 0.0
    snr = 10 * (math.log10(s.aa) - math.log10(s.dd)) if s.aa else -_SNR_LIMIT
    snr = min(_SNR_LIMIT, max(-_SNR_LIMIT, snr))
    return OutputFidelity(name, min(1.0, max(-1.0, cosine)), snr, top1, apart)
