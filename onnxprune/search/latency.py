"""Latency tables: read from a file, from the cache of an earlier run, or measured; and a summary for the report."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Counts, Sizes
from onnxprune.allocation.latency_model import VERSION, Latency, LatencyTable, NodeKinds, fit_models, samples_of
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.selection import close_selection, spread
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.selection import removed_atoms
from onnxprune.errors import BudgetError, ModelError, UsageError
from onnxprune.graph.view import Node
from onnxprune.io.files import user_cache
from onnxprune.passes.flush import flush
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.prune import frozen_at
from onnxprune.passes.workspace import Workspace, timing_feed
from onnxprune.pipeline import Context
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import SHARES, KindSteps, NodeTime, Profile
from onnxprune.runtime.latency import Device, in_turn, profile
from onnxprune.runtime.sessions import Feed

SECONDS = 60.0
"""Default duration of the measurement in seconds."""
_CUTS, _FEWEST, _CHECKS = 96, 12, 6
# Profiled runs of one pruned model: as many as fit into so many seconds, within bounds. The result is the mean of the
# shortest: disturbances only make a run longer.
_RUN_SECONDS, _LEAST_RUNS, _MOST_RUNS, _SHORTEST = 0.1, 9, 60, 0.4
# Pairs of runs of a pruned model and the original, and the share of the permitted seconds that they go on for where
# runs are short.
_PAIRS, _LEAST_SHARE = 60, 0.05
# Limits of the factor that scales the times of a profile to the time of a whole run.
_STEADY = (0.4, 1.5)
# Rounds of reweighting, and an error below which all have the same weight.
_ROUNDS, _CLOSE = 20, 0.01
# The least time in seconds that a ratio is taken to.
_FINE = 1e-9
# Seconds that whole runs of one pruned model and of the original may take together.
_WHOLE_SECONDS = 1.0
# Levels per group; in between, times are interpolated. Kernels process 4, 8 or 16 channels at once.
_LEVELS, _BLOCK = 16, 4
# Number of levels next to a share that counts are drawn from.
_NEAR = 4
# Number of node kinds whose steps are shown, and of levels of each.
_KINDS, _SHOWN = 4, 16


# -- where a table comes from ------------------------------------------------------------------------------------------


def rewritable_sizes(analysis: Analysis) -> Sizes:
    """Return sizes over the groups that can be pruned, after freezing the nodes that cannot be rewritten.

    Raises:
        BudgetError: no group can be pruned.
    """
    for _ in range(len(analysis.graph.nodes) + 1):
        groups = [g for g in analysis.units.groups if g.prunable]
        if not groups:
            raise BudgetError("No channel of this model can be removed.", hint="'onnxprune inspect' lists the reasons.")
        sizes = Sizes(analysis, groups)
        removed = removed_mask(analysis, sizes, sizes.steps - 1)
        try:
            cut_model(analysis, removed)
        except CannotRewrite as stop:
            analysis = frozen_at(analysis, stop, removed)
        else:
            return sizes
    raise AssertionError("every node was frozen")  # pragma: no cover


def latency_table(
    context: Context,
    sizes: Sizes,
    *,
    source: str | Path | LatencyTable | None = None,
    seconds: float = SECONDS,
    anew: bool = False,
) -> LatencyTable:
    """Return the table ``source``, else the cached one of this model on this machine, else measure and cache a new one.

    Args:
        context: the run; its ``cache``, else the user's cache folder, holds the table.
        sizes: sizes of all tensors as functions of counts.
        source: a table or its file.
        seconds: duration of the measurement.
        anew: measure even if a table is cached.

    Raises:
        UsageError: the given table cannot be read or is another model's. ModelError: the model does not run.
    """
    analysis = sizes.analysis
    if source is not None:
        table = source if isinstance(source, LatencyTable) else LatencyTable.load(source)
        table.check_model(analysis.loaded.sha256, "" if isinstance(source, LatencyTable) else repr(str(source)))
        return table
    file = _table_file(context, analysis)
    if not anew and file.is_file():
        with suppress(UsageError):  # measure a damaged table again
            table = LatencyTable.load(file)
            table.check_model(analysis.loaded.sha256, "")
            return table
    table = measure_table(context, sizes, seconds=seconds)
    with suppress(OSError, UsageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        table.save(file)
    return table


def _table_file(context: Context, analysis: Analysis) -> Path:
    """Return the file of the table for this model, its input sizes and this device."""
    shapes = {name: list(shape) for name, shape in analysis.facts.probes[0].inputs.items()}
    key = json.dumps([VERSION, analysis.loaded.sha256, shapes, context.device.facts()], sort_keys=True)
    folder = context.cache or user_cache()
    return folder / f"latency-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


# -- measuring one -----------------------------------------------------------------------------------------------------


def block_levels(steps: int) -> Counts:
    """Return counts of kept steps at which kernels are measured: multiples of 4 or more, and the whole."""
    block = _BLOCK * max(1, -(-steps // (_BLOCK * _LEVELS))) if steps >= 2 * _BLOCK else 1
    return np.unique(np.append(np.arange(block, steps + 1, block), steps))


def measure_table(context: Context, sizes: Sizes, *, seconds: float = SECONDS) -> LatencyTable:
    """Measure times of all nodes at random counts, and check the model against whole runs at other counts.

    Args:
        context: the run.
        sizes: sizes of all tensors as functions of counts.
        seconds: duration of the measurement; at least 12 pruned models are measured, however long they take.

    Raises:
        ModelError: the model does not run.
    """
    draw = np.random.default_rng(context.seed)
    analysis, places = sizes.analysis, NodeKinds(sizes)
    with context.stage("profile"), Workspace.of(analysis) as trial:
        feed = timing_feed(context, trial)
        bench = Bench(analysis, sizes, context.device, feed, trial)
        shapes = {name: list(value.shape) for name, value in feed.items()}
        table = LatencyTable(analysis.loaded.sha256, dict(context.device.facts()), shapes, 0.0)
        all_counts, nodes, runs = [], [], []
        start = time.perf_counter()
        # The first model is unpruned: the original after the clean-up of every result, such as of subnormal weights.
        for number, counts in enumerate((sizes.steps, *_cuts(sizes, draw))):
            if number > _FEWEST and time.perf_counter() - start > seconds:
                break
            path = bench.cut(counts)
            all_counts.append(counts)
            nodes.append(bench.nodes(path))
            runs.append(bench.beside(path))
            context.tell("profile", 0.9 * number / _CUTS)
        for counts, times, factor in zip(all_counts, nodes, steadied(nodes, runs), strict=True):
            table.samples += samples_of(places, counts, {name: factor * t for name, t in times.items()})
        checks = [sizes.steps, *(_drawn(sizes, draw, i / _CHECKS) for i in range(_CHECKS))]
        fit_runs(table, places, np.stack(all_counts), runs)
        check_runs(table, places, np.stack(checks), [bench.beside(bench.cut(counts)) for counts in checks])
    return table


class Bench:
    """Pruned models of one original as files, and their times."""

    def __init__(self, analysis: Analysis, sizes: Sizes, device: Device, feed: Feed, trial: Workspace) -> None:
        self._analysis, self._sizes, self._device, self._feed, self._trial = analysis, sizes, device, feed, trial
        self._runs = _LEAST_RUNS
        self.original = trial.original

    def cut(self, counts: Counts, stem: str = "timed") -> Path:
        """Write the model pruned to counts [groups]; which units are removed does not matter."""
        removed = removed_mask(self._analysis, self._sizes, counts)
        return self._trial.write(*flush(cut_model(self._analysis, removed))[0], stem)[0]

    def nodes(self, path: Path) -> dict[str, float]:
        """Return seconds of the original's nodes in a pruned model."""
        times = profile(path, [self._feed], runs=self._runs, device=self._device, share=_SHORTEST)
        once = sum(t.seconds for t in times)
        self._runs = int(np.clip(_RUN_SECONDS / max(once, 1e-6), _LEAST_RUNS, _MOST_RUNS))
        return spread(self._analysis, [(t.name, t.op, t.seconds) for t in times])

    def beside(self, path: Path) -> tuple[float, float]:
        """Return seconds of a whole run of the original and of a pruned model, measured in turn."""
        before, after = self.time_models([self.original, path], runs=self._runs, budget_s=_WHOLE_SECONDS)
        if not before:
            raise ModelError("the clock is too coarse to time this model")
        return float(before), float(after)

    def time_models(self, paths: Sequence[Path], runs: int = _PAIRS, budget_s: float = 10.0) -> NDArray[np.float64]:
        """Return seconds per run of several models, measured in turn.

        The median of the first model's times, and for the others its product with the median ratio to the run of the
        first in the same round, as the final comparison has it: what slows down a whole round leaves it as it is.
        """
        durations: dict[str, Any] = {"runs": runs, "budget_s": budget_s, "least_s": _LEAST_SHARE * budget_s}
        times = 1e-3 * np.array(in_turn(paths, [self._feed], self._device, steady=True, **durations))
        return np.asarray(np.median(times[0]) * np.median(times / np.maximum(times[0], _FINE), axis=1))


def removed_mask(analysis: Analysis, sizes: Sizes, counts: Counts) -> NDArray[np.bool_]:
    """Return the mask over atoms for counts [groups]: the last units of every group are removed."""
    ranked = {
        g.id: RankedGroup(-np.arange(g.size, dtype=np.float64), g.classes, g.steps, np.arange(g.steps), 0.0)
        for g in sizes.groups
    }
    num_removed = [int(s - k) for s, k in zip(sizes.steps, counts, strict=True)]
    return removed_atoms(analysis.units, close_selection(analysis, ranked, num_removed))


def _cuts(sizes: Sizes, draw: np.random.Generator) -> Iterator[Counts]:
    """Yield counts to measure: few and many channels throughout, mixed ones, and every fourth time arbitrary ones."""
    for number in range(_CUTS):
        if number % 4 == 3:
            yield np.asarray(draw.integers(1, sizes.steps + 1))
        else:
            yield _drawn(sizes, draw, draw.random() if number % 2 else None)


def _drawn(sizes: Sizes, draw: np.random.Generator, share: float | None = None) -> Counts:
    """Draw counts [groups] that suit kernels: arbitrary, or with ``share`` about that share of every group."""
    drawn_counts = []
    for steps in sizes.steps.tolist():
        levels = block_levels(steps)
        if share is None:
            drawn_counts.append(draw.choice(levels))
        else:
            near = np.argsort(np.abs(levels - share * steps), kind="stable")[:_NEAR]
            drawn_counts.append(levels[draw.choice(near)])
    return np.array(drawn_counts, dtype=np.int64)


ModelSeconds = tuple[float, float]


def steadied(nodes: Sequence[Mapping[str, float]], model_runs: Sequence[ModelSeconds]) -> NDArray[np.float64]:
    """Return factors [cuts] that scale the node times of every pruned model to the time of its whole run.

    The load of the machine varies between profiles, whereas whole runs are measured next to the original's. The profile
    therefore determines the distribution of the time over the nodes, and the whole run its sum.

    Args:
        nodes: seconds by node, for every pruned model.
        model_runs: seconds of whole runs of the original and of every pruned model.
    """
    sums = np.array([sum(times.values()) for times in nodes])
    runs = np.median([before for before, _ in model_runs]) * np.array([after / before for before, after in model_runs])
    if not (sums > 0).all():
        return np.ones(sums.size)
    weight = 1.0 / runs
    for _ in range(_ROUNDS):  # least absolute errors: profiles that were disturbed do not bend the line
        design = np.stack([weight, sums * weight], axis=1)
        overhead, slope = np.linalg.lstsq(design, runs * weight, rcond=None)[0]
        off = np.abs(overhead + slope * sums - runs) / runs
        weight = 1.0 / (runs * np.sqrt(np.maximum(off, _CLOSE)))
    if slope <= 0:
        return np.ones(sums.size)
    return np.asarray(np.clip((runs - overhead) / (slope * sums), *_STEADY))


def fit_runs(table: LatencyTable, places: NodeKinds, counts: Counts, runs: Sequence[ModelSeconds]) -> None:
    """Fit the overhead of a run besides its nodes.

    Args:
        table: the table to update.
        places: the nodes by what their time depends on.
        counts: counts [cuts, groups] whose nodes were timed.
        runs: seconds of whole runs of the original and of every pruned model. Only their ratio is used: the load of
            the machine changes both alike.
    """
    table.seconds = float(np.median([before for before, _ in runs]))
    shares = np.array([after / before for before, after in runs])
    table.overhead, table.slope = line(Latency(places, table).rows(counts)[:, 0], shares * table.seconds)


def check_runs(table: LatencyTable, places: NodeKinds, cuts: Counts, runs: Sequence[ModelSeconds]) -> None:
    """Compare predictions with whole runs at counts [cuts, groups] not measured before."""
    predicted = Latency(places, table).rows(cuts)[:, 0]
    shares = np.array([after / before for before, after in runs])
    table.checks = list(zip(predicted.tolist(), (shares * table.seconds).tolist(), strict=True))


def line(nodes: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, float]:
    """Fit measured = overhead + slope * nodes with least relative error, slope between 0.5 and 2; (overhead, slope).

    The overhead is below 0 where writing the profile takes longer than a run needs besides its nodes.
    """
    weight = 1.0 / measured
    design = np.stack([weight, nodes * weight], axis=1)
    slope = float(np.clip(np.linalg.lstsq(design, np.ones_like(measured), rcond=None)[0][1], 0.5, 2.0))
    residual = (measured - slope * nodes) * weight
    return float((residual * weight).sum() / np.square(weight).sum()), slope


# -- reading one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class LatencyProfile:
    """The result of a profile: ``facts`` for the report, ``table`` for predictions."""

    facts: Profile
    table: LatencyTable

    def __repr__(self) -> str:
        return f"<Profiled: {self.facts.ms:.3g} ms, {len(self.facts.nodes)} nodes>"

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, for ``--latency-table``.

        Raises:
            UsageError: the file cannot be written.
        """
        self.table.save(path)


def describe_times(sizes: Sizes, table: LatencyTable, model: str) -> Profile:
    """Return the facts of a table, in milliseconds."""
    places = NodeKinds(sizes)
    latency = Latency(places, table)
    full = latency.of_nodes(sizes.steps)
    parts = [latency.of_nodes(_alike(sizes, share)) for share in SHARES]
    nodes = [
        NodeTime(n.label, n.kind, 1e3 * full[n.label], [1e3 * part[n.label] for part in parts])
        for n in places.nodes
        if full.get(n.label)
    ]
    nodes.sort(key=lambda node: -node.ms)
    checks = [(1e3 * p, 1e3 * m) for p, m in table.checks]
    steps = _steps(places, table, full)
    return Profile(model, table.device, table.inputs, 1e3 * table.seconds, table.error, checks, nodes, steps)


def _alike(sizes: Sizes, share: float) -> Counts:
    """Return counts [groups]: of every group the measured level nearest to the share."""
    levels = [block_levels(int(s)) for s in sizes.steps]
    return np.array([x[np.argmin(np.abs(x - share * s))] for x, s in zip(levels, sizes.steps, strict=True)])


def _steps(places: NodeKinds, table: LatencyTable, full: dict[str, float]) -> list[KindSteps]:
    """Return the kinds that take most time in all, by the channels that they read and make."""
    kinds: dict[str, list[Node]] = defaultdict(list)
    for node in places.moving:
        kinds[places.kinds[node.label]].append(node)
    dearest = sorted(kinds, key=lambda k: -sum(full.get(n.label, 0.0) for n in kinds[k]))[:_KINDS]
    result, shape = [], places.sizes.analysis.facts.shape
    for kind in dearest:
        surface = fit_models(places, [s for s in table.samples if places.kinds.get(s.node) == kind]).get(kind)
        if surface is None:
            continue
        reads, makes = (int(n) for n in places.channels(kinds[kind][0], shape))
        for by, sizes in (("reads", surface.reads), ("makes", surface.makes)):
            levels = _spaced_levels(np.rint(np.exp(sizes)).astype(np.int64))
            same = np.full(levels.size, makes if by == "reads" else reads)
            ms = 1e3 * (surface.at(levels, same) if by == "reads" else surface.at(same, levels))
            if levels.size > 1:
                result.append(KindSteps(kinds[kind][0].op, len(kinds[kind]), by, levels.tolist(), ms.tolist()))
    return result


def _spaced_levels(levels: Counts) -> Counts:
    """Return some of the levels, evenly spaced."""
    return np.asarray(levels[np.unique(np.linspace(0, levels.size - 1, _SHOWN).round().astype(int))])
