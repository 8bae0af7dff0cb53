"""Files that appear whole or not at all: written beside their target, renamed when every one of them is complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class Replacement:
    """A set of files to be written under temporary names and to replace their targets together.

    Targets take their names in the order they were opened; when a rename fails, those before it are undone.
    """

    def __init__(self) -> None:
        self._made: dict[Path, Path] = {}  # target -> temporary
        self._kept: dict[Path, Path] = {}  # target -> where its former file waits until all is done

    @contextmanager
    def open(self, target: Path) -> Iterator[BinaryIO]:
        """A file to write, which will be ``target``; on leaving, its bytes are on the disk. Raises OSError."""
        temporary = _beside(target)
        # Not tempfile: its files are readable by their owner only, these are to have the usual permissions.
        with temporary.open("xb") as file:
            self._made[target] = temporary
            yield file
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Puts every file in its target's place. Raises OSError, with every target as it was before."""
        done: list[Path] = []
        last = next(reversed(self._made), None)
        try:
            for target, temporary in self._made.items():
                if target != last and target.is_file():  # the last rename happens or does not: nothing to undo
                    kept = _beside(target)
                    target.rename(kept)
                    self._kept[target] = kept
                temporary.replace(target)
                done.append(target)
        except BaseException:
            for target in done:
                target.unlink()
            for target, kept in self._kept.items():
                kept.replace(target)
            self._kept.clear()
            raise

    def clean(self) -> None:
        """Removes whatever temporary file is left."""
        for leftover in (*self._made.values(), *self._kept.values()):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def replacing() -> Iterator[Replacement]:
    """Files that take their targets' places when the block ends well, and leave no trace when it does not."""
    files = Replacement()
    try:
        yield files
        files.commit()
    finally:
        files.clean()
