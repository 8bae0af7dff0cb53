"""Latency tables: taken from a file, kept of an earlier run, or measured; and what they say of a model, to read."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Counts, Sizes
from onnxprune.allocation.latency_model import VERSION, Latency, LatencyTable, Places, samples_of, surfaces
from onnxprune.allocation.selection import RankedGroup, spread, take
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.selection import atoms_removed
from onnxprune.errors import BudgetError, ModelError, UsageError
from onnxprune.graph.view import Node
from onnxprune.io.files import user_cache
from onnxprune.passes.flush import flush
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.prune import frozen_at
from onnxprune.passes.trial import Trial, timing_feed
from onnxprune.pipeline import Context
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import SHARES, KindSteps, NodeTime, Profile
from onnxprune.runtime.latency import Device, in_turn, profile
from onnxprune.runtime.sessions import Feed

SECONDS = 60.0
"""How long measuring may take where nobody says."""
_CUTS, _FEWEST, _CHECKS = 96, 12, 6
# Runs of one cut: as many as fit into so many seconds, within bounds. The mean of the shortest is taken: disturbances
# only make a run longer.
_RUN_SECONDS, _LEAST_RUNS, _MOST_RUNS, _SHORTEST = 0.1, 9, 60, 0.4
# How far the times of a profile are brought to what a whole run says.
_STEADY = (0.4, 1.5)
# Rounds of reweighting, and an error below which all count alike.
_ROUNDS, _CLOSE = 20, 0.01
# Seconds that whole runs of one cut and of the original may take together.
_WHOLE_SECONDS = 1.0
# Levels per group; in between, times are joined. Kernels take 4, 8 or 16 channels at once.
_LEVELS, _BLOCK = 16, 4
# Levels next to a share that counts are drawn from.
_NEAR = 4
# Kinds of nodes whose steps are shown, and levels of each.
_KINDS, _SHOWN = 4, 16


# -- where a table comes from ------------------------------------------------------------------------------------------


def rewritable_sizes(analysis: Analysis) -> Sizes:
    """Sizes over the groups that can be cut, of the analysis in which nodes that cannot be rewritten are frozen.

    Raises:
        BudgetError: nothing can be cut.
    """
    for _ in range(len(analysis.graph.nodes) + 1):
        groups = [g for g in analysis.units.groups if g.prunable]
        if not groups:
            raise BudgetError("No channel of this model can be removed.", hint="'onnxprune inspect' lists the reasons.")
        sizes = Sizes(analysis, groups)
        removed = removal(analysis, sizes, sizes.steps - 1)
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
    given: str | Path | LatencyTable | None = None,
    seconds: float = SECONDS,
    anew: bool = False,
) -> LatencyTable:
    """The table ``given``, else the one kept for this model on this machine, else a new one, which is then kept.

    It is kept in ``context.cache``, else in the user's cache folder. ``anew``: measure whatever is kept.

    Raises:
        UsageError: the given table cannot be read or is another model's. ModelError: the model does not run.
    """
    analysis = sizes.analysis
    if given is not None:
        table = given if isinstance(given, LatencyTable) else LatencyTable.load(given)
        table.check_model(analysis.loaded.sha256, "" if isinstance(given, LatencyTable) else repr(str(given)))
        return table
    file = _table_file(context, analysis)
    if not anew and file.is_file():
        with suppress(UsageError):  # a damaged one is measured anew
            table = LatencyTable.load(file)
            table.check_model(analysis.loaded.sha256, "")
            return table
    table = measure_table(context, sizes, seconds=seconds)
    with suppress(OSError, UsageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        table.save(file)
    return table


def _table_file(context: Context, analysis: Analysis) -> Path:
    """The file of the table for this model, its input sizes and this device."""
    shapes = {name: list(shape) for name, shape in analysis.facts.probes[0].inputs.items()}
    key = json.dumps([VERSION, analysis.loaded.sha256, shapes, context.device.facts()], sort_keys=True)
    folder = context.cache or user_cache()
    return folder / f"latency-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


# -- measuring one -----------------------------------------------------------------------------------------------------


def block_levels(steps: int) -> Counts:
    """Counts of kept steps at which kernels are measured: multiples of 4 or more, and the whole."""
    block = _BLOCK * max(1, -(-steps // (_BLOCK * _LEVELS))) if steps >= 2 * _BLOCK else 1
    return np.unique(np.append(np.arange(block, steps + 1, block), steps))


def measure_table(context: Context, sizes: Sizes, *, seconds: float = SECONDS) -> LatencyTable:
    """Times of all nodes at random counts, and a check of whole runs at counts that were not measured before.

    Args:
        seconds: how long to measure; at least 12 cuts are, whatever it takes.

    Raises:
        ModelError: the model does not run.
    """
    draw = np.random.default_rng(context.seed)
    analysis, places = sizes.analysis, Places(sizes)
    with context.stage("profile"), Trial.of(analysis) as trial:
        feed = timing_feed(context, trial)
        bench = Bench(analysis, sizes, context.device, feed, trial)
        shapes = {name: list(value.shape) for name, value in feed.items()}
        table = LatencyTable(analysis.loaded.sha256, dict(context.device.facts()), shapes, 0.0)
        timed, nodes, wholes = [], [], []
        start = time.perf_counter()
        # The first cut removes nothing: the original but for what every result is spared, such as subnormal weights.
        for number, kept in enumerate((sizes.steps, *_cuts(sizes, draw))):
            if number > _FEWEST and time.perf_counter() - start > seconds:
                break
            path = bench.cut(kept)
            timed.append(kept)
            nodes.append(bench.nodes(path))
            wholes.append(bench.beside(path))
            context.tell("profile", 0.9 * number / _CUTS)
        for kept, times, factor in zip(timed, nodes, steadied(nodes, wholes), strict=True):
            table.samples += samples_of(places, kept, {name: factor * t for name, t in times.items()})
        checks = [sizes.steps, *(_drawn(sizes, draw, i / _CHECKS) for i in range(_CHECKS))]
        fit_runs(table, places, np.stack(timed), wholes)
        check_runs(table, places, np.stack(checks), [bench.beside(bench.cut(kept)) for kept in checks])
    return table


class Bench:
    """Cuts of one model as files, and how long they take."""

    def __init__(self, analysis: Analysis, sizes: Sizes, device: Device, feed: Feed, trial: Trial) -> None:
        self._analysis, self._sizes, self._device, self._feed, self._trial = analysis, sizes, device, feed, trial
        self._runs = _LEAST_RUNS
        self.original = trial.original

    def cut(self, kept: Counts, stem: str = "timed") -> Path:
        """The model cut to counts [groups], whichever units go."""
        removed = removal(self._analysis, self._sizes, kept)
        return self._trial.write(*flush(cut_model(self._analysis, removed))[0], stem)[0]

    def nodes(self, path: Path) -> dict[str, float]:
        """Seconds of the original's nodes in a cut of it."""
        times = profile(path, [self._feed], runs=self._runs, device=self._device, share=_SHORTEST)
        once = sum(t.seconds for t in times)
        self._runs = int(np.clip(_RUN_SECONDS / max(once, 1e-6), _LEAST_RUNS, _MOST_RUNS))
        return spread(self._analysis, [(t.name, t.op, t.seconds) for t in times])

    def beside(self, path: Path) -> tuple[float, float]:
        """Seconds of a whole run of the original and of a cut, the two in turn."""
        before, after = self.whole([self.original, path], runs=self._runs, budget_s=_WHOLE_SECONDS)
        if not before:
            raise ModelError("the clock is too coarse to time this model")
        return float(before), float(after)

    def whole(self, paths: Sequence[Path], runs: int = 60, budget_s: float = 10.0) -> NDArray[np.float64]:
        """Seconds per run of several models, measured in turn."""
        times = in_turn(paths, [self._feed], self._device, runs=runs, budget_s=budget_s, steady=True)
        return np.array([np.sort(t)[: max(1, round(_SHORTEST * len(t)))].mean() for t in times]) * 1e-3


def removal(analysis: Analysis, sizes: Sizes, kept: Counts) -> NDArray[np.bool_]:
    """Mask over atoms of a cut to counts [groups]: the last units of every group go."""
    ranked = {
        g.id: RankedGroup(-np.arange(g.size, dtype=np.float64), g.classes, g.steps, np.arange(g.steps), 0.0)
        for g in sizes.groups
    }
    gone = [int(s - k) for s, k in zip(sizes.steps, kept, strict=True)]
    return atoms_removed(analysis.units, take(analysis, ranked, gone))


def _cuts(sizes: Sizes, draw: np.random.Generator) -> Iterator[Counts]:
    """Counts to measure: few and many channels throughout, mixed ones, and every fourth time any numbers at all."""
    for number in range(_CUTS):
        if number % 4 == 3:
            yield np.asarray(draw.integers(1, sizes.steps + 1))
        else:
            yield _drawn(sizes, draw, draw.random() if number % 2 else None)


def _drawn(sizes: Sizes, draw: np.random.Generator, share: float | None = None) -> Counts:
    """Random counts [groups] that kernels like: any, or with ``share`` about so much of every group."""
    found = []
    for steps in sizes.steps.tolist():
        levels = block_levels(steps)
        if share is None:
            found.append(draw.choice(levels))
        else:
            near = np.argsort(np.abs(levels - share * steps), kind="stable")[:_NEAR]
            found.append(levels[draw.choice(near)])
    return np.array(found, dtype=np.int64)


Whole = tuple[float, float]


def steadied(nodes: Sequence[Mapping[str, float]], wholes: Sequence[Whole]) -> NDArray[np.float64]:
    """Factors on the times of the nodes of every cut [cuts] that bring their sum to what its whole run says.

    A profile is written while the machine is as busy as it is; whole runs are held against the original's beside them.
    So the profile says how the time is shared out over the nodes, and the whole run how much it is.

    Args:
        nodes: seconds by node.
        wholes: seconds of whole runs of the original and of every cut.
    """
    sums = np.array([sum(times.values()) for times in nodes])
    runs = np.median([before for before, _ in wholes]) * np.array([after / before for before, after in wholes])
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


def fit_runs(table: LatencyTable, places: Places, timed: Counts, wholes: Sequence[Whole]) -> None:
    """Fit what a run takes besides its nodes.

    Args:
        timed: counts [cuts, groups] whose nodes were timed.
        wholes: seconds of whole runs of the original and of every cut. Of each the share counts: how busy the machine
            is changes both alike.
    """
    table.seconds = float(np.median([before for before, _ in wholes]))
    shares = np.array([after / before for before, after in wholes])
    table.overhead, table.slope = line(Latency(places, table).rows(timed)[:, 0], shares * table.seconds)


def check_runs(table: LatencyTable, places: Places, cuts: Counts, wholes: Sequence[Whole]) -> None:
    """Hold predictions against whole runs of cuts [cuts, groups] not measured before."""
    predicted = Latency(places, table).rows(cuts)[:, 0]
    shares = np.array([after / before for before, after in wholes])
    table.checks = list(zip(predicted.tolist(), (shares * table.seconds).tolist(), strict=True))


def line(nodes: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, float]:
    """(overhead, slope) of measured = overhead + slope * nodes, relative errors least, slope between 0.5 and 2.

    The overhead is below 0 where writing the profile takes longer than what a run does besides its nodes.
    """
    weight = 1.0 / measured
    design = np.stack([weight, nodes * weight], axis=1)
    slope = float(np.clip(np.linalg.lstsq(design, np.ones_like(measured), rcond=None)[0][1], 0.5, 2.0))
    rest = (measured - slope * nodes) * weight
    return float((rest * weight).sum() / np.square(weight).sum()), slope


# -- reading one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class Profiled:
    """What a profile found: ``facts`` to read, ``table`` to reckon with."""

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


def profiled(sizes: Sizes, table: LatencyTable, model: str) -> Profile:
    """The facts of a table, in milliseconds."""
    places = Places(sizes)
    latency = Latency(places, table)
    whole = latency.of_nodes(sizes.steps)
    parts = [latency.of_nodes(_alike(sizes, share)) for share in SHARES]
    nodes = [
        NodeTime(n.label, n.kind, 1e3 * whole[n.label], [1e3 * part[n.label] for part in parts])
        for n in places.nodes
        if whole.get(n.label)
    ]
    nodes.sort(key=lambda node: -node.ms)
    checks = [(1e3 * p, 1e3 * m) for p, m in table.checks]
    steps = _steps(places, table, whole)
    return Profile(model, table.device, table.inputs, 1e3 * table.seconds, table.error, checks, nodes, steps)


def _alike(sizes: Sizes, share: float) -> Counts:
    """Counts [groups]: of every group the measured level nearest to the share."""
    levels = [block_levels(int(s)) for s in sizes.steps]
    return np.array([x[np.argmin(np.abs(x - share * s))] for x, s in zip(levels, sizes.steps, strict=True)])


def _steps(places: Places, table: LatencyTable, whole: dict[str, float]) -> list[KindSteps]:
    """The kinds that take most time in all, by the channels that they read and make."""
    kinds: dict[str, list[Node]] = defaultdict(list)
    for node in places.moving:
        kinds[places.kinds[node.label]].append(node)
    dearest = sorted(kinds, key=lambda k: -sum(whole.get(n.label, 0.0) for n in kinds[k]))[:_KINDS]
    found, shape = [], places.sizes.analysis.facts.shape
    for kind in dearest:
        surface = surfaces(places, [s for s in table.samples if places.kinds.get(s.node) == kind]).get(kind)
        if surface is None:
            continue
        reads, makes = (int(n) for n in places.channels(kinds[kind][0], shape))
        for by, held in (("reads", surface.reads), ("makes", surface.makes)):
            levels = _some(np.rint(np.exp(held)).astype(np.int64))
            same = np.full(levels.size, makes if by == "reads" else reads)
            ms = 1e3 * (surface.at(levels, same) if by == "reads" else surface.at(same, levels))
            if levels.size > 1:
                found.append(KindSteps(kinds[kind][0].op, len(kinds[kind]), by, levels.tolist(), ms.tolist()))
    return found


def _some(levels: Counts) -> Counts:
    """So many of the levels, evenly."""
    return np.asarray(levels[np.unique(np.linspace(0, levels.size - 1, _SHOWN).round().astype(int))])
