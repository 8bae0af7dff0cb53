"""Figures of single outputs: cosine, signal-to-noise, top-1, Hellinger distance; sums over batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.report.facts import OutputFidelity
from onnxprune.runtime.fidelity.kinds import Part
from onnxprune.runtime.sessions import Array, Feed, eps, measures

# Largest distance of the sum of a row from 1, per class and in machine epsilons.
_ROUNDING = 64.0


def are_probabilities(values: NDArray[Any]) -> bool:
    """Return whether rows along the last axis are probabilities of two or more classes: none below 0, sums of 1.

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
    most probable class alone. Values that are not finite, or below 0, count as 0. Le Cam and Yang, Asymptotics in
    Statistics, 2nd edition, 2000.
    """
    known = np.nan_to_num(probabilities.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return np.sqrt(np.maximum(known, 0.0))


SNR_LIMIT = 300.0  # dB; equal outputs would be infinite, which JSON cannot hold


@dataclass(slots=True)
class Sums:
    """Running sums of one output: products of original a, final b and their difference d; elements; rows of scores.

    ``apart``: squared Hellinger distances of rows of probabilities; NaN for other rows.
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
    blocks: dict[tuple[Part, int], Moments] = field(default_factory=dict)


@dataclass(slots=True)
class Moments:
    """Sums of one block of columns, centred per column at the first batch's mean, by column."""

    centre: NDArray[np.float64] | None = None
    count: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def add(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        """Add tables [samples, positions, columns]."""
        known = np.isfinite(a)
        b, clean = _finite(b), a if known.all() else np.where(known, a, 0.0)
        if self.centre is None:
            self.centre = clean.mean((0, 1)) if a.shape[0] * a.shape[1] > 1 else np.full(a.shape[-1], clean.mean())
            self.count, self.sums = np.zeros(a.shape[-1]), np.zeros((6, a.shape[-1]))
        x, y = clean - self.centre, b - self.centre
        if clean is not a:
            x, y = (np.where(known, v, 0.0) for v in (x, y))
        self.count += known.sum((0, 1))
        products = [np.einsum("spc,spc->c", *pair) for pair in ((x, x), (y, y), (x, y), (clean, clean))]
        self.sums += [x.sum((0, 1)), y.sum((0, 1)), *products]

    def cosine(self) -> float:
        """Return the cosine of the centred columns together; NaN where the original's do not change."""
        if self.centre is None:
            return math.nan
        x, y, xx, yy, xy, aa = self.sums
        number = np.maximum(self.count, 1.0)
        alone = bool((number <= 1).all())
        first, other = (float((s if alone else s - m * m / number).sum()) for s, m in ((xx, x), (yy, y)))
        both = float((xy if alone else xy - x * y / number).sum())
        if first <= 1e-9 * float(aa.sum()):
            return math.nan
        return max(-1.0, min(1.0, both / math.sqrt(first * other))) if other > 0 else 0.0


def add(want: Feed, have: Feed, sums: dict[str, Sums], blocks: Mapping[str, Sequence[Part]]) -> None:
    """Add one batch to the running sums.

    Args:
        want: outputs of the original.
        have: outputs of the final model.
        sums: by output.
        blocks: columns of an output that are centred and scaled together, by output.
    """
    for name in [*want, *(n for n in have if n not in want)]:
        array = want[name] if name in want else have[name]
        s = sums.setdefault(name, Sums(numeric=measures(array.dtype)))
        if name not in want or name not in have:
            s.broken = f"only the {'original' if name in want else 'final model'} has it"
            continue
        a, b = want[name], have[name]
        if a.shape != b.shape:
            s.broken = f"shape {list(a.shape)} became {list(b.shape)}"
        elif s.numeric:
            _add_numbers(s, a, b)
            for part in blocks.get(name, ()):
                table = part.of(want)  # of another width where the number of columns follows the sizes of a batch
                s.blocks.setdefault((part, table.shape[-1]), Moments()).add(table, part.of(have))
        else:
            s.equal += int((a == b).sum())
            s.elements += a.size


def _add_numbers(s: Sums, a: Array, b: Array) -> None:
    """Add the products of one pair of numeric arrays, and its rows' argmax when they look like logits."""
    # Codes on three axes are more likely an image than scores.
    ranks = (2, 3) if eps(a.dtype) > 0 else (2,)
    scores = a.dtype.kind != "c" and a.ndim in ranks and a.shape[-1] >= 2
    if a.dtype.kind == "c":
        a, b = a.view(a.real.dtype), b.view(b.real.dtype)
    probable = are_probabilities(a)
    a, b = a.astype(np.float64), b.astype(np.float64)
    if scores and a.size:
        order_a, order_b = ((np.where(nan, -np.inf, x) if (nan := np.isnan(x)).any() else x).argmax(-1) for x in (a, b))
        s.agree += int((order_a == order_b).sum())
        s.rows += order_a.size
    s.apart += 0.5 * float(np.square(roots(a) - roots(b)).sum()) if probable else math.nan
    known = np.isfinite(a)
    a, b = (a.ravel(), b.ravel()) if known.all() else (a[known], b[known])
    b = _finite(b)
    difference = a - b
    s.elements += a.size
    s.aa += float(a @ a)
    s.bb += float(b @ b)
    s.ab += float(a @ b)
    s.dd += float(difference @ difference)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values with 0 in place of NaN and infinity."""
    known = np.isfinite(values)
    return values if known.all() else np.where(known, values, 0.0)


def finish(name: str, s: Sums) -> OutputFidelity:
    """Compute the figures of one output from its sums."""
    if s.broken:
        return OutputFidelity(name, 0.0, -SNR_LIMIT, centred_cosine=0.0)
    if not s.numeric:
        share = s.equal / s.elements
        snr = SNR_LIMIT if share == 1 else -10 * math.log10(1 - share)
        return OutputFidelity(name, share, snr, share, centred_cosine=share)
    top1 = s.agree / s.rows if s.rows else None
    apart = None if math.isnan(s.apart) or not s.rows else min(1.0, s.apart / s.rows)
    if not s.dd:
        return OutputFidelity(name, 1.0, SNR_LIMIT, top1, apart, centred_cosine=1.0)
    cosine = s.ab / math.sqrt(s.aa) / math.sqrt(s.bb) if s.aa and s.bb else 0.0
    snr = 10 * (math.log10(s.aa) - math.log10(s.dd)) if s.aa else -SNR_LIMIT
    snr = min(SNR_LIMIT, max(-SNR_LIMIT, snr))
    cosine = min(1.0, max(-1.0, cosine))
    centred = [c for c in (moments.cosine() for moments in s.blocks.values()) if not math.isnan(c)]
    return OutputFidelity(name, cosine, snr, top1, apart, centred_cosine=min(centred, default=cosine))
