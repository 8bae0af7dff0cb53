"""Python's search for cyclic garbage, held off while a model is taken in."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No search while the body runs, which makes many small objects that all stay.

    Each search walks over every object there is: over a graph of thousands of nodes again and again, for nothing.
    Memory without cycles is freed as ever.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()
