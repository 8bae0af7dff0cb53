"""Run a model on calibration data and accumulate statistics of its inner tensors, batch by batch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from onnxprune import __version__
from onnxprune.errors import ModelError, UsageError, argument
from onnxprune.graph.view import Graph
from onnxprune.importance.statistics import NotFinite, Statistic
from onnxprune.io import files, markers
from onnxprune.io.files import workspace
from onnxprune.io.subgraphs import Inner, expose_tensors
from onnxprune.io.weights import Weight
from onnxprune.io.write import save
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Array, Feed, cores, frugal, is_heavy, open_session, run


def expose_requested(
    proto: onnx.ModelProto, tensors: Iterable[str], conditions: Collection[str], types: Mapping[str, Inner]
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, int]]:
    """Expose all requested tensors of a model; returns it, {tensor: output}, and {tensor: axes stacked in front}.

    Conditions are outputs under another name: they may be inputs or constants of the model.
    """
    names = dict.fromkeys([*tensors, *sorted(conditions)])
    proto, shown = expose_tensors(proto, {n: types[n] for n in names if n in types})
    outputs = {n: shown[n].output if n in shown else n for n in names}
    outside = sorted(set(conditions) - shown.keys())
    if outside:
        model = onnx.ModelProto()
        model.CopyFrom(proto)
        for name in outside:
            outputs[name] = f"{name}__condition"
            model.graph.node.append(onnx.helper.make_node("Identity", [name], [outputs[name]]))
        proto = model
    return proto, outputs, {n: s.stacked for n, s in shown.items()}


def select_executed(
    value: Array, stacked: int, conditions: Sequence[tuple[Array, bool, int]], joins: bool
) -> list[Array]:
    """Return the values of the iterations whose conditions hold.

    Args:
        value: values with iterations along the leading axes; empty where a branch was not taken.
        stacked: number of leading axes that count iterations, 0 or more.
        conditions: (condition, required value, number of its leading axes that count iterations).
        joins: whether to join the values into one, along their first axis.
    """
    if not value.size:
        return []
    counts = np.ones(value.shape[:stacked], bool)
    for condition, required, axes in conditions:
        counts &= _mask_executed(condition, required, axes, counts.shape)
    flat = value.reshape(-1, *value.shape[stacked:])[counts.ravel()]
    if joins and flat.ndim > 1 and len(flat):
        return [flat.reshape(-1, *flat.shape[2:])]
    return list(flat)


def _mask_executed(condition: Array, required: bool, stacked: int, shape: tuple[int, ...]) -> Array:
    """Return in which of the stacked iterations a condition has the required value.

    A tensor that iterations further in read alone counts as soon as it holds in one of them.
    """
    if not condition.size:  # what it decides is not come to
        return np.zeros(shape, bool)
    matches = np.asarray(condition.reshape((*condition.shape[:stacked], -1))[..., 0] == required)
    matches = np.any(matches, axis=tuple(range(len(shape), stacked)))
    return np.broadcast_to(matches.reshape(matches.shape + (1,) * (len(shape) - matches.ndim)), shape)


FORMAT = 4
"""Version of the statistics, incremented with every change of their definition, so that old files are not used."""


class Checkpoint:
    """One file per set of statistics, named by a hash of the model, the data, the request, and the package.

    Args:
        folder: folder of the file, made where it does not exist.
        key: everything that the result depends on.

    Raises:
        UsageError: the folder cannot be made.
    """

    def __init__(self, folder: Path, key: str) -> None:
        make_folder(folder)
        self._folder, self._key = folder, key

    def at(self, batch_size: int) -> Checkpoint:
        """Return the checkpoint for calls of this size: it counts whole calls, so other sizes cannot resume it."""
        return Checkpoint(self._folder, f"{self._key}:{batch_size}")

    def _path(self, statistics: Mapping[str, Statistic]) -> Path:
        text = "\n".join([f"{__version__}:{FORMAT}", self._key, *sorted(statistics)])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def load(self, statistics: Mapping[str, Statistic]) -> tuple[int, int]:
        """Fill the statistics from the file. Returns (batches, samples) they hold; (0, 0) without a usable file."""
        file = read_arrays(self._path(statistics))
        states: dict[str, dict[str, Any]] = {name: {} for name in statistics}
        try:
            progress = int(file["batches"]), int(file["samples"])
            for entry, array in file.items():
                if "|" in entry:
                    name, _, part = entry.rpartition("|")
                    states[name][part] = array
        except (KeyError, TypeError, ValueError):  # missing, or something else
            return 0, 0
        for name, statistic in statistics.items():
            statistic.state = states[name]
        return progress

    def save(self, statistics: Mapping[str, Statistic], batches: int, samples: int) -> None:
        """Write the file, replacing the one before at once."""
        path = self._path(statistics)
        arrays = {f"{name}|{part}": a for name, s in statistics.items() for part, a in s.state.items()}
        write_arrays(path, {"batches": np.int64(batches), "samples": np.int64(samples), **arrays})


def make_folder(folder: Path) -> None:
    """Make a folder to keep things in; raises UsageError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{argument('cache')} {str(folder)!r} cannot be made: {error.strerror}",
            hint="Give a folder that can be written.",
        ) from error


def read_arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of a file; empty where it is missing or damaged, so that they are computed again."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # what a damaged archive raises depends on where it is damaged
        return {}


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a file, replacing the one before at once; raises UsageError where it cannot be written."""
    try:
        with files.replacing(path) as replacement, replacement.open() as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UsageError(
            f"{argument('cache')} {str(path.parent)!r} cannot be written: {error.strerror}",
            hint=f"Free space, or drop {argument('cache')}.",
        ) from error


ProgressCallback = Callable[[float], None]
# Bytes of inner tensors that one call may return.
MEMORY = 512 << 20
# Bytes of inner tensors, and calls, that are collected before statistics are updated: many small updates cost time.
_GATHERED = 8 << 20
_CALLS = 32
# Bytes of windows to lay out at a time.
_ARRANGED = 32 << 20
# Seconds between two checkpoints.
_SAVE_EVERY = 30.0


class Source(Protocol):
    """Calibration data that can be gone through more than once."""

    def batches(self, batch_size: int | None = None) -> Iterable[Feed]:
        """Iterate over the data as calls of the model."""

    @property
    def samples(self) -> int | None:
        """Number of samples, where known."""


@dataclass(slots=True)
class Request:
    """One statistic of one tensor. ``arrange`` turns the tensor's value into the argument of ``statistic.update``.

    ``growth``: how many times larger that is (windows overlap); it is then done for a few samples at a time.
    ``joins``: values of several calls may be joined along their first axis, the statistic stays the same.
    ``where``: conditions under which a value counts, (tensor, value it must have).
    ``axes``: axes of the channels. The others hold samples and positions, of which padding does not count.
    """

    name: str
    tensor: str
    arrange: Callable[[Array], Array]
    statistic: Statistic
    growth: int = 1
    joins: bool = False
    where: tuple[tuple[str, bool], ...] = ()
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of one call of a model whose inner tensors are captured.

    Attributes:
        min_batch: smallest number of samples, 1 or more.
        max_batch: largest number of samples.
        memory: bytes of inner tensors to hold at a time.
    """

    min_batch: int = 1
    max_batch: int = 16
    memory: int = MEMORY

    def batch_size(self, requests: Sequence[Request], sizes: Mapping[str, int]) -> int:
        """Return the number of samples of a call that captures these tensors; ``sizes`` as in :func:`capture`."""
        per_sample = sum(sizes.get(name, 0) for name in {r.tensor for r in requests})
        return max(self.min_batch, 1, min(self.max_batch, self.memory // max(per_sample, 1)))


def capture(
    model: tuple[onnx.ModelProto, Mapping[str, Weight]],
    requests: Sequence[Request],
    source: Source,
    *,
    sizes: Mapping[str, int],
    types: Mapping[str, Inner] | None = None,
    limits: CallLimits | None = None,
    checkpoint: Checkpoint | None = None,
    tell: ProgressCallback | None = None,
) -> int:
    """Go through the data once and update every request's statistic; more often only where memory is too small.

    Args:
        model: the graph and its weights.
        requests: tensors and the statistics to accumulate of them.
        source: the data.
        sizes: {tensor: bytes per sample}.
        types: {tensor: type} of the tensors (conditions, too) that lie in bodies.
        limits: limits of one call; None: those of :class:`CallLimits`.
        checkpoint: checkpoint of the accumulated sums, from which a run can be resumed.
        tell: progress callback, called with the share done, 0 to 1.

    Returns:
        number of samples in the data.

    Raises:
        ModelError: the model does not run, or a tensor holds NaN or infinity. UsageError: there are no samples.
    """
    limits = limits or CallLimits()
    passes = _passes(requests, sizes, limits.memory)
    samples = 0
    with workspace() as folder:
        for number, part in enumerate(passes):
            share = PassProgress(tell, number, len(passes))
            batch = limits.batch_size(part, sizes)
            samples = _one_pass(model, part, source, types or {}, folder, batch, checkpoint, share)
    if requests and not samples:
        raise UsageError("The calibration data holds no samples.", hint="Give at least one batch of inputs.")
    return samples


def _opened(proto: onnx.ModelProto, weights: Mapping[str, Weight], path: Path) -> ort.InferenceSession:
    """Open a model as a file; heavy weights are mapped from a second file, so that they are in memory once."""
    heavy = is_heavy(weights)
    save(proto, weights, path, prefer_external=heavy)
    with frugal(heavy):
        return open_session(path)


@dataclass(frozen=True, slots=True)
class PassProgress:
    """Progress of one pass of several."""

    tell: ProgressCallback | None
    number: int
    passes: int

    def __call__(self, num_samples: int, total: int | None) -> None:
        """``num_samples`` of ``total`` samples; an unknown total shows as ever slower progress."""
        if self.tell is not None:
            fraction = num_samples / total if total else 1.0 - 1.0 / (1.0 + num_samples / 256)
            self.tell((self.number + min(fraction, 1.0)) / self.passes)


def _passes(requests: Sequence[Request], sizes: Mapping[str, int], memory: int) -> list[list[Request]]:
    """Distribute the requests over as few passes as memory allows at one sample a call."""
    passes: list[list[Request]] = []
    free_bytes = 0
    names: set[str] = set()
    for request in sorted(requests, key=lambda r: r.tensor):
        size = 0 if request.tensor in names else sizes.get(request.tensor, 0)
        if not passes or size > free_bytes:
            passes.append([])
            free_bytes, names = memory, set()
            size = sizes.get(request.tensor, 0)
        passes[-1].append(request)
        names.add(request.tensor)
        free_bytes -= size
    return passes


def _one_pass(
    model: tuple[onnx.ModelProto, Mapping[str, Weight]],
    requests: Sequence[Request],
    source: Source,
    types: Mapping[str, Inner],
    folder: Path,
    batch_size: int,
    checkpoint: Checkpoint | None,
    share: PassProgress,
) -> int:
    tensors, conditions = (r.tensor for r in requests), {name for r in requests for name, _ in r.where}
    path = folder / "capture.onnx"
    proto, outputs, stacked = expose_requested(model[0], tensors, conditions, types)
    session = _opened(with_outputs(proto, [*outputs.values()]), model[1], path)
    states = {r.name: r.statistic for r in requests}
    checkpoint = None if checkpoint is None else checkpoint.at(batch_size)
    skip, samples = checkpoint.load(states) if checkpoint is not None else (0, 0)
    saved_at = time.monotonic()
    with cores() as pool:
        number, collected = -1, _Collector(requests, pool, stacked)
        for number, feed in enumerate(source.batches(batch_size)):
            if number < skip:
                continue
            values = run(session, feed)
            full = collected.add({n: values[o] for n, o in outputs.items()}, Padding(feed), at_once=number == 0)
            samples += count(feed)
            share(samples, source.samples)
            if full and checkpoint is not None and time.monotonic() - saved_at > _SAVE_EVERY:
                collected.finish()
                checkpoint.save(states, number + 1, samples)
                saved_at = time.monotonic()
        collected.finish()
    if checkpoint is not None and number >= skip:
        checkpoint.save(states, number + 1, samples)
    return samples


class _Collector:
    """Values of a few calls, added to the statistics together, while the model already runs on the next calls.

    The grouping depends only on the data, so that a resumed run adds in the same order.
    """

    def __init__(self, requests: Sequence[Request], pool: ThreadPoolExecutor, stacked: Mapping[str, int]) -> None:
        self._requests, self._pool, self._stacked = requests, pool, stacked
        self._calls: list[tuple[Feed, Padding]] = []
        self._bytes = 0
        self._busy: list[Future[None]] = []

    def add(self, values: Feed, padding: Padding, *, at_once: bool) -> bool:
        """Take in one call's values, and its padding. Returns whether none are waiting to be handed over now.

        ``at_once``: hand them over and wait, so that an error is raised in the first call already.
        """
        self._calls.append((values, padding))
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
            self._busy = [self._pool.submit(_update_statistic, r, self._values(r, calls)) for r in self._requests]

    def _values(self, request: Request, calls: Sequence[tuple[Feed, Padding]]) -> list[Array]:
        """Return the values of a tensor without padding: in a body one per iteration, and none where it did not run."""
        stacked = self._stacked.get(request.tensor)
        values: list[Array] = []
        if stacked is None and not request.where:
            for call, padding in calls:
                parts = padding.parts([{"": call[request.tensor]}], {"": request.axes})
                values += [part[""] for (part,) in parts]
            return values
        for call, _ in calls:
            conditions = [(call[n], required, self._stacked.get(n, 0)) for n, required in request.where]
            values += select_executed(call[request.tensor], stacked or 0, conditions, request.joins)
        return values

    def _wait(self) -> None:
        busy, self._busy = self._busy, []
        for future in busy:
            future.result()


def _update_statistic(request: Request, values: Sequence[Array]) -> None:
    """Update one statistic with the values of some calls."""
    if request.joins and len(values) > 1 and all(v.ndim for v in values):
        alike: dict[Any, list[Array]] = {}
        for value in values:
            alike.setdefault((value.shape[1:], value.dtype), []).append(value)
        values = [np.concatenate(group) for group in alike.values()]
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
    """Return the number of samples of one call: the leading size that most inputs share.

    States [layers, samples, size] share it by their second axis.
    """
    sizes = [len(array) for array in feed.values() if array.ndim]
    inner = [array.shape[1] for array in feed.values() if array.ndim == 3 and array.shape[0] != array.shape[1]]
    return max(dict.fromkeys(sizes), key=lambda size: sizes.count(size) + inner.count(size), default=1)


def with_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return the model with these tensors as its only outputs; onnxruntime infers their types and skips the rest."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    known = {o.name: o for o in proto.graph.output}
    del model.graph.output[:]
    model.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in names)
    return model


def to_maps(axes: Sequence[int]) -> Callable[[Array], Array]:
    """Arranges a tensor as [samples, channels, *space]: channels along ``axes``, samples along the first axis left."""

    def arrange(value: Array) -> Array:
        other_axes = [a for a in range(value.ndim) if a not in axes]
        order = [*other_axes[:1], *axes, *other_axes[1:]]
        transposed = np.transpose(value, order)
        inner = transposed.shape[len(other_axes[:1]) :]
        samples = transposed.shape[0] if other_axes else 1
        return transposed.reshape(samples, math.prod(inner[: len(axes)]), *inner[len(axes) :])

    return arrange


BranchAssignment = Mapping[str, bool]
"""Branch assignment: {condition of an If: value}, without conditions that a batch does not reach."""


def branch_assignments(graph: Graph, weights: Mapping[str, Weight], feeds: Sequence[Feed]) -> list[dict[str, bool]]:
    """Return the branch of every If outside Loop and Scan for every batch; no entries where there are none.

    Raises:
        ModelError: the model does not run.
    """
    if_nodes = [n for n in graph.nodes if n.marker == markers.OPEN and n.kind == "If"]
    names = {n.inputs[0] for n in if_nodes if markers.repeating(graph.around[n.index]) is None}
    assignments = [_of_one((n, feed[n]) for n in sorted(names & feed.keys())) for feed in feeds]
    constants = _of_one((n, weights[n].read()) for n in sorted(names & weights.keys()))
    computed = sorted(names & graph.producer.keys() - weights.keys())
    if computed:
        proto, exposed = expose_tensors(graph.proto, dict.fromkeys(computed, Inner(TensorProto.BOOL, 0)))
        outputs = {n: exposed[n].output if n in exposed else n for n in computed}
        with workspace() as folder:
            path = folder / "ways.onnx"
            session = _opened(with_outputs(proto, [*outputs.values()]), weights, path)
            for assignment, feed in zip(assignments, feeds, strict=True):
                values = run(session, feed)
                assignment.update(_of_one((n, values[o]) for n, o in outputs.items()))
    return [{**constants, **assignment} for assignment in assignments]


def _of_one(values: Iterable[tuple[str, Array]]) -> dict[str, bool]:
    return {name: bool(value.ravel()[0]) for name, value in values if value.size}


def runs_node(graph: Graph, index: int, assignment: BranchAssignment) -> bool:
    """Return whether the node at ``index``, or the Loop or Scan around it, runs under a branch assignment."""
    return runs_bodies(graph, graph.around[index], assignment)


def runs_bodies(graph: Graph, bodies: Sequence[markers.Body], assignment: BranchAssignment) -> bool:
    """Return whether bodies run under a branch assignment, as far as Ifs outside of every Loop and Scan decide it."""
    branches = takewhile(lambda body: body.kind == "If", bodies)
    return all(assignment.get(graph.nodes[body.start].inputs[0]) == body.side for body in branches)
