"""Compare the outputs of two models: exactness of a removal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from onnxprune.errors import ModelError
from onnxprune.report.facts import Exactness
from onnxprune.runtime.fidelity import fidelity
from onnxprune.runtime.sessions import Array, Feed, Openable, Progress, at_sizes_of, eps, largest, open_session, run

TOLERANCE = 1e-4  # float32: rounding of sums taken in another order, a few hundred layers deep
_INTEGER_SHARE = 0.005  # of argmax-like outputs, where two floats tie
_SMALLEST_PEAK = 1e-6
_SMALL_PEAK = 1e-5  # of outputs that a unit of the last place of 1 decides


@dataclass(slots=True)
class Output:
    """Differences of one output over all batches."""

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
    def peak(self) -> float:
        """The largest magnitude; infinite where no value is finite."""
        return max(abs(self.low), abs(self.high))

    @property
    def vacuous(self) -> str:
        """The reason why equality of this output proves nothing, or an empty string."""
        if not self.elements:
            return "is empty"
        if self.low > self.high:
            return "has no finite value"
        if self.eps and self.peak <= _SMALLEST_PEAK:
            return "is zero"
        if self.high - self.low <= self.tolerance * self.peak * bool(self.eps):
            return "is constant"
        return ""


def add(expected: Feed, actual: Feed, quantized: bool, outputs: dict[str, Output]) -> None:
    """Add the differences of one batch."""
    for name in [*expected, *(n for n in actual if n not in expected)]:
        output = outputs.setdefault(name, Output(name))
        if name not in expected or name not in actual:
            output.broken = f"only the {'reference' if name in expected else 'cut model'} has it"
            continue
        a, b = expected[name], actual[name]
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
    """Return the array in float64, complex numbers as pairs."""
    return array.view(array.real.dtype).astype(np.float64) if array.dtype.kind == "c" else array.astype(np.float64)


def varying_outputs(model: Openable, feeds: Sequence[Feed]) -> set[str]:
    """Return the outputs that vary, within one run or between runs, by more than the tolerance of ``exactness``.

    Raises:
        ModelError: the model does not load or run.
    """
    session = open_session(model, optimize=False)
    outputs_seen: dict[str, Output] = {}
    for feed in feeds:
        _add_outputs(run(session, feed), outputs_seen)
    return {name for name, output in outputs_seen.items() if not output.vacuous}


def find_varying_feeds(
    model: Openable, idle: Iterable[str], feeds: Sequence[Feed], others: Iterable[Feed]
) -> list[Feed]:
    """Return the feeds of ``others`` on which outputs of ``idle`` differ from ``feeds``, until all outputs vary."""
    session = open_session(model, optimize=False)
    outputs_by_name: dict[str, Output] = {}
    for feed in feeds:
        _add_outputs(run(session, feed), outputs_by_name)
    constant_names = {name for name in idle if name in outputs_by_name}
    selected = []
    for feed in others:
        try:
            _add_outputs(run(session, feed), outputs_by_name)
        except ModelError:  # values that this model cannot take
            continue
        varying_names = {name for name in constant_names if not outputs_by_name[name].vacuous}
        if varying_names:
            selected.append(feed)
            constant_names -= varying_names
        if not constant_names:
            break
    return selected


def _add_outputs(outputs: Feed, outputs_by_name: dict[str, Output]) -> None:
    add(outputs, outputs, False, outputs_by_name)
    for output in outputs_by_name.values():
        output.tolerance = max(TOLERANCE, 4 * output.eps)


__all__ = ["Comparison", "Rounding", "compare_models", "exactness", "fidelity", "noise_floor"]

_CAP = 1e-2  # what a model's own sensitivity may raise the tolerance to
_QUANTIZED_CAP = 5e-2  # one rounding flip of an 8-bit activation is already a step of 1/255
_FLOOR_FACTOR = 10.0
HELD_SUFFIX = "__held"
"""Suffix of inputs that are not disturbed: held choices of operators, see :mod:`onnxprune.pruning.holding`."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """Differences that the arithmetic of two models explains.

    Attributes:
        base: the tolerance of float32.
        quantized: the models compute in integers of 8 bits, too.
        eps: the epsilon of the coarsest float type on the way to a tensor, by name.
    """

    base: float = TOLERANCE
    quantized: bool = False
    eps: Mapping[str, float] = field(default_factory=dict)

    def of(self, output: str) -> float:
        """Return the epsilon on the way to an output, which may be a tensor under a name that was made for it."""
        return self.eps.get(output) or self.eps.get(re.split("__(?:seen|made|survivors|mask_)", output)[0], 0.0)


_FLOAT32 = Rounding()
_COMPUTED_SUFFIX, _EQUAL = "__made", 1e-9  # what is made of the same values by the same operator


class Comparison(NamedTuple):
    """A comparison of two models: the facts, and why equality proves nothing of some of the shared ``outputs``.

    ``failed`` names the outputs that differ by more than is allowed, ``uncertain`` those of them whose own rounding
    differs by as much, so that their values decide nothing: a sigmoid of -12, whose last bit is a percent of it.
    """

    facts: Exactness
    idle: dict[str, str]
    outputs: int
    failed: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()

    def noted(self) -> Exactness:
        """Return the facts with a note that names the outputs on which equality proves nothing."""
        if not self.idle:
            return self.facts
        names = [f"{name} {reason}" for name, reason in self.idle.items()]
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        proves = "nothing" if len(names) == self.outputs else "little"
        note = f"equality proves {proves} where an output does not vary: {listed}"
        return replace(self.facts, note=f"{self.facts.note}; {note}" if self.facts.note else note)


def exactness(
    reference: Openable,
    cut: Openable,
    feeds: Sequence[Feed],
    *,
    tolerance: float | None = None,
    quantized: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Exactness:
    """Compare the pruned model with the reference (the masked original) on every batch of ``feeds``.

    Both run with graph optimisations off, one after the other, so that only one model is in memory. Per output and
    batch the error is ``max|a - b| / max(1e-6, max|a|)`` over the finite positions. NaN and infinities (values at the
    end of the type's range count as such) must sit at the same places; shapes and names must agree. Integers, booleans
    and strings must be equal but for a share of 0.005 of an output's elements; 8-bit ones of a ``quantized`` model
    (one with QuantizeLinear or the like) may differ by one step anywhere.

    Without ``tolerance``, 1e-4 is allowed, or four times the epsilon of the coarsest float type of inputs and output.
    Where that is exceeded, ten times the reference's ``noise_floor`` is, up to 1e-2 (quantized 5e-2) or 16 epsilons.

    Returns:
        ``passed`` is False too when the cut model does not load or run (``note`` says why, the error is infinite), None
        when nothing could be compared. ``note`` names outputs on which equality proves nothing (constant, zero, NaN).

    Raises:
        ModelError: the reference does not load or run.
    """
    rounding = Rounding(quantized=quantized)
    comparison = compare_models(
        reference, cut, feeds, rounding, tolerance=tolerance, threads=threads, progress=progress
    )
    return comparison.noted()


def compare_models(
    reference: Openable,
    cut: Openable,
    feeds: Sequence[Feed],
    rounding: Rounding = _FLOAT32,
    *,
    others: Sequence[Feed] | None = None,
    tolerance: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare as ``exactness`` does, and list the outputs that do not vary, so that a caller can try other inputs.

    Args:
        reference: the reference, a model or an open session.
        cut: the pruned model, a model or an open session.
        feeds: calls of both models.
        rounding: allowed differences where ``tolerance`` is None.
        others: calls of the pruned model where they differ from ``feeds``.
        tolerance: allowed error relative to the scale of an output, more than 0; None: from ``rounding``.
        threads: threads inside an operator, 1 or more; None: onnxruntime's default.
        progress: callback, called with (stage, fraction).
    """
    batches = list(dict.fromkeys(_batch(feed) for feed in feeds))
    outputs: dict[str, Output] = {}
    expected = list(_outputs(reference, feeds, threads=threads, progress=_part(progress, 0.0)))
    try:
        actual = _outputs(cut, others or feeds, threads=threads, progress=_part(progress, 0.5), expected=expected)
        for index, actual_outputs in enumerate(actual):
            add(expected[index], actual_outputs, rounding.quantized, outputs)
            expected[index] = {}  # compared: free the memory
    except ModelError as error:
        note = f"the reference runs, the cut model does not: {error.message}"
        return Comparison(Exactness(False, math.inf, tolerance or TOLERANCE, batches, note=note), {}, 0)
    if not outputs:
        note = "nothing to compare: no inputs to run on, or no output is an array"
        return Comparison(Exactness(None, batches=batches, note=note), {}, 0)
    coarse = max((eps(array.dtype) for feed in feeds for array in feed.values()), default=0.0)
    for output in outputs.values():
        output.eps_model = max(coarse, output.eps, rounding.of(output.name))
        output.tolerance = max(rounding.base, 4 * output.eps_model) if tolerance is None else tolerance
        if output.name.endswith(_COMPUTED_SUFFIX):
            output.tolerance, output.error = _EQUAL, max(output.error, float(output.differing > 0))
    if tolerance is not None or not _only_errors(outputs):
        return _verdict(outputs, batches)
    floors = noise_floors(reference, feeds[:2], threads=threads)
    _widen(outputs, max(floors.values(), default=0.0), rounding.quantized)
    comparison = _verdict(outputs, batches)
    uncertain = [
        name
        for name in comparison.failed
        if not outputs[name].differing and 0 < outputs[name].error <= _own_rounding(outputs[name], floors)
    ]
    return comparison._replace(uncertain=tuple(uncertain))


def _own_rounding(output: Output, floors: Mapping[str, float]) -> float:
    """Return the error up to which rounding explains the difference of an output.

    Where its values are next to zero, that is a unit of the last place of 1: a sigmoid is computed from numbers of that
    size, so that all disturbances of a run may round to the same value, and the other model to the next one.
    """
    floor = _FLOOR_FACTOR * floors.get(output.name, 0.0)
    return max(floor, output.eps / max(output.peak, _SMALLEST_PEAK)) if output.peak <= _SMALL_PEAK else floor


def _only_errors(outputs: dict[str, Output]) -> bool:
    """Return whether a float error exceeds its tolerance, and no other difference does."""
    has_broken = any(output.broken for output in outputs.values())
    return not has_broken and any(output.error > output.tolerance for output in outputs.values())


def _widen(outputs: dict[str, Output], floor: float, quantized: bool) -> None:
    """Raise tolerances to the reference's own sensitivity to rounding, within the cap."""
    for output in outputs.values():
        if output.name.endswith(_COMPUTED_SUFFIX):
            continue
        cap = max(_QUANTIZED_CAP if quantized else _CAP, 16 * output.eps_model)
        output.tolerance = max(output.tolerance, min(_FLOOR_FACTOR * floor, cap))


def _verdict(outputs: dict[str, Output], batches: list[int]) -> Comparison:
    """Return the facts: the output with the largest error over tolerance decides."""
    worst = max(outputs.values(), key=lambda o: o.excess)
    notes = [f"{o.name}: {o.broken}" for o in outputs.values() if o.broken]
    notes += [f"{o.name}: {o.differing} of {o.elements} integers differ" for o in outputs.values() if o.differing]
    vacuous = {o.name: o.vacuous for o in outputs.values() if not o.broken and o.vacuous}
    error = math.inf if worst.broken else worst.error
    facts = Exactness(worst.excess <= 1, error, worst.tolerance, batches, worst.name, "; ".join(notes))
    return Comparison(facts, vacuous, len(outputs), tuple(o.name for o in outputs.values() if o.excess > 1))


def noise_floor(reference: Openable, feeds: Sequence[Feed], *, threads: int | None = None) -> float:
    """Measure the effect of rounding on a model's outputs: the largest of ``noise_floors``, 0 without float outputs.

    Raises:
        ModelError: the model does not load or run with optimisations off.
    """
    return max(noise_floors(reference, feeds, threads=threads).values(), default=0.0)


def noise_floors(reference: Openable, feeds: Sequence[Feed], *, threads: int | None = None) -> dict[str, float]:
    """Measure the effect of rounding on each output: the largest error of ``exactness`` in two disturbances.

    One run has all graph optimisations (other kernels, other orders of summation), one has its float inputs moved by
    at most two units of their rounding, seeded. Both are compared with the plain run. Integer outputs have an error
    of 0.

    Raises:
        ModelError: the model does not load or run with optimisations off.
    """
    plain = list(_outputs(reference, feeds, threads=threads))
    disturbed_feeds = [_disturb(feed) for feed in feeds]
    floors: dict[str, float] = {}
    for optimize, inputs in ((True, feeds), (False, disturbed_feeds)):
        outputs: dict[str, Output] = {}
        try:
            for plain_outputs, disturbed_outputs in zip(
                plain, _outputs(reference, inputs, threads=threads, optimize=optimize), strict=True
            ):
                add(plain_outputs, disturbed_outputs, False, outputs)
        except ModelError:
            if not optimize:
                raise
            continue  # some models only load with optimisations off: the other disturbance remains
        for output in outputs.values():
            if not output.broken:
                floors[output.name] = max(floors.get(output.name, 0.0), output.error)
    return floors


def _disturb(feed: Feed) -> Feed:
    """Multiply every float of the inputs by 1 + a seeded random share, at most twice its type's epsilon."""
    rng = np.random.default_rng(0)
    result: Feed = {}
    for name, array in feed.items():
        unit = eps(array.dtype)
        if unit and array.dtype.kind != "c" and not name.endswith(HELD_SUFFIX):
            values = array.astype(np.float64)
            array = np.asarray(values * (1 + rng.uniform(-2 * unit, 2 * unit, array.shape))).astype(array.dtype)
        result[name] = array
    return result


def _outputs(
    model: Openable,
    feeds: Sequence[Feed],
    *,
    threads: int | None = None,
    optimize: bool = False,
    progress: Progress | None = None,
    expected: list[Feed] | None = None,
) -> Iterator[Feed]:
    """Run the model on every batch; the session is freed with the last one.

    ``expected`` are outputs of an original, batch by batch: they are brought to the sizes of this model's.
    """
    session = open_session(model, optimize=optimize, threads=threads)
    try:
        for index, feed in enumerate(feeds):
            if expected is not None:
                expected[index] = at_sizes_of(session, expected[index])
            yield run(session, feed)
            if progress:
                progress("", (index + 1) / len(feeds))
    finally:
        del session


def _part(progress: Progress | None, start: float) -> Progress | None:
    """Return a progress callback for the half of the stage that begins at ``start``."""
    if progress is None:
        return None
    return lambda _, share: progress("exactness", start + share / 2)


def _batch(feed: Feed) -> int:
    """Return the leading size of the first input that has one."""
    return next((int(array.shape[0]) for array in feed.values() if array.ndim), 1)
