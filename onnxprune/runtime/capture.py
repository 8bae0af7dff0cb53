"""Run a model on calibration data and accumulate statistics of its inner tensors, batch by batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import onnx

from onnxprune.errors import ModelError, UsageError
from onnxprune.model.save import save
from onnxprune.model.weights import Weight
from onnxprune.runtime.checkpoint import Checkpoint
from onnxprune.runtime.parallel import cores
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.statistics import NotFinite, Statistic

Told = Callable[[float], None]
# Bytes of inner tensors that one call may hand out.
MEMORY = 512 << 20
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
    """

    name: str
    tensor: str
    arrange: Callable[[Array], Array]
    statistic: Statistic
    growth: int = 1


def capture(
    model: tuple[onnx.ModelProto, Mapping[str, Weight]],
    requests: Sequence[Request],
    source: Source,
    *,
    sizes: Mapping[str, int],
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
        memory: bytes of inner tensors to hold at a time.
        checkpoint: where to keep what was accumulated, so that a run can be resumed. tell: called with the share done.

    Returns:
        number of samples seen.

    Raises:
        ModelError: the model does not run, or a tensor holds NaN or infinity. UsageError: there are no samples.
    """
    passes = _passes(requests, sizes, memory)
    samples = 0
    with TemporaryDirectory(prefix="onnxprune-") as folder:
        for number, part in enumerate(passes):
            share = Share(tell, number, len(passes))
            batch = max(least, _batch_size(part, sizes, memory, most))
            samples = _one_pass(model, part, source, Path(folder), batch, checkpoint, share)
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
    folder: Path,
    batch_size: int,
    checkpoint: Checkpoint | None,
    share: Share,
) -> int:
    names = list(dict.fromkeys(r.tensor for r in requests))
    path = folder / "capture.onnx"
    save(with_outputs(model[0], names), model[1], path)
    session = open_session(path, spin=False)
    states = {r.name: r.statistic for r in requests}
    checkpoint = None if checkpoint is None else checkpoint.at(batch_size)
    skip, samples = checkpoint.load(states) if checkpoint is not None else (0, 0)
    saved = time.monotonic()
    with cores() as pool:
        number = -1
        for number, feed in enumerate(source.batches(batch_size)):
            if number < skip:
                continue
            values = run(session, feed)
            list(pool.map(_update, requests, (values[r.tensor] for r in requests)))
            samples += count(feed)
            share(samples, source.samples)
            if checkpoint is not None and time.monotonic() - saved > _SAVE_EVERY:
                checkpoint.save(states, number + 1, samples)
                saved = time.monotonic()
    if checkpoint is not None and number >= skip:
        checkpoint.save(states, number + 1, samples)
    return samples


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
