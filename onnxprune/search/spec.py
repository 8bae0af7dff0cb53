"""The request of a budget: targets, gates on quality, and origin of times and sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxprune.allocation.knapsack import Sensitivity
from onnxprune.allocation.latency_model import LatencyTable
from onnxprune.errors import UsageError, argument
from onnxprune.search.evaluation import Metric, load_metric
from onnxprune.settings import check_needs, checked
from onnxprune.targets import Target

_FACTORED = ("macs", "params", "size", "latency")
"""Kinds of targets for which layers may be factorized as well."""


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """Targets, gates and options of a budget, checked on construction.

    Attributes:
        targets: limits on costs; empty for the smallest model within ``max_drop``. Kinds are ``macs``,
            ``params``, ``size``, ``latency`` and ``peak-memory``, a value is a share of the original or an amount.
        min_fidelity: the smallest permitted points of fidelity, above 1; or the smallest centred cosine of an output.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``.
        max_drop: permitted drop of the metric, or of the points of fidelity without one.
        latency_table: times of another device, as ``onnxprune profile`` wrote them.
        sensitivity: curves of groups pruned alone, as ``onnxprune sensitivity`` wrote them, or ``"measure"``: counts
            are then chosen by them, too.
        jobs: number of processes that measure it.
        factorize: whether to factorize layers as well, where that has a better quality than pruning; not for
            ``peak-memory``. None: where data are given and pruning alone damages the model.
        trials: candidates to try around the best one; None: with recovery about half a minute of work, else none.
        quantize: mode of the quantization that follows; sizes and times are then those of quantized models.
        must_run: whether a model that onnxruntime cannot run is an error; else the first candidate is taken unseen.
    """

    targets: tuple[Target, ...] = ()
    min_fidelity: float | None = None
    metric: Metric | None = None
    max_drop: float | None = None
    latency_table: str | Path | LatencyTable | None = None
    sensitivity: str | Path | Sensitivity | None = None
    jobs: int | None = None
    factorize: bool | None = None
    trials: int | None = None
    quantize: str | None = None
    must_run: bool = True

    @classmethod
    def of(
        cls,
        target: Any = None,
        min_fidelity: float | None = None,
        metric: str | Metric | None = None,
        max_drop: float | None = None,
        latency_table: str | Path | LatencyTable | None = None,
        sensitivity: str | Path | Sensitivity | None = None,
        jobs: int | None = None,
        factorize: bool | None = None,
        trials: int | None = None,
        quantize: str | None = None,
    ) -> BudgetSpec:
        """Build the request from the arguments of a call.

        Raises:
            UsageError: a value is not allowed, alone or with the others.
        """
        targets = () if target is None else checked("target", target)
        values: dict[str, Any] = {
            "max_drop": max_drop,
            "min_fidelity": min_fidelity,
            "metric": metric,
            "sensitivity": sensitivity,
        }
        values |= {"latency_table": latency_table, "factorize": factorize, "trials": trials}
        check_needs("prune", {"target": targets, **{name: checked(name, value) for name, value in values.items()}})
        if factorize:
            _check_factorization(targets)
        function = load_metric(metric) if isinstance(metric, str) else metric
        return cls(
            targets, min_fidelity, function, max_drop, latency_table, sensitivity, jobs, factorize, trials, quantize
        )

    @property
    def any(self) -> bool:
        """Return whether a budget was requested at all; ``min_fidelity`` alone is a gate on any pruning."""
        return bool(self.targets) or self.max_drop is not None

    @property
    def can_factorize(self) -> bool:
        """Return whether layers could be factorized for these targets as well, without a request to or not to."""
        if self.factorize is not None or not self.targets or self.latency_table is not None:
            return False
        return _unfactored(self.targets) is None


def _unfactored(targets: Sequence[Target]) -> Target | None:
    """Return the first target for which layers cannot be factorized; None where there is none."""
    return next((t for t in targets if t.kind not in _FACTORED), None)


def _check_factorization(targets: Sequence[Target]) -> None:
    """Check that layers may be factorized for these targets; raise UsageError otherwise."""
    unsupported = _unfactored(targets)
    if unsupported is not None:
        raise UsageError(
            f"{argument('factorize')} does not support a target of {unsupported}: the peak memory of factorized "
            "layers is not known in advance",
            hint=f"Drop one of the two; it goes with {', '.join(_FACTORED)}.",
        )
