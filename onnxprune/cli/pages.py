"""Files that commands write beside models: reports for people and for machines."""

from __future__ import annotations

from pathlib import Path

from onnxprune.errors import UsageError


def check(model: Path, *targets: Path | None) -> None:
    """Whether these files can be written without harm; raises UsageError."""
    from onnxprune.model.save import check_output

    given = [target for target in targets if target is not None]
    if len({target.resolve() for target in given}) < len(given):
        raise UsageError("two outputs are the same file", hint="Give different paths.")
    for target in given:
        check_output(target, model)
