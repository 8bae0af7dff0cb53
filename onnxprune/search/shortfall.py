"""What is said where a budget is not met: the best that was reached, what limits it, and the nearest that works."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from onnxprune.budget.allocate import least
from onnxprune.budget.costs import Peak
from onnxprune.budget.latency import Latency
from onnxprune.budget.target import Target
from onnxprune.errors import BudgetError
from onnxprune.search.problem import Answer, Problem

# Room above the least that can be reached, so that the suggested budget does work.
_ROOM = 1.03
_MOST = 3


class Shortfall:
    """Errors about one problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def unreachable(self) -> BudgetError:
        """No counts are within the targets."""
        problem, limits = self._problem, self._problem.limits()
        reached = {t: problem.reachable(t.kind) for t in problem.targets}
        bad = {t: r for t, r in reached.items() if r > limits[t.kind]}
        if not bad:
            what = " and ".join(map(str, problem.targets))
            return BudgetError(
                f"{what} cannot be reached together, though each can alone.",
                hint=f"Nothing was written. Loosen one of them. {self._limits(problem.targets[0].kind)}",
            )
        first = next(iter(bad))
        least_share = bad[first] / problem.base(first.kind)
        nearest = " ".join(f"--target {self._roomy(t, r)}" for t, r in bad.items())
        best = first.with_limit(bad[first], problem.base(first.kind))
        share = f" ({100 * least_share:.1f} % of the original)" if first.absolute else ""
        return BudgetError(
            f"{first} cannot be reached: the best is {best}{share}.",
            hint=f"Nothing was written. {self._limits(first.kind)} The nearest budget that works: {nearest}",
        )

    def missed(self, best: Answer) -> BudgetError:
        """The final model costs more than it may, after all corrections."""
        limits, problem = self._problem.limits(), self._problem
        bad = [t for t in problem.targets if best.costs[t.kind] > limits[t.kind]]
        reached = ", ".join(str(t.with_limit(best.costs[t.kind], problem.base(t.kind))) for t in bad)
        nearest = " ".join(f"--target {self._roomy(t, best.costs[t.kind])}" for t in bad)
        return BudgetError(
            f"{', '.join(map(str, bad))} was not met: the best that was reached is {reached}.",
            hint=f"Nothing was written. {self._limits(bad[0].kind)} The nearest budget that works: {nearest}",
        )

    def gate(self, why: str, nearest: tuple[Target, ...] | None) -> BudgetError:
        """The targets are met, the quality is not."""
        works = " ".join(f"--target {t}" for t in nearest) if nearest else ""
        hint = f"The nearest budget that works: {works}" if works else "No cut was found that passes."
        return BudgetError(f"{why}.", hint=f"Nothing was written. {hint}")

    def _roomy(self, target: Target, cost: float) -> Target:
        return target.with_limit(cost * _ROOM, self._problem.base(target.kind))

    def _limits(self, kind: str) -> str:
        """What holds most of what is left, in a sentence."""
        problem = self._problem
        analysis = problem.analysis
        cost = problem.costs[kind]
        kept = least(problem.choices["scores"], cost)
        widest = problem.selector.request.widest
        more = f" No group loses more than {widest:g} of its units (--max-ratio)." if widest < 1 else ""
        if isinstance(cost, Peak):
            name, share = cost.dearest(kept)
            return f"Of what is left, {100 * share:.0f} % are activations, most of them alive at {name}.{more}"
        if isinstance(cost, Latency):
            return f"What is left takes most time in {_largest(cost.of_nodes(kept))}.{more}"
        shape = problem.sizes.at(kept[None])

        def elements(name: str) -> int:
            found = shape(name) or ()
            return int(prod(int(n[0]) if hasattr(n, "shape") else n for n in found))

        def whole(name: str) -> object:
            found = shape(name)
            return found and tuple(int(n[0]) if hasattr(n, "shape") else n for n in found)

        layers = analysis.layer_facts(whole, elements)
        after = {x.name: x.macs_after if kind == "macs" else x.params_after for x in layers}
        reasons = {x.name: x.reason.partition(":")[0] for x in layers}
        return f"What is left lies most in {_largest(after, reasons)}.{more}"


def _largest(parts: Mapping[str, float], reasons: Mapping[str, str] | None = None) -> str:
    """The largest parts by name with their shares, and why they stay."""
    total, why = sum(parts.values()) or 1, reasons or {}
    top = sorted(parts, key=parts.__getitem__, reverse=True)[:_MOST]
    said = (f"{name} ({100 * parts[name] / total:.0f} %{', ' + why[name] if why.get(name) else ''})" for name in top)
    return ", ".join(said)
