"""onnxprune: cut ONNX models exactly.

>>> import onnxprune as op
>>> result = op.prune("model.onnx", criterion="gm", ratio=0.3)  # doctest: +SKIP
>>> result.save("small.onnx")  # doctest: +SKIP
"""

from onnxprune import criteria, passes, rules
from onnxprune.api import analyze, prune
from onnxprune.errors import BudgetError, ModelError, OnnxpruneError, UsageError, ValidationError
from onnxprune.inspection import Analysis
from onnxprune.passes import Pipeline, Result
from onnxprune.plan import Plan

__version__ = "0.1.0"
__all__ = [
    "Analysis",
    "BudgetError",
    "ModelError",
    "OnnxpruneError",
    "Pipeline",
    "Plan",
    "Result",
    "UsageError",
    "ValidationError",
    "analyze",
    "criteria",
    "passes",
    "prune",
    "rules",
]
