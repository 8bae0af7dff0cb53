"""Fidelity: how close the outputs of two models are, batch by batch, without keeping any output."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat

from onnxprune.report.facts import AnswerFidelity, Fidelity, OutputFidelity
from onnxprune.runtime.capture import MEMORY
from onnxprune.runtime.fidelity.figures import Sums, add, finish
from onnxprune.runtime.fidelity.kinds import Hint, Level, Part, Reading, read_outputs
from onnxprune.runtime.fidelity.measures import Measure, measure_of
from onnxprune.runtime.masks import Padding, without_padding
from onnxprune.runtime.sessions import Feed, Openable, at_sizes_of, digest_of, open_session, run

Outputs = Mapping[str, tuple[str, int | None]]
"""Kinds of outputs as a user set them: {output: (kind, axis or None)}."""

# Batches that kinds, centres and scales are read off: so many samples, within so many bytes of outputs.
_SAMPLES, _BYTES = 64, 64 << 20

_Batch = tuple[Feed, Feed, Feed]
# The largest share of the memory for activations that outputs of the original may take.
_SHARE = 4
# Inputs of which the last request is remembered.
_MAX_REQUESTS = 1 << 16


class KnownOutputs:
    """Outputs of one model by inputs: every stage and candidate of a run is compared with the same outputs.

    Where outputs exceed the limit, those that were requested before take the place of those that were not requested
    since. So a pass over more inputs than there is room for always finds a part of them (the least recently used, if
    they gave way, would each be gone when their turn comes), and later stages replace the outputs of earlier ones.

    Args:
        limit: bytes of outputs to hold, 0 or more; further ones are computed whenever they are needed.
    """

    def __init__(self, limit: int = MEMORY // _SHARE) -> None:
        self._limit, self.num_bytes, self._now = limit, 0, 0
        self._outputs: OrderedDict[bytes, Feed] = OrderedDict()  # the least recently requested first
        self._requests: OrderedDict[bytes, int] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def within(cls, memory_limit: int | None) -> KnownOutputs:
        """Return an empty cache that takes a quarter of a run's bytes for activations; None: of the default."""
        return cls((memory_limit or MEMORY) // _SHARE)

    def of(self, feed: Feed, compute: Callable[[Feed], Feed]) -> Feed:
        """Return the outputs for these inputs, read-only where they are held.

        Args:
            feed: the inputs.
            compute: function from inputs to outputs, called where these are not held.
        """
        if not self._limit:
            return compute(feed)
        key = digest_of(feed)
        with self._lock:
            self._now += 1
            previous = self._requests.pop(key, 0)
            self._requests[key] = self._now
            if len(self._requests) > _MAX_REQUESTS:
                self._requests.popitem(last=False)
            if key in self._outputs:
                self._outputs.move_to_end(key)
                return self._outputs[key]
        outputs = compute(feed)
        with self._lock:
            self._hold(key, outputs, previous)
        return outputs

    def _hold(self, key: bytes, outputs: Feed, previous: int) -> None:
        """Hold outputs where there is room, or others were last requested before the ``previous`` request of these."""
        size = _num_bytes(outputs)
        if key in self._outputs or size > self._limit or any(value.dtype == object for value in outputs.values()):
            return
        obsolete: list[bytes] = []
        room = self._limit - self.num_bytes
        for other, values in self._outputs.items():
            if room >= size or self._requests.get(other, 0) >= previous:
                break
            obsolete.append(other)
            room += _num_bytes(values)
        if room < size:
            return
        for other in obsolete:
            self.num_bytes -= _num_bytes(self._outputs.pop(other))
        for value in outputs.values():
            value.setflags(write=False)
        self._outputs[key] = outputs
        self.num_bytes += size


def _num_bytes(outputs: Feed) -> int:
    return sum(value.nbytes for value in outputs.values())


def fidelity(
    original: Openable,
    final: Openable,
    feeds: Iterable[Feed],
    source: str = "synthetic",
    *,
    hints: Mapping[str, Hint] | None = None,
    outputs: Outputs | None = None,
    together: bool = True,
    known: KnownOutputs | None = None,
) -> Fidelity:
    """Compare the final model with the original on ``feeds``, over all batches together.

    Points are those of :mod:`onnxprune.runtime.fidelity.measures`, by the kind of each answer. The figures of single
    outputs beside them: cosine ``a·b / (|a| |b|)``, the same of outputs centred per channel, signal-to-noise
    ``10 log10(|a|² / |a - b|²)`` in dB (within ±300), in float64. Where rows of the original are class probabilities,
    their Hellinger distance. Top-1 is the share of rows with the same argmax over the last axis, for float outputs of
    rank 2 or 3 whose last axis has 2 or more entries. Positions where the original is not finite are left out; where
    only the final model is not, its value counts as 0. For integers wider than 8 bits, booleans and strings (classes,
    indices) cosine and top-1 are the share of equal elements. An output whose shape or presence differs counts as
    cosine 0 (``note`` says so). With ``together`` both models are open at once and outputs are compared batch by batch;
    without, the original's outputs are kept and only one model is in memory at a time, for which ``feeds`` is iterated
    twice.

    Args:
        original: the model to be faithful to.
        final: the model to judge.
        feeds: inputs, batch by batch.
        source: name of the inputs.
        hints: hints of the graph about the outputs; None: kinds follow from values and names alone.
        outputs: kinds that a user set.
        together: whether both models may be open at once.
        known: outputs of the original that earlier comparisons made, and that this one adds to; None: none.

    Raises:
        ModelError: one of the models does not load or run.
    """
    judge = _Judge(hints or {}, outputs or {})
    samples = 0
    known = KnownOutputs(0) if known is None else known
    for batch in _batches(_Original(original, known), final, feeds, hints or {}, together):
        judge.take(batch)
        samples += next((int(array.shape[0]) for array in batch[0].values() if array.ndim), 1)
    return judge.facts(samples, source)


class _Original:
    """The original, opened once it has to run."""

    def __init__(self, model: Openable, known: KnownOutputs) -> None:
        self._model, self._known, self._session = model, known, None

    def outputs(self, feed: Feed) -> Feed:
        """Return its outputs for these inputs."""
        return self._known.of(feed, self._run)

    def _run(self, feed: Feed) -> Feed:
        self._session = self._session or open_session(self._model)
        return run(self._session, feed)

    def close(self) -> None:
        """Free the memory of its session."""
        self._session = None


def _batches(
    original: _Original,
    final: Openable,
    feeds: Iterable[Feed],
    hints: Mapping[str, Hint],
    together: bool,
) -> Iterator[_Batch]:
    """Run both models on every batch of inputs; caches without input and output in the final model are left out."""
    outputs: Iterable[Feed | None] = repeat(None)
    if not together:
        outputs = [original.outputs(feed) for feed in feeds]
        original.close()
    after = open_session(final)
    names = {value.name for value in (*after.get_inputs(), *after.get_outputs())}
    absent = {name for name, hint in hints.items() if hint.past and names.isdisjoint((name, hint.past))}
    for feed, values in zip(feeds, outputs, strict=False):
        want = original.outputs(feed) if values is None else values
        want = at_sizes_of(after, {name: value for name, value in want.items() if name not in absent})
        yield feed, want, run(after, feed)


class _Judge:
    """Sums and measures of all outputs; the first batches wait until there are enough to tell kinds by."""

    def __init__(self, hints: Mapping[str, Hint], user_kinds: Outputs) -> None:
        self.hints, self.user_kinds = hints, user_kinds
        self.waiting: list[_Batch] | None = []
        self.sums: dict[str, Sums] = {}
        self.measures: list[tuple[Reading, Measure]] = []
        self.blocks: dict[str, list[Part]] = {}

    def take(self, batch: _Batch) -> None:
        """Add a batch, now or as soon as kinds are known."""
        if self.waiting is None:
            self._add(batch)
            return
        self.waiting.append(batch)
        rows = sum(next((a.shape[0] for a in feed.values() if a.ndim), 1) for feed, _, _ in self.waiting)
        num_bytes = sum(a.nbytes for _, *both in self.waiting for side in both for a in side.values())
        if rows >= _SAMPLES or num_bytes >= _BYTES:
            self._decide()

    def _decide(self) -> None:
        """Read kinds off the waiting batches, then add these."""
        waiting, self.waiting = self.waiting or [], None
        # Kinds are read off whole batches: their arrays have one shape.
        outputs = [want for _, want, _ in waiting]
        readings = read_outputs(outputs, [feed for feed, _, _ in waiting], self.hints, self.user_kinds)
        first = [part for feed, want, _ in waiting for part in without_padding(feed, want)]
        self.measures = [(reading, measure_of(reading, first)) for reading in readings]
        self.blocks = {name: parts for reading in readings for name, parts in blocks_of(reading).items()}
        for batch in waiting:
            self._add(batch)

    def _add(self, batch: _Batch) -> None:
        """Add a batch without its padding."""
        for feed, want, have in Padding(batch[0]).parts(batch):
            add(want, have, self.sums, self.blocks)
            for reading, measure in self.measures:
                if all(name in want for name in reading.outputs):
                    measure.add(feed, want, have)

    def facts(self, samples: int, source: str) -> Fidelity:
        """Return the result of all batches."""
        if self.waiting is not None:
            self._decide()
        notes = [f"{name}: {s.broken}" for name, s in self.sums.items() if s.broken and not self._is_listed(name)]
        silent = [name for name, s in self.sums.items() if not s.elements and not s.broken]
        if silent:
            notes.append(f"left out, the original has no finite value there: {', '.join(silent[:6])}")
        outputs = {name: finish(name, s) for name, s in self.sums.items() if name not in silent}
        if not outputs:
            notes.append("no output could be compared")
        answers = [answer for pair in self.measures if (answer := self._answer(*pair, outputs)) is not None]
        # An answer of one of the models alone, or at times alone, did not stay.
        judged = {name for reading, _ in self.measures for name in reading.outputs}
        broken = {name: self.sums[name].broken for name in outputs if name not in judged and self.sums[name].broken}
        answers += [AnswerFidelity([name], "", 0.0, why, 1.0) for name, why in broken.items()]
        points = min((answer.points for answer in answers), default=None)
        return Fidelity(list(outputs.values()), samples, source, "; ".join(notes), points, answers)

    def _answer(
        self, reading: Reading, measure: Measure, outputs: Mapping[str, OutputFidelity]
    ) -> AnswerFidelity | None:
        """Return the fidelity of an answer, and tell its outputs how they were read; None for other outputs."""
        share = measure.share()
        arrays = [outputs[name] for name in reading.outputs if name in outputs]
        points = 0.0 if math.isnan(share) else 100 * min(1.0, max(0.0, share))
        for output in arrays:
            output.kind, output.axis = reading.kind, _part_of(reading, output.output).axis
            if self._is_listed(output.output):  # rows in another order, or of another number, are no loss
                output.cosine = output.centred_cosine = points / 100
        if reading.kind == "state" or not arrays or math.isnan(share):
            return None
        distance = sum(o.noise for o in arrays) / len(arrays) if measure.is_coarse() else 1 - points / 100
        return AnswerFidelity(list(reading.outputs), reading.kind, points, measure.lost(), distance)

    def _is_listed(self, name: str) -> bool:
        """Return whether an output is a list of detections or indices, whose length may change."""
        levels = [level for reading, _ in self.measures for level in reading.levels]
        return any(level.listed and name in {p.name for p in parts_of(level)} for level in levels)


def parts_of(level: Level) -> Sequence[Part]:
    """Return all parts of a level."""
    return [level.boxes, *level.scores, *level.labels, *level.extras]


def _part_of(reading: Reading, name: str) -> Part:
    parts = [reading.part, *(part for level in reading.levels for part in parts_of(level))]
    return next((part for part in parts if part.name == name), Part(name))


def blocks_of(reading: Reading) -> dict[str, list[Part]]:
    """Return the columns that are centred and scaled together, by output: boxes apart from scores."""
    if not reading.levels:
        return {name: [reading.part] for name in reading.outputs} if reading.kind != "labels" else {}
    blocks: dict[str, list[Part]] = {}
    for level in reading.levels:
        for part in (level.boxes, *level.extras):
            blocks.setdefault(part.name, []).append(part)
        for name in dict.fromkeys(part.name for part in level.scores):
            ranges = [part for part in level.scores if part.name == name]
            spans = [part.columns for part in ranges if part.columns is not None]
            columns = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else None
            blocks.setdefault(name, []).append(replace(ranges[0], columns=columns, form="", background=None))
    return blocks
