"""Capture the feature maps that a criterion needs, of the original or of the pruned model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group
from onnxprune.channels.survivors import Survivors
from onnxprune.graph.view import Graph
from onnxprune.importance import statistics
from onnxprune.importance.slots import CapturedMaps, ContractionInput, Targets, contraction_inputs
from onnxprune.io.subgraphs import hidden_tensors
from onnxprune.operators.contractions import Form, pick, rows_per_sample
from onnxprune.operators.registry import lookup
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.comparable import inside
from onnxprune.pipeline import Context
from onnxprune.pruning.rewriting import cut
from onnxprune.runtime.capture import Checkpoint, Request, capture, to_maps

# Bytes of one Gram matrix beyond which the positions of a kernel share a Gram of the channels.
_LARGEST_GRAM = 256 << 20
# Rows of a Gram matrix to rank channels by: per column, and at least. Three times as many rank no better.
_PER_COLUMN, _ROWS = 10, 1 << 12
# Assumed number of samples where it is unknown: with fewer samples, rows would be missing.
_SAMPLES = 128


def captured_maps(
    context: Context,
    analysis: Analysis,
    groups: Sequence[Group],
    needs: Sequence[str],
    removed: NDArray[np.bool_] | None = None,
    source: CalibrationBatches | None = None,
) -> CapturedMaps:
    """Accumulate statistics of the inputs of every contraction that reads the groups' channels.

    Args:
        context: context of the run, with the calibration data.
        analysis: analysis of the model.
        groups: groups whose channels are read.
        needs: names of statistics.
        removed: mask over the atoms that are removed already [atoms], bool; the pruned model is then run.
        source: part of the data; None: all.

    Raises:
        UsageError: there is no data, or it does not fit. ModelError: the model does not run, or maps are not finite.
    """
    source = source or CalibrationBatches(context, analysis)
    targets = Targets(analysis.units, groups)
    component = analysis.units.component
    sites = [
        s for s in contraction_inputs(analysis.table, component) if (targets.group[component[s.label.ids]] >= 0).any()
    ]
    unpruned = removed is None or not removed.any()
    graph = analysis.graph
    model = (graph.proto, graph.weights) if unpruned or removed is None else cut(analysis.table, removed)
    types = inside(analysis, None if unpruned or removed is None else Survivors(analysis.table, removed).shape)
    unseen = hidden_tensors(analysis.graph.proto, types)
    sites = [
        s for s in sites if not unseen & {s.tensor, *(s.partner or ("",))[:1], *(name for name, _ in s.conditions)}
    ]
    captured = CapturedMaps(sites)
    requests = _Requests(needs, source.samples)
    forms = {} if unpruned or removed is None else _forms_after(analysis, sites, model[0], removed)
    for site in sites:
        requests.add(site, captured, forms.get((site.node.index, site.position), site.form))
    checkpoint = None
    if context.cache is not None and (print_ := source.fingerprint()) is not None:
        mask = b"" if unpruned or removed is None else np.packbits(removed).tobytes()
        key = ":".join([analysis.loaded.sha256, print_, hashlib.sha256(mask).hexdigest()])
        checkpoint = Checkpoint(context.cache, key)
    with context.stage("capture"):
        captured.samples = capture(
            model,
            requests.requests,
            source,
            sizes=bytes_per_sample(analysis, (r.tensor for r in requests.requests)),
            types=types,
            limits=source.limits(context.memory_limit),
            checkpoint=checkpoint,
            tell=lambda share: context.tell("capture", share),
        )
    for finish in requests.finish:
        finish()
    return captured


def _forms_after(
    analysis: Analysis, sites: Sequence[ContractionInput], proto: onnx.ModelProto, removed: NDArray[np.bool_]
) -> dict[tuple[int, int], Form | None]:
    """Return the forms of the contractions in the pruned model, which may have fewer convolution groups."""
    after = Survivors(analysis.table, removed)
    by_output = {node.outputs[0]: node for node in Graph.of(proto, {}).nodes if node.outputs}
    result: dict[tuple[int, int], Form | None] = {}
    for site in sites:
        node = by_output.get(site.node.outputs[0])
        if node is not None and site.form is not None:
            shapes = [after.shape(n) if n else None for n in site.node.inputs]
            rule = lookup(node.domain, node.op, node.version)
            result[site.node.index, site.position] = rule.form(node, shapes, site.position)
    return result


class _Requests:
    """Requests so far, each statistic of a tensor once, and the functions that store their results."""

    def __init__(self, needs: Sequence[str], samples: int | None) -> None:
        self._needs, self._samples = needs, samples
        self.requests: list[Request] = []
        self.finish: list[Callable[[], None]] = []
        self._requested: set[tuple[Hashable, str]] = set()

    def add(self, site: ContractionInput, captured: CapturedMaps, form: Form | None) -> None:
        """Add the needs that this site supports; ``form`` is the contraction's in the model that is run."""
        for need in self._needs:
            if statistics.get(need).columns:
                self._add_columns(need, site, form, captured)
            else:
                self._add_maps(need, site.maps_key, (site.tensor, site.axes), site, captured)
        if site.partner is not None:
            # Replaces a weight there, whatever else the criterion reads.
            self._add_maps("square", site.maps_key, (site.tensor, site.axes), site, captured)
            self._add_maps("square", site.partner_key, site.partner, site, captured)

    def _add_maps(
        self,
        need: str,
        key: Hashable,
        place: tuple[str, tuple[int, ...]],
        site: ContractionInput,
        captured: CapturedMaps,
    ) -> None:
        tensor, axes = place
        statistic, joins = statistics.get(need)(), 0 not in axes
        arrange = decoded(site, to_maps(axes)) if tensor == site.tensor else to_maps(axes)
        request = Request("", tensor, arrange, statistic, joins=joins, where=site.conditions, axes=axes)
        self._add(need, key, request, captured)

    def _add_columns(self, need: str, site: ContractionInput, form: Form | None, captured: CapturedMaps) -> None:
        channels = int(site.label.ids.size)
        if form is None:
            return
        if _gram_bytes(channels * form.taps, form.parts) <= _LARGEST_GRAM:
            rows = rows_per_sample(form, channels, self._samples or _SAMPLES, _PER_COLUMN, _ROWS)
            arrange, growth = columns_of(form, rows), form.taps
        elif _gram_bytes(channels, form.parts) <= _LARGEST_GRAM:
            arrange, growth = shared_columns(site.axes, form.parts), 1
        else:
            return
        joins = 0 not in site.axes
        arrange = decoded(site, arrange)
        statistic = statistics.get(need)()
        request = Request("", site.tensor, arrange, statistic, growth, joins, site.conditions, site.axes)
        self._add(need, site.columns_key, request, captured)

    def _add(self, need: str, key: Hashable, request: Request, captured: CapturedMaps) -> None:
        """Add the request unless an equal one exists, and record where its result goes."""
        if (key, need) in self._requested:
            return
        self._requested.add((key, need))
        statistic = request.statistic
        into = captured.columns if statistics.get(need).columns else captured.maps
        # A user's own class may lack the attribute that its batches may be joined.
        joins = request.joins and getattr(statistic, "additive", False)
        request = replace(request, name=f"{need} {key!r}", joins=joins)
        self.requests.append(request)
        self.finish.append(lambda: into.setdefault(key, {}).update(statistic.result()))


def _gram_bytes(columns: int, parts: int) -> int:
    return 8 * columns * columns // parts


def decoded(site: ContractionInput, arrange: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Apply the function to the real numbers that a site's codes represent."""
    decode = site.decode
    return arrange if decode is None else lambda value: arrange(decode(value))


def columns_of(form: Form, per_sample: int) -> Callable[[Any], Any]:
    """Return a function that gives columns of the contraction's input, with enough rows."""
    return lambda value: form.columns(value, pick(form, value, per_sample))


def shared_columns(axes: Sequence[int], parts: int) -> Callable[[Any], Any]:
    """Return a function that gives channels as columns, one row per position: kernel positions share their Gram."""
    maps = to_maps(axes)

    def arrange(value: Any) -> Any:
        spread = maps(value)
        spread = spread.reshape(len(spread), parts, spread.shape[1] // parts, -1)
        return spread.transpose(1, 0, 3, 2).reshape(parts, -1, spread.shape[2])

    return arrange


def bytes_per_sample(analysis: Analysis, names: Iterable[str]) -> dict[str, int]:
    """Return the bytes of tensors per sample, from the first probe's shapes; none where a rank is unknown."""
    probe = analysis.facts.probes[0]
    batch = max(1, min((s[0] for s in probe.inputs.values() if s), default=1))
    shapes = {name: probe.shapes.get(name) for name in names}
    times = {n: analysis.graph.producer[n].repeats if n in analysis.graph.producer else 1 for n in shapes}
    return {n: 4 * times[n] * int(np.prod([d or 1 for d in s])) // batch for n, s in shapes.items() if s is not None}
