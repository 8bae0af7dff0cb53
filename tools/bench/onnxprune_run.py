"""One model through onnxprune, with everything that can go wrong turned into a record."""

from __future__ import annotations

import contextlib
import math
import re
import time
import traceback
from pathlib import Path
from typing import Any

import onnx

from bench.files import parameters
from bench.peers import CLOSE, run
from bench.survivors import Unclear, masked, worst_difference
from bench.zoo_tables import REALLY
from onnxprune import Pipeline, Plan, errors, prune
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import PlanGroup
from onnxprune.graph.facts import integer_bounds
from onnxprune.passes import Context, Model, PassResult, Prune, Validate
from onnxprune.runtime import inputs, sessions

# Reasons that belong to what a model is for (a vocabulary, its outputs) come after those that a better rule may lift.
_PLAIN = ("fixed-size", "graph-output", "graph-input", "spatial")
_BUG = re.compile(r"^\w*(Error|Exception|Iteration): ")


def rounded_up(path: Path, ratio: float, approximate: bool) -> Plan:
    """A plan that takes from every group what torch-pruning takes: n - floor(n * (1 - ratio)) of n equal steps.

    onnxprune rounds to the nearest count; on narrow layers the difference is several percent. The order in which a
    group loses units does not depend on the ratio: the plan is put together from one run per number of steps.
    """

    def plan_at(share: float) -> tuple[Plan, dict[int, int]]:
        result = prune(path, ratio=share, approximate=approximate, validate=False)
        return result.plan, {g["id"]: g["steps"] for g in result.report.groups if g["prunable"]}

    whole, steps = plan_at(ratio)
    groups = []
    for count in sorted(set(steps.values())):
        share = (count - math.floor(count * (1 - ratio) + 1e-9)) / count
        # Without their slots, which on a concatenated axis tell of other groups too.
        mine = [g for g in plan_at(share)[0].groups if steps.get(g.id) == count]
        groups += [PlanGroup(g.id, g.units, g.removed) for g in mine]
    return Plan(whole.model_sha256, whole.criterion, sorted(groups, key=lambda g: g.id))


def cut(
    path: Path,
    model: onnx.ModelProto,
    ratio: float,
    approximate: bool,
    save: Path | None = None,
    round_up: bool = False,
) -> dict[str, Any]:
    """Prune and validate; ``save`` is where the result is written, if it passes.

    Returns:
        ``status``: cut, small (exact, but at most 5 % of the parameters gone), left (nothing removable), wrong
        (validation failed), error (an error of onnxprune's own), crash (any other exception).
    """
    analyses: list[Analysis] = []

    def remember(_: Context, model: Model) -> PassResult:
        analyses.append(model.analysis)
        return PassResult(model, changed=False)

    start = time.perf_counter()
    try:
        plan = rounded_up(path, ratio, approximate) if round_up else None
        first = Prune(ratio=ratio, approximate=approximate, plan=plan)
        passes = [first, remember, Validate(faithful=False, timed=False)]
        result = Pipeline(passes).run(path)
    except errors.BudgetError as error:
        record = {"status": "left", "removed": 0.0, "message": str(error)}
    except errors.OnnxpruneError as error:
        record = {
            "status": "wrong" if error.exit_code == 4 else "error",
            "message": str(error),
            "type": type(error).__name__,
        }
    except Exception as error:
        where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        record = {"status": "crash", "message": str(error), "type": type(error).__name__, "where": where[-4:]}
        record |= _node_of(error)
    else:
        report = result.report
        removed = 1 - parameters(result.model) / max(1, parameters(model))
        record = {
            "status": "cut" if removed > REALLY else "small",
            "removed": round(removed, 4),
            "macs_removed": round(1 - report.totals.macs_after / max(1, report.totals.macs_before), 4),
            "exact": report.exactness.passed,
            "error": report.exactness.error,
            "note": report.exactness.note,
            "seconds": {k: round(v, 3) for k, v in report.seconds.items()},
        }
        if save is not None:
            result.save(save)
        if not approximate:
            record |= _checked_again(path, analyses[0], model, result.model)
    if analyses:
        record |= _barriers(analyses[0])
    return record | {"total_seconds": round(time.perf_counter() - start, 3)}


def feed_for(path: Path, analysis: Analysis) -> dict[str, Any]:
    """A seeded feed with the first probe's shapes."""
    specs = sessions.input_specs(sessions.open_session(path, optimize=False, threads=1))
    bounds = integer_bounds(analysis.graph, analysis.facts)
    return inputs.synthetic(specs, analysis.facts.probes[0].inputs, bounds=bounds)


def _checked_again(
    path: Path, analysis: Analysis, original: onnx.ModelProto, result: onnx.ModelProto
) -> dict[str, Any]:
    """The check that knows the two files only; it must be able to see a difference, or it says nothing."""
    try:
        feed = feed_for(path, analysis)
        before, expected, after = (run(m, feed) for m in (original, masked(original, result), result))
        error = worst_difference(expected, after)
        if worst_difference(before, expected) == 0:
            raise Unclear("what was removed has no effect on the outputs of these random weights")
    except Unclear as why:
        return {"independent": None, "independent_note": str(why)}
    except Exception as problem:  # the check is a second opinion; that it could not be had is worth a line, no more
        return {"independent": None, "independent_note": f"{type(problem).__name__}: {problem}"[:300]}
    return {"independent": error <= CLOSE, "independent_error": error}


def _barriers(analysis: Analysis) -> dict[str, Any]:
    """The reasons that hold most channels, and the rules that raised (which costs a cut, never an exception)."""
    found = []
    with contextlib.suppress(Exception):
        found = list(analysis.barriers)
    channels = sum(b.channels for b in found)
    found.sort(key=lambda b: b.code in _PLAIN)
    top = [
        {"code": b.code, "op": b.op, "detail": b.detail[:160], "share": round(b.channels / max(1, channels), 3)}
        for b in found[:6]
    ]
    bugs = [f"{b.op}: {b.detail[:160]}" for b in found if b.code == "unsupported-form" and _BUG.match(b.detail)]
    return {"barriers": top, "held_channels": channels, "rule_bugs": bugs[:5]}


def _node_of(error: BaseException) -> dict[str, Any]:
    """The operator an exception passed on its way, where a frame of the stack has a ``node``."""
    op = ""
    frame = error.__traceback__
    while frame is not None:
        op = getattr(frame.tb_frame.f_locals.get("node"), "op", op) or op
        frame = frame.tb_next
    return {"op": op}
