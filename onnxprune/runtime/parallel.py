"""Independent work on the cores there are, without BLAS threads and our own standing in each other's way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def cores() -> Iterator[ThreadPoolExecutor]:
    """A thread per core, and one BLAS thread in each of them."""
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield pool


def spread(work: Callable[[T], R], items: Sequence[T], *, heavy: bool = False) -> list[R]:
    """``work`` of every item, in order, several at a time.

    Args:
        heavy: a single item has products large enough to be shared between BLAS threads. Small ones take longer that
            way, and many times longer where other programs want the cores too.
    """
    if len(items) < 2 and heavy:
        return [work(item) for item in items]
    with cores() as pool:
        return list(pool.map(work, items))
