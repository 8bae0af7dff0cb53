"""Criteria under their public name: functions from arrays to one score per channel.

Add your own with :func:`register`, see CONTRIBUTING.
"""

from onnxprune.importance.criteria import (
    Criterion,
    Description,
    Maps,
    Slot,
    describe,
    get,
    names,
    needs,
    needs_of,
    register,
    unregister,
)

__all__ = [
    "Criterion",
    "Description",
    "Maps",
    "Slot",
    "describe",
    "get",
    "names",
    "needs",
    "needs_of",
    "register",
    "unregister",
]


def __dir__() -> list[str]:
    return [*__all__]
