"""Python's cyclic garbage collection, paused while a model is read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Pause the collection while the body runs, which makes many small long-lived objects.

    Each collection traverses all objects, in vain over a graph of thousands of nodes. Memory without cycles is freed
    as usual.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()
