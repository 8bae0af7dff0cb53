"""The plan that is written beside a model: both files come to be, or neither."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

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


@contextmanager
def waiting(plan: Path | None, result: Any) -> Iterator[None]:
    """Have the plan on disk under a temporary name while the model is written."""
    if plan is None:
        yield
        return
    with NamedTemporaryFile(dir=plan.parent, prefix=f".{plan.name}.", suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
    try:
        result.plan.save(temporary)
        yield
        # A temporary file is readable by its owner alone; a plan gets the rights any new file gets.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(plan)
    finally:
        temporary.unlink(missing_ok=True)
