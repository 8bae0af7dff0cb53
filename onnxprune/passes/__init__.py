"""Passes: the stages of a pipeline. A pass is a callable over :class:`State`; write your own, see CONTRIBUTING."""

from onnxprune.passes.adopt import Adopt
from onnxprune.passes.exact import Exact
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.flush import Flush
from onnxprune.passes.pipeline import Pipeline
from onnxprune.passes.prune import Prune
from onnxprune.passes.recover import Recover
from onnxprune.passes.registry import get, names, register, unregister
from onnxprune.passes.state import Pass, Result, State
from onnxprune.passes.validate import Validate

__all__ = [
    "Adopt",
    "Exact",
    "Factorize",
    "Flush",
    "Pass",
    "Pipeline",
    "Prune",
    "Recover",
    "Result",
    "State",
    "Validate",
    "get",
    "names",
    "register",
    "unregister",
]
