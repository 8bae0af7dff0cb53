"""Criteria under their public name: functions from arrays to one score per channel.

Add your own with :func:`register`, see CONTRIBUTING.
"""

from onnxprune.importance.criteria import (
    Criterion,
    Maps,
    Slot,
    get,
    names,
    needs,
    needs_of,
    register,
    unregister,
)

__all__ = ["Criterion", "Maps", "Slot", "get", "names", "needs", "needs_of", "register", "unregister"]
