"""Is a mixed-integer program worth it? Random allocations by linear program and rounding, and by branch and bound.

python tools/bench_allocation.py                             20 instances of 60 groups with 16 levels
python tools/bench_allocation.py --groups 20 --rows 3 --instances 50

An instance is what ``onnxprune/allocation/knapsack.py:allocate`` solves: losses that rise and costs that fall with the
removed share of every group, under a budget of a half, here of costs that add up over groups. Compared are the loss of
one rounded linear program (``pack``), that of the whole allocation with the single steps that it ends with, and that of
branch and bound (``scipy.optimize.milp``). All hold the limits.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from onnxprune.allocation.knapsack import Choices, Limit, allocate, pack

Array = NDArray[np.float64]


def instance(seed: int, groups: int, levels: int, rows: int) -> tuple[list[Array], list[Array], Array]:
    """Return losses [levels] and costs [levels, rows] of every group, and limits [rows]."""
    draw = np.random.default_rng(seed)
    share = np.linspace(0.0, 1.0 - 1.0 / levels, levels)[::-1]  # the removed share, for rising numbers of units
    losses, costs = [], []
    for _ in range(groups):
        scale, power = draw.lognormal(0.0, 1.5), draw.uniform(1.0, 4.0)
        steps = np.abs(np.diff(scale * share**power, append=0.0)) * draw.uniform(0.3, 1.7, levels)
        losses.append(np.cumsum(steps[::-1])[::-1])
        size = draw.lognormal(0.0, 1.0, rows)
        costs.append((1.0 - share)[:, None] * size)
    limits = 0.5 * sum((cost[-1] for cost in costs), np.zeros(rows))
    return losses, costs, limits


class Sums:
    """Costs that add up over groups.

    Args:
        costs: [levels, rows] of every group.
    """

    def __init__(self, costs: list[Array]) -> None:
        self._costs = costs

    def rows(self, counts: NDArray[np.int64]) -> Array:
        """Return costs [cuts, rows] for levels [cuts, groups]."""
        per_group = [cost[column] for cost, column in zip(self._costs, counts.T, strict=True)]
        return np.asarray(np.sum(per_group, axis=0))


def by_integers(losses: list[Array], costs: list[Array], limits: Array, seconds: float) -> tuple[float, bool]:
    """Return the loss of the best choice that branch and bound finds in the time, and whether it is proved to be best.

    Returns infinity where it finds none.
    """
    owner = np.repeat(np.arange(len(losses)), [len(loss) for loss in losses])
    loss, cost = np.concatenate(losses), np.concatenate(costs)
    one_each = (np.arange(len(losses))[:, None] == owner).astype(np.float64)
    scale = np.maximum(np.abs(cost).max(axis=0), np.abs(limits))
    answer = milp(
        loss / loss.max(),
        integrality=np.ones(loss.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((cost / scale).T, -np.inf, limits / scale),
        ],
        options={"time_limit": seconds},
    )
    return (np.inf, False) if answer.x is None else (float(loss @ np.rint(answer.x)), bool(answer.status == 0))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=60)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1, help="number of limits")
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="largest time of branch and bound")
    given = parser.parse_args()
    print("seed  rounded  allocated    ms   integer    ms  proved  lower by")
    gains, rounded_gains, times = [], [], []
    for seed in range(given.instances):
        losses, costs, limits = instance(seed, given.groups, given.levels, given.rows)
        packed = pack(losses, costs, limits)
        choices = Choices([np.arange(given.levels)] * given.groups, losses)
        row_limits = [Limit(Sums([cost[:, [row]] for cost in costs]), limits[row]) for row in range(given.rows)]
        start = time.perf_counter()
        allocation = allocate(choices, row_limits)
        middle = time.perf_counter()
        best, is_proved = by_integers(losses, costs, limits, given.seconds)
        end = time.perf_counter()
        if packed is None or allocation is None:
            print(f"{seed:4}  no solution")
            continue
        gains.append(1.0 - best / allocation.loss)
        rounded_gains.append(1.0 - best / packed.loss)
        times.append((middle - start, end - middle))
        print(
            f"{seed:4} {packed.loss:8.3f} {allocation.loss:10.3f} {1e3 * times[-1][0]:5.0f}  {best:8.3f} "
            f"{1e3 * times[-1][1]:5.0f}  {'yes' if is_proved else 'no':>6} {gains[-1]:9.2%}"
        )
    if gains:
        ours, integer = (median(column) for column in zip(*times, strict=True))
        print(
            f"lower than the allocation by {mean(gains):.2%} in the mean, {max(gains):.2%} at most (than one rounded "
            f"program by {mean(rounded_gains):.2%}, {max(rounded_gains):.2%}); median {1e3 * ours:.0f} ms and "
            f"{1e3 * integer:.0f} ms, {1e3 * max(t for _, t in times):.0f} ms at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
