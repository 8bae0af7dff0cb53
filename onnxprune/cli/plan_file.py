"""The plan that is written beside a model: both files come to be, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxprune.errors import UsageError, argument


def check(plan: Path, target: Path, model: Path, sources: Sequence[Path]) -> None:
    """Whether a plan can be written to ``plan`` beside the model at ``target``; raises UsageError."""
    from onnxprune.model.save import check_output

    if plan.resolve() == target.resolve():
        raise UsageError(
            f"{argument('plan_file')} and {argument('output')} are the same file {str(plan)!r}",
            hint="Give two different paths.",
        )
    try:
        check_output(plan, model, sources)
    except UsageError as error:
        what = error.message.removeprefix("the output ")
        raise UsageError(f"{argument('plan_file')}: {what}", hint="Choose another path for the plan.") from None
