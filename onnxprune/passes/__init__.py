"""Passes: the stages of a pipeline, each a call from model to model; write your own, see CONTRIBUTING."""

from typing import Any

from onnxprune.errors import UsageError
from onnxprune.passes.adopt import Adopt
from onnxprune.passes.depth import Depth
from onnxprune.passes.exact import Exact
from onnxprune.passes.experts import Experts
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.finetune import Finetune
from onnxprune.passes.flush import Flush
from onnxprune.passes.prune import Prune
from onnxprune.passes.quantize import Quantize
from onnxprune.passes.recover import Recover
from onnxprune.passes.regularize import Regularize
from onnxprune.passes.remove_dead import RemoveDead
from onnxprune.passes.rotate import Rotate
from onnxprune.passes.sparsify import Sparsify
from onnxprune.passes.validate import Validate
from onnxprune.passes.vocabulary import Vocabulary
from onnxprune.passes.zeros import LockZeros, StoreZeros
from onnxprune.pipeline import (
    Context,
    Guarantee,
    Model,
    Pass,
    PassResult,
    Pipeline,
    Requirement,
    Result,
    RunSettings,
    get,
    names,
    register,
    unregister,
)

__all__ = [
    "Adopt",
    "Context",
    "Depth",
    "Exact",
    "Experts",
    "Factorize",
    "Finetune",
    "Flush",
    "Guarantee",
    "LockZeros",
    "Model",
    "Pass",
    "PassResult",
    "Pipeline",
    "Prune",
    "Quantize",
    "Recover",
    "Regularize",
    "RemoveDead",
    "Requirement",
    "Result",
    "Rotate",
    "RunSettings",
    "Sparsify",
    "StoreZeros",
    "Validate",
    "Vocabulary",
    "get",
    "names",
    "register",
    "unregister",
]


def __dir__() -> list[str]:
    return [*__all__]


class _Ported(UsageError, AttributeError):
    """A name of the old contract of passes."""


def __getattr__(name: str) -> Any:
    if name in ("State", "state"):
        raise _Ported(
            f"onnxprune.passes.{name} is no more: a pass is called with (context, model) and returns "
            "PassResult(model, facts).",
            hint="See CONTRIBUTING, 'Add a pass'.",
        )
    raise AttributeError(f"module 'onnxprune.passes' has no attribute {name!r}")
