"""Ranks from a share of the work, a share of the energy, or the noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize_scalar

from onnxprune.factorization.decompositions import Fit, Method, Mode, Ranks
from onnxprune.operators.kernels import Array, Real


def vbmf_rank(energies: Array, long: int, total: float | None = None) -> int:
    """Return the rank of the empirical variational Bayes solution of matrix factorization.

    With aspect a = short / long, the noise variance v is the minimiser of the free energy, and the values above
    sqrt(long v (1 + t)(1 + a / t)), t = 2.5129 sqrt(a), remain. Nakajima, Sugiyama, Babacan and Tomioka, Global
    Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization, JMLR 2013, Theorem 2 and Corollary 4.

    Args:
        energies: squared singular values of the matrix, falling, [short].
        long: its longer side.
        total: sum of squares of its entries, where ``energies`` are not all of them.

    Returns:
        0 (all is noise) to the number of values above rounding.
    """
    short = len(energies)
    values = np.asarray(energies, np.float64)
    total = float(values.sum()) if total is None else total
    num_nonzero = int(np.count_nonzero(values > 1e-12 * max(float(values.max(initial=0.0)), 1e-300)))
    if not num_nonzero or total <= 0:
        return 0
    aspect = short / max(long, short)
    long = max(long, short)
    tau = 2.5129 * np.sqrt(aspect)
    edge = (1.0 + tau) * (1.0 + aspect / tau)
    # No more components than this can be distinguished from noise.
    max_rank = min(int(np.ceil(short / (1.0 + aspect))) - 1, num_nonzero)
    noise_values = values[max_rank:]
    low = max(
        float(noise_values.mean()) / long if noise_values.size else 0.0,
        float(values[min(max_rank, short - 1)]) / (long * edge),
    )
    high = total / (short * long)
    if low <= 0 or low >= high:
        noise = max(high if low >= high else low, 1e-300) if low > 0 else 1e-300
    else:
        bounds = (np.log(low), np.log(high))
        minimum = minimize_scalar(
            lambda x: _free_energy(values, float(np.exp(x)), long, aspect, edge), bounds=bounds, method="bounded"
        )
        noise = float(np.exp(minimum.x))
    return min(int(np.count_nonzero(values > long * noise * edge)), num_nonzero)


def _free_energy(values: Real, noise: float, long: int, aspect: float, edge: float) -> float:
    """Return the free energy of noise variance ``noise``, up to constants: the sum of psi over all values."""
    x = values / (long * noise)
    x = np.maximum(x, 1e-300)
    signal = x[x > edge]
    cost = float((x[x <= edge] - np.log(x[x <= edge])).sum())
    b = signal - (1.0 + aspect)
    tau = 0.5 * (b + np.sqrt(np.maximum(b * b - 4.0 * aspect, 0.0)))
    cost += float((signal - tau + np.log((tau + 1.0) / signal) + aspect * np.log(tau / aspect + 1.0)).sum())
    return cost


def calibrated(rank: int, full: int, ratio: float) -> int:
    """Move a rank towards the full one (``ratio`` up to 1) or towards none (down to -1), as NetsPresso does.

    Remaining + removed x ratio for ratio > 0, remaining + remaining x ratio below; from 1 to ``full``.
    """
    moved = rank + ratio * ((full - rank) if ratio > 0 else rank)
    return int(np.clip(round(moved), 1, full))


Cost = Callable[[Method, Ranks], int]


@dataclass(frozen=True, slots=True)
class Choice:
    """Ranks with their cost and a lower estimate of the share of the output's energy that they lose."""

    ranks: Ranks
    cost: int
    loss: float


def rounded(rank: int, step: int, max_rank: int) -> int:
    """Return the nearest multiple of ``step`` from 1 to ``max_rank``, or ``max_rank`` where that is nearer."""
    if step <= 1 or rank >= max_rank:
        return max(1, min(rank, max_rank))
    return max(min(step, max_rank), min(max_rank, round(rank / step) * step))


def within(method: Method, cost: Cost, fit: Fit, limit: float, step: int = 1) -> Choice | None:
    """Return the ranks of most energy at a cost of at most ``limit``; None where no ranks are that cheap.

    Methods with several modes are searched in full: the loss of a choice is at most the sum of its modes' losses.

    Args:
        method: the decomposition.
        cost: cost of a method's factors at some ranks, linear in each of them.
        fit: the decomposed kernel.
        limit: the largest cost.
        step: ranks are multiples of it.
    """
    if len(fit.modes) == 1:
        return _single(method, cost, fit.modes[0], limit, step)
    spatial = fit.modes[2:]
    best: Choice | None = None
    for spatial_ranks in product(*([0, *range(1, m.size)] for m in spatial)):
        spatial_loss = sum(dropped_energies(m)[r] for m, r in zip(spatial, spatial_ranks, strict=True) if r)
        choice = _pair(method, cost, fit.modes, spatial_ranks, limit, step)
        if choice is not None:
            choice = Choice(choice.ranks, choice.cost, choice.loss + spatial_loss)
            best = choice if best is None or _order(choice) < _order(best) else best
    return best


def _order(choice: Choice) -> tuple[float, int]:
    """Return a sort key that prefers the cheaper one where losses differ by rounding."""
    return round(choice.loss, 9), choice.cost


def dropped_energies(mode: Mode) -> Real:
    """Return the share of the energy that is lost at rank 0, 1, ... [size + 1]."""
    assert mode.energies is not None
    total = float(mode.energies.sum())
    cumulative = np.concatenate([[0.0], np.cumsum(mode.energies[: mode.size])])
    return np.asarray(np.maximum(1.0 - cumulative / total, 0.0) if total > 0 else np.zeros_like(cumulative))


def _single(method: Method, cost: Cost, mode: Mode, limit: float, step: int) -> Choice | None:
    """Choose the only rank, to which the cost is proportional."""
    rank = min(int(limit // max(cost(method, (1,)), 1)), mode.size)
    rank -= rank % step if rank >= step else 0
    if rank < 1 or (step > 1 and rank % step and rank < mode.size):
        return None
    loss = 1.0 if mode.energies is None else float(dropped_energies(mode)[rank])
    return Choice((rank,), cost(method, (rank,)), loss)


def _pair(
    method: Method, cost: Cost, modes: Sequence[Mode], spatial_ranks: Ranks, limit: float, step: int
) -> Choice | None:
    """Choose two channel ranks, with cost a i + b i o + c o; either mode may stay whole (rank 0)."""

    def at(i: int, o: int) -> int:
        return cost(method, (i, o, *spatial_ranks))

    one, two, three = at(1, 1), at(2, 1), at(1, 2)
    b = at(2, 2) - two - three + one
    a, c = two - one - b, three - one - b
    fixed = one - a - b - c
    into, out = modes[0], modes[1]
    i = np.arange(step, into.size + 1, step)
    o = np.minimum((limit - fixed - a * i) // np.maximum(b * i + c, 1), out.size).astype(np.int64)
    o -= o % step
    lost_in, lost_out = dropped_energies(into), dropped_energies(out)
    options: list[tuple[float, Ranks]] = []
    fits = o >= 1
    if fits.any():
        loss = np.where(fits, lost_in[i] + lost_out[np.maximum(o, 0)], np.inf)
        k = int(np.argmin(loss))
        options.append((float(loss[k]), (int(i[k]), int(o[k]), *spatial_ranks)))
    rank = _alone(at(1, 0), at(2, 0), into.size, limit, step)
    options += [(float(lost_in[rank]), (rank, 0, *spatial_ranks))] if rank else []
    rank = _alone(at(0, 1), at(0, 2), out.size, limit, step)
    options += [(float(lost_out[rank]), (0, rank, *spatial_ranks))] if rank else []
    if not options:
        return None
    loss_of, ranks = min(options)
    return Choice(ranks, at(*ranks[:2]), loss_of)


def _alone(first: int, second: int, max_rank: int, limit: float, step: int) -> int:
    """Return the largest rank of one mode, the other whole, from its cost at ranks 1 and 2; 0 where none fits."""
    slope = second - first
    rank = min(int((limit - first + slope) // max(slope, 1)), max_rank)
    return max(rank - rank % step, 0)


def by_energy(fit: Fit, share: float, step: int = 1) -> Ranks:
    """Return the smallest ranks that keep ``share`` of the energy of every mode; spatial axes stay whole."""
    ranks = []
    for mode in fit.modes[:2]:
        enough = np.flatnonzero(1.0 - dropped_energies(mode) >= share - 1e-12)
        rank = int(enough[0]) if enough.size else mode.size
        ranks.append(rounded(rank, step, mode.size))
    return tuple(ranks)


def by_vbmf(fit: Fit, ratio: float = 0.0, step: int = 1) -> Ranks:
    """Return the ranks above noise, see :func:`vbmf_rank`, moved by a calibration ratio from -1 to 1."""
    ranks = []
    for mode in fit.modes[:2]:
        assert mode.energies is not None
        rank = vbmf_rank(_values(mode.energies, mode.other), mode.other)
        ranks.append(rounded(calibrated(rank, mode.size, ratio), step, mode.size))
    return tuple(ranks)


def _values(energies: Array, other: int) -> Array:
    """Return no more values than the shorter side has."""
    return energies[: max(other, 1)]
