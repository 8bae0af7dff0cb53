"""How far the outputs of two runs lie apart, gathered over any number of runs, and whether they vary at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from onnxprune.runtime.floats import eps, largest
from onnxprune.runtime.sessions import Array, Feed

TOLERANCE = 1e-4  # float32: rounding of sums taken in another order, a few hundred layers deep
_INTEGER_SHARE = 0.005  # of argmax-like outputs, where two floats tie
_SMALLEST_PEAK = 1e-6


@dataclass(slots=True)
class Output:
    """What was seen of one output over all batches."""

    name: str
    eps: float = 0.0
    eps_model: float = 0.0
    error: float = 0.0
    differing: int = 0
    elements: int = 0
    broken: str = ""
    low: float = math.inf
    high: float = -math.inf
    tolerance: float = 0.0
    values: set[object] = field(default_factory=set)

    @property
    def excess(self) -> float:
        """Error over tolerance; above 1 is a failure."""
        if self.broken:
            return math.inf
        share = self.differing / self.elements / _INTEGER_SHARE if self.elements else 0.0
        return max(self.error / self.tolerance, share)

    @property
    def vacuous(self) -> str:
        """Why equality of this output proves nothing, empty when it does."""
        if not self.elements:
            return "is empty"
        if self.low > self.high:
            return "has no finite value"
        peak = max(abs(self.low), abs(self.high))
        if self.eps and peak <= _SMALLEST_PEAK:
            return "is zero"
        if self.high - self.low <= self.tolerance * peak * bool(self.eps):
            return "is constant"
        return ""


def add(want: Feed, have: Feed, quantized: bool, outputs: dict[str, Output]) -> None:
    """Add one batch's outputs to what was seen."""
    for name in [*want, *(n for n in have if n not in want)]:
        output = outputs.setdefault(name, Output(name))
        if name not in want or name not in have:
            output.broken = f"only the {'reference' if name in want else 'cut model'} has it"
            continue
        a, b = want[name], have[name]
        if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
            output.broken = f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
            continue
        output.elements += a.size
        output.eps = eps(a.dtype)
        if not a.size:
            continue
        if output.eps:
            _compare_floats(output, a, b)
        else:
            _compare_integers(output, a, b, quantized)


def _compare_floats(output: Output, a: Array, b: Array) -> None:
    """Add the float difference of one array pair."""
    edge = largest(a.dtype)
    a, b = _real(a), _real(b)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        output.broken = "NaN at other places"
        return
    # masks are often the lowest finite value in place of -inf
    with np.errstate(invalid="ignore"):
        ends = (np.abs(a) >= 0.99 * edge) | (np.abs(b) >= 0.99 * edge)
        same = (np.sign(a) == np.sign(b)) & (np.minimum(np.abs(a), np.abs(b)) >= 0.9 * edge)
    if not same[ends].all():
        output.broken = "infinite or at the end of its range at other places"
        return
    finite = ~ends & ~np.isnan(a)
    if finite.any():
        a, b = a[finite], b[finite]
        peak = float(np.abs(a).max())
        output.error = max(output.error, float(np.abs(a - b).max()) / max(_SMALLEST_PEAK, peak))
        output.low, output.high = min(output.low, float(a.min())), max(output.high, float(a.max()))


def _compare_integers(output: Output, a: Array, b: Array, quantized: bool) -> None:
    """Add the number of unequal elements of one pair of integer, boolean or string arrays."""
    if quantized and a.dtype.kind in "iu" and a.dtype.itemsize == 1:
        output.differing += int((np.abs(a.astype(np.int16) - b.astype(np.int16)) > 1).sum())
    else:
        output.differing += int((a != b).sum())
    if a.dtype.kind in "iub":
        output.low, output.high = min(output.low, float(a.min())), max(output.high, float(a.max()))
    else:
        output.values |= {str(value) for value in a.ravel()[:1000]}
        output.low, output.high = 0.0, float(len(output.values) - 1)


def _real(array: Array) -> Array:
    """The array in float64, complex numbers as pairs."""
    return array.view(array.real.dtype).astype(np.float64) if array.dtype.kind == "c" else array.astype(np.float64)
