"""The update of Optimal Brain Surgeon, column by column: every zero is made up for by the columns behind it.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023, algorithm 1:
with U the upper Cholesky factor of the inverse of H = X^T X, a weight w of column j that becomes 0 changes the columns
k > j of its output by -w U_jk / U_jj. One factorization serves all columns and outputs.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.lapack import dtrtri

from onnxprune.sparsification.patterns import LOCKED, Mask, Pattern, Real

BLOCK = 128
"""Columns whose zeros are chosen together, and whose updates of the columns behind are one product."""
DAMPING = 0.01
"""Share of the mean diagonal of H that is added to it."""
_CACHED = 256  # outputs at a time, so that a block of columns stays in the processor's cache
_STRONGER = (1.0, 10.0, 100.0, 1e4)


def inverse_factor(gram: Real, damping: float = DAMPING) -> Real:
    """Return U, upper, with U^T U = (G + d m I)^-1, m the mean of the diagonal; d grows until that is regular.

    With J the reversal of the order, J G J = L L^T gives G = R R^T for the upper R = J L J, and U = R^-1: one Cholesky
    factorization and one triangular inverse.

    Args:
        gram: G [n, n], symmetric, positive semidefinite.
        damping: d.
    """
    n = len(gram)
    mean = float(np.trace(gram)) / n
    mean = mean if mean > 0 else 1.0
    for factor in _STRONGER:
        damped = gram[::-1, ::-1].copy(order="F")
        damped.flat[:: n + 1] += factor * damping * mean
        try:
            lower = cholesky(damped, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            continue
        inverse, info = dtrtri(np.asfortranarray(lower[::-1, ::-1]), lower=0, overwrite_c=1)
        if not info:
            return np.ascontiguousarray(np.triu(inverse))
    raise LinAlgError("the Gram matrix is not positive semidefinite")


def prune_columns(matrix: Real, factor: Real, pattern: Pattern, count: int, frozen: Mask) -> Real:
    """Return the matrix with zeros in the pattern and the other weights updated.

    Args:
        matrix: W [n, o], columns of the paper along axis 0.
        factor: U [n, n].
        pattern: the pattern, which fits n and o.
        count: number of blocks to set to 0; without a meaning for N:M.
        frozen: mask of weights that are 0 and stay 0, [n, o].
    """
    new = np.array(matrix, np.float64, order="C")
    n, outputs = new.shape
    step = max(pattern.width, BLOCK // pattern.width * pattern.width)
    total, pruned = n * outputs // pattern.block, 0
    for start in range(0, n, step):
        stop = min(start + step, n)
        part, local, part_frozen = new[start:stop], factor[start:stop, start:stop], frozen[start:stop]
        zeros = part_frozen.copy()
        if not pattern.nonzero:
            due = round(count * (stop * outputs // pattern.block) / total) - pruned
            zeros |= _zeros_of(part, np.diagonal(local), pattern, due, part_frozen)
            pruned += due
        errors = np.empty_like(part)
        for start_output in range(0, outputs, _CACHED):
            outputs_of_block = np.s_[:, start_output : start_output + _CACHED]
            errors[outputs_of_block] = _sweep(part[outputs_of_block], local, pattern, zeros[outputs_of_block])
        new[stop:] -= factor[start:stop, stop:].T @ errors
    return new


def _sweep(part: Real, local: Real, pattern: Pattern, zeros: Mask) -> Real:
    """Set zeros column by column and update the rest of the block in place; return the errors for the columns behind.

    Args:
        part: the columns of a block, of some outputs.
        local: U of these columns.
        pattern: the pattern.
        zeros: mask of the new zeros; for N:M the present zeros, to which others are added.
    """
    columns, errors = np.ascontiguousarray(part), np.empty_like(part, order="C")
    diagonal = np.diagonal(local)
    for j in range(len(columns)):
        if pattern.nonzero and j % pattern.group == 0:
            group = slice(j, j + pattern.group)
            zeros[group] |= _zeros_of(columns[group], diagonal[group], pattern, 0, zeros[group])
        errors[j] = np.where(zeros[j], columns[j], 0.0) / local[j, j]
        columns[j][zeros[j]] = 0.0
        if j + 1 < len(columns):
            columns[j + 1 :] -= local[j, j + 1 :, None] * errors[j]
    part[:] = columns
    return errors


def _zeros_of(part: Real, diagonal: Real, pattern: Pattern, count: int, frozen: Mask) -> Mask:
    """Return the zeros of a few columns by w^2 / U_jj^2, the error that each leaves."""
    scores = np.where(frozen, LOCKED, np.square(part / diagonal[:, None]))
    return np.asarray(pattern.zeros(scores[None], count)[0])


def round_columns(matrix: Real, factor: Real, scale: Real, top: int) -> Real:
    """Return whole numbers q so that ``q * scale`` replaces the matrix with the least change of its outputs.

    The same update as that of zeros: columns behind a column compensate its error of rounding. Frantar
    et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023. Zeros stay 0,
    and the largest weight of an output that reaches ``top`` stays there: a quantizer finds the same scale again.

    Args:
        matrix: W [n, o].
        factor: U [n, n].
        scale: value of 1 for each output [o], above 0.
        top: the largest whole number; the smallest is ``-top``.
    """
    work = np.array(matrix, np.float64, order="C")
    n = len(work)
    rounded = np.rint(work / scale)
    fixed = (work == 0) | (np.abs(rounded) >= top)
    result = np.empty_like(work)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        errors = np.empty((stop - start, work.shape[1]))
        for j in range(start, stop):
            nearest = np.clip(np.rint(work[j] / scale), -top, top)
            result[j] = np.where(fixed[j], np.clip(rounded[j], -top, top), nearest)
            errors[j - start] = (work[j] - result[j] * scale) / factor[j, j]
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return result
