"""Comparison of two models with the same interface, however the second was made: fidelity, sizes, MACs, latency."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import BudgetError, UsageError
from onnxprune.graph.probes import input_specs
from onnxprune.graph.resized import Stage, resized_of
from onnxprune.io.interchange import ModelSource
from onnxprune.passes.validate import doubted_ranges, measured_inputs
from onnxprune.passes.workspace import Workspace, timing_feed
from onnxprune.pipeline import SAME_MODEL, SAME_REMOVAL, Context, Model, Pass, PassResult
from onnxprune.report.facts import Exactness, Fact, MetricFacts, Report, Sizes, report_of
from onnxprune.runtime.fidelity import fidelity, hints_of
from onnxprune.runtime.latency import latency
from onnxprune.search.evaluation import Metric, measure_metric, points_name


def compare_models(context: Context, model: ModelSource, *, metric: Metric | None = None, timed: bool = True) -> Report:
    """Compare a model with the original of a run.

    Args:
        context: the run of the original.
        model: the other model.
        metric: function from the path of a model to a number; None: not measured.
        timed: whether to measure latency.

    Raises:
        UsageError: the models have different inputs or outputs. ModelError: one cannot be read or run.
    """
    with context.stage("analyze"):
        other = Analysis(model, input_shapes=context.input_shapes)
        check_interfaces(context.analysis, other)
    facts: list[Fact] = [Exactness()]  # the second model may have been made in any way
    with ExitStack() as stack:
        one, two = (stack.enter_context(Workspace.of(a)) for a in (context.analysis, other))
        # Inputs have to suit both: sizes that one leaves open may be fixed in the other.
        is_narrower = _fixed_sizes(other) > _fixed_sizes(context.analysis)
        narrow = two if is_narrower and not resized_of(other.loaded.as_read) else one
        with context.stage("inputs"):
            feeds, name = measured_inputs(context, narrow.analysis)
            facts += doubted_ranges(context)
        with context.stage("fidelity"):
            hints, together = hints_of(context.analysis), not (one.heavy or two.heavy)
            files = one.original, two.original
            facts.append(fidelity(*files, feeds, name, hints=hints, outputs=context.outputs, together=together))
        if timed and not (one.large or two.large):
            with context.stage("latency"):
                feed = timing_feed(context, narrow)
                facts.append(latency(*files, [feed], device=context.device))
        if metric is not None:
            with context.stage("metric"):
                before, after = (measure_metric(metric, workspace.copy_of_original()) for workspace in (one, two))
                facts.append(MetricFacts(points_name(metric), before, after))
    facts += [_sizes(context.analysis, other), context.stages.timings()]
    report = report_of(facts, model=str(context.analysis.loaded.path or ""))
    report.output = str(other.loaded.path or "")
    return report


def _fixed_sizes(analysis: Analysis) -> int:
    """Count the sizes of inputs that a model fixes."""
    return sum(isinstance(size, int) for spec in input_specs(analysis.graph) for size in spec.shape)


def _sizes(one: Analysis, other: Analysis) -> Sizes:
    """Return the sizes of both models."""
    before, after = (sum(layer.macs_before for layer in analysis.layers) for analysis in (one, other))
    return Sizes(one.parameters, other.parameters, before, after, one.loaded.size, other.loaded.size)


class MeasureMetric(Pass):
    """Measure the user's metric of the original and of the result.

    Args:
        metric: function from the path of a model to a number, higher is better.

    Raises:
        UsageError: the metric fails.
    """

    ensures = (SAME_MODEL, SAME_REMOVAL)

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Write both models and measure them."""
        with context.stage("metric"), Workspace.of(context.analysis) as trial:
            before = measure_metric(self.metric, trial.copy_of_original())
            result, _ = trial.write(*model.parts, "result")
            after = measure_metric(self.metric, result)
        return PassResult(model, [MetricFacts(points_name(self.metric), before, after)], changed=False)


def check_gates(report: Report, *, min_fidelity: float | None, max_drop: float | None, hint: str = "") -> None:
    """Check the gates on a result; the arguments are those of :meth:`Report.shortfall`, and a hint.

    Raises:
        BudgetError: one is not met; the error has the report.
    """
    short, verdict = report.shortfall(min_fidelity, max_drop), report.verdict
    if short:
        lost = "" if verdict is None else f"Lost: {verdict.reason}."
        raise BudgetError(short, hint=" ".join(filter(None, (lost, hint))), report=report)


def check_interfaces(one: Analysis, other: Analysis) -> None:
    """Check that two models have the same inputs and outputs.

    Raises:
        UsageError: they have not; the first difference is named.
    """
    pairs = [_interface(analysis) for analysis in (one, other)]
    resized = resized_of(other.loaded.as_read)
    for what, first, second in zip(("input", "output"), *pairs, strict=True):
        missing = [name for name in first if name not in second]
        added = [name for name in second if name not in first]
        if missing or added:
            which = missing[0] if missing else added[0]
            owner = "first" if missing else "second"
            there = ", ".join(second if missing else first) or "none"
            raise UsageError(
                f"the models have different interfaces: only the {owner} has the {what} {which!r}",
                hint=f"Compare models with the same names of inputs and outputs; the other one has: {there}.",
            )
        for name, a in first.items():
            _check_same(what, name, a, _before_removals(second[name], resized.get(name, ()), a))


_Type = tuple[str, tuple[int | str | None, ...] | None]


def _interface(analysis: Analysis) -> tuple[dict[str, _Type], dict[str, _Type]]:
    """Return the element type and the declared shape of inputs and outputs."""
    graph = analysis.loaded.as_read.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {info.name: _type(info) for info in graph.input if info.name not in weights}
    return inputs, {info.name: _type(info) for info in graph.output}


def _type(info: onnx.ValueInfoProto) -> _Type:
    if info.type.WhichOneof("value") != "tensor_type":
        return str(info.type.WhichOneof("value")), None
    tensor = info.type.tensor_type
    element = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    if not tensor.HasField("shape"):
        return element, None
    return element, tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)


def _check_same(what: str, name: str, one: _Type, other: _Type) -> None:
    """Check that an input or output has the same type and, where both fix them, the same sizes; raises UsageError."""
    floats = ("float", "float16", "bfloat16", "double")
    same = one[0] == other[0] or (what == "output" and one[0] in floats and other[0] in floats)
    if not same:
        raise UsageError(
            f"the models have different interfaces: {what} {name!r} is {one[0]} in the first, {other[0]} in the second",
            hint="Compare models that take and give the same types.",
        )
    if one[1] is None or other[1] is None:
        return
    pairs = zip(one[1], other[1], strict=False)
    fixed = len(one[1]) == len(other[1]) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    if not fixed:
        raise UsageError(
            f"the models have different interfaces: {what} {name!r} has the shape {_sizes_of(one[1])} in the first, "
            f"{_sizes_of(other[1])} in the second",
            hint="Compare models whose fixed sizes are the same.",
        )


def _before_removals(actual: _Type, stages: Sequence[Stage], reference: _Type) -> _Type:
    """Return the type of an input or output before removals of its channels, where it then fits a reference."""
    if actual[1] is None or reference[1] is None or len(actual[1]) != len(reference[1]):
        return actual
    shape, known = list(actual[1]), [size if isinstance(size, int) else 0 for size in reference[1]]
    for stage in stages:
        if stage.fits(known):
            return actual[0], tuple(stage.sizes.get(axis, size) for axis, size in enumerate(shape))
    return actual


def _sizes_of(shape: Sequence[Any]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
