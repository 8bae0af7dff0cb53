"""Freed memory goes back where the C library keeps it, and other platforms are left alone."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.runtime.memory import return_freed_memory

BLOCK, COUNT = 32 << 10, 6000  # below the size from which the C library maps every block by itself


def anonymous() -> int:
    """Return bytes of this process that no file stands for."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_freed_blocks_below_others_go_back() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("another C library")
    blocks = [np.ones(BLOCK, np.uint8) for _ in range(COUNT)]
    last, before = blocks[-1], anonymous()
    blocks.clear()
    return_freed_memory()
    assert before - anonymous() > 0.5 * BLOCK * COUNT
    assert last.all()


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_without_such_a_function_nothing_happens(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", none)
    return_freed_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    return_freed_memory()
