"""onnxprune: prune ONNX models exactly.

>>> import onnxprune as op
>>> result = op.prune("model.onnx", criterion="gm", ratio=0.3)  # doctest: +SKIP
>>> result.save("small.onnx")  # doctest: +SKIP

Names are loaded when first used, so that the command line answers at once.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from onnxprune import criteria, devices, passes, rules, statistics
    from onnxprune.api import (
        analyze,
        compare,
        factorize,
        finetune,
        profile,
        prune,
        recover,
        sensitivity,
        sparsify,
        sweep,
        train,
    )
    from onnxprune.channels.analysis import Analysis
    from onnxprune.channels.plan import Plan
    from onnxprune.errors import (
        ArgumentError,
        BudgetError,
        ExtensionError,
        ModelError,
        OnnxpruneError,
        UsageError,
        ValidationError,
    )
    from onnxprune.io.weights import ArrayWeight
    from onnxprune.passes import Pipeline, Result
    from onnxprune.runtime.images import ImageOptions
    from onnxprune.search.budget import Budget
    from onnxprune.search.spec import BudgetSpec

__version__ = "0.1.0"
logging.getLogger("onnxprune").addHandler(logging.NullHandler())
_HOME = {
    "Analysis": "onnxprune.channels.analysis",
    "ArgumentError": "onnxprune.errors",
    "ArrayWeight": "onnxprune.io.weights",
    "Budget": "onnxprune.search.budget",
    "BudgetError": "onnxprune.errors",
    "BudgetSpec": "onnxprune.search.spec",
    "ExtensionError": "onnxprune.errors",
    "ImageOptions": "onnxprune.runtime.images",
    "ModelError": "onnxprune.errors",
    "OnnxpruneError": "onnxprune.errors",
    "Pipeline": "onnxprune.passes",
    "Plan": "onnxprune.channels.plan",
    "Result": "onnxprune.passes",
    "UsageError": "onnxprune.errors",
    "ValidationError": "onnxprune.errors",
    "analyze": "onnxprune.api",
    "compare": "onnxprune.api",
    "factorize": "onnxprune.api",
    "finetune": "onnxprune.api",
    "profile": "onnxprune.api",
    "prune": "onnxprune.api",
    "recover": "onnxprune.api",
    "sensitivity": "onnxprune.api",
    "sparsify": "onnxprune.api",
    "sweep": "onnxprune.api",
    "train": "onnxprune.api",
}
_RENAMED = {"repair": "recover"}
"""Old public names, which still work and warn."""
_PACKAGES = ("criteria", "devices", "passes", "rules", "statistics")
__all__ = [
    "Analysis",
    "ArgumentError",
    "ArrayWeight",
    "Budget",
    "BudgetError",
    "BudgetSpec",
    "ExtensionError",
    "ImageOptions",
    "ModelError",
    "OnnxpruneError",
    "Pipeline",
    "Plan",
    "Result",
    "UsageError",
    "ValidationError",
    "analyze",
    "compare",
    "criteria",
    "devices",
    "factorize",
    "finetune",
    "passes",
    "profile",
    "prune",
    "recover",
    "rules",
    "sensitivity",
    "sparsify",
    "statistics",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"onnxprune.{name}")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        shown = _HOME[name] == "onnxprune.api" and "ipykernel" in sys.modules
        return import_module("onnxprune.report.progress").watched(value) if shown else value
    if name in _RENAMED:
        new = _RENAMED[name]
        warn(f"onnxprune.{name} is called onnxprune.{new}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(_HOME[new]), new)
    raise AttributeError(f"module 'onnxprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
