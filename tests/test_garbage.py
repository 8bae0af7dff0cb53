"""Holding off the search for cyclic garbage leaves no trace, whatever happens meanwhile."""

from __future__ import annotations

import gc

import pytest

import onnxprune as op
from onnxprune.garbage import paused


def test_the_search_goes_on_afterwards() -> None:
    with paused():
        assert not gc.isenabled()
        with paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(op.OnnxpruneError):
        op.analyze(b"no model")
    assert gc.isenabled()


def test_who_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
