"""The plan that is written beside a model: both files come to be, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxprune.errors import UsageError


def check(plan: Path, target: Path, model: Path, sources: Sequence[Path]) -> None:
    """Whether a plan can be written to ``plan`` beside the model at ``target``; raises UsageError."""
    from onnxprune.model.save import check_output

    if plan.resolve() == target.resolve():
        raise UsageError(f"--plan and --output are the same file {str(plan)!r}", hint="Give two different paths.")
    try:
        check_output(plan, model, sources)
    except UsageError as error:
        what = error.message.removeprefix("the output ")
        raise UsageError(f"--plan: {what}", hint="Choose another path for the plan.") from None
