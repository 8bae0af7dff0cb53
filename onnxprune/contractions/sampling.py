"""Which rows of a contraction to look at where there are far more of them than unknowns."""

from __future__ import annotations

import zlib

import numpy as np

from onnxprune.contractions.form import Array, Form, Picked


def rows_per_sample(form: Form, channels: int, samples: int | None, per_column: int = 30, least: int = 1 << 14) -> int:
    """Rows to take of every sample, so that all ``samples`` (512 where unknown) give enough of them together.

    Args:
        per_column: how many; what is estimated from them errs by about 1 / sqrt(per_column).
        least: rows to take however few columns there are.
    """
    columns = channels // form.parts * form.taps
    return -(-max(per_column * columns, least) // (samples or 512))


def pick(form: Form, data: Array, per_sample: int) -> Picked:
    """That many rows of every sample, the same for the same data; None where that is (nearly) all of them."""
    total = form.count(data.shape)
    wanted = per_sample * len(data)
    if wanted * 4 >= total * 3:
        return None
    seed = zlib.crc32(np.ascontiguousarray(data.ravel()[:4096]).tobytes())
    # One random row out of each of equally long runs: spread over samples and positions.
    edges = np.linspace(0, total, wanted + 1)
    offsets = np.random.default_rng(seed).random(wanted)
    return np.minimum((edges[:-1] + offsets * np.diff(edges)).astype(np.int64), total - 1)
