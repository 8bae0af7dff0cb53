"""Sets of arrays cut into calls of a model: how many rows each input takes per call, and what is joined for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np

from onnxprune.errors import UsageError
from onnxprune.graph.binding import InputSpec
from onnxprune.runtime.matching import cast
from onnxprune.runtime.sessions import Feed
from onnxprune.runtime.stored import Part


@dataclass(frozen=True, slots=True)
class Batch:
    """One call of a model. ``split`` are the inputs that change from batch to batch; the first one counts samples."""

    feed: Feed
    split: Sequence[str]
    free: bool

    @property
    def rows(self) -> int:
        """How many rows of the input that counts; a scalar is one."""
        return max(self.feed[self.split[0]].shape[:1], default=1) if self.split else 1

    def first(self, rows: int) -> Batch:
        """The batch cut short, where the model takes any number."""
        if rows >= self.rows or not self.free:
            return self
        return Batch({n: a[:rows] if n in self.split else a for n, a in self.feed.items()}, self.split, True)


@dataclass(slots=True)
class Totals:
    """What sets of arrays hold: ``rows``, ``usable`` of them in whole batches of ``step`` (1: any number)."""

    rows: int = 0
    usable: int = 0
    step: int = 1


class Cutter:
    """Cuts sets of arrays into batches of ``size`` samples, or of the leading sizes that the model fixes.

    Sets of equal shapes that follow one another are joined, so that a batch can hold samples of several sets; what is
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

    def batches(self, parts: Iterable[Part]) -> Iterator[Batch]:
        """Every batch; no more than about two are in memory.

        Raises:
            UsageError: numbers of samples that do not fit each other, values that do not fit an input.
        """
        for tails, run in groupby(parts, self._tails):
            if tails is None:
                for part in run:
                    yield from self._alone(part)
            else:
                yield from self._joined(run)

    def totals(self, parts: Iterable[Part]) -> Totals:
        """What there is to cut; nothing but shapes is looked at."""
        sums = Totals()
        for tails, run in groupby(parts, self._tails):
            rows = 0
            for part in run:
                self.place = next(iter(part.values())).place
                if tails is not None:
                    rows += next(iter(part.values())).shape[0]
                    continue
                steps, count = _steps(part, self.specs, self.size)
                sums.rows += part[next(iter(steps))].shape[0] if steps else 1
                sums.step = self._step(steps)
                sums.usable += part[next(iter(steps))].shape[0] if steps and sums.step == 1 else count * sums.step
            if tails is not None:
                sums.rows, sums.step = sums.rows + rows, self.fixed or 1
                sums.usable += rows // sums.step * sums.step
        return sums

    def _step(self, steps: Mapping[str, int]) -> int:
        """What the number of samples is a multiple of."""
        return 1 if self._free(steps) else next(iter(steps.values()), 1)

    def _free(self, steps: Mapping[str, int]) -> bool:
        """Whether the last batch can be cut short: every leading size is free."""
        fixed = (spec.name in steps and spec.shape and isinstance(spec.shape[0], int) for spec in self.specs)
        return not any(fixed)

    def _tails(self, part: Part) -> tuple[tuple[int, ...], ...] | None:
        """What has to be equal in sets that are joined; None for a set with rows of its own kind."""
        lengths = {rows.shape[:1] for rows in part.values()}
        filled = sum(part[spec.name].shape == spec.shape for spec in self.specs)
        if not self._joins or len(lengths) > 1 or () in lengths or 0 < filled < len(self.specs):
            return None
        return tuple(part[spec.name].shape[1:] for spec in self.specs)

    def _joined(self, run: Iterable[Part]) -> Iterator[Batch]:
        """Batches across sets, all of whose arrays have the same number of rows."""
        step = self.fixed or self.size
        names = [spec.name for spec in self.specs]
        rest: Feed = {}
        for part in run:
            self.place = next(iter(part.values())).place
            for chunk in self._read(part, dict.fromkeys(names, step)):
                feed = {n: np.concatenate([rest[n], chunk[n]]) for n in names} if rest else chunk
                if len(feed[names[0]]) >= step:
                    yield Batch({n: a[:step] for n, a in feed.items()}, names, not self.fixed)
                    feed = {n: a[step:] for n, a in feed.items()}
                # a copy: a view would keep the whole set in memory, and some iterators fill one array again and again
                rest = {n: a.copy() for n, a in feed.items()} if len(feed[names[0]]) else {}
        if rest and not self.fixed:
            yield Batch(rest, names, True)
        elif rest:
            self.dropped += len(rest[names[0]])

    def _alone(self, part: Part) -> Iterator[Batch]:
        """The batches of one set."""
        steps, count = _steps(part, self.specs, self.size)
        by_name = {spec.name: spec for spec in self.specs}
        same = {n: _scalar(cast(r.read(), by_name[n], r.place), by_name[n]) for n, r in part.items() if n not in steps}
        if not steps:
            yield Batch(same, (), False)
            return
        free, used = self._free(steps), 0
        for chunk in islice(self._read(part, steps), count):
            feed = {n: same[n] if n in same else _scalar(chunk[n], spec) for n, spec in by_name.items()}
            batch = Batch(feed, tuple(steps), free)
            used += batch.rows
            yield batch
        self.dropped += part[next(iter(steps))].shape[0] - used

    def _read(self, part: Part, steps: Mapping[str, int]) -> Iterator[Feed]:
        """The arrays of a set side by side, in the model's dtypes, each by its own number of rows."""
        specs = [spec for spec in self.specs if spec.name in steps]
        readers = [part[spec.name].chunks(steps[spec.name]) for spec in specs]
        for number, arrays in enumerate(zip(*readers, strict=False)):
            pairs = zip(specs, arrays, strict=True)
            yield {s.name: cast(a, s, part[s.name].place, number * steps[s.name]) for s, a in pairs}


def _steps(part: Part, specs: Sequence[InputSpec], batch_size: int) -> tuple[dict[str, int], int]:
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
    whole = {spec.name for spec in split if part[spec.name].shape == spec.shape}
    if any(name not in whole and n > fixed.get(name, 1) for name, n in samples.items()):
        samples = {name: n for name, n in samples.items() if name not in whole}
        fixed = {name: size for name, size in fixed.items() if name not in whole}
    if not samples:
        return {}, 1
    if not fixed:
        _same(samples, "samples")
        return dict.fromkeys(samples, batch_size), -(-next(iter(samples.values())) // batch_size)
    calls = {name: samples[name] // size for name, size in fixed.items()}
    _same(calls, "batches of samples")
    count = next(iter(calls.values()))
    return {name: fixed.get(name) or _step_beside(name, samples, fixed, count) for name in samples}, count


def _steps_beside_scalars(
    part: Part, specs: Sequence[InputSpec], scalars: dict[str, int]
) -> tuple[dict[str, int], int]:
    """Rows per batch where scalar inputs have a value per call: one row of every input whose leading size is free."""
    others = [spec for spec in specs if spec.name not in scalars]
    steps, count = _steps(part, others, 1) if others else ({}, 0)
    calls = {**({others[0].name: count} if steps else {}), **scalars}
    _same(calls, "samples")
    return {**steps, **dict.fromkeys(scalars, 1)}, next(iter(scalars.values()))


def _scalar(array: np.ndarray, spec: InputSpec) -> np.ndarray:
    """The one number that a scalar input takes."""
    return array.reshape(()) if spec.scalar else array


def too_few(place: str, rows: int, name: str, size: int) -> UsageError:
    """The error for data that does not fill one batch."""
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
        shown = ", ".join(f"{name!r}: {n}" for name, n in sorted(counts.items())[:6])
        raise UsageError(f"data holds different numbers of {what} per input: {shown}")
