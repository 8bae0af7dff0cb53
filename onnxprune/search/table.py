"""Where a latency table comes from: a file of the user's, what was kept of an earlier run, or measuring."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from onnxprune.analysis import Analysis
from onnxprune.budget.sizes import Sizes
from onnxprune.budget.table import VERSION, LatencyTable
from onnxprune.errors import BudgetError, UsageError
from onnxprune.files import user_cache
from onnxprune.passes.freeze import frozen_at
from onnxprune.passes.prepared import cut_model
from onnxprune.pipeline import Context
from onnxprune.rewrite.cut import CannotRewrite
from onnxprune.search.timing import SECONDS, measure_table, removal


def settled(analysis: Analysis) -> Sizes:
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
    kept = _kept(context, analysis)
    if not anew and kept.is_file():
        with suppress(UsageError):  # a damaged one is measured anew
            table = LatencyTable.load(kept)
            table.check_model(analysis.loaded.sha256, "")
            return table
    table = measure_table(context, sizes, seconds=seconds)
    with suppress(OSError, UsageError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        table.save(kept)
    return table


def _kept(context: Context, analysis: Analysis) -> Path:
    """The file of the table for this model, its input sizes and this device."""
    shapes = {name: list(shape) for name, shape in analysis.facts.probes[0].inputs.items()}
    key = json.dumps([VERSION, analysis.loaded.sha256, shapes, context.device.facts()], sort_keys=True)
    folder = context.cache or user_cache()
    return folder / f"latency-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
