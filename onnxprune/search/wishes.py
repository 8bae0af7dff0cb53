"""What a budget is asked for: targets, gates on quality, and where times and sensitivities come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from onnxprune.budget.sensitivity import Sensitivity
from onnxprune.budget.table import LatencyTable
from onnxprune.budget.target import Given as Targets
from onnxprune.budget.target import Target, targets
from onnxprune.errors import UsageError
from onnxprune.runtime.images import ImageOptions
from onnxprune.search.evaluation import Metric, load_metric
from onnxprune.selection.request import Options

FACTORED = ("macs", "params", "size", "latency")
"""Kinds of targets for which layers may be taken apart as well."""


class Given(TypedDict, total=False):
    """What calls take by name of a budget; :class:`Wishes` explains the fields."""

    target: Targets | None
    min_fidelity: float | None
    metric: str | Metric | None
    max_drop: float | None
    latency_table: str | Path | LatencyTable | None
    sensitivity: str | Path | Sensitivity | None
    jobs: int | None
    factorize: bool
    trials: int | None


class Running(TypedDict, total=False):
    """How a run reads data and where it measures time, as :meth:`onnxprune.passes.Pipeline.run` takes it."""

    samples: int | None
    batch_size: int | None
    images: ImageOptions | None
    memory_limit: int | None
    cache: str | Path | None
    providers: Sequence[str] | None
    threads: int | None


class Choosing(Options, Running, total=False):
    """What calls take by name that have no budget."""


class Asked(Options, Given, Running, total=False):
    """What calls take by name beside criterion and ratio."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """Checked when it is made.

    Attributes:
        targets: what the model may cost; empty for the smallest model within ``max_drop``. Kinds are ``macs``,
            ``params``, ``size``, ``latency`` and ``peak-memory``, a value is a share of the original or an amount.
        min_fidelity: the smallest cosine that an output may have to the original's.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``.
        max_drop: what the metric may lose, without one how many points of fidelity.
        latency_table: times of another device, as ``onnxprune profile`` wrote them.
        sensitivity: what cutting each group alone did, as ``onnxprune sensitivity`` wrote it, or ``"measure"``: counts
            are then chosen by it, too. jobs: processes to measure it in.
        factorize: take layers apart as well, where that keeps more than cutting them; not for ``peak-memory``.
        trials: answers to try around the best cut; None: with a repair about half a minute's worth of work, else none.
    """

    targets: tuple[Target, ...] = ()
    min_fidelity: float | None = None
    metric: Metric | None = None
    max_drop: float | None = None
    latency_table: str | Path | LatencyTable | None = None
    sensitivity: str | Path | Sensitivity | None = None
    jobs: int | None = None
    factorize: bool = False
    trials: int | None = None

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
        factorize: bool = False,
        trials: int | None = None,
    ) -> Wishes:
        """What a call says.

        Raises:
            UsageError: a value makes no sense, alone or with the others.
        """
        wanted = () if target is None else targets(target)
        if max_drop is not None and not (isinstance(max_drop, (int, float)) and 0 <= max_drop < float("inf")):
            raise UsageError(f"--max-drop {max_drop} is out of range.", hint="Allowed: 0 or more, such as 1.0.")
        if min_fidelity is not None and not 0 < min_fidelity <= 1:
            raise UsageError(f"--min-fidelity {min_fidelity} is out of range.", hint="Allowed: 0 < X <= 1.")
        if metric is not None and not wanted and max_drop is None:
            raise UsageError(
                "--metric says how good a model is, and nothing asks for it",
                hint="Give --max-drop, what it may lose, or --target, to choose by it.",
            )
        if latency_table is not None and not any(t.kind == "latency" for t in wanted):
            raise UsageError(
                "--latency-table holds measured times, and there is no target of that kind",
                hint="Give --target latency=0.6, or drop the table.",
            )
        if sensitivity is not None and not wanted and max_drop is None:
            raise UsageError(
                "--sensitivity says what groups can do without, and there is no budget to meet",
                hint="Give --target or --max-drop, or drop it.",
            )
        if trials is not None and not (isinstance(trials, int) and trials >= 0):
            raise UsageError(f"--trials {trials} is out of range.", hint="Allowed: whole numbers from 0.")
        if trials is not None and not wanted:
            raise UsageError(
                "--trials looks for better answers to targets, and there is none", hint="Give --target, or drop it."
            )
        if factorize:
            _check_factorize(wanted, max_drop)
        function = load_metric(metric) if isinstance(metric, str) else metric
        return cls(wanted, min_fidelity, function, max_drop, latency_table, sensitivity, jobs, factorize, trials)

    @property
    def any(self) -> bool:
        """Whether a budget was asked for at all; ``min_fidelity`` alone is a gate on any cut."""
        return bool(self.targets) or self.max_drop is not None


def _check_factorize(wanted: Sequence[Target], max_drop: float | None) -> None:
    """Whether layers may be taken apart for these targets; raises UsageError."""
    if not wanted and max_drop is None:
        raise UsageError(
            "--factorize takes layers apart to meet a budget, and there is none",
            hint="Give --target or --max-drop; 'onnxprune factorize' takes layers apart by a ratio.",
        )
    other = next((t for t in wanted if t.kind not in FACTORED), None)
    if other is not None:
        raise UsageError(
            f"--factorize cannot aim at {other}: what a model with new layers holds at once is not known in advance",
            hint=f"Drop one of the two; it goes with {', '.join(FACTORED)}.",
        )


def split(asked: Asked) -> tuple[Wishes, Running, Options]:
    """The budget of a call, how it runs, and how units are chosen.

    Raises:
        UsageError: a value of the budget makes no sense.
    """
    wishes = {name: value for name, value in asked.items() if name in Given.__annotations__}
    rest = {name: value for name, value in asked.items() if name not in wishes}
    return Wishes.of(**wishes), *split_running(cast(Choosing, rest))  # type: ignore[arg-type]


def split_running(asked: Choosing) -> tuple[Running, Options]:
    """How a call runs, and how units are chosen."""
    running = {name: value for name, value in asked.items() if name in Running.__annotations__}
    rest = {name: value for name, value in asked.items() if name not in running}
    return cast(Running, running), cast(Options, rest)
