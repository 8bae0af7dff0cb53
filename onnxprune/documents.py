"""Text files that people keep: written whole or not at all, read with a word for everything that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxprune import files
from onnxprune.errors import UsageError


def write(path: Path, text: str, what: str = "") -> None:
    """Write a text file whole or not at all; ``what`` names it in the error, such as "the plan".

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        files.write(path, encoded(text))
    except OSError as error:
        named = f"{what} to {str(path)!r}" if what else repr(str(path))
        raise UsageError(f"Cannot write {named}: {error.strerror}.") from None


def encoded(text: str) -> bytes:
    """UTF-8; parts of file names that are not UTF-8 are written as their escapes."""
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path, what: str, kind: str, *, missing: str = "", hint: str = "") -> Any:
    """The data of a JSON file.

    Args:
        what, kind: it and what it is, such as "the plan" and "plan file". missing, hint: the next step where there is
            no such file, and where it is not JSON.

    Raises:
        UsageError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"No such {kind}: {str(path)!r}.", hint=missing) from None
    except OSError as error:
        raise UsageError(f"Cannot read {what} {str(path)!r}: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}.", hint=hint) from None
