"""What one cut was asked for: every option together, checked against each other before the work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

import click
from click.core import ParameterSource

from onnxprune.cli import options, plan_file
from onnxprune.cli.budget_options import BudgetOptions
from onnxprune.cli.data_options import DataOptions
from onnxprune.cli.device_options import DeviceOptions
from onnxprune.cli.recovery_options import RecoveryOptions
from onnxprune.cli.selection_options import SelectionOptions
from onnxprune.errors import UsageError

# What a plan already decides: giving one of these beside it would be silently ignored otherwise.
_DECIDED_BY_PLAN = {
    "criterion": "--criterion",
    "ratio": "--ratio",
    "layers": "--layer",
    "include": "--include",
    "exclude": "--exclude",
    **{entry.name: f"--{entry.name.replace('_', '-')}" for entry in fields(SelectionOptions)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one cut, checked one by one but not yet against each other."""

    model: Path
    output: Path | None
    criterion: str | None
    ratio: float
    layers: tuple[tuple[str, float], ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    selection: SelectionOptions
    budget: BudgetOptions
    device: DeviceOptions
    plan: Path | None
    apply_plan: Path | None
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    data: DataOptions
    cache: Path | None
    recovery: RecoveryOptions
    seed: int
    approximate: bool
    explain: bool
    no_validate: bool
    min_fidelity: float | None

    @property
    def target(self) -> Path:
        """Where the cut model goes."""
        return self.output or options.default_output(self.model)

    def asked(self, names: Sequence[str]) -> float | None:
        """The least that was asked of a group with these names: the last ``--layer`` that matches, else ``--ratio``.

        0 where a plan, a budget or a threshold over several groups decides; None when the group is excluded.
        """
        if self.apply_plan is not None or self.budget.any:
            return 0.0
        if _match(names, self.exclude) or (self.include and not _match(names, self.include)):
            return None
        matching = [share for pattern, share in self.layers if _match(names, [pattern])]
        if not matching and self.selection.scope != "local":
            return 0.0
        return min(matching[-1] if matching else self.ratio, self.selection.max_ratio or 1.0)


def _match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in names for pattern in patterns)


def check(ctx: click.Context, request: Request) -> None:
    """Everything that can be found wrong before the work starts; raises UsageError."""
    from onnxprune.criteria import registry
    from onnxprune.model.save import check_output
    from onnxprune.selection.scores import needs_data

    options.existing(request.model, "model")
    if request.criterion is not None:
        options.criterion(request.criterion, registry.names())
    sources = [path for path in (request.apply_plan, request.data.data) if path is not None]
    if request.apply_plan is not None:
        options.existing(request.apply_plan, "plan")
        for name, flag in _DECIDED_BY_PLAN.items():
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(
                    f"{flag} has no meaning with --apply-plan",
                    hint="The plan already says what is removed: drop one of the two.",
                )
    request.budget.check(ctx)
    request.device.check()
    request.data.check()
    request.recovery.check(data=request.data.data is not None)
    _check_cache(request)
    blind = request.apply_plan is None and request.data.data is None
    if blind and request.criterion is not None and registry.needs_of(registry.get(request.criterion)):
        raise needs_data(request.criterion)
    if request.min_fidelity is not None and request.no_validate:
        raise UsageError(
            "--min-fidelity needs the models to run, and --no-validate forbids it", hint="Drop one of the two."
        )
    check_output(request.target, request.model, sources)
    if request.plan is not None:
        plan_file.check(request.plan, request.target, request.model, sources)


def _check_cache(request: Request) -> None:
    needless = request.data.data is None and request.recovery.recover != "datafree"
    if request.cache is not None and needless and not any(t.kind == "latency" for t in request.budget.targets):
        raise UsageError("--cache keeps what data say, and there is no --data", hint="Give --data, or drop it.")
    options.folder("--cache", request.cache)
