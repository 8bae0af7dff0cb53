"""Run a model on calibration data and accumulate statistics of its inner tensors, batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx

from onnxprune.errors import ModelError, UsageError
from onnxprune.files import workspace
from onnxprune.model.exposing import Inner
from onnxprune.model.save import save
from onnxprune.model.weights import Weight
from onnxprune.runtime.checkpoint import Checkpoint
from onnxprune.runtime.iterations import counted, shown_in
from onnxprune.runtime.parallel import cores
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.statistics import NotFinite, Statistic

Told = Callable[[float], None]
# Bytes of inner tensors that one call may hand out.
MEMORY = 512 << 20
# Bytes of inner tensors, and calls, that are gathered before statistics take them in: many small updates cost time.
_GATHERED = 8 << 20
_CALLS = 32
# Bytes of windows to lay out at a time.
_ARRANGED = 32 << 20
# Seconds between two checkpoints.
_SAVE_EVERY = 30.0


class Source(Protocol):
    """Calibration data that can be gone through more than once."""

    def batches(self, batch_size: int | None = None) -> Iterable[Feed]:
        """The data as calls of the model."""

    @property
    def samples(self) -> int | None:
        """Number of samples, where known."""


@dataclass(slots=True)
class Request:
    """One statistic of one tensor. ``arrange`` turns the tensor's value into what ``statistic.update`` takes.

    ``growth``: how many times larger that is (windows overlap); it is then done for a few samples at a time.
    ``joins``: values of several calls may be joined along their first axis, the statistic stays the same.
    ``where``: conditions under which a value counts, (tensor, what it has to be).
    """

    name: str
    tensor: str
    arrange: Callable[[Array], Array]
    statistic: Statistic
    growth: int = 1
    joins: bool = False
    where: tuple[tuple[str, bool], ...] = ()


def capture(
    model: tuple[onnx.ModelProto, Mapping[str, Weight]],
    requests: Sequence[Request],
    source: Source,
    *,
    sizes: Mapping[str, int],
    types: Mapping[str, Inner] | None = None,
    least: int = 1,
    most: int = 16,
    memory: int = MEMORY,
    checkpoint: Checkpoint | None = None,
    tell: Told | None = None,
) -> int:
    """Go through the data once and update every request's statistic; more often only where memory is too small.

    Args:
        model: the graph and its weights. requests: what to accumulate.
        source: the data. sizes: {tensor: bytes per sample}. least, most: samples per call.
        types: of the tensors (conditions, too) that lie in bodies.
        memory: bytes of inner tensors to hold at a time.
        checkpoint: where to keep what was accumulated, so that a run can be resumed. tell: called with the share done.

    Returns:
        number of samples seen.

    Raises:
        ModelError: the model does not run, or a tensor holds NaN or infinity. UsageError: there are no samples.
    """
    passes = _passes(requests, sizes, memory)
    samples = 0
    with workspace() as folder:
        for number, part in enumerate(passes):
            share = Share(tell, number, len(passes))
            batch = max(least, _batch_size(part, sizes, memory, most))
            samples = _one_pass(model, part, source, types or {}, folder, batch, checkpoint, share)
    if requests and not samples:
        raise UsageError("The calibration data holds no samples.", hint="Give at least one batch of inputs.")
    return samples


@dataclass(frozen=True, slots=True)
class Share:
    """Progress of one pass of several."""

    tell: Told | None
    number: int
    passes: int

    def __call__(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` samples; an unknown total shows as ever slower progress."""
        if self.tell is not None:
            inside = done / total if total else 1.0 - 1.0 / (1.0 + done / 256)
            self.tell((self.number + min(inside, 1.0)) / self.passes)


def _passes(requests: Sequence[Request], sizes: Mapping[str, int], memory: int) -> list[list[Request]]:
    """Requests in as few passes as memory allows at one sample a call."""
    passes: list[list[Request]] = []
    room = 0
    held: set[str] = set()
    for request in sorted(requests, key=lambda r: r.tensor):
        size = 0 if request.tensor in held else sizes.get(request.tensor, 0)
        if not passes or size > room:
            passes.append([])
            room, held = memory, set()
            size = sizes.get(request.tensor, 0)
        passes[-1].append(request)
        held.add(request.tensor)
        room -= size
    return passes


def _batch_size(requests: Sequence[Request], sizes: Mapping[str, int], memory: int, most: int) -> int:
    per_sample = sum(sizes.get(name, 0) for name in {r.tensor for r in requests})
    return max(1, min(most, memory // max(per_sample, 1)))


def _one_pass(
    model: tuple[onnx.ModelProto, Mapping[str, Weight]],
    requests: Sequence[Request],
    source: Source,
    types: Mapping[str, Inner],
    folder: Path,
    batch_size: int,
    checkpoint: Checkpoint | None,
    share: Share,
) -> int:
    tensors, conditions = (r.tensor for r in requests), {name for r in requests for name, _ in r.where}
    path = folder / "capture.onnx"
    proto, outputs, stacked = shown_in(model[0], tensors, conditions, types)
    save(with_outputs(proto, [*outputs.values()]), model[1], path)
    session = open_session(path, spin=False)
    states = {r.name: r.statistic for r in requests}
    checkpoint = None if checkpoint is None else checkpoint.at(batch_size)
    skip, samples = checkpoint.load(states) if checkpoint is not None else (0, 0)
    saved = time.monotonic()
    with cores() as pool:
        number, gathered = -1, _Gathered(requests, pool, stacked)
        for number, feed in enumerate(source.batches(batch_size)):
            if number < skip:
                continue
            values = run(session, feed)
            full = gathered.add({n: values[o] for n, o in outputs.items()}, at_once=number == 0)
            samples += count(feed)
            share(samples, source.samples)
            if full and checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
                gathered.finish()
                checkpoint.save(states, number + 1, samples)
                saved = time.monotonic()
        gathered.finish()
    if checkpoint is not None and number >= skip:
        checkpoint.save(states, number + 1, samples)
    return samples


class _Gathered:
    """Values of a few calls, handed to the statistics together, while the model already runs on what comes next.

    When they are handed over depends on nothing but the data, so that a run that was resumed adds in the same order.
    """

    def __init__(self, requests: Sequence[Request], pool: ThreadPoolExecutor, stacked: Mapping[str, int]) -> None:
        self._requests, self._pool, self._stacked = requests, pool, stacked
        self._calls: list[Feed] = []
        self._bytes = 0
        self._busy: list[Future[None]] = []

    def add(self, values: Feed, *, at_once: bool) -> bool:
        """Take in one call's values. Returns whether none are waiting to be handed over now.

        ``at_once``: hand them over and wait, so that what is wrong shows in the first call already.
        """
        self._calls.append(values)
        self._bytes += sum(value.nbytes for value in values.values())
        if at_once:
            self.finish()
        elif self._bytes >= _GATHERED or len(self._calls) >= _CALLS:
            self._hand_over()
        return not self._calls

    def finish(self) -> None:
        """Hand over the rest, and wait until the statistics have taken in everything.

        Raises:
            ModelError: a tensor holds NaN or infinity.
        """
        self._hand_over()
        self._wait()

    def _hand_over(self) -> None:
        self._wait()
        calls, self._calls, self._bytes = self._calls, [], 0
        if calls:
            self._busy = [self._pool.submit(_take_in, r, self._values(r, calls)) for r in self._requests]

    def _values(self, request: Request, calls: Sequence[Feed]) -> list[Array]:
        """A tensor's values; where it lies in a body, one per iteration, or joined, and none where it did not run."""
        stacked = self._stacked.get(request.tensor)
        if stacked is None and not request.where:
            return [call[request.tensor] for call in calls]
        values = []
        for call in calls:
            conditions = [(call[n], wanted, self._stacked.get(n, 0)) for n, wanted in request.where]
            values += counted(call[request.tensor], stacked or 0, conditions, request.joins)
        return values

    def _wait(self) -> None:
        busy, self._busy = self._busy, []
        for future in busy:
            future.result()


def _take_in(request: Request, values: Sequence[Array]) -> None:
    """Update one statistic with the values of some calls."""
    if request.joins and len(values) > 1 and len({(v.shape[1:], v.dtype) for v in values if v.ndim}) == 1:
        values = [np.concatenate(values)]
    for value in values:
        _update(request, value)


def _update(request: Request, value: Array) -> None:
    if value.dtype not in (np.float32, np.float64):
        value = value.astype(np.float32)
    pieces = min(len(value), -(-value.nbytes * request.growth // _ARRANGED)) if request.growth > 1 else 1
    try:
        for piece in np.array_split(value, max(pieces, 1)) if pieces > 1 else [value]:
            request.statistic.update(request.arrange(piece))
    except NotFinite as error:
        raise ModelError(
            f"Feature map {request.tensor!r} holds NaN or infinity.",
            hint="Check the model and the scaling of the calibration data.",
        ) from error


def count(feed: Feed) -> int:
    """Number of samples of one call: the leading size that most inputs share."""
    sizes = [len(array) for array in feed.values() if array.ndim]
    return max(set(sizes), key=sizes.count) if sizes else 1


def with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with these tensors as its only outputs; onnxruntime works out their types and skips the rest."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    known = {o.name: o for o in proto.graph.output}
    del model.graph.output[:]
    model.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in names)
    return model


def to_maps(axes: Sequence[int]) -> Callable[[Array], Array]:
    """Arranges a tensor as [samples, channels, *space]: channels along ``axes``, samples along the first axis left."""

    def arrange(value: Array) -> Array:
        rest = [a for a in range(value.ndim) if a not in axes]
        order = [*rest[:1], *axes, *rest[1:]]
        moved = np.transpose(value, order)
        inner = moved.shape[len(rest[:1]) :]
        samples = moved.shape[0] if rest else 1
        return moved.reshape(samples, math.prod(inner[: len(axes)]), *inner[len(axes) :])

    return arrange
